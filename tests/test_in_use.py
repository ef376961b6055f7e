"""What people's own files, stopped processes and damaged disks do to it."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, environment, execute, flags, torchrun
from PIL import Image

import clip_adv
import data
import eval as evaluation
import llava_adv

SCRIPT, ONE_STEP = ROOT / 'clip_adv.py', ROOT / 'tests' / 'one_step.py'


def train(**settings):
    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**{**TINY, **settings})))


def state(out):
    return torch.load(out / 'train_state.pt', weights_only=True)


def own_pairs(folder, n=12, form='jsonl'):
    """A folder of one's own: images, and what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        Image.fromarray(np.full((20, 20, 3), 20 * i, dtype=np.uint8)).save(folder / f'{i}.png')
        rows.append({'file_name': f'{i}.png', 'text': f'shade {i}'})
    lines = [json.dumps(row) for row in rows]
    if form == 'csv':
        lines = ['file_name,text', *(f'{row["file_name"]},{row["text"]}' for row in rows)]
    (folder / f'metadata.{form}').write_text('\n'.join(lines))
    return folder


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return own_pairs(tmp_path_factory.mktemp('pairs'))


@pytest.fixture
def trained(tmp_path, pairs):
    train(out=tmp_path / 'run', data=pairs)
    return tmp_path / 'run'


# --------------------------------------------------------------------------------------------------- images
def photo(orientation):
    """A picture of 60 × 40, red on the left, stored for a camera that was held so."""
    image, content = Image.new('RGB', (60, 40), 'blue'), io.BytesIO()
    image.paste('red', (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(content, 'jpeg', quality=95, exif=exif)
    return io.BytesIO(content.getvalue())


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_photos_stand_upright(orientation, tmp_path):
    """As transformers opens them."""
    from transformers.image_utils import load_image

    file = tmp_path / 'photo.jpg'
    file.write_bytes(photo(orientation).getvalue())
    expected = np.asarray(load_image(str(file)))
    assert np.array_equal(np.asarray(data.read_image(file)), expected)
    assert expected.shape[:2] == ((60, 40) if orientation > 4 else (40, 60))
    with Image.open(file) as image:  # of torchvision's sets, which open images themselves
        assert np.array_equal(np.asarray(data.to_rgb(image.convert('RGB'))), expected)


def test_damaged_exif_turns_nothing():
    content = photo(6).getvalue().replace(b'Exif\0\0MM', b'Exif\0\0XX').replace(b'Exif\0\0II', b'Exif\0\0XX')
    assert data.read_image(io.BytesIO(content)).size == (60, 40)


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_pixels_of_unknown_range_are_an_error(dtype, tmp_path):
    file = tmp_path / 'deep.tif'
    Image.fromarray(np.arange(256, dtype=dtype).reshape(16, 16)).save(file)
    with pytest.raises(data.BadImage, match='deep.tif: pixels of mode [FI] have no range that is known'):
        data.read_image(file)


def test_16_bits_are_scaled(tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(values).save(tmp_path / 'deep.png')
    assert np.array_equal(np.asarray(data.read_image(tmp_path / 'deep.png'))[..., 0], values // 257)


# ----------------------------------------------------------------------------------------- folders of pairs
def test_forms_of_metadata(tmp_path, pairs):
    """As Hugging Face's imagefolder has them: .csv, further down, Windows' marks, line ends and slashes."""
    captions = data.load_pairs(str(pairs)).captions
    assert data.load_pairs(str(own_pairs(tmp_path / 'csv', form='csv'))).captions == captions
    (tmp_path / 'csv' / 'metadata.csv').write_text('file_name,text\r\n0.png,"a, on\r\ntwo lines"\r\n')
    assert data.load_pairs(str(tmp_path / 'csv')).captions[0].split() == ['a,', 'on', 'two', 'lines']
    own_pairs(tmp_path / 'nested' / 'a', 5)
    own_pairs(tmp_path / 'nested' / 'b', 3, form='csv')
    nested = data.load_pairs(str(tmp_path / 'nested'))
    assert sorted(nested.captions) == sorted(captions[:5] + captions[:3])
    windows = own_pairs(tmp_path / 'windows' / 'sub').parent
    text = (windows / 'sub' / 'metadata.jsonl').read_text().replace('"file_name": "', r'"file_name": "sub\\')
    (windows / 'metadata.jsonl').write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
    found = data.load_pairs(str(windows))
    assert found.captions == captions and found.files[0] == windows / 'sub' / '0.png'
    keyed = own_pairs(tmp_path / 'keyed')
    (keyed / 'metadata.jsonl').write_text((keyed / 'metadata.jsonl').read_text().replace('"text"', '"alt"'))
    assert data.load_pairs(str(keyed), caption_key='alt').captions == captions
    with pytest.raises(SystemExit, match=r'(?s)12 bad.*its keys are file_name, alt; see --caption_key'):
        data.load_pairs(str(keyed))


@pytest.mark.parametrize(
    'line, message',
    [
        ('{"file_name": "../secret.png", "text": "a"}', 'leads out of the folder'),
        ('{"file_name": "/etc/passwd", "text": "a"}', 'leads out of the folder'),
        (r'{"file_name": "0.png", "text": "\ud83d"}', 'surrogates not allowed'),
        ('[' * 100_000, 'RecursionError'),
    ],
)
def test_bad_lines(tmp_path, line, message):
    Image.new('RGB', (4, 4)).save(tmp_path / 'secret.png')
    folder = own_pairs(tmp_path / 'pairs', 2)
    with open(folder / 'metadata.jsonl', 'a') as file:
        file.write('\n' + line)
    with pytest.raises(SystemExit, match=f'(?s)1 bad lines.*line 3: .*{message}'):
        data.load_pairs(str(folder))
    (folder / 'metadata.jsonl').write_bytes('{"file_name": "0.png", "text": "é"}'.encode('latin-1'))
    with pytest.raises(SystemExit, match='metadata.jsonl: UnicodeDecodeError.*a text in UTF-8'):
        data.load_pairs(str(folder))


def test_one_layout_with_and_without_splits(tmp_path, pairs, capsys):
    """Training and evaluation read the same folders; the command that training ends with runs."""
    for split in ('train', 'val'):
        own_pairs(tmp_path / 'own set' / split, 12 if split == 'train' else 5)
    for split, n in (('train', 12), ('val', 5)):
        assert len(data.load_pairs(str(tmp_path / 'own set'), split)) == n
    with pytest.raises(SystemExit, match='--split test: .*own set has train, val'):
        data.load_pairs(str(tmp_path / 'own set'), 'test')
    assert len(data.load_pairs(str(pairs), 'test')) == 12  # one without splits
    trained_on = 'was trained on these images'
    for name, source, said in (('split', tmp_path / 'own set', False), ('whole', pairs, True)):
        train(out=tmp_path / f'run {name}', data=source, steps=1)
        suggested = re.search('measure it with: (.*)', capsys.readouterr().out)[1]
        python, script, *arguments = shlex.split(suggested)
        assert (python, script) == ('python', 'eval.py')
        evaluation.main(evaluation.parse([*arguments, '--attack', 'none', '--quiet']))
        assert (trained_on in capsys.readouterr().err) == said
    found = clip_adv.measuring(clip_adv.Config(data='a b', caption_key='alt', index_dir='i', out='r s'))
    assert found == "python eval.py retrieval 'r s' --data 'a b' --caption_key alt --index_dir i"


# ----------------------------------------------------------------------------------- checkpoints and exports
def test_a_flipped_bit_is_noticed(tmp_path):
    """Wherever it is: the state is as it was saved, or it is not read."""
    saved = {key: kind() for key, kind in data.STATE.items()}
    saved |= {'step': 3, 'model': {'w': torch.arange(2000.0)}}
    file, g, noticed = tmp_path / 'train_state.pt', torch.Generator().manual_seed(0), 0
    torch.save(saved, file)
    content = file.read_bytes()
    for place in torch.randint(8 * len(content), (200,), generator=g).tolist():
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found = data.load_state(tmp_path)
            assert found['step'] == 3 and torch.equal(found['model']['w'], saved['model']['w'])
        except SystemExit as e:
            noticed += 'nothing is left to resume' in str(e)
    assert noticed >= 150


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda s: [s], 'cannot read .*no checkpoint of this version'),
        (lambda s: {**s, 'step': None}, 'cannot read .*no checkpoint of this version'),
        (lambda s: {'model': s['model']}, 'cannot read .*no checkpoint of this version'),
        (lambda s: {**s, 'step': 'five'}, 'cannot read .*no checkpoint of this version'),
        (lambda s: {**s, 'config': None}, 'cannot read .*no checkpoint of this version'),
        (lambda s: {**s, 'step': 10**9}, 'after update 1000000000 of 6'),
        (lambda s: {**s, 'optimizer': {'state': {}, 'param_groups': []}}, 'the optimizer: ValueError'),
        (lambda s: {**s, 'optimizer': transposed(s['optimizer'])}, 'the optimizer: .*another shape'),
    ],
)
def test_wrong_checkpoints(trained, damage, message, capsys):
    """The one before it is gone on from; without that one, they end the run with a line."""
    log, whole = (trained / 'log.jsonl').read_text(), state(trained)
    torch.save(damage(whole), trained / 'train_state.pt')
    if 'cannot read' in message:
        train(out=trained, resume=True)
        assert 'going on from the one before' in capsys.readouterr().err
        assert torch.equal(state(trained)['model']['visual.proj'], whole['model']['visual.proj'])
        torch.save(damage(whole), trained / 'train_state.pt')
        (trained / 'previous_train_state.pt').unlink()
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
        train(out=trained, resume=True)
    assert len((trained / 'log.jsonl').read_text().splitlines()) == len(log.splitlines())


def transposed(optimizer):
    moments = {}
    for i, of in optimizer['state'].items():
        moments[i] = {k: v.T if v.ndim == 2 else v for k, v in of.items()}
    return {**optimizer, 'state': moments}


def test_exported_weights_are_checked(trained):
    """By eval.py, --init and --chat, which all open them in the same place."""
    file = trained / 'open_clip_model.safetensors'
    clip_adv.load_clip(trained)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match='is not what training wrote.*--resume of that run writes it again'):
        evaluation.main(evaluation.parse(['zeroshot', str(trained), '--attack', 'none', '--quiet']))
    train(out=trained, resume=True)
    clip_adv.load_clip(trained)


def test_everybody_may_read_what_the_umask_lets_them(trained):
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in trained.iterdir() if file.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


# -------------------------------------------------------------------------------- what a run goes on with
@pytest.mark.parametrize(
    'change, differs',
    [
        (lambda lines: lines[1:], 'texts and the names of images and the sizes'),
        (lambda lines: lines[::-1], 'texts and the names of images'),
        (lambda lines: [lines[0].replace('shade', 'tone'), *lines[1:]], 'texts of --data'),
        (lambda lines: lines, 'sizes of images of --data'),
    ],
)
def test_other_data_are_refused(tmp_path, change, differs):
    folder = own_pairs(tmp_path / 'pairs')
    train(out=tmp_path / 'run', data=folder)
    lines = (folder / 'metadata.jsonl').read_text().split('\n')
    (folder / 'metadata.jsonl').write_text('\n'.join(change(lines)))
    if change(lines) == lines:
        Image.effect_noise((90, 90), 50).convert('RGB').save(folder / '3.png')
    with pytest.raises(SystemExit, match=f'--resume: the {differs}.*not those that the run began with'):
        train(out=tmp_path / 'run', resume=True)


def test_other_processes_and_threads_are_said(trained, capsys):
    about = json.loads((trained / 'train_config.json').read_text())
    (trained / 'train_config.json').write_text(json.dumps({**about, 'processes': 4, 'threads': 8}))
    train(out=trained, resume=True)
    said = capsys.readouterr().out
    assert 'note: 4 processes until now, 1 from here on' in said and 'note: 8 threads until now' in said


def test_resume_where_nothing_was_saved(tmp_path, pairs):
    """Killed before its first checkpoint: --out and --resume alone go on with that run's settings."""
    out, command = tmp_path / 'run', [sys.executable, str(ONE_STEP), str(tmp_path / 'unused'), 'kill=1:9']
    settings = dict(TINY, data=pairs, eps=6.0, save_every=100)
    subprocess.run([*command, *flags(**settings, out=out)], env=environment(), capture_output=True)
    assert (out / 'train_config.json').exists() and not (out / 'train_state.pt').exists()
    execute([sys.executable, str(SCRIPT), '--out', str(out), '--resume'])
    train(**{**settings, 'out': tmp_path / 'whole'})
    assert state(out)['config']['eps'] == 6
    whole = state(tmp_path / 'whole')['model']
    assert all(torch.equal(w, whole[name]) for name, w in state(out)['model'].items())


# ----------------------------------------------------------------------------------------- stopped processes
def test_two_runs_do_not_write_into_one_folder(tmp_path, pairs):
    (tmp_path / 'run').mkdir()
    code = f'import data; data.lock(data.Path({str(tmp_path / "run")!r})); print(1, flush=True); input()'
    with subprocess.Popen([sys.executable, '-c', code], env=environment(), stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        about = json.dumps(dict(config=vars(clip_adv.Config()), commit='', versions={}, processes=1))
        (tmp_path / 'run' / 'train_config.json').write_text(about)
        with pytest.raises(SystemExit, match='another process is training there'):
            clip_adv.main(*data.parse(clip_adv.Config, '', flags(out=tmp_path / 'run', resume=True)))
        assert (tmp_path / 'run' / 'train_config.json').read_text() == about
        other.kill()
    data.lock(tmp_path / 'run')  # the kernel has released it


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.1)
    assert condition()


@pytest.mark.slow
def test_workers_end_with_their_launcher(tmp_path, pairs):
    """torchrun is killed: its processes save and end, and the run can be continued."""
    out = tmp_path / 'run'
    command = torchrun(2, SCRIPT, *flags(**dict(TINY, steps=100_000, log_every=1), data=pairs, out=out))
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-3) as launcher:
        wait_for(lambda: (out / 'train_state.pt').exists())
        launcher.kill()
        said = launcher.stdout.read().decode()  # until the last of them has closed it
    assert 'SIGTERM: saved after update' in said
    data.lock(out)


def test_sighup_is_a_signal_like_the_others(tmp_path, pairs):
    out = tmp_path / 'run'
    command = [sys.executable, str(SCRIPT), *flags(**dict(TINY, steps=100_000), data=pairs, out=out)]
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # under nohup it is not
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-3, **heard) as process:
        wait_for(lambda: (out / 'train_state.pt').exists())
        process.send_signal(signal.SIGHUP)
        assert b'SIGHUP: saved after update' in process.stdout.read()
    assert process.returncode == 128 + signal.SIGHUP


def test_a_log_line_that_does_not_fit_waits(tmp_path, capsys):
    cfg = clip_adv.Config(out=str(tmp_path / 'run'), alpha=1.0)
    run = data.Run(cfg, 0, 10, 'facts', torch.device('cpu'))
    log, bar = tmp_path / 'run' / 'log.jsonl', run.bar([], '', 0, 1)
    row = dict(loss_adv=1.0, loss_clean=1.0, eps=1.0)
    for step in (1, 2, 3):
        if step == 2:
            log.rename(tmp_path / 'kept')
            log.symlink_to('/dev/full')
        run.log(step, 8, bar, **row)
        if step == 2:
            assert 'cannot write' in capsys.readouterr().err
            log.unlink()
            (tmp_path / 'kept').rename(log)
    assert [json.loads(line)['step'] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_damaged_log_is_read_as_far_as_it_goes(trained, capsys):
    log = trained / 'log.jsonl'
    first, *others = log.read_text().splitlines()
    log.write_bytes('\n'.join([first, '{"step": ', '[]', '7', *others]).encode() + b'\n\xff\xfe\x00')
    train(out=trained, resume=True)
    assert log.read_text().splitlines() == [first, *others]
    assert '4 damaged lines left out' in capsys.readouterr().out


@pytest.mark.parametrize('command', ['train', 'evaluate'])
def test_nobody_reads_the_output(trained, pairs, tmp_path, command):
    """A pipe whose reader is gone costs the output, not the result."""
    script, words = SCRIPT, flags(**TINY, data=pairs, out=tmp_path / 'piped')
    if command == 'evaluate':
        script, words = ROOT / 'eval.py', ['zeroshot', str(trained), '--n', '9', '--attack', 'none']
        words += ['--json', str(tmp_path / 'out.json')]
    how = dict(env=environment(), stdout=-1, stderr=-3)
    with subprocess.Popen([sys.executable, str(script), *words], **how) as process:
        process.stdout.close()
    assert process.returncode == 0
    made = 'out.json' if command == 'evaluate' else 'piped/open_clip_model.safetensors'
    assert (tmp_path / made).exists()


@pytest.mark.parametrize('signal_number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_evaluation_goes_on(trained, tmp_path, signal_number, monkeypatch, capsys):
    """With what was measured so far, and to the same result; retrieval's outcomes are the largest."""
    command = 'retrieval' if signal_number == signal.SIGTERM else 'zeroshot'
    monkeypatch.chdir(tmp_path)
    words = [command, str(trained), '--n', '40', '--eps', '4', '--attack', 'pgd', '--batch_size', '16']
    whole = report(words, tmp_path / 'whole.json')
    judge, judged = evaluation.ZeroShot.judge, []
    before = signal.signal(signal_number, signal.SIG_DFL)  # nohup ignores SIGHUP, and so do we

    def stopping(task, images, eps):
        judged.append(eps)
        if len(judged) == 4:
            os.kill(os.getpid(), signal_number)
        return judge(task, images, eps)

    monkeypatch.setattr(evaluation.ZeroShot, 'judge', stopping)
    monkeypatch.setattr(evaluation.ZeroShot, 'pool', 16)
    code = evaluation.main(evaluation.parse([*words, '--quiet', '--json', 'part.json']))
    signal.signal(signal_number, before)
    assert code == 128 + signal_number
    assert f'{signal_number.name}: stopped; what was measured is kept' in capsys.readouterr().out
    assert not (tmp_path / 'part.json').exists()
    again = report(words, data.Path('part.json'))
    assert len(judged) == 4 + 3  # 3 pools at 2 radii: what was judged is not judged again
    assert (again['rows'], again['outcomes']) == (whole['rows'], whole['outcomes'])
    assert not list(tmp_path.glob('*.partial*'))


@pytest.mark.slow
def test_a_stopped_evaluation_ends_torchrun_without_a_traceback(trained, tmp_path):
    words = ['zeroshot', trained, '--n', '60', '--eps', '4', '--json', tmp_path / 'a.json']
    command = torchrun(2, ROOT / 'eval.py', *map(str, words))
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-3) as launcher:
        wait_for(lambda: list(tmp_path.glob('*.partial0')))
        launcher.send_signal(signal.SIGINT)
        said = launcher.stdout.read().decode()
    assert launcher.returncode == -signal.SIGUSR1 and 'Traceback' not in said, said
    assert 'SIGINT: stopped; what was measured is kept' in said
    execute(command)
    assert json.loads((tmp_path / 'a.json').read_text())['rows']


def report(words, file):
    evaluation.main(evaluation.parse([*words, '--quiet', '--json', str(file)]))
    return json.loads(file.read_text())


def test_other_weights_are_measured_anew(trained, tmp_path):
    """What was kept of a measurement belongs to the files that were there."""
    args = evaluation.parse(['zeroshot', str(trained), '--json', str(tmp_path / 'a.json')])
    args.rank = 0
    first = evaluation.Kept(args).file
    os.utime(trained / 'open_clip_model.safetensors', (1, 1))
    assert evaluation.Kept(args).file != first
    args.seed = 1
    assert len({evaluation.Kept(args).file, first}) == 2


# -------------------------------------------------------------------------------------- settings and numbers
@pytest.mark.parametrize(
    'words, message',
    [
        (['--lr', 'nan'], 'argument --lr: nan is not finite'),
        (['--wd', 'inf'], 'argument --wd: inf is not finite'),
        (['--grad_clip', 'nan'], 'argument --grad_clip: nan'),
        (['--seed', str(2**64)], 'has more than 64 bits'),
        (['--wd', '-1'], '--wd -1'),
        (['--workers', '-1'], '--workers -1'),
        (['--beta2', '1'], '--beta2 1 .*below 1'),
        (['--warmup', '-0.1'], '--warmup -0.1'),
        (['--out', ' '], '--out: must be the name of a folder'),
        (['--samples', '1e4', '--steps', '9'], '--steps 9 --samples 10000: one of the two'),
        (['--stepz', '3'], 'unrecognized arguments: --stepz 3; did you mean --steps?'),
    ],
)
def test_settings_that_cannot_be_meant(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (clip_adv, llava_adv):
        if module is llava_adv and words[0] in ('--beta2', '--samples', '--stepz'):
            continue
        with pytest.raises(SystemExit) as e:
            module.main(*data.parse(module.Config, '', words))
        said = capsys.readouterr().err + str(e.value)
        assert re.search(message.replace('?', r'\?'), said) and said.count('\n') <= 1
        assert not list(tmp_path.iterdir())


def test_flags_of_an_evaluation(capsys, tmp_path):
    for words, message in (
        (['caption', 'x', '--threshold', 'nan'], '--threshold: nan is not finite'),
        (['zeroshot', 'x', '--eps', 'inf'], '--eps: inf is not finite'),
        (['zeroshot', 'x', '--epz', '3'], 'unrecognized arguments: --epz 3; did you mean --eps?'),
        (['zeroshot', 'x', '--json', str(tmp_path)], 'no file that can be written into it'),
        (['caption', 'x', '--grid', 'g.png'], '--grid g.png: .*needs --targeted'),
    ):
        with pytest.raises(SystemExit):
            evaluation.parse(words)
        said = capsys.readouterr().err
        assert re.search(message.replace('?', r'\?'), said) and said.count('\n') == 1, said
    with pytest.raises(SystemExit):
        evaluation.parse(['zeroshot', '--help'])
    assert '(default: )' not in capsys.readouterr().out


def test_half_an_environment_of_torchrun():
    said = execute([sys.executable, str(SCRIPT)], fails=True, RANK='0')
    assert 'RANK is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT, WORLD_SIZE' in said
    assert 'Traceback' not in said


@pytest.mark.parametrize(
    'words',
    [
        ['zeroshot', '--attack', 'none'],
        ['zeroshot', '--attack', 'pgd'],
        ['retrieval', '--attack', 'none'],
        ['typographic'],
        ['audit'],
        ['show', '--image', '0.png', '--labels', 'a,b'],
    ],
)
def test_a_model_of_nan_is_not_measured(words, trained, pairs):
    """In either tower: it scored 0 % here, and 100 % recall there."""
    model, tokenizer = clip_adv.load_clip(trained)
    words = [str(pairs / word) if word == '0.png' else word for word in words]
    for weight in (model.visual.ln_post.weight, model.ln_final.weight):
        before = weight.data.clone()
        weight.data[0] = float('nan')
        clip_adv.save_clip(model, tokenizer, trained)
        data.write_settings(clip_adv.Config(out=str(trained)), 6)
        with pytest.raises(SystemExit, match='not finite'):
            evaluation.main(evaluation.parse([words[0], str(trained), *words[1:], '--quiet']))
        weight.data = before


def test_a_llava_of_nan_is_not_measured(whole, tmp_path):
    model, tokenizer = llava_adv.load_llava(str(whole))
    model.projector.linear_2.weight.data[0] = float('nan')
    llava_adv.save_llava(model, tokenizer, tmp_path, 512)
    with pytest.raises(SystemExit, match='not finite'):
        evaluation.main(evaluation.parse(['vqa', str(tmp_path), '--n', '2', '--attack', 'none', '--quiet']))
