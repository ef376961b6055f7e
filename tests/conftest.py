"""Shared by the tests: small configurations, and running the scripts as a user does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# A model that takes milliseconds, attacked at full strength from the first step.
TINY = dict(
    size=16,
    patch=4,
    width=32,
    layers=2,
    head_width=16,
    embed_dim=16,
    text_width=16,
    text_layers=1,
    text_heads=2,
    batch_size=8,
    steps=6,
    warmup=0.33,
    log_every=2,
    save_every=2,
    eps=8.0,
    k=2,
    eps_from=0.0,
    eps_to=0.0,
    k_from=0.0,
)


def flags(**settings) -> list[str]:
    return [
        word
        for name, value in settings.items()
        for word in (
            [f'--{name}']
            if value is True
            else [f'--no-{name}'] if value is False else [f'--{name}', str(value)]
        )
    ]


def environment(**extra) -> dict:
    """One thread, so that sums are in one order; no distributed settings of a surrounding run."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_RESTART_COUNT')
    }
    return {**clean, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT), **extra}


def torchrun(processes: int, script: Path, *arguments: str) -> list[str]:
    with socket.socket() as s:  # a free port, so that tests beside each other do not meet
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nproc_per_node',
        str(processes),
        '--master_addr',
        '127.0.0.1',
        '--master_port',
        str(port),
        '--',
        str(script),
        *arguments,
    ]  # --: or torchrun takes --n for one of its own


def execute(command: list[str], fails: bool = False, **extra) -> str:
    """Runs a command and returns what it printed; the test fails if the exit code is not as expected."""
    done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=540)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def global_generator_untouched():
    """Nothing in this project draws from torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), 'the global random state was touched'


@pytest.fixture(scope='session')
def parts(tmp_path_factory):
    """Settings of a run of stage 2 that takes seconds: a CLIP and a language model, both with next to nothing
    learned."""
    import clip_adv
    import data
    import llava_adv

    root = tmp_path_factory.mktemp('parts')
    clip_adv.main(
        *data.parse(clip_adv.Config, '', flags(**dict(TINY, steps=1, lr=7.5e-4), out=root / 'clip'))
    )
    tok = data.train_llm_tokenizer(['what color is the circle?', 'a red circle', 'USER: ASSISTANT:'], 300)
    config = dict(
        model_type='llama',
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    with clip_adv.seeded(1):
        llm = llava_adv.Llama(config)
    (root / 'llm').mkdir()
    data.save_directory(root / 'llm', config, dict(llm.state_dict()), tok.files(512))
    for name, captions in (
        ('a', True),
        ('b', False),
    ):  # some of easy-VQA's, in a file: reading all of them takes longer than the training
        chats = data.load_chats('easyvqa', 'val', captions=captions, turns=3).chats[:40]
        rows = [
            {
                'image': str(c.image),
                'conversations': [
                    {'from': role, 'value': text}
                    for turn in c.turns
                    for role, text in zip(('human', 'gpt'), turn)
                ],
            }
            for c in chats
        ]
        (root / f'{name}.json').write_text(json.dumps(rows))
    return dict(
        init=root / 'clip',
        llm=root / 'llm',
        data_a=root / 'a.json',
        data=root / 'b.json',
        steps_a=2,
        steps_b=4,
        batch_a=4,
        batch_size=6,
        log_every=1,
        save_every=2,
        lora_r=4,
    )


@pytest.fixture(scope='session')
def whole(parts, tmp_path_factory):
    """A run of stage 2 that nothing happened to."""
    import data
    import llava_adv

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('whole') / 'run'
    llava_adv.main(*data.parse(llava_adv.Config, '', flags(**parts, out=out)))
    return out
