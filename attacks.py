"""Attacks under an l-infinity bound, as pure functions of a loss closure.

    x_adv = pgd(loss, x, eps, alpha, k, start)        # Madry et al. 2018, arXiv 1706.06083
    check(x, x_adv, eps)                              # ‖x_adv − x‖∞ ≤ ε, x_adv in [0, 1], finite

Units, everywhere in this file: images are float32 in [0, 1], and so are ε and α (4/255 is 0.0157, never "4").
Nothing here knows a model, a label, a rank or a config: whoever calls closes over those, freezes the parameters
and chooses the mode of the network. That is why training (both stages) and evaluation can share one attack.
"""
import torch
from torch import Tensor

TOLERANCE = 1e-6  # x + δ is rounded to float32 at magnitude ≤ 1, where neighbouring numbers are 6e-8 apart


def random_start(x: Tensor, eps: float, generators: list[torch.Generator]) -> Tensor:
    """x + δ₀ with δ₀ ~ U(−ε, ε), clipped to the image box.   official: llava_llama.py:98-104

    x: [B, C, H, W] float32 in [0, 1].  eps: in [0, 1] units.  generators: B CPU generators, one for each sample: noise
    that belongs to the sample and not to the batch is the same in 1 process, in W processes and in any batch size.
    """
    if len(generators) != len(x):
        raise ValueError(f'random_start: {len(generators)} generators for {len(x)} images; one for each image is needed')
    noise = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x.device)
    return (x + (2 * noise - 1) * eps).clamp(0, 1)


def pgd(loss, x: Tensor, eps: float, alpha: float, k: int, start: Tensor | None = None) -> Tensor:
    """k steps of projected sign ascent on `loss`; returns the last iterate, as the authors do, without a graph.

    max over ‖δ‖∞ ≤ ε, 0 ≤ x+δ ≤ 1 of loss(x + δ)       METHOD.md, stage 1;   official: llava_llama.py:98-150

    loss: maps images [B, C, H, W] to a scalar to be maximised.  x: float32 in [0, 1].  eps, alpha: in [0, 1] units.
    start: first iterate, x itself by default.  The images stay float32 whatever the network computes in: in bfloat16
    the numbers near 1 are 1/256 apart, so that ‖δ‖∞ would leave the ball by up to 2/255.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)  # the ball and the box are one interval for each pixel
    x_adv = x if start is None else start
    for _ in range(k):
        x_adv = x_adv.detach().requires_grad_()
        gradient, = torch.autograd.grad(loss(x_adv), x_adv)  # of the pixels alone: no parameter gets a .grad
        x_adv = (x_adv.detach() + alpha * gradient.sign()).clamp(low, high)
    return x_adv.detach()


def check(x: Tensor, x_adv: Tensor, eps: float) -> None:
    """Raises AssertionError unless x_adv is a valid adversarial image: float32, finite, in the box and in the ball."""
    if x_adv.dtype != torch.float32 or x_adv.shape != x.shape:
        raise AssertionError(f'attack: images are {x_adv.dtype} {tuple(x_adv.shape)}, '
                             f'must be float32 {tuple(x.shape)}')
    # one number decides, so that a GPU is waited for once; NaN fails every comparison, hence the "not"
    distance, below, above = torch.stack([(x_adv - x).abs().max(), -x_adv.min(), x_adv.max()]).tolist()
    if not (distance <= eps + TOLERANCE and below <= 0 and above <= 1):
        raise AssertionError(f'attack: ‖δ‖∞ = {distance * 255:.4f}/255 with ε = {eps * 255:g}/255, '
                             f'pixels in [{-below:g}, {above:g}]; must be within the ball and within [0, 1]')
