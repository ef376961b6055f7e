"""Stage 2 of Double Visual Defense (arXiv 2501.09446): Δ²LLaVA, adversarial visual instruction tuning.

    min over θ   E over (x, q, a)   max over ‖δ‖∞ ≤ ε, 0 ≤ x+δ ≤ 1   of   − Σ log p( a | x+δ, q )

    torchrun llava_adv.py                                  # Δ²LLaVA on easy-VQA: runs/clip_adv, a tiny LLM
    torchrun llava_adv.py --eps 0 --out runs/llava_single  # single defence: ΔCLIP, clean tuning
    torchrun llava_adv.py --init runs/clip --out runs/llava_tuned    # vanilla CLIP, adversarial tuning
    torchrun llava_adv.py --init runs/clip --eps 0 --out runs/llava  # vanilla LLaVA
    python llava_adv.py --init runs/llava_adv --chat cat.jpg         # ask it
    python eval.py vqa runs/llava runs/llava_adv                     # all under attack

The paper's recipe for Vicuna-7B v1.5 in two runs, the projector, then everything (LLaVA 1.5's data, 8 GPUs):

    torchrun --nproc_per_node 8 llava_adv.py --init CLIP --llm VICUNA --eps 4 --alpha 3 --k 3 --steps_a -1 \\
        --data_a blip_laion_cc_sbu_558k.json --image_root_a DIR --batch_a 256 --lr_a 1e-3 --steps_b 0 \\
        --micro_batch 16 --checkpoint --out runs/projector
    torchrun --nproc_per_node 8 llava_adv.py --init runs/projector --eps 4 --alpha 3 --k 3 --steps_a 0 \\
        --steps_b -1 --data llava_v1_5_mix665k.json --image_root DIR --batch_size 128 --lora_r 128 \\
        --lora_alpha 256 --lr 2e-4 --lr_projector 2e-5 --lr_tower 1e-6 --micro_batch 8 --checkpoint \\
        --out runs/llava_adv_7b

The file reads top to bottom: configuration, model, main; the tiny language model and files come last.
Pixels are float32 in [0, 1] everywhere outside the image tower, ε and α in 1/255 on the command line only.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
import shlex
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import data  # before torch: it says how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import attacks
import clip_adv


@dataclass
class Config:
    out: str = 'runs/llava_adv'  # run directory: checkpoints, log, and at the end a LLaVA of Hugging Face's
    data: str = 'easyvqa'  # conversations for sub-stage B: 'easyvqa', or FILE.json in LLaVA's format
    image_root: str = ''  # folder that the images of FILE.json lie in
    data_a: str = ''  # image-caption conversations for sub-stage A; default: as --data
    image_root_a: str = ''  # folder of its images; default: as --image_root
    turns: int = 3  # easyvqa: questions to a conversation
    workers: int = 0  # image-decoding processes per rank; 0: none of its own
    init: str = 'runs/clip_adv'  # a CLIP, or a LLaVA (tower, projector, LLM): a directory or repository id
    llm: str = 'tiny'  # 'tiny' (trained here, on the text), a directory, or a repository id of Hugging Face
    prompt: Literal['', 'v1', 'chat'] = ''  # of B: Vicuna's, or the LLM's own; default: --init's, else chat
    max_length: int = 2048  # tokens of a sample, image tokens included; longer ones are cut
    max_bad: float = 0.01  # fraction of the samples that may be left out, as unfit to learn from
    resume: bool = False  # continue the run in --out; start it where there is none
    seed: int = 0  # of order, augmentation, δ₀, adapters, dropout and the tiny LLM
    chat: str = ''  # FILE of an image: ask the LLaVA in --init about it, instead of training
    # attack
    eps: float = 12.0  # radius ε of the l∞ ball, in 1/255; 0 tunes on clean images
    alpha: float | None = None  # step size α, in 1/255; default 0.75 ε (the paper's 3 for ε = 4)
    k: int = 2  # PGD steps K
    # sub-stage A: the projector alone, on captions
    steps_a: int = 300  # updates; 0: leave A out; -1: one epoch
    batch_a: int = 32  # global: of all processes together
    lr_a: float = 3e-3  # peak learning rate
    # sub-stage B: LLM, projector and image tower, on conversations
    steps_b: int = 500  # updates; 0: leave B out; -1: one epoch
    batch_size: int = 32  # global: of all processes together
    lr: float = 2e-3  # of the LLM (its adapters)
    lr_projector: float = 1e-3  # of the projector
    lr_tower: float = 3e-4  # of the image tower
    lora_r: int = 16  # rank of the adapters on the LLM's linear layers but its head; 0: train the LLM itself
    lora_alpha: float = 32.0  # they are scaled by alpha / r
    lora_dropout: float = 0.05  # of their inputs, in updates only
    # both
    warmup: float = 0.03  # fraction of each sub-stage; cosine to 0 after it
    wd: float = 0.0  # weight decay
    grad_clip: float = 1.0  # limit of the gradient's l2 norm
    # running
    micro_batch: int = 0  # samples at a time on each process, accumulated to the batch; 0: all at once
    checkpoint: bool = False  # recompute activations in the backward pass: less memory, a third more time
    dtype: Literal['', 'float32', 'bfloat16'] = ''  # of the LLM; default: bfloat16 on CUDA with adapters
    log_every: int = 25  # steps between lines of log.jsonl
    save_every: int = 200  # steps between checkpoints
    plan: str = field(default='', metadata={'nargs': '?'})  # only say what this costs, or all of FILE.sh
    gpu: str = 'h100'  # that --plan reckons with, …
    mfu: float = 0.4  # … and the fraction of its peak that is reached


# ========================================================================================= the language model
# A Llama. Parameter names are Hugging Face's, with `model.` and `lm_head.` before them as in its files.
class Linear(nn.Linear):
    """A linear layer that can carry an adapter: W x + α/r · B A dropout(x).   LoRA, arXiv 2106.09685"""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        self.register_parameter('lora_A', None)
        self.register_parameter('lora_B', None)

    def add_adapter(self, r: int, alpha: float, dropout: float, salt: int, generator) -> None:
        """salt: a number of this layer's own, for its dropout. B is 0 at first: it computes what it did."""
        bound = self.in_features**-0.5
        a = (2 * torch.rand(r, self.in_features, generator=generator) - 1) * bound
        self.lora_A = nn.Parameter(a.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.weight.device))
        self.scale, self.dropout, self.salt = alpha / r, dropout, salt

    def forward(self, x: Tensor, keys: Tensor | None = None, start: int = 0) -> Tensor:
        """x: [B, T, in].  keys: [B], what dropout is drawn from; None: none.  start: of x in the sequence"""
        y = F.linear(x, self.weight, self.bias)
        if self.lora_A is None:
            return y
        if keys is not None and self.dropout:
            x = drop(x, keys + self.salt, start, self.dropout)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged(self) -> Tensor:
        """The weight with the adapter in it, in the weight's dtype."""
        if self.lora_A is None:
            return self.weight
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)


def drop(x: Tensor, keys: Tensor, start: int, p: float) -> Tensor:
    """Dropout as a function of (key of the sample, token, channel): the same in any batch, rank, device.

    x: [B, T, C].  keys: int32 [B].  A hash of 32 bits (xor, shift, multiply, twice) for a generator."""
    tokens = torch.arange(start, start + x.shape[1], dtype=torch.int32, device=x.device)
    channels = torch.arange(x.shape[2], dtype=torch.int32, device=x.device) * -1640531527  # 2³²/golden ratio
    h = mix(mix(keys)[:, None] + tokens)[:, :, None] + channels
    return x * (mix(h) >= int((p - 0.5) * 2**32)) / (1 - p)


def mix(h: Tensor) -> Tensor:
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
    h = (h ^ (h >> 15 & 0x1FFFF)) * -2073254261
    return h ^ (h >> 16 & 0xFFFF)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        z = x.float()
        return self.weight * (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg: 'LlamaCfg', layer: int):
        super().__init__()
        width, self.head, self.layer = cfg.hidden_size, cfg.head_dim, layer
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.groups = heads // kv_heads  # queries that share a key
        bias = cfg.attention_bias or cfg.model_type == 'qwen2'  # which has none on o
        self.q_proj = Linear(width, heads * self.head, bias)
        self.k_proj = Linear(width, kv_heads * self.head, bias)
        self.v_proj = Linear(width, kv_heads * self.head, bias)
        self.o_proj = Linear(heads * self.head, width, bias=cfg.attention_bias and cfg.model_type == 'llama')

    def forward(self, x: Tensor, rope, start: int, cache: 'Cache | None', keys: Tensor | None) -> Tensor:
        """[B, T, W] → [B, T − start, W]"""
        q = self.q_proj(x[:, start:], keys, start).unflatten(-1, (-1, self.head))  # [B, T − start, heads, d]
        k, v = (proj(x, keys).unflatten(-1, (-1, self.head)) for proj in (self.k_proj, self.v_proj))
        q, k, mask = rotate(q, rope, start), rotate(k, rope), None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        elif start:  # the queries are the last tokens
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=x.device).tril(start)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        many = self.groups > 1
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=many)
        return self.o_proj(x.transpose(1, 2).flatten(2), keys, start)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], start: int = 0) -> Tensor:
    """Rotary position embedding: pairs (i, i + d/2) of a head turn with the position.   [B, T, heads, d]"""
    cos, sin = (table[..., start:, None, :] for table in rope)  # [(B,) T, 1, d]
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: 'LlamaCfg'):
        super().__init__()
        width, hidden, bias = cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, keys: Tensor | None, start: int) -> Tensor:
        gate, up = self.gate_proj(x, keys, start), self.up_proj(x, keys, start)
        return self.down_proj(F.silu(gate) * up, keys, start)


class Layer(nn.Module):
    def __init__(self, cfg: 'LlamaCfg', layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, rope, start: int = 0, cache=None, keys: Tensor | None = None) -> Tensor:
        x = x[:, start:] + self.self_attn(self.input_layernorm(x), rope, start, cache, keys)
        return x + self.mlp(self.post_attention_layernorm(x), keys, start)


class Llama(nn.Module):
    """config: a Hugging Face configuration of a Llama or Qwen2."""

    def __init__(self, config: dict, where: str = 'config.json'):
        super().__init__()
        self.config, self.cfg = config, llama_cfg(config, where)
        width, vocab = self.cfg.hidden_size, self.cfg.vocab_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab, width)
        self.model.layers = nn.ModuleList(Layer(self.cfg, i) for i in range(self.cfg.num_hidden_layers))
        self.model.norm = RMSNorm(width, self.cfg.rms_norm_eps)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.tie()
        self.checkpointing = False

    def tie(self) -> None:
        if self.cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, x: Tensor, start=0, cache: 'Cache | None' = None, keys: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, W] → what the head reads, [B, T − start, W].

        start: the first token that is asked for; the last layer computes no more than that. Sequences are
        padded on the right, where the causal mask keeps the padding from being seen.  keys: for dropout."""
        rope = self.rope(torch.arange(x.shape[1], device=x.device) if cache is None else cache.positions)
        *first, last = self.model.layers
        for layer in first:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, cache=cache, keys=keys, use_reentrant=False)
            else:
                x = layer(x, rope, cache=cache, keys=keys)
        return self.model.norm(last(x, rope, start, cache, keys))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the angles, float32 [..., T, d]"""
        angles = positions[..., None].float() * frequencies(self.cfg).to(positions.device)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def frequencies(cfg: 'LlamaCfg') -> Tensor:
    """Angle per position of each pair: θ^(−2i/d); Llama 3's scaling stretches slow ones to the context."""
    base = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device='cpu').float() / cfg.head_dim)
    scaling = cfg.rope_scaling
    if not scaling:
        return base
    if scaling['rope_type'] == 'linear':
        return base / scaling['factor']
    turns = scaling['original_max_position_embeddings'] * base / (2 * math.pi)  # in the original context
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, left alone; 0: a slow one
    return kept * base + (1 - kept) * base / scaling['factor']


class Cache:
    """Keys and values of the tokens so far, for generation.   positions: int64 [B, T] of the next tokens"""

    def __init__(self, llm: Llama, length: int, positions: Tensor, like: Tensor):
        batch, self.positions = len(positions), positions
        shape = (batch, length, llm.cfg.num_key_value_heads, llm.cfg.head_dim)
        self.k, self.v = ([like.new_zeros(shape) for _ in llm.model.layers] for _ in range(2))
        self.rows = torch.arange(batch, device=like.device)[:, None]
        self.all = torch.arange(length, device=like.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v: [B, T, heads, d] → (all keys, all values, mask [B, 1, T, L]: of itself and what is before)"""
        self.k[layer][self.rows, self.positions], self.v[layer][self.rows, self.positions] = k, v
        return self.k[layer], self.v[layer], (self.all <= self.positions[:, :, None])[:, None]


# ====================================================================================================== LLaVA
class LLaVA(nn.Module):
    """Image tower → projector → among the LLM's tokens, in place of <image>.   Liu et al., arXiv 2310.03744

    clip_cfg, preprocess: what made the ViT.  style: of the prompt, see data.Prompt; '' if not known.
    pad: whether images are padded to a square (with the mean colour) or cropped."""

    def __init__(self, visual, clip_cfg, preprocess, llm: Llama, image_id: int, style='', pad: bool = True):
        super().__init__()
        self.visual, self.clip_cfg, self.preprocess = visual, clip_cfg, preprocess
        self.llm, self.image_id, self.style, self.pad = llm, image_id, style, pad
        if hasattr(visual, 'proj'):
            del visual.proj  # into CLIP's shared space; of no use here
        width = llm.cfg.hidden_size
        linear_1, linear_2 = nn.Linear(visual.class_embedding.shape[0], width), nn.Linear(width, width)
        self.projector = nn.ModuleDict({'linear_1': linear_1, 'linear_2': linear_2})

    @property
    def image_tokens(self) -> int:
        return (self.visual.size // self.visual.patch) ** 2

    @property
    def fit(self) -> data.Fit:
        how = self.preprocess
        return data.Fit(self.visual.size, how.interpolation, how.resize_mode, how.mean if self.pad else None)

    def embed(self, images: Tensor, ids: Tensor) -> Tensor:
        """images float32 [m, 3, S, S] in [0, 1], ids [B, T], image_tokens × image_id for each → [B, T, W]"""
        x = self.llm.model.embed_tokens(ids)
        if len(images):
            z = self.visual.embed(images)
            for block in self.visual.transformer.resblocks[:-1]:  # of block N−1, and so block N is never run
                z = block(z, causal=False)
            z = F.gelu(self.projector.linear_1(z[:, 1:]))  # the patches, no class token; no final LayerNorm
            z = self.projector.linear_2(z).flatten(0, 1)
            x = x.index_put(torch.where(ids == self.image_id), z.to(x.dtype))
        return x

    def logits(self, images: Tensor, batch: data.Batch, keys: Tensor | None = None) -> Tensor:
        """float32 [n, vocabulary], at the n supervised tokens; the head is the largest matrix and computed
        nowhere else.   keys: batch.keys in an update, for the adapters' dropout"""
        x = self.llm(self.embed(images, batch.ids), batch.start, keys=keys)
        return self.llm.lm_head(x[batch.rows, batch.columns - batch.start]).float()

    def forward(self, images: Tensor, batch: data.Batch, keys: Tensor | None = None) -> Tensor:
        """→ float32 [b], each sample's sum of token cross-entropies"""
        loss = F.cross_entropy(self.logits(images, batch, keys), batch.targets, reduction='none')
        if not len(images):  # projector and tower still take part, as DDP waits for their gradients
            loss = loss + 0 * sum(p.flatten()[0] for p in self.parameters() if p.requires_grad)
        return loss.new_zeros(len(batch.ids)).index_add(0, batch.rows, loss)


@torch.no_grad()
def generate(model: LLaVA, images: Tensor, prompts: list[list[int]], max_new: int, ends) -> list[list[int]]:
    """Greedy answers, as token ids without the end.

    images: float32 [m, 3, S, S] in [0, 1], of the prompts that have one.  ends: ids that end an answer."""
    llm, lengths = model.llm, [len(p) for p in prompts]
    device, longest = llm.lm_head.weight.device, max(lengths)
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    x, length = model.embed(images, ids), torch.tensor(lengths, device=device)
    cache = Cache(llm, longest + max_new, torch.arange(longest, device=device).expand(len(prompts), -1), x)
    # the padding's keys and values lie behind the prompt's end, unseen until an answer takes their place
    logits = llm.lm_head(llm(x, cache=cache)[torch.arange(len(prompts)), length - 1]).float()
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(max_new):
        if not logits.isfinite().all():
            data.fail('what the LLaVA computes is not finite (NaN or infinite): its answers mean nothing')
        tokens = logits.argmax(1).tolist()
        going -= {row for row in going if tokens[row] in ends}
        for row in going:
            answers[row].append(tokens[row])
        if not going or step + 1 == max_new:
            break
        cache.positions = (length + step)[:, None]
        x = llm.model.embed_tokens(torch.tensor(tokens, device=device))[:, None]
        logits = llm.lm_head(llm(x, cache=cache)[:, 0]).float()
    return answers


# =============================================================================================== the training
def main(cfg: Config, given: set[str]) -> None:
    """Trains.   given: names of the settings that the user chose; data.parse makes both"""
    rank, world, device = data.start_processes(hours=2)  # rank 0 may have an LLM to train
    state, cfg = data.open_run(cfg, given)
    cfg.dtype = cfg.dtype or ('bfloat16' if device.type == 'cuda' and cfg.lora_r else 'float32')
    check_config(cfg, given, world)
    first_step = state['step'] if state else 0
    plan = sub_stages(cfg)
    model, tokenizer = build(cfg, state, rank)
    known_by = {'--llm': {'weights': fingerprint(model.llm)}}  # before any of it is trained
    plan = [check_samples(cfg, stage, model, tokenizer) for stage in plan]
    for sub, chats, *_ in plan:
        texts, images = zip(*((chat.turns, chat.image) for chat in chats.chats))
        known_by[f'sub-stage {sub}'] = data.fingerprint(texts, images)
    data.check_resumed(state, known_by)
    last_step = sum(steps for *_, steps, _ in plan)
    model.to(device).eval()  # only the adapters know dropout, and they are told when
    model.llm.checkpointing = cfg.checkpoint
    wide = device.type == 'cuda' or cfg.dtype == 'bfloat16'
    amp = torch.autocast(device.type, torch.bfloat16, enabled=wide)

    wrong = clip_adv.not_in_hf(model.clip_cfg, model.preprocess)
    facts = arithmetic(cfg, plan, model, world)

    def export(step: int) -> None:
        """What can be derived from the last checkpoint: gigabytes, for a 7B model. First it is just tried."""
        if rank == 0 and step == 0:
            with tempfile.TemporaryDirectory(dir=run.out) as folder, contextlib.redirect_stdout(None):
                save_llava(model, tokenizer, Path(folder), cfg.max_length)
        if rank == 0 and step == last_step:
            save_llava(model, tokenizer, run.out, cfg.max_length)
            data.write_settings(cfg, step)
            what = f'A LLaVA from `{cfg.init}`'
            what += '' if is_llava(cfg.init) else f' and the language model `{cfg.llm}`'
            header = HUB_HEADER.partition('\n')[2] if wrong else HUB_HEADER  # without the library
            run.write_card(clip_adv.card(cfg, what, 2, header, facts, LOAD[bool(wrong) :]))

    run, end = None, 0
    for sub, chats, prompt, steps, batch_size in plan:
        begin, end = end, end + steps
        if first_step >= end and end < last_step:  # resumed in the other sub-stage
            continue
        # ------------------------------------------------------------------ what is trained, and on what
        model.pad = sub == 'B'
        groups = trainable(model, cfg, sub)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(groups, weight_decay=cfg.wd, betas=(0.9, 0.999), fused=True)
        if state and run is None:
            ours = {name: w for name, w in model.state_dict().items() if name in state['model']}
            data.check_weights(state['model'], ours, f'{cfg.out}/train_state.pt')
            model.load_state_dict(state['model'], strict=False)
            if first_step > begin:  # else it stopped between the sub-stages
                data.load_optimizer(optimizer, state)
        step_model = DDP(model) if world > 1 else model
        if run is None:
            run = data.Run(cfg, first_step, last_step, facts, device)
            export(first_step)
        done = max(first_step - begin, 0)
        order = data.order(len(chats), batch_size, range(done, steps), cfg.seed, rank, world)
        samples = data.ChatDataset(chats, prompt, model.fit, cfg.seed)
        loader = data.loader(samples, order, cfg.workers, collate=list)
        bar = run.bar(loader, f'llava_adv {sub}', done, steps)

        # ------------------------------------------------------------------------------- the training loop
        for step, samples in enumerate(run.read(bar), begin + done):
            logging = (step + 1 - begin) % cfg.log_every == 0 or step + 1 == end
            attack_ms = train_ms = 0.0
            run.lap_ms(logging)
            # The loss is that of the whole update: a sum over tokens, by their number in the global batch. A
            # mean of means would weigh a token by how many others its rank or micro-batch happens to hold.
            tokens = sum(data.gather_objects(sum(sum(s.labels[1:]) for s in samples)))
            loss_adv, loss_clean = torch.zeros(2, device=device).unbind()
            micro_batch = cfg.micro_batch or len(samples)
            for i in range(0, len(samples), micro_batch):
                part = samples[i : i + micro_batch]
                batch = data.collate(part, tokenizer.pad, cfg.seed).to(device)
                x = batch.images.float() / 255  # [m, 3, S, S] in [0, 1]
                pictured = [s for s in part if s.image is not None]  # text alone has nothing to attack

                # 1. Attack the images: the maximisation over δ, of the answers' cross-entropy. Its sum is the
                # right thing to climb: samples are independent, so the gradient is every sample's own.
                x_adv = x
                with clip_adv.frozen(model):
                    if pictured and cfg.eps:
                        shown = batch
                        if len(pictured) < len(part):
                            shown = data.collate(pictured, tokenizer.pad).to(device)

                        def loss_of(images: Tensor, shown=shown) -> Tensor:
                            with amp:
                                return model(images, shown).sum()

                        noise = [data.generator(cfg.seed, f'start {sub}', s.number) for s in pictured]
                        eps, alpha = cfg.eps / 255, cfg.alpha / 255
                        start = attacks.random_start(x, eps, noise)
                        x_adv = attacks.pgd(loss_of, x, eps, alpha, cfg.k, start)
                        attacks.check(x, x_adv, eps)
                    attack_ms += run.lap_ms(logging)
                    if logging:
                        with torch.no_grad(), amp:
                            loss_clean += model(x, batch).sum()
                    run.lap_ms(logging)  # measuring the clean loss is not training

                # 2. Update the weights on the adversarial images only: the minimisation over θ.
                last = i + micro_batch >= len(samples)
                with amp, contextlib.nullcontext() if last or world == 1 else step_model.no_sync():
                    loss = step_model(x_adv, batch, batch.keys).sum()
                    (loss * world / tokens).backward()  # times W, as DDP averages over the ranks
                loss_adv += loss.detach()
                train_ms += run.lap_ms(logging)
            grad_norm = nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            run.stop_if_not_finite(step, loss_adv.item() / tokens, grad_norm.item())
            for group in optimizer.param_groups:
                group['lr'] = clip_adv.lr_at(group['peak'], step - begin, steps, cfg.warmup)
            optimizer.step()
            optimizer.zero_grad()
            train_ms += run.lap_ms(logging)

            # 3. Log, save, and stop when asked to, all ranks at the same step.
            if logging:
                adv, clean = (sum(data.gather_objects(v.item())) / tokens for v in (loss_adv, loss_clean))
                row = dict(stage=sub, loss_adv=adv, loss_clean=clean, eps=cfg.eps, alpha=cfg.alpha)
                row |= dict(k=cfg.k if cfg.eps else 0, lr=optimizer.param_groups[0]['lr'])
                row |= dict(grad_norm=grad_norm.item(), answer_tokens=tokens)
                run.log(step + 1, batch_size, bar, **row, attack_ms=attack_ms, train_ms=train_ms)
            signal = run.asked_to_stop()
            if signal or (step + 1 - begin) % cfg.save_every == 0 or step + 1 == end:
                whole = sub == 'B' and not cfg.lora_r  # else the LLM's own weights are as they were
                weights = model.state_dict().items()
                weights = {n: w for n, w in weights if whole or not n.startswith('llm.') or 'lora_' in n}
                weights = {'model': weights, 'optimizer': optimizer.state_dict(), 'data': known_by}
                run.save(step + 1, {**weights, **clip_adv.open_clip_config(model.clip_cfg, model.preprocess)})
                export(step + 1)
            if signal:
                run.leave(step + 1, signal)
        bar.close()
    opens = 'holds the model' if wrong else 'opens in transformers'
    own = ['llava_adv.py', '--init', cfg.out, '--chat', 'IMAGE']
    command = shlex.join(['python', *(['eval.py', 'vqa', cfg.out] if cfg.data == 'easyvqa' else own)])
    run.finish(f'{cfg.out} {opens}; {"measure" if cfg.data == "easyvqa" else "ask"} it with: {command}')


def sub_stages(cfg: Config) -> list[tuple]:
    """What is trained on, in order: (A or B, conversations, None for now, updates or -1, batch size)."""
    plan = []
    if cfg.steps_a:
        source, root = cfg.data_a or cfg.data, cfg.image_root_a or cfg.image_root
        plan.append(('A', data.load_chats(source, 'train', root, captions=True), cfg.steps_a, cfg.batch_a))
    if cfg.steps_b:
        chats = data.load_chats(cfg.data, 'train', cfg.image_root, turns=cfg.turns)
        plan.append(('B', chats, cfg.steps_b, cfg.batch_size))
    return [check_samples(cfg, stage) for stage in plan]


def trainable(model: LLaVA, cfg: Config, sub: str) -> list[dict]:
    """Chooses the weights that a sub-stage trains, makes the adapters, returns the optimizer's groups."""
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    projector = {'params': list(model.projector.parameters()), 'lr': 0.0}
    if sub == 'A':
        return [projector | {'peak': cfg.lr_a}]
    if cfg.lora_r:
        g = data.generator(cfg.seed, 'adapters', 0)
        for number, layer in enumerate(m for m in model.llm.modules() if isinstance(m, Linear)):
            salt = 0x9E3779B1 * number % 2**31
            layer.add_adapter(cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, salt, g)
        tuned = [p for name, p in model.llm.named_parameters() if 'lora_' in name]
    else:
        tuned = list(model.llm.parameters())
    # what the features of block N−1 depend on; the last block and the final LayerNorm are kept as they are
    unused = ('ln_post', f'transformer.resblocks.{len(model.visual.transformer.resblocks) - 1}.')
    tower = [p for name, p in model.visual.named_parameters() if not name.startswith(unused)]
    for p in tuned + tower:
        p.requires_grad_(True)
    tower = {'params': tower, 'lr': 0.0, 'peak': cfg.lr_tower}
    return [{'params': tuned, 'lr': 0.0, 'peak': cfg.lr}, projector | {'peak': cfg.lr_projector}, tower]


# ======================================================================================================= chat
def chat(cfg: Config, given: set[str]) -> None:
    """Answers questions about one image, typed at a prompt, until the input ends."""
    if 'init' not in given:
        data.fail('--chat: give --init, too, the LLaVA to talk to')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model, tokenizer = load_llava(cfg.init)
    model.to(device)
    style = data.prompt_style(cfg.prompt or model.style, tokenizer)
    prompt = data.Prompt(tokenizer, style, model.image_tokens, cfg.max_length)
    with data.reading('--chat', 'an image'):
        image = model.fit(data.read_image(Path(cfg.chat)))
    x, turns = image[None].to(device).float() / 255, []
    print(f'{cfg.init} looks at {cfg.chat}; ask, or end with Ctrl-D')
    while True:
        try:
            question = input('> ').strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not question:
            continue
        if data.IMAGE in question:
            print(f'{data.IMAGE} cannot stand in a question: the image is there already')
            continue
        question = question if turns else f'{data.IMAGE}\n{question}'
        ids, _ = prompt.encode([*turns, (question, None)])
        answer = tokenizer.decode(generate(model, x, [ids], 256, tokenizer.ends)[0])
        turns.append((question, answer))
        print(answer, flush=True)


# ================ below: the tiny language model, a model's files; nothing of the method is hidden here
# --------------------------------------------------------------------------------------------- making a model
def build(cfg: Config, state: dict | None, rank: int) -> tuple[LLaVA, data.LLMTokenizer]:
    """The image tower of --init (or the checkpoint), the LLM of --llm, a new projector; or a whole LLaVA."""
    dtype = getattr(torch, cfg.dtype)
    if is_llava(cfg.init):
        model, tokenizer = load_llava(cfg.init, dtype)
    else:
        if state is None:
            clip, _ = clip_adv.load_clip(cfg.init, flag='--init', tokenizer=False)
            visual, clip_cfg, preprocess = clip.visual, clip.cfg, clip.preprocess
        else:
            clip_cfg, preprocess = clip_adv.from_open_clip(state, f'{cfg.out}/train_state.pt')
            with clip_adv.seeded(0):  # the checkpoint has its weights
                visual = clip_adv.ViT(clip_cfg, preprocess)
        tiny = Path(cfg.out) / 'llm' if cfg.llm == 'tiny' else None
        missing = tiny and not (tiny / 'config.json').is_file()  # it is written last
        if state and missing:
            data.fail(f'--resume: neither the LLaVA --init {cfg.init} nor {tiny} is there any more')
        if missing and rank == 0:
            data.write_settings(cfg)  # from now on --resume knows the run
            train_tiny_llm(tiny, cfg)
        data.gather_objects(None)  # the others wait for it
        llm, tokenizer = load_llm(str(tiny or cfg.llm), dtype)
        with clip_adv.seeded(cfg.seed):
            model = LLaVA(visual, clip_cfg, preprocess, llm, tokenizer.image)
    model.style = data.prompt_style(cfg.prompt or model.style, tokenizer)
    return model, tokenizer


def fingerprint(llm: Llama) -> str:
    digest = hashlib.sha256()
    for _, w in sorted(llm.named_parameters()):
        digest.update(w.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_samples(cfg: Config, stage: tuple, model: LLaVA | None = None, tokenizer=None) -> tuple:
    """Before hours of training: the sub-stage with its prompt and what can be learned from, the same on all
    ranks, which share the work. The rest is counted by kind.   model: None before it is there"""
    (sub, chats, *_, steps, size), (rank, world) = stage, data.rank_and_world()
    mine, prompt, bad, cut = [], None, dict(chats.bad), 0
    if model:
        style, mine = 'plain' if sub == 'A' else model.style, chats.chats[rank::world]
        prompt = data.Prompt(tokenizer, style, model.image_tokens, cfg.max_length)
    for chat in tqdm(mine, desc='checking the samples', disable=rank > 0 or len(mine) < 50_000):
        try:
            cut += prompt.cut(chat)[2]
        except (data.BadSample, data.BadTemplate) as e:  # a template may refuse some texts only
            bad[chat.name] = (*e.args, '')[:2]
    bad = {name: why for of_rank in data.gather_objects(bad) for name, why in of_rank.items()}
    kept = [chat for chat in chats.chats if chat.name not in bad]
    kinds, total = [kind for kind, _ in bad.values()], len(kept) + len(bad)
    counts = ''.join(f', {kinds.count(kind)} × {kind}' for kind in dict.fromkeys(kinds))
    cut = sum(data.gather_objects(cut))
    said = f'of {total} samples {cut} are cut at --max_length {cfg.max_length}'
    said += f', and {len(bad)} cannot be learned from{counts}'
    said += ''.join(f'\n  {name}: {kind}: {more}' for name, (kind, more) in list(bad.items())[:10])
    if len(bad) > cfg.max_bad * total or not kept:
        data.fail(f'--max_bad {cfg.max_bad:g}: {said}')
    if model and rank == 0 and (bad or cut):
        print(f'sub-stage {sub}: {said}')
    steps = max(1, len(kept) // size) if model and steps < 0 else steps
    return sub, replace(chats, chats=kept, bad=bad), prompt, steps, size


def check_config(cfg: Config, given: set[str], world: int) -> None:
    """Refuses what cannot be meant, with what, value, limit and flag; fills in α."""
    clip_adv.check_attack(cfg)
    least = dict(steps_a=-1, steps_b=-1, batch_a=1, batch_size=1, micro_batch=0, lr=0, lr_a=0)
    least |= dict(lr_projector=0, lr_tower=0, wd=0, workers=0, max_bad=0)
    least |= dict(lora_r=0, lora_dropout=0, warmup=0, turns=1, max_length=2, log_every=1, save_every=1)
    for name, bound in least.items():
        if getattr(cfg, name) < bound:
            data.fail(f'--{name} {getattr(cfg, name)}: must be at least {bound}')
    for steps, name in ((cfg.steps_a, 'batch_a'), (cfg.steps_b, 'batch_size')):
        if steps and getattr(cfg, name) % world:
            data.fail(f'--{name} {getattr(cfg, name)}: must be divisible by the {world} processes')
    if not (cfg.steps_a or cfg.steps_b):
        data.fail('--steps_a 0 --steps_b 0: not both 0 (-1: one epoch)')
    if cfg.warmup > 1 or cfg.lora_dropout >= 1 or cfg.grad_clip <= 0:
        said = f'--warmup {cfg.warmup:g} --lora_dropout {cfg.lora_dropout:g} --grad_clip {cfg.grad_clip:g}'
        data.fail(f'{said}: must be a fraction, a fraction below 1, and positive')
    if cfg.lora_r == 0 and cfg.dtype == 'bfloat16':
        data.fail('--dtype bfloat16 with --lora_r 0: small updates would be rounded away; use float32')
    if 'llm' in given and is_llava(cfg.init):
        data.fail(f'--llm {cfg.llm}: --init {cfg.init} is a LLaVA and brings its LLM; leave it out')


# ------------------------------------------------------------------------------------ the tiny language model
def train_tiny_llm(folder: Path, cfg: Config, steps: int = 800, batch_size: int = 32, lr=1e-3) -> None:
    """A language model of about a million parameters, trained on the text of the training split and on no
    image: the stand-in for a pretrained LLM. To compare what is asked with what is said is hard to learn, so
    that comes alone, first; in the second half all kinds of texts."""
    g = data.generator(cfg.seed, 'tiny llm', 0)
    early, late, captioning, tokenizer = tiny_llm_texts(cfg, g)
    config = tiny_llm_config(tokenizer.vocab_size)
    config |= {f'{name}_token_id': getattr(tokenizer, name) for name in ('bos', 'eos', 'pad')}
    with clip_adv.seeded(cfg.seed):
        llm = Llama(config)
    for name, p in llm.named_parameters():  # norms stay at 1; what writes into the residual stream is smaller
        if p.ndim > 1:
            last = name.endswith(('o_proj.weight', 'down_proj.weight'))
            p.data = torch.randn(p.shape, generator=g) * (0.02 / math.sqrt(8) if last else 0.05)
    for layer in llm.model.layers:  # a token looks at its like from the start: what is asked at what is said
        layer.self_attn.k_proj.weight.data = layer.self_attn.q_proj.weight.data.clone()
    llm.tie()
    colon = tokenizer.encode(' ASSISTANT:')[0][-1]
    optimizer = torch.optim.AdamW(llm.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(steps), desc='tiny LLM', mininterval=0.5 if sys.stderr.isatty() else 30):
        kind = early if step < steps // 2 else None
        kinds = [kind or (late if draw(8, g) else captioning) for _ in range(batch_size)]
        texts = [kind[draw(len(kind), g)] for kind in kinds]
        samples = [data.Sample(None, ids, [False] + [True] * (len(ids) - 1), 0) for ids in texts]
        batch = data.collate(samples, tokenizer.pad)
        hidden = llm(llm.model.embed_tokens(batch.ids))[batch.rows, batch.columns]
        loss = F.cross_entropy(llm.lm_head(hidden), batch.targets, reduction='none')
        # an answer weighs as much as a hundred words of a question: it is to be read out of the description
        weight = torch.where(batch.ids[batch.rows, batch.columns] == colon, 100.0, 1.0)
        loss = (loss * weight).sum() / weight.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        falling = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]['lr'] = lr * min((step + 1) / 20, falling)
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    data.save_directory(folder, config, dict(llm.state_dict()), tokenizer.files(2048))


def tiny_llm_config(words: int) -> dict:
    config = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_act': 'silu'}
    config |= {'vocab_size': -(-words // 64) * 64, 'hidden_size': 128, 'num_hidden_layers': 4}
    config |= {'num_attention_heads': 4, 'num_key_value_heads': 4, 'max_position_embeddings': 2048}
    config |= {'rms_norm_eps': 1e-5, 'rope_theta': 10000.0, 'tie_word_embeddings': True}
    return config | {'intermediate_size': 384, 'attention_bias': False}


def draw(n: int, g: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=g))


def tiny_llm_texts(cfg: Config, g: torch.Generator):
    """(early, late, captioning, tokenizer), the first three lists of token ids. A caption stands where the
    image will stand, so that the model learns to answer from a description.

    early: questions without negation, since "is there a red shape" and "is there not a red shape" have
    opposite answers, and together teach a beginner nothing.  late: all questions, and, in one of ten
    conversations, no description: which answers a question has, and how often, is all that one who never
    looks can know."""
    source, root = cfg.data_a or cfg.data, cfg.image_root_a or cfg.image_root
    pictured = data.load_chats(source, 'train', root, captions=True).chats
    whole = data.load_chats(cfg.data, 'train', cfg.image_root, turns=1 << 30).chats  # one for each image
    captions: dict[Path | None, list[str]] = {}
    for chat in pictured:
        captions.setdefault(chat.image, []).append(chat.turns[0][1])

    def described(chat: data.Chat, turns: list[tuple[str, str]], bare_too: bool) -> list[tuple[str, str]]:
        bare = not chat.image or bare_too and draw(10, g) == 0
        of = [] if bare else captions.get(chat.image, [])
        turns = [(q.replace(f'{data.IMAGE}\n', '').replace(data.IMAGE, ''), a) for q, a in turns]
        return [(f'{of[draw(len(of), g)]}\n{turns[0][0]}', turns[0][1]), *turns[1:]] if of else turns

    said = [turn for chat in pictured + whole for turn in chat.turns]
    words = [text.replace(data.IMAGE, '') for q, a in said for text in (f'USER: {q}', f' ASSISTANT: {a}')]
    tokenizer = data.train_llm_tokenizer(words, 2048)
    ask = data.Prompt(tokenizer, 'chat', 0, 2048)

    def texts(without: str, bare_too: bool) -> list[list[int]]:
        """Of conversations of cfg.turns questions each, without those that the pattern finds."""
        out = []
        for chat in whole:
            turns = [turn for turn in chat.turns if not (without and re.search(without, turn[0]))]
            for i in range(0, len(turns), cfg.turns):
                out.append(ask.encode(described(chat, turns[i : i + cfg.turns], bare_too))[0])
        return out

    early = texts(rf'\b(no|not)\b|{data.CAPTION_QUESTION}', bare_too=False)
    late = texts('', bare_too=True)
    captioning = []
    for chat in pictured:
        for question, answer in described(chat, chat.turns, False):
            captioning.append(tokenizer.encode(f'{tokenizer.bos_token}{question}{answer}\n')[0])
    return early or late, late, captioning, tokenizer  # a file may have no early question


# ------------------------------------------------------------------------------------ language models on disk
@dataclass
class LlamaCfg:
    """The part of a Hugging Face configuration that decides what is computed, with LlamaConfig's defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Literal['silu'] = 'silu'
    model_type: Literal['llama', 'qwen2'] = 'llama'
    use_sliding_window: Literal[False] = False


ROPE_NEEDS = {'default': [], 'linear': ['factor']}
ROPE_NEEDS['llama3'] = ['factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings']


def llama_cfg(config: dict, where: str) -> LlamaCfg:
    given = {f.name: config[f.name] for f in fields(LlamaCfg) if config.get(f.name) is not None}
    with data.reading(f'{where}: rope scaling', f'one of these, with the numbers it needs: {ROPE_NEEDS}'):
        rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})  # of transformers 5, 4
        given['rope_theta'] = rope.pop('rope_theta', given.get('rope_theta', 10000.0))
        kind = rope.pop('rope_type', rope.pop('type', 'default'))
        rope = {key: rope[key] for key in ROPE_NEEDS[kind]}
        given['rope_scaling'] = {**rope, 'rope_type': kind} if rope else None
        cfg = clip_adv.as_dataclass(LlamaCfg, given, where)
        cfg.num_key_value_heads = cfg.num_key_value_heads or cfg.num_attention_heads
        cfg.head_dim = cfg.head_dim or cfg.hidden_size // cfg.num_attention_heads
        heads, key_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        if heads % key_heads or cfg.head_dim % 2 or not cfg.head_dim or not frequencies(cfg).isfinite().all():
            raise ValueError(f'{heads} heads, {key_heads} key heads, width {cfg.head_dim}, {rope} do not fit')
    return cfg


def load_llm(path: str, dtype: torch.dtype) -> tuple[Llama, data.LLMTokenizer]:
    """A directory or a repository id → (Llama, tokenizer). The embedding grows for <image> and <pad>.

    The model is made without memory, then filled, so that no second copy of the weights is ever held."""
    place = data.locate(path, '--llm')
    config, tokenizer = data.read_json(place / 'config.json', f'--llm {path}'), data.read_llm_tokenizer(place)
    weights = data.read_weights(place, data.HF_FILES, rename=lambda n: '' if 'rotary_emb.inv' in n else n)
    rows = llama_cfg(config, f'{path}/config.json').vocab_size
    if tokenizer.vocab_size > rows:
        config = {**config, 'vocab_size': -(-tokenizer.vocab_size // 64) * 64}  # 64: suits matrix units
    with torch.device('meta'), data.reading(f'{path}/config.json', 'sizes that a model can have'):
        llm = Llama(config, path).to(dtype)
    fit_vocabulary(weights, llm, rows, path)
    data.fill(llm, weights, path)
    llm.tie()
    return llm.eval(), tokenizer


def fit_vocabulary(weights: dict[str, Tensor], llm: Llama, rows: int, where: str, prefix: str = '') -> None:
    """Rows that embedding and head lack are their mean, which no token is likelier than; a tied head is the
    embedding, whether the file has it or not.   rows: that the file should have"""
    names = [f'{prefix}model.embed_tokens.weight', f'{prefix}lm_head.weight']
    for name in names:
        w = weights.get(name)
        if llm.cfg.vocab_size > rows and w is not None and len(w) == rows and w.is_floating_point():
            w = w.float()
            weights[name] = torch.cat([w, w.mean(0, keepdim=True).expand(llm.cfg.vocab_size - rows, -1)])
    if llm.cfg.tie_word_embeddings and names[0] in weights:
        embedding = weights[names[0]]
        if not torch.equal(weights.setdefault(names[1], embedding), embedding):
            data.fail(f'{where}: tie_word_embeddings is true, but {names[1]} is not the embedding')


# ---------------------------------------------------------------------------------------------- LLaVA on disk
def hf_llava_names(name: str, plain_tower: bool = False) -> list[str]:
    """A weight of LLaVA as LlavaForConditionalGeneration has it.   plain_tower: one of open_clip alone"""
    if name.startswith('visual.') and not plain_tower:
        return [n.replace('vision_model.', 'vision_tower.', 1) for n in clip_adv.hf_names(name)]
    ours, rest = name.split('.', 1)
    theirs = {'visual': 'vision_tower', 'projector': 'multi_modal_projector', 'llm': 'language_model'}
    return [f'{theirs[ours]}.{rest}']


def llava_name_of_today(name: str) -> str:
    """One name for each weight of those that transformers gave it at one time or another."""
    name = re.sub(r'^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)', '', name)
    if name.startswith('vision_tower.'):
        name = name.replace('vision_tower.vision_model.', 'vision_tower.', 1)
        return '' if name.endswith('.position_ids') else name  # 0, 1, 2, … of older versions
    if name.startswith('multi_modal_projector.'):
        return name
    name = name.removeprefix('language_model.')  # once there was language_model.layers, and lm_head on top
    name = name if name.startswith(('model.', 'lm_head.')) else f'model.{name}'
    return '' if 'rotary_emb.inv_freq' in name else f'language_model.{name}'  # a buffer of older versions


def save_llava(model: LLaVA, tokenizer: data.LLMTokenizer, out: Path, max_length: int) -> None:
    """The whole model, adapters merged, as a LlavaForConditionalGeneration that transformers opens."""
    wrong = clip_adv.not_in_hf(model.clip_cfg, model.preprocess)
    weights = {name: w for name, w in model.state_dict().items() if 'lora_' not in name}
    for name, layer in model.llm.named_modules():
        if isinstance(layer, Linear):
            weights[f'llm.{name}.weight'] = layer.merged()
    weights = clip_adv.weights_to_hf(weights, functools.partial(hf_llava_names, plain_tower=bool(wrong)))
    processor = dict(processor_class='LlavaProcessor', image_token=data.IMAGE, num_additional_image_tokens=1)
    processor |= dict(patch_size=model.visual.patch, vision_feature_select_strategy='default')
    how = clip_adv.hf_preprocessor(model.preprocess, model.visual.size, 'LlavaProcessor', model.pad)
    ends = dict(bos_token_id=tokenizer.bos, pad_token_id=tokenizer.pad, eos_token_id=sorted(tokenizer.ends))
    template = data.V1_TEMPLATE if model.style == 'v1' else tokenizer.chat_template
    if template and not template.startswith(data.TAKES_PARTS):
        if model.style == 'v1' or not tokenizer.takes_parts:  # transformers gives it a list
            template = data.TAKES_PARTS + template
    files = tokenizer.files(max_length, template)
    files['preprocessor_config.json'], files['processor_config.json'] = json.dumps(how), json.dumps(processor)
    files['generation_config.json'] = json.dumps({k: v for k, v in ends.items() if v is not None})
    data.save_directory(out, hf_config(model), weights, files)
    if wrong:
        said = f"note: {out}: Hugging Face's CLIP cannot express this image tower ({'; '.join(wrong)})"
        print(f'{said}, so transformers does not open the directory; eval.py, --init and --chat do')


def hf_config(model: LLaVA) -> dict:
    if clip_adv.not_in_hf(model.clip_cfg, model.preprocess):
        # a model_type that transformers does not know: it stops there, and does not fill in what it misses
        whole = clip_adv.open_clip_config(model.clip_cfg, model.preprocess)
        vision = {'model_type': 'open_clip_vit', 'image_size': model.visual.size, **whole}
    else:
        vision = clip_adv.tower_to_hf(model.clip_cfg.vision_cfg, model.clip_cfg)
    tied = model.llm.cfg.tie_word_embeddings  # at both levels: which counts has changed between versions
    kind = {'architectures': ['LlavaForConditionalGeneration'], 'model_type': 'llava'}
    image = {'image_token_index': model.image_id, 'image_seq_length': model.image_tokens}
    features = {'vision_feature_layer': -2, 'vision_feature_select_strategy': 'default'}
    projector = {'projector_hidden_act': 'gelu', 'multimodal_projector_bias': True}
    towers = {'text_config': {**model.llm.config, 'tie_word_embeddings': tied}, 'vision_config': vision}
    dtype = {'dtype': str(model.llm.lm_head.weight.dtype).removeprefix('torch.')}
    more = {'prompt_style': model.style, 'tie_word_embeddings': tied}
    return {**kind, **image, **features, **projector, **towers, **dtype, **more}


def is_llava(path: str, flag: str = '--init') -> bool:
    if not Path(path).exists() and not data.is_id(path):
        return False  # who needs it says so: a run that goes on has the tower in its checkpoint
    place = data.locate(path, flag)
    return data.model_type(place) == 'llava' or (place / ADAPTERS).is_file()


ADAPTERS = 'non_lora_trainables.bin'  # of the released Δ²LLaVA, and of LLaVA's own LoRA runs


def settings_of_llava(place: Path, path: str) -> tuple:
    """ClipCfg, Preprocess, the LLM's settings, config.json, whether images are padded, whether the tower is
    one of open_clip alone"""
    if (kind := data.model_type(place)) != 'llava':
        clip = (place / 'open_clip_config.json').is_file() or kind == 'clip'
        unfinished = ', but a run that has not ended: go on with --resume' if data.settings_of(place) else ''
        data.fail(f'{path} is no LLaVA directory{", which is a CLIP" if clip else unfinished}')
    file = place / 'config.json'
    config = data.read_json(file, path)
    check_settings(config, {'vision_feature_layer': [-2], 'projector_hidden_act': ['gelu']}, file)
    check_settings(config, {'vision_feature_select_strategy': ['default']}, file)
    if not all(isinstance(config.get(key), dict) for key in ('text_config', 'vision_config')):
        data.fail(f'{file}: no text_config or no vision_config; expected the format of transformers')
    vision, text = config['vision_config'], dict(config['text_config'])
    text['tie_word_embeddings'] = config.get('tie_word_embeddings', text.get('tie_word_embeddings', False))
    plain = vision.get('model_type') == 'open_clip_vit'
    check_settings(vision, {'model_type': ['clip_vision_model', 'open_clip_vit']}, f'{file}: vision_config')
    if not plain:
        tower, quick_gelu = clip_adv.tower_from_hf(clip_adv.VisionCfg, config, file)
        clip_cfg = clip_adv.ClipCfg(tower, quick_gelu=quick_gelu, embed_dim=vision.get('projection_dim', 512))
        preprocess, pad = clip_adv.preprocess_from_hf(place, tower.image_size)
        vision = clip_adv.open_clip_config(clip_cfg, preprocess)
    clip_cfg, preprocess = clip_adv.from_open_clip(vision, str(file))
    if plain:
        _, pad = clip_adv.preprocess_from_hf(place, clip_cfg.vision_cfg.image_size)
    return clip_cfg, preprocess, text, config, pad, plain


def load_llava(path: str, dtype: torch.dtype = torch.float32) -> tuple[LLaVA, data.LLMTokenizer]:
    """A LLaVA, from wherever it comes → (model, tokenizer).

    path: a run directory; any LLaVA directory of Hugging Face's format with a CLIP tower and a Llama or
    Qwen2; adapters as the authors of Δ²LLaVA publish them; or a repository id of such.  dtype: of the LLM;
    the rest is float32."""
    place = data.locate(path)
    if (place / ADAPTERS).is_file():
        return load_adapters(place, dtype)
    clip_cfg, preprocess, text, config, pad, plain = settings_of_llava(place, path)
    file = place / 'config.json'
    tokenizer, rows = data.read_llm_tokenizer(place), llama_cfg(text, f'{file}: text_config').vocab_size
    image_id = config.get('image_token_index', config.get('image_token_id'))
    if tokenizer.image != image_id:
        data.fail(f'{file}: {data.IMAGE} is token {tokenizer.image} of the tokenizer, and {image_id} here')
    with torch.device('meta'), data.reading(str(file), 'sizes that a model can have'):
        llm = Llama({**text, 'vocab_size': max(rows, tokenizer.vocab_size)}, str(file)).to(dtype)
        visual = clip_adv.ViT(clip_cfg, preprocess)
        model = LLaVA(visual, clip_cfg, preprocess, llm, image_id, config.get('prompt_style', ''), pad)
    weights = data.read_weights(place, data.HF_FILES, rename=llava_name_of_today)
    fit_vocabulary(weights, llm, rows, path, 'language_model.')
    names_of = functools.partial(hf_llava_names, plain_tower=plain)
    data.fill(model, clip_adv.weights_from_hf(weights, model.state_dict(), path, names_of), path)
    llm.tie()
    return model.eval(), tokenizer


def check_settings(config: dict, allowed: dict[str, list], where) -> None:
    """allowed: key → values that are obeyed; where the key is missing, it is taken for the first"""
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            data.fail(f'{where}: {key} is {config[key]!r:.80}; supported: {", ".join(map(repr, values))}')


def load_adapters(place: Path, dtype: torch.dtype) -> tuple[LLaVA, data.LLMTokenizer]:
    """The layout of the released Δ²LLaVA: adapters of PEFT for the LLM that adapter_config.json names, and,
    in non_lora_trainables.bin, projector and image tower, that one in open_clip's names.
    official: Open-LLaVA-NeXT/llava/train/train.py, llava/model/builder.py"""
    config, lora = (data.read_json(place / f'{name}config.json', str(place)) for name in ('', 'adapter_'))
    obeyed = {'mm_projector_type': ['mlp2x_gelu'], 'mm_vision_select_layer': [-2]}
    obeyed |= {'mm_patch_merge_type': ['flat', None]}
    obeyed |= {'mm_vision_select_feature': ['patch', None], 'mm_use_im_start_end': [False, None]}
    check_settings(config, obeyed | {'image_aspect_ratio': ['pad', 'square', None]}, place / 'config.json')
    obeyed = {'peft_type': ['LORA'], 'bias': ['none', None]}
    obeyed |= {'init_lora_weights': [True, False, None, 'gaussian']}
    plain = 'fan_in_fan_out modules_to_save rank_pattern alpha_pattern use_rslora use_dora'.split()
    obeyed |= {key: [False, None, [], {}] for key in [*plain, 'layers_to_transform']}
    check_settings(lora, obeyed, place / 'adapter_config.json')
    needed = {'r': int, 'lora_alpha': float, 'target_modules': list[str], 'base_model_name_or_path': str}
    for key, kind in needed.items():
        if not clip_adv.suits(lora.get(key), kind):
            data.fail(f'{place}/adapter_config.json: {key} is {lora.get(key)!r}; supported: {kind.__name__}')
    r, scale, base = lora['r'], lora['lora_alpha'] / lora['r'], lora['base_model_name_or_path']
    print(f'note: {place}: its language model is {base}, as adapter_config.json says')
    llm, tokenizer = load_llm(base, dtype)

    files = ['adapter_model.safetensors', 'adapter_model.bin']
    under = 'base_model.model.'
    adapters = data.read_weights(place, files, lambda n: n.removeprefix(under).replace('.default.', '.'))
    layers = [(n, m) for n, m in llm.named_modules() if isinstance(m, nn.Linear)]
    named = [(n, m) for n, m in layers if n.rpartition('.')[2] in lora['target_modules']]
    expected = {f'{n}.lora_A.weight': torch.empty(r, m.in_features, device='meta') for n, m in named}
    expected |= {f'{n}.lora_B.weight': torch.empty(m.out_features, r, device='meta') for n, m in named}
    data.check_weights(adapters, expected, f'{place}/adapter_model')
    for name, m in named:
        a, b = (adapters[f'{name}.lora_{part}.weight'].float() for part in 'AB')
        m.weight.data = (m.weight.data.float() + scale * b @ a).to(dtype)

    weights = data.read_weights(place, [ADAPTERS], rename=official_name)
    weights.pop('visual.proj', None)  # into CLIP's shared space; of no use here
    clip_cfg, preprocess = tower_of_adapters(place, config, weights)
    pad = config.get('image_aspect_ratio') == 'pad'
    with torch.device('meta'):
        visual = clip_adv.ViT(clip_cfg, preprocess)
        model = LLaVA(visual, clip_cfg, preprocess, llm, tokenizer.image, 'v1', pad)
    rest = nn.ModuleDict({'visual': visual, 'projector': model.projector})
    data.fill(rest, weights, f'{place / ADAPTERS}')
    return model.eval(), tokenizer


def official_name(name: str) -> str:
    """base_model.model.model.vision_tower.vision_tower.NAME → visual.NAME; mm_projector.0 → linear_1"""
    name = re.sub(r'^(base_model\.)?(model\.)*', '', name)
    name = re.sub(r'^(vision_tower\.)+', 'visual.', name)
    name = name.replace('mm_projector.0.', 'projector.linear_1.')
    return name.replace('mm_projector.2.', 'projector.linear_2.')


def tower_of_adapters(place: Path, config: dict, weights: dict[str, Tensor]):
    """(ClipCfg, Preprocess), from the weights' shapes, as the authors publish no configuration. The width of
    the heads leaves no trace there: it is that of open_clip's towers."""
    needed = ['conv1.weight', 'positional_embedding', 'transformer.resblocks.0.mlp.c_fc.bias']
    needed = [f'visual.{name}' for name in needed]
    if not set(needed) <= set(weights):
        data.fail(f"{place / ADAPTERS} has no image tower in open_clip's names: {', '.join(needed)}")
    conv, positions, hidden = (weights[name] for name in needed)
    width, patch = len(conv), conv.shape[-1]
    layers = {name.split('.')[3] for name in weights if '.resblocks.' in name}
    vision = clip_adv.VisionCfg(width=width, patch_size=patch, layers=len(layers))
    vision.image_size = math.isqrt(len(positions) - 1) * patch
    vision.head_width = {1280: 80, 1408: 88, 1664: 104, 1792: 112}.get(width, 64)
    vision.mlp_ratio = clip_adv.mlp_ratio(len(hidden), width)
    vision.no_ln_pre = 'visual.ln_pre.weight' not in weights
    quick_gelu = 'quickgelu' in str(config.get('mm_vision_tower', '')).lower()
    clip_cfg = clip_adv.ClipCfg(vision, quick_gelu=quick_gelu)
    # official: Open-LLaVA-NeXT/clip_preprocess/bv336/preprocessor_config.json
    preprocess = clip_adv.Preprocess(**clip_adv.IMAGENET)
    print(f'note: {place} does not say what its image tower is; taken from its weights: {vision}')
    if (place / 'preprocessor_config.json').is_file():
        preprocess, _ = clip_adv.preprocess_from_hf(place, clip_cfg.vision_cfg.image_size)
    return clip_cfg, preprocess


# -------------------------------------------------------------------------------------- what is said of a run
HUB_HEADER = 'library_name: transformers\npipeline_tag: image-text-to-text\ntags:\n- llava'
LOAD = ["transformers.LlavaForConditionalGeneration.from_pretrained('RUN')"]
LOAD += ['python llava_adv.py --init RUN --chat IMAGE']


def arithmetic(cfg: Config, plan: list, model: LLaVA, world: int) -> str:
    """What is trained on what, and what an update costs, for the first output."""
    counted = (model.visual, model.projector, model.llm)
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in counted]
    parts = 'LLaVA: tower {:.2f} M, projector {:.2f} M, LLM {:.2f} M parameters'.format(*millions)
    image = f'{model.image_tokens} tokens per image at {model.visual.size} px'
    lines = [f'{parts}; {image}; {clip_adv.attack_text(cfg)}']
    for sub, chats, _, steps, size in plan:
        micro = f' in micro-batches of {cfg.micro_batch}' if cfg.micro_batch else ''
        share = f'global batch {size} = {world} process{"es" * (world > 1)} × {size // world}{micro}'
        epochs = f'{steps} updates = {steps * size / len(chats):.2f} epochs'
        lines.append(f'{sub}: {chats.note}; {share}; {epochs}')
    return '\n'.join(lines)


# -------------------------------------------------------------------------- --plan: what it costs, beforehand
# of LLaVA 1.5's data: samples of an epoch; tokens of a text and, of these, learned ones (these two guessed)
ASSUMED = {'A': (558_128, 24, 20), 'B': (665_298, 320, 200)}


def plan(cfg: Config, given: set[str], world: int, known: dict) -> list[tuple]:
    """As clip_adv.plan does, of each sub-stage."""
    cfg.dtype, init = cfg.dtype or ('bfloat16' if cfg.lora_r else 'float32'), str(Path(cfg.init))
    check_config(cfg, given, world)
    if init not in known and is_llava(cfg.init):
        known[init] = settings_of_llava(data.locate(cfg.init), cfg.init)[:3]
    clip_cfg, preprocess, *llm = known.get(init) or clip_adv.settings_in(cfg.init, '--init')[1:]
    if not llm and cfg.llm == 'tiny':
        llm = [tiny_llm_config(2048)]
    llm = llm or [data.read_json(data.locate(cfg.llm, '--llm') / 'config.json', '--llm')]
    known[str(Path(cfg.out))] = clip_cfg, preprocess, *llm
    stages = ('A', cfg.steps_a, cfg.batch_a), ('B', cfg.steps_b, cfg.batch_size)
    return [plan_of(cfg, *stage, world, clip_cfg, preprocess, *llm) for stage in stages if stage[1]]


def plan_of(cfg: Config, sub: str, steps: int, size: int, world: int, clip_cfg, preprocess, config: dict):
    epoch, words, learned = ASSUMED[sub]
    n, px = min(cfg.micro_batch or size, size // world), clip_cfg.vision_cfg.image_size
    with FakeTensorMode(), clip_adv.Meter(_local_scalar_dense=True) as meter:  # its frequencies are finite
        llm, visual = Llama(config, '--llm'), clip_adv.ViT(clip_cfg, preprocess)
        for p in llm.parameters():
            p.data = p.data.to(getattr(torch, cfg.dtype))
        model = LLaVA(visual, clip_cfg, preprocess, llm, 0).eval()
        image, llm.checkpointing = model.image_tokens, cfg.checkpoint
        parts = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (visual, model.projector, llm)]
        trained = [p for group in trainable(model, cfg, sub) for p in group['params']]
        for p in trained:
            p.grad = torch.zeros_like(p)  # of earlier micro-batches
        x, ids = torch.empty(n, 3, px, px), torch.empty(n, image + words, dtype=torch.long)
        rows = columns = targets = torch.empty(n * learned, dtype=torch.long)
        batch = data.Batch(x, ids, rows, columns, targets, image, torch.empty(n, dtype=torch.int32))
        meter.answers['nonzero'] = torch.empty(n * image, 2, dtype=torch.long)  # where the image tokens are
        with torch.autocast('cpu', torch.bfloat16):
            with clip_adv.frozen(model):
                meter.phase = 'attack'
                attacks.pgd(lambda x: model(x, batch).sum(), x, 1.0, 1.0, 1)
            meter.phase = 'update'
            model(x, batch, batch.keys).sum().backward()
    ks = Counter({cfg.k if cfg.eps else 0: steps if steps > 0 else epoch // size})
    said = (
        f'{n} samples at a time on each of {world} GPUs, texts of {words} tokens, {learned} learned (a guess)'
    )
    said += f', an epoch of {epoch} samples' * (steps < 0)
    kept = 4 * sum(p.numel() for p in trained) * (2 + (world > 1))
    cells = f'{cfg.out} {sub}', ' + '.join(f'{m:.1f}' for m in parts), f'{px}', f'{image} + {words}'
    return clip_adv.costs((*cells, f'{cfg.eps:g} {cfg.alpha:g} {cfg.k}'), size, ks, meter, n, kept, said)


if __name__ == '__main__':
    cfg, given = data.parse(Config, __doc__)
    stages = {'clip_adv.py': (clip_adv.Config, clip_adv.plan), 'llava_adv.py': (Config, plan)}
    if 'plan' in given:
        clip_adv.print_plans(cfg, given, stages)
    else:
        (chat if cfg.chat else main)(cfg, given)
