"""Attacks under an l-infinity bound, as pure functions of a loss closure.

    x_adv = pgd(loss, x, eps, alpha, k, start)  # Madry et al. 2018, arXiv 1706.06083: what training uses
    check(x, x_adv, eps)                        # ‖x_adv − x‖∞ ≤ ε, x_adv in [0, 1], finite
    found = apgd(loss, x, eps, start)           # Croce & Hein 2020, arXiv 2003.01690: what evaluation uses
    found = ensemble(logits, x, y, eps, noise)  # APGD-CE × 5, targeted APGD-DLR × 9: AutoAttack
    found = square(loss, x, eps, generators)    # Andriushchenko et al. 2020, arXiv 1912.00049: no gradients

Units, everywhere in this file: images are float32 in [0, 1], and so are ε and α (4/255 is 0.0157, never "4").
Nothing here knows a model, a label, a rank or a config: whoever calls closes over those, freezes the
parameters and chooses the mode of the network. That is why both stages and evaluation can share one attack.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-6  # x + δ is rounded to float32 at magnitude ≤ 1, where numbers are 6e-8 apart


def random_start(x: Tensor, eps: float, generators: list[torch.Generator]) -> Tensor:
    """x + δ₀ with δ₀ ~ U(−ε, ε), clipped to the image box.   official: llava_llama.py:98-104

    x: [B, C, H, W] float32 in [0, 1].  eps: in [0, 1] units.  generators: B CPU generators, one for each
    sample: noise that belongs to the sample is the same in 1 process, in W processes and in any batch size.
    """
    if len(generators) != len(x):
        raise ValueError(f'random_start: {len(generators)} generators for {len(x)} images; needs one each')
    noise = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x.device)
    return (x + (2 * noise - 1) * eps).clamp(0, 1)


def pgd(loss, x: Tensor, eps: float, alpha: float, k: int, start: Tensor | None = None) -> Tensor:
    """k steps of projected sign ascent on `loss`; returns the last iterate, as the authors do, detached.

    max over ‖δ‖∞ ≤ ε, 0 ≤ x+δ ≤ 1 of loss(x + δ)       arXiv 2501.09446;   official: llava_llama.py:98-150

    loss: maps images [B, C, H, W] to a scalar to be maximised.  x: float32 in [0, 1].  eps, alpha: in [0, 1]
    units.  start: first iterate, x itself by default.  The images stay float32 whatever the network computes
    in: in bfloat16 the numbers near 1 are 1/256 apart, so that ‖δ‖∞ would leave the ball by up to 2/255."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)  # ball and box are one interval for each pixel
    x_adv = x if start is None else start
    for _ in range(k):
        x_adv = x_adv.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(x_adv), x_adv)[0]  # of the pixels: no parameter gets a .grad
        x_adv = (x_adv.detach() + alpha * gradient.sign()).clamp(low, high)
    return x_adv.detach()


def check(x: Tensor, x_adv: Tensor, eps: float) -> None:
    """Raises AssertionError unless x_adv is a valid adversarial image: float32 (or 64), in box and ball."""
    if x_adv.dtype not in (torch.float32, torch.float64) or x_adv.shape != x.shape:
        found = f'{x_adv.dtype} {tuple(x_adv.shape)}'
        raise AssertionError(f'attack: images are {found}, must be float32 {tuple(x.shape)}')
    # one number decides, so that a GPU is waited for once; NaN fails every comparison, hence the "not"
    distance, below, above = torch.stack([(x_adv - x).abs().max(), -x_adv.min(), x_adv.max()]).tolist()
    if distance != distance:
        why = 'its loss or gradient is not a number (a learning rate too high, a number format too narrow)'
        raise AssertionError(f'attack: pixels are not finite: {why}')
    if not (distance <= eps + TOLERANCE and below <= 0 and above <= 1):
        pixels = f'pixels in [{-below:g}, {above:g}]'
        found = f'‖δ‖∞ = {distance * 255:.4f}/255 with ε = {eps * 255:g}/255, {pixels}'
        raise AssertionError(f'attack: {found}; must be within the ball and within [0, 1]')


# --------------------------------------------------------------------------------- attacks that judge a model
class Found(NamedTuple):
    """What an attack on N images found, a row for each image, in their order."""

    images: Tensor  # [N, C, H, W]  the first iterate that was done; where none was, that of the highest loss
    done: Tensor  # [N] bool  whether any iterate was
    iterations: Tensor  # [N] int64  steps made until then (0: the start was done), or the whole budget
    loss: Tensor  # [N]  the highest loss; of a done image, the highest up to then


def evaluate(loss, x: Tensor, idx: Tensor, batch_size: int, gradient: bool = True):
    """(loss [n], done [n], gradient [n, C, H, W] or None) of `loss(x, idx)`, in batches of about equal size.

    The gradient is that of the sum, which is every sample's own; a mean would underflow in half precision."""
    values, dones, gradients = [], [], []
    for part in torch.arange(len(x), device=x.device).tensor_split(-(-len(x) // batch_size)):
        images = x[part].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            value, done = loss(images, idx[part])
            if gradient:
                gradients.append(torch.autograd.grad(value.sum(), images)[0])
        values.append(value.detach())
        dones.append(done)
    return torch.cat(values), torch.cat(dones), torch.cat(gradients) if gradient else None


def apgd(
    loss,
    x: Tensor,
    eps: float,
    start: Tensor | None = None,
    iterations: int = 100,
    first_step: float = 2.0,
    batch_size: int = 64,
    compact: bool = True,
) -> Found:
    """Auto-PGD for the l∞ ball: momentum, and a step size of its own for each sample, halved when the loss
    stops rising.   Croce & Hein 2020, arXiv 2003.01690, Algorithm 1 and section 3.1, with its constants

    loss: maps images [b, C, H, W] and idx [b], their row numbers in x, to (loss [b], done [b] bool). The loss
    is to be maximised, sample by sample. A sample that is done leaves at once: no further forward pass is
    spent on it, and its neighbours move up into full batches. One that never is gets all `iterations`. x:
    float32 (or float64) in [0, 1].  eps: in [0, 1] units.  start: first iterate, x itself by default.
    first_step: in units of ε.  compact=False computes the done ones to the end, too (tests): the same."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    now = (x if start is None else start).detach()
    idx = torch.arange(len(x), device=x.device)
    done, lowest = torch.zeros_like(idx, dtype=torch.bool), torch.full_like(x[:, 0, 0, 0], float('-inf'))
    found = Found(now.clone(), done, torch.full_like(idx, iterations), lowest)
    if not len(x):
        return found

    def each(values: Tensor) -> Tensor:
        """[n] → [n, 1, 1, 1], one number for each image"""
        return values.view(-1, *[1] * (x.ndim - 1))

    step = torch.full_like(x[:, 0, 0, 0], first_step * eps)
    window, counted = max(int(0.22 * iterations), 1), 0  # steps from one checkpoint to the next; made of them
    value, done, gradient = evaluate(loss, now, idx, batch_size)
    previous, best, best_gradient, best_value = now, now, gradient, value
    rises, halved, best_at_check = torch.zeros_like(idx), torch.ones_like(done), value

    for i in range(iterations + 1):
        if i > 0:
            ascent = (now + each(step) * gradient.sign()).clamp(low, high)
            a = 0.75 if i > 1 else 1.0  # there is no direction to keep to at first
            previous, now = now, (now + a * (ascent - now) + (1 - a) * (now - previous)).clamp(low, high)
            last_value = value
            value, done, gradient = evaluate(loss, now, idx, batch_size, gradient=i < iterations)
            rises += value > last_value
            counted += 1
            better = value > best_value
            best, best_value = torch.where(each(better), now, best), torch.where(better, value, best_value)
            if gradient is not None:
                best_gradient = torch.where(each(better), gradient, best_gradient)
        found.loss[idx] = torch.where(found.done[idx], found.loss[idx], best_value)
        if (first := done & ~found.done[idx]).any():
            found.images[idx[first]], found.done[idx[first]] = now[first], True
            found.iterations[idx[first]] = i
        if i == iterations or found.done.all():
            break
        if compact and done.any():
            stay = ~done
            idx, low, high, now, previous = (t[stay] for t in (idx, low, high, now, previous))
            value, gradient, step, rises, halved = (t[stay] for t in (value, gradient, step, rises, halved))
            best, best_gradient, best_value = (t[stay] for t in (best, best_gradient, best_value))
            best_at_check = best_at_check[stay]
        if counted == window:  # a checkpoint: halve the step and return to the best point where …
            stuck = ~halved & (best_value <= best_at_check)  # … nothing came of the same step since then,
            halved = (rises <= 0.75 * window) | stuck  # … or the loss rose in 3/4 of the steps at most
            step = torch.where(halved, step / 2, step)
            now = torch.where(each(halved), best, now)
            gradient = torch.where(each(halved), best_gradient, gradient)
            best_at_check, rises, counted = best_value, torch.zeros_like(rises), 0
            window = max(window - max(int(0.03 * iterations), 1), max(int(0.06 * iterations), 1))
    standing = ~found.done[idx]
    found.images[idx[standing]] = best[standing]
    return found


def margin(z: Tensor, y: Tensor) -> Tensor:
    """log Σ_{j≠y} exp z_j − z_y, what an untargeted attack maximises.   logits [b, C], labels [b] → [b]

    Cross-entropy is softplus of it, so both rise together and their gradients have the same signs, which is
    all that (A)PGD takes from a loss. But the cross-entropy of a confident model, and its gradient, underflow
    to exactly 0 (at 100·cos many are that confident), and an attack that climbs it then stands still. This
    does not."""
    return z.scatter(1, y[:, None], float('-inf')).logsumexp(1) - z.gather(1, y[:, None])[:, 0]


def targeted_dlr(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """−(z_y − z_t) / (z₁ − (z₃ + z₄)/2), z₁ ≥ z₂ ≥ …: the targeted difference of logits ratio, which no
    rescaling of the logits changes.   arXiv 2003.01690, eq. (8)

    logits [b, C], labels [b], targets [b] → [b].

    It needs 4 classes. With 3 the denominator is z₁ − z₃, with 2 (where every ratio is constant) it is 1."""
    top = z.sort(1, descending=True).values
    if z.shape[1] > 3:
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    else:
        spread = top[:, 0] - top[:, 2] if z.shape[1] > 2 else 1.0
    return (z.gather(1, target[:, None]) - z.gather(1, y[:, None]))[:, 0] / (spread + 1e-12)


def ensemble(
    logits,
    x: Tensor,
    y: Tensor,
    eps: float,
    noise,
    restarts: int = 5,
    targets: int = 9,
    iterations: int = 100,
    batch_size: int = 64,
    compact: bool = True,
) -> Found:
    """The attack that ΔCLIP is judged by: APGD on the cross-entropy with 5 restarts, then APGD on the
    targeted DLR loss against the 9 classes nearest at x, 100 iterations each; a sample is done when its
    prediction is not y.

    AutoAttack's "custom" set-up of the authors' CLIP_benchmark, where a broken sample costs no more than the
    steps that broke it, a surviving one the whole budget of 1,400. Every break is confirmed by a fresh
    forward pass.

    logits: maps images [b, C, H, W] and idx [b], their row numbers in x, to logits [b, classes].  y: labels
    [N]. noise: (restart, row number) → CPU generator of the random start.  C classes have at most C − 1
    targets. Returns Found: of a sample that survives, the image with the highest margin of the
    cross-entropy's restarts, and `loss` that margin; of a broken one, `loss` is the breaking attack's.
    `iterations` counts all attacks."""
    with torch.no_grad():
        rows = torch.arange(len(x), device=x.device)
        z = torch.cat([logits(x[part], part) for part in rows.split(batch_size)])
    if not torch.isfinite(z.gather(1, y[:, None])).all():
        raise ValueError('ensemble: the model returns logits that are not finite on unperturbed images')
    rival = z.scatter(1, y[:, None], float('-inf'))
    rivals = rival.topk(min(targets, int(rival.isfinite().sum(1).min())), dim=1).indices  # [N, targets]
    broken = z.argmax(1) != y
    found = Found(x.clone(), broken.clone(), torch.zeros_like(y), torch.full_like(z[:, 0], float('-inf')))
    for attack in range(restarts + rivals.shape[1]):
        standing = (~found.done).nonzero()[:, 0]
        if not len(standing):
            break

        def loss(images: Tensor, idx: Tensor, standing=standing, target=attack - restarts):
            rows = standing[idx]
            z = logits(images, rows)
            wrong = z.argmax(1) != y[rows]
            return margin(z, y[rows]) if target < 0 else targeted_dlr(z, y[rows], rivals[rows, target]), wrong

        clean = x[standing]
        start = random_start(clean, eps, [noise(attack, i) for i in standing.tolist()])
        tried = apgd(loss, clean, eps, start, iterations, batch_size=batch_size, compact=compact)
        check(clean, tried.images, eps)
        broken = tried.done.clone()
        for part in tried.done.nonzero()[:, 0].split(batch_size):  # in other batches than before: what
            if len(part):  # counts is what the image does, not what an attack says of it
                with torch.no_grad():
                    broken[part] = logits(tried.images[part], standing[part]).argmax(1) != y[standing[part]]
        keep = broken | (tried.loss > found.loss[standing]) if attack < restarts else broken
        found.images[standing[keep]], found.loss[standing[keep]] = tried.images[keep], tried.loss[keep]
        found.done[standing] = broken
        found.iterations[standing] += tried.iterations
    return found


def square(loss, x: Tensor, eps: float, generators: list, queries: int = 5000, batch_size: int = 64) -> Found:
    """Square Attack: random search with squares of shrinking size, without any gradient; so nothing can hide
    from it by spoiling gradients.   Andriushchenko et al. 2020, arXiv 1912.00049, Algorithms 1 and 2, p = 0.8

    loss: as in apgd; no gradient is asked of it.  generators: one for each image, for all its draws."""
    n, channels, height, width = x.shape
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    stripes = torch.stack([torch.rand(channels, 1, width, generator=g) for g in generators]).to(x)
    draws = torch.stack([torch.rand(queries, 2 + channels, generator=g) for g in generators]).to(x)
    now = (x + eps * (2 * stripes - 1).sign()).clamp(low, high)
    idx = torch.arange(n, device=x.device)
    value, done, _ = evaluate(loss, now, idx, batch_size, gradient=False)
    found = Found(now, done, torch.where(done, 0, queries), value)
    across, down = torch.arange(width, device=x.device), torch.arange(height, device=x.device)
    for query in range(queries):
        r = (~found.done).nonzero()[:, 0]
        if not len(r):
            break
        # the share of the pixels that change is halved at these queries of 10,000, and as early in a smaller
        # budget
        marks = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
        halvings = sum(query / queries * 10_000 > mark for mark in marks)
        side = min(max(round((0.8 / 2**halvings * height * width) ** 0.5), 1), height, width)
        u = draws[r, query]  # place and colour
        top, left = (u[:, :1] * (height - side + 1)).long(), (u[:, 1:2] * (width - side + 1)).long()  # [n, 1]
        rows, columns = (down >= top) & (down < top + side), (across >= left) & (across < left + side)
        inside = rows[:, None, :, None] & columns[:, None, None]
        colour = 2 * eps * (2 * u[:, 2:] - 1).sign()[:, :, None, None]
        tried = torch.where(inside, found.images[r] + colour, found.images[r]).clamp(low[r], high[r])
        value, done, _ = evaluate(loss, tried, r, batch_size, gradient=False)
        better = done | (value > found.loss[r])
        found.images[r[better]], found.loss[r[better]], found.done[r] = tried[better], value[better], done
        found.iterations[r[done]] = query + 1
    return found
