import logging

import pytest
import torch
import torch.nn as nn
import torchattacks
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.square import SquareAttack

import attacks
import data

EPS, ALPHA = 8 / 255, 3 / 255


def noise(n, seed=0):
    return [data.generator(seed, 'start', i) for i in range(n)]


def images(n, seed=1, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    """A small random classifier that leaves the global generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def test_linear_loss_has_a_closed_form():
    """max over the ball of ⟨w, x+δ⟩ is ⟨w, x⟩ + ε‖w‖₁: wrong signs, projections or steps all miss it."""
    x = images(4, low=0.3, high=0.7)  # the box is out of reach
    w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))

    def loss(z):
        return (z * w).sum()

    for start in (None, attacks.random_start(x, EPS, noise(4))):
        x_adv = attacks.pgd(loss, x, EPS, ALPHA, 6, start)  # 6 · α = 18/255 crosses the ball from anywhere
        torch.testing.assert_close(loss(x_adv), loss(x) + 4 * EPS * w.abs().sum())
        attacks.check(x, x_adv, EPS)


def test_box_is_respected_at_its_edges():
    x = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    for sign in (-1, 1):
        x_adv = attacks.pgd(lambda z, sign=sign: sign * z.sum(), x, EPS, ALPHA, 5)
        attacks.check(x, x_adv, EPS)
        inward = x[0] if sign > 0 else x[1]  # the image with room in that direction
        assert torch.allclose((x_adv - x).abs().amax((1, 2, 3)).max(), torch.tensor(EPS))
        assert torch.equal(x_adv[1 if sign > 0 else 0], 1 - inward)


def test_equals_torchattacks(network):
    x, y = images(16), torch.arange(16) % 5
    theirs = torchattacks.PGD(network, eps=EPS, alpha=ALPHA, steps=7, random_start=False)(x, y)
    ours = attacks.pgd(lambda z: nn.functional.cross_entropy(network(z), y), x, EPS, ALPHA, 7)
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=2e-7
    )  # they project δ, we project x+δ: two roundings


def test_pgd_is_pure(network):
    x, y = images(4), torch.zeros(4, dtype=torch.long)
    before, mode = x.clone(), network.training
    start = attacks.random_start(x, EPS, noise(4))
    first = start.clone()
    x_adv = attacks.pgd(lambda z: nn.functional.cross_entropy(network(z), y), x, EPS, ALPHA, 3, start)
    assert all(p.grad is None for p in network.parameters()) and network.training == mode
    assert torch.equal(x, before) and torch.equal(start, first) and not x_adv.requires_grad


def test_random_start_belongs_to_the_sample():
    x = images(8, low=0.2, high=0.8)
    whole = attacks.random_start(x, EPS, noise(8))
    parts = torch.cat([attacks.random_start(x[i : i + 1], EPS, noise(8)[i : i + 1]) for i in range(8)])
    assert torch.equal(whole, parts)
    delta = (whole - x) / EPS  # uniform in (−1, 1): mean 0, variance 1/3
    assert abs(delta.mean()) < 0.05 and abs(delta.var() - 1 / 3) < 0.02 and delta.abs().max() <= 1 + 1e-4
    assert not torch.equal(whole[0] - x[0], whole[1] - x[1])
    attacks.check(x, whole, EPS)
    with pytest.raises(ValueError, match='3 generators for 8 images'):
        attacks.random_start(x, EPS, noise(3))


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda x: x + 9 / 255, 'ball'),
        (lambda x: x - 0.6, 'ball'),
        (lambda x: x.bfloat16(), 'float32'),
        (lambda x: x[:1], 'must be float32'),
        (lambda x: x.masked_fill(x == x.max(), float('nan')), 'not finite'),
        (lambda x: (x + 8 / 255).bfloat16().float(), 'ball'),
    ],
)  # the last one: what an attack in bfloat16, as the official code's, would give
def test_check_refuses(spoil, message):
    x = images(2, low=0.3, high=0.7)
    attacks.check(x, x, 0)
    with pytest.raises(AssertionError, match=message):
        attacks.check(x, spoil(x), EPS)


def test_check_refuses_to_leave_the_box():
    x = torch.full((1, 3, 8, 8), 0.99)
    with pytest.raises(AssertionError, match='within'):
        attacks.check(x, x + 5 / 255, EPS)


# -------------------------------------------------------------------------- APGD, the ensemble, Square Attack
class Waves(nn.Module):
    def __init__(self, frequency):
        super().__init__()
        self.frequency = frequency

    def forward(self, x):
        return torch.sin(self.frequency * x)


def classifier(classes=5, seed=0):
    """A small random network, rough enough that an attack takes many steps, in float64, where the order of a
    sum changes nothing that matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 6), Waves(10), nn.Linear(6, 16), Waves(6), nn.Linear(16, classes)
        )
    return network.double().requires_grad_(False)


def untargeted(network, y, stop=True):
    def loss(images, idx):
        z = network(images)
        return attacks.margin(z, y[idx]), (z.argmax(1) != y[idx]) & stop

    return loss


def easy_and_hard(network, n):
    """Images in float64, labelled as the network sees them: some are near a border of classes, some far from
    it."""
    x = images(n).double()
    return x, network(x).argmax(1)


class OriginalAPGD(APGDAttack):
    """AutoAttack's APGD. Its memory of losses starts as zeros and its first comparison reads one of them,
    where the paper's condition 1 compares with the loss at the start; that one entry is put right here."""

    start_loss = None

    def check_oscillation(self, x, j, k, y5, k3=0.75):
        if j - k + 1 == 0:
            x[-1] = self.start_loss
        return super().check_oscillation(x, j, k, y5, k3)


class OriginalTargeted(OriginalAPGD, APGDAttack_targeted):
    pass


@pytest.fixture
def float64_by_default():
    """AutoAttack keeps its memory of losses in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('iterations', [25, 100])
@pytest.mark.parametrize('targeted', [False, True])
def test_apgd_equals_autoattack(targeted, iterations, float64_by_default):
    network = classifier(10)
    x, y = easy_and_hard(network, 32)
    eps = 0.7 / 255  # where about half of them fall, most at the first step
    target = network(x).topk(3).indices[:, 2]
    start = attacks.random_start(x, eps, noise(32))
    kind = OriginalTargeted if targeted else OriginalAPGD
    theirs = kind(network, n_iter=iterations, eps=eps, device='cpu', logger=logging.getLogger())
    theirs.init_hyperparam(x)
    theirs.y_target = target
    theirs.start_loss = (
        theirs.dlr_loss_targeted(network(start), y)
        if targeted
        else nn.functional.cross_entropy(network(start), y, reduction='none')
    )
    with torch.random.fork_rng():  # it draws a start of its own before it takes this one
        best, stands, loss, _ = theirs.attack_single_run(x, y, x_init=start)

    def ours(stop):
        def f(images, idx):
            z = network(images)
            value = attacks.targeted_dlr(z, y[idx], target[idx]) if targeted else attacks.margin(z, y[idx])
            return value, (z.argmax(1) != y[idx]) & stop

        return attacks.apgd(f, x, eps, start, iterations)

    to_the_end, found = ours(False), ours(True)
    torch.testing.assert_close(to_the_end.images, best, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        to_the_end.loss if targeted else nn.functional.softplus(to_the_end.loss), loss, rtol=1e-10, atol=1e-12
    )
    assert torch.equal(found.done, ~stands) and 4 < found.done.sum() < 28
    attacks.check(x, found.images, eps)
    assert torch.equal(network(found.images).argmax(1) != y, found.done)


def test_apgd_on_a_linear_loss_has_a_closed_form():
    x = images(4, low=0.3, high=0.7)
    w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    never = torch.zeros(4, dtype=torch.bool)
    for first_step in (1.0, 2.0):  # 1 ε without a random start is what captions are attacked with
        found = attacks.apgd(
            lambda z, idx: ((z * w).sum((1, 2, 3)), never[idx]), x, EPS, iterations=5, first_step=first_step
        )
        torch.testing.assert_close(found.loss, (x * w).sum((1, 2, 3)) + EPS * w.abs().sum())
        assert found.iterations.tolist() == [5] * 4 and not found.done.any()
        attacks.check(x, found.images, EPS)


@pytest.mark.parametrize('attack', ['apgd', 'ensemble'])
def test_compaction_changes_nothing(attack):
    """Same broken set, same first broken iteration, same image, whatever leaves the batch, its size and the
    order."""
    network = classifier(12)
    x, y = easy_and_hard(network, 60)
    eps, order = 0.7 / 255, torch.randperm(60, generator=torch.Generator().manual_seed(3))

    def run(rows, **how):
        if attack == 'apgd':
            return attacks.apgd(
                untargeted(network, y[rows]),
                x[rows],
                eps,
                attacks.random_start(x, eps, noise(60))[rows],
                40,
                **how
            )

        def start(restart, i):
            return data.generator(restart, 'start', int(rows[i]))

        return attacks.ensemble(lambda z, idx: network(z), x[rows], y[rows], eps, start, 2, 9, 20, **how)

    plain = run(torch.arange(60), compact=False, batch_size=60)
    assert 10 < plain.done.sum() < 50 and len(plain.iterations[plain.done].unique()) > 1
    for rows, how in (
        (torch.arange(60), {'batch_size': 60}),
        (torch.arange(60), {'batch_size': 7}),
        (order, {'batch_size': 16}),
        (order, {'batch_size': 16, 'compact': False}),
    ):
        found = run(rows, **how)
        assert torch.equal(found.done, plain.done[rows]) and torch.equal(
            found.iterations, plain.iterations[rows]
        )
        torch.testing.assert_close(found.images, plain.images[rows], rtol=0, atol=1e-9)


def test_compaction_in_float32():
    network = classifier(12).float()
    x, y = easy_and_hard(classifier(12), 400)
    x = x.float()
    start = attacks.random_start(x, 0.7 / 255, noise(400))
    a, b = (
        attacks.apgd(untargeted(network, y), x, 0.7 / 255, start, 50, batch_size=size, compact=compact)
        for size, compact in ((400, False), (33, True))
    )
    assert (a.done != b.done).sum() <= 2  # 0.5 %: sums of another order, and signs of gradients near 0
    assert 80 < a.done.sum() < 320


def test_ensemble_wastes_nothing_and_shortens_nothing():
    network, seen = classifier(12), []
    x, y = easy_and_hard(network, 40)
    y = torch.where(torch.arange(40) < 4, (y + 1) % 12, y)  # four that are wrong unperturbed

    def logits(images, idx):
        seen.extend(idx.tolist())
        return network(images)

    found = attacks.ensemble(
        logits, x, y, 0.7 / 255, lambda restart, i: data.generator(restart, 'start', i), batch_size=16
    )
    survivors = ~found.done
    assert (
        found.done[:4].all()
        and torch.equal(found.images[:4], x[:4])
        and found.iterations[:4].tolist() == [0] * 4
    )
    assert survivors.sum() > 4 and found.done[4:].sum() > 4
    assert set(found.iterations[survivors].tolist()) == {5 * 100 + 9 * 100}
    passes = torch.bincount(torch.tensor(seen), minlength=40)
    assert passes[:4].tolist() == [1] * 4
    # one at the clean image, and in each of 14 attacks one at the start and one after each step
    assert passes[survivors].unique().tolist() == [1 + 14 * 101]
    # one more to confirm; an attack whose random start is done takes no step, so it is missing from
    # `iterations`
    broken = found.done & (found.iterations > 0)
    tried = torch.arange(1, 15)
    possible = [1 + int(n) + tried + 1 for n in found.iterations[broken]]
    assert all(p in some for p, some in zip(passes[broken].tolist(), possible))
    assert torch.equal(network(found.images).argmax(1) != y, found.done)
    attacks.check(x, found.images, 0.7 / 255)


def test_every_break_is_confirmed_by_a_fresh_forward_pass():
    """A model that is wrong only while its gradient is taken has broken nothing."""
    network = classifier(12)
    x, y = easy_and_hard(network, 8)

    def logits(images, idx):
        z = network(images)
        return z.roll(1, dims=1) if torch.is_grad_enabled() else z

    found = attacks.ensemble(
        logits, x, y, 1e-6, lambda restart, i: data.generator(restart, 'start', i), 2, 2, 5
    )
    assert not found.done.any() and torch.equal(network(found.images).argmax(1), y)


def test_every_restart_has_a_start_of_its_own():
    network, asked = classifier(12), []
    x, y = easy_and_hard(network, 3)

    def noise_of(restart, i):
        asked.append((restart, i))
        return data.generator(restart, 'start', i)

    attacks.ensemble(lambda z, idx: network(z), x, y, 1e-6, noise_of, 5, 9, 3)
    assert asked == [(restart, i) for restart in range(14) for i in range(3)]


@pytest.mark.parametrize('classes', [2, 3, 4, 6])
def test_ensemble_with_few_classes(classes):
    """There are at most C − 1 targets."""
    network = classifier(classes)
    x, y = easy_and_hard(network, 20)
    found = attacks.ensemble(
        lambda z, idx: network(z),
        x,
        y,
        0.5 / 255,
        lambda restart, i: data.generator(restart, 'start', i),
        2,
        9,
        10,
    )
    assert found.iterations[~found.done].unique().tolist() == [10 * (2 + classes - 1)]
    assert torch.equal(network(found.images).argmax(1) != y, found.done)


def test_ensemble_agrees_with_autoattack():
    network = classifier(12).float()
    x = images(200)
    y = network(x).argmax(1)
    with torch.random.fork_rng():
        original = AutoAttack(network, eps=0.7 / 255, version='custom', attacks=['apgd-ce', 'apgd-t'], seed=0)
        x_adv, _ = original.run_standard_evaluation(x, y)
    theirs = (network(x_adv).argmax(1) != y).float().mean()
    found = attacks.ensemble(
        lambda z, idx: network(z), x, y, 0.7 / 255, lambda restart, i: data.generator(restart, 'start', i)
    )
    assert 0.2 < theirs < 0.8 and found.done.float().mean() >= theirs - 0.005


def test_ensemble_refuses_logits_that_are_not_finite():
    with pytest.raises(ValueError, match='not finite'):
        attacks.ensemble(
            lambda z, idx: z.flatten(1)[:, :5] * float('nan'),
            images(2),
            torch.zeros(2, dtype=torch.long),
            EPS,
            None,
        )


def test_losses_are_those_of_autoattack():
    z = torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, target = torch.arange(50) % 10, (torch.arange(50) + 3) % 10
    theirs = APGDAttack_targeted(None, eps=EPS)
    theirs.y_target = target
    torch.testing.assert_close(attacks.targeted_dlr(z, y, target), theirs.dlr_loss_targeted(z, y))
    torch.testing.assert_close(
        nn.functional.softplus(attacks.margin(z, y)), nn.functional.cross_entropy(z, y, reduction='none')
    )
    sure = torch.tensor(
        [[200.0, 0.0, 10.0]], requires_grad=True
    )  # cross-entropy: value and gradient are exactly 0 in float32
    label = torch.tensor([0])
    assert nn.functional.cross_entropy(sure, label).item() == 0
    (gradient,) = torch.autograd.grad(attacks.margin(sure, label).sum(), sure)
    assert (
        attacks.margin(sure, label).item() == pytest.approx(-190, abs=1e-3)
        and gradient[0, 0] == -1
        and gradient[0, 2] > 0.9
    )


def test_square_attack():
    """No gradient is asked for; as strong as AutoAttack's; stays in the ball; one image's run is its own."""
    network = classifier(10).float()
    x = images(100)
    y, eps = network(x).argmax(1), 2 / 255

    def loss(z, idx):
        assert not torch.is_grad_enabled() and not z.requires_grad
        return untargeted(network, y)(z, idx)

    found = attacks.square(loss, x, eps, noise(100), queries=300, batch_size=32)
    attacks.check(x, found.images, eps)
    assert torch.equal(network(found.images).argmax(1) != y, found.done)
    assert (found.iterations[~found.done] == 300).all() and (found.iterations[found.done] < 301).all()
    with torch.random.fork_rng():
        theirs = SquareAttack(
            network, eps=eps, n_queries=300, seed=0, device='cpu', resc_schedule=True
        ).perturb(x, y)
    broken = (network(theirs).argmax(1) != y).float().mean()
    assert broken > 0.2 and found.done.float().mean() >= broken - 0.1
    part = attacks.square(
        lambda z, idx: untargeted(network, y[40:60])(z, idx),
        x[40:60],
        eps,
        noise(100)[40:60],
        queries=300,
        batch_size=7,
    )
    assert (part.done == found.done[40:60]).all()
    torch.testing.assert_close(part.images, found.images[40:60], rtol=0, atol=2e-7)


def test_attacks_are_pure():
    network = classifier(10).float().requires_grad_(True)
    x = images(6)
    y, before = network(x).argmax(1), x.clone()
    attacks.apgd(untargeted(network, y), x, EPS, iterations=5)
    attacks.ensemble(
        lambda z, idx: network(z), x, y, EPS, lambda r, i: data.generator(r, 'start', i), 1, 1, 5
    )
    attacks.square(untargeted(network, y), x, EPS, noise(6), queries=5)
    assert all(p.grad is None for p in network.parameters()) and network.training and torch.equal(x, before)
    empty = attacks.apgd(untargeted(network, y), x[:0], EPS, iterations=5)
    assert len(empty.images) == 0
