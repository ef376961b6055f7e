"""Real processes, hurt: killed in a step and in a checkpoint, stopped, restarted, on a full disk, on two
hosts. After each the run goes on to the weights of one that nothing happened to, bit for bit."""

import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, environment, execute, flags, torchrun

import data

SETTINGS = dict(TINY, steps=12, save_every=3, log_every=1)

# clip_adv.py with steps of 0.1 s. HURT='RANK WHAT NUMBER': what happens to that rank where torchrun has not
# restarted it yet: a signal in its update NUMBER, or death in its checkpoint NUMBER, of which each is
# half written ('saving'), beside the one before ('renaming'), renamed in two steps ('between').
DRIVER = '''
import os, signal, time
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
import clip_adv, data

rank, what, number = os.environ.get('HURT', 'nobody nothing 0').split()
mine = [rank, '0'] == [os.environ.get('RANK', '0'), os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')]
count = dict.fromkeys(('SIG', 'all', 'saving', 'renaming', 'between'), 0)
save, replace = torch.save, os.replace

def reached(place):
    count[place] += 1
    return mine and what.startswith(place) and count[place] == int(number)

def in_step(*_):
    time.sleep(0.1)
    if reached('SIG'):
        os.kill(os.getpid(), signal.Signals[what])
    if reached('all'):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGTERM)

def half(state, path):
    save(state, path)
    if reached('saving'):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def dying(source, target):
    """previous_train_state.pt is not there before the second checkpoint."""
    places = {'previous_train_state.pt': 'renaming', 'train_state.pt': 'between'}
    name = os.path.basename(target)
    if name in places and reached(places[name]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

register_optimizer_step_pre_hook(in_step)
torch.save, os.replace = half, dying
clip_adv.main(*data.parse(clip_adv.Config, ''))
'''


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    file = tmp_path_factory.mktemp('driver') / 'driver.py'
    file.write_text(DRIVER)
    return file


@pytest.fixture(scope='module')
def whole(driver, tmp_path_factory):
    """{processes: weights and moments of a run that nothing happened to}"""
    found = {}
    for n in (1, 2):
        out = tmp_path_factory.mktemp('whole') / 'run'
        execute(launch(n, driver, out, **SETTINGS))
        found[n] = state(out)
    assert any(not torch.equal(w, found[2]['model'][name]) for name, w in found[1]['model'].items())
    return found


def launch(processes, driver, out, *before, **settings):
    """One process: python's.   before: flags of torchrun"""
    words = [str(driver), *flags(**settings, out=out)]
    command = torchrun(processes, *words)
    return [sys.executable, *words] if processes == 1 else [*command[:3], *before, *command[3:]]


def state(out):
    return torch.load(out / 'train_state.pt', weights_only=True)


def assert_goes_on_to(whole, driver, out, processes):
    """With --resume, on as many processes."""
    execute(launch(processes, driver, out, resume=True))
    assert_same(state(out), whole[processes])


def assert_same(a, b):
    assert a['step'] == b['step'] == SETTINGS['steps']
    for name, w in a['model'].items():
        assert torch.equal(w, b['model'][name]), name
    for i, moments in a['optimizer']['state'].items():
        for name, value in moments.items():
            assert torch.equal(value, b['optimizer']['state'][i][name]), (i, name)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    assert condition()


def hurt(command, what='', at=None, group=False):
    """(exit status, what it printed) of a command to which happens what (see DRIVER); or that is sent a
    signal, at a time that is known by a file.   group: the whole process group gets it, as by Ctrl-C"""
    how = dict(env=environment(**({'HURT': what} if what else {})), start_new_session=True)
    with subprocess.Popen(command, stdout=-1, stderr=-2, text=True, **how) as process:
        if at:
            number, file = at
            wait_for(file.exists)
            (os.killpg if group else os.kill)(process.pid, number)
        said = process.communicate(timeout=240)[0]
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(
    'processes, what, step',
    [(2, 'SIGKILL 8', 6), (1, 'SIGKILL 8', 6), (1, 'saving 3', 6), (1, 'renaming 2', 6), (1, 'between 3', 6)],
)
def test_killed(whole, driver, tmp_path, processes, what, step):
    """Rank 0, which writes."""
    out = tmp_path / 'run'
    code, said = hurt(launch(processes, driver, out, **SETTINGS), f'0 {what}')
    assert code != 0, said
    data.lock(out)  # nobody is left
    data.lock.cache_clear()
    assert data.load_state(out)['step'] == step
    assert_goes_on_to(whole, driver, out, processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, whom, workers',
    [
        (signal.SIGTERM, 'rank 1', 0),
        (signal.SIGTERM, 'torchrun', 1),
        (signal.SIGTERM, 'all', 1),  # as of Slurm; torchrun then sends it to its ranks once more
        (signal.SIGINT, 'group', 1),  # Ctrl-C
    ],
)
def test_stopped(whole, driver, tmp_path, number, whom, workers):
    """At the same update on both, which is saved: nothing is lost. With --workers their processes, which
    torchrun sends the signal to as well, leave it to their rank."""
    out, what, at = tmp_path / 'run', '', None
    if whom in ('rank 1', 'all'):
        what = f'1 {number.name if whom == "rank 1" else whom} 7'
    else:
        at = number, out / 'train_state.pt'
    command = launch(2, driver, out, **SETTINGS, workers=workers)
    code, said = hurt(command, what, at, group=whom == 'group')
    print(said)
    saved = re.search(rf'{number.name}: saved after update (\d+) of 12', said)
    assert saved and 'Traceback' not in said and 'Error' not in said, said
    assert code == -signal.SIGUSR1  # not 0: what started it sees that it is not finished
    assert state(out)['step'] == int(saved[1]) and (at or saved[1] == '7')
    assert_goes_on_to(whole, driver, out, 2)


@pytest.mark.slow
def test_restarted(whole, driver, tmp_path):
    """By torchrun, within one command; its length is given as --samples."""
    out, settings = tmp_path / 'run', SETTINGS | {'samples': SETTINGS['steps'] * SETTINGS['batch_size']}
    del settings['steps']
    code, said = hurt(launch(2, driver, out, '--max-restarts=2', **settings), '1 SIGKILL 8')
    assert code == 0 and 'continuing after update 6' in said and 'done: 12 updates' in said, said
    assert_same(state(out), whole[2])


@pytest.mark.slow
def test_full_disk(whole, driver, tmp_path):
    """Rank 0 cannot write (a limit of the files' size stands in for the disk), and rank 1 does not wait."""
    out = tmp_path / 'run'
    hurt(launch(2, driver, out, **SETTINGS), '1 SIGTERM 7')
    size = (out / 'train_state.pt').stat().st_size // 2
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    command, start = launch(2, driver, out, resume=True), time.time()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, **limit)
    assert done.returncode == 1 and 'error: cannot write' in done.stderr, done.stderr
    assert state(out)['step'] == 7 and not list(out.glob('*.tmp')) and time.time() - start < 120
    assert_goes_on_to(whole, driver, out, 2)


@pytest.mark.slow
def test_two_hosts(whole, driver, tmp_path):
    """Two of torchrun on this one: the run of one torchrun with two processes; stopped on either, it is
    saved; and after a rank was killed it is restarted, as README has it."""
    out, ends = tmp_path / 'run', [0]
    for stopped in (0, 1, None):
        command = launch(2, driver, out, **({} if ends[-1] else SETTINGS), resume=True)
        port, words = command[command.index('--master_port') + 1], command[command.index('--') :]
        endpoint = f'--rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-id=1'
        endpoint += ' --max-restarts=3'
        command = [*command[:3], '--nnodes=2', '--nproc_per_node=1', *endpoint.split(), *words]
        killed = {} if stopped is not None else {'HURT': '1 SIGKILL 2'}
        how = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1', **killed)
        how = dict(env=how, stdout=-1, stderr=-2, text=True)
        with subprocess.Popen(command, **how) as one, subprocess.Popen(command, **how) as other:
            if stopped is not None:
                wait_for(lambda: (out / 'train_state.pt').exists() and state(out)['step'] > ends[-1])
                (one, other)[stopped].terminate()
            said = ''.join(agent.communicate(timeout=240)[0] for agent in (one, other))
        ends.append(state(out)['step'])
        if stopped is not None:
            assert f'SIGTERM: saved after update {ends[-1]} of 12' in said and 'Traceback' not in said, said
            assert ends[-1] < 12 and one.returncode and other.returncode
    assert one.returncode == other.returncode == 0 and said.count('continuing after update') > 1, said
    assert_same(state(out), whole[2])


def test_workers_do_not_keep_a_failed_rank():
    """Which the others would wait for."""
    code = 'import sys, data\nbatches = [[i] for i in range(9)]\n'
    code += 'sys.kept = iter(data.loader(range(9), batches, workers=1, collate=list))\n'
    command = [sys.executable, '-c', f'{code}next(sys.kept)\nraise ValueError("of this rank")']
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'of this rank' in done.stderr
