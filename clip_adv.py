"""Stage 1 of Double Visual Defense (arXiv 2501.09446): ΔCLIP, a CLIP trained from scratch, adversarially.

    min over θ   E over (x, t)   max over ‖δ‖∞ ≤ ε, 0 ≤ x+δ ≤ 1   of   L( f(x+δ), g(t) )  L: symmetric InfoNCE

    torchrun clip_adv.py                                    # ΔCLIP on easy-VQA, 2 CPU cores, 6 minutes
    torchrun clip_adv.py --eps 0 --out runs/clip            # vanilla CLIP: same samples, as many updates
    torchrun --nproc_per_node 8 clip_adv.py --data 'DIR/{0000..1023}.tar' ...  # shards (or a folder), 8 GPUs
    torchrun clip_adv.py --init runs/clip --objective fare --out runs/fare  # prior art: tunes a clean CLIP
    python clip_adv.py --plan results/delta_clip_h14.sh     # what the paper's largest would cost
    python eval.py zeroshot runs/clip runs/clip_adv         # both under attack

The file reads top to bottom: configuration, model, loss, the two schedules, main; a model's files come last.
Pixels are float32 in [0, 1] everywhere outside the image tower, ε and α in 1/255 on the command line only.
"""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import data  # before torch: it says how threads wait

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import attacks


@dataclass
class Config:
    out: str = 'runs/clip_adv'  # run directory: checkpoints, log, a model for open_clip and transformers
    data: str = 'easyvqa'  # or a folder with metadata.jsonl, alone or in train/, …; or 'DIR/{000..999}.tar'
    caption_key: str = 'text'  # where captions are: key of metadata, of shards; or 'txt:0.2,alt:0.8' of these
    index_dir: str = ''  # for the indexes of shards; default: beside these
    max_bad: float = 0.01  # fraction of shards, and of their samples, that may be unreadable or unfit
    classes: str = ''  # photos of classes: folder with names and templates, of which captions are made
    crop: float = 0.9  # photos: share of the area that a random crop leaves at least
    flip: bool = False  # photos: mirror every other one (captions must not say "left")
    holdout: str = ''  # captions left out of training, e.g. 'red circle,blue triangle'
    workers: int = 0  # image-decoding processes per rank; 0: none of its own
    init: str = ''  # start from a CLIP: a run, open_clip's, an id, …; --size and --context may differ
    resume: bool = False  # continue the run in --out; start it where there is none
    seed: int = 0  # of weights, order, augmentation and δ₀
    # the prior art: tunes the image tower of --init, under the whole attack from the first update on
    objective: Literal['clip', 'tecoa', 'fare'] = 'clip'  # the loss, of the attack and of the update
    anchor: float = 0.0  # λ: clip + λ·‖f(x+δ) − f₀(x)‖ of unit vectors; f₀: the tower of --init
    # attack
    eps: float = 14.0  # radius ε of the l∞ ball, in 1/255; 0 trains a vanilla CLIP
    alpha: float | None = None  # step size α, in 1/255; default 0.75 ε (the paper's 3 for ε = 4)
    k: int = 2  # PGD steps K
    eps_from: float = 0.18  # ε (and α) ramp up linearly from this fraction of the run …
    eps_to: float = 0.55  # … to this one; before the ramp training is clean, and cheap
    k_from: float = 0.60  # until this fraction of the run the attack has 1 step of 1.25 ε, then K of α
    negatives: int = 0  # pairs that the attack's loss compares with each other; 0: the global batch
    drop: float = 0.0  # fraction of the patch tokens that is left out while attacking
    # model (ignored with --init and --arch, which bring theirs; but for --size and --context)
    size: int = 32  # side of the image in pixels
    patch: int = 4  # side of a patch in pixels
    width: int = 64  # of the image tower
    layers: int = 3  # of the image tower
    head_width: int = 32  # of the image tower's attention heads
    mlp_ratio: float = 4.0  # hidden width of the blocks' MLPs / width
    embed_dim: int = 64  # of the shared embedding
    text_width: int = 64  # of the text tower
    text_layers: int = 2  # of the text tower
    text_heads: int = 2  # of the text tower
    context: int = 8  # tokens of a caption, start and end included; longer ones are cut
    arch: str = ''  # a model configuration of open_clip (JSON) instead, such as ViT-H-14-CLIPA-336.json
    tokenizer: str = ''  # tokenizer.json or WordPiece vocab.txt; default: a BPE trained on the captions
    vocab_size: int = 8192  # upper limit for that BPE
    # optimisation
    batch_size: int = 32  # global: of all processes together
    steps: int = 5000  # updates
    samples: float = 0.0  # samples seen, instead: steps = samples / batch_size
    lr: float = 1.5e-3  # peak learning rate
    warmup: float = 0.02  # fraction of the run; cosine to 0 after it
    wd: float = 0.05  # weight decay, on matrices only
    beta2: float = 0.95  # of AdamW; β₁ is 0.9
    grad_clip: float = 1.0  # limit of the gradient's l2 norm
    # running
    micro_batch: int = 0  # samples at a time on each process, to the same gradient; 0: all at once
    compile: bool | None = None  # torch.compile both towers; default: on CUDA only
    log_every: int = 50  # steps between lines of log.jsonl
    save_every: int = 500  # steps between checkpoints
    plan: str = field(default='', metadata={'nargs': '?'})  # only say what this costs, or all of FILE.sh
    gpu: str = 'h100'  # that --plan reckons with, …
    mfu: float = 0.4  # … and the fraction of its peak that is reached


# ====================================================================================================== model
# One block serves both towers. Parameter names are open_clip's (which are OpenAI's): weights go both ways.
class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool, at: Tensor | None) -> Tensor:
        """[B, N, W] → the same.   at: [B], the one token of each row that is wanted, → [B, 1, W]"""
        if at is None:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, N, 3W]
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, W/heads]
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:  # keys and values of all tokens, the query of one
            width = [x.shape[-1], 2 * x.shape[-1]]
            (w_q, w_kv), (b_q, b_kv) = self.in_proj_weight.split(width), self.in_proj_bias.split(width)
            q = F.linear(pick(x, at), w_q, b_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = F.linear(x, w_kv, b_kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            seen = None
            if causal:
                seen = torch.ones(2 * [x.shape[1]], dtype=torch.bool, device=x.device).tril()[at, None, None]
            x = F.scaled_dot_product_attention(q, k, v, seen)
        return self.out_proj(x.transpose(1, 2).flatten(2))


def pick(x: Tensor, at: Tensor) -> Tensor:
    """One token of each row: [B, N, W], [B] → [B, 1, W]"""
    return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[-1]))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, hidden: int, gelu, norm: dict):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, **norm)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, **norm)
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(width, hidden), 'c_proj': nn.Linear(hidden, width)})
        self.gelu = gelu

    def forward(self, x: Tensor, causal: bool, at: Tensor | None = None) -> Tensor:
        x = (x if at is None else pick(x, at)) + self.attn(self.ln_1(x), causal, at)
        return x + self.mlp.c_proj(self.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    """The blocks of a tower.   cfg: VisionCfg or TextCfg, below"""

    def __init__(self, cfg, heads: int, quick: bool):
        super().__init__()
        width, hidden, norm = cfg.width, int(cfg.width * cfg.mlp_ratio), cfg.norm_kwargs or {}
        gelu = quick_gelu if quick else nn.GELU(**(cfg.act_kwargs or {}))
        self.resblocks = nn.ModuleList(Block(width, heads, hidden, gelu, norm) for _ in range(cfg.layers))
        for block in self.resblocks:  # OpenAI's initialisation, for both towers
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(width * 2 * cfg.layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(width * 2 * cfg.layers) ** -0.5)

    def forward(self, x: Tensor, causal: bool = False, at: Tensor | None = None) -> Tensor:
        """at: [B], the token at which each row is pooled: the last block then computes no other, [B, 1, W],
        which saves 28 % of a tower of 3 blocks and 7 % of 12. None: [B, N, W]"""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, causal)
        return last(x, causal, at)


def quick_gelu(x: Tensor) -> Tensor:
    """The activation of OpenAI's weights."""
    return x * torch.sigmoid(1.702 * x)


class ViT(nn.Module):
    """Image tower f: float32 [B, 3, S, S] in [0, 1] → [B, embed_dim], not normalised. Has mean and std."""

    def __init__(self, clip: 'ClipCfg', preprocess: 'Preprocess'):
        super().__init__()
        cfg = clip.vision_cfg
        width, norm = cfg.width, cfg.norm_kwargs or {}
        self.size, self.patch = cfg.image_size, cfg.patch_size
        self.pool, self.ln_after_pool = cfg.pool_type, cfg.final_ln_after_pool
        for name in ('mean', 'std'):  # real where the weights are on 'meta'
            values = torch.tensor(getattr(preprocess, name), device='cpu').view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.conv1 = nn.Conv2d(3, width, self.patch, self.patch, bias=False)  # name and shape; see embed
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = (self.size // self.patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.Identity() if cfg.no_ln_pre else nn.LayerNorm(width, **norm)
        self.transformer = Transformer(cfg, width // cfg.head_width, clip.quick_gelu)
        self.ln_post = nn.LayerNorm(width, **norm)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, clip.embed_dim))

    def embed(self, x: Tensor) -> Tensor:
        """Pixels → the tokens that enter the first block, the class token first, [B, 1 + patches, W]"""
        x = (x - self.mean) / self.std
        # A convolution whose stride is its kernel is one matrix product over patches, and as that it is the
        # faster one on a CPU, most of all backwards to the pixels, which is what the attack needs.
        x = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)  # [B, patches, 3·p·p]
        x = F.linear(x, self.conv1.weight.flatten(1))  # [B, patches, W]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.ln_pre(x + self.positional_embedding)

    def draw_tokens(self, share: float, g: torch.Generator) -> Tensor:
        """[n] numbers of tokens: the class token's, and those of this share of the patches"""
        patches = len(self.positional_embedding) - 1
        drawn = torch.randperm(patches, generator=g)[: max(1, round(share * patches))]
        return F.pad(1 + drawn.sort().values, (1, 0))

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """kept: [n] tokens that are used, of 1 + patches, the class token first; None: all"""
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)  # the class token
        x = self.embed(x) if kept is None else self.embed(x)[:, kept]
        x = self.transformer(x, at=first if self.pool == 'tok' else None)
        if not self.ln_after_pool:
            x = self.ln_post(x)
        x = x[:, 0] if self.pool == 'tok' else x[:, 1:].mean(dim=1)
        if self.ln_after_pool:
            x = self.ln_post(x)
        return x @ self.proj


class TextTower(nn.Module):
    """Text tower g: token ids [B, L] → [B, embed_dim], not normalised."""

    def __init__(self, clip: 'ClipCfg'):
        super().__init__()
        cfg, width = clip.text_cfg, clip.text_cfg.width
        self.causal, self.text_pool, self.eos_id = not cfg.no_causal_mask, cfg.pool_type, cfg.eos_id
        self.token_embedding = nn.Embedding(cfg.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(cfg.context_length, width))
        self.transformer = Transformer(cfg, cfg.heads, clip.quick_gelu)
        self.ln_final = nn.LayerNorm(width, **(cfg.norm_kwargs or {}))
        self.text_projection = nn.Parameter(torch.empty(width, clip.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def text_features(self, tokens: Tensor) -> Tensor:
        at = torch.zeros_like(tokens[:, 0])  # where it is pooled: at the first token, the last one, or …
        if self.text_pool == 'last':
            at += tokens.shape[1] - 1
        elif self.text_pool != 'first':  # … at the end of the text: its id is the highest, or known
            at = (tokens if self.text_pool == 'argmax' else (tokens == self.eos_id).int()).argmax(-1)
        if self.causal:  # no token sees what comes after the longest text
            tokens = tokens[:, : int(at.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x, self.causal, at)[:, 0]
        return self.ln_final(x) @ self.text_projection


class CLIP(TextTower):
    """Both towers and the logit scale 1/τ, stored as its logarithm.

    It *is* a text tower with an image tower in `visual`, since that is how OpenAI named the parameters. A
    call embeds images, so that the update goes through DDP; encode_text embeds captions."""

    def __init__(self, cfg: 'ClipCfg', preprocess: 'Preprocess'):
        super().__init__(cfg)
        self.cfg, self.preprocess = cfg, preprocess
        self.visual = ViT(cfg, preprocess)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, micro_batch: int = 0, unit: bool = True, kept=None) -> Tensor:
        """float32 [B, 3, S, S] in [0, 1] → float32 [B, embed_dim], unit vectors or not.   kept: see ViT"""
        tower = self.visual if kept is None else partial(self.visual, kept=kept)
        image = in_parts(tower, images, micro_batch).float()
        return F.normalize(image, dim=-1) if unit else image

    def encode_text(self, tokens: Tensor, micro_batch: int = 0) -> Tensor:
        """int64 [B, L] → float32 unit vectors [B, embed_dim]"""
        return F.normalize(in_parts(self.text_features, tokens, micro_batch).float(), dim=-1)


def in_parts(function, x: Tensor, micro_batch: int) -> Tensor:
    """function(x), holding the activations of micro_batch samples at a time (0: of all).

    The features come first; when their gradient comes back, that of the whole batch's loss, each part is
    computed again and the gradient goes on through it. This is gradient caching (arXiv 2101.06983): exact,
    for one more forward pass."""
    if not micro_batch:
        return function(x)
    return torch.cat([recomputed(function, part) for part in x.split(micro_batch)])


# function(*args), whose activations are not kept but computed again when they are needed
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


# ======================================================================================================= loss
def info_nce(image: Tensor, text: Tensor, log_scale: Tensor, micro_batch: int = 0) -> Tensor:
    """Symmetric InfoNCE over the global batch, CLIP's loss.   image: unit vectors [b, D], this rank's; text:
    [B, D], of all ranks, in pairs.

    The B × B logits are nowhere whole: a rank has the rows of its images, micro_batch of them at a time (0:
    all). Of the others' rows it needs one number for each text, the logsumexp of its column.
    Every other row is a negative, an equal caption too, as in CLIP. (It does no harm: with an equal embedding
    all that it adds to image → text is the logarithm of how often the caption is in the batch.)"""
    rank, world = data.rank_and_world()
    first, own, columns = rank * len(image), 0.0, []
    for part in image.split(micro_batch or len(image)):
        args = part, text, log_scale, first
        value, column = recomputed(rows_of_logits, *args) if micro_batch else rows_of_logits(*args)
        own, columns, first = own + value, [*columns, column], first + len(part)
    column = torch.stack(columns).logsumexp(0)  # [B], of this rank's rows
    highest = column.detach().clone()
    if world > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    column = highest + sum_of_ranks((column - highest).exp()).log()
    return (sum_of_ranks(own) + column.sum()) / (2 * len(text))


def rows_of_logits(image: Tensor, text: Tensor, log_scale: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Of m images, whose texts begin at `first`: (their share of the loss, the texts' logsumexp [B])"""
    logits = log_scale.exp() * image @ text.T  # [m, B]
    return (logits.logsumexp(1) - 2 * logits.diagonal(first)).sum(), logits.logsumexp(0)


def info_nce_in_groups(image: Tensor, text: Tensor, log_scale: Tensor, n: int) -> Tensor:
    """Σ of InfoNCE over groups of n pairs, as if each were all there is.   image, text: as above"""
    own = text[data.rank_and_world()[0] * len(image) :][: len(image)]
    logits = [log_scale.exp() * i @ t.T for i, t in zip(image.split(n), own.split(n))]
    return sum((z.logsumexp(0) + z.logsumexp(1) - 2 * z.diagonal()).mean() / 2 for z in logits)


def tecoa(image: Tensor, classes: Tensor, labels: Tensor, n: int) -> Tensor:
    """Cross-entropy over 100·cos, mean of the global batch of n images.   Mao et al., arXiv 2212.07016
    image: unit vectors [b, D], this rank's; classes: unit vectors [C, D]; labels: int64 [b]"""
    return sum_of_ranks(F.cross_entropy(100 * image @ classes.T, labels, reduction='sum')) / n


def fare(image: Tensor, original: Tensor, n: int) -> Tensor:
    """‖f(x+δ) − f₀(x)‖², mean of the n images of all ranks.   Schlarmann et al., arXiv 2402.12336
    image, original: [b, D], this rank's, not normalised"""
    return sum_of_ranks((image - original).square().sum()) / n


def distance(image: Tensor, original: Tensor, n: int) -> Tensor:
    """‖f(x+δ) − f₀(x)‖ of unit vectors, mean of all ranks' n images.   Xing et al., arXiv 2604.11576
    (whose own is to f₀(x+δ) and to f(x); to f₀(x) it needs one more forward pass and no gradient)"""
    return sum_of_ranks((image - F.normalize(original, dim=-1)).norm(dim=-1).sum()) / n


class Against(NamedTuple):
    """What a loss compares this rank's images with."""

    text: Tensor | None  # [B, D], unit vectors of the captions, of the whole batch
    log_scale: Tensor
    clean: Tensor | None = None  # f₀(x): [b, D], not normalised
    classes: Tensor | None = None  # [C, D], unit vectors
    labels: Tensor | None = None  # int64 [b]


def objective(cfg: Config, image: Tensor, against: Against, groups: int = 0) -> Tensor:
    """The loss of --objective, of attack and update.   image: [b, D], not normalised.  groups: --negatives"""
    if cfg.objective == 'fare':
        return fare(image, against.clean, cfg.batch_size)
    image = F.normalize(image, dim=-1)
    if cfg.objective == 'tecoa':
        return tecoa(image, against.classes, against.labels, cfg.batch_size)
    if groups:
        return info_nce_in_groups(image, against.text, against.log_scale, groups)
    loss = info_nce(image, against.text, against.log_scale, cfg.micro_batch)
    return loss + cfg.anchor * distance(image, against.clean, cfg.batch_size) if cfg.anchor else loss


def sum_of_ranks(x: Tensor) -> Tensor:
    """The same on all ranks; with the gradient of the rank's own part, the others' are constants."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if data.rank_and_world()[1] > 1:
        dist.all_reduce(total)
    return total + (x - x.detach())


def gather(x: Tensor) -> Tensor:
    """[b, …] on each of W ranks → [W·b, …] on all.

    Its gradient is the sum of what comes back on all ranks, since each has but a part of it, that of its own
    rows of the logits. Without the others', or with the rank's own negatives, it would be another loss."""
    rank, world = data.rank_and_world()
    if world == 1:
        return x
    everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(everyone, x.detach().contiguous())
    everyone[rank] = x  # the same numbers, with their gradient
    everyone = torch.cat(everyone)
    if everyone.requires_grad:
        everyone.register_hook(sum_of_ranks)
    return everyone


# ================================================================================================== schedules
def attack_at(cfg: Config, step: int) -> tuple[float, float, int]:
    """(ε, α, K) of a step, ε and α in [0, 1] units; K = 0 means clean.

    Our schedule (the authors' is not public). It follows their idea at one resolution: the long part cheap
    and weak, the short last part at full strength."""
    done, width = step / cfg.steps, cfg.eps_to - cfg.eps_from
    ramp = min(max((done - cfg.eps_from) / width, 0), 1) if width else float(done >= cfg.eps_to)
    eps, alpha, k = ramp * cfg.eps / 255, ramp * cfg.alpha / 255, cfg.k
    if done < cfg.k_from and cfg.k > 1:
        alpha, k = 1.25 * eps, 1  # fast adversarial training, Wong et al. 2020, arXiv 2001.03994
    return eps, alpha, k if eps > 0 else 0


def lr_at(peak: float, step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then cosine to 0; of both stages.   warmup: fraction of the steps"""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def is_fine_tuning(cfg: Config) -> bool:
    """Whether the image tower alone is trained."""
    return cfg.objective != 'clip' or cfg.anchor > 0


def is_held(cfg: Config) -> bool:
    """Whether the loss compares with f₀, the tower that the training began with."""
    return cfg.objective == 'fare' or cfg.anchor > 0


@contextlib.contextmanager
def frozen(module: nn.Module):
    """Eval mode, no gradient for parameters: what an attack needs. (A compiled module would otherwise compute
    the gradients of all weights on every attack step, only to throw them away.) Restores both."""
    mode, trainable = module.training, [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        module.train(mode)
        for p in trainable:
            p.requires_grad_(True)


# =============================================================================================== the training
def main(cfg: Config, given: set[str]) -> None:
    """Trains.   given: names of the settings that the user chose; data.parse makes both"""
    rank, world, device = data.start_processes(hours=2)  # rank 0 reads and saves for all
    state, cfg = data.open_run(cfg, given)
    check_config(cfg, given, world)
    first_step = state['step'] if state else 0

    # --------------------------------------------------------------------------------- data, model, optimizer
    which = cfg.holdout, cfg.caption_key, cfg.index_dir, cfg.max_bad
    pairs = data.load_pairs(cfg.data, 'train', *which, state['data'].get('left out', ()) if state else ())
    prompts, known_by = None, {'--data': pairs.fingerprint()}
    if cfg.classes:
        prompts = data.load_prompts(cfg.classes)
        known_by['--classes'] = data.digests_of({'names and templates': prompts.texts()})
    model, tokenizer = build(cfg, given, prompts or pairs, state)
    model.to(device).train()
    if is_held(cfg):
        original = load_clip(cfg.init, model.visual.size, flag='--init', tokenizer=False)[0].visual.to(device)
        weights = original.requires_grad_(False).state_dict()
        del weights['positional_embedding']  # may have been interpolated
        sums = (w.view(torch.int32).sum(dtype=torch.long).item() for w in weights.values())
        known_by['--init'] = data.digests_of({'weights': sums})
    data.check_resumed(state, known_by)
    if is_fine_tuning(cfg):
        model.requires_grad_(False).visual.requires_grad_(True)
    compile_towers(model, cfg.compile, device)
    step_model = DDP(model) if world > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {'params': [p for p in trained if p.ndim >= 2], 'weight_decay': cfg.wd}
    others = {'params': [p for p in trained if p.ndim < 2], 'weight_decay': 0.0}
    optimizer = torch.optim.AdamW([matrices, others], betas=(0.9, cfg.beta2), fused=True)
    if state:
        data.load_optimizer(optimizer, state)
    del state  # its file is mapped

    texts = (prompts or pairs).texts(1000) if rank == 0 else []
    facts = arithmetic(cfg, pairs, texts, model, tokenizer, world) if rank == 0 else ''
    run = data.Run(cfg, first_step, cfg.steps, facts, device, len(pairs))
    wrong = not_in_hf(model.cfg, model.preprocess, tokenizer)

    def export(step: int) -> None:
        """What can be derived from a checkpoint: the model for other libraries, and its card."""
        if rank == 0 and step:
            save_clip(model, tokenizer, run.out)
            data.write_settings(cfg, step)
            what = {'clip': 'A CLIP', 'tecoa': 'A CLIP tuned by TeCoA', 'fare': 'A CLIP tuned by FARE'}
            what = f'{what[cfg.objective]}, from {cfg.init}' if cfg.init else what[cfg.objective]
            run.write_card(card(cfg, what, 1, HUB_HEADER, facts, LOAD if not wrong else LOAD[:1]))

    export(first_step)
    fit = data.Fit(model.visual.size, model.preprocess.interpolation, model.preprocess.resize_mode)
    samples = data.PairDataset(pairs, tokenizer, fit, cfg.seed, cfg.crop, cfg.flip, prompts)
    order = data.order(pairs.sizes, cfg.batch_size, range(first_step, cfg.steps), cfg.seed, rank, world)
    bar = run.bar(data.loader(samples, order, cfg.workers), 'clip_adv', first_step, cfg.steps)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')
    if cfg.objective == 'tecoa':
        with amp:
            classes, label_of = embed_classes(model, tokenizer, prompts or pairs.texts())

    # -------------------------------------------------------------------------------------- the training loop
    for step, (images, tokens, _) in enumerate(run.read(bar), first_step):
        logging = (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps
        run.lap_ms(logging)
        x = images.to(device, non_blocking=True).float() / 255  # [b, 3, S, S], this rank's part of the batch
        tokens = tokens.to(device, non_blocking=True)
        eps, alpha, k = attack_at(cfg, step)

        # 1. Encode the text once, for the attack and the update alike: the perturbation does not touch it.
        with amp:
            text = gather(model.encode_text(tokens, cfg.micro_batch)) if cfg.objective == 'clip' else None
            against = Against(text, model.logit_scale)  # text: [B, D], of the whole batch
            if is_held(cfg):
                against = against._replace(clean=in_parts(original, x, cfg.micro_batch).float())
        if cfg.objective == 'tecoa':
            labels = torch.tensor([label_of[tuple(row)] for row in tokens.tolist()], device=device)
            against = against._replace(classes=classes, labels=labels)
        fixed = Against(*(of if of is None else of.detach() for of in against))

        def loss_of(images: Tensor, tower=model, against=fixed, kept=None, groups=0) -> Tensor:
            """The loss of the global batch as a function of this rank's images, all else fixed."""
            with amp:
                image = tower(images, cfg.micro_batch, unit=False, kept=kept)
            return objective(cfg, image, against, groups)

        which_tokens = data.generator(cfg.seed, 'tokens', step) if cfg.drop else None

        def loss_to_climb(images: Tensor, g=which_tokens, loss_of=loss_of) -> Tensor:
            """loss_of; or what is cheaper: in groups, of a part of the tokens, drawn anew at each step"""
            kept = model.visual.draw_tokens(1 - cfg.drop, g).to(device) if cfg.drop else None
            return loss_of(images, kept=kept, groups=cfg.negatives)

        # 2. Attack the images: the maximisation over δ. Each rank perturbs its own, against all negatives.
        x_adv = x
        with frozen(model.visual):
            if k > 0:
                first = step * cfg.batch_size + rank * len(x)  # number of this rank's first sample
                noise = [data.generator(cfg.seed, 'start', first + i) for i in range(len(x))]
                x_adv = attacks.pgd(loss_to_climb, x, eps, alpha, k, attacks.random_start(x, eps, noise))
                attacks.check(x, x_adv, eps)
            attack_ms = run.lap_ms(logging)
            with torch.no_grad():
                loss_clean = loss_of(x).item() if logging else None
            run.lap_ms(logging)  # measuring the clean loss is not training

        # 3. Update the weights on the adversarial images only: the minimisation over θ.
        loss = loss_of(x_adv, step_model, against)
        (loss * world).backward()  # as DDP averages over the ranks
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        run.stop_if_not_finite(step, loss.item(), grad_norm.item())
        lr = lr_at(cfg.lr, step, cfg.steps, cfg.warmup)
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        train_ms = run.lap_ms(logging)

        # 4. Log, save, and stop when asked to, all ranks at the same step.
        if logging:
            row = dict(loss_adv=loss.item(), loss_clean=loss_clean, eps=eps * 255, alpha=alpha * 255, k=k)
            row |= dict(lr=lr, grad_norm=grad_norm.item(), logit_scale=model.logit_scale.exp().item())
            run.log(step + 1, cfg.batch_size, bar, **row, attack_ms=attack_ms, train_ms=train_ms)
        signal = run.asked_to_stop()
        if signal or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            weights = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
            weights['data'] = known_by | {'left out': pairs.left_out}
            model_cfg = open_clip_config(model.cfg, model.preprocess)
            run.save(step + 1, {**weights, **model_cfg, 'tokenizer': tokenizer.backend.to_str()})
            export(step + 1)
        if signal:
            run.leave(step + 1, signal)
    bar.close()
    also = f' (not in transformers, whose CLIPModel cannot be this model: {"; ".join(wrong)})'
    opens = f'{cfg.out} opens in open_clip as local-dir:{cfg.out}{also if wrong else ", and in transformers"}'
    run.finish(f'{opens}; measure it with: {measuring(cfg)}')


# ===================== below: a model's settings and files; nothing of the method is hidden here
# -------------------------------------------------------------- a model's settings, with open_clip's defaults
@dataclass
class VisionCfg:
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    no_ln_pre: bool = False
    pool_type: Literal['tok', 'avg'] = 'tok'
    final_ln_after_pool: bool = False
    act_kwargs: dict[Literal['approximate'], Literal['none', 'tanh']] | None = None
    norm_kwargs: dict[Literal['eps'], float] | None = None


@dataclass
class TextCfg:
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    no_causal_mask: bool = False
    pool_type: Literal['argmax', 'eos', 'last', 'first'] = 'argmax'
    eos_id: int | Literal[0] = 2
    act_kwargs: dict[Literal['approximate'], Literal['none', 'tanh']] | None = None
    norm_kwargs: dict[Literal['eps'], float] | None = None
    hf_tokenizer_name: str | None = None  # these four: which tokenizer, not which tower
    tokenizer_mode: Literal['clips'] | None = None
    tokenizer_kwargs: dict[Literal['strip_sep_token'], bool] | None = None
    vocab_path: str | None = None


@dataclass
class ClipCfg:
    vision_cfg: VisionCfg = field(default_factory=VisionCfg)
    text_cfg: TextCfg = field(default_factory=TextCfg)
    embed_dim: int = 512
    quick_gelu: bool = False


@dataclass
class Preprocess:
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    interpolation: Literal['bilinear', 'bicubic'] = 'bicubic'
    resize_mode: Literal['shortest', 'squash', 'longest'] = 'shortest'
    size: int | list[int] | None = None  # not obeyed, by open_clip neither: it is vision_cfg's
    mode: Literal['RGB'] = 'RGB'
    fill_color: Literal[0] = 0


IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], interpolation='bilinear')  # ΔCLIP's


def as_dataclass(kind, given: dict, where: str):
    """given as a dataclass of this kind. A key that it does not have, or a value that its type does not
    allow, is an error, since it would not be obeyed.   where: what it is a part of, for the error"""
    if not isinstance(given, dict):
        data.fail(f'{where} is {given!r:.80}; expected an object')
    hints, given = get_type_hints(kind), dict(given)
    for key, value in given.items():
        if key not in hints:
            data.fail(f'{where}: unknown key {key}; supported: {", ".join(hints)}')
        if is_dataclass(hints[key]):
            given[key] = as_dataclass(hints[key], value, f'{where}.{key}')
        elif not suits(value, hints[key]) or 'layers' in key and value > 1000:
            name = getattr(hints[key], '__name__', '') if isinstance(hints[key], type) else str(hints[key])
            name += ', 1 … 1000' if 'layers' in key else ', 1 … a million' if name == 'int' else ''
            data.fail(f'{where}.{key} is {value!r:.80}; supported: {name.replace("typing.", "")}')
    return kind(**given)


def suits(value, hint) -> bool:
    """Whether a value of a JSON file is what the type says. Numbers are sizes, ids or ε: none is negative."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(suits(v, inner[0]) for v in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(suits(k, inner[0]) and suits(v, inner[1]) for k, v in pairs)
    if inner:  # one of several
        return any(suits(value, one) for one in inner)
    if hint is float:
        return type(value) in (int, float) and 0 <= value < 1e12
    return type(value) is hint and (hint is not int or 0 < value <= 1_000_000)


def from_open_clip(config: dict, where: str) -> tuple[ClipCfg, Preprocess]:
    """Of open_clip_config.json: {'model_cfg', 'preprocess_cfg'}. What would not be obeyed is an error."""
    cfg = as_dataclass(ClipCfg, config.get('model_cfg'), f'{where}: model_cfg')
    preprocess = as_dataclass(Preprocess, config.get('preprocess_cfg'), f'{where}: preprocess_cfg')
    v, t, mean, std = cfg.vision_cfg, cfg.text_cfg, preprocess.mean, preprocess.std
    whole = {'size / patch': (v.image_size, v.patch_size), 'width / head_width': (v.width, v.head_width)}
    for what, (value, divisor) in {**whole, 'text_width / text_heads': (t.width, t.heads)}.items():
        if value % divisor:
            data.fail(f'{where}: {what} is {value} / {divisor}; must be a whole number')
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        data.fail(f'{where}: mean is {mean}, std is {std}; supported: three numbers each, of std above 0')
    return cfg, preprocess


def open_clip_config(cfg: ClipCfg, preprocess: Preprocess) -> dict:
    """What from_open_clip reads, with every setting that has a value."""
    model_cfg = asdict(cfg, dict_factory=lambda items: {k: v for k, v in items if v is not None})
    size = [cfg.vision_cfg.image_size] * 2
    return {'model_cfg': model_cfg, 'preprocess_cfg': {**asdict(preprocess), 'size': size}}


# --------------------------------------------------------------------------------------------- making a model
@contextlib.contextmanager
def seeded(seed: int):
    """PyTorch's layers draw their weights from the global generator: seeded in here, then restored."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def build(cfg: Config, given: set[str], pairs, state: dict | None) -> tuple[CLIP, data.Tokenizer]:
    """The model and its tokenizer: of the checkpoint being resumed, of --init, of --arch, or of the flags."""
    if state is not None:
        clip_cfg, preprocess = from_open_clip(state, f'{cfg.out}/train_state.pt')
        with torch.device('meta'):
            model = CLIP(clip_cfg, preprocess)
        data.fill(model, state['model'], f'{cfg.out}/train_state.pt')
        return model, data.tokenizer_for(clip_cfg.text_cfg, data.HFTokenizer.from_str(state['tokenizer']))
    clip_cfg, preprocess = settings_of_model(cfg, given)
    if cfg.init:
        lengths = (getattr(cfg, name) if name in given else None for name in ('size', 'context'))
        return load_clip(cfg.init, *lengths, flag='--init')
    text_cfg = clip_cfg.text_cfg
    if cfg.tokenizer:
        if cfg.tokenizer.endswith('.txt'):
            text_cfg.tokenizer_mode = 'clips'
        backend = data.read_tokenizer(Path(cfg.tokenizer), '--tokenizer')
        tokenizer = data.tokenizer_for(text_cfg, backend)
    else:
        # of shards, rank 0 reads the captions for all: hundreds of ranks would keep a file system busy
        texts = data.from_rank_0(lambda: pairs.texts(10_000))
        tokenizer = data.train_tokenizer(texts, text_cfg.context_length, cfg.vocab_size)
    clip_cfg.text_cfg = with_tokenizer(text_cfg, tokenizer)
    clip_cfg.text_cfg.vocab_size = tokenizer.vocab_size
    with seeded(cfg.seed):
        return CLIP(clip_cfg, preprocess), tokenizer


def settings_of_model(cfg: Config, given: set[str], known=None) -> tuple[ClipCfg, Preprocess]:
    """Of --init, --arch or the flags.   known: of the models that earlier commands of a script make"""
    brought = 'patch width layers head_width mlp_ratio embed_dim text_width text_layers text_heads'.split()
    brought += ['arch', 'tokenizer', 'vocab_size'] if cfg.init else []
    if (cfg.init or cfg.arch) and (surplus := sorted(given.intersection(brought))):
        which = '--init' if cfg.init else '--arch'
        data.fail(f'{which} brings its own model: leave --{", --".join(surplus)} out')
    preprocess = IMAGENET
    if cfg.init:
        clip_cfg, how = (known or {}).get(str(Path(cfg.init))) or settings_in(cfg.init, '--init')[1:]
        model_cfg, preprocess = open_clip_config(clip_cfg, how).values()
    elif cfg.arch:
        model_cfg = data.read_json(Path(cfg.arch), '--arch')
        model_cfg = model_cfg.get('model_cfg', model_cfg)
        if missing := {'vision_cfg', 'text_cfg'} - set(model_cfg):
            data.fail(f'--arch {cfg.arch}: no {min(missing)}; expected a model configuration of open_clip')
    else:
        vision = VisionCfg(cfg.size, cfg.patch, cfg.width, cfg.layers, cfg.head_width, cfg.mlp_ratio)
        text = TextCfg(cfg.context, cfg.vocab_size, cfg.text_width, cfg.text_heads, cfg.text_layers)
        if cfg.tokenizer.endswith('.txt'):  # [CLS] comes last, and is of use only without a causal mask
            text.pool_type, text.no_causal_mask = 'last', True
        model_cfg = asdict(ClipCfg(vision, text, cfg.embed_dim))
    model_cfg['vision_cfg'] |= {'image_size': cfg.size} if 'size' in given else {}
    model_cfg['text_cfg'] |= {'context_length': cfg.context} if 'context' in given else {}
    return from_open_clip({'model_cfg': model_cfg, 'preprocess_cfg': preprocess}, cfg.init or 'the model')


def embed_classes(model: CLIP, tokenizer: data.Tokenizer, of: data.Prompts | list[str]):
    """of: prompts; or captions, of which each that differs is a class → (unit vectors [C, D] of the classes,
    {token ids of a prompt: its class})"""
    prompts = of if isinstance(of, data.Prompts) else data.Prompts(sorted(set(of)), ['{c}'])
    tokens, n = tokenizer(prompts.texts()), len(prompts.templates)
    label_of = {tuple(row): i // n for i, row in enumerate(tokens.tolist())}
    if len(label_of) < len(tokens):
        data.fail(f'two prompts of classes have equal tokens: is --context {tokenizer.context} too short?')
    return class_directions(embed_texts(model, tokenizer, prompts.texts()), n), label_of


@torch.no_grad()
def embed_texts(model: CLIP, tokenizer: data.Tokenizer, texts: list[str]) -> Tensor:
    """Of any number of texts → unit vectors [texts, D]"""
    parts, device = (texts[i : i + 256] for i in range(0, len(texts), 256)), model.logit_scale.device
    return torch.cat([model.encode_text(tokenizer(part).to(device)) for part in parts])


def class_directions(of_prompt: Tensor, n: int) -> Tensor:
    """A class is the direction of the mean of its n prompts, a template ensemble.   [C·n, D] → [C, D]"""
    return F.normalize(of_prompt.unflatten(0, (-1, n)).mean(1), dim=-1)


def with_tokenizer(text_cfg: TextCfg, tokenizer: data.Tokenizer) -> TextCfg:
    """text_cfg of a directory that it lies in: any non-empty name makes open_clip read it from there."""
    mode = 'clips' if tokenizer.mode == 'clips' else None
    kwargs = {'strip_sep_token': True} if tokenizer.mode == 'strip_sep_token' else None
    own = dict(hf_tokenizer_name='tokenizer.json', tokenizer_mode=mode, tokenizer_kwargs=kwargs)
    return replace(text_cfg, vocab_path=None, **own)


def check_config(cfg: Config, given: set[str], world: int) -> None:
    """Refuses what cannot be meant, with what, value, limit and flag; fills in α."""
    check_attack(cfg)
    if {'steps', 'samples'} <= given:
        data.fail(f'--steps {cfg.steps} --samples {cfg.samples:g}: one of the two, not both')
    cfg.steps = round(cfg.samples / cfg.batch_size) if cfg.samples and cfg.batch_size else cfg.steps
    shape = 'size patch width layers head_width mlp_ratio embed_dim text_width text_layers text_heads'
    for name in f'steps lr grad_clip log_every save_every {shape}'.split():
        if getattr(cfg, name) <= 0:
            data.fail(f'--{name} {getattr(cfg, name)}: must be positive')
    for name in ('eps_from', 'eps_to', 'k_from', 'warmup', 'max_bad'):
        if not 0 <= getattr(cfg, name) <= 1:
            data.fail(f'--{name} {getattr(cfg, name):g}: must be a fraction, 0 … 1')
    if not 0 <= cfg.beta2 < 1 or min(cfg.wd, cfg.workers, cfg.micro_batch) < 0:
        said = f'--beta2 {cfg.beta2:g} --wd {cfg.wd:g} --workers {cfg.workers}'
        said += f' --micro_batch {cfg.micro_batch}'
        data.fail(f'{said}: must be in 0 … 1 (below 1), and the others not negative')
    if cfg.eps_from > cfg.eps_to:
        data.fail(f'--eps_from {cfg.eps_from:g} --eps_to {cfg.eps_to:g}: the ramp ends before it begins')
    if cfg.batch_size < 2 or cfg.batch_size % world:
        data.fail(f'--batch_size {cfg.batch_size}: must be at least 2 and divisible by the {world} processes')
    if is_fine_tuning(cfg):
        if not cfg.init:
            data.fail(f'--objective {cfg.objective} --anchor {cfg.anchor:g}: tunes a CLIP: give its --init')
        for name in {'eps_from', 'eps_to', 'k_from'} - given:
            setattr(cfg, name, 0.0)
        if is_held(cfg) and not (cfg.eps and cfg.eps_from == cfg.eps_to == 0):
            data.fail(
                f'--eps {cfg.eps:g} --eps_from {cfg.eps_from:g} --eps_to {cfg.eps_to:g}: without an attack '
                'there is nothing to learn from the tower that the training begins with'
            )
    if cfg.objective == 'tecoa' and cfg.data != 'easyvqa' and not cfg.classes:
        data.fail('--objective tecoa: needs the class names: give --classes')
    if cfg.objective != 'clip' and cfg.anchor or is_fine_tuning(cfg) and cfg.negatives:
        data.fail(f'--objective {cfg.objective}: --anchor is for clip, --negatives for clip without --anchor')
    if min(cfg.anchor, cfg.negatives) < 0 or cfg.negatives == 1:
        data.fail(f'--anchor {cfg.anchor:g} --negatives {cfg.negatives}: not negative, and not 1')
    if cfg.negatives and (share := cfg.batch_size // world) % cfg.negatives:
        data.fail(f'--negatives {cfg.negatives}: must divide the {share} images of a process')
    if not (0 <= cfg.drop < 1 and 0 < cfg.crop <= 1):
        data.fail(f'--drop {cfg.drop:g} --crop {cfg.crop:g}: must be in 0 … 1, below 1 and above 0')
    if cfg.data == 'easyvqa' and given & {'classes', 'crop', 'flip'}:
        data.fail('--classes, --crop and --flip are for photos; the captions of easyvqa are its classes')
    if cfg.vocab_size < 260:
        data.fail(f'--vocab_size {cfg.vocab_size}: must be at least 260 (256 bytes, 3 special tokens, …)')


def check_attack(cfg) -> None:
    """Of both stages; fills in α."""
    if cfg.alpha is None:
        cfg.alpha = 0.75 * cfg.eps
    if not (cfg.eps == 0 or 0.25 <= cfg.eps <= 255):
        meant = f'; did you mean {cfg.eps * 255:.3g}?' if 0 < cfg.eps < 0.25 else ''
        data.fail(f'--eps {cfg.eps:g}: must be 0 or in 0.25 … 255 (it is in 1/255){meant}')
    if cfg.eps > 0 and not 0 < cfg.alpha <= 2 * cfg.eps:
        data.fail(f'--alpha {cfg.alpha:g}: must be in 0 … 2ε = {2 * cfg.eps:g}, which crosses the whole ball')
    if cfg.k < 1:
        data.fail(f'--k {cfg.k}: must be at least 1; train without an attack with --eps 0')


def compile_towers(model: CLIP, wanted: bool | None, device: torch.device) -> None:
    """In place, before DDP: parameter names stay, and whoever calls a tower enters the compiled one."""
    if not (device.type == 'cuda' if wanted is None else wanted):
        return
    compiler = os.environ.get('CXX', 'g++')
    if device.type == 'cpu' and not shutil.which(compiler):
        data.fail(f'--compile on a CPU needs a C++ compiler: install {compiler}, set CXX, or --no-compile')
    model.visual.compile()
    model.transformer.compile()


# ----------------------------------------------------------------------------------------- loading and saving
def settings_in(path: str | os.PathLike, flag: str = '') -> tuple[Path, ClipCfg, Preprocess]:
    """Of a CLIP, and where it lies; see load_clip."""
    if str(path) == Config.out and not Path(path).exists():
        data.fail(f'{flag or "DIR"} {path}: no such directory; make it first: python clip_adv.py')
    place = data.locate(path, flag)
    file = place / 'open_clip_config.json'
    if file.is_file():
        return place, *from_open_clip(data.read_json(file, str(place)), str(file))
    if (kind := data.model_type(place)) != 'clip':
        data.fail(f'{place} is no CLIP: no open_clip_config.json, and config.json says {kind!r}')
    return place, *from_hf_directory(place)


def load_clip(path: str | os.PathLike, size=None, context=None, flag: str = '', tokenizer: bool = True):
    """A CLIP, from wherever it comes → (CLIP in eval mode, data.Tokenizer or None).

    path: a run directory; a directory of open_clip's; one of a CLIPModel of Hugging Face's; or a repository
    id of the hub.  size, context: interpolate the position embeddings to images of this side, to texts of so
    many tokens.  flag: that named it, for errors.  tokenizer: False where none is needed (stage 2, which
    takes the image tower alone)."""
    place, cfg, preprocess = settings_in(path, flag)
    file = place / 'open_clip_config.json'
    with torch.device('meta'), data.reading(f'{place}: its model', 'sizes that one can have'):
        model = CLIP(cfg, preprocess)
    names = [*(data.OPEN_CLIP_FILES if file.is_file() else []), *data.HF_FILES]
    weights = data.read_weights(place, names, rename=lambda n: '' if 'position_ids' in n else n)
    if 'logit_scale' in weights and weights['logit_scale'].numel() == 1:
        weights['logit_scale'] = weights['logit_scale'].reshape(())  # some have it as a vector of one
    if not file.is_file():
        weights = weights_from_hf(weights, model.state_dict(), str(place))

    cfg.text_cfg.context_length = context or cfg.text_cfg.context_length
    tokens, text = data.tokenizer_of(place, cfg.text_cfg) if tokenizer else None, cfg.text_cfg
    if tokens:
        if tokens.vocab_size > text.vocab_size or text.pool_type == 'eos' and tokens.eos != text.eos_id:
            ours = f'the tokenizer has {tokens.vocab_size} ids and ends a text with {tokens.eos}'
            data.fail(f'{path}: {ours}; the model has {text.vocab_size} and looks for {text.eos_id}')
        cfg.text_cfg = with_tokenizer(text, tokens)
    data.fill(model, weights, str(place))
    if size and size != model.visual.size:
        cfg.vision_cfg.image_size = model.visual.size = size
        from_open_clip(open_clip_config(cfg, preprocess), str(place))  # is the size possible?
        positions = resize_positions(model.visual.positional_embedding.detach(), size // model.visual.patch)
        model.visual.positional_embedding = nn.Parameter(positions)
    if len(positions := model.positional_embedding) != text.context_length:
        positions = F.interpolate(positions.detach().T[None], text.context_length, mode='linear')
        model.positional_embedding = nn.Parameter(positions[0].T.contiguous())  # as open_clip does
    return model.eval(), tokens


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """[1 + n², W] → [1 + grid², W], bicubic with antialiasing, as open_clip does, but for the class token"""
    old = math.isqrt(len(positions) - 1)
    image = positions[1:].float().T.reshape(1, -1, old, old)
    image = F.interpolate(image, (grid, grid), mode='bicubic', antialias=True, align_corners=False)
    return torch.cat([positions[:1], image[0].flatten(1).T.to(positions.dtype)])


def save_clip(model: CLIP, tokenizer: data.Tokenizer, out: Path) -> None:
    """What open_clip (`local-dir:RUN`), load_clip and, where its CLIP can be this one, transformers read."""
    weights, files, cfg = model.state_dict(), tokenizer.files(), model.cfg
    files['open_clip_config.json'] = json.dumps(open_clip_config(cfg, model.preprocess), indent=2)
    for name, text in files.items():
        data.write(out / name, text)
    data.write_weights(out / data.OPEN_CLIP_FILES[0], weights)
    if not not_in_hf(cfg, model.preprocess, tokenizer):
        ids = {f'{name}_token_id': getattr(tokenizer, name) for name in ('bos', 'eos', 'pad')}
        config = {'architectures': ['CLIPModel'], 'model_type': 'clip', 'dtype': 'float32'}
        config |= {'projection_dim': cfg.embed_dim, 'vision_config': tower_to_hf(cfg.vision_cfg, cfg)}
        config['text_config'] = tower_to_hf(cfg.text_cfg, cfg) | ids
        how = hf_preprocessor(model.preprocess, model.visual.size, 'CLIPProcessor')
        how = {'preprocessor_config.json': json.dumps(how, indent=2)}
        data.save_directory(out, config, weights_to_hf(weights), how)


# ------------------------------------------------------------------------------ Hugging Face's CLIP: settings
HF_SETTINGS = {'width': 'hidden_size', 'layers': 'num_hidden_layers', 'heads': 'num_attention_heads'}
HF_SETTINGS |= {'context_length': 'max_position_embeddings', 'vocab_size': 'vocab_size'}
HF_SETTINGS |= {'image_size': 'image_size', 'patch_size': 'patch_size'}
HF_ACTIVATIONS = {'quick_gelu': None, 'gelu': None, 'gelu_pytorch_tanh': {'approximate': 'tanh'}}
HF_FILTERS = {'bilinear': 2, 'bicubic': 3}  # PIL's numbers


def tower_from_hf(kind, config: dict, file: Path):
    """(VisionCfg or TextCfg, quick_gelu) of a CLIPModel's or LLaVA's config.json.   kind: which of these
    What is left out there is as in open_clip, but for two settings."""
    name = 'vision_config' if kind is VisionCfg else 'text_config'
    left_out = tower_to_hf(kind(), ClipCfg(quick_gelu=True)) | {'patch_size': 32, 'eos_token_id': 49407}
    with data.reading(f'{file}: {name}', 'an object, with whole numbers for the sizes'):
        given = {**(config.get(name) or {}), **(config.get(f'{name}_dict') or {})}  # as older versions had it
        config = left_out | given
        width, heads, act = config['hidden_size'], config['num_attention_heads'], config['hidden_act']
        if act not in list(HF_ACTIVATIONS):
            data.fail(f'{file}: {name}: hidden_act is {act!r:.80}; supported: {", ".join(HF_ACTIVATIONS)}')
        cfg = kind(**{ours: config[theirs] for ours, theirs in HF_SETTINGS.items() if hasattr(kind, ours)})
        cfg.act_kwargs, cfg.norm_kwargs = HF_ACTIVATIONS[act], {'eps': config['layer_norm_eps']}
        cfg.mlp_ratio = mlp_ratio(config['intermediate_size'], width)
        if width % heads:
            raise ValueError(f'{heads} heads do not divide the width {width}')
    if kind is VisionCfg:
        cfg.head_width = width // heads
    else:
        cfg.hf_tokenizer_name = 'tokenizer.json'  # it lies in the directory
        if config['eos_token_id'] != 2:  # 2 is transformers' mark for the older kind of pooling
            cfg.pool_type, cfg.eos_id = 'eos', config['eos_token_id']
    return as_dataclass(kind, asdict(cfg), f'{file}: {name}'), act == 'quick_gelu'


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio that Block makes this hidden width of: it cuts the product and does not round it."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def tower_to_hf(cfg: VisionCfg | TextCfg, clip: ClipCfg) -> dict:
    """vision_config or text_config of a CLIPModel; of a LLaVA, too."""
    vision, tanh = isinstance(cfg, VisionCfg), (cfg.act_kwargs or {}).get('approximate') == 'tanh'
    act = 'quick_gelu' if clip.quick_gelu else 'gelu_pytorch_tanh' if tanh else 'gelu'
    found = {theirs: getattr(cfg, ours) for ours, theirs in HF_SETTINGS.items() if hasattr(cfg, ours)}
    found |= {'num_attention_heads': cfg.width // cfg.head_width if vision else cfg.heads, 'hidden_act': act}
    found |= {'layer_norm_eps': (cfg.norm_kwargs or {}).get('eps', 1e-5), 'projection_dim': clip.embed_dim}
    found['intermediate_size'] = int(cfg.width * cfg.mlp_ratio)
    return {'model_type': f'clip_{"vision" if vision else "text"}_model', **found}


def not_in_hf(cfg: ClipCfg, preprocess: Preprocess, tokenizer: data.Tokenizer | None = None) -> list[str]:
    """What keeps Hugging Face's CLIPModel from being this CLIP; nothing: it can be. Without a tokenizer: what
    keeps its CLIPVisionModel from being the image tower, as far as its blocks."""
    v, t = cfg.vision_cfg, cfg.text_cfg
    reasons = {'the image tower has no LayerNorm before its blocks': v.no_ln_pre}
    reasons['images are padded'] = preprocess.resize_mode == 'longest'
    if tokenizer:
        reasons['its patches are averaged'] = v.pool_type == 'avg'
        reasons['the text tower has no causal mask'] = t.no_causal_mask
        reasons[f'the text is pooled at the {t.pool_type} token'] = t.pool_type in ('first', 'last')
        reasons['the end of the text has the id 2, which means something else there'] = tokenizer.eos == 2
    return [reason for reason, holds in reasons.items() if holds]


def hf_preprocessor(how: Preprocess, size: int, processor: str, pad: bool = False) -> dict:
    """preprocessor_config.json.   pad: to a square with the mean colour first, as LLaVA 1.5 does"""
    squash, square = how.resize_mode == 'squash', {'height': size, 'width': size}
    kind = {'image_processor_type': 'LlavaImageProcessor' if pad else 'CLIPImageProcessor'}
    kind |= {'processor_class': processor, **({'do_pad': True} if pad else {})}
    steps = {f'do_{step}': True for step in ('convert_rgb', 'resize', 'rescale', 'normalize')}
    sizes = {'size': square if squash else {'shortest_edge': size}, 'crop_size': square}
    values = {'rescale_factor': 1 / 255, 'image_mean': how.mean, 'image_std': how.std}
    values |= {'do_center_crop': not squash, 'resample': HF_FILTERS[how.interpolation]}
    return {**kind, **steps, **sizes, **values}


def preprocess_from_hf(place: Path, size: int) -> tuple[Preprocess, bool]:
    """(preprocess_cfg, whether images are padded to a square first) of a directory whose tower takes this
    size. What we would not write ourselves is an error."""
    file = place / 'preprocessor_config.json'
    file = file if file.is_file() else place / 'processor_config.json'  # of transformers 5
    how = data.read_json(file, str(place))
    with data.reading(f'{file}: image_processor', 'an object'):
        how = {'size': 224, 'crop_size': 224, 'resample': 3, **how.get('image_processor', how)}
    squash, pad = 'height' in str(how['size']), bool(how.get('do_pad'))
    given = {'mean': how.get('image_mean'), 'std': how.get('image_std')}
    given['resize_mode'] = 'squash' if squash else 'shortest'
    given['interpolation'] = 'bilinear' if how['resample'] == HF_FILTERS['bilinear'] else 'bicubic'
    found = as_dataclass(Preprocess, given, str(file))
    obeyed = ['size', 'resample', 'rescale_factor', 'do_resize', 'do_rescale', 'do_normalize']
    obeyed += ['crop_size'] if how.get('do_center_crop', True) else []
    obeyed += [] if squash else ['do_center_crop']
    ours = hf_preprocessor(found, size, '', pad)
    for key in obeyed:
        theirs = how.get(key, ours[key])
        if key in ('size', 'crop_size') and isinstance(theirs, int):  # short for a square
            theirs = dict.fromkeys(ours[key], theirs)
        if theirs != ours[key]:
            data.fail(f'{file}: {key} is {theirs!s:.80}; supported: {ours[key]}')
    return found, pad


def from_hf_directory(place: Path) -> tuple[ClipCfg, Preprocess]:
    """Of a CLIPModel."""
    file = place / 'config.json'
    config = data.read_json(file, str(place))
    (vision, quick_gelu), (text, quick_text) = (tower_from_hf(k, config, file) for k in (VisionCfg, TextCfg))
    if quick_gelu != quick_text:
        data.fail(f'{file}: one tower has the activation quick_gelu, the other has not; supported: both')
    cfg = ClipCfg(vision, text, config.get('projection_dim', 512), quick_gelu)
    preprocess, _ = preprocess_from_hf(place, vision.image_size)
    return from_open_clip(open_clip_config(cfg, preprocess), str(file))  # checks them


# ------------------------------------------------------------------------------- Hugging Face's CLIP: weights
# a part of a name of ours: theirs, after `vision_model.` or `text_model.`; pre_layrnorm is no slip of ours
HF_NAMES = {'class_embedding': 'embeddings.class_embedding', 'conv1': 'embeddings.patch_embedding'}
HF_NAMES |= {'positional_embedding': 'embeddings.position_embedding.weight'}
HF_NAMES |= {'token_embedding': 'embeddings.token_embedding', 'transformer.resblocks': 'encoder.layers'}
HF_NAMES |= {'ln_pre': 'pre_layrnorm', 'ln_post': 'post_layernorm', 'ln_final': 'final_layer_norm'}
HF_NAMES |= {'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}
HF_NAMES |= {'attn.out_proj': 'self_attn.out_proj', 'attn.in_proj_': 'self_attn.{}_proj.'}  # q, k, v
HF_TRANSPOSED = {'visual.proj': 'visual_projection.weight', 'text_projection': 'text_projection.weight'}


def hf_names(name: str) -> list[str]:
    """A weight of CLIP as CLIPModel calls it; three names for q, k and v, which are one matrix here."""
    if name == 'logit_scale' or name in HF_TRANSPOSED:
        return [HF_TRANSPOSED.get(name, name)]
    tower = 'vision_model.' if name.startswith('visual.') else 'text_model.'
    name = name.removeprefix('visual.')
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs, 1)
    return [tower + name.format(part) for part in ('qkv' if '{}' in name else 'q')]


def weights_to_hf(weights: dict[str, Tensor], names_of=hf_names) -> dict[str, Tensor]:
    """names_of: our name → theirs"""
    out = {}
    for name, w in weights.items():
        names = names_of(name)
        parts = w.chunk(3) if len(names) == 3 else [w.T if name in HF_TRANSPOSED else w]
        out |= dict(zip(names, parts, strict=True))
    return out


def weights_from_hf(weights: dict[str, Tensor], ours: dict[str, Tensor], where: str, names_of=hf_names):
    """The weights under our names, strictly: errors have the names of the file.   ours: (meta) tensors"""
    data.check_weights(weights, weights_to_hf(ours, names_of), where)
    out = {}
    for name in ours:
        parts = [weights[n] for n in names_of(name)]
        w = torch.cat(parts) if len(parts) > 1 else parts[0]
        out[name] = w.T if name in HF_TRANSPOSED else w
    return out


# -------------------------------------------------------------------------------------- what is said of a run
def arithmetic(cfg: Config, pairs, texts: list, model: CLIP, tokenizer: data.Tokenizer, world: int) -> str:
    """What is trained on what, and what an update costs, for the first output."""
    n = sum(p.numel() for p in model.parameters()) / 1e6
    cut, of = tokenizer.too_long(texts), f'of {len(texts)} captions are cut at {tokenizer.context} tokens'
    warning = f'\nwarning: {cut} {of}; see --context' if cut else ''
    size = f'CLIP with {n:.2f} M parameters at {model.visual.size} px, {tokenizer.vocab_size} token ids'
    share = f'global batch {cfg.batch_size} = {world} process{"es" * (world > 1)} × {cfg.batch_size // world}'
    if cfg.micro_batch:
        k = cfg.k if cfg.eps else 0
        costs = f'an update costs {(3 * k + 4) / 3:.2f} clean steps instead of {(2 * k + 3) / 3:.2f}'
        share += f', {cfg.micro_batch} at a time: {costs}'
    epochs = f'{cfg.steps} updates = {cfg.steps * cfg.batch_size / len(pairs):.1f} epochs of {len(pairs)}'
    return f'{pairs.note}{warning}\n{size}\n{share}; {attack_text(cfg)}; {epochs}'


def measuring(cfg: Config) -> str:
    """The command that fits: easyvqa's captions are classes, other people's are each another one."""
    if cfg.data == 'easyvqa':
        return shlex.join(['python', 'eval.py', 'zeroshot', cfg.out])
    command = ['python', 'eval.py', 'retrieval', cfg.out, '--data', cfg.data]
    command += ['--caption_key', cfg.caption_key] if cfg.caption_key != 'text' else []
    command += ['--index_dir', cfg.index_dir] if cfg.index_dir else []
    splits = ('test', 'val', 'validation', 'valid', 'train')
    there = [split for split in splits if (Path(cfg.data) / split).is_dir()] + ['test']
    return shlex.join(command + (['--split', there[0]] if there[0] != 'test' else []))


def attack_text(cfg) -> str:
    """Of both stages."""
    attack = f'ε {cfg.eps:g}/255, α {cfg.alpha:g}/255 × {cfg.k} steps' if cfg.eps else 'ε 0: no attack'
    return f'{attack}; forward-backward passes per update at full strength: {cfg.k + 1 if cfg.eps else 1}'


HUB_HEADER = 'library_name: open_clip\npipeline_tag: zero-shot-image-classification\ntags:\n- clip'
LOAD = ["open_clip.create_model_and_transforms('local-dir:RUN')"]
LOAD += ["transformers.CLIPModel.from_pretrained('RUN')"]


def card(cfg, what: str, stage: int, header: str, facts: str, load: list[str]) -> str:
    """A run's model card, of both stages. eval.py adds what it measures to the header, as `model-index`."""
    name = Path(cfg.out).name
    calls = ' or '.join(f'`{call.replace("RUN", name)}`' for call in load)
    return f"""---
{header}
- adversarial-robustness
---

# {name}

{what}, stage {stage} of [Double Visual Defense](https://arxiv.org/abs/2501.09446), commit {data.commit()}.
Settings are in `train_config.json`, the course of the training is in `log.jsonl`, measurements in `eval/`.

{facts}

To load it, from the folder that it is in: {calls}.

Trained at ε = {cfg.eps:g}/255 (l∞; 0: without an attack). Of larger perturbations, other norms, other changes
of an image nothing follows. Robustness is measured with attacks, not proved: a stronger attack can find more.
"""


# -------------------------------------------------------------------------- --plan: what it costs, beforehand
# peak FLOP/s of dense bfloat16 matrix products, by the makers' data sheets (which may put sparse ones first)
PEAK = {'a100': 312e12, 'h100': 989e12, 'h200': 989e12, 'b200': 2250e12, 'l40s': 362e12, 'mi300x': 1307e12}
SDPA, FORMULAS = '_scaled_dot_product_flash_attention', {op.__name__: f for op, f in flop_registry.items()}
FORMULAS[f'{SDPA}_for_cpu'] = FORMULAS[SDPA]  # backwards 4 products; a kernel's recomputation is not counted
FORMULAS[f'{SDPA}_for_cpu_backward'] = lambda _, *qkv, **__: 2 * FORMULAS[SDPA](*qkv[:3], out_val=qkv[0])


class Meter(TorchDispatchMode):
    """FLOPs of matrix products, by phase, and bytes of tensors, in what is called. For FakeTensorMode, whose
    tensors have no content: any step takes seconds and no memory.   answers: op → what it cannot know"""

    def __init__(self, **answers):
        super().__init__()
        self.answers, self.phase, self.flops, self.held = answers, 'update', Counter(), Counter()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        out = self.answers[name] if name in self.answers else function(*args, **kwargs)
        if name in FORMULAS:
            self.flops[self.phase] += FORMULAS[name](*args, **kwargs, out_val=out)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self.held:
                self.held[key] = t.untyped_storage().nbytes()
                self.peak = max(self.peak, self.held.total())
                weakref.finalize(t.untyped_storage(), self.held.pop, key)
        return out


def plan(cfg: Config, given: set[str], world: int, known: dict) -> list[tuple]:
    """Goes through a step with tensors of no content.   known: models by their --out; adds this one"""
    check_config(cfg, given, world)
    known[str(Path(cfg.out))] = settings = settings_of_model(cfg, given, known)
    meter, model = metered(cfg, *settings, world)
    px, length, n = model.visual.size, len(model.positional_embedding), cfg.batch_size // world
    image, both = (sum(p.numel() for p in m.parameters()) for m in (model.visual, model))
    cells = cfg.out, f'{image / 1e6:.1f} + {(both - image) / 1e6:.1f}', f'{px}'
    cells += f'{len(model.visual.positional_embedding)} + {length}', f'{cfg.eps:g} {cfg.alpha:g} {cfg.k}'
    said = f'{cfg.micro_batch or n} samples at a time on each of {world} GPUs, texts of {length} tokens'
    trained = image if is_fine_tuning(cfg) else both
    kept = 4 * trained * (2 + (world > 1)) + 4 * image * is_held(cfg)  # AdamW's moments, DDP's buckets, f₀
    ks = Counter(attack_at(cfg, step)[2] for step in range(cfg.steps))
    return [costs(cells, cfg.batch_size, ks, meter, n, kept, said)]


def metered(cfg: Config, clip_cfg: ClipCfg, preprocess: Preprocess, world: int = 1) -> tuple[Meter, CLIP]:
    """A rank's share of an update, by phase: attack (one step of it), update. And a CLIP of no content."""
    n, micro, amp = cfg.batch_size // world, cfg.micro_batch, torch.autocast('cpu', torch.bfloat16)
    px, length = clip_cfg.vision_cfg.image_size, clip_cfg.text_cfg.context_length
    tied = cfg.objective == 'clip'  # to the captions of the batch

    def loss_of(images: Tensor, text: Tensor, scale: Tensor, kept=None) -> Tensor:
        with amp:
            features = model(images, micro, kept=kept)
        return info_nce(features, torch.cat([text, others]), scale, micro) if tied else features.sum()

    with FakeTensorMode(), Meter(_local_scalar_dense=length - 1) as meter:  # a text ends with the last token
        model, x = CLIP(clip_cfg, preprocess), torch.empty(n, 3, px, px)
        model.requires_grad_(not is_fine_tuning(cfg)).visual.requires_grad_(True)
        text = torch.empty(n, clip_cfg.embed_dim)
        with amp:
            text = model.encode_text(torch.empty(n, length, dtype=torch.long), micro) if tied else text
            with torch.no_grad():
                in_parts(model.visual, x, micro) if is_held(cfg) else None  # f₀
        others, meter.phase = torch.empty(cfg.batch_size - n, clip_cfg.embed_dim), 'attack'  # of other GPUs
        kept = torch.arange(round((1 - cfg.drop) * (len(model.visual.positional_embedding) - 1)) + 1)
        with frozen(model.visual):
            constants = text.detach(), model.logit_scale.detach(), kept if cfg.drop else None
            attacks.pgd(lambda x: loss_of(x, *constants), x, 1.0, 1.0, 1)
        meter.phase = 'update'
        loss_of(x, text, model.logit_scale).backward()
    return meter, model


def costs(cells: tuple, batch_size: int, ks: Counter, meter: Meter, n: int, kept: int, said: str) -> tuple:
    """(a row of the table, FLOPs of the whole schedule); prints those of a step.   ks: updates for every K.
    n: samples that were metered.  kept: bytes that the meter did not see.  said: what is assumed"""
    attack, update = (meter.flops[phase] / n * batch_size for phase in ('attack', 'update'))
    print(f'{cells[0]}: {said}. FLOPs of a step:')
    for k, updates in sorted(ks.items()):
        print(f'  K = {k}: attack {k * attack:.4g} + update {update:.4g}, {updates} of {ks.total()} times')
    attack *= sum(k * updates for k, updates in ks.items()) / ks.total()
    giga = ' + '.join(f'{flops / batch_size / 1e9:.4g}' for flops in (attack, update))
    samples, flops = batch_size * ks.total(), ks.total() * (attack + update)
    cells += f'{batch_size}', f'{samples:.3g}', giga, f'{(meter.peak + kept) / 1e9:.1f}', f'{flops:.3g}'
    return cells, flops


def print_plans(cfg, given: set[str], stages: dict) -> None:
    """Of this command, or of all in --plan FILE.sh.   stages: {script: (Config, plan)}, the caller's last"""
    if cfg.gpu not in PEAK or not 0 < cfg.mfu <= 1:
        data.fail(f'--gpu {cfg.gpu} --mfu {cfg.mfu:g}: must be one of {", ".join(PEAK)}, and in 0 … 1')
    known, plans, world, script = {}, [], int(os.environ.get('WORLD_SIZE', 1)), ''
    if cfg.plan:
        script = data.read_text(Path(cfg.plan), '--plan').replace('\\\n', ' ')
    else:
        plans = [*stages.values()][-1][1](cfg, given, world, known)
    for line in script.splitlines():
        with data.reading(f'--plan {cfg.plan}: {line.strip()[:60]!r}', 'a command as a shell reads it'):
            words = shlex.split(line, comments=True)
        for at in [i for i, word in enumerate(words) if Path(word).name in stages][:1]:
            per = re.findall(r'--(?:nnodes|nproc[-_]per[-_]node)[ =](\S+)', ' '.join(words[:at]))
            if odd := [count for count in per if not count.isdigit()]:
                data.fail(f'--plan {cfg.plan}: {odd[0]} of {line.strip()[:60]!r} is no number of processes')
            kind, plan = stages[Path(words[at]).name]
            plans += plan(*data.parse(kind, '', words[at + 1 :]), math.prod(map(int, per)), known)
    if not plans:
        data.fail(f'--plan {cfg.plan}: no command in it runs {" or ".join(stages)}')
    speed, total = cfg.mfu * PEAK[cfg.gpu] * 3600, sum(flops for _, flops in plans)
    head = 'run|parameters, M|px|tokens|ε α K|batch|samples|GFLOP a sample, attack + update|GB a GPU|FLOPs'
    rows = [(*row, f'{flops / speed:,.1f}') for row, flops in plans]
    rows += [('sum', *[''] * 8, f'{total:.3g}', f'{total / speed:,.1f}')]
    rows = [(*head.split('|'), f'{cfg.gpu}-hours'), *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(f'{cell:<{w}}' for cell, w in zip(row, widths)))
    print(f'at {cfg.mfu:.0%} of {PEAK[cfg.gpu] / 1e12:g} TFLOP/s, dense bfloat16. FLOPs: of the matrix')
    print(
        'products that are run, causal attention whole. Memory: weights, gradients, AdamW, DDP, what a step'
    )
    print('holds at its fullest under bfloat16 autocast, not compiled; some GB more for CUDA, its allocator')


if __name__ == '__main__':
    cfg, given = data.parse(Config, __doc__)
    stages = {'clip_adv.py': (Config, plan)}
    print_plans(cfg, given, stages) if 'plan' in given else main(cfg, given)
