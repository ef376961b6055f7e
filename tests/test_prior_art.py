"""TeCoA, FARE and the anchored objective beside ΔCLIP's: values and gradients of the pixels against versions
written anew, what a fine-tuning trains and what it leaves; the cheaper attacks; captions of classes."""

import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY, execute, flags, torchrun
from PIL import Image
from torch.nn.functional import normalize
from torchvision.transforms import functional as TF

import attacks
import clip_adv
import data

ONE_STEP = ROOT / 'tests' / 'one_step.py'
TUNED = {k: v for k, v in TINY.items() if k not in clip_adv.VisionCfg.__annotations__ and 'text' not in k}
TUNED = {k: v for k, v in TUNED.items() if k not in ('size', 'patch', 'embed_dim')}
ALL = {'tecoa': dict(objective='tecoa'), 'fare': dict(objective='fare'), 'anchor': dict(anchor=0.7)}


def train(**settings):
    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**settings)))


def state(out):
    return torch.load(out / 'train_state.pt', weights_only=True)


@pytest.fixture(scope='module')
def vanilla(tmp_path_factory):
    out = tmp_path_factory.mktemp('prior art') / 'vanilla'
    train(**{**TINY, 'eps': 0}, out=out)
    return out


# ----------------------------------------------------------------------------------------------------- losses
def by_hand(name, f, f0, text, labels, scale):
    """Image by image, in the words of the papers. f, f0: embeddings of x+δ by the tower, of x by f₀"""
    losses = []
    for i in range(len(f)):
        if name == 'fare':
            losses.append(((f[i] - f0[i]) ** 2).sum())
        elif name == 'tecoa':
            cosines = torch.stack([f[i] @ t / (f[i].norm() * t.norm()) for t in text])
            losses.append(-(100 * cosines[labels[i]] - (100 * cosines).exp().sum().log()))
        else:
            losses.append(0.7 * (f[i] / f[i].norm() - f0[i] / f0[i].norm()).norm())
    total = sum(losses) / len(losses)
    if name == 'anchor':
        z = scale.exp() * normalize(f, dim=1) @ normalize(text, dim=1).T
        total = total - (z.softmax(0).diagonal().log() + z.softmax(1).diagonal().log()).mean() / 2
    return total


@pytest.mark.parametrize('name', ALL)
def test_losses_and_input_gradients_equal_those_by_hand(vanilla, name):
    g = torch.Generator().manual_seed(0)
    model, original = (clip_adv.load_clip(vanilla)[0].double() for _ in range(2))
    for p in model.visual.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    x = torch.rand(6, 3, 16, 16, generator=g, dtype=torch.double)
    x_adv = (x + 0.03 * torch.randn(x.shape, generator=g, dtype=x.dtype)).clamp(0, 1).requires_grad_()
    text = torch.randn(6, 16, generator=g, dtype=x.dtype)  # captions; or the classes
    labels, scale = torch.tensor([3, 0, 0, 5, 1, 2]), torch.tensor(2.0, dtype=x.dtype)
    unit = normalize(text, dim=-1)
    given = clip_adv.Against(unit, scale, original.visual(x).detach(), unit, labels)
    cfg = clip_adv.Config(batch_size=6, **ALL[name])
    ours = clip_adv.objective(cfg, model.visual(x_adv), given)
    theirs = by_hand(name, model.visual(x_adv), given.clean, text, labels, scale)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, x_adv)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-6


def test_fare_by_a_closed_form():
    """A linear tower f = 2x + 1 that began as f₀ = 2x: ‖2δ + 1‖², gradient 4 (2δ + 1) / n."""
    x, delta = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0))
    delta.requires_grad_()
    loss = clip_adv.fare(2 * (x + delta) + 1, 2 * x, 5)
    torch.testing.assert_close(loss, ((2 * delta + 1) ** 2).sum() / 5)
    torch.testing.assert_close(torch.autograd.grad(loss, delta)[0], 4 * (2 * delta + 1).detach() / 5)


def test_groups_are_separate_batches():
    g = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(8, 4, generator=g), dim=-1) for _ in range(2))
    scale = torch.tensor(1.5)
    whole = clip_adv.info_nce(image, text, scale)
    torch.testing.assert_close(clip_adv.info_nce_in_groups(image, text, scale, 8), whole)
    parts = sum(clip_adv.info_nce(image[i : i + 2], text[i : i + 2], scale) for i in range(0, 8, 2))
    torch.testing.assert_close(clip_adv.info_nce_in_groups(image, text, scale, 2), parts)


def test_left_out_tokens_are_not_looked_at(vanilla):
    """With all tokens nothing changes; the pixels of patches that are left out have no gradient."""
    tower = clip_adv.load_clip(vanilla)[0].visual
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 16, generator=g).requires_grad_()
    assert torch.equal(tower(x), tower(x, tower.draw_tokens(1.0, g)))
    kept = tower.draw_tokens(0.5, g)
    assert kept[0] == 0 and len(kept) == 9 and len(set(kept.tolist())) == 9
    gradient = torch.autograd.grad(tower(x, kept).sum(), x)[0].abs().sum(1)  # [2, 16, 16]
    of_patch = gradient.unflatten(1, (4, 4)).unflatten(3, (4, 4)).sum((2, 4)).flatten(1)  # [2, 16]
    assert ((of_patch > 0).nonzero()[:, 1].unique() == kept[1:] - 1).all()
    assert kept.tolist() != tower.draw_tokens(0.5, g).tolist()  # drawn anew at every step


# --------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize('name', ALL)
def test_only_the_image_tower_is_tuned(vanilla, tmp_path, name):
    train(**TUNED, **ALL[name], init=vanilla, out=tmp_path / 'tuned')
    before, after = state(vanilla)['model'], state(tmp_path / 'tuned')['model']
    for key, w in before.items():
        assert torch.equal(w, after[key]) != key.startswith('visual.'), key


@pytest.mark.slow
@pytest.mark.parametrize('name', [*ALL, 'cheap'])
def test_two_processes_tune_as_one(vanilla, tmp_path, name):
    """The whole step, there in parts: attacked images to the bit, gradients to 1e-5."""
    how = dict(TINY, negatives=2, drop=0.5) if name == 'cheap' else dict(TUNED, **ALL[name], init=vanilla)
    settings = dict(how, steps=1, grad_clip=1e9)
    execute([sys.executable, str(ONE_STEP), str(tmp_path / 'one'), *flags(**settings, out=tmp_path / 'r1')])
    settings |= dict(micro_batch=2, out=tmp_path / 'r2')
    execute(torchrun(2, ONE_STEP, str(tmp_path / 'two'), *flags(**settings)))
    one, *two = (torch.load(tmp_path / f, weights_only=True) for f in ('one.0', 'two.0', 'two.1'))
    assert torch.equal(torch.cat([r['seen'][0][2] for r in two]), one['seen'][0][2])
    for rank in two:
        for a, b in zip(rank['updates'][0], one['updates'][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * one['updates'][0][0].abs().max().item())


@pytest.mark.slow
def test_a_resumed_fine_tuning_is_held_to_the_original(vanilla, tmp_path):
    """f₀ is the tower of --init, and not what the run had made of it by then."""
    settings = dict(TUNED, objective='fare', init=vanilla)
    train(**settings, out=tmp_path / 'whole')
    command = [sys.executable, str(ONE_STEP), str(tmp_path / 'x'), 'kill=4:9']
    execute([*command, *flags(**settings, out=tmp_path / 'cut')], fails=True)
    train(resume=True, out=tmp_path / 'cut')
    whole, cut = state(tmp_path / 'whole')['model'], state(tmp_path / 'cut')['model']
    assert all(torch.equal(w, cut[name]) for name, w in whole.items())
    other, tokenizer = clip_adv.load_clip(vanilla)
    other.visual.proj.data += 1
    shutil.copytree(vanilla, tmp_path / 'other')
    train(**{**settings, 'init': tmp_path / 'other', 'steps': 3}, out=tmp_path / 'held')
    clip_adv.save_clip(other, tokenizer, tmp_path / 'other')
    (tmp_path / 'other' / 'train_config.json').unlink()  # which knows the sha256 of what was written
    with pytest.raises(SystemExit, match='--init'):
        train(resume=True, out=tmp_path / 'held')


def test_the_cheaper_attacks_are_attacks(vanilla, tmp_path, monkeypatch):
    seen, pgd = [], attacks.pgd
    monkeypatch.setattr(attacks, 'pgd', lambda *args: seen.append(pgd(*args)) or seen[-1])
    for settings in ({}, dict(drop=0.5), dict(negatives=2)):
        train(**{**TINY, 'steps': 1}, **settings, out=tmp_path / str(settings))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(objective='tecoa'), '--objective tecoa.*give its --init'),
        (dict(anchor=1), '--anchor 1.*give its --init'),
        (dict(objective='fare', anchor=1, init='.'), '--objective fare: --anchor is for clip'),
        (dict(objective='tecoa', init='.', data='0.tar'), 'give --classes'),
        (dict(objective='fare', init='.', eps=0), '--eps 0.*nothing to learn'),
        (dict(anchor=1, init='.', eps_to=0.2), '--eps_to 0.2: without an attack'),
        (dict(negatives=3), '--negatives 3: must divide the 8 images'),
        (dict(negatives=1), '--negatives 1: not negative, and not 1'),
        (dict(drop=1), '--drop 1'),
        (dict(crop=0), '--crop 0'),
        (dict(flip=True), '--flip are for photos'),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    base = TUNED if 'init' in settings else TINY
    with pytest.raises(SystemExit, match=message):
        train(**{**base, **settings}, out=tmp_path / 'run')


# ---------------------------------------------------------------------------------------- captions of classes
def test_captions_of_classes():
    assert data.Prompts(['cat', 'St. Bernard'], []).label('This is a photo of a St. Bernard.') == 1
    prompts = data.Prompts(['dog', 'hot dog', 'cat'], ['a {c}.', 'the {c}'])
    assert prompts.texts() == ['a dog.', 'the dog', 'a hot dog.', 'the hot dog', 'a cat.', 'the cat']
    assert [prompts.label(t) for t in ('A photo of a Dog.', 'one hot dog', 'cat, black')] == [0, 1, 2]
    with pytest.raises(data.BadSample, match='names none of the classes'):
        prompts.label('a catalogue')
    drawn = [prompts.caption('a photo of a cat', 0, number) for number in range(50)]
    assert set(drawn) == {'a cat.', 'the cat'}
    assert drawn == [prompts.caption('a photo of a cat', 0, number) for number in range(50)]


def test_class_files_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match='--classes.*classnames.txt'):
        data.load_prompts(str(tmp_path))
    (tmp_path / 'classnames.txt').write_text('cat\ndog\n')
    (tmp_path / 'zeroshot_classification_templates.txt').write_text('a photo\n')
    with pytest.raises(SystemExit, match="the template 'a photo' has no {c}"):
        data.load_prompts(str(tmp_path))


def test_photos_of_classes_from_a_folder(tmp_path):
    """Trained on with templates, tuned by TeCoA with the right labels; mirrored where --flip says so."""
    for i, name in enumerate(['cat', 'dog'] * 8):
        Image.new('RGB', (20, 20), (i * 9, 90, 200 * (name == 'dog'))).save(tmp_path / f'{i}.png')
    lines = (
        f'{{"file_name": "{i}.png", "text": "a photo of a {n}"}}\n' for i, n in enumerate(['cat', 'dog'] * 8)
    )
    (tmp_path / 'metadata.jsonl').write_text(''.join(lines))
    (tmp_path / 'classnames.txt').write_text('cat\ndog\n')
    (tmp_path / 'zeroshot_classification_templates.txt').write_text('a {c}.\na blurry {c}.\n')
    how = dict(data=tmp_path, classes=tmp_path, flip=True, crop=0.5)
    train(**{**TINY, 'eps': 0, 'steps': 40, 'context': 16, 'lr': 3e-3}, **how, out=tmp_path / 'run')
    train(
        **{**TUNED, 'steps': 1, 'eps': 0},
        **how,
        init=tmp_path / 'run',
        objective='tecoa',
        out=tmp_path / 'tuned',
    )
    with pytest.raises(SystemExit, match='--context 3 too short'):
        short = dict(objective='tecoa', context=3, out=tmp_path / 'cut')
        train(**{**TUNED, 'steps': 1}, **how, init=tmp_path / 'run', **short)
    first = re.search(r'"loss_adv": ([\d.]+)', (tmp_path / 'tuned' / 'log.jsonl').read_text())
    assert float(first[1]) < 0.2  # of labels that are shuffled it would be large

    ramp = TF.to_pil_image(torch.linspace(0, 1, 8).expand(3, 8, 8))
    images = [TF.to_tensor(data.random_crop(ramp, data.generator(0, 'x', i), 1.0, True)) for i in range(40)]
    mirrored = [bool(image[0, 0, 0] > image[0, 0, -1]) for image in images]
    assert 8 < sum(mirrored) < 32
    assert data.random_crop(ramp, data.generator(0, 'x', 0), 1.0).tobytes() == ramp.tobytes()
