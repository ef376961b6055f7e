import io
import json
import re
import shlex
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, execute, flags, torchrun

import clip_adv
import data
import eval as evaluation

HELD = 'red circle,blue triangle'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A CLIP that has learned a little, in seconds, so that there is something to break."""
    out = tmp_path_factory.mktemp('eval') / 'run'
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(
        **{**TINY, 'eps': 0, 'steps': 80, 'batch_size': 32, 'lr': 3e-3, 'save_every': 100}, out=out, holdout=HELD)))
    return out


def evaluate(command, *arguments):
    return evaluation.main(evaluation.parse([command, *map(str, arguments), '--quiet']))


def zeroshot(*arguments):
    return evaluate('zeroshot', *arguments)


def report(command, file, *arguments):
    evaluate(command, *arguments, '--json', file)
    return json.loads(file.read_text())


class Linear:
    """Stands for a CLIP whose two logits are ±100·(⟨w, x⟩ + b): its robust accuracy has a closed form."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x, numbers=None):
        z = (x * self.w).sum((1, 2, 3)) + self.b
        return torch.stack([z, -z], 1)


@pytest.mark.parametrize('scale', [1., 1e3])  # at 1e3 the cross-entropy and its gradient are exactly 0
@pytest.mark.parametrize('attack', ['pgd', 'apgd', 'ensemble'])
def test_survivors_are_those_of_the_closed_form(attack, scale):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, 4, generator=g)
    x = .3 + .4 * torch.rand(100, 3, 4, 4, generator=g)
    model, eps = Linear(scale * w, scale * -.5 * w.sum()), 8 / 255
    z = model(x)[:, 0]
    y = (z < 0).long()
    expected = z.abs() - scale * eps * w.abs().sum() > 0
    assert 10 < expected.sum() < 90
    x_adv = evaluation.attack(attack, model, x, y, eps, list(range(100)), 0, 32)
    assert torch.equal(model(x_adv).argmax(1) == y, expected)


def test_result_does_not_depend_on_the_batch_size_or_the_processes(run, tmp_path):
    """The cheapest attack that has random starts stands for all; its image-by-image outcome is compared."""
    arguments = [run, '--split', 'val', '--n', 30, '--eps', 1, 4, '--attack', 'apgd']
    a, b = (report('zeroshot', tmp_path / 'a.json', *arguments, '--batch_size', size) for size in (7, 64))
    execute(torchrun(2, ROOT / 'eval.py', 'zeroshot', *map(str, arguments), '--json', str(tmp_path / 'c.json'), '--quiet'))
    c = json.loads((tmp_path / 'c.json').read_text())
    r = a['results'][0]
    for other in (b, c):
        assert r['survives']['0'] == other['results'][0]['survives']['0']
        for eps in ('1', '4'):  # in float32 one of thirty may differ
            assert sum(p != q for p, q in zip(r['survives'][eps], other['results'][0]['survives'][eps], strict=True)) <= 1
    assert r['n'] == a['n'] == 30 and 1 >= r['clean_acc'] > .15 and c['processes'] == 2  # chance is 0.04
    assert r['clean_acc'] >= r['adv_acc']['1'] >= r['adv_acc']['4'] and r['clean_acc'] > r['adv_acc']['4']
    assert r['clean_acc5'] >= r['clean_acc'] == r['survives']['0'].count('1') / 30 and 0 <= r['clean_mean_per_class_recall'] <= 1
    assert {'command', 'commit', 'versions', 'seed', 'seconds', 'attack', 'data', 'split', 'native', 'device'} <= set(a)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(run, tmp_path):
    """Other kernels, other rounding: of 60 images at most two may fall on one device alone."""
    arguments = ['--split', 'val', '--n', 60, '--eps', 1, 4]
    gpu = report('zeroshot', tmp_path / 'gpu.json', run, *arguments)
    execute([sys.executable, str(ROOT / 'eval.py'), 'zeroshot', str(run), *map(str, arguments), '--json', str(tmp_path / 'cpu.json'), '--quiet'])
    cpu = json.loads((tmp_path / 'cpu.json').read_text())
    assert (gpu['device'], cpu['device']) == ('cuda', 'cpu')
    for eps, flags_ in gpu['results'][0]['survives'].items():
        assert sum(a != b for a, b in zip(flags_, cpu['results'][0]['survives'][eps], strict=True)) <= 2


def test_metrics():
    record = [(0, 0), (0, 0), (0, 3), (1, 7)]  # (label, classes ahead of the right one)
    assert [measure(record) for measure in evaluation.METRICS.values()] == [.5, .75, pytest.approx((2 / 3 + 0) / 2)]
    z = torch.tensor([[1., 3., 2.], [2., 2., 2.], [2., 2., 2.], [float('nan')] * 3])
    assert evaluation.ranks(lambda x, rows: z[rows], torch.zeros(4, 3, 1, 1), torch.tensor([2, 0, 2, 1]), 2) == [1, 0, 2, 3]


def test_ensemble_is_the_default_and_breaks_at_least_what_apgd_breaks(run, tmp_path):
    arguments = [run, '--split', 'val', '--n', 12, '--eps', 2]
    whole = report('zeroshot', tmp_path / 'a.json', *arguments)
    one = report('zeroshot', tmp_path / 'b.json', *arguments, '--attack', 'apgd')
    assert whole['attack'] == 'ensemble' and all(evaluation.parse([c, 'x', *extra]).attack == 'ensemble' for c, extra in (
        ('zeroshot', []), ('retrieval', []), ('audit', []), ('show', ['--image', 'x', '--labels', 'a,b'])))
    assert all(a <= b for a, b in zip(whole['results'][0]['survives']['2'], one['results'][0]['survives']['2']))
    assert zeroshot(run, '--split', 'val', '--n', 3, '--attack', 'none') == 0


def test_logits_are_those_of_open_clip(run):
    """100·cos against the mean of the templates' embeddings, as open_clip's own zero-shot classifier has it."""
    import open_clip
    classes, templates = ['red circle', 'blue circle', 'teal triangle'], ['a {c}', 'a photo of a {c}.', 'the {c}']
    with torch.random.fork_rng():
        model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{run}')
    weights = open_clip.build_zero_shot_classifier(model.eval(), open_clip.get_tokenizer(f'local-dir:{run}'), classes,
                                                   [lambda c, t=t: t.replace('{c}', c) for t in templates])
    image = data.read_image(data.load_pairs('easyvqa', 'val').files[0])
    ours = evaluation.Classifier(run, torch.device('cpu')).embed_classes(classes, data.ClassSet(0, None, classes, templates).prompts)
    with torch.no_grad():
        theirs = 100 * model.encode_image(preprocess(image)[None], normalize=True) @ weights
        torch.testing.assert_close(ours(ours.pixels(image)[None]), theirs, rtol=1e-4, atol=1e-3)


def test_more_images_than_there_are(run, capsys):
    zeroshot(run, '--split', 'val', '--n', 9999, '--eps')
    captured = capsys.readouterr()
    assert 'has 357 images' in captured.err and '| 357 |' in captured.out


def test_held_out_captions(run, tmp_path, capsys):
    for subset, n in (('held-out', None), ('seen', None), ('all', 888)):
        zeroshot(run, '--subset', subset, '--n', 0, '--eps', '--json', tmp_path / f'{subset}.json')
    n = {s: json.loads((tmp_path / f'{s}.json').read_text())['n'] for s in ('held-out', 'seen', 'all')}
    captions = data.load_pairs('easyvqa', 'test').captions
    assert n['held-out'] == sum(c in ('a red circle', 'a blue triangle') for c in captions) and n['held-out'] + n['seen'] == n['all'] == 888
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(**dict(TINY, steps=1), out=tmp_path / 'run')))
    with pytest.raises(SystemExit, match='without --holdout'):
        zeroshot(tmp_path / 'run', '--subset', 'held-out')


def test_plot(run, tmp_path):
    zeroshot(run, '--split', 'val', '--n', 20, '--eps', 2, '--attack', 'pgd', '--plot', tmp_path / 'p.png')
    assert (tmp_path / 'p.png').read_bytes()[:4] == b'\x89PNG' and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('arguments, message', [
    (['--eps', '0.0157'], 'did you mean 4'), (['--eps', '0'], '--eps 0'), (['--eps', '-4'], '--eps -4'), (['--n', '-1'], '--n -1'),
    (['--batch_size', '0'], '--batch_size 0'), (['--json', 'no/such/folder/x.json'], 'no folder no/such/folder'),
    (['--plot', 'x.bmp'], 'must end in'), (['--attack', 'fgsm'], 'invalid choice'), (['--epsilon', '3'], 'unrecognized')])
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(['zeroshot', 'x', *arguments])
    assert message in capsys.readouterr().err


def test_an_epsilon_given_twice_counts_once():
    assert evaluation.parse(['zeroshot', 'x', '--eps', '8', '4', '8.0']).eps == [8., 4.]


def test_bad_directories_and_data(run, tmp_path):
    with pytest.raises(SystemExit, match='is no CLIP: no open_clip_config.json'):
        zeroshot(tmp_path)
    with pytest.raises(SystemExit, match='no such folder'):
        zeroshot(run, '--data', tmp_path / 'nowhere')
    with pytest.raises(SystemExit, match='--split dev'):
        zeroshot(run, '--split', 'dev')
    for command in ('retrieval', 'typographic', 'audit'):
        with pytest.raises(SystemExit, match='takes one data set'):
            evaluate(command, run, '--data', 'easyvqa', 'easyvqa')


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
    return [(int(c == 'a blue circle'), data.read_image(f)) for f, c in zip(pairs.files, pairs.captions) if c in ('a red circle', 'a blue circle')][:12]


def test_several_data_sets_and_their_average(run, circles, tmp_path, capsys):
    write_shards(tmp_path / 'wds_circles', circles)
    r = report('zeroshot', tmp_path / 'a.json', run, '--data', tmp_path / 'wds_circles', 'easyvqa', '--n', 10, '--eps', 2, '--attack', 'pgd',
               '--plot', tmp_path / 'p.pdf')['results']
    assert [row['data'] for row in r] == [str(tmp_path / 'wds_circles'), 'easyvqa', 'average']
    assert (r[0]['n'], r[0]['classes'], r[0]['templates'], r[1]['classes']) == (10, 2, 2, 24)
    assert r[2]['clean_acc'] == pytest.approx((r[0]['clean_acc'] + r[1]['clean_acc']) / 2)
    assert r[2]['adv_acc']['2'] == pytest.approx((r[0]['adv_acc']['2'] + r[1]['adv_acc']['2']) / 2)
    assert 'average' in capsys.readouterr().out


def test_an_image_that_does_not_decode_ends_with_its_name(run, circles, tmp_path):
    write_shards(tmp_path / 'wds', circles[:4])
    shard = tmp_path / 'wds' / 'test' / '1.tar'
    with tarfile.open(shard) as archive:
        member = next(m for m in archive if m.name.endswith('png'))
    content = bytearray(shard.read_bytes())
    content[member.offset_data:member.offset_data + 40] = bytes(40)
    shard.write_bytes(content)
    with pytest.raises(SystemExit, match=r'cannot decode the image .*1\.tar/s0000001\.png'):
        zeroshot(run, '--data', tmp_path / 'wds', '--attack', 'none')


@pytest.mark.slow
def test_two_processes_fetch_a_data_set_once(run, circles, tmp_path):
    """--download on two processes: one fetches (here: finds it there), the other waits for it."""
    for label, name in enumerate(('River', 'Forest')):
        (tmp_path / 'eurosat' / '2750' / name).mkdir(parents=True)
        for i, (_, image) in enumerate(circles[:3]):
            image.save(tmp_path / 'eurosat' / '2750' / name / f'{i}.jpg')
    execute(torchrun(2, ROOT / 'eval.py', 'zeroshot', str(run), '--data', 'EuroSAT', '--root', str(tmp_path), '--download', '--attack', 'none',
                     '--n', '5', '--json', str(tmp_path / 'a.json'), '--quiet'))
    result = json.loads((tmp_path / 'a.json').read_text())['results'][0]
    assert (result['n'], result['classes']) == (5, 2) and len(result['survives']['0']) == 5


def test_no_image_left():
    with pytest.raises(SystemExit, match='no image is left by --subset held-out'):
        evaluation.sample(9, 'x', evaluation.parse(['zeroshot', 'x', '--subset', 'held-out']), 0, keep=[])


def test_native_attack_is_before_the_resize(run, circles, tmp_path):
    """64-pixel images in two sizes, a 16-pixel model: δ has the image's own size, and its budget holds there."""
    wider = [(label, image.resize((96, 64))) for label, image in circles]
    write_shards(tmp_path / 'wds', circles[:4] + wider[:4])
    both = [report('zeroshot', tmp_path / 'a.json', run, '--data', tmp_path / 'wds', '--eps', 4, '--attack', 'pgd', *how) for how in ([], ['--native'])]
    assert both[0]['native'] is False and both[1]['native'] is True
    assert both[1]['results'][0]['n'] == 8
    model = evaluation.Classifier(run, torch.device('cpu'), native=True)
    x = model.pixels(circles[0][1])[None]
    assert x.shape == (1, 3, 64, 64) and model.embed(x).shape == (1, TINY['embed_dim'])
    at_size = evaluation.Classifier(run, torch.device('cpu'))
    similarity = (model.embed(x) * at_size.embed(at_size.pixels(circles[0][1])[None])).sum()
    assert similarity > .99  # resizing tensors and PIL images differs by the rounding to 8 bits


def test_retrieval(run, circles, tmp_path, capsys):
    """A folder where images have several captions; clean recall is checked against a plain computation."""
    folder = tmp_path / 'test'
    folder.mkdir()
    lines = []
    for i, (label, image) in enumerate(circles):
        image.save(folder / f'{i}.png')
        colour = ('red', 'blue')[label]
        lines += [json.dumps({'file_name': f'{i}.png', 'text': t}) for t in (f'a {colour} circle', f'{chr(97 + i)} {colour}')]
    (folder / 'metadata.jsonl').write_text('\n'.join(lines))
    r = report('retrieval', tmp_path / 'a.json', run, '--data', tmp_path, '--eps', 4, '--attack', 'apgd', '--plot', tmp_path / 'p.png')['results'][0]
    assert (r['n'], r['texts']) == (12, 14)
    model = evaluation.Classifier(run, torch.device('cpu'))
    texts = sorted({json.loads(line)['text'] for line in lines})
    s = model.embed(torch.stack([model.pixels(image) for _, image in circles])) @ model.embed_texts(texts).T
    own = [[texts.index(t) for t in (f'a {("red", "blue")[label]} circle', f'{chr(97 + i)} {("red", "blue")[label]}')] for i, (label, _) in enumerate(circles)]
    for k in (1, 5, 10):
        i2t = sum(bool(set(s[i].topk(k).indices.tolist()) & set(own[i])) for i in range(12)) / 12
        t2i = sum(any(t in own[i] for i in s[:, t].topk(k).indices.tolist()) for t in range(14)) / 14
        assert r['clean'][f'image_to_text_recall@{k}'] == pytest.approx(i2t) and r['clean'][f'text_to_image_recall@{k}'] == pytest.approx(t2i)
        assert r['adv_4'][f'image_to_text_recall@{k}'] <= i2t
    assert r['adv_4']['image_to_text_recall@1'] < r['clean']['image_to_text_recall@1'] and 'i→t @1' in capsys.readouterr().out


def test_retrieval_from_shards(run, circles, tmp_path):
    write_shards(tmp_path, circles)
    old = data.Shards(tmp_path / 'test')
    pngs = [old.read(i, ('png',))[0] for i in range(4)]
    with tarfile.open(tmp_path / 'test' / '0.tar', 'w') as tar:
        for i in range(4):
            for ending, content in (('png', pngs[i]), ('txt', f'a red circle\ncaption {i}\n'.encode())):
                member = tarfile.TarInfo(f'{i}.{ending}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / 'test' / '1.tar').unlink()
    (tmp_path / 'test' / 'nshards.txt').write_text('1')
    r = report('retrieval', tmp_path / 'a.json', run, '--data', tmp_path, '--eps', '--attack', 'none')['results'][0]
    assert (r['n'], r['texts']) == (4, 5)


def test_typographic(run, tmp_path, capsys):
    r = report('typographic', tmp_path / 'a.json', run, '--split', 'val', '--n', 12, '--font', 0, 30, '--plot', tmp_path / 'p.png', '--grid', tmp_path / 'g.png',
               '--grid_eps', 64, '--target', 'blue circle')['results'][0]
    clean = report('zeroshot', tmp_path / 'b.json', run, '--split', 'val', '--n', 12, '--attack', 'none')['results'][0]
    assert r['acc']['0'] == pytest.approx(clean['clean_acc'], abs=1 / 12 + 1e-9) and set(r['written_acc']) == {'0', '30'}  # enlarged first
    assert all((tmp_path / f).read_bytes()[:4] == b'\x89PNG' for f in ('p.png', 'g.png'))
    with pytest.raises(SystemExit, match='not a class'):
        evaluate('typographic', run, '--split', 'val', '--n', 2, '--grid', tmp_path / 'g.png', '--target', 'a cat')


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
    arguments = [run, '--image', tmp_path / 'x.png', '--labels', 'a red circle, a blue circle', '--eps', 64, '--plot', tmp_path / 's.png']
    r = report('show', tmp_path / 'a.json', *arguments)['results'][0]
    assert set(r['clean']) == {'a red circle', 'a blue circle'} and sum(r['adv_64'].values()) == pytest.approx(1)
    assert r['broken'] and max(r['adv_64'], key=r['adv_64'].get) != r['label'] == max(r['clean'], key=r['clean'].get)
    assert (tmp_path / 's.png').read_bytes()[:4] == b'\x89PNG' and 'the prediction changes' in capsys.readouterr().out
    for extra, message in ((['--labels', 'a cat'], 'at least 2'), (['--label', 'a dog'], 'not one of --labels'), (['--image', tmp_path / 'no.png'], 'no.png')):
        with pytest.raises(SystemExit, match=message):
            evaluate('show', *arguments, *extra)


# ------------------------------------------------------------------------------------------------------------------ audit
class Masked:
    """A classifier behind something that spoils the gradients of an attack."""

    def __init__(self, model, how):
        self.model, self.how, self.g = model, how, torch.Generator().manual_seed(0)

    def __call__(self, x, numbers=None):
        if self.how == 'quantised input':
            return self.model((x * 8).round() / 8)
        if self.how == 'saturated cross-entropy':
            return self.model(x) * 1e4
        return self.model(x + .1 * torch.randn(x.shape, generator=self.g))


@pytest.fixture(scope='module')
def robust_run(tmp_path_factory):
    """A small ΔCLIP, trained at ε = 8."""
    out = tmp_path_factory.mktemp('audit') / 'run'
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(
        **{**TINY, 'eps': 8, 'k': 1, 'steps': 150, 'batch_size': 32, 'lr': 3e-3, 'save_every': 200, 'eps_from': .2, 'eps_to': .6}, out=out)))
    return out


def checks_of(path, how=None, source=None, n=24, eps=2 / 255):
    images = data.class_set('easyvqa', 'val')
    model = evaluation.Classifier(path, torch.device('cpu')).embed_classes(images.classes, images.prompts)
    loaded = [images.item(i) for i in range(n)]
    x, y = torch.stack([model.pixels(image) for image, _ in loaded]), torch.tensor([label for _, label in loaded])
    other = evaluation.Classifier(source, torch.device('cpu')).embed_classes(images.classes, images.prompts) if source else None
    found = evaluation.audit_checks(Masked(model, how) if how else model, x, y, eps, list(range(n)), 0, 32, other, queries=150, iterations=20)
    assert tuple(c['check'] for c in found) == evaluation.CHECKS
    return {c['check']: c['verdict'] for c in found}


@pytest.mark.parametrize('how, names', [
    ('quantised input', {'cross-entropy has a gradient', 'gradient agrees with finite differences', 'attack raises the loss',
                         'Square not stronger than white box'}),
    ('saturated cross-entropy', {'cross-entropy has a gradient'}),
    ('noise on the input', {'deterministic', 'gradient agrees with finite differences'})])
def test_audit_fails_masked_models_by_name(run, how, names):
    verdicts = checks_of(run, how, eps=8 / 255)
    assert all(verdicts[name] == 'FAIL' for name in names), verdicts


def test_audit_passes_honest_models(run, robust_run):
    for path, source in ((run, robust_run), (robust_run, run)):
        assert set(checks_of(path, source=source).values()) == {'PASS'}
    assert checks_of(run)['transfer not stronger than white box'] == 'SKIP'


def test_audit_command(run, tmp_path, capsys, monkeypatch):
    """Exit code 0 where all is well, 1 where a check fails; what failed is in the table and in the file."""
    arguments = [run, '--split', 'val', '--n', 6, '--eps', 2, '--queries', 20, '--json', tmp_path / 'a.json']
    assert evaluate('audit', *arguments) == 0 and 'PASS' in capsys.readouterr().out
    original = evaluation.Classifier.__call__
    monkeypatch.setattr(evaluation.Classifier, '__call__', lambda self, x, numbers=None: 1e4 * original(self, x))
    assert evaluate('audit', *arguments) == 1
    assert 'cross-entropy has a gradient' in capsys.readouterr().out
    assert json.loads((tmp_path / 'a.json').read_text())['results'][0]['passed'] is False


def test_readme_commands_exist(monkeypatch):
    """Every command line of ours in README is one that the scripts accept."""
    monkeypatch.chdir(ROOT)
    readme = (ROOT / 'README.md').read_text()
    lines = [command for line in re.findall(r'^    (.*)$', readme, re.M) + re.findall(r'`([^`\n]+)`', readme)
             for command in line.split('#')[0].split('&&')]
    ours = [re.sub(r'^(torchrun|python)( --n\w+ \S+)*( --)? ', '', c.strip()) for c in lines if re.search(r'(clip_adv|eval)\.py ?', c)]
    ours = [shlex.split(c) for c in ours if c.startswith(('clip_adv.py', 'eval.py'))]
    assert sum(w[0] == 'eval.py' for w in ours) >= 2 and sum(w[0] == 'clip_adv.py' for w in ours) >= 3
    for script, *arguments in ours:
        if script == 'eval.py':
            if arguments:
                evaluation.parse(arguments)
        else:
            clip_adv.parse(clip_adv.Config, '', arguments)


def test_importing_does_nothing():
    code = 'import sys, torch; before = torch.get_rng_state(); import attacks, data, clip_adv, eval; assert torch.equal(before, torch.get_rng_state())'
    assert execute([sys.executable, '-c', code]) == ''
