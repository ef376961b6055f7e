"""Speed of the adversarial training step of stage 1, beside the same step written with open_clip: `python tests/bench_train.py`

Both train the same architecture (clip_adv.py's defaults) on the same images with the same attack, take turns in one
process, and are judged by the ratio in each turn: machines are noisy, ratios less so. "open_clip" is what a user would
write: its model, its ClipLoss, a PGD loop with torch.autograd.grad around encode_image, text encoded once.
A second table, from processes that take turns: glibc's allocator as it is, and as keep_freed_memory sets it.
"""
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
    loss_of = lambda z: clip_adv.info_nce(model(z), text.detach(), model.logit_scale.detach())
    with clip_adv.frozen(model.visual):
        noise = [data.generator(0, 'start', i) for i in range(len(x))]
        x_adv = attacks.pgd(loss_of, x, EPS, ALPHA, K, attacks.random_start(x, EPS, noise))
        attacks.check(x, x_adv, EPS)
    clip_adv.info_nce(model(x_adv), text, model.logit_scale).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
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
        gradient, = torch.autograd.grad(loss(image, text.detach(), model.logit_scale.exp().detach()), delta)
        delta = (delta.detach() + ALPHA * gradient.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    image = model.encode_image((x + delta - mean) / std, normalize=True)
    loss(image, text, model.logit_scale.exp()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    optimizer.step()
    optimizer.zero_grad()


def images_per_s(step, n):
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * n / (time.perf_counter() - start)


def main():
    from open_clip.model import CLIP
    model, x, tokens = build()
    theirs = CLIP(**model.model_cfg)
    theirs.load_state_dict(model.state_dict())
    optimizer, optimizer2 = adamw(model), adamw(theirs)
    ours = lambda: our_step(model, optimizer, x, tokens)
    other = lambda: open_clip_step(theirs, optimizer2, x, tokens, model.visual.mean, model.visual.std)
    clip_adv.keep_freed_memory()  # for both: what is compared here is the code
    ours(), other()
    rows = [(images_per_s(ours, len(x)), images_per_s(other, len(x))) for _ in range(TURNS)]
    report('ours', 'open_clip', rows)
    rows = [tuple(float(subprocess.run([sys.executable, __file__, how], capture_output=True, text=True, check=True).stdout)
                  for how in ('kept', 'as it is')) for _ in range(TURNS)]
    report('memory kept', 'glibc default', rows)


def report(a, b, rows):
    ratios = sorted(r[0] / r[1] for r in rows)
    print(f'{a}: {statistics.median(r[0] for r in rows):.0f} images/s, {b}: {statistics.median(r[1] for r in rows):.0f} images/s; '
          f'ratio, median of {len(rows)} turns: {statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f}); '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}', flush=True)


if __name__ == '__main__':
    if sys.argv[1:]:
        if sys.argv[1] == 'kept':
            clip_adv.keep_freed_memory()
        model, x, tokens = build()
        optimizer = adamw(model)
        step = lambda: our_step(model, optimizer, x, tokens)
        step(), step()
        print(images_per_s(step, len(x)))
    else:
        main()
