"""Speed and memory of the adversarial step of stage 2, beside a loop around transformers:
`python tests/bench_llava.py`

Both train the whole LLM, the projector and the tower of one LLaVA with the same weights, on the same batch
(easy-VQA's conversations of three questions, prompt v1) with the same attack, and take turns in one process;
they are judged by the ratio in each turn. "transformers" is what a user would write:
LlavaForConditionalGeneration with labels, a PGD loop with torch.autograd.grad around it. Peak memory is that
of a process which does nothing else. Sizes: `tiny` (llava_adv.py's default) and `smollm2` (a random LLM with
SmolLM2-135M's shape).
"""

import functools
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import attacks
import clip_adv
import data
import llava_adv

EPS, ALPHA, K = 8 / 255, 6 / 255, 2
TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, vocab_size=448)
TINY |= dict(num_attention_heads=4, num_key_value_heads=4)
SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49216)
SMOLLM2 |= dict(num_attention_heads=9, num_key_value_heads=3, rope_theta=100000.0)
SIZES = {'tiny': dict(batch=32, steps=4, turns=7, llm=TINY)}
SIZES['smollm2'] = dict(batch=4, steps=1, turns=5, llm=SMOLLM2)


def build(size, folder):
    """A LLaVA with random weights, written as a directory that both open; the batch."""
    how = SIZES[size]
    chats = data.load_chats('easyvqa', 'val', turns=3).chats
    said = [text for c in chats for turn in c.turns for text in turn]
    tokenizer = data.train_llm_tokenizer([*said, data.V1_SYSTEM], 440)
    clip, _ = clip_adv.build(clip_adv.Config(), set(), data.Pairs([], ['a red circle'], 'shapes', ''), None)
    with clip_adv.seeded(0):
        common = dict(model_type='llama', tie_word_embeddings=True, max_position_embeddings=2048)
        llm = llava_adv.Llama(dict(rms_norm_eps=1e-5, **common, **how['llm']))
        for p in llm.parameters():
            if p.ndim > 1:
                p.data *= 0.02 / p.std().item()
        model = llava_adv.LLaVA(clip.visual, clip.cfg, clip.preprocess, llm, tokenizer.image)
    if folder:
        llava_adv.save_llava(model, tokenizer, folder, 2048)
    llava_adv.trainable(model, llava_adv.Config(lora_r=0), 'B')
    prompt = data.Prompt(tokenizer, 'v1', model.image_tokens, 2048)
    chosen = [c for c in chats if len(c.turns) == 3][: how['batch']]
    samples = [data.Sample(model.fit(data.read_image(c.image)), *prompt(c), i) for i, c in enumerate(chosen)]
    return model, samples, tokenizer.pad


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def our_step(model, optimizer, samples, pad):
    batch = data.collate(samples, pad)
    x = batch.images.float() / 255
    with clip_adv.frozen(model):
        noise = [data.generator(0, 'start', s.number) for s in samples]
        start = attacks.random_start(x, EPS, noise)
        x_adv = attacks.pgd(lambda z: model(z, batch).sum(), x, EPS, ALPHA, K, start)
        attacks.check(x, x_adv, EPS)
    (model(x_adv, batch, batch.keys).sum() / len(batch.targets)).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def their_step(model, optimizer, samples, pad, mean, std):
    batch = data.collate(samples, pad)
    x, labels = batch.images.float() / 255, torch.full_like(batch.ids, -100)
    labels[batch.rows, batch.columns + 1] = batch.targets
    inputs = dict(input_ids=batch.ids, attention_mask=(batch.ids != pad).long(), labels=labels)

    def loss_of(z):
        return model(pixel_values=(z - mean) / std, **inputs).loss

    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(K):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(x + delta), delta)
        delta = (delta.detach() + ALPHA * gradient.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    loss_of(x + delta).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def theirs(folder):
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    return LlavaForConditionalGeneration.from_pretrained(folder)


def seconds(step, n):
    start = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - start) / n


def peak_mb(size, whose):
    command = [sys.executable, __file__, size, whose]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def turns(size):
    """[(our seconds, theirs)] of a step, and the length of the first sample."""
    with tempfile.TemporaryDirectory() as folder:
        model, samples, pad = build(size, Path(folder))
        other = theirs(folder)
    a, b = adamw(model), adamw(other)
    ours = functools.partial(our_step, model, a, samples, pad)
    hf = functools.partial(their_step, other, b, samples, pad, model.visual.mean, model.visual.std)
    ours(), hf()
    n = SIZES[size]['steps']
    return [(seconds(ours, n), seconds(hf, n)) for _ in range(SIZES[size]['turns'])], len(samples[0].ids)


def main(sizes):
    print(f'$ python {shlex.join(sys.argv)}  # commit {data.commit()}', flush=True)
    data.keep_freed_memory()  # for both: what is compared here is the code
    for size in sizes:
        rows, length = turns(size)
        ratios = sorted(theirs / mine for mine, theirs in rows)
        mine, other = (statistics.median(column) for column in zip(*rows, strict=True))
        memory = [peak_mb(size, whose) for whose in ('ours', 'theirs')]
        print(
            f'{size}: batch {SIZES[size]["batch"]}, {length} tokens, K = {K}; '
            f'ours {mine:.3f} s, transformers {other:.3f} s a step; ratio, median of {len(rows)} turns: '
            f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f}); '
            f'peak memory {memory[0]:.0f} and {memory[1]:.0f} MB; '
            f'{torch.get_num_threads()} threads, torch {torch.__version__}',
            flush=True,
        )


if __name__ == '__main__':
    if len(sys.argv) == 3:  # in a process of its own: what it takes at most
        size, whose = sys.argv[1:]
        with tempfile.TemporaryDirectory() as folder:
            model, samples, pad = build(size, Path(folder))
            mean, std = model.visual.mean, model.visual.std
            if whose == 'theirs':
                del model
                model = theirs(folder)
        optimizer = adamw(model)
        for _ in range(2):
            if whose == 'ours':
                our_step(model, optimizer, samples, pad)
            else:
                their_step(model, optimizer, samples, pad, mean, std)
        # not getrusage: that is handed down by the process that started this one
        status = Path('/proc/self/status').read_text().splitlines()
        print(next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) / 1024)
    else:
        main(sys.argv[1:] or SIZES)
