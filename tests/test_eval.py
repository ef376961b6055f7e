import io
import json
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, execute, flags, torchrun

import attacks
import clip_adv
import data
import eval as evaluation

HELD = 'red circle,blue triangle'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A CLIP that has learned a little, in seconds, so that there is something to break."""
    out = tmp_path_factory.mktemp('eval') / 'run'
    clip_adv.main(
        *data.parse(
            clip_adv.Config,
            '',
            flags(
                **{**TINY, 'eps': 0, 'steps': 80, 'batch_size': 32, 'lr': 3e-3, 'save_every': 100},
                out=out,
                holdout=HELD,
            ),
        )
    )
    return out


def evaluate(command, *arguments):
    return evaluation.main(evaluation.parse([command, *map(str, arguments), '--quiet']))


def zeroshot(*arguments):
    return evaluate('zeroshot', *arguments)


def report(command, file, *arguments):
    evaluate(command, *arguments, '--json', file)
    return json.loads(file.read_text())


def values(found, **where):
    """The values of the rows that agree with what is given."""
    return [r['value'] for r in found['rows'] if all(r.get(key) == value for key, value in where.items())]


def survives(found, eps):
    return next(o['survives'] for o in found['outcomes'] if o['eps'] == eps)


class Linear:
    """Stands for a CLIP whose two logits are ±100·(⟨w, x⟩ + b): its robust accuracy has a closed form."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x, rows=None):
        z = (x * self.w).sum((1, 2, 3)) + self.b
        return torch.stack([z, -z], 1)


@pytest.mark.parametrize('scale', [1.0, 1e3])  # at 1e3 the cross-entropy and its gradient are exactly 0
@pytest.mark.parametrize('attack', ['pgd', 'apgd', 'ensemble'])
def test_survivors_are_those_of_the_closed_form(attack, scale):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, 4, generator=g)
    x = 0.3 + 0.4 * torch.rand(100, 3, 4, 4, generator=g)
    model, eps = Linear(scale * w, scale * -0.5 * w.sum()), 8 / 255
    z = model(x)[:, 0]
    y = (z < 0).long()
    expected = z.abs() - scale * eps * w.abs().sum() > 0
    assert 10 < expected.sum() < 90
    args = SimpleNamespace(attack=attack, seed=0, batch_size=32)
    x_adv = evaluation.attack(args, model, evaluation.Images(list(range(100)), x, y), eps)
    assert torch.equal(model(x_adv).argmax(1) == y, expected)


def test_result_does_not_depend_on_the_batch_size_or_the_processes(run, tmp_path):
    """The cheapest attack that has random starts stands for all; its image-by-image outcome is compared."""
    arguments = [run, '--split', 'val', '--n', 30, '--eps', 1, 4, '--attack', 'apgd']
    a, b = (report('zeroshot', tmp_path / 'a.json', *arguments, '--batch_size', size) for size in (7, 64))
    execute(
        torchrun(
            2,
            ROOT / 'eval.py',
            'zeroshot',
            *map(str, arguments),
            '--json',
            str(tmp_path / 'c.json'),
            '--quiet',
        )
    )
    c = json.loads((tmp_path / 'c.json').read_text())
    for other in (b, c):
        assert survives(a, 0) == survives(other, 0)
        for eps in (1, 4):  # in float32 one of thirty may differ
            assert sum(p != q for p, q in zip(survives(a, eps), survives(other, eps), strict=True)) <= 1
    clean, one, four = values(a, measure='accuracy')
    assert c['processes'] == 2 and {r['n'] for r in a['rows']} == {30} and 1 >= clean > 0.15  # chance is 0.04
    assert clean >= one >= four and clean > four and clean == survives(a, 0).count('1') / 30
    assert values(a, measure='top-5 accuracy', eps=0)[0] >= clean
    assert 0 <= values(a, measure='mean per-class recall')[0] <= 1
    assert {
        'command',
        'commit',
        'versions',
        'device',
        'processes',
        'seed',
        'seconds',
        'trained',
        'rows',
        'outcomes',
    } == set(a)
    row = next(r for r in a['rows'] if r['measure'] == 'accuracy' and r['eps'] == 4)
    assert tuple(row)[:9] == evaluation.COLUMNS
    assert (row['attack'], row['split'], row['model']) == ('apgd', 'val', str(run))
    assert row['stderr'] == pytest.approx((four * (1 - four) / 30) ** 0.5)
    for outcome in a['outcomes']:  # a value can be computed again
        ahead, eps = outcome['classes_ahead'], outcome['eps']
        assert sum(k < 5 for k in ahead) / 30 == values(a, measure='top-5 accuracy', eps=eps)[0]
        assert outcome['survives'] == ''.join('01'[k == 0] for k in ahead) and len(outcome['labels']) == 30
        assert "class names: captions; templates: its own, as 'a black circle'" in outcome['asked']


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(run, tmp_path):
    """Other kernels, other rounding: of 60 images at most two may fall on one device alone."""
    arguments = ['--split', 'val', '--n', 60, '--eps', 1, 4]
    gpu = report('zeroshot', tmp_path / 'gpu.json', run, *arguments)
    execute(
        [
            sys.executable,
            str(ROOT / 'eval.py'),
            'zeroshot',
            str(run),
            *map(str, arguments),
            '--json',
            str(tmp_path / 'cpu.json'),
            '--quiet',
        ]
    )
    cpu = json.loads((tmp_path / 'cpu.json').read_text())
    assert (gpu['device'], cpu['device']) == ('cuda', 'cpu')
    for eps in (0, 1, 4):
        assert sum(a != b for a, b in zip(survives(gpu, eps), survives(cpu, eps), strict=True)) <= 2


def test_metrics():
    rows = evaluation.zeroshot_rows({}, [0, 0, 0, 1], [0, 0, 3, 7])  # labels, and classes ahead of them
    assert [r['value'] for r in rows] == [0.5, 0.75, pytest.approx((2 / 3 + 0) / 2)]
    assert [r['stderr'] for r in rows] == [0.25, pytest.approx((0.75 * 0.25 / 4) ** 0.5), None]
    assert evaluation.row({}, 'x', [1.0, 2.0, 4.0])['stderr'] == pytest.approx(
        torch.tensor([1.0, 2.0, 4.0]).std().item() / 3**0.5
    )
    z = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [float('nan')] * 3])
    assert evaluation.ranks(
        lambda x, rows: z[rows], torch.zeros(4, 3, 1, 1), torch.tensor([2, 0, 2, 1]), 2
    ) == [1, 0, 2, 3]


def test_ensemble_is_the_default_and_breaks_at_least_what_apgd_breaks(run, tmp_path):
    arguments = [run, '--split', 'val', '--n', 12, '--eps', 2]
    whole = report('zeroshot', tmp_path / 'a.json', *arguments)
    one = report('zeroshot', tmp_path / 'b.json', *arguments, '--attack', 'apgd')
    assert [r['attack'] for r in whole['rows'] if r['eps']] == ['ensemble'] * 3
    for command, extra in (
        ('zeroshot', []),
        ('retrieval', []),
        ('audit', []),
        ('show', ['--image', 'x', '--labels', 'a,b']),
    ):
        assert evaluation.parse([command, 'x', *extra]).attack == 'ensemble'
    assert all(a <= b for a, b in zip(survives(whole, 2), survives(one, 2)))
    assert zeroshot(run, '--split', 'val', '--n', 3, '--attack', 'none') == 0


def test_logits_are_those_of_open_clip(run):
    """100·cos against the mean of the templates' embeddings, as in open_clip's own zero-shot classifier."""
    import open_clip

    classes, templates = ['red circle', 'blue circle', 'teal triangle'], [
        'a {c}',
        'a photo of a {c}.',
        'the {c}',
    ]
    with torch.random.fork_rng():
        model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{run}')
    weights = open_clip.build_zero_shot_classifier(
        model.eval(),
        open_clip.get_tokenizer(f'local-dir:{run}'),
        classes,
        [lambda c, t=t: t.replace('{c}', c) for t in templates],
    )
    image = data.read_image(data.load_pairs('easyvqa', 'val').files[0])
    ours = evaluation.Classifier(run, torch.device('cpu')).embed_classes(classes, templates)
    with torch.no_grad():
        theirs = 100 * model.encode_image(preprocess(image)[None], normalize=True) @ weights
        torch.testing.assert_close(ours(ours.pixels(image)[None]), theirs, rtol=1e-4, atol=1e-3)


def test_more_images_than_there_are(run, capsys):
    zeroshot(run, '--split', 'val', '--n', 9999, '--eps')
    captured = capsys.readouterr()
    assert 'has 357 images' in captured.err and '| 357 |' in captured.out


def test_held_out_captions(run, tmp_path, capsys):
    for subset in ('held-out', 'seen', 'all'):
        zeroshot(run, '--subset', subset, '--n', 0, '--eps', '--json', tmp_path / f'{subset}.json')
    found = {
        s: json.loads((tmp_path / f'{s}.json').read_text())['rows'][0] for s in ('held-out', 'seen', 'all')
    }
    assert all(r['subset'] == s for s, r in found.items())
    n = {s: r['n'] for s, r in found.items()}
    captions = data.load_pairs('easyvqa', 'test').captions
    assert n['held-out'] == sum(c in ('a red circle', 'a blue triangle') for c in captions)
    assert n['held-out'] + n['seen'] == n['all'] == 888
    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**dict(TINY, steps=1), out=tmp_path / 'run')))
    with pytest.raises(SystemExit, match='without --holdout'):
        zeroshot(tmp_path / 'run', '--subset', 'held-out')


def test_plot(run, tmp_path):
    zeroshot(run, '--split', 'val', '--n', 20, '--eps', 2, '--attack', 'pgd', '--plot', tmp_path / 'p.png')
    assert (tmp_path / 'p.png').read_bytes()[:4] == b'\x89PNG' and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--eps', '0.0157'], 'did you mean 4'),
        (['--eps', '0'], '--eps 0'),
        (['--eps', '-4'], '--eps -4'),
        (['--n', '-1'], '--n -1'),
        (['--batch_size', '0'], '--batch_size 0'),
        (['--json', 'no/such/folder/x.json'], 'no folder no/such/folder'),
        (['--plot', 'x.bmp'], 'must end in'),
        (['--attack', 'fgsm'], 'invalid choice'),
        (['--epsilon', '3'], 'unrecognized'),
        (['--data'], '--data: expected at least one argument'),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(['zeroshot', 'x', *arguments])
    assert message in capsys.readouterr().err


def test_an_epsilon_given_twice_counts_once():
    assert evaluation.parse(['zeroshot', 'x', '--eps', '8', '4', '8.0']).eps == [8.0, 4.0]


def test_bad_directories_and_data(run, tmp_path):
    with pytest.raises(SystemExit, match='is no CLIP: no open_clip_config.json'):
        zeroshot(tmp_path)
    with pytest.raises(SystemExit, match='no such folder'):
        zeroshot(run, '--data', tmp_path / 'nowhere')
    with pytest.raises(SystemExit, match='--split dev'):
        zeroshot(run, '--split', 'dev')


@pytest.mark.parametrize('command', ['retrieval', 'typographic', 'audit', 'vqa'])
def test_one_data_set_at_a_time(command, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse([command, 'x', '--data', 'easyvqa', 'easyvqa'])
    assert 'takes one data set' in capsys.readouterr().err


def write_shards(folder, images, split='test'):
    """CLIP_benchmark's layout: two shards of (label, image)."""
    (folder / split).mkdir(parents=True)
    (folder / 'classnames.txt').write_text('red circle\nblue circle\n')
    (folder / 'zeroshot_classification_templates.txt').write_text('a {c}\na photo of a {c}\n')
    for shard in (0, 1):
        with tarfile.open(folder / split / f'{shard}.tar', 'w') as tar:
            for i, (label, image) in list(enumerate(images))[shard::2]:
                file = io.BytesIO()
                image.save(file, 'PNG')
                for ending, content in (('png', file.getvalue()), ('cls', str(label).encode())):
                    member = tarfile.TarInfo(f's{i:07d}.{ending}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / split / 'nshards.txt').write_text('2')


@pytest.fixture(scope='module')
def circles():
    """[(label, image)]: red and blue circles of the validation split."""
    pairs = data.load_pairs('easyvqa', 'val')
    return [
        (int(c == 'a blue circle'), data.read_image(f))
        for f, c in zip(pairs.files, pairs.captions)
        if c in ('a red circle', 'a blue circle')
    ][:12]


def test_several_data_sets_and_their_average(run, circles, tmp_path, capsys):
    write_shards(tmp_path / 'wds_circles', circles)
    found = report(
        'zeroshot',
        tmp_path / 'a.json',
        run,
        '--data',
        tmp_path / 'wds_circles',
        'easyvqa',
        '--n',
        10,
        '--eps',
        2,
        '--attack',
        'pgd',
        '--plot',
        tmp_path / 'p.pdf',
    )
    sets = [str(tmp_path / 'wds_circles'), 'easyvqa', 'average']
    assert list(dict.fromkeys(r['data'] for r in found['rows'])) == sets
    assert [r['classes'] for r in found['rows'] if r['data'] != 'average'] == [2] * 6 + [24] * 6
    for measure in ('accuracy', 'top-5 accuracy', 'mean per-class recall'):
        for eps in (0, 2):
            a, b, both = values(found, measure=measure, eps=eps)
            assert both == pytest.approx((a + b) / 2)
    a, b, both = (r for r in found['rows'] if r['measure'] == 'accuracy' and r['eps'] == 2)
    assert both['n'] == 20
    assert both['stderr'] == pytest.approx((a['stderr'] ** 2 + b['stderr'] ** 2) ** 0.5 / 2)
    assert 'average' in capsys.readouterr().out


def test_an_image_that_does_not_decode_ends_with_its_name(run, circles, tmp_path):
    write_shards(tmp_path / 'wds', circles[:4])
    shard = tmp_path / 'wds' / 'test' / '1.tar'
    with tarfile.open(shard) as archive:
        member = next(m for m in archive if m.name.endswith('png'))
    content = bytearray(shard.read_bytes())
    content[member.offset_data : member.offset_data + 40] = bytes(40)
    shard.write_bytes(content)
    with pytest.raises(SystemExit, match=r'cannot decode the image .*1\.tar/s0000001\.png'):
        zeroshot(run, '--data', tmp_path / 'wds', '--attack', 'none')


@pytest.mark.slow
def test_two_processes_fetch_a_data_set_once(run, circles, tmp_path):
    """--download on two processes: one fetches (here: finds it there), the other waits for it."""
    names = 'AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential'
    for name in [*names.split(), 'River', 'SeaLake']:
        (tmp_path / 'eurosat' / '2750' / name).mkdir(parents=True)
        circles[0][1].save(tmp_path / 'eurosat' / '2750' / name / '0.jpg')
    execute(
        torchrun(
            2,
            ROOT / 'eval.py',
            'zeroshot',
            str(run),
            '--data',
            'EuroSAT',
            '--root',
            str(tmp_path),
            '--download',
            '--attack',
            'none',
            '--n',
            '5',
            '--json',
            str(tmp_path / 'a.json'),
            '--quiet',
        )
    )
    found = json.loads((tmp_path / 'a.json').read_text())
    assert (found['rows'][0]['n'], found['rows'][0]['classes']) == (5, 10) and len(survives(found, 0)) == 5


def test_no_image_left():
    with pytest.raises(SystemExit, match='no image is left by --subset held-out'):
        evaluation.sample(9, 'x', evaluation.parse(['zeroshot', 'x', '--subset', 'held-out']), keep=[])


def test_native_attack_is_before_the_resize(run, circles, tmp_path):
    """64-pixel images in two sizes, a 16-pixel model: δ has the image's own size, its budget holds there."""
    wider = [(label, image.resize((96, 64))) for label, image in circles]
    write_shards(tmp_path / 'wds', circles[:4] + wider[:4])
    arguments = [run, '--data', tmp_path / 'wds', '--eps', 4, '--attack', 'pgd']
    both = [report('zeroshot', tmp_path / 'a.json', *arguments, *how) for how in ([], ['--native'])]
    assert [[r.get('native') for r in found['rows'][::3]] for found in both] == [[None, None], [None, True]]
    assert both[1]['rows'][0]['n'] == 8
    model = evaluation.Classifier(run, torch.device('cpu'), native=True)
    x = model.pixels(circles[0][1])[None]
    assert x.shape == (1, 3, 64, 64) and model.embed(x).shape == (1, TINY['embed_dim'])
    at_size = evaluation.Classifier(run, torch.device('cpu'))
    similarity = (model.embed(x) * at_size.embed(at_size.pixels(circles[0][1])[None])).sum()
    assert similarity > 0.99  # resizing tensors and PIL images differs by the rounding to 8 bits


def test_retrieval(run, circles, tmp_path, capsys):
    """A folder where images have several captions; clean recall is checked against a plain computation."""
    folder = tmp_path / 'test'
    folder.mkdir()
    lines = []
    for i, (label, image) in enumerate(circles):
        image.save(folder / f'{i}.png')
        colour = ('red', 'blue')[label]
        lines += [
            json.dumps({'file_name': f'{i}.png', 'text': t})
            for t in (f'a {colour} circle', f'{chr(97 + i)} {colour}')
        ]
    (folder / 'metadata.jsonl').write_text('\n'.join(lines))
    found = report(
        'retrieval',
        tmp_path / 'a.json',
        run,
        '--data',
        tmp_path,
        '--eps',
        4,
        '--attack',
        'apgd',
        '--plot',
        tmp_path / 'p.png',
    )
    assert {(r['measure'][:10], r['n']) for r in found['rows']} == {('image→text', 12), ('text→image', 14)}
    model = evaluation.Classifier(run, torch.device('cpu'))
    texts = sorted({json.loads(line)['text'] for line in lines})
    s = model.embed(torch.stack([model.pixels(image) for _, image in circles])) @ model.embed_texts(texts).T
    own = []
    for i, (label, _) in enumerate(circles):
        colour = ('red', 'blue')[label]
        own.append([texts.index(t) for t in (f'a {colour} circle', f'{chr(97 + i)} {colour}')])
    for k in (1, 5, 10):
        i2t = sum(bool(set(s[i].topk(k).indices.tolist()) & set(own[i])) for i in range(12)) / 12
        t2i = sum(any(t in own[i] for i in s[:, t].topk(k).indices.tolist()) for t in range(14)) / 14
        clean, attacked = values(found, measure=f'image→text R@{k}')
        assert clean == pytest.approx(i2t) and attacked <= i2t and (k > 1 or attacked < clean)
        assert values(found, measure=f'text→image R@{k}', eps=0)[0] == pytest.approx(t2i)
    assert (
        sum(k < 1 for k in found['outcomes'][1]['texts_ahead']) / 12
        == values(found, measure='image→text R@1', eps=4)[0]
    )
    assert 'image→text R@1' in capsys.readouterr().out


def test_retrieval_from_shards(run, circles, tmp_path):
    write_shards(tmp_path, circles)
    old = evaluation.tars_in(tmp_path / 'test')
    pngs = [old.members(i)[1]['png'] for i in range(4)]
    with tarfile.open(tmp_path / 'test' / '0.tar', 'w') as tar:
        for i in range(4):
            for ending, content in (('png', pngs[i]), ('txt', f'a red circle\ncaption {i}\n'.encode())):
                member = tarfile.TarInfo(f'{i}.{ending}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / 'test' / '1.tar').unlink()
    (tmp_path / 'test' / 'nshards.txt').write_text('1')
    found = report('retrieval', tmp_path / 'a.json', run, '--data', tmp_path, '--eps', '--attack', 'none')
    assert [r['n'] for r in found['rows']] == [4] * 3 + [5] * 3


def test_typographic(run, tmp_path, capsys):
    arguments = [run, '--split', 'val', '--n', 12]
    found = report(
        'typographic',
        tmp_path / 'a.json',
        *arguments,
        '--font',
        0,
        30,
        '--plot',
        tmp_path / 'p.png',
        '--grid',
        tmp_path / 'g.png',
        '--grid_eps',
        64,
        '--target',
        'blue circle',
    )
    clean = report('zeroshot', tmp_path / 'b.json', *arguments, '--attack', 'none')
    # the images are enlarged first
    assert values(found, measure='accuracy', height=0) == pytest.approx(
        values(clean, measure='accuracy'), abs=1 / 12 + 1e-9
    )
    assert {r['height'] for r in found['rows'] if r['measure'] == 'the written class'} == {0, 30}
    for outcome in found['outcomes']:
        hits = sum(seen == label for seen, label in zip(outcome['seen'], outcome['labels']))
        assert hits / 12 == values(found, measure='accuracy', height=outcome['height'])[0]
    assert all((tmp_path / f).read_bytes()[:4] == b'\x89PNG' for f in ('p.png', 'g.png'))
    with pytest.raises(SystemExit, match='not a class'):
        evaluate(
            'typographic', run, '--split', 'val', '--n', 2, '--grid', tmp_path / 'g.png', '--target', 'a cat'
        )


def test_written_text_is_inside_and_as_large_as_asked():
    from PIL import Image

    image = Image.new('RGB', (224, 224), 'gray')
    assert evaluation.written(image, 'red circle', 0) is image
    inked = []
    for size in (5, 10, 20, 100):  # at 100 % it would not fit, and is made smaller
        drawn = torch.from_numpy(np.array(evaluation.written(image, 'red circle', size))).float()
        touched = (drawn != drawn[0, 0]).any(-1)
        inked.append(int(touched.sum()))
        assert not touched[0].any() and not touched[:, 0].any() and touched.any()
    assert inked == sorted(inked) and inked[2] > 2 * inked[0]


def test_show(run, circles, tmp_path, capsys):
    circles[0][1].save(tmp_path / 'x.png')
    arguments = [
        run,
        '--image',
        tmp_path / 'x.png',
        '--labels',
        'a red circle, a blue circle',
        '--eps',
        64,
        '--plot',
        tmp_path / 's.png',
    ]
    found = report('show', tmp_path / 'a.json', *arguments)
    clean, attacked = ({r['label']: r['value'] for r in found['rows'] if r['eps'] == eps} for eps in (0, 64))
    assert set(clean) == {'a red circle', 'a blue circle'} and sum(attacked.values()) == pytest.approx(1)
    assert max(attacked, key=attacked.get) != max(clean, key=clean.get)
    assert (tmp_path / 's.png').read_bytes()[:4] == b'\x89PNG'
    assert 'the prediction changes' in ' '.join(capsys.readouterr().out.split())  # it is wrapped
    for extra, message in (
        (['--labels', 'a cat'], 'at least 2'),
        (['--label', 'a dog'], 'not one of --labels'),
        (['--image', tmp_path / 'no.png'], 'no.png'),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate('show', *arguments, *extra)


# ------------------------------------------------------------------------------------------------------ audit
class Masked:
    """A classifier behind something that spoils the gradients of an attack."""

    def __init__(self, model, how):
        self.model, self.how, self.g = model, how, torch.Generator().manual_seed(0)

    def __call__(self, x, rows=None):
        if self.how == 'quantised input':
            return self.model((x * 8).round() / 8)
        if self.how == 'saturated cross-entropy':
            return self.model(x) * 1e4
        return self.model(x + 0.1 * torch.randn(x.shape, generator=self.g))


@pytest.fixture(scope='module')
def robust_run(tmp_path_factory):
    """A small ΔCLIP, trained at ε = 8."""
    out = tmp_path_factory.mktemp('audit') / 'run'
    clip_adv.main(
        *data.parse(
            clip_adv.Config,
            '',
            flags(
                **{
                    **TINY,
                    'eps': 8,
                    'k': 1,
                    'steps': 150,
                    'batch_size': 32,
                    'lr': 3e-3,
                    'save_every': 200,
                    'eps_from': 0.2,
                    'eps_to': 0.6,
                },
                out=out,
            ),
        )
    )
    return out


CHECKS = [
    'deterministic',
    'cross-entropy has a gradient',
    'gradient agrees with finite differences',
    'attack raises the loss',
    '100 steps not weaker than 20',
    '5 restarts not weaker than 1',
    'many steps not weaker than one',
    'random noise hurts less',
    'Square not stronger than white box',
    'transfer not stronger than white box',
    'accuracy falls with ε',
    'ε = 1 leaves nothing',
]


def checks_of(path, how=None, source=None, n=24, eps=2 / 255):
    images = evaluation.class_set('easyvqa', 'val')

    def open_model(path):
        return evaluation.Classifier(path, torch.device('cpu')).embed_classes(
            images.classes, images.templates
        )

    args = SimpleNamespace(seed=0, batch_size=32, queries=150, defence='')
    model = open_model(path)
    (loaded,) = evaluation.ZeroShot(args, model, images).load(list(range(n)))
    classifier = Masked(model, how) if how else model
    audit = evaluation.Audit(
        args, classifier, loaded, eps, open_model(source) if source else None, iterations=20
    )
    found = {name: holds for name, holds, _ in audit.checks()}
    assert list(found) == CHECKS
    return found


@pytest.mark.parametrize(
    'how, names',
    [
        (
            'quantised input',
            {
                'cross-entropy has a gradient',
                'gradient agrees with finite differences',
                'attack raises the loss',
                'Square not stronger than white box',
            },
        ),
        ('saturated cross-entropy', {'cross-entropy has a gradient'}),
        ('noise on the input', {'deterministic', 'gradient agrees with finite differences'}),
    ],
)
def test_audit_fails_masked_models_by_name(run, how, names):
    verdicts = checks_of(run, how, eps=8 / 255)
    assert not any(verdicts[name] for name in names), verdicts


def test_audit_passes_honest_models(run, robust_run):
    for path, source in ((run, robust_run), (robust_run, run)):
        assert all(checks_of(path, source=source).values())
    assert checks_of(run)['transfer not stronger than white box'] is None


def test_audit_command(run, tmp_path, capsys, monkeypatch):
    """Exit code 0 where all is well, 1 where a check fails; what failed is in the table and in the file."""
    arguments = [run, '--split', 'val', '--n', 6, '--eps', 2, '--queries', 20, '--json', tmp_path / 'a.json']
    assert evaluate('audit', *arguments) == 0 and 'PASS' in capsys.readouterr().out
    original = evaluation.Classifier.__call__
    monkeypatch.setattr(evaluation.Classifier, '__call__', lambda self, x, rows=None: 1e4 * original(self, x))
    assert evaluate('audit', *arguments) == 1
    assert 'cross-entropy has a gradient' in capsys.readouterr().out
    rows = json.loads((tmp_path / 'a.json').read_text())['rows']
    assert {r['verdict']: r['value'] for r in rows} == {'PASS': 1, 'FAIL': 0, 'SKIP': None}
    assert [r['check'] for r in rows] == CHECKS


def test_audit_fails_a_defence_by_name(run, tmp_path, capsys):
    """The counterattack at test time seems to help against an attack on the bare model; seen through, not."""
    arguments = ['audit', run, '--split', 'val', '--n', 16, '--eps', 4, '--queries', 5]
    found = report(*arguments[:1], tmp_path / 'a.json', *arguments[1:], '--defence', 'counterattack')['rows']
    assert len(found) == len(CHECKS) + 1 and {r['defence'] for r in found} == {'counterattack'}
    (verdict,) = (r for r in found if r['check'] == 'counterattack helps when it is attacked itself')
    none, static, adaptive = map(float, re.findall(r'([\d.]+) %', verdict['figure']))
    assert verdict['verdict'] == 'FAIL' and static > none + 5 and static > adaptive + 5
    assert {r['check']: r['verdict'] for r in found}['gradient agrees with finite differences'] == 'FAIL'


def test_counterattack_is_straight_through(run):
    """It moves images, within its ball, to where they are further from their embedding; its gradient is that
    of the classifier there."""
    images = evaluation.class_set('easyvqa', 'val')
    model = evaluation.Classifier(run, torch.device('cpu')).embed_classes(images.classes, images.templates)
    x = torch.stack([model.pixels(images.item(i)[0]) for i in range(4)]).requires_grad_()
    seen, embed = [], model.embed
    model.embed = lambda z: seen.append(z.detach()) or embed(z)
    z = evaluation.counterattack(model, 4 / 255, 3)(x)
    moved = seen[-1].clone().requires_grad_()
    attacks.check(x.detach(), seen[-1], 4 / 255)
    gradient, behind = torch.autograd.grad(z.sum(), x)[0], torch.autograd.grad(model(moved).sum(), moved)[0]
    torch.testing.assert_close(gradient, behind)
    distance = [(embed(of) - embed(x)).norm(dim=-1).mean().item() for of in (seen[1], moved)]
    assert distance[1] > distance[0] > 0


def test_transfer_matrix(run, robust_run, tmp_path, capsys):
    """What is made on a model fools it most; the unperturbed images are in the first line."""
    arguments = [run, robust_run, '--split', 'val', '--n', 24, '--eps', 8]
    found = report('transfer', tmp_path / 'a.json', *arguments)['rows']
    matrix = {(Path(r['source']).parent.name, Path(r['model']).parent.name): r['value'] for r in found}
    a, b = run.parent.name, robust_run.parent.name
    assert len(matrix) == 6 and matrix[a, a] < matrix['', a] and matrix[b, b] < matrix['', b]
    assert matrix[a, a] <= matrix[b, a] and matrix[b, b] <= matrix[a, b]
    assert 'source' in capsys.readouterr().out


def test_what_a_training_cost(run, tmp_path):
    """Passes by hand, of a fine-tuning with the run that it began with; FLOPs in their proportion."""
    began = evaluation.training_of(run)
    assert began['passes'] == 80 * 32 * 3 and began['updates'] == 80 and began['minutes'] > 0
    settings = dict(init=run, objective='fare', steps=10, batch_size=32, eps=8, k=3, log_every=5)
    settings |= dict(
        eps_from=0, eps_to=0, k_from=0, alpha=5, compile=False, seed=3, holdout=HELD, out=tmp_path / 'tuned'
    )
    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**settings)))
    tuned = evaluation.training_of(tmp_path / 'tuned')
    passes = 10 * 32 * (3 * 2 + 3 + 1)  # three steps of the attack, the update, f₀
    assert tuned['passes'] - began['passes'] == passes and tuned['seed'] == 3
    image_only = (
        began['flops'] / began['passes'] * passes
    )  # a little more: of the text tower, which is not used
    assert tuned['flops'] - began['flops'] == pytest.approx(image_only, rel=0.05)
    again = data.parse(clip_adv.Config, '', shlex.split(tuned['command'])[2:])[0]
    assert vars(again) == json.loads((tmp_path / 'tuned' / 'train_config.json').read_text())['config']
    assert len(tuned['code']) == 6 and tuned['code'] == began['code']
    shutil.copytree(run, tmp_path / 'copy')
    about = json.loads((run / 'train_config.json').read_text())
    (tmp_path / 'copy' / 'train_config.json').write_text(json.dumps({**about, 'updates': 40}))
    assert evaluation.training_of(tmp_path / 'copy')['passes'] == 40 * 32 * 3  # of what was trained
    config = {**about['config'], 'init': str(tmp_path / 'nowhere')}
    (tmp_path / 'copy' / 'train_config.json').write_text(json.dumps({**about, 'config': config}))
    assert evaluation.training_of(tmp_path / 'copy')['passes'] is None  # and not only of the tuning


def test_tables_of_results(run, tmp_path, capsys):
    """Three seeds: mean ± standard deviation; one: ± standard error. Rows keep where they come from."""
    training = evaluation.training_of(run)
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        common = {'split': 'test', 'n': 100, 'measure': 'accuracy', 'data': 'easyvqa', 'subset': 'seen'}
        rows = [
            {
                'model': f'runs/x/{name}.{seed}',
                'eps': eps,
                'attack': 'ensemble',
                'value': value,
                'stderr': 0.05,
            }
            for name in (['delta', 'tecoa'] if not seed else ['delta'])
            for eps in (0, 8)
        ]
        trained = {r['model']: dict(training, seed=seed) for r in rows}
        made = {
            'command': 'c',
            'commit': 'abc',
            'seed': 0,
            'trained': trained,
            'rows': [common | r for r in rows],
        }
        for place in ('easyvqa', 'ablation'):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / f'{seed}.json').write_text(json.dumps(made))
    assert evaluation.main(evaluation.parse(['tables', str(tmp_path)])) == 0
    text = (tmp_path / 'tables.md').read_text()
    line = next(line for line in text.splitlines() if line.startswith('| ΔCLIP'))
    assert [cell.strip() for cell in line.split('|')[2:5]] == ['0 1 2', '60.0 ± 10.0', '60.0 ± 10.0']
    line = next(line for line in text.splitlines() if line.startswith('| TeCoA'))
    assert '50.0 ± 5.0' in line and ' 0.00768 ' in line
    assert text.count('## easyvqa: zeroshot, easyvqa test, seen captions, n = 100, ensemble') == 1
    common |= {'n': 50, 'attack': 'apgd', 'eps': 8, 'subset': None, 'stderr': None}
    check = {'measure': 'audit', 'check': 'deterministic', 'defence': None, 'figure': 'by 1'}
    rows = [{**common, 'model': 'runs/x/delta.0', 'source': 'runs/x/fare.0', 'value': 0.25}]
    rows += [{**common, **check, 'model': 'runs/x/delta.0', 'verdict': 'FAIL', 'value': 0.0}]
    rows += [{**common, 'model': 'runs/clip', 'value': 0.9}]  # no METHOD.SEED
    (tmp_path / 'models').mkdir()
    made['trained'] = dict.fromkeys(('runs/x/delta.0', 'runs/clip'), training)
    (tmp_path / 'models' / 'a.json').write_text(json.dumps({**made, 'rows': rows}))
    assert evaluation.main(evaluation.parse(['tables', str(tmp_path)])) == 0
    text = (tmp_path / 'tables.md').read_text()
    assert '| fare.0, ε = 8 ' in text and ' 25.0 |' in text
    assert '* ΔCLIP  ε = 8: deterministic: by 1' in text
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    assert len(rows) == 18 and all({'command', 'commit', 'seed', 'trained'} <= set(r) for r in rows)
    assert all(r['trained']['code'] and r['trained']['commit'] and r['trained']['command'] for r in rows)
    assert (tmp_path / 'ablation.png').stat().st_size > 1000


def test_readme_commands_exist(monkeypatch):
    """Every command line of ours in README is one that the scripts accept."""
    monkeypatch.chdir(ROOT)
    readme = (ROOT / 'README.md').read_text()
    lines = [
        command
        for line in re.findall(r'^    (.*)$', readme, re.M) + re.findall(r'`([^`\n]+)`', readme)
        for command in line.split('#')[0].split('&&')
    ]
    ours = [
        re.sub(r'^(torchrun|python)( --n\w+ \S+)*( --)? ', '', c.strip())
        for c in lines
        if re.search(r'(clip_adv|eval)\.py ?', c)
    ]
    ours = [shlex.split(c) for c in ours if c.startswith(('clip_adv.py', 'eval.py'))]
    assert sum(w[0] == 'eval.py' for w in ours) >= 2 and sum(w[0] == 'clip_adv.py' for w in ours) >= 3
    for script, *arguments in ours:
        if script == 'eval.py':
            if arguments:
                evaluation.parse(arguments)
        else:
            data.parse(clip_adv.Config, '', arguments)


def test_importing_does_nothing():
    code = (
        'import torch; before = torch.get_rng_state(); import attacks, data, clip_adv, eval; '
        'assert torch.equal(before, torch.get_rng_state())'
    )
    assert execute([sys.executable, '-c', code]) == ''
