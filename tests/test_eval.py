import json
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, TINY, execute, flags

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


def zeroshot(*arguments):
    args = evaluation.parse(['zeroshot', *map(str, arguments), '--quiet'])
    args.run(args)


class Linear:
    """Stands for a CLIP whose two logits are ±100·(⟨w, x⟩ + b): its robust accuracy has a closed form."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x):
        z = (x * self.w).sum((1, 2, 3)) + self.b
        return torch.stack([z, -z], 1)


@pytest.mark.parametrize('scale', [1., 1e3])  # at 1e3 the cross-entropy and its gradient are exactly 0
def test_survivors_are_those_of_the_closed_form(scale):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, 4, generator=g)
    x = .3 + .4 * torch.rand(200, 3, 4, 4, generator=g)
    model, text, eps = Linear(scale * w, scale * -.5 * w.sum()), torch.eye(2), 8 / 255
    z = model(x)[:, 0]
    y = (z < 0).long()
    margin = z.abs() - scale * eps * w.abs().sum()
    expected = (margin > 0).nonzero()[:, 0]
    assert 20 < len(expected) < 180
    found = evaluation.survivors(model, text, x, y, torch.arange(200), list(range(200)), eps, seed=0)
    assert torch.equal(found, expected)


def test_result_does_not_depend_on_the_batch_size(run, tmp_path):
    reports = []
    for size in (7, 64):
        zeroshot(run, '--split', 'val', '--n', 60, '--eps', 1, 4, '--batch_size', size, '--json', tmp_path / 'a.json')
        reports.append(json.loads((tmp_path / 'a.json').read_text()))
    a, b = reports
    assert a['results'] == b['results']
    r = a['results'][0]
    assert r['n'] == a['n'] == 60 and 1 >= r['clean_acc'] > .15  # chance is 0.04
    assert r['clean_acc'] >= r['adv_acc']['1'] >= r['adv_acc']['4'] and r['clean_acc'] > r['adv_acc']['4']
    assert {'command', 'commit', 'versions', 'seed', 'seconds', 'attack', 'data', 'split'} <= set(a)


def test_more_images_than_there_are(run, capsys):
    zeroshot(run, '--split', 'val', '--n', 9999, '--eps')
    captured = capsys.readouterr()
    assert 'has 357 images' in captured.err and 'n = 357' in captured.out


def test_held_out_captions(run, tmp_path, capsys):
    for subset, n in (('held-out', None), ('seen', None), ('all', 888)):
        zeroshot(run, '--subset', subset, '--eps', '--json', tmp_path / f'{subset}.json')
    n = {s: json.loads((tmp_path / f'{s}.json').read_text())['n'] for s in ('held-out', 'seen', 'all')}
    captions = data.load_pairs('easyvqa', 'test').captions
    assert n['held-out'] == sum(c in ('a red circle', 'a blue triangle') for c in captions) and n['held-out'] + n['seen'] == n['all'] == 888
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(**dict(TINY, steps=1), out=tmp_path / 'run')))
    with pytest.raises(SystemExit, match='without --holdout'):
        zeroshot(tmp_path / 'run', '--subset', 'held-out')


def test_plot(run, tmp_path):
    zeroshot(run, '--split', 'val', '--n', 20, '--eps', 2, '--plot', tmp_path / 'p.png')
    assert (tmp_path / 'p.png').read_bytes()[:4] == b'\x89PNG' and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('arguments, message', [
    (['--eps', '0.0157'], 'did you mean 4'), (['--eps', '0'], '--eps 0'), (['--eps', '-4'], '--eps -4'), (['--n', '-1'], '--n -1'),
    (['--batch_size', '0'], '--batch_size 0'), (['--json', 'no/such/folder/x.json'], 'no folder no/such/folder'),
    (['--plot', 'x.bmp'], 'must end in'), (['--split', 'dev'], 'invalid choice'), (['--epsilon', '3'], 'unrecognized')])
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(['zeroshot', 'x', *arguments])
    assert message in capsys.readouterr().err


def test_bad_directories_and_data(run, tmp_path):
    with pytest.raises(SystemExit, match='is no run of clip_adv.py'):
        zeroshot(tmp_path)
    with pytest.raises(SystemExit, match='no such folder'):
        zeroshot(run, '--data', tmp_path / 'nowhere')


def test_readme_commands_exist(monkeypatch):
    """Every command line of ours in README is one that the scripts accept."""
    monkeypatch.chdir(ROOT)
    readme = (ROOT / 'README.md').read_text()
    lines = [command for line in re.findall(r'^    (.*)$', readme, re.M) + re.findall(r'`([^`\n]+)`', readme)
             for command in line.split('#')[0].split('&&')]
    ours = [re.sub(r'^(torchrun|python)( --n\w+ \S+)* ', '', c.strip()) for c in lines if re.search(r'(clip_adv|eval)\.py ?', c)]
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
