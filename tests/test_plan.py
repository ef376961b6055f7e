"""--plan: what it counts, against closed forms and real steps; the recipes; growing resolutions, in small."""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, execute, flags, torchrun
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import attacks
import clip_adv
import data
import llava_adv

RECIPES = [ROOT / 'results' / name for name in ('delta_clip_h14.sh', 'delta2_llava_7b.sh')]
STAGES = {'clip_adv.py': (clip_adv.Config, clip_adv.plan), 'llava_adv.py': (llava_adv.Config, llava_adv.plan)}
LLM = dict(model_type='llama', vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
LLM |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)


class Counter(FlopCounterMode):
    """torch's counter; with the attention of a CPU, which it has no formula for, and without its hooks on
    modules, which fail in torch.autograd.grad."""

    def __init__(self):
        ops, bmm = torch.ops.aten, 2  # products forward, twice as many backward
        forward = ops._scaled_dot_product_flash_attention_for_cpu
        backward = ops._scaled_dot_product_flash_attention_for_cpu_backward
        flops = lambda q, k: bmm * 2 * q[0] * q[1] * q[2] * k[2] * q[3]  # noqa: E731
        formulas = {
            forward: lambda q, k, *_, **__: flops(q, k),
            backward: lambda _, q, k, *__, **___: 2 * flops(q, k),
        }
        super().__init__(display=False, custom_mapping=formulas)
        none = dict(__enter__=lambda: None, __exit__=lambda *_: None)
        self.mod_tracker = types.SimpleNamespace(parents={'Global'}, **none)


def planned(capsys, script='clip_adv.py', **settings) -> tuple[float, float, str]:
    """FLOPs of a sample, (attack, update), of one command; and what was printed"""
    kind, _ = STAGES[script]
    cfg, given = data.parse(kind, '', ['--plan', *flags(**settings)])
    clip_adv.print_plans(cfg, given, {script: STAGES[script]})
    out = capsys.readouterr().out
    steps = [line.split() for line in out.splitlines() if line.startswith('  K = ')]
    return float(steps[-1][4]), float(steps[-1][7].strip(',')), out


def block(n: int, width: int, hidden: int) -> tuple[int, int]:
    """FLOPs forward of a block on n tokens: of products with weights, of attention's."""
    return 2 * n * (4 * width**2 + 2 * width * hidden), 2 * 2 * n * n * width


def test_plan_agrees_with_a_closed_form(capsys, tmp_path):
    """Twice the multiplications of every matrix product; backwards once more for the input, once for the
    weights. Towers as ΔCLIP's (patches averaged, text pooled at the last token), narrow."""
    vision = dict(image_size=84, patch_size=14, width=96, layers=12, head_width=24)
    vision |= dict(no_ln_pre=True, pool_type='avg', final_ln_after_pool=True)
    text = dict(context_length=8, vocab_size=500, width=48, heads=2, layers=12)
    text |= dict(no_causal_mask=True, pool_type='last')
    arch = dict(embed_dim=40, vision_cfg=vision, text_cfg=text)
    (tmp_path / 'arch.json').write_text(json.dumps(arch))
    batch, k = 64, 3
    settings = dict(arch=tmp_path / 'arch.json', batch_size=batch, k=k, k_from=0, eps_from=0, eps_to=0)
    attack, update, out = planned(capsys, **settings)

    patches = 2 * 36 * 3 * 14**2 * 96
    dense, attention = (12 * f for f in block(37, 96, 4 * 96))
    text_dense, text_attention = (12 * f for f in block(8, 48, 4 * 48))
    image_proj, text_proj, logits = 2 * 96 * 40, 2 * 48 * 40, 2 * batch * 40
    step = 2 * (patches + dense + image_proj + logits) + 3 * attention
    whole = 2 * patches + 3 * (dense + image_proj + logits + attention)  # no gradient of the pixels
    whole += 3 * (text_dense + text_proj + text_attention)
    assert attack / batch == pytest.approx(k * step, rel=0.02)
    assert update / batch == pytest.approx(whole, rel=0.02)
    assert '84' in out and '37 + 8' in out and f'{batch}' in out


@pytest.mark.slow
def test_plan_agrees_with_a_counter_around_main(capsys, tmp_path):
    """Two steps less one: a step without the clean loss, which is computed for the log."""
    counted = []
    settings = dict(TINY, log_every=100, save_every=100, context=5, batch_size=16, text_layers=2)
    for steps in (1, 2):
        run = dict(settings, steps=steps, out=tmp_path / f'{steps}')
        with Counter() as counter:
            clip_adv.main(*data.parse(clip_adv.Config, '', flags(**run)))
        counted.append(counter.get_total_flops())
    attack, update, _ = planned(capsys, **settings)
    assert attack + update == pytest.approx(counted[1] - counted[0], rel=0.02)
    cheap, same, _ = planned(capsys, **dict(settings, k=1))
    assert cheap == pytest.approx(attack / 2, rel=1e-3) and same == update
    more, most, _ = planned(capsys, **settings, micro_batch=4)  # one more forward pass in each
    assert 1.3 < more / attack < 1.6 and 1.2 < most / update < 1.5


@pytest.mark.parametrize(
    'sub, checkpointing', [('A', False), pytest.param('B', True, marks=pytest.mark.slow)]
)
def test_plan_of_stage_2_agrees_with_a_counter(capsys, tmp_path, monkeypatch, sub, checkpointing):
    """A real attack step and a real update, with texts as long as --plan takes them to be."""
    monkeypatch.setattr(llava_adv, 'ASSUMED', {sub: (1000, 7, 3)})
    with clip_adv.seeded(0):
        clip_cfg = clip_adv.ClipCfg(
            clip_adv.VisionCfg(16, 4, 32, 3, 16), clip_adv.TextCfg(8, 300, 32, 2, 1), 16
        )
        preprocess = clip_adv.Preprocess()
        llm, visual = llava_adv.Llama(LLM), clip_adv.ViT(clip_cfg, preprocess)
        model = llava_adv.LLaVA(visual, clip_cfg, preprocess, llm, 1).eval()
    for name, config in ('clip/open_clip_config', clip_adv.open_clip_config(clip_cfg, preprocess)), (
        'llm/config',
        LLM,
    ):
        file = tmp_path / f'{name}.json'
        file.parent.mkdir()
        file.write_text(json.dumps(config))
    settings = dict(init=tmp_path / 'clip', llm=tmp_path / 'llm', lora_r=4, k=2, checkpoint=checkpointing)
    settings |= dict(
        steps_a=-1 if sub == 'A' else 0, steps_b=-1 if sub == 'B' else 0, batch_a=10, batch_size=10
    )
    attack, update, out = planned(capsys, 'llava_adv.py', **settings)
    assert 'an epoch of 1000 samples' in out and '100 of 100 times' in out

    cfg, n = data.parse(llava_adv.Config, '', flags(**settings))[0], 2
    llm.checkpointing = checkpointing
    llava_adv.trainable(model, cfg, sub)
    samples = [
        data.Sample(
            torch.zeros(3, 16, 16, dtype=torch.uint8), [1] * 16 + [5] * 7, [False] * 20 + [True] * 3, i
        )
        for i in range(n)
    ]
    batch = data.collate(samples, 0)._replace(start=16)
    x = (batch.images / 255).requires_grad_()
    with Counter() as counter, clip_adv.frozen(model):
        torch.autograd.grad(model(x, batch).sum(), x)
    assert attack / 10 == pytest.approx(2 * counter.get_total_flops() / n, rel=0.02)
    with Counter() as counter:
        model(x.detach(), batch, batch.keys).sum().backward()
    assert update / 10 == pytest.approx(counter.get_total_flops() / n, rel=0.02)


def test_meter_knows_what_is_held():
    with FakeTensorMode(), clip_adv.Meter() as meter:
        weight = torch.empty(100, 100, requires_grad=True)
        x = torch.empty(10, 100)
        assert sum(meter.held.values()) == 4 * (100 * 100 + 10 * 100)
        y = (x @ weight).relu()  # the product itself is not kept: relu keeps its result
        assert sum(meter.held.values()) == 4 * (100 * 100 + 2 * 10 * 100)
        y.sum().backward()
        assert meter.flops['update'] == 2 * 2 * 10 * 100 * 100  # forwards, and to the weight
        del x, y
    assert sum(meter.held.values()) == 4 * 2 * 100 * 100  # the weight, its gradient
    assert meter.peak >= 4 * (2 * 100 * 100 + 2 * 10 * 100)


@pytest.mark.slow
@pytest.mark.parametrize('micro_batch', [0, 8])
def test_memory_agrees_with_the_allocator(monkeypatch, capsys, micro_batch):
    """A real step under bfloat16 autocast, as on a GPU, and what torch's profiler sees allocated in it."""
    settings = dict(width=256, layers=4, text_width=128, embed_dim=128, size=64, patch=8, context=32)
    settings |= dict(vocab_size=1000, batch_size=32, k=1, micro_batch=micro_batch)
    peak = lambda *args: args[3].peak  # noqa: E731
    monkeypatch.setattr(clip_adv, 'costs', peak)
    cfg, given = data.parse(clip_adv.Config, '', flags(**settings))
    [planned] = clip_adv.plan(cfg, given, 1, {})

    with clip_adv.seeded(0):
        model = clip_adv.CLIP(*clip_adv.settings_of_model(cfg, given))
    x, tokens = torch.full((32, 3, 64, 64), 0.5), torch.arange(32 * 32).view(32, 32) % 999
    tokens[:, -1] = 999

    def loss_of(images, text, scale):
        with torch.autocast('cpu', torch.bfloat16):
            features = model(images, micro_batch)
        return clip_adv.info_nce(features, text, scale, micro_batch)

    def step():
        with torch.autocast('cpu', torch.bfloat16):
            text = model.encode_text(tokens, micro_batch)
        fixed = text.detach(), model.logit_scale.detach()
        with clip_adv.frozen(model.visual):
            attacks.pgd(lambda z: loss_of(z, *fixed), x, 1.0, 1.0, 1)
        loss_of(x, text, model.logit_scale).backward()

    step()  # some memory is allocated once
    model.zero_grad()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == '[memory]']
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    there = sum(t.nbytes for t in (*model.parameters(), x, tokens))
    assert planned == pytest.approx(max(itertools.accumulate(changes)) + there, rel=0.05)


@pytest.mark.slow
def test_memory_of_micro_batches(capsys):
    """Activations are those of a process's samples, of a micro-batch with --micro_batch."""
    settings = dict(TINY, batch_size=4096, vocab_size=8192, width=256, layers=6)

    def memory(world, **more):
        cfg, given = data.parse(clip_adv.Config, '', flags(**dict(settings, **more)))
        return [float(row[8]) for row, _ in clip_adv.plan(cfg, given, world, {})][0]

    one, two, four, parts = memory(1), memory(2), memory(4), memory(1, micro_batch=1024)
    assert one > two > four and one - two == pytest.approx(2 * (two - four), rel=0.15)
    assert parts < two


def test_schedule_is_summed(capsys):
    """The share of every K, and what the whole costs: the sum over all steps."""
    cfg, given = data.parse(clip_adv.Config, '', flags(steps=1000, k=3))
    clip_adv.check_config(cfg, set(), 1)
    ks = [clip_adv.attack_at(cfg, step)[2] for step in range(1000)]
    [(row, flops)] = clip_adv.plan(cfg, given, 1, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith('  K = ')]
    assert [(int(line[2][:-1]), int(line[8])) for line in lines] == [(k, ks.count(k)) for k in (0, 1, 3)]
    costs = {int(line[2][:-1]): float(line[4]) + float(line[7].strip(',')) for line in lines}
    assert flops == pytest.approx(sum(costs[k] for k in ks), rel=1e-3)
    assert row[6] == '3.2e+04'  # samples


def test_script_is_added_up(tmp_path, capsys, monkeypatch):
    """--init RUN is the model of the earlier command; no data and no RUN is there, nothing is written."""
    monkeypatch.chdir(tmp_path)
    small = '--layers 2 --eps_from 0 --eps_to 0 --k_from 0'
    (tmp_path / 'recipe.sh').write_text(f"""#!/bin/bash
set -e  # clip_adv.py in a comment
torchrun --nnodes 2 --nproc_per_node=4 clip_adv.py --out runs/a/ {small} \\
    --data 'D/{{00..99}}.tar' --samples 6400 --batch_size 64  # it's 100 updates
torchrun clip_adv.py --init runs/a --size 48 --context 12 --out runs/b --steps 50
python llava_adv.py --init runs/b --out runs/c --steps_a 0 --steps_b 10 --micro_batch 4
""")
    cfg, given = data.parse(llava_adv.Config, '', ['--plan', 'recipe.sh', '--gpu', 'a100', '--mfu', '0.5'])
    clip_adv.print_plans(cfg, given, STAGES)
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith(('runs/', 'sum')) and ': ' not in line]
    assert 'a100-hours' in out and '8 samples at a time on each of 8 GPUs' in out
    a, b, c, total = table
    assert '65 + 8' in a and ' 64 ' in a and '6.4e+03' in a and '145 + 12' in b and '48' in b
    assert c.startswith('runs/c B') and '144 + ' in c
    flops = [float(line.split()[-2]) for line in table]
    assert flops[-1] == pytest.approx(sum(flops[:-1]), rel=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ['recipe.sh']
    wrong = [('echo "', "'echo"), ('ls', 'no command'), ('clip_adv.py --init runs/none', 'none')]
    for text, said in [*wrong, ('torchrun --nproc_per_node gpu clip_adv.py', 'gpu of .* is no number')]:
        (tmp_path / 'recipe.sh').write_text(text)
        with pytest.raises(SystemExit, match=said):
            clip_adv.print_plans(cfg, given, STAGES)
    with pytest.raises(SystemExit, match='--gpu tpu'):
        clip_adv.print_plans(clip_adv.Config(plan='recipe.sh', gpu='tpu'), {'plan'}, STAGES)


# ----------------------------------------------------------------------------------------------- growing runs
def test_context_beside_init(tmp_path):
    """Position embeddings of the text as open_clip resizes them; the tokenizer goes with them."""
    from open_clip.model import resize_text_pos_embed

    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**dict(TINY, steps=1), out=tmp_path / 'run')))
    before, _ = clip_adv.load_clip(tmp_path / 'run')
    for context in (5, 8, 13):
        cfg, given = data.parse(clip_adv.Config, '', flags(init=tmp_path / 'run', context=context, size=24))
        model, tokenizer = clip_adv.build(cfg, given, None, None)
        weights = {'positional_embedding': before.positional_embedding.detach()}
        target = types.SimpleNamespace(positional_embedding=torch.empty(context, 16))
        resize_text_pos_embed(weights, target)
        assert torch.equal(model.positional_embedding, weights['positional_embedding'])
        tokens = tokenizer(['a red circle'])
        assert tokens.shape == (1, context) and model.encode_text(tokens).isfinite().all()
        assert model.cfg.text_cfg.context_length == context and model.cfg.vision_cfg.image_size == 24
    with pytest.raises(SystemExit, match='--context must be at least 3'):
        clip_adv.build(*data.parse(clip_adv.Config, '', flags(init=tmp_path / 'run', context=2)), None, None)


def three_sizes(folder: Path) -> list[dict]:
    """The recipe in small: 16 → 24 → 32 px, 6 → 8 tokens, each from the one before."""
    shapes = dict(TINY, data=folder, log_every=1, save_every=1, size=16, context=6)
    sizes = ('size', 'context', 'batch_size', 'eps', 'k', 'eps_from', 'eps_to', 'k_from', 'data', 'log_every')
    later = {name: shapes[name] for name in (*sizes, 'save_every')}
    runs = [dict(shapes, samples=32), dict(later, size=24, context=8, samples=24), dict(later, size=32)]
    runs[2] |= dict(samples=24)
    del runs[2]['context']
    del runs[0]['steps']
    return runs


@pytest.mark.slow
def test_resolutions_grow(tmp_path):
    """From shards; stopped in every phase, and continued on another number of processes."""
    (tmp_path / 'folder').mkdir()
    g, rows = torch.Generator().manual_seed(0), []
    for i in range(24):
        pixels = torch.randint(256, (40, 40, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / 'folder' / f'{i}.png')
        rows.append(json.dumps({'file_name': f'{i}.png', 'text': f'picture number {i} of many more of them'}))
    (tmp_path / 'folder' / 'metadata.jsonl').write_text('\n'.join(rows))
    data.main(['shards', str(tmp_path / 'folder'), str(tmp_path / 'shards'), '--per_shard', '8'])
    script, before = ROOT / 'clip_adv.py', None
    for phase, settings in enumerate(three_sizes(tmp_path)):
        settings['data'] = f'{tmp_path}/shards/{{00000..00002}}.tar'
        settings |= dict(out=tmp_path / f'run{phase}', **({'init': before} if before else {}))
        stop = ROOT / 'tests' / 'one_step.py', str(tmp_path / 'unused'), 'kill=2:15'
        stopped = execute(torchrun(2, *stop, *flags(**settings)), fails=True)
        assert 'saved after update 2 of' in stopped
        continued = execute(torchrun(1 + 3 * (phase == 1), script, *flags(out=settings['out'], resume=True)))
        assert 'continuing after update 2' in continued
        whole = dict(settings, out=tmp_path / f'whole{phase}')
        execute(torchrun(1, script, *flags(**whole)))
        logs = [
            (tmp_path / f'{name}{phase}' / 'log.jsonl').read_text().splitlines() for name in ('run', 'whole')
        ]
        for ours, theirs in zip(*(map(json.loads, log) for log in logs), strict=True):
            assert ours['loss_adv'] == pytest.approx(theirs['loss_adv'], rel=1e-3)
        before = settings['out']
    model, tokenizer = clip_adv.load_clip(before)
    assert (model.visual.size, tokenizer.context) == (32, 8)


@pytest.mark.slow
def test_recipes_can_be_planned(tmp_path):
    """Every flag in them exists, and each finds the model that it starts from; of Vicuna only config.json."""
    config = dict(LLM, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    config |= dict(num_attention_heads=32, num_key_value_heads=32)
    (tmp_path / 'VICUNA').mkdir()
    (tmp_path / 'VICUNA' / 'config.json').write_text(json.dumps(config))
    text = '\n'.join(file.read_text() for file in RECIPES)
    text = text.replace('--llm VICUNA', f'--llm {tmp_path}/VICUNA').replace('results/', f'{ROOT}/results/')
    (tmp_path / 'recipe.sh').write_text(text)
    out = execute([sys.executable, str(ROOT / 'llava_adv.py'), '--plan', str(tmp_path / 'recipe.sh')])
    for cells in ('37 + 8', '257 + 32', '577 + 32', '576 + 24', '576 + 320', '1.28e+10', '6738.4'):
        assert cells in out
