import pytest
import torch
import torch.nn as nn
import torchattacks

import attacks
import data

EPS, ALPHA = 8 / 255, 3 / 255


def noise(n, seed=0):
    return [data.generator(seed, 'start', i) for i in range(n)]


def images(n, seed=1, low=0., high=1.):
    return low + (high - low) * torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    """A small random classifier that leaves the global generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def test_linear_loss_has_a_closed_form():
    """max over the ball of ⟨w, x+δ⟩ is ⟨w, x⟩ + ε‖w‖₁: wrong signs, projections or steps all miss it."""
    x = images(4, low=.3, high=.7)  # the box is out of reach
    w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    loss = lambda z: (z * w).sum()
    for start in (None, attacks.random_start(x, EPS, noise(4))):
        x_adv = attacks.pgd(loss, x, EPS, ALPHA, 6, start)  # 6 · α = 18/255 crosses the ball from anywhere
        torch.testing.assert_close(loss(x_adv), loss(x) + 4 * EPS * w.abs().sum())
        attacks.check(x, x_adv, EPS)


def test_box_is_respected_at_its_edges():
    x = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    for sign in (-1, 1):
        x_adv = attacks.pgd(lambda z: sign * z.sum(), x, EPS, ALPHA, 5)
        attacks.check(x, x_adv, EPS)
        inward = x[0] if sign > 0 else x[1]  # the image with room in that direction
        assert torch.allclose((x_adv - x).abs().amax((1, 2, 3)).max(), torch.tensor(EPS))
        assert torch.equal(x_adv[1 if sign > 0 else 0], 1 - inward)


def test_equals_torchattacks(network):
    x, y = images(16), torch.arange(16) % 5
    theirs = torchattacks.PGD(network, eps=EPS, alpha=ALPHA, steps=7, random_start=False)(x, y)
    ours = attacks.pgd(lambda z: nn.functional.cross_entropy(network(z), y), x, EPS, ALPHA, 7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)  # they project δ, we project x+δ: two roundings


def test_pgd_is_pure(network):
    x, y = images(4), torch.zeros(4, dtype=torch.long)
    before, mode = x.clone(), network.training
    start = attacks.random_start(x, EPS, noise(4))
    first = start.clone()
    x_adv = attacks.pgd(lambda z: nn.functional.cross_entropy(network(z), y), x, EPS, ALPHA, 3, start)
    assert all(p.grad is None for p in network.parameters()) and network.training == mode
    assert torch.equal(x, before) and torch.equal(start, first) and not x_adv.requires_grad


def test_random_start_belongs_to_the_sample():
    x = images(8, low=.2, high=.8)
    whole = attacks.random_start(x, EPS, noise(8))
    parts = torch.cat([attacks.random_start(x[i:i + 1], EPS, noise(8)[i:i + 1]) for i in range(8)])
    assert torch.equal(whole, parts)
    delta = (whole - x) / EPS  # uniform in (−1, 1): mean 0, variance 1/3
    assert abs(delta.mean()) < .05 and abs(delta.var() - 1 / 3) < .02 and delta.abs().max() <= 1 + 1e-4
    assert not torch.equal(whole[0] - x[0], whole[1] - x[1])
    attacks.check(x, whole, EPS)
    with pytest.raises(ValueError, match='3 generators for 8 images'):
        attacks.random_start(x, EPS, noise(3))


@pytest.mark.parametrize('spoil, message', [
    (lambda x: x + 9 / 255, 'ball'), (lambda x: x - .6, 'ball'), (lambda x: x.bfloat16(), 'float32'),
    (lambda x: x[:1], 'must be float32'), (lambda x: x.masked_fill(x == x.max(), float('nan')), 'nan'),
    (lambda x: (x + 8 / 255).bfloat16().float(), 'ball')])  # the official code's rounding, METHOD.md
def test_check_refuses(spoil, message):
    x = images(2, low=.3, high=.7)
    attacks.check(x, x, 0)
    with pytest.raises(AssertionError, match=message):
        attacks.check(x, spoil(x), EPS)


def test_check_refuses_to_leave_the_box():
    x = torch.full((1, 3, 8, 8), .99)
    with pytest.raises(AssertionError, match='within'):
        attacks.check(x, x + 5 / 255, EPS)
