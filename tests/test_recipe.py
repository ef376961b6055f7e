"""A net: 20 updates of either stage's default recipe, beside a stored log and beside AdamW's formula.

Where the behaviour is meant to change, recipe_clip.jsonl and recipe_llava.jsonl are written anew:

    RECIPE=write python -m pytest tests/test_recipe.py
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import flags
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import clip_adv
import data
import llava_adv

# ------------------------------------------------------------------- names and units that may move: only here
parse = data.parse


def clip_lr(cfg, step: int) -> float:
    return clip_adv.lr_at(cfg.lr, step, cfg.steps, cfg.warmup)


def llava_rate(cfg, step: int, steps: int) -> float:
    """Fraction of the peak."""
    return clip_adv.lr_at(1.0, step, steps, cfg.warmup)


def adapted_layer(r: int, alpha: float) -> torch.nn.Module:
    with torch.random.fork_rng():
        layer = llava_adv.Linear(6, 5, bias=True)
    layer.add_adapter(r, alpha, dropout=0.0, salt=0, generator=data.generator(0, 'test', 0))
    return layer


# ------------------------------------------------------------------------------------------------ the recipes
# The defaults of both stages, in numbers, so that a changed default is a failed test.
CLIP_LR, CLIP_WD, CLIP_BETA2, CLIP_STEPS, CLIP_WARMUP = 1.5e-3, 0.05, 0.95, 5000, 100
LLAVA_LR_A, LLAVA_LRS_B = 3e-3, (2e-3, 1e-3, 3e-4)  # of the projector; of adapters, projector and tower
LLAVA_WD, LLAVA_BETA2 = 0.0, 0.999
LLAVA_WARMUP, LORA_R, LORA_ALPHA = 0.03, 16, 32.0
BETA1, ADAM_EPS, CLIP_NORM = 0.9, 1e-8, 1.0

STEPS, WARMUP, STEPS_A, STEPS_B = 20, 3, 8, 12  # of the runs here
HERE = Path(__file__).parent
DIGITS = 6e-6  # the log has six of them
SCHEDULE, MEASURED = ('step', 'lr', 'eps', 'alpha', 'k'), ('loss_adv', 'loss_clean', 'grad_norm')
# How far another CPU may be from the stored log, relative. Sums in another order turn the sign of the
# gradient in pixels where it is next to nothing, a step is as long there as anywhere, and 20 updates add
# that up. Kernels of other instruction sets (ATEN_CPU_CAPABILITY=avx2 and default, beside AVX-512) moved
# losses by up to 6e-5 in stage 1 and 4e-6 in stage 2, the norms of gradients by up to 6e-4 and 1e-6.
TOLERANCE = {
    'clip': {'loss_adv': 1e-3, 'loss_clean': 1e-3, 'grad_norm': 1e-2},
    'llava': {'loss_adv': 1e-4, 'loss_clean': 1e-4, 'grad_norm': 1e-3},
}


class Recorded(NamedTuple):
    rows: list[dict]  # log.jsonl
    updates: list  # for each update and each group of parameters: [(value, gradient, new value)]


def recorded(stage, out: Path, settings: dict) -> Recorded:
    """Runs a stage's main on the CPU, in one thread; what its optimizer gets and does is kept."""
    updates = []

    def keep_before(optimizer, *_):
        updates.append(
            [
                [(p.detach().clone(), p.grad.clone()) for p in group['params']]
                for group in optimizer.param_groups
            ]
        )

    def keep_after(optimizer, *_):
        updates[-1] = [
            [(*kept, p.detach().clone()) for kept, p in zip(before, group['params'], strict=True)]
            for before, group in zip(updates[-1], optimizer.param_groups, strict=True)
        ]

    torch.set_num_threads(1)
    hooks = register_optimizer_step_pre_hook(keep_before), register_optimizer_step_post_hook(keep_after)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, 'is_available', bool)  # False
            stage.main(*parse(stage.Config, '', flags(**settings, log_every=1, save_every=1000, out=out)))
    finally:
        for hook in hooks:
            hook.remove()
    return Recorded([json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()], updates)


@pytest.fixture(scope='module')
def clip_run(tmp_path_factory) -> Recorded:
    """Stage 1 as it is by default but for its length: model, batch and data are small enough."""
    settings = {'steps': STEPS, 'warmup': WARMUP / STEPS}
    return recorded(clip_adv, tmp_path_factory.mktemp('recipe') / 'clip', settings)


@pytest.fixture(scope='module')
def llava_run(parts, tmp_path_factory) -> Recorded:
    """Stage 2 with the default optimizers, attack and adapters, on a smaller model and batch."""
    settings = {name: parts[name] for name in ('init', 'llm', 'data', 'data_a')} | dict(
        steps_a=STEPS_A, steps_b=STEPS_B, batch_a=8, batch_size=8
    )
    return recorded(llava_adv, tmp_path_factory.mktemp('recipe') / 'llava', settings)


def cosine(done: float) -> float:
    """1 at the start, 0 at the end of what follows the warm-up."""
    return (1 + math.cos(math.pi * done)) / 2


def clip_rates() -> list[float]:
    return [
        CLIP_LR * (n + 1) / WARMUP if n < WARMUP else CLIP_LR * cosine((n - WARMUP) / (STEPS - WARMUP))
        for n in range(STEPS)
    ]


def llava_rates(steps: int) -> list[float]:
    """Fractions of the peak; 3 % of 8 and of 12 steps are one step of warm-up."""
    return [1.0, *(cosine(n / (steps - 1)) for n in range(steps - 1))]


# --------------------------------------------------------------------------------------------- the stored log
@pytest.mark.parametrize('stage', ['clip', 'llava'])
def test_the_log_is_the_stored_one(stage, request):
    rows, log = request.getfixturevalue(f'{stage}_run').rows, HERE / f'recipe_{stage}.jsonl'
    if os.environ.get('RECIPE') == 'write':
        kept = [{name: row[name] for name in SCHEDULE + MEASURED} for row in rows]
        log.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    for row, expected in zip(rows, map(json.loads, log.read_text().splitlines()), strict=True):
        for name in SCHEDULE:
            assert row[name] == pytest.approx(expected[name], rel=DIGITS), (stage, row['step'], name)
        for name in MEASURED:
            limit = TOLERANCE[stage][name]
            assert row[name] == pytest.approx(expected[name], rel=limit), (stage, row['step'], name)


def test_the_log_has_all_parts_of_the_schedule(clip_run, llava_run):
    """Else the net would have holes."""
    rows = clip_run.rows
    assert [row['k'] for row in rows] == 4 * [0] + 8 * [1] + 8 * [2]
    assert len({row['eps'] for row in rows}) == 9 and rows[-1]['eps'] == 14 and rows[-1]['alpha'] == 10.5
    assert [row['lr'] for row in rows] == pytest.approx(clip_rates(), rel=DIGITS)
    assert [row['stage'] for row in llava_run.rows] == STEPS_A * ['A'] + STEPS_B * ['B']
    assert all((row['eps'], row['alpha'], row['k']) == (12, 9, 2) for row in llava_run.rows)


# ------------------------------------------------------------------------------------------------- the update
def assert_clipped(run: Recorded):
    """The gradient of all parameters together is at most 1 long; a shorter one is left alone."""
    norms = [
        sum(g.double().square().sum() for group in update for _, g, _ in group).sqrt().item()
        for update in run.updates
    ]
    before = [row['grad_norm'] for row in run.rows]
    assert norms == pytest.approx([min(norm, CLIP_NORM) for norm in before], rel=1e-5)
    assert max(before) > 1.1 * CLIP_NORM  # or nothing was tested


def assert_adamw(updates: list, rates: list[list[float]], beta2: float, decay):
    """Each update is AdamW's, from the gradients so far.   rates: of an update's groups.   decay: p → λ

    m ← β₁ m + (1 − β₁) g       v ← β₂ v + (1 − β₂) g²
    θ ← (1 − ηλ) θ − η m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + 1e-8)
    """
    moments: dict = {}
    for t, (groups, group_rates) in enumerate(zip(updates, rates, strict=True), 1):
        for number, (group, rate) in enumerate(zip(groups, group_rates, strict=True)):
            for place, kept in enumerate(group):
                before, g, after = (x.double() for x in kept)
                m, v = moments.get((number, place), (0.0, 0.0))
                moments[number, place] = m, v = BETA1 * m + (1 - BETA1) * g, beta2 * v + (1 - beta2) * g**2
                step = m / (1 - BETA1**t) / ((v / (1 - beta2**t)).sqrt() + ADAM_EPS)
                error = after - (before * (1 - rate * decay(before)) - rate * step)
                # float32 has 24 bits for the value, and the step is rounded, too
                assert error.abs().max() <= 2e-7 * before.abs().max() + 1e-5 * rate, (t, number, place)


def test_clip_updates_by_the_formula(clip_run):
    assert_clipped(clip_run)
    assert_adamw(
        clip_run.updates,
        [[rate, rate] for rate in clip_rates()],
        CLIP_BETA2,
        lambda p: CLIP_WD if p.ndim >= 2 else 0.0,
    )


def test_llava_updates_by_the_formula(llava_run):
    """Each sub-stage begins with an optimizer of its own."""
    assert_clipped(llava_run)
    a, b = llava_run.updates[:STEPS_A], llava_run.updates[STEPS_A:]
    assert_adamw(a, [[LLAVA_LR_A * rate] for rate in llava_rates(STEPS_A)], LLAVA_BETA2, lambda p: LLAVA_WD)
    assert_adamw(
        b,
        [[peak * rate for peak in LLAVA_LRS_B] for rate in llava_rates(STEPS_B)],
        LLAVA_BETA2,
        lambda p: LLAVA_WD,
    )


# ----------------------------------------------------------------------------------------------- closed forms
def test_clip_learning_rate():
    """Warm-up ends at the peak, where the cosine begins; it would be 0 just after the end."""
    cfg = clip_adv.Config()
    half = (CLIP_STEPS - CLIP_WARMUP) // 2
    for step, expected in [
        (0, 1 / CLIP_WARMUP),
        (CLIP_WARMUP - 2, 1 - 1 / CLIP_WARMUP),
        (CLIP_WARMUP - 1, 1),
        (CLIP_WARMUP, 1),
        (CLIP_WARMUP + 1, cosine(1 / (2 * half))),
        (CLIP_WARMUP + half, 1 / 2),
        (CLIP_STEPS - 1, cosine(1 - 1 / (2 * half))),
    ]:
        assert clip_lr(cfg, step) == pytest.approx(CLIP_LR * expected, rel=1e-6, abs=1e-15), step
    short = clip_adv.Config(steps=10, lr=1.0, warmup=0.4)
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, (1 + 3**0.5 / 2) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - 3**0.5 / 2) / 2]
    assert [clip_lr(short, step) for step in range(10)] == pytest.approx(expected, rel=1e-12)


def test_llava_learning_rate():
    cfg = llava_adv.Config()
    for steps in (500, 300):
        warmup = round(LLAVA_WARMUP * steps)
        rest = steps - warmup
        for step, expected in [
            (0, 1 / warmup),
            (warmup - 2, 1 - 1 / warmup),
            (warmup - 1, 1),
            (warmup, 1),
            (warmup + 1, cosine(1 / rest)),
            (warmup + rest // 3, cosine(rest // 3 / rest)),
            (steps - 1, cosine(1 - 1 / rest)),
            (steps, 0),
        ]:
            assert llava_rate(cfg, step, steps) == pytest.approx(expected, rel=1e-6, abs=1e-12), (steps, step)
    short = llava_adv.Config(warmup=0.31)  # 3.1 steps of 10: begun is counted
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, (1 + 3**0.5 / 2) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - 3**0.5 / 2) / 2]
    assert [llava_rate(short, step, 10) for step in range(10)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('r, alpha, scale', [(4, 8.0, 2.0), (LORA_R, LORA_ALPHA, 2.0), (9, 3.0, 1 / 3)])
def test_an_adapter_adds_alpha_over_r_times_b_a(r, alpha, scale):
    """α/r, as in LoRA's paper, and neither α/√r nor α."""
    layer, g = adapted_layer(r, alpha), torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g))
        whole = layer.weight + scale * layer.lora_B @ layer.lora_A
        assert torch.allclose(layer.merged(), whole, atol=1e-5)
        x = torch.randn(2, 3, 6, generator=g)
        assert torch.allclose(layer(x), x @ whole.T + layer.bias, atol=1e-5)
