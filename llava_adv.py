"""Stage 2 of Double Visual Defense (arXiv 2501.09446): Δ²LLaVA, adversarial visual instruction tuning on top of ΔCLIP.

    min over θ   E over (x, q, a)   max over ‖δ‖∞ ≤ ε, 0 ≤ x+δ ≤ 1   of   − Σ log p( a | x+δ, q )        over answer tokens

    torchrun llava_adv.py                                       # Δ²LLaVA on easy-VQA: ΔCLIP of runs/clip_adv and a tiny LLM
    torchrun llava_adv.py --eps 0 --out runs/llava_single       # single defence: ΔCLIP, clean tuning
    torchrun llava_adv.py --init runs/clip --out runs/llava_tuned               # vanilla CLIP, adversarial tuning
    torchrun llava_adv.py --init runs/clip --eps 0 --out runs/llava             # vanilla LLaVA
    python llava_adv.py --init runs/llava_adv --chat cat.jpg    # ask it
    python eval.py vqa runs/llava runs/llava_adv                # all under attack

The paper's recipe for Vicuna-7B v1.5: two runs, first the projector, then everything (LLaVA 1.5's data, 8 GPUs):

    torchrun --nproc_per_node 8 llava_adv.py --init CLIP --llm VICUNA --eps 4 --alpha 3 --k 3 --batch_a 256 --lr_a 1e-3 --steps_a -1 --steps_b 0 \\
        --data_a blip_laion_cc_sbu_558k.json --image_root_a DIR --micro_batch 16 --checkpoint --out runs/projector
    torchrun --nproc_per_node 8 llava_adv.py --init runs/projector --eps 4 --alpha 3 --k 3 --batch_size 128 --steps_a 0 --steps_b -1 \\
        --data llava_v1_5_mix665k.json --image_root DIR --lora_r 128 --lora_alpha 256 --lr 2e-4 --lr_projector 2e-5 --lr_tower 1e-6 \\
        --micro_batch 8 --checkpoint --out runs/llava_adv_7b

The file reads top to bottom: configuration, model, prompts, main. Formats and plumbing come last.
Pixels are float32 in [0, 1] everywhere outside the image tower, ε and α are in 1/255 on the command line only.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import attacks
import clip_adv
import data


@dataclass
class Config:
    out: str = 'runs/llava_adv'   # run directory: checkpoints, log, and at the end a LLaVA in Hugging Face's format
    data: str = 'easyvqa'         # conversations for sub-stage B: 'easyvqa', or FILE.json in LLaVA's format
    image_root: str = ''          # folder that the images of FILE.json lie in
    data_a: str = ''              # image-caption conversations for sub-stage A; default: as --data
    image_root_a: str = ''        # folder of its images; default: as --image_root
    turns: int = 3                # easyvqa: questions to a conversation
    workers: int = 0              # image-decoding processes per rank; 0: none of its own
    init: str = 'runs/clip_adv'   # a CLIP (a run, of open_clip, of Hugging Face), or a LLaVA (tower, projector and LLM from it); a directory or repository id
    arch: str = ''                # what a file of a CLIP's weights in --init is: open_clip's model configuration, a JSON file or its name
    llm: str = 'tiny'             # 'tiny' (trained here, on the text), a directory, a .gguf file, or a repository id of Hugging Face
    prompt: str = ''              # of sub-stage B: 'v1' (Vicuna), 'chat' (the LLM's own template); default: --init's, chat where there is a template
    max_length: int = 2048        # tokens of a sample, image tokens included; longer ones are cut
    resume: bool = False          # continue the run in --out; start it where there is none
    overwrite: bool = False       # replace the run in --out, once the new one has a checkpoint
    seed: int = 0                 # of order, augmentation, δ₀, adapters, dropout and the tiny LLM
    chat: str = ''                # FILE of an image: answer questions about it, with the LLaVA in --init, instead of training
    # attack
    eps: float = 12.              # radius ε of the l∞ ball, in 1/255; 0 tunes on clean images
    alpha: float | None = None    # step size α, in 1/255; default 0.75 ε (the paper's 3 for ε = 4)
    k: int = 2                    # PGD steps K
    # sub-stage A: the projector alone, on captions
    steps_a: int = 300            # updates; 0: leave A out; -1: one epoch
    batch_a: int = 32             # global: of all processes together
    lr_a: float = 3e-3            # peak learning rate
    # sub-stage B: LLM, projector and image tower, on conversations
    steps_b: int = 500            # updates; 0: leave B out; -1: one epoch
    batch_size: int = 32          # global: of all processes together
    lr: float = 2e-3              # of the LLM (its adapters)
    lr_projector: float = 1e-3    # of the projector
    lr_tower: float = 3e-4        # of the image tower
    lora_r: int = 16              # rank of the adapters on every linear layer of the LLM but its head; 0 trains the LLM itself
    lora_alpha: float = 32.       # they are scaled by alpha / r
    lora_dropout: float = 0.05    # of their inputs, in updates only
    # both
    warmup: float = 0.03          # fraction of each sub-stage; cosine to 0 after it
    wd: float = 0.0               # weight decay
    clip: float = 1.0             # limit of the gradient's l2 norm
    # running
    micro_batch: int = 0          # samples at a time on each process, accumulated to the batch; 0: all at once
    checkpoint: bool = False      # recompute activations in the backward pass: less memory, a third more time
    dtype: str = ''               # of the LLM's own weights: float32, bfloat16; default: bfloat16 on CUDA beside adapters, else float32
    log_every: int = 25           # steps between lines of log.jsonl
    save_every: int = 200         # steps between checkpoints


# ===================================================================================================== the language model
# A Llama. Parameter names are Hugging Face's; `model.` and `lm_head.` stand before them in their files as here.
class Linear(nn.Linear):
    """A linear layer that can carry an adapter: W x + α/r · B A dropout(x).   LoRA, Hu et al. 2021, arXiv 2106.09685"""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        self.register_parameter('lora_A', None)
        self.register_parameter('lora_B', None)

    def add_adapter(self, r: int, alpha: float, dropout: float, salt: int, generator: torch.Generator) -> None:
        """salt: a number of this layer's own, for its dropout. B is 0 at first, so the layer computes what it did."""
        bound = self.in_features ** -0.5
        a = (2 * torch.rand(r, self.in_features, generator=generator) - 1) * bound
        self.lora_A = nn.Parameter(a.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.weight.device))
        self.scale, self.dropout, self.salt = alpha / r, dropout, salt

    def forward(self, x: Tensor, keys: Tensor | None = None, start: int = 0) -> Tensor:
        """x: [B, T, in].  keys: [B], what dropout is drawn from; None: no dropout.  start: x begins at this token."""
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
    """Dropout as a function of (key of the sample, token, channel): the same mask in any batch, on any rank and any device.

    x: [B, T, C].  keys: int32 [B].  A hash of 32 bits (two rounds of xor, shift, multiply) in place of a generator's state.
    """
    numbers = lambda n, first=0: torch.arange(first, first + n, dtype=torch.int32, device=x.device)
    h = mix(mix(keys)[:, None] + numbers(x.shape[1], start))[:, :, None] + numbers(x.shape[2]) * -1640531527  # 2³²/golden ratio
    return x * (mix(h) >= int((p - .5) * 2 ** 32)) / (1 - p)


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
    def __init__(self, cfg: dict, layer: int):
        super().__init__()
        width, self.head, self.layer = cfg['hidden_size'], cfg['head_dim'], layer
        heads, kv_heads, bias = cfg['num_attention_heads'], cfg['num_key_value_heads'], cfg['attention_bias']
        self.groups = heads // kv_heads                                # queries that share a key
        self.q_proj = Linear(width, heads * self.head, bias=bias)
        self.k_proj = Linear(width, kv_heads * self.head, bias=bias)
        self.v_proj = Linear(width, kv_heads * self.head, bias=bias)
        self.o_proj = Linear(heads * self.head, width, bias=cfg['o_bias'])

    def forward(self, x: Tensor, rope, start: int, cache, keys: Tensor | None) -> Tensor:
        """[B, T, W] → [B, T − start, W]"""
        split = lambda z: z.unflatten(-1, (-1, self.head))                                    # [B, T, heads, d]
        q = rotate(split(self.q_proj(x[:, start:], keys, start)), rope, start)
        k, v = rotate(split(self.k_proj(x, keys)), rope), split(self.v_proj(x, keys))
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        if mask is None and q.shape[1] < k.shape[1]:  # the queries are the last tokens
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=x.device).tril(k.shape[1] - q.shape[1])
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.groups > 1)
        return self.o_proj(x.transpose(1, 2).flatten(2), keys, start)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], start: int = 0) -> Tensor:
    """Rotary position embedding: the pairs (i, i + d/2) of each head turn with the token's position.   x: [B, T, heads, d]"""
    cos, sin = (table[..., start:, None, :] for table in rope)                                # [(B,) T, 1, d]
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: dict):
        super().__init__()
        width, hidden, bias = cfg['hidden_size'], cfg['intermediate_size'], cfg['mlp_bias']
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, keys: Tensor | None, start: int) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x, keys, start)) * self.up_proj(x, keys, start), keys, start)


class Layer(nn.Module):
    def __init__(self, cfg: dict, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg['hidden_size'], cfg['rms_norm_eps'])
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg['hidden_size'], cfg['rms_norm_eps'])
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, rope, start: int = 0, cache=None, keys: Tensor | None = None) -> Tensor:
        x = x[:, start:] + self.self_attn(self.input_layernorm(x), rope, start, cache, keys)
        return x + self.mlp(self.post_attention_layernorm(x), keys, start)


class Llama(nn.Module):
    """cfg: a Hugging Face configuration of a Llama or Qwen2."""

    def __init__(self, cfg: dict):
        super().__init__()
        self.cfg, self.config = complete(cfg), cfg
        width, vocab = self.cfg['hidden_size'], self.cfg['vocab_size']
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab, width)
        self.model.layers = nn.ModuleList(Layer(self.cfg, i) for i in range(self.cfg['num_hidden_layers']))
        self.model.norm = RMSNorm(width, self.cfg['rms_norm_eps'])
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.tie()
        self.checkpointing = False

    def tie(self) -> None:
        if self.cfg['tie_word_embeddings']:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, x: Tensor, start: int = 0, cache: 'Cache | Prefix | None' = None, keys: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, W] → what the head reads, [B, T − start, W].

        start: the first token that is asked for; the last layer computes no more than that. Sequences are padded on the right,
        where the causal mask keeps the padding from being seen.  keys: for the adapters' dropout.
        """
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


def frequencies(cfg: dict) -> Tensor:
    """Angle per position of each pair: θ^(−2i/d); with Llama 3's scaling, slow ones are stretched to the longer context."""
    base = cfg['rope_theta'] ** (-torch.arange(0, cfg['head_dim'], 2, device='cpu').float() / cfg['head_dim'])
    scaling = cfg['rope_scaling']
    if not scaling:
        return base
    if scaling['rope_type'] == 'linear':
        return base / scaling['factor']
    turns = scaling['original_max_position_embeddings'] * base / (2 * math.pi)  # in the original context
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, left alone; 0: a slow one
    return kept * base + (1 - kept) * base / scaling['factor']


class Cache:
    """Keys and values of the tokens so far, for generation.   positions: int64 [B, T] of the tokens that come next."""

    def __init__(self, llm: Llama, batch: int, length: int, like: Tensor):
        shape = (batch, length, llm.cfg['num_key_value_heads'], llm.cfg['head_dim'])
        self.k, self.v = ([like.new_zeros(shape) for _ in llm.model.layers] for _ in range(2))
        self.rows, self.all = torch.arange(batch, device=like.device)[:, None], torch.arange(length, device=like.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v: [B, T, heads, d] → (all keys, all values, mask [B, 1, T, L]: a token sees itself and what is before it)"""
        self.k[layer][self.rows, self.positions], self.v[layer][self.rows, self.positions] = k, v
        return self.k[layer], self.v[layer], (self.all <= self.positions[:, :, None])[:, None]


class Prefix:
    """Keys and values of what stands before the images, where no perturbation reaches: computed once for all steps of an attack."""

    def __init__(self, llm: Llama, x: Tensor):
        """x: embeddings [B, P, W]"""
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.length, self.positions = x.shape[1], torch.arange(x.shape[1], device=x.device)
        llm(x, cache=self)

    def after(self, tokens: int) -> 'Prefix':
        self.positions = torch.arange(self.length, self.length + tokens, device=self.positions.device)
        return self

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        if layer == len(self.k):  # the first pass
            self.k.append(k), self.v.append(v)
            return k, v, None
        return torch.cat([self.k[layer], k], dim=1), torch.cat([self.v[layer], v], dim=1), None


# ================================================================================================================ LLaVA
@dataclass
class Batch:
    """Samples as tensors: token ids padded on the right, and which tokens are to be predicted, from where."""
    images: Tensor   # uint8 [m, 3, S, S], of the samples that have one
    ids: Tensor      # int64 [b, T]
    rows: Tensor     # int64 [n]  the n supervised tokens: in which sample, …
    columns: Tensor  # int64 [n]  … predicted at which token (the one before), …
    targets: Tensor  # int64 [n]  … and what they are
    start: int       # the first of the columns
    keys: Tensor     # int32 [b]  what the samples' dropout is drawn from

    def to(self, device: torch.device) -> 'Batch':
        return Batch(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in vars(self).values()))


def collate(samples: list[data.Sample], pad: int, seed: int = 0) -> Batch:
    """Samples without an image are in ids, not in images."""
    longest = max(len(s.ids) for s in samples)
    places = [(row, column - 1, s.ids[column]) for row, s in enumerate(samples) for column, label in enumerate(s.labels) if label]
    images = [s.image for s in samples if s.image is not None]
    rows, columns, targets = torch.tensor(places).T
    keys = [int.from_bytes(hashlib.blake2b(f'{seed}/dropout/{s.number}'.encode(), digest_size=4).digest(), 'little', signed=True) for s in samples]
    return Batch(torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8),
                 torch.tensor([s.ids + [pad] * (longest - len(s.ids)) for s in samples]), rows, columns, targets, int(columns.min()),
                 torch.tensor(keys, dtype=torch.int32))


class LLaVA(nn.Module):
    """Image tower → projector → among the LLM's tokens, in the place of <image>.   Liu et al. 2023, arXiv 2310.03744

    tower: what made the ViT: {'vision_cfg', 'embed_dim', 'quick_gelu', 'preprocess_cfg'}; 'geometry' in it says how an image becomes a
    square: 'pad' (with the mean colour) or 'crop' (resize the short side, centre crop).  style: of the prompt, see Prompt; '' if not known.
    """

    def __init__(self, visual: clip_adv.ViT, llm: Llama, image_id: int, tower: dict, style: str = ''):
        super().__init__()
        self.visual, self.llm, self.image_id, self.tower, self.style = visual, llm, image_id, tower, style
        if hasattr(visual, 'proj'):
            del visual.proj  # into CLIP's shared space; of no use here
        width = llm.cfg['hidden_size']
        self.projector = nn.Sequential()
        self.projector.add_module('linear_1', nn.Linear(visual.class_embedding.shape[0], width))
        self.projector.add_module('gelu', nn.GELU())
        self.projector.add_module('linear_2', nn.Linear(width, width))

    @property
    def image_tokens(self) -> int:
        return (self.visual.size // self.visual.patch) ** 2

    def embed(self, images: Tensor, ids: Tensor) -> Tensor:
        """images float32 [m, 3, S, S] in [0, 1], ids [B, T] with image_tokens × image_id for each of them → [B, T, W]"""
        x = self.llm.model.embed_tokens(ids)
        if len(images):
            z = self.visual.embed(images)
            for block in self.visual.transformer.resblocks[:-1]:  # of block N−1, and so block N is never run
                z = block(z, causal=False)
            z = self.projector(z[:, 1:])                          # the patches, without the class token; no final LayerNorm
            x = x.index_put(torch.where(ids == self.image_id), z.flatten(0, 1).to(x.dtype))
        return x

    @torch.no_grad()
    def prefix(self, batch: Batch) -> Prefix | None:
        """What the images cannot change, of samples that all have one; None where it is so short that it would not pay."""
        length = min(int((batch.ids == self.image_id).int().argmax(1).min()), batch.start)
        return Prefix(self.llm, self.llm.model.embed_tokens(batch.ids[:, :length])) if 8 * length >= batch.ids.shape[1] else None

    def logits(self, images: Tensor, batch: Batch, keys: Tensor | None = None, prefix: Prefix | None = None) -> Tensor:
        """float32 [n, vocabulary], at the n supervised tokens; the head is the largest matrix and computed nowhere else"""
        x = self.embed(images, batch.ids)
        if prefix is None:
            x = self.llm(x, batch.start, keys=keys)
        else:
            x = x[:, prefix.length:]
            x = self.llm(x, batch.start - prefix.length, prefix.after(x.shape[1]))
        return self.llm.lm_head(x[batch.rows, batch.columns - batch.start]).float()

    def forward(self, images: Tensor, batch: Batch, keys: Tensor | None = None, prefix: Prefix | None = None) -> Tensor:
        """→ float32 [b], each sample's sum of token cross-entropies"""
        loss = F.cross_entropy(self.logits(images, batch, keys, prefix), batch.targets, reduction='none')
        if not len(images):  # text alone: projector and tower still take part, as DDP waits for their gradients on every rank
            loss = loss + 0 * sum(p.flatten()[0] for p in self.parameters() if p.requires_grad)
        return loss.new_zeros(len(batch.ids)).index_add(0, batch.rows, loss)


@torch.no_grad()
def generate(model: LLaVA, images: Tensor, prompts: list[list[int]], max_new: int, ends: set[int], temperature: float = 0.,
             top_p: float = 1., generators: list[torch.Generator] | None = None) -> list[list[int]]:
    """Answers, as token ids without the end. Greedy at temperature 0; else drawn from the most likely tokens that have top_p together.

    images: float32 [m, 3, S, S] in [0, 1], of the prompts that have one.  prompts: token ids.  ends: ids that end an answer.
    generators: one for each prompt, so that what is drawn does not depend on the batch.
    """
    device, lengths = model.llm.model.embed_tokens.weight.device, [len(p) for p in prompts]
    ids = torch.tensor([p + [0] * (max(lengths) - len(p)) for p in prompts], device=device)
    x, length = model.embed(images, ids), torch.tensor(lengths, device=device)
    cache = Cache(model.llm, len(prompts), max(lengths) + max_new, x)
    cache.positions = torch.arange(max(lengths), device=device).expand(len(prompts), -1)
    # the padding's keys and values lie behind the prompt's end, where nobody looks until an answer's token takes their place
    logits = model.llm.lm_head(model.llm(x, cache=cache)[torch.arange(len(prompts)), length - 1]).float()
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(max_new):
        tokens = logits.argmax(1).tolist() if temperature == 0 else [pick(z, temperature, top_p, g) for z, g in zip(logits, generators)]
        for row in list(going):
            if tokens[row] in ends:
                going.discard(row)
            else:
                answers[row].append(tokens[row])
        if not going or step + 1 == max_new:
            break
        cache.positions = (length + step)[:, None]
        x = model.llm.model.embed_tokens(torch.tensor(tokens, device=device))[:, None]
        logits = model.llm.lm_head(model.llm(x, cache=cache)[:, 0]).float()
    return answers


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token, drawn from the smallest set of the most likely ones whose probability is at least top_p."""
    p, order = (logits.double().cpu() / temperature).softmax(0).sort(descending=True, stable=True)
    below = p.cumsum(0)
    kept = p * (below - p < top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


# ============================================================================================================== prompts
V1_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
             "The assistant gives helpful, detailed, and polite answers to the user's questions.")  # Vicuna's, word for word


class Prompt:
    """Conversations → text → token ids and labels.

    'plain'  BOS <image> caption newline                                    loss on the caption and the newline
    'v1'     BOS system USER: <image>\\nquestion ASSISTANT: answer EOS …     loss on the answers and their EOS
    'chat'   the LLM's own template                                         the same
    """

    def __init__(self, tokenizer: data.LLMTokenizer, style: str, image_tokens: int, max_length: int):
        self.tokenizer, self.style, self.image_tokens, self.max_length = tokenizer, style, image_tokens, max_length
        if style == 'chat' and not tokenizer.chat_template:
            raise SystemExit('error: --prompt chat: the LLM has no chat template; use --prompt v1')

    def text(self, turns: list[tuple[str, str | None]]) -> list[tuple[str, bool]]:
        """[(text, whether it is to be predicted)]; the answer None is the one to be generated."""
        bos, eos = self.tokenizer.bos_token or '', self.tokenizer.eos_token
        parts: list[tuple[str, bool]] = []
        if self.style == 'plain':
            (question, answer), = turns[:1]
            return [(bos + data.IMAGE, False)] + ([(f'{answer}\n', True)] if answer is not None else [])
        if self.style == 'v1':
            parts.append((f'{bos}{V1_SYSTEM} ', False))
            for question, answer in turns:
                parts += [(f'USER: {question} ASSISTANT:', False)] + ([(f' {answer}{eos}', True)] if answer is not None else [])
            return parts
        messages, done = [], ''
        for question, answer in turns:  # what the template puts around an answer is found by leaving the answer out
            messages.append({'role': 'user', 'content': question})
            asked = self.tokenizer.render(messages, add_generation_prompt=True)
            parts.append((asked[len(done):], False))
            if answer is not None:
                messages.append({'role': 'assistant', 'content': answer})
                done = self.tokenizer.render(messages, add_generation_prompt=False)
                if not done.startswith(asked):
                    raise SystemExit('error: --prompt chat: the chat template of the LLM rewrites what was said before; use --prompt v1')
                rest = done[len(asked):]
                if eos not in rest:
                    raise SystemExit(f'error: --prompt chat: the chat template of the LLM does not put its end-of-text token {eos!r} behind an answer, '
                                     f'so no answer would end; use --prompt v1, or name the right eos_token in tokenizer_config.json')
                end = rest.rfind(eos) + len(eos)
                parts += [(rest[:end], True), (rest[end:], False)]
        return parts

    def encode(self, turns: list[tuple[str, str | None]]) -> tuple[list[int], list[bool]]:
        """(token ids, which are to be predicted). The text is tokenized as a whole; a token belongs to the part it ends in."""
        parts = self.text(turns)
        ids, spans = self.tokenizer.encode(''.join(text for text, _ in parts))
        ends, supervised, at, part = [], [], 0, 0
        for text, _ in parts:
            at += len(text)
            ends.append(at)
        out: list[int] = []
        for token, (_, end) in zip(ids, spans):
            while end > ends[part]:
                part += 1
            many = self.image_tokens if token == self.tokenizer.image else 1
            out += [token] * many
            supervised += [parts[part][1]] * many
        return out, supervised

    def __call__(self, chat: data.Chat) -> tuple[list[int], list[bool]]:
        """→ (token ids, which are to be predicted), cut at max_length. Nothing to predict is an error that names the sample."""
        ids, labels = self.encode(chat.turns)
        self.cut = len(ids) > self.max_length
        if not any(labels[1:self.max_length]):
            raise SystemExit(f'error: {chat.name}: ' + (f'its answers are cut off: it has {len(ids)} tokens, {self.image_tokens} of them the '
                             f"image's, and --max_length is {self.max_length}" if any(labels) else 'no answer, so there is nothing to predict'))
        ids, labels = ids[:self.max_length], labels[:self.max_length]
        if ids.count(self.tokenizer.image) != self.image_tokens * (chat.image is not None):
            raise SystemExit(f'error: {chat.name}: ' + (f'its image ({self.image_tokens} tokens) is cut off at --max_length {self.max_length}' if chat.image
                             else 'no image, and sub-stage A needs one'))
        return ids, labels


# ========================================================================================================= the training
def main(cfg: Config, given: set[str] | None = None) -> None:
    """Trains. given: the names of the settings that the user chose; default: those that differ from Config's."""
    if cfg.chat:
        return chat(cfg)
    rank, world, device = clip_adv.start_processes(timedelta(hours=2))      # rank 0 may have an LLM to fetch, or to train
    state, cfg = clip_adv.open_run(cfg, given)
    check_config(cfg, given, world)
    clip_adv.all_agree(state['step'] if state else 0, cfg, world)
    plan = substages(cfg)
    last_step = sum(part.steps for part in plan)
    model, tokenizer = build(cfg, state, rank, device)
    model.to(device).eval()                                                # only the adapters know dropout, and they are told when
    model.llm.checkpointing = cfg.checkpoint
    first_step = state['step'] if state else 0
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda' or cfg.dtype == 'bfloat16')
    run = None

    end = 0
    for sub, chats, steps, batch_size in plan:
        begin, end = end, end + steps
        if first_step >= end and end < last_step:                          # resumed in the other sub-stage
            continue
        # -------------------------------------------------------------------------- what is trained, and on what
        prompt = Prompt(tokenizer, 'plain' if sub == 'A' else model.style, model.image_tokens, cfg.max_length)
        model.tower['geometry'] = 'crop' if sub == 'A' else 'pad'
        optimizer = torch.optim.AdamW(trainable(model, cfg, sub), weight_decay=cfg.wd, betas=(.9, .999), fused=True)
        if state is not None and run is None:
            load_trained(model, state['model'], f'{cfg.out}/train_state.pt')
            if first_step > begin:                                         # else it stopped between the sub-stages
                optimizer.load_state_dict(state['optimizer'])
        step_model = DDP(model, broadcast_buffers=False) if world > 1 else model
        if run is None:
            run = Run(cfg, model, tokenizer, optimizer, rank, first_step, last_step)
            if rank == 0:
                run.introduce(run.arithmetic(plan, world), world, device)
        run.optimizer, run.sub = optimizer, sub
        check_samples(chats, prompt, sub, rank, world, device)
        done = max(first_step - begin, 0)
        stream = data.stream(data.ChatDataset(chats, prompt, fit(model), cfg.seed), len(chats), batch_size=batch_size, first_step=done,
                             last_step=steps, seed=cfg.seed, rank=rank, world=world, workers=cfg.workers, collate=list)
        bar = tqdm(stream, initial=done, total=steps, disable=rank > 0, desc=f'llava_adv {sub}', smoothing=.05,
                   mininterval=.5 if sys.stderr.isatty() else 30)

        # --------------------------------------------------------------------------------------- the training loop
        for step, samples in enumerate(run.read(bar), begin + done):
            logging = (step + 1 - begin) % cfg.log_every == 0 or step + 1 == end
            clock, attack_ms, train_ms = clip_adv.Clock(device if logging else None), 0., 0.
            # The loss is that of the whole update: a sum over tokens divided by their number in the global batch. Means of means
            # would weigh a token by how many others its rank or its micro-batch happens to hold.
            tokens = world_sum(sum(map(sum, (s.labels[1:] for s in samples))), device)
            loss_adv, loss_clean = torch.zeros(2, device=device).unbind()
            micro = [samples[i:i + cfg.micro_batch] for i in range(0, len(samples), cfg.micro_batch)] if cfg.micro_batch else [samples]
            for number, part in enumerate(micro):
                batch = collate(part, tokenizer.pad, cfg.seed).to(device)
                x = batch.images.float() / 255                             # [m, 3, S, S] in [0, 1]
                pictured = [s for s in part if s.image is not None]        # text alone has nothing to attack

                # 1. Attack the images: the maximisation over δ, of the answers' cross-entropy. Samples do not depend on each
                # other, so the sum is the right thing to climb: its gradient is every sample's own.
                x_adv = x
                with clip_adv.frozen(model):
                    if pictured and cfg.eps:
                        shown = batch if len(pictured) == len(part) else collate(pictured, tokenizer.pad).to(device)
                        with amp:
                            prefix = model.prefix(shown)

                        def loss_of(images: Tensor) -> Tensor:
                            with amp:
                                return model(images, shown, prefix=prefix).sum()
                        noise = [data.generator(cfg.seed, f'start {sub}', s.number) for s in pictured]
                        eps, alpha = cfg.eps / 255, cfg.alpha / 255
                        x_adv = attacks.pgd(loss_of, x, eps, alpha, cfg.k, attacks.random_start(x, eps, noise))
                        attacks.check(x, x_adv, eps)
                    attack_ms += clock.lap_ms() or 0
                    if logging:
                        with torch.no_grad(), amp:
                            loss_clean += model(x, batch).sum()
                    clock.lap_ms()                                         # measuring the clean loss is not training

                # 2. Update the weights on the adversarial images only: the minimisation over θ.
                last = number + 1 == len(micro)
                with amp, contextlib.nullcontext() if last or world == 1 else step_model.no_sync():
                    loss = step_model(x_adv, batch, batch.keys).sum()
                    (loss * world / tokens).backward()                     # times W, as DDP averages over the ranks
                loss_adv += loss.detach()
                train_ms += clock.lap_ms() or 0
            grad_norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], cfg.clip)
            if not math.isfinite(grad_norm):                               # the same on all ranks
                run.fail(step, loss_adv.item() / tokens, grad_norm.item())
            rate = rate_at(cfg, step - begin, steps)
            for group in optimizer.param_groups:
                group['lr'] = rate * group['peak']
            optimizer.step()
            optimizer.zero_grad()
            train_ms += clock.lap_ms() or 0

            # 3. Log, save, and stop when asked to, all ranks at the same step.
            if logging:
                adv, clean = (world_sum(v.item(), device) / tokens for v in (loss_adv, loss_clean))
                run.log(step + 1, bar, batch_size, stage=sub, loss_adv=adv, loss_clean=clean, eps=cfg.eps, alpha=cfg.alpha,
                        k=cfg.k if cfg.eps else 0, lr=rate * optimizer.param_groups[0]['peak'], grad_norm=grad_norm.item(),
                        answer_tokens=int(tokens), attack_ms=attack_ms, train_ms=train_ms)
            run.save_or_leave(step + 1, (step + 1 - begin) % cfg.save_every == 0 or step + 1 == end, bar, world, device)
        bar.close()
    opens = 'holds the model' if clip_adv.vision_not_in_hf(model.tower) else 'opens in transformers as a LlavaForConditionalGeneration'
    run.finish(f'{cfg.out} {opens}; measure it with: python eval.py vqa {cfg.out}')


class SubStage(NamedTuple):
    name: str          # 'A' or 'B'
    chats: data.Chats
    steps: int
    batch_size: int


def substages(cfg: Config) -> list[SubStage]:
    """What is trained on, in order."""
    plan = []
    if cfg.steps_a:
        chats = data.load_chats(cfg.data_a or cfg.data, 'train', cfg.image_root_a or cfg.image_root, captions=True)
        plan.append(SubStage('A', chats, cfg.steps_a if cfg.steps_a > 0 else max(1, len(chats) // cfg.batch_a), cfg.batch_a))
    if cfg.steps_b:
        chats = data.load_chats(cfg.data, 'train', cfg.image_root, turns=cfg.turns)
        plan.append(SubStage('B', chats, cfg.steps_b if cfg.steps_b > 0 else max(1, len(chats) // cfg.batch_size), cfg.batch_size))
    return plan


def rate_at(cfg: Config, step: int, steps: int) -> float:
    """Fraction of the peak learning rates: linear warm-up, then cosine to 0, in each sub-stage anew."""
    warmup = math.ceil(cfg.warmup * steps)
    return (step + 1) / warmup if step < warmup else .5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def world_sum(value: float, device: torch.device) -> float:
    """Over the ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float32 if device.type == 'cuda' else torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def trainable(model: LLaVA, cfg: Config, sub: str) -> list[dict]:
    """Says which weights are trained in a sub-stage, makes the adapters, and returns the optimizer's groups."""
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    groups = [{'params': list(model.projector.parameters()), 'lr': 0., 'peak': cfg.lr_a if sub == 'A' else cfg.lr_projector}]
    if sub == 'A':
        return groups
    if cfg.lora_r:
        g = data.generator(cfg.seed, 'adapters', 0)
        for salt, layer in enumerate(m for m in model.llm.modules() if isinstance(m, Linear)):
            layer.add_adapter(cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, 0x9E3779B1 * salt % 2 ** 31, g)
        tuned = [p for name, p in model.llm.named_parameters() if 'lora_' in name]
    else:
        tuned = list(model.llm.parameters())
    # what the features of block N−1 depend on; the last block and the final LayerNorm are kept as they are
    tower = [p for name, p in model.visual.named_parameters()
             if not name.startswith(('ln_post', f'transformer.resblocks.{len(model.visual.transformer.resblocks) - 1}.'))]
    for p in tuned + tower:
        p.requires_grad_(True)
    return [{'params': tuned, 'lr': 0., 'peak': cfg.lr}, *groups, {'params': tower, 'lr': 0., 'peak': cfg.lr_tower}]


# ================================================================================================================== chat
def chat(cfg: Config) -> None:
    """Answers questions about one image, typed at a prompt, until the input ends."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model, tokenizer = load_llava(cfg.init)
    model.to(device)
    prompt = Prompt(tokenizer, prompt_style(cfg.prompt or model.style, tokenizer), model.image_tokens, cfg.max_length)
    try:
        image = fit(model)(data.read_image(Path(cfg.chat)))
    except data.BadImage as e:
        raise SystemExit(f'error: --chat: {e}') from None
    x, turns = image[None].to(device).float() / 255, []
    print(f'{cfg.init} looks at {cfg.chat}; ask, or end with Ctrl-D')
    while True:
        try:
            question = input('> ').strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            continue
        if data.IMAGE in question:
            print(f'{data.IMAGE} cannot stand in a question: the image is there already')
            continue
        turns.append((question if turns else f'{data.IMAGE}\n{question}', None))
        ids, _ = prompt.encode(turns)
        answer = tokenizer.decode(generate(model, x, [ids], 256, model.ends)[0])
        turns[-1] = (turns[-1][0], answer)
        print(answer, flush=True)


# ====================================================================================================================
# Below: formats and plumbing. Nothing of the method is hidden here.
# ====================================================================================================================

# ---------------------------------------------------------------------------------------------------- building a model
def prompt_style(style: str, tokenizer: data.LLMTokenizer) -> str:
    """The one that was asked for; else 'chat' where there is a template that can be trained on, else 'v1'."""
    if style or not tokenizer.chat_template:
        return style or 'v1'
    try:
        Prompt(tokenizer, 'chat', 1, 1 << 30).text([('Is it?', 'Yes')])
        return 'chat'
    except SystemExit as e:  # such as that of llava-1.5-7b-hf, whose answers have no end
        if int(os.environ.get('RANK', 0)) == 0:
            print(f'note: {str(e).removeprefix("error: --prompt chat: ").rpartition("; use")[0]}; so questions are put as Vicuna\'s (--prompt v1)')
        return 'v1'


def fit(model: LLaVA):
    """RGB image → uint8 [3, S, S]"""
    how, size = model.tower['preprocess_cfg'], model.visual.size
    return Fit(size, how['interpolation'], how['resize_mode'], how['mean'] if model.tower['geometry'] == 'pad' else None)


@dataclass
class Fit:
    """A class and not a function inside of one, since workers may have to pickle it."""
    size: int
    interpolation: str
    resize_mode: str
    colour: list[float] | None  # of the padding to a square; None: as resize_mode says

    def __call__(self, image) -> Tensor:
        return data.fit(image if self.colour is None else data.pad_to_square(image, self.colour), self.size, self.interpolation, self.resize_mode)


def build(cfg: Config, state: dict | None, rank: int, device: torch.device) -> tuple[LLaVA, data.LLMTokenizer]:
    """The image tower of --init (or of the checkpoint being resumed), the LLM of --llm, and a new projector; or a LLaVA, whole."""
    dtype = {'': torch.bfloat16 if device.type == 'cuda' and cfg.lora_r else torch.float32, 'float32': torch.float32,
             'bfloat16': torch.bfloat16}[cfg.dtype]
    if is_llava(cfg.init):
        model, tokenizer = load_llava(cfg.init, dtype)
    else:
        if state is None:
            clip, _ = clip_adv.load_clip(cfg.init, arch=cfg.arch, tokenizer=None, what='--init')
            tower, visual = tower_of(clip), clip.visual
        else:
            tower = state['tower']
            visual = make_tower(tower)
        if cfg.llm == 'tiny':
            if rank == 0 and state is None and not tiny_llm(cfg):
                train_tiny_llm(Path(cfg.out) / NEW_LLM, cfg)
            if dist.is_initialized():
                dist.barrier()
        llm, tokenizer = load_llm(str(tiny_llm(cfg) or Path(cfg.out) / 'llm') if cfg.llm == 'tiny' else cfg.llm, dtype)
        with clip_adv.seeded(cfg.seed):
            model = LLaVA(visual, llm, tokenizer.image, tower)
        model.ends = ends_of(llm, tokenizer)
    if state is not None and state['llm'] != fingerprint(model.llm):
        raise SystemExit(f'error: --resume: the LLM in {cfg.llm if cfg.llm != "tiny" else cfg.out + "/llm"} is not the one that the run '
                         f'in {cfg.out} began with')
    model.fingerprint, model.style = fingerprint(model.llm), prompt_style(cfg.prompt or model.style, tokenizer)
    return model, tokenizer


def tower_of(clip: clip_adv.CLIP) -> dict:
    """What LLaVA.tower holds, of a CLIP."""
    whole = clip_adv.whole_of(clip)
    return {k: whole[k] for k in ('vision_cfg', 'embed_dim', 'quick_gelu', 'preprocess_cfg')}


def make_tower(tower: dict) -> clip_adv.ViT:
    how = tower['preprocess_cfg']
    with clip_adv.seeded(0):
        return clip_adv.ViT(tower['vision_cfg'], tower['embed_dim'], tower['quick_gelu'], how['mean'], how['std'])


def ends_of(llm: Llama, tokenizer: data.LLMTokenizer) -> set[int]:
    """The ids that end an answer; Llama 3 has several."""
    more = llm.config.get('eos_token_id')
    return {tokenizer.eos, *(more if isinstance(more, list) else [more] if more is not None else [])}


def fingerprint(llm: Llama) -> str:
    """Of the LLM's own weights, by the beginning of each: enough to notice that another LLM lies there now."""
    digest = hashlib.blake2b(digest_size=8)
    for name, w in sorted(llm.named_parameters()):
        if 'lora_' not in name:
            digest.update(w.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def made_from(cfg: Config) -> list:
    """What the tiny LLM depends on."""
    files = [(name, os.stat(name).st_size, os.stat(name).st_mtime) if os.path.isfile(name) else (name, 0, 0) for name in (cfg.data, cfg.data_a)]
    return [cfg.seed, cfg.turns, *map(list, files)]


NEW_LLM = 'new_llm'  # where the tiny LLM of a run without a checkpoint is; an older run's is in 'llm' until then (see Run.save)


def tiny_llm(cfg: Config) -> Path | None:
    """Where it is, of this run or of one before with the same data and seed."""
    for folder in (Path(cfg.out) / NEW_LLM, Path(cfg.out) / 'llm'):
        if made_here(folder) == made_from(cfg):
            return folder
    return None


def made_here(folder: Path) -> list | None:
    """What a tiny LLM of ours was made from; None: it is none of ours, or not there."""
    return (data.peek_json(folder / 'config.json') or {}).get('made_from')


def train_tiny_llm(folder: Path, cfg: Config, steps: int = 800, batch_size: int = 32, lr: float = 1e-3) -> None:
    """A language model of about a million parameters, trained on the text of the training split and on no image: the stand-in for a
    pretrained LLM. A caption stands where the image will stand, so it learns to answer from a description. To compare what is asked with
    what is said is hard to learn, so that comes alone, first: questions without negation, since "is there a red shape" and "is there
    not a red shape" have opposite answers, and together teach a beginner nothing. In the second half all questions, captions, and, in one of ten
    conversations, no description: which answers a question has, and how often, is all that one who never looks can know.
    """
    pictured = data.load_chats(cfg.data_a or cfg.data, 'train', cfg.image_root_a or cfg.image_root, captions=True).chats
    whole = data.load_chats(cfg.data, 'train', cfg.image_root, turns=1 << 30).chats  # all questions about an image in one conversation
    captions: dict[Path | None, list[str]] = {}
    for chat in pictured:
        captions.setdefault(chat.image, []).append(chat.turns[0][1])
    g = data.generator(cfg.seed, 'tiny llm', 0)
    draw = lambda n: int(torch.randint(n, (), generator=g))

    def described(chat: data.Chat, turns: list[tuple[str, str]], bare_too: bool) -> list[tuple[str, str]]:
        of = captions.get(chat.image, []) if chat.image and not (bare_too and draw(10) == 0) else []
        bare = [(q.replace(f'{data.IMAGE}\n', '').replace(data.IMAGE, ''), a) for q, a in turns]
        return [(f'{of[draw(len(of))]}\n{bare[0][0]}', bare[0][1]), *bare[1:]] if of else bare
    words = [text for chat in pictured + whole for q, a in chat.turns for text in (f'USER: {q}', f' ASSISTANT: {a}')]
    tokenizer = data.train_llm_tokenizer([text.replace(data.IMAGE, '') for text in words], 2048)
    ask = Prompt(tokenizer, 'chat', 0, 2048)

    def texts(turns_of, bare_too: bool) -> list[list[int]]:
        """Token ids of the conversations, cfg.turns questions each."""
        kept = [(chat, turns_of(chat)) for chat in whole]
        return [ask.encode(described(chat, turns[i:i + cfg.turns], bare_too))[0] for chat, turns in kept for i in range(0, len(turns), cfg.turns)]
    early = texts(lambda chat: [turn for turn in chat.turns if not re.search(rf'\b(no|not)\b|{data.CAPTION_QUESTION}', turn[0])], bare_too=False)
    late = texts(lambda chat: chat.turns, bare_too=True)
    early = early or late  # a file may have no such question
    captioning = [tokenizer.encode(f'{tokenizer.bos_token}{q}{a}\n')[0] for chat in pictured for q, a in described(chat, chat.turns, False)]
    colon = tokenizer.encode(' ASSISTANT:')[0][-1]

    config = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'vocab_size': -(-tokenizer.vocab_size // 64) * 64, 'hidden_size': 128,
              'intermediate_size': 384, 'num_hidden_layers': 4, 'num_attention_heads': 4, 'num_key_value_heads': 4, 'hidden_act': 'silu',
              'max_position_embeddings': 2048, 'rms_norm_eps': 1e-5, 'rope_theta': 10000., 'tie_word_embeddings': True, 'attention_bias': False,
              'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos, 'pad_token_id': tokenizer.pad, 'made_from': made_from(cfg)}
    with clip_adv.seeded(cfg.seed):
        llm = Llama(config)
    for name, p in llm.named_parameters():  # norms stay at 1; what writes into the residual stream starts smaller, as in GPT-2
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=g) * (.02 / math.sqrt(8) if name.endswith(('o_proj.weight', 'down_proj.weight')) else .05)
    for layer in llm.model.layers:  # a token looks at its like from the start: what is asked at what is said
        layer.self_attn.k_proj.weight.data = layer.self_attn.q_proj.weight.data.clone()
    llm.tie()
    optimizer = torch.optim.AdamW(llm.parameters(), lr=lr, weight_decay=.01, betas=(.9, .95), fused=True)
    with tqdm(range(steps), desc='tiny LLM', mininterval=.5 if sys.stderr.isatty() else 30) as bar:
        for step in bar:
            kinds = [early if step < steps // 2 else late if draw(8) else captioning for _ in range(batch_size)]
            drawn = [kind[draw(len(kind))] for kind in kinds]
            batch = collate([data.Sample(None, ids, [False] + [True] * (len(ids) - 1), 0) for ids in drawn], tokenizer.pad)
            hidden = llm(llm.model.embed_tokens(batch.ids))[batch.rows, batch.columns]
            loss = F.cross_entropy(llm.lm_head(hidden), batch.targets, reduction='none')
            # an answer weighs as much as a hundred words of a question: it is what has to be read out of the description
            weight = torch.where(batch.ids[batch.rows, batch.columns] == colon, 100., 1.)
            loss = (loss * weight).sum() / weight.sum()
            loss.backward()
            nn.utils.clip_grad_norm_(llm.parameters(), 1.)
            optimizer.param_groups[0]['lr'] = lr * min((step + 1) / 20, .5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f'loss {loss.item():.3f}', refresh=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_directory(folder, config, dict(llm.state_dict()), tokenizer, 2048)


def check_samples(chats: data.Chats, prompt: Prompt, sub: str, rank: int, world: int, device: torch.device) -> None:
    """Before hours of training, not in the middle: every sample has something to predict (else Prompt raises), and how many are cut."""
    mine = tqdm(chats.chats[rank::world], desc=f'checking {sub}', disable=rank > 0 or len(chats) < 50_000)
    cut = int(world_sum(sum(prompt(chat) and prompt.cut for chat in mine), device))
    if cut and rank == 0:
        print(f'warning: {cut} of {len(chats)} conversations are cut at {prompt.max_length} tokens; see --max_length', flush=True)


# ------------------------------------------------------------------------------------------------ language models on disk
MODEL = 'model.safetensors'
LLM_DEFAULTS = {  # of Hugging Face's LlamaConfig: what a config.json leaves out
    'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': None,
    'head_dim': None, 'rms_norm_eps': 1e-6, 'rope_theta': 10000., 'rope_scaling': None, 'tie_word_embeddings': False, 'attention_bias': None,
    'mlp_bias': False, 'hidden_act': 'silu', 'model_type': 'llama', 'use_sliding_window': False}


def complete(config: dict, where: str = 'config.json') -> dict:
    """The part of a Hugging Face configuration that decides what is computed, with its defaults; what we would not obey is an error."""
    cfg = {name: config.get(name, default) for name, default in LLM_DEFAULTS.items()}
    clip_adv.whole_numbers(cfg, {key: 1 for key, default in LLM_DEFAULTS.items() if type(default) is int}, f'error: {where}: ')
    rope = dict(config.get('rope_parameters') or cfg['rope_scaling'] or {})  # the first is how transformers 5 writes it
    cfg['rope_theta'] = rope.pop('rope_theta', cfg['rope_theta'])
    kind = rope.get('rope_type', rope.get('type', 'default'))
    cfg['rope_scaling'] = None if kind == 'default' else {**rope, 'rope_type': kind}
    kv, head = cfg['num_key_value_heads'], cfg['head_dim']
    cfg['num_key_value_heads'] = cfg['num_attention_heads'] if kv is None else kv
    cfg['head_dim'] = cfg['hidden_size'] // cfg['num_attention_heads'] if head is None else head
    qwen = cfg['model_type'] == 'qwen2'
    cfg['o_bias'] = bool(cfg['attention_bias']) and not qwen  # Qwen2 has biases on q, k and v, Llama's attention_bias means all four
    cfg['attention_bias'] = qwen or bool(cfg['attention_bias'])
    for name, allowed in (('model_type', ('llama', 'qwen2')), ('hidden_act', ('silu',)), ('use_sliding_window', (False,))):
        if cfg[name] not in allowed:
            raise SystemExit(f'error: {where}: {name} is {cfg[name]!r}; supported: {", ".join(map(str, allowed))}')
    needed = {'default': (), 'linear': ('factor',), 'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')}
    if kind not in needed or any(key not in rope for key in needed[kind]):
        raise SystemExit(f'error: {where}: rope scaling {rope}; supported: default, linear (factor), llama3 ({", ".join(needed["llama3"])})')
    if cfg['num_attention_heads'] % cfg['num_key_value_heads'] or cfg['head_dim'] % 2:
        raise SystemExit(f'error: {where}: {cfg["num_attention_heads"]} heads of width {cfg["head_dim"]} with {cfg["num_key_value_heads"]} key heads')
    return cfg


def load_llm(path: str, dtype: torch.dtype) -> tuple[Llama, data.LLMTokenizer]:
    """A directory, a .gguf file or a repository id → (Llama, tokenizer). The embedding is enlarged where <image> and <pad> need rows.

    The model is made without memory, then filled tensor by tensor, so that no second copy of the weights is ever held
    (except for a legacy .bin file, the kind from before torch 1.6, which can only be read whole).
    """
    place = Path(path)
    if path.endswith('.gguf'):
        config, tokenizer, weights = read_gguf(place)
    else:
        place = data.locate(path, '--llm')
        config = data.read_json(place / 'config.json', f'--llm {path}', dict)
        tokenizer, weights = data.read_llm_tokenizer(place), clip_adv.stored(place, clip_adv.HF_FILES)
    rows = complete(config, f'--llm {path}')['vocab_size']
    if tokenizer.vocab_size > config.get('vocab_size', 32000):
        config = {**config, 'vocab_size': -(-tokenizer.vocab_size // 64) * 64}  # a multiple of 64 suits matrix units
    with torch.device('meta'):
        llm = Llama(config)
    fill(llm, weights, dtype, path, rows)
    return llm.eval(), tokenizer


def fill(llm: Llama, weights, dtype: torch.dtype, where: str, rows: int) -> None:
    """Strict: every parameter (on the meta device) gets its weight, in the dtype; else an error that lists names and shapes.

    rows: of embedding and head in the file. The model's may have more: the new ones are the mean, which no token is likelier than.
    """
    slots = dict(llm.named_parameters(remove_duplicate=False))
    tied = {'lm_head.weight'} if llm.cfg['tie_word_embeddings'] else set()
    wrong, found = [], set()
    for name, w in weights:
        if name not in slots:
            wrong += [] if name.endswith('rotary_emb.inv_freq') else [f'{name}: surplus, {tuple(w.shape)}']  # (a buffer of older versions)
            continue
        want = slots[name].shape
        grown = name.endswith(('embed_tokens.weight', 'lm_head.weight')) and w.shape == (rows, want[1]) and rows < want[0]
        if w.shape != want and not grown:
            wrong.append(f'{name}: {tuple(w.shape)}, {tuple(want)} expected')
            found.add(name)
            continue
        if not w.is_floating_point():
            wrong.append(f'{name}: {w.dtype}, numbers with a fraction expected (quantised weights are not supported)')
        filled = torch.empty(want, dtype=dtype)
        filled[:len(w)] = w
        if grown:
            filled[len(w):] = w.float().mean(0)
        owner, _, leaf = name.rpartition('.')
        setattr(llm.get_submodule(owner), leaf, nn.Parameter(filled))
        found.add(name)
    wrong += [f'{name}: missing, {tuple(slots[name].shape)} expected' for name in sorted(set(slots) - found - tied)]
    if tied <= found and tied and not wrong and not torch.equal(llm.lm_head.weight, llm.model.embed_tokens.weight):
        wrong.append('lm_head.weight: surplus, since tie_word_embeddings is true, and it is not the embedding')
    if wrong:
        raise SystemExit(f'error: {where} is of another architecture:\n  ' + '\n  '.join(wrong))
    llm.tie()


def read_gguf(file: Path):
    """(config, tokenizer, weights) of a GGUF file of a Llama or Qwen2; quantised weights are expanded, one at a time."""
    try:
        import gguf
    except ImportError:
        raise SystemExit(f'error: --llm {file}: reading GGUF needs the package gguf: pip install gguf') from None
    try:
        reader = gguf.GGUFReader(str(file))
    except (OSError, ValueError, IndexError) as e:
        raise SystemExit(f'error: --llm {file}: {e}') from None
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
    kind = fields.get('general.architecture')
    if kind not in ('llama', 'qwen2'):
        raise SystemExit(f'error: --llm {file}: the architecture is {kind!r}; supported: llama, qwen2')
    of = lambda name, default=None: fields.get(f'{kind}.{name}', default)
    tensors = {t.name: t for t in reader.tensors}
    if 'rope_freqs.weight' in tensors or of('rope.scaling.type') not in (None, 'none'):
        raise SystemExit(f'error: --llm {file}: scaled rotary embeddings are not read from GGUF; use a directory with a config.json')
    heads = of('attention.head_count')
    tokenizer = data.from_gguf({k.removeprefix('tokenizer.').removeprefix('ggml.'): v for k, v in fields.items() if k.startswith('tokenizer.')}, str(file))
    config = {'model_type': kind, 'architectures': ['Qwen2ForCausalLM' if kind == 'qwen2' else 'LlamaForCausalLM'], 'hidden_act': 'silu',
              'vocab_size': len(fields['tokenizer.ggml.tokens']), 'hidden_size': of('embedding_length'), 'num_attention_heads': heads,
              'intermediate_size': of('feed_forward_length'), 'num_hidden_layers': of('block_count'), 'max_position_embeddings': of('context_length'),
              'num_key_value_heads': of('attention.head_count_kv', heads), 'rms_norm_eps': of('attention.layer_norm_rms_epsilon'),
              'rope_theta': of('rope.freq_base', 10000.), 'tie_word_embeddings': 'output.weight' not in tensors,
              'eos_token_id': tokenizer.eos, 'bos_token_id': tokenizer.bos, 'pad_token_id': tokenizer.pad}
    parts = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
             'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj', 'attn_norm': 'input_layernorm',
             'ffn_norm': 'post_attention_layernorm'}
    whole = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}

    def weights():
        for name, tensor in tensors.items():
            w = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            stem, _, leaf = name.rpartition('.')
            if name.startswith('blk.'):
                _, layer, part = stem.split('.')
                if kind == 'llama' and part in ('attn_q', 'attn_k'):  # rows in ggml's order, where the pairs of a rotation are neighbours
                    n = heads if part == 'attn_q' else config['num_key_value_heads']
                    w = w.view(n, len(w) // n // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
                yield f'model.layers.{layer}.{parts.get(part, part)}.{leaf}', w
            else:
                yield f'{whole.get(stem, stem)}.{leaf}', w
    return config, tokenizer, weights()


# -------------------------------------------------------------------------------------------------------- LLaVA on disk
def hf_config(model: LLaVA) -> dict:
    llm, vision = model.llm, clip_adv.hf_vision(model.tower)
    if clip_adv.vision_not_in_hf(model.tower):  # a model_type that transformers does not know: it stops there, and does not fill in what it misses
        vision = {'model_type': 'open_clip_vit', **{k: model.tower[k] for k in ('vision_cfg', 'embed_dim', 'quick_gelu', 'preprocess_cfg')}}
    tied = llm.cfg['tie_word_embeddings']  # at both levels: which of them counts has changed between versions of transformers
    return {'architectures': ['LlavaForConditionalGeneration'], 'model_type': 'llava', 'image_token_index': model.image_id,
            'image_seq_length': model.image_tokens, 'projector_hidden_act': 'gelu', 'multimodal_projector_bias': True,
            'vision_feature_layer': -2, 'vision_feature_select_strategy': 'default', 'prompt_style': model.style, 'tie_word_embeddings': tied,
            'text_config': {**llm.config, 'tie_word_embeddings': tied}, 'vision_config': vision,
            'dtype': str(llm.model.embed_tokens.weight.dtype).removeprefix('torch.')}


def chat_template(model: LLaVA, tokenizer: data.LLMTokenizer) -> str | None:
    """The template of what the model was tuned on, for transformers, which gives it images and texts as a list."""
    template = data.SHORT_TEMPLATE.replace('{{ bos_token }}', f'{{{{ bos_token }}}}{V1_SYSTEM} ') if model.style == 'v1' else tokenizer.chat_template
    if not template or template.startswith(data.TAKES_PARTS) or template == tokenizer.chat_template and tokenizer.takes_parts:
        return template
    return data.TAKES_PARTS + template


def export(model: LLaVA, tokenizer: data.LLMTokenizer, out: Path, max_length: int) -> None:
    """The whole model, adapters merged, as a LlavaForConditionalGeneration that transformers opens, with the names that its save_pretrained writes."""
    weights, wrong = {}, clip_adv.vision_not_in_hf(model.tower)
    for name, w in model.visual.state_dict().items():
        weights |= {f'vision_tower.{name}': w} if wrong else {n.replace('vision_model.', 'vision_tower.', 1): t for n, t in clip_adv.to_hf(f'visual.{name}', w)}
    weights |= {f'multi_modal_projector.{name}': w for name, w in model.projector.state_dict().items()}
    merged = {f'{name}.weight': m.merged() for name, m in model.llm.named_modules() if isinstance(m, Linear)}
    for name, w in model.llm.state_dict().items():
        if 'lora_' not in name:
            weights[f'language_model.{name}'] = merged.get(name, w)
    processor = {'processor_class': 'LlavaProcessor', 'patch_size': model.visual.patch, 'vision_feature_select_strategy': 'default',
                 'image_token': data.IMAGE, 'num_additional_image_tokens': 1}
    how, size, pad = model.tower['preprocess_cfg'], model.visual.size, model.tower['geometry'] == 'pad'
    generation = {'bos_token_id': tokenizer.bos, 'eos_token_id': sorted(ends_of(model.llm, tokenizer)), 'pad_token_id': tokenizer.pad}
    extra = {'preprocessor_config.json': clip_adv.hf_preprocessor(how, size, 'LlavaProcessor', pad), 'processor_config.json': processor,
             'generation_config.json': {k: v for k, v in generation.items() if v is not None}}
    for name, content in extra.items():
        clip_adv.write(out / name, lambda file: file.write_text(json.dumps(content, indent=2), encoding='utf-8'))
    save_directory(out, hf_config(model), weights, tokenizer, max_length, chat_template(model, tokenizer))
    if wrong:
        print(f'note: {out}: Hugging Face\'s CLIP cannot express this image tower ({"; ".join(wrong)}), so transformers does not open the directory; '
              f'eval.py, --init and --chat do')


def save_directory(folder: Path, config: dict, weights: dict[str, Tensor], tokenizer: data.LLMTokenizer, max_length: int, template: str | None = None) -> None:
    """config.json comes last: where it is, the rest is there and belongs to it.   template: of the chat, instead of the tokenizer's own"""
    from safetensors.torch import save_file
    (folder / 'config.json').unlink(missing_ok=True)
    tied = config.get('tie_word_embeddings')
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items() if not (tied and name.endswith('lm_head.weight'))}
    clip_adv.write(folder / MODEL, lambda file: save_file(weights, file, metadata={'format': 'pt'}))
    for name, text in {**tokenizer.files(max_length, template), 'config.json': json.dumps(config, indent=2)}.items():
        clip_adv.write(folder / name, lambda file: file.write_text(text, encoding='utf-8'))


def is_llava(path: str) -> bool:
    place = data.locate(path) if data.is_repository(path) else Path(path)
    return clip_adv.model_type(place) == 'llava' or has_adapters(place)


def has_adapters(place: Path) -> bool:
    """The layout of the released Δ²LLaVA, and of LLaVA's own LoRA runs."""
    return (place / 'adapter_config.json').is_file() and (place / 'non_lora_trainables.bin').is_file()


def load_llava(path: str, dtype: torch.dtype = torch.float32) -> tuple[LLaVA, data.LLMTokenizer]:
    """A LLaVA, from wherever it comes → (model, tokenizer).

    path: a run directory; any LLaVA directory of Hugging Face's format with a CLIP tower and a Llama or Qwen2; adapters as the authors of
    Δ²LLaVA publish them (see load_adapters); or a repository id of such.  dtype: of the LLM; tower and projector are float32.
    """
    place = data.locate(path)
    if has_adapters(place):
        return load_adapters(place, dtype)
    if not is_llava(str(place)):
        kind = 'which is a CLIP' if (place / 'open_clip_config.json').is_file() or clip_adv.model_type(place) == 'clip' else ''
        kind = 'which holds a run that has not ended: go on with --resume' if (place / 'train_state.pt').exists() and not kind else kind
        raise SystemExit(f'error: {path} is no LLaVA directory (no config.json whose model_type is llava, no adapters){", " * bool(kind)}{kind}')
    config = data.read_json(place / 'config.json', path, dict)
    if missing := {key for key in ('text_config', 'vision_config') if not isinstance(config.get(key), dict)}:
        raise SystemExit(f'error: {path}/config.json: no {", ".join(sorted(missing))}; expected the format of transformers (such as llava-hf/llava-1.5-7b-hf)')
    layer, select = config.get('vision_feature_layer', -2), config.get('vision_feature_select_strategy', 'default')
    if layer != -2 or select != 'default' or config.get('projector_hidden_act', 'gelu') != 'gelu':
        raise SystemExit(f'error: {path}/config.json: vision_feature_layer {layer}, vision_feature_select_strategy {select}, projector_hidden_act '
                         f'{config.get("projector_hidden_act")}; supported: -2, default, gelu')
    tokenizer, tower = data.read_llm_tokenizer(place), read_tower(place, config['vision_config'])
    text = config['text_config'] | ({'tie_word_embeddings': config['tie_word_embeddings']} if 'tie_word_embeddings' in config else {})
    rows = complete(text, f'{path}/config.json')['vocab_size']
    with torch.device('meta'):
        llm = Llama({**text, 'vocab_size': max(rows, tokenizer.vocab_size)})
    model = joined(tower, llm, config.get('image_token_index', config.get('image_token_id')), config.get('prompt_style', ''))
    if tokenizer.image != model.image_id:
        raise SystemExit(f'error: {path}: {data.IMAGE} is token {tokenizer.image}, config.json says {model.image_id}')
    projector, visual = {}, {}

    def language():
        for name, w in clip_adv.once(((llava_name(n), w) for n, w in clip_adv.stored(place, clip_adv.HF_FILES)), path):
            if name.startswith('vision_tower.'):
                visual[name] = w
            elif name.startswith('multi_modal_projector.'):
                projector[name] = w
            else:
                yield name, w
    fill(llm, language(), dtype, path, rows)
    shapes = {f'multi_modal_projector.{name}': w.shape for name, w in model.projector.state_dict().items()}
    clip_adv.fitting(projector, shapes, f'the projector of {path}')
    model.projector.load_state_dict({name.removeprefix('multi_modal_projector.'): w for name, w in projector.items()})
    shapes = {f'visual.{name}': w.shape for name, w in model.visual.state_dict().items()}
    if clip_adv.vision_not_in_hf(tower):
        visual = clip_adv.fitting({n.replace('vision_tower.', 'visual.', 1): w for n, w in visual.items()}, shapes, f'the image tower of {path}')
    else:
        visual = clip_adv.from_hf(visual, shapes, f'the image tower of {path}', 'vision_tower.')
    model.visual.load_state_dict({name.removeprefix('visual.'): w for name, w in visual.items()})
    model.ends = ends_of(llm, tokenizer)
    return model.eval(), tokenizer


def llava_name(name: str) -> str:
    """One name for each weight of Hugging Face's LLaVAs, of those that transformers gave it at one time or another."""
    name = name.removeprefix('model.') if name.startswith(('model.language_model.', 'model.vision_tower.', 'model.multi_modal_projector.')) else name
    if name.startswith('vision_tower.'):
        return name.replace('vision_tower.vision_model.', 'vision_tower.', 1)
    if name.startswith('multi_modal_projector.'):
        return name
    name = name.removeprefix('language_model.')  # transformers once wrote language_model.layers and lm_head at the top
    return name if name.startswith(('model.', 'lm_head.')) else f'model.{name}'


def joined(tower: dict, llm: Llama, image_id: int, style: str) -> LLaVA:
    with clip_adv.seeded(0):
        return LLaVA(make_tower(tower), llm, image_id, tower, style)


def load_adapters(place: Path, dtype: torch.dtype) -> tuple[LLaVA, data.LLMTokenizer]:
    """The layout of the released Δ²LLaVA: adapters of PEFT for the LLM that adapter_config.json names, and, in non_lora_trainables.bin, projector
    and image tower, that one in open_clip's names.   official: Open-LLaVA-NeXT/llava/train/train.py, llava/model/builder.py"""
    config, lora = (data.read_json(place / name, str(place), dict) for name in ('config.json', 'adapter_config.json'))
    expected = [(config, 'mm_projector_type', ('mlp2x_gelu',)), (config, 'mm_vision_select_layer', (-2,)), (config, 'mm_vision_select_feature', ('patch', None)),
                (config, 'image_aspect_ratio', ('pad', 'square', None)), (config, 'mm_use_im_start_end', (False, None)), (config, 'mm_patch_merge_type', ('flat', None)),
                (lora, 'peft_type', ('LORA',)), (lora, 'bias', ('none', None)), (lora, 'init_lora_weights', (True, False, None, 'gaussian')), *((lora, key, (False, None, [], {})) for key in (
                    'fan_in_fan_out', 'modules_to_save', 'rank_pattern', 'alpha_pattern', 'use_rslora', 'use_dora', 'layers_to_transform'))]
    for of, key, allowed in expected:
        if of.get(key) not in allowed:
            raise SystemExit(f'error: {place}/{"config" if of is config else "adapter_config"}.json: {key} is {of.get(key)!r}; supported: {allowed[0]!r}')
    for key, fits in (('r', lambda x: type(x) is int and x > 0), ('lora_alpha', lambda x: isinstance(x, (int, float))), ('target_modules', lambda x: isinstance(x, list))):
        if not fits(lora.get(key)):
            raise SystemExit(f'error: {place}/adapter_config.json: {key} is {lora.get(key)!r}; expected ' + {'r': 'a whole number', 'lora_alpha': 'a number'}.get(key, 'a list of names'))
    base = lora.get('base_model_name_or_path') or ''
    try:
        llm, tokenizer = load_llm(base, dtype)
    except SystemExit as e:
        raise SystemExit(f'{e}\n(it is the language model that {place}/adapter_config.json names in base_model_name_or_path, where another place can be named)') from None

    # the adapters into the weights
    own_name = lambda name: name.removeprefix('base_model.model.').replace('.default.weight', '.weight')
    files = [(None, 'adapter_model.safetensors'), (None, 'adapter_model.bin')]
    found = dict(clip_adv.once(((own_name(n), w) for n, w in clip_adv.stored(place, files)), place))
    targets = lora['target_modules']
    layers = {name: m for name, m in llm.named_modules() if isinstance(m, Linear) and name.rpartition('.')[2] in targets}
    clip_adv.fitting(found, {f'{name}.{part}.weight': torch.Size(shape) for name, m in layers.items() for part, shape in
                             (('lora_A', (lora['r'], m.in_features)), ('lora_B', (m.out_features, lora['r'])))}, f'{place}/adapter_model')
    for name, m in layers.items():
        change = lora['lora_alpha'] / lora['r'] * found[f'{name}.lora_B.weight'].float() @ found[f'{name}.lora_A.weight'].float()
        m.weight.data = (m.weight.data.float() + change).to(dtype)

    # projector and image tower
    projector, visual, others = {}, {}, {}
    file = place / 'non_lora_trainables.bin'
    own_name = lambda name: re.sub(r'^(vision_tower\.)+', 'vision_tower.', re.sub(r'^(base_model\.)?(model\.)*', '', name))
    for name, w in clip_adv.once(((own_name(n), w) for n, w in clip_adv.stored(file, [])), file):
        if name.startswith('mm_projector.'):
            projector[name.removeprefix('mm_projector.')] = w
        elif name.startswith('vision_tower.'):
            visual[name.removeprefix('vision_tower.')] = w
        else:
            others[name] = w
    clip_adv.fitting(others, {}, f'{place}/non_lora_trainables.bin')
    proj = visual.pop('proj', None)  # into CLIP's shared space; of no use here
    tower = open_clip_tower(place, config, visual)
    if proj is not None and (proj.ndim != 2 or len(proj) != tower['vision_cfg']['width']):
        raise SystemExit(f'error: the image tower of {place} is of another architecture:\n  proj: {tuple(proj.shape)}, ({tower["vision_cfg"]["width"]}, …) expected')
    model = joined(tower, llm, tokenizer.image, 'v1')
    names = {'linear_1': '0', 'linear_2': '2'}
    shapes = {n.replace(ours, theirs): w.shape for n, w in model.projector.state_dict().items() for ours, theirs in names.items() if n.startswith(ours)}
    clip_adv.fitting(projector, shapes, f'the projector of {place}')
    model.projector.load_state_dict({n.replace(theirs, ours, 1): w for n, w in projector.items() for ours, theirs in names.items() if n.startswith(theirs)})
    clip_adv.load_weights(model.visual, visual, f'the image tower of {place}')
    model.ends = ends_of(llm, tokenizer)
    return model.eval(), tokenizer


def open_clip_tower(place: Path, config: dict, weights: dict[str, Tensor]) -> dict:
    """What LLaVA.tower holds, of a tower in open_clip's names: of the open_clip_config.json in the directory, or, as the authors publish it without
    one, from the weights' shapes. The width of the heads leaves no trace there: it is that of open_clip's towers of this width."""
    if (place / 'open_clip_config.json').is_file():
        whole, _ = clip_adv.description(place, '', '')
        whole, how = clip_adv.complete(whole['model_cfg'], whole['preprocess_cfg'], str(place))
        vision, quick = whole['vision_cfg'], whole['quick_gelu']
    else:
        if missing := {'conv1.weight', 'positional_embedding', 'transformer.resblocks.0.mlp.c_fc.weight'} - set(weights):
            raise SystemExit(f'error: {place}/non_lora_trainables.bin has no image tower in open_clip\'s names: no {", ".join(sorted(missing))}')
        width, _, patch, _ = weights['conv1.weight'].shape
        head = {1280: 80, 1408: 88, 1664: 104, 1792: 112}.get(width, 64)
        hidden = len(weights['transformer.resblocks.0.mlp.c_fc.weight'])
        bare = 'ln_pre.weight' not in weights
        vision = clip_adv.VISION | dict(width=width, patch_size=patch, image_size=math.isqrt(len(weights['positional_embedding']) - 1) * patch, head_width=head,
                                        layers=1 + max(int(n.split('.')[2]) for n in weights if n.startswith('transformer.resblocks.')), no_ln_pre=bare,
                                        mlp_ratio=clip_adv.mlp_ratio(hidden, width))
        quick = 'quickgelu' in str(config.get('mm_vision_tower', '')).lower()
        how = clip_adv.OUR_PREPROCESS  # official: Open-LLaVA-NeXT/clip_preprocess/bv336/preprocessor_config.json
        print(f'note: {place} does not say what its image tower is; taken from its weights: {width} wide, heads of {head}, {vision["layers"]} blocks, '
              f'{"no " * bare}ln_pre, {"QuickGELU" if quick else "GELU"}')
    if (place / 'preprocessor_config.json').is_file():
        how, _ = clip_adv.from_hf_preprocessor(place, vision['image_size'])
    return {'vision_cfg': vision, 'embed_dim': vision['width'], 'quick_gelu': quick, 'geometry': 'pad' if config.get('image_aspect_ratio') == 'pad' else 'crop',
            'preprocess_cfg': clip_adv.complete({}, how)[1]}


def read_tower(place: Path, vision: dict) -> dict:
    """What LLaVA.tower holds, from a Hugging Face directory."""
    if vision.get('model_type') == 'open_clip_vit':
        tower = {k: vision[k] for k in ('vision_cfg', 'embed_dim', 'quick_gelu')}
    elif vision.get('model_type') == 'clip_vision_model':
        cfg, quick = clip_adv.from_hf_vision(vision, str(place))
        tower = {'vision_cfg': clip_adv.VISION | cfg, 'embed_dim': vision.get('projection_dim', 512), 'quick_gelu': quick}
    else:
        raise SystemExit(f'error: {place}/config.json: the image tower is a {vision.get("model_type")!r}; supported: clip_vision_model')
    how, pad = clip_adv.from_hf_preprocessor(place, tower['vision_cfg']['image_size'])
    return tower | {'preprocess_cfg': clip_adv.complete({}, vision.get('preprocess_cfg', how))[1], 'geometry': 'pad' if pad else 'crop'}


# ----------------------------------------------------------------------------------------------------------- run directory
LLAVA_SNIPPET = """from transformers import AutoProcessor, LlavaForConditionalGeneration
model, processor = LlavaForConditionalGeneration.from_pretrained('RUN'), AutoProcessor.from_pretrained('RUN')
chat = [{'role': 'user', 'content': [{'type': 'image', 'path': 'cat.jpg'}, {'type': 'text', 'text': 'what color is the shape?'}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
print(processor.decode(model.generate(**inputs, max_new_tokens=9)[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True))"""


def load_trained(model: LLaVA, weights: dict[str, Tensor], where: str) -> None:
    """The weights that training changes; all of those in the checkpoint must be in the model."""
    ours = model.state_dict()
    if wrong := [n for n, w in weights.items() if n not in ours or ours[n].shape != w.shape]:
        raise SystemExit(f'error: {where} is of another architecture: {", ".join(wrong[:20])}')
    model.load_state_dict(weights, strict=False)


class Run(clip_adv.Run):
    @property
    def HEADER(self) -> str:
        library = '' if clip_adv.vision_not_in_hf(self.model.tower) else 'library_name: transformers\n'
        return f'---\n{library}pipeline_tag: image-text-to-text\ntags:\n- llava\n- adversarial-robustness\n---\n'

    def arithmetic(self, plan: list[SubStage], world: int) -> str:
        cfg, model = self.cfg, self.model
        count = lambda m: sum(p.numel() for p in m.parameters())
        attack = (f'ε {cfg.eps:g}/255, α {cfg.alpha:g}/255 × {cfg.k} steps; {cfg.k + 1} forward-backward passes per update' if cfg.eps
                  else 'ε 0: no attack; 1 forward-backward pass per update')
        lines = [f'LLaVA: tower {count(model.visual) / 1e6:.2f} M, projector {count(model.projector) / 1e6:.2f} M, LLM {count(model.llm) / 1e6:.2f} M '
                 f'parameters; {model.image_tokens} tokens per image at {model.visual.size} px; {attack}']
        for sub, chats, steps, size in plan:
            micro = f' in micro-batches of {cfg.micro_batch}' if cfg.micro_batch else ''
            lines.append(f'{sub}: {chats.note}; global batch {size} = {world} process{"es" * (world > 1)} × {size // world}{micro}; {steps} updates = '
                         f'{steps * size / len(chats):.2f} epochs')
        return '\n'.join(lines)

    def contents(self) -> dict:
        """What training changes: projector, tower, adapters; the LLM's own weights only where they are trained."""
        whole = self.sub == 'B' and not self.cfg.lora_r
        return {'model': {n: w for n, w in self.model.state_dict().items() if whole or not n.startswith('llm.') or 'lora_' in n},
                'tower': {k: v for k, v in self.model.tower.items() if k != 'geometry'}, 'llm': self.model.fingerprint}

    def save(self, step: int) -> None:
        super().save(step)
        new = self.out / NEW_LLM
        if self.rank == 0 and made_here(new):  # from now on the run in this folder is ours, and so is its LLM
            shutil.rmtree(self.out / 'llm', ignore_errors=True)
            new.rename(self.out / 'llm')

    def export(self, step: int) -> None:
        if step == self.steps:  # gigabytes, for a 7B model: once, at the end
            export(self.model, self.tokenizer, self.out, self.cfg.max_length)

    def about(self, step: int) -> str:
        cfg, name, wrong = self.cfg, self.out.name, clip_adv.vision_not_in_hf(self.model.tower)
        kind = 'on adversarial images only' if cfg.eps else 'on clean images, as a baseline'
        load = 'It is written when training has ended.' if step < self.steps else (
            f'transformers does not open it, since its CLIPVisionModel cannot be the image tower: {"; ".join(wrong)}. This project\'s `eval.py`, '
            f'`llava_adv.py --init` and `--chat` do.' if wrong else f'From the folder that `{name}` is in, with transformers 5:\n\n{clip_adv.snippet(LLAVA_SNIPPET, name)}'.rstrip())
        return (f'A LLaVA tuned {kind}: stage 2 of [Double Visual Defense](https://arxiv.org/abs/2501.09446), with `llava_adv.py`, commit {clip_adv.commit()}. '
                f'Image tower: `{cfg.init}`; language model: `{"of --init" if is_llava(cfg.init) else cfg.llm}`.\n\n{clip_adv.listed(step, self.steps, self.facts)}\n\n'
                f'### Load it\n\n{load}\n\n### Limits\n\n{clip_adv.common_limits(cfg)}\n'
                f'- Images are seen at {self.model.visual.size} × {self.model.visual.size} pixels, as {self.model.image_tokens} tokens; one image to a conversation.\n'
                f'- It was tuned on what is named above; how it answers other questions was not measured.')


def check_config(cfg: Config, given: set[str] | None, world: int) -> None:
    """Fills in α; refuses what cannot be meant, with what, value, limit and flag."""
    llava = is_llava(cfg.init)
    clip_adv.refuse(clip_adv.wrong_attack(cfg) + [
            (cfg.steps_a < -1 or cfg.steps_b < -1 or not (cfg.steps_a or cfg.steps_b),
             f'--steps_a {cfg.steps_a} --steps_b {cfg.steps_b}: must be -1 (one epoch), 0 or more, and not both 0'),
            (cfg.batch_a < 1 or cfg.batch_size < 1, f'--batch_a {cfg.batch_a} --batch_size {cfg.batch_size}: must be at least 1'),
            (cfg.steps_a and cfg.batch_a % world, f'--batch_a {cfg.batch_a}: must be divisible by the {world} processes (it is global)'),
            (cfg.steps_b and cfg.batch_size % world, f'--batch_size {cfg.batch_size}: must be divisible by the {world} processes (it is global)'),
            (cfg.micro_batch < 0, f'--micro_batch {cfg.micro_batch}: must be at least 0'),
            (min(cfg.lr, cfg.lr_a, cfg.lr_projector, cfg.lr_tower) < 0, 'learning rates must not be negative'),
            (cfg.clip <= 0, f'--clip {cfg.clip:g}: must be positive'), (not 0 <= cfg.warmup <= 1, f'--warmup {cfg.warmup:g}: must be a fraction, 0 … 1'),
            (cfg.lora_r < 0, f'--lora_r {cfg.lora_r}: must be at least 0 (0 trains the whole LLM)'),
            (not 0 <= cfg.lora_dropout < 1, f'--lora_dropout {cfg.lora_dropout:g}: must be in 0 … 1'),
            (cfg.turns < 1, f'--turns {cfg.turns}: must be at least 1'), (cfg.max_length < 2, f'--max_length {cfg.max_length}: must be at least 2'),
            (cfg.prompt not in ('', 'v1', 'chat'), f"--prompt {cfg.prompt}: must be 'v1' or 'chat'"),
            (cfg.dtype not in ('', 'float32', 'bfloat16'), f'--dtype {cfg.dtype}: must be float32 or bfloat16'),
            (cfg.lora_r == 0 and cfg.dtype == 'bfloat16', '--dtype bfloat16 with --lora_r 0: small updates of bfloat16 weights would be rounded away; '
             'train adapters, or use --dtype float32'),
            (cfg.log_every < 1, f'--log_every {cfg.log_every}: must be at least 1'), (cfg.save_every < 1, f'--save_every {cfg.save_every}: must be at least 1'),
            (llava and 'llm' in clip_adv.typed(cfg, given), f'--llm {cfg.llm}: --init {cfg.init} is a LLaVA and brings its LLM; leave it out'),
            (cfg.llm == 'tiny' and not llava and (Path(cfg.out) / 'llm').exists()
             and not made_here(Path(cfg.out) / 'llm') and not tiny_llm(cfg),
             f'--out {cfg.out}: its folder llm holds no tiny language model of ours, which would take its place: give another --out (to train with it: --llm {cfg.out}/llm)'),
            (llava and cfg.arch, f'--arch {cfg.arch}: --init {cfg.init} is a LLaVA and says what it is; leave it out')])


if __name__ == '__main__':
    main(*clip_adv.parse(Config, __doc__))
