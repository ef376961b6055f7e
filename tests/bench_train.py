"""Speed of the adversarial training step of stage 1, beside the same step written with open_clip:
`python tests/bench_train.py`

Both train the same architecture (clip_adv.py's defaults) on the same images with the same attack, take turns
in one process, and are judged by the ratio in each turn: machines are noisy, ratios less so. "open_clip" is
what a user would write: its model, its ClipLoss, a PGD loop with torch.autograd.grad around encode_image,
text encoded once. A second line, from processes that take turns: glibc's allocator as it is, and as
data.keep_freed_memory sets it.
"""

import functools
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

EPS, ALPHA, K, STEPS, TURNS = 8 / 255, 6 / 255, 2, 12, 7


def build():
    cfg = clip_adv.Config()
    tokenizer = data.train_tokenizer(['a red circle'], cfg.context, 400)
    model, _ = clip_adv.build(cfg, set(), data.Pairs([], ['a red circle'], 'shapes', ''), None)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(cfg.batch_size, 3, cfg.size, cfg.size, generator=g)
    return model, x, tokenizer(['a red circle'] * len(x))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def our_step(model, optimizer, x, tokens):
    text = model.encode_text(tokens)

    def loss_of(z):
        return clip_adv.info_nce(model(z), text.detach(), model.logit_scale.detach())

    with clip_adv.frozen(model.visual):
        noise = [data.generator(0, 'start', i) for i in range(len(x))]
        x_adv = attacks.pgd(loss_of, x, EPS, ALPHA, K, attacks.random_start(x, EPS, noise))
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


def images_per_s(step, n):
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * n / (time.perf_counter() - start)


def main():
    from open_clip.model import CLIP

    print(f'$ python {shlex.join(sys.argv)}  # commit {data.commit()}', flush=True)
    model, x, tokens = build()
    theirs = CLIP(**clip_adv.open_clip_config(model.cfg, model.preprocess)['model_cfg'])
    theirs.load_state_dict(model.state_dict())
    optimizer, optimizer2 = adamw(model), adamw(theirs)
    ours = functools.partial(our_step, model, optimizer, x, tokens)
    mean_std = model.visual.mean, model.visual.std
    other = functools.partial(open_clip_step, theirs, optimizer2, x, tokens, *mean_std)
    data.keep_freed_memory()  # for both: what is compared here is the code
    ours(), other()
    rows = [(images_per_s(ours, len(x)), images_per_s(other, len(x))) for _ in range(TURNS)]
    report('ours', 'open_clip', rows)
    ways = ('kept', 'as it is')
    report('memory kept', 'as it is', [tuple(map(in_a_process, ways)) for _ in range(TURNS)])


def in_a_process(how: str) -> float:
    command = [sys.executable, __file__, how]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alone(how: str) -> None:
    if how == 'kept':
        data.keep_freed_memory()
    model, x, tokens = build()
    step = functools.partial(our_step, model, adamw(model), x, tokens)
    step(), step()
    print(images_per_s(step, len(x)))


def report(a, b, rows):
    ratios = sorted(one / other for one, other in rows)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(
        f'{a}: {medians[0]:.0f} images/s, {b}: {medians[1]:.0f} images/s; '
        f'ratio, median of {len(rows)} turns: '
        f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f}); '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}',
        flush=True,
    )


if __name__ == '__main__':
    alone(sys.argv[1]) if sys.argv[1:] else main()
