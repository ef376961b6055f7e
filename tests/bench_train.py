"""Speed of the adversarial training step of stage 1, beside the same step written with open_clip:
`python tests/bench_train.py [TURNS]`

All train the same architecture (clip_adv.py's defaults) on the same images with the same attack. Each has a
process of its own, as a user would start it; they take turns of a few steps, and are judged by the ratio in
each turn: machines are noisy, ratios less so. First alone, then beside a process that keeps one core busy.

"open_clip" is what a user would write: its model, its ClipLoss, a PGD loop with torch.autograd.grad around
encode_image, text encoded once; threads and memory as torch has them. "PASSIVE" is the same with
OMP_WAIT_POLICY set. The others are our step without something: with the whole last blocks and all padding,
without data.keep_freed_memory, without an attack.
"""

import functools
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import attacks
import clip_adv
import data

EPS, ALPHA, K, STEPS = 8 / 255, 6 / 255, 2, 8
DEFAULT_THREADS = {'GOMP_SPINCOUNT': '300000'}  # libgomp's own, where data.py would set another
WAYS = {'ours': {}, 'open_clip': DEFAULT_THREADS, 'open_clip, PASSIVE': {'OMP_WAIT_POLICY': 'PASSIVE'}}
WAYS |= {'ours, all tokens': {}, 'ours, memory as it is': {}, 'ours, clean': {}}


def build():
    cfg = clip_adv.Config()
    tokenizer = data.train_tokenizer(['a red circle'], cfg.context, 400)
    model, _ = clip_adv.build(cfg, set(), data.Pairs([], ['a red circle'], 'shapes', ''), None)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(cfg.batch_size, 3, cfg.size, cfg.size, generator=g)
    return model, x, tokenizer(['a red circle'] * len(x))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def our_step(model, optimizer, x, tokens, k=K):
    text = model.encode_text(tokens)

    def loss_of(z):
        return clip_adv.info_nce(model(z), text.detach(), model.logit_scale.detach())

    x_adv = x
    if k:
        with clip_adv.frozen(model.visual):
            noise = [data.generator(0, 'start', i) for i in range(len(x))]
            x_adv = attacks.pgd(loss_of, x, EPS, ALPHA, k, attacks.random_start(x, EPS, noise))
            attacks.check(x, x_adv, EPS)
    clip_adv.info_nce(model(x_adv), text, model.logit_scale).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def open_clip_step(model, optimizer, x, tokens, mean, std):
    import open_clip

    loss = open_clip.ClipLoss()
    text = model.encode_text(tokens, normalize=True)
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(K):
        delta.requires_grad_()
        image = model.encode_image((x + delta - mean) / std, normalize=True)
        (gradient,) = torch.autograd.grad(loss(image, text.detach(), model.logit_scale.exp().detach()), delta)
        delta = (delta.detach() + ALPHA * gradient.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    image = model.encode_image((x + delta - mean) / std, normalize=True)
    loss(image, text, model.logit_scale.exp()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def all_tokens(transformer, x, causal=False, at=None):
    """Transformer.forward as it was, all of the last block"""
    for block in transformer.resblocks:
        x = block(x, causal)
    return x if at is None else clip_adv.pick(x, at)


def work(way: str) -> None:
    """One turn, STEPS steps, for each line that it reads; writes the images/s."""
    model, x, tokens = build()
    optimizer = adamw(model)
    if way.startswith('open_clip'):
        from open_clip.model import CLIP

        theirs = CLIP(**clip_adv.open_clip_config(model.cfg, model.preprocess)['model_cfg'])
        theirs.load_state_dict(model.state_dict())
        mean_std = model.visual.mean, model.visual.std
        step = functools.partial(open_clip_step, theirs, adamw(theirs), x, tokens, *mean_std)
    else:
        step = functools.partial(our_step, model, optimizer, x, tokens, 0 if 'clean' in way else K)
        if 'memory' not in way:
            data.keep_freed_memory()
        if 'all tokens' in way:
            clip_adv.Transformer.forward = all_tokens
    step(), step()
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        print(STEPS * len(x) / (time.perf_counter() - start), flush=True)


def take_turns(workers: dict, turns: int, busy: int) -> None:
    loops = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
    found = {way: [] for way in workers}
    try:
        for turn in range(turns + 1):  # the first one does not count
            for way, worker in workers.items():
                worker.stdin.write('\n')
                worker.stdin.flush()
                images_per_s = float(worker.stdout.readline())
                found[way] += [images_per_s] if turn else []
    finally:
        for loop in loops:
            loop.kill()
    print(f'beside {busy} busy processes; medians of {turns} turns (range; middle half)')
    for way, values in found.items():
        ratios = sorted(ours / value for ours, value in zip(found['ours'], values, strict=True))
        low, median, high = statistics.quantiles(ratios, n=4)
        spread = f'({ratios[0]:.2f} … {ratios[-1]:.2f}; {low:.2f} … {high:.2f})'
        speed = f'{way}: {statistics.median(values):.0f} images/s'
        print(f'  {speed}; ours / this: {median:.2f} {spread}', flush=True)
    slower = statistics.median(c / o for o, c in zip(found['ours'], found['ours, clean'], strict=True))
    passes = (2 * K + 3) / 3
    print(f'  an adversarial step takes {slower:.2f} clean ones, {slower / passes:.2f} × (2K + 3) / 3')


def main():
    print(f'$ python {shlex.join(sys.argv)}  # commit {data.commit()}')
    print(f'{os.cpu_count()} cores, torch {torch.__version__}; K = {K}', flush=True)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = {
        way: subprocess.Popen([sys.executable, __file__, way], env={**os.environ, **setting}, **pipes)
        for way, setting in WAYS.items()
    }
    for busy in (0, 1):
        take_turns(workers, int(sys.argv[1]) if sys.argv[1:] else 20, busy)


if __name__ == '__main__':
    work(sys.argv[1]) if sys.argv[1:2] and sys.argv[1] in WAYS else main()
