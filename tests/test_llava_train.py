"""Training of stage 2 as a user runs it: processes, micro-batches, signals, resuming, bad input, the
questions typed at a prompt."""

import json
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, execute, flags, torchrun
from PIL import Image
from test_train import assert_same_state, quantities, relative, state

import clip_adv
import data
import llava_adv

SCRIPT, ONE_STEP = ROOT / 'llava_adv.py', ROOT / 'tests' / 'one_step.py'


def train(parts, **settings):
    llava_adv.main(*data.parse(llava_adv.Config, '', flags(**{**parts, **settings})))


def resume(out):
    """No other flag is needed."""
    llava_adv.main(*data.parse(llava_adv.Config, '', flags(out=out, resume=True)))


def one_step(target, *how, **settings):
    """A command; see one_step.py."""
    return [sys.executable, str(ONE_STEP), str(target), 'stage=llava_adv', *how, *flags(**settings)]


def killed(number, step, tmp_path, **settings):
    """The finished process of a run that gets a signal at an update."""
    command = one_step(tmp_path / 'unused', f'kill={step}:{int(number)}', **settings)
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def mixed(tmp_path):
    """Conversations with and without an image, of very different lengths."""
    g = np.random.default_rng(0)
    rows = []
    for i in range(6):
        Image.fromarray(g.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / f'{i}.png')
        said = [{'from': 'human', 'value': ('<image>\n' if i % 3 else '') + 'what is it?'}]
        said += [{'from': 'gpt', 'value': 'red ' * (1 + 4 * i)}]
        rows.append({'id': i, 'conversations': said} | ({'image': f'{i}.png'} if i % 3 else {}))
    (tmp_path / 'mixed.json').write_text(json.dumps(rows))
    return dict(data=tmp_path / 'mixed.json', image_root=tmp_path, steps_a=0, steps_b=1)


# -------------------------------------------------------------------------------------------------- processes
def test_the_whole_step_is_the_same_in_one_process_in_two_and_in_micro_batches(parts, mixed, tmp_path):
    """Adversarial, with text-only samples, unequal numbers of answer tokens and dropout: gradients agree to
    1e-5, starts to the bit."""
    rows = json.loads(mixed['data'].read_text())
    bad = {**rows[2], 'image': 'gone.png'}, json.loads(json.dumps(rows[2]).replace('what', 'what? ' * 400))
    mixed['data'].write_text(json.dumps([*rows[:3], *bad, *rows[3:]]))  # left out, the same on both ranks
    settings = dict(parts, **mixed, grad_clip=1e9, prompt='v1', max_length=1000, max_bad=0.5)
    execute(one_step(tmp_path / 'one', **settings, out=tmp_path / 'r1'))
    execute(one_step(tmp_path / 'micro', **settings, micro_batch=1, out=tmp_path / 'r2'))
    how = flags(**settings, micro_batch=2, out=tmp_path / 'r3')
    output = execute(torchrun(2, ONE_STEP, str(tmp_path / 'two'), 'stage=llava_adv', *how))
    assert 'of 8 samples 0 are cut at --max_length 1000, and 2 cannot be learned from, 1 × ' in output
    assert 'broadcast_buffers' not in output  # of which torch 2.13 and newer warn
    files = [tmp_path / name for name in ('one.0', 'micro.0', 'two.0', 'two.1')]
    one, micro, *two = (torch.load(file, weights_only=True) for file in files)
    assert len(one['seen']) == 1 and len(micro['seen']) == 4  # the two without an image are not attacked
    x, start, x_adv = one['seen'][0]
    assert len(x) == 4 and (x_adv - x).abs().max() > 7.9 / 255
    for others in (micro['seen'], [s for rank in two for s in rank['seen']]):
        for whole, part in zip((x, start), list(zip(*others, strict=True))[:2], strict=True):
            assert torch.equal(whole, torch.cat(part))
        assert (x_adv - torch.cat([s[2] for s in others])).abs().max() < 1e-6
    for run in (micro, *two):
        assert relative(run['updates'][0], one['updates'][0]) <= 1e-5
    rows = [quantities(tmp_path / r)[0] for r in ('r1', 'r2', 'r3')]
    for row in rows[1:]:
        assert row['answer_tokens'] == rows[0]['answer_tokens']
        for loss in ('loss_adv', 'loss_clean'):
            assert row[loss] == pytest.approx(rows[0][loss], rel=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(parts, whole, tmp_path):
    """Both sub-stages, up to the order of sums."""
    settings = dict(parts, batch_a=4, batch_size=6)
    execute(torchrun(2, SCRIPT, *flags(**settings, out=tmp_path / 'two')))
    for row, row2 in zip(quantities(whole), quantities(tmp_path / 'two'), strict=True):
        assert row['loss_adv'] == pytest.approx(row2['loss_adv'], rel=1e-3)
        assert row['answer_tokens'] == row2['answer_tokens']


def test_bfloat16_on_a_cpu(parts, whole, tmp_path):
    """The LLM's own weights in half the memory; images, attack and adapters stay float32."""
    train(parts, out=tmp_path / 'run', dtype='bfloat16', checkpoint=True)
    ours, theirs = ([row['loss_adv'] for row in quantities(run)] for run in (tmp_path / 'run', whole))
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.slow
def test_a_rank_without_images_does_not_hang(parts, mixed, tmp_path):
    """Its projector and tower take part with a gradient of 0."""
    rows = json.loads(mixed['data'].read_text())
    mixed['data'].write_text(json.dumps([rows[0], rows[3], rows[1], rows[2]] * 2))
    settings = dict(parts, **mixed) | dict(batch_size=2, steps_b=4)
    execute(torchrun(2, SCRIPT, *flags(**settings, out=tmp_path / 'run')))
    assert state(tmp_path / 'run')['step'] == 4


def test_no_attack_and_the_attack_see_the_same_samples(parts, whole, tmp_path):
    train(parts, eps=0, out=tmp_path / 'clean')
    clean, adv = quantities(tmp_path / 'clean'), quantities(whole)
    a, b = ([(r['step'], r['stage'], r['answer_tokens']) for r in rows] for rows in (clean, adv))
    assert a == b
    assert [r['stage'] for r in adv] == ['A', 'A', 'B', 'B', 'B', 'B'] and all(r['k'] == 0 for r in clean)
    assert clean[0]['loss_adv'] == pytest.approx(clean[0]['loss_clean'], rel=1e-6)
    assert adv[0]['loss_adv'] > adv[0]['loss_clean']
    assert adv[0]['loss_clean'] == pytest.approx(clean[0]['loss_clean'], rel=1e-6)


# -------------------------------------------------------------------------------------- stopping and resuming
@pytest.mark.parametrize('step', [pytest.param(1, marks=pytest.mark.slow), 2, 5])
def test_resume_is_bit_exact(parts, whole, tmp_path, step):
    """Stopped in A, between A and B, in B."""
    out = tmp_path / 'run'
    done = killed(signal.SIGTERM, step, tmp_path, **parts, out=out)
    output = done.stdout + done.stderr
    assert done.returncode == 143 and f'saved after update {step} of 6' in done.stdout, output
    assert state(out)['step'] == step and not (out / 'model.safetensors').exists()
    resume(out)
    assert_same_state(state(out), state(whole))
    assert quantities(out) == quantities(whole)
    assert (out / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()


def test_resume_after_sigkill_and_of_a_finished_run(parts, whole, tmp_path):
    out = tmp_path / 'run'
    assert killed(signal.SIGKILL, 6, tmp_path, **parts, out=out).returncode == -signal.SIGKILL
    assert state(out)['step'] == 4
    train(parts, out=out, resume=True)
    assert_same_state(state(out), state(whole))
    (out / 'model.safetensors').unlink()
    train(parts, out=out, resume=True)  # nothing is left to train: what is derived is written again
    assert (out / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()


@pytest.mark.slow
def test_easyvqa_with_its_augmentation_is_resumed(parts, tmp_path):
    settings = {k: v for k, v in parts.items() if not k.startswith('data')}
    settings |= dict(steps_a=1, steps_b=2, save_every=1)
    train(settings, out=tmp_path / 'whole')
    train(settings, out=tmp_path / 'run')
    (tmp_path / 'run' / 'previous_train_state.pt').replace(tmp_path / 'run' / 'train_state.pt')
    assert state(tmp_path / 'run')['step'] == 2
    train(settings, out=tmp_path / 'run', resume=True)
    assert_same_state(state(tmp_path / 'run'), state(tmp_path / 'whole'))


def test_torchrun_restarts_it(parts, tmp_path, monkeypatch):
    """With the command that began it, in which what depends on the machine is not filled in."""
    train(parts, out=tmp_path, steps_b=1)
    before = state(tmp_path)
    assert before['config']['dtype'] == 'float32'
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    train(parts, out=tmp_path, steps_b=1)
    assert_same_state(state(tmp_path), before)


def test_resume_with_another_llm(parts, whole, tmp_path):
    out = tmp_path / 'run'
    train(parts, out=out, steps_b=1)
    llm, tok = llava_adv.load_llm(str(parts['llm']), torch.float32)
    other = tmp_path / 'llm'
    other.mkdir()
    weights = {n: w.clone() for n, w in llm.state_dict().items()}
    weights['model.norm.weight'][-1] += 1e-6  # not at the beginning of a weight
    data.save_directory(other, llm.config, weights, tok.files(512))
    saved = state(out)
    torch.save(saved | {'config': saved['config'] | {'llm': str(other)}}, out / 'train_state.pt')
    with pytest.raises(SystemExit, match='the weights of --llm are not those that the run'):
        resume(out)


def test_the_whole_llm_can_be_trained(parts, tmp_path):
    train(parts, out=tmp_path / 'full', lora_r=0, steps_b=2)
    before, _ = llava_adv.load_llm(str(parts['llm']), torch.float32)
    after, _ = llava_adv.load_llava(str(tmp_path / 'full'))
    assert all(not torch.equal(w, after.llm.state_dict()[n]) for n, w in before.state_dict().items())
    assert 'llm.model.norm.weight' in state(tmp_path / 'full')['model']


def test_from_a_llava(parts, whole, tmp_path):
    """--init takes a LLaVA: tower, projector and LLM from it. A and B in two runs are what they are in one,
    but for the optimizer."""
    train(parts, out=tmp_path / 'a', steps_b=0)
    more = {k: v for k, v in parts.items() if k not in ('init', 'llm')} | dict(init=tmp_path / 'a', steps_a=0)
    train(more, out=tmp_path / 'b')
    two, one = ([row['loss_adv'] for row in quantities(run)] for run in (tmp_path / 'b', whole))
    assert two == pytest.approx(one[2:], rel=1e-5)
    train(more, out=tmp_path / 'b', resume=True)
    with pytest.raises(SystemExit, match='is a LLaVA and brings its LLM'):
        train(dict(more, llm=parts['llm']), out=tmp_path / 'c')
    assert f'A LLaVA from `{tmp_path / "a"}`, stage 2' in (tmp_path / 'b' / 'README.md').read_text()
    (tmp_path / 'a').rename(tmp_path / 'elsewhere')
    with pytest.raises(SystemExit, match='neither the LLaVA --init .* nor .* is there any more'):
        resume(tmp_path / 'b')
    assert not (tmp_path / 'b' / 'llm').exists()


def test_a_run_does_not_need_what_it_began_with(parts, tmp_path):
    """Its checkpoint has the image tower."""
    shutil.copytree(parts['init'], tmp_path / 'clip')
    train(parts, init=tmp_path / 'clip', out=tmp_path / 'run', steps_b=1)
    before, _ = llava_adv.load_llava(str(tmp_path / 'run'))
    shutil.rmtree(tmp_path / 'clip')
    (tmp_path / 'run' / 'model.safetensors').unlink()
    resume(tmp_path / 'run')
    after, _ = llava_adv.load_llava(str(tmp_path / 'run'))
    assert all(torch.equal(w, after.state_dict()[n]) for n, w in before.state_dict().items())


def test_the_last_block_is_kept_as_it_was(parts, whole):
    clip, _ = clip_adv.load_clip(parts['init'])
    model, _ = llava_adv.load_llava(str(whole))
    ours = model.visual.state_dict()
    same = {n: torch.equal(w, ours[n]) for n, w in clip.visual.state_dict().items() if n in ours}
    kept = ('ln_post', 'transformer.resblocks.1.')
    assert all(equal == n.startswith(kept) for n, equal in same.items()), same


# -------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(eps=-1), '--eps -1'),
        (dict(eps=0.0314), 'did you mean 8'),
        (dict(alpha=25), '--alpha 25.*2ε = 24'),
        (dict(k=0), '--k 0.*--eps 0'),
        (dict(steps_a=0, steps_b=0), 'not both 0'),
        (dict(steps_b=-2), '--steps_b -2'),
        (dict(batch_size=0), '--batch_size 0'),
        (dict(micro_batch=-1), '--micro_batch -1'),
        (dict(lora_r=-1), '--lora_r -1'),
        (dict(lora_dropout=1), '--lora_dropout 1'),
        (dict(lr=-1), '--lr -1'),
        (dict(warmup=2), '--warmup 2'),
        (dict(lora_r=0, dtype='bfloat16'), '--dtype bfloat16 with --lora_r 0'),
        (dict(grad_clip=0), '--grad_clip 0'),
        (dict(init='nowhere'), '--init nowhere: no such file or directory'),
        (dict(init='runs/clip_adv'), 'make it first: python clip_adv.py'),
        (dict(llm='nowhere'), '--llm nowhere: no such file or directory'),
        (dict(data='nowhere'), '--data nowhere'),
        (dict(max_length=16), '40 × no answer .*\n.*a.json, entry 0 .*--max_length is 16'),
        (dict(max_bad=-1), '--max_bad -1'),
        (dict(workers=-1), '--workers -1'),
        (dict(turns=0), '--turns 0'),
    ],
)
def test_bad_settings(parts, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        train(parts, out=tmp_path / 'run', **settings)
    assert not (tmp_path / 'run' / 'train_state.pt').exists()


@pytest.mark.parametrize('name, value', [('prompt', 'v0'), ('dtype', 'half')])
def test_settings_with_few_values(parts, tmp_path, capsys, name, value):
    with pytest.raises(SystemExit) as e:
        train(parts, out=tmp_path / 'run', **{name: value})
    assert e.value.code == 2 and f"--{name}: invalid choice: '{value}'" in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_cut_samples_are_counted(parts, mixed, tmp_path, capsys):
    train(parts, **mixed | dict(out=tmp_path / 'run', max_length=40, prompt='chat', workers=1))
    assert ' are cut at --max_length 40, and 0 cannot be learned' in capsys.readouterr().out


def write_rows(mixed, *change):
    """The conversations again, each followed by what the functions make of it."""
    rows = json.loads(mixed['data'].read_text())
    mixed['data'].write_text(json.dumps([made for row in rows for made in (row, *(f(row) for f in change))]))


def test_bad_samples_end_the_run_above_a_limit(parts, mixed, tmp_path, capsys, monkeypatch):
    """What needs no language model is found before there is one; all are counted, ten are listed."""
    write_rows(mixed, lambda row: row | {'image': 'gone.png'}, lambda row: row | {'conversations': 5})
    monkeypatch.setattr(llava_adv, 'build', lambda *_: pytest.fail('too early'))
    with pytest.raises(SystemExit) as e:
        train(parts, **mixed, out=tmp_path / 'run')
    said = str(e.value).splitlines()
    assert said[0].startswith('error: --max_bad 0.01: of 18 samples ') and len(said) == 11
    assert '12 cannot be learned from, 6 × no such image file' in said[0] and '6 × not in LLaVA' in said[0]
    assert 'mixed.json, entry 1: no such image file' in said[1] and 'gone.png' in said[1]
    assert not (tmp_path / 'run').exists()
    monkeypatch.undo()
    train(parts, **mixed, out=tmp_path / 'run', max_bad=0.7)
    assert '12 cannot be learned from' in capsys.readouterr().out
    (tmp_path / 'mixed.json').write_text('[5, 6]')
    with pytest.raises(SystemExit, match='2 cannot be learned from'):
        train(parts, **mixed, out=tmp_path / 'all', max_bad=1)


def test_an_epoch_is_one_of_what_is_kept(parts, mixed):
    """And a template that cannot express a conversation leaves that one out."""
    write_rows(mixed, lambda row: json.loads(json.dumps(row).replace('what', 'odd')))
    _, tok = llava_adv.load_llm(str(parts['llm']), torch.float32)
    refuse = "{% if 'odd' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    tok.chat_template = refuse + tok.chat_template
    model = types.SimpleNamespace(style='chat', image_tokens=4)
    cfg = llava_adv.Config(data=str(mixed['data']), image_root=str(mixed['image_root']), max_bad=0.5)
    cfg.steps_a, cfg.steps_b, cfg.batch_size = 0, -1, 2
    (stage,) = llava_adv.sub_stages(cfg)
    _, chats, prompt, steps, _ = llava_adv.check_samples(cfg, stage, model, tok)
    assert len(chats) == len(chats.bad) == 6 and steps == 3 and prompt.style == 'chat'
    assert all('TemplateError: no; use --prompt v1' in kind for kind, _ in chats.bad.values())


def test_all_samples_are_checked_before_the_first_update(parts, tmp_path):
    """Those of B, too, before A is trained."""
    rows = parts['data'].read_text().replace('"human", "value": "', '"human", "value": "' + 'what? ' * 400)
    (tmp_path / 'b.json').write_text(rows)
    with pytest.raises(SystemExit, match='40 × no answer to predict is left'):
        train(parts, out=tmp_path / 'run', data=tmp_path / 'b.json', max_length=900)
    assert not (tmp_path / 'run').exists()


def test_the_export_is_tried_before_the_first_update(parts, tmp_path, monkeypatch):
    out, saved, save = tmp_path / 'run', [], llava_adv.save_llava
    monkeypatch.setattr(llava_adv, 'save_llava', lambda *_: data.fail('disk full'))
    with pytest.raises(SystemExit, match='disk full'):
        train(parts, out=out, steps_b=1)
    assert sorted(f.name for f in out.iterdir()) == ['lock', 'log.jsonl', 'train_config.json']
    assert not (out / 'log.jsonl').read_text()
    monkeypatch.setattr(llava_adv, 'save_llava', lambda *how: (saved.append(how[2]), save(*how)))
    resume(out)
    assert len(saved) == 2 and saved[1] == out and not saved[0].exists() and saved[0].parent == out


def test_an_image_that_does_not_decode_is_named(parts, mixed, tmp_path):
    (tmp_path / '4.png').write_bytes(b'')
    with pytest.raises(SystemExit, match='4.png'):
        train(parts, **mixed | dict(out=tmp_path / 'run'))


def test_a_run_that_dies_beside_its_tiny_llm_is_resumed(parts, tmp_path, monkeypatch):
    """Killed while it is trained, then stopped before the first checkpoint: --resume needs no other flag, and
    trains a finished one no second time."""
    settings = {k: v for k, v in parts.items() if k != 'llm'} | dict(steps_b=1, seed=3)
    train_llm, arithmetic = llava_adv.train_tiny_llm, llava_adv.arithmetic
    monkeypatch.setattr(llava_adv, 'train_tiny_llm', lambda folder, cfg: train_llm(folder, cfg, steps=2))
    train(settings, out=tmp_path / 'whole')

    out = tmp_path / 'run'
    assert killed(signal.SIGKILL, 2, tmp_path, **settings, out=out).returncode == -signal.SIGKILL
    assert not (out / 'train_state.pt').exists() and not (out / 'llm' / 'config.json').exists()
    with pytest.raises(SystemExit, match='continue it with --resume'):
        train(settings, out=out)
    monkeypatch.setattr(llava_adv, 'arithmetic', lambda *_: sys.exit('stopped'))
    with pytest.raises(SystemExit, match='stopped'):
        resume(out)
    llm = contents(out / 'llm')
    assert llm == contents(tmp_path / 'whole' / 'llm') and not (out / 'train_state.pt').exists()
    monkeypatch.setattr(llava_adv, 'arithmetic', arithmetic)
    monkeypatch.setattr(llava_adv, 'train_tiny_llm', lambda *_: pytest.fail('it is there already'))
    resume(out)
    assert_same_state(state(out), state(tmp_path / 'whole'))
    assert quantities(out) == quantities(tmp_path / 'whole') and contents(out / 'llm') == llm


def test_a_folder_named_llm_that_is_not_ours_is_left_alone(parts, tmp_path):
    """As all is that no run has written."""
    shutil.copytree(parts['llm'], tmp_path / 'run' / 'llm')
    settings = {k: v for k, v in parts.items() if k != 'llm'} | dict(out=tmp_path / 'run', steps_b=0)
    for how in (dict(), dict(resume=True), dict(llm=tmp_path / 'run' / 'llm')):
        with pytest.raises(SystemExit, match='is not empty and holds no run: give another --out'):
            train(settings, **how)
    assert [f.name for f in (tmp_path / 'run').iterdir()] == ['llm']
    assert contents(tmp_path / 'run' / 'llm') == contents(parts['llm'])


def test_a_tiny_llm_from_a_file_of_conversations(mixed, tmp_path):
    """Some without an image, all with a negation: there is no easy part to begin with."""
    rows = json.loads(mixed['data'].read_text())
    for row in rows:
        question = row['conversations'][0]
        question['value'] = question['value'].replace('what is it', 'what is it not')
    mixed['data'].write_text(json.dumps(rows))
    cfg = llava_adv.Config(data=str(mixed['data']), image_root=str(tmp_path))
    llava_adv.train_tiny_llm(tmp_path / 'llm', cfg, steps=2, batch_size=4)
    llm, tok = llava_adv.load_llm(str(tmp_path / 'llm'), torch.float32)
    assert llm.cfg.vocab_size >= tok.vocab_size


@pytest.mark.slow
def test_the_tiny_llm_answers_from_a_description(tmp_path):
    """Of the validation split, a caption in the image's place: “what” questions, yes/no as many of each, with
    and without negation."""
    cfg = llava_adv.Config(out=str(tmp_path))
    llava_adv.train_tiny_llm(tmp_path / 'llm', cfg)
    llm, tok = llava_adv.load_llm(str(tmp_path / 'llm'), torch.float32)
    prompt, (facts, asked, _) = data.Prompt(tok, 'chat', 0, 999), data.easyvqa_split('val')
    kinds = {'what': [row for row in asked if row[1] not in ('yes', 'no')]}
    kinds['yes/no'] = [asked[n] for n in data.balanced(asked)]
    kinds['negated'] = [row for row in kinds['yes/no'] if ' not ' in row[0] or ' no ' in row[0]]
    for kind, rows in kinds.items():
        rows = [row for row in rows if row[2] in facts]
        said = [(f'{data.describe(*facts[image])[n % 5]}\n{q}', a) for n, (q, a, image) in enumerate(rows)]
        batch = data.collate([data.Sample(None, *prompt.encode([turn]), 0) for turn in said], tok.pad)
        with torch.no_grad():
            hidden = llm(llm.model.embed_tokens(batch.ids))[batch.rows, batch.columns]
            wrong = llm.lm_head(hidden).argmax(1) != batch.targets
        right = torch.zeros(len(rows)).index_add(0, batch.rows, wrong.float()) == 0
        print(f'{kind}: {100 * right.float().mean():.1f} % of {len(rows)}')
        assert len(rows) > 200 and right.float().mean() > 0.95, kind


def test_the_prompt_of_the_training_is_remembered(parts, tmp_path):
    train(parts, out=tmp_path / 'run', prompt='v1', steps_b=1)
    model, tok = llava_adv.load_llava(str(tmp_path / 'run'))
    assert model.style == 'v1' and tok.chat_template  # which would be the default
    import eval as evaluation

    for asked, style in (('', 'v1'), ('chat', 'chat')):
        asker = evaluation.Answerer(str(tmp_path / 'run'), torch.device('cpu'), 4, 4, asked)
        assert asker.prompt.style == style


# ------------------------------------------------------------------------------------------------------- chat
def test_chat(whole, tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'a.png')

    def command(init, image):
        return [sys.executable, str(SCRIPT), *flags(init=init, chat=tmp_path / image)]

    how = dict(env=environment(), capture_output=True, text=True)
    done = subprocess.run(command(whole, 'a.png'), input='what is it?\n\n<image>\nsure?\n', **how)
    assert done.returncode == 0 and done.stdout.count('>') >= 3, done.stdout + done.stderr
    assert 'cannot stand in a question' in done.stdout
    output = execute(command(whole, 'b.png'), fails=True)
    assert 'b.png' in output and 'Traceback' not in output
    assert 'is no LLaVA directory' in execute(command(tmp_path, 'a.png'), fails=True)
    with pytest.raises(SystemExit, match='--chat: give --init, too'):
        llava_adv.chat(llava_adv.Config(chat='a.png'), {'chat'})


@pytest.mark.gpu
def test_on_cuda(parts, tmp_path):
    train(parts, out=tmp_path / 'run', steps_b=20, lr=1e-2, checkpoint=True)
    rows = quantities(tmp_path / 'run')
    assert rows[-1]['loss_adv'] < rows[2]['loss_adv']
