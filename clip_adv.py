"""Stage 1 of Double Visual Defense (arXiv 2501.09446): ΔCLIP, a CLIP trained from scratch on adversarial images.

    min over θ   E over (x, t)   max over ‖δ‖∞ ≤ ε, 0 ≤ x+δ ≤ 1   of   L( f(x+δ), g(t) )          L: symmetric InfoNCE

    torchrun clip_adv.py                                    # ΔCLIP on easy-VQA, 2 CPU cores, under 10 minutes
    torchrun clip_adv.py --eps 0 --out runs/clip            # vanilla CLIP: same samples, same number of updates
    torchrun --nproc_per_node 8 clip_adv.py --data DIR ...  # a folder with metadata.jsonl, 8 GPUs
    python eval.py zeroshot runs/clip runs/clip_adv         # both under attack

The file reads top to bottom: configuration, model, loss, the two schedules, main. Formats and plumbing come last.
Pixels are float32 in [0, 1] everywhere outside the image tower, ε and α are in 1/255 on the command line only.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import typing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import attacks
import data


@dataclass
class Config:
    out: str = 'runs/clip_adv'    # run directory: checkpoints, log, and a model that open_clip and transformers open
    data: str = 'easyvqa'         # 'easyvqa', or a folder with metadata.jsonl (file_name, text)
    holdout: str = ''             # captions left out of training, e.g. 'red circle,blue triangle'
    workers: int = 0              # image-decoding processes per rank; 0: none of its own
    init: str = ''                # start from these weights (--size may differ): a run, a CLIP of open_clip or Hugging Face, a repository id
    resume: bool = False          # continue the run in --out; start it where there is none
    overwrite: bool = False       # replace the run in --out, once the new one has a checkpoint
    seed: int = 0                 # of weights, order, augmentation and δ₀
    # attack
    eps: float = 14.              # radius ε of the l∞ ball, in 1/255; 0 trains a vanilla CLIP
    alpha: float | None = None    # step size α, in 1/255; default 0.75 ε (the paper's 3 for ε = 4)
    k: int = 2                    # PGD steps K
    eps_from: float = 0.18        # ε (and α) ramp up linearly from this fraction of the run …
    eps_to: float = 0.55          # … to this one; before the ramp training is clean, and cheap
    k_from: float = 0.60          # until this fraction of the run the attack has 1 step of 1.25 ε, then K of α
    # model (ignored with --init and --arch, which bring theirs)
    size: int = 32                # side of the image in pixels
    patch: int = 4                # side of a patch in pixels
    width: int = 64               # of the image tower
    layers: int = 3               # of the image tower
    head_width: int = 32          # of the image tower's attention heads
    mlp_ratio: float = 4.0        # hidden width of the blocks' MLPs / width
    embed_dim: int = 64           # of the shared embedding
    text_width: int = 64          # of the text tower
    text_layers: int = 2          # of the text tower
    text_heads: int = 2           # of the text tower
    context: int = 8              # tokens of a caption, start and end included; longer ones are cut
    arch: str = ''                # an open_clip model configuration (JSON) instead, e.g. ViT-H-14-CLIPA-336.json; also what a file in --init is
    tokenizer: str = ''           # tokenizer.json or WordPiece vocab.txt; default: a BPE trained on the captions (with a file in --init: its own)
    vocab_size: int = 8192        # upper limit for that BPE
    # optimisation
    batch_size: int = 32          # global: of all processes together
    steps: int = 5000             # updates
    lr: float = 1.5e-3            # peak learning rate
    warmup: int = 100             # steps of linear warm-up; cosine to 0 after it
    wd: float = 0.05              # weight decay, on matrices only
    beta2: float = 0.95           # of AdamW; β₁ is 0.9
    clip: float = 1.0             # limit of the gradient's l2 norm
    # running
    compile: bool | None = None   # torch.compile both towers; default: on CUDA only
    log_every: int = 50           # steps between lines of log.jsonl
    save_every: int = 500         # steps between checkpoints


# ============================================================================================================== model
# One block serves both towers. Parameter names are open_clip's (which are OpenAI's), so weights go both ways as they are.
class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                             # [B, N, 3W]
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)               # 3 × [B, heads, N, W/heads]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))                                    # [B, N, W]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: nn.Module, ln_eps: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, ln_eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, ln_eps)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential()
        self.mlp.add_module('c_fc', nn.Linear(width, hidden))
        self.mlp.add_module('gelu', activation)
        self.mlp.add_module('c_proj', nn.Linear(hidden, width))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float, activation: nn.Module, ln_eps: float):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation, ln_eps) for _ in range(layers))
        for block in self.resblocks:  # OpenAI's initialisation, for both towers
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(width * 2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(width * 2 * layers) ** -0.5)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x


class QuickGELU(nn.Module):
    """The activation of OpenAI's weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(cfg: dict, quick_gelu: bool) -> nn.Module:
    return QuickGELU() if quick_gelu else nn.GELU(**(cfg['act_kwargs'] or {}))


class ViT(nn.Module):
    """Image tower f: float32 [B, 3, S, S] in [0, 1] → [B, embed_dim], not normalised. Mean and std live in here."""

    def __init__(self, cfg: dict, embed_dim: int, quick_gelu: bool, mean: list[float], std: list[float]):
        super().__init__()
        width, ln_eps = cfg['width'], (cfg['norm_kwargs'] or {}).get('eps', 1e-5)
        self.patch, self.pool, self.ln_after_pool = cfg['patch_size'], cfg['pool_type'], cfg['final_ln_after_pool']
        self.size = cfg['image_size']
        self.register_buffer('mean', torch.tensor(mean, device='cpu').view(3, 1, 1), persistent=False)  # real where the weights are on 'meta'
        self.register_buffer('std', torch.tensor(std, device='cpu').view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, width, self.patch, self.patch, bias=False)  # the name and the shape; see embed
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn((self.size // self.patch) ** 2 + 1, width))
        self.ln_pre = nn.Identity() if cfg['no_ln_pre'] else nn.LayerNorm(width, ln_eps)
        self.transformer = Transformer(width, cfg['layers'], width // cfg['head_width'], cfg['mlp_ratio'],
                                       activation(cfg, quick_gelu), ln_eps)
        self.ln_post = nn.LayerNorm(width, ln_eps)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed_dim))

    def embed(self, x: Tensor) -> Tensor:
        """Pixels → the tokens that enter the first block, [B, 1 + patches, width]; the first is the class token."""
        x = (x - self.mean) / self.std
        # A convolution whose stride is its kernel is one matrix product over patches, and as that it is the faster one
        # on a CPU, most of all backwards to the pixels, which is what the attack needs.
        x = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)                       # [B, patches, 3·p·p]
        x = F.linear(x, self.conv1.weight.flatten(1))                                         # [B, patches, W]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.ln_pre(x + self.positional_embedding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformer(self.embed(x))
        if not self.ln_after_pool:
            x = self.ln_post(x)
        x = x[:, 0] if self.pool == 'tok' else x[:, 1:].mean(dim=1)
        if self.ln_after_pool:
            x = self.ln_post(x)
        return x @ self.proj


class TextTower(nn.Module):
    """Text tower g: token ids [B, L] → [B, embed_dim], not normalised."""

    def __init__(self, cfg: dict, embed_dim: int, quick_gelu: bool):
        super().__init__()
        width, ln_eps = cfg['width'], (cfg['norm_kwargs'] or {}).get('eps', 1e-5)
        self.causal, self.text_pool, self.eos_id = not cfg['no_causal_mask'], cfg['pool_type'], cfg['eos_id']
        self.token_embedding = nn.Embedding(cfg['vocab_size'], width)
        self.positional_embedding = nn.Parameter(torch.empty(cfg['context_length'], width))
        self.transformer = Transformer(width, cfg['layers'], cfg['heads'], cfg['mlp_ratio'],
                                       activation(cfg, quick_gelu), ln_eps)
        self.ln_final = nn.LayerNorm(width, ln_eps)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width ** -0.5)

    def text_features(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.causal))                                   # [B, L, W]
        if self.text_pool in ('argmax', 'eos'):  # where the end of the text is: its id is the highest, or known
            end = tokens.argmax(-1) if self.text_pool == 'argmax' else (tokens == self.eos_id).int().argmax(-1)
            x = x[torch.arange(len(x), device=x.device), end]
        else:
            x = x[:, -1] if self.text_pool == 'last' else x[:, 0]
        return x @ self.text_projection


class CLIP(TextTower):
    """Both towers and the logit scale 1/τ, stored as its logarithm.

    It *is* a text tower with an image tower in `visual`, since that is how OpenAI named the parameters. Calling the
    module embeds images, so that the update goes through DistributedDataParallel; encode_text embeds captions.
    """

    def __init__(self, model_cfg: dict, preprocess_cfg: dict):
        cfg, preprocess = complete(model_cfg, preprocess_cfg)
        super().__init__(cfg['text_cfg'], cfg['embed_dim'], cfg['quick_gelu'])
        self.model_cfg, self.preprocess_cfg = model_cfg, preprocess
        self.visual = ViT(cfg['vision_cfg'], cfg['embed_dim'], cfg['quick_gelu'], preprocess['mean'], preprocess['std'])
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, S, S] in [0, 1] → float32 unit vectors [B, embed_dim]"""
        return F.normalize(self.visual(images).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] → float32 unit vectors [B, embed_dim]"""
        return F.normalize(self.text_features(tokens).float(), dim=-1)


# =============================================================================================================== loss
def info_nce(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the global batch, CLIP's loss.   image, text: unit vectors [B, D], pairs in equal rows.

    Every other row is a negative, an equal caption too, as in CLIP. (It does no harm: equal captions have equal
    embeddings, so that all they add to image → text is the logarithm of how often the caption is in the batch.)
    """
    logits = log_scale.exp() * image @ text.T                                                 # [B, B]
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


class Gather(torch.autograd.Function):
    """[b, D] on each of W ranks → [W·b, D] on all. The loss is then computed whole on every rank.

    Backward keeps the rank's own rows, which is exact, as every rank has the whole loss; times W, as DDP will average.
    Without the gradient, or with each rank's own negatives only, this would be another loss (and another attack).
    """

    @staticmethod
    def forward(ctx, x):
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def gather(x: Tensor) -> Tensor:
    return Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


# ========================================================================================================== schedules
def attack_at(cfg: Config, step: int) -> tuple[float, float, int]:
    """(ε, α, K) of a step, ε and α in [0, 1] units; K = 0 means clean.

    Our schedule (the authors' is not public). It follows their idea at one resolution: the long part cheap and weak,
    the short last part at full strength.
    """
    done = step / cfg.steps
    ramp = min(max((done - cfg.eps_from) / (cfg.eps_to - cfg.eps_from), 0), 1) if cfg.eps_to > cfg.eps_from \
        else float(done >= cfg.eps_to)
    eps, alpha, k = ramp * cfg.eps / 255, ramp * cfg.alpha / 255, cfg.k
    if done < cfg.k_from and cfg.k > 1:
        alpha, k = 1.25 * eps, 1  # fast adversarial training, Wong et al. 2020, arXiv 2001.03994
    return eps, alpha, k if eps > 0 else 0


def lr_at(cfg: Config, step: int) -> float:
    """Linear warm-up, then cosine to 0."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))


@contextlib.contextmanager
def frozen(module: nn.Module):
    """Eval mode, no gradient for parameters: what an attack needs. (A compiled module would otherwise compute the
    gradients of all weights on every attack step, only to throw them away.) Restores both."""
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


# ======================================================================================================== the training
def main(cfg: Config, given: set[str] | None = None) -> None:
    """Trains. given: the names of the settings that the user chose; default: those that differ from Config's."""
    rank, world, device = start_processes()
    state, cfg = open_run(cfg, given)
    check_config(cfg, world, resumed=state is not None)
    all_agree(state['step'] if state else 0, cfg, world)

    # ------------------------------------------------------------------------------------ data, model, optimizer
    pairs = data.load_pairs(cfg.data, 'train', cfg.holdout)
    model, tokenizer = build(cfg, given, pairs, state)
    model.to(device).train()
    compile_towers(model, cfg, device)
    step_model = DDP(model, broadcast_buffers=False) if world > 1 else model
    optimizer = torch.optim.AdamW([
        {'params': [p for p in model.parameters() if p.ndim >= 2], 'weight_decay': cfg.wd},
        {'params': [p for p in model.parameters() if p.ndim < 2], 'weight_decay': 0.}], betas=(0.9, cfg.beta2), fused=True)
    first_step = 0
    if state is not None:
        optimizer.load_state_dict(state['optimizer'])
        first_step = state['step']
    run = Run(cfg, model, tokenizer, optimizer, rank, first_step, cfg.steps)
    if rank == 0:
        run.introduce(run.arithmetic(pairs, world), world, device)
    batches = data.batches(pairs, tokenizer, model.visual.size, model.preprocess_cfg, batch_size=cfg.batch_size,
                           first_step=first_step, last_step=cfg.steps, seed=cfg.seed, rank=rank, world=world,
                           workers=cfg.workers)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')
    bar = tqdm(batches, initial=first_step, total=cfg.steps, disable=rank > 0, desc='clip_adv', smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 30)             # a file needs no line for each update

    # ------------------------------------------------------------------------------------------ the training loop
    for step, (images, tokens) in enumerate(run.read(bar), first_step):
        logging = (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps
        clock = Clock(device if logging else None)
        x = images.to(device, non_blocking=True).float() / 255         # [b, 3, S, S], this rank's part of the batch
        tokens = tokens.to(device, non_blocking=True)
        eps, alpha, k = attack_at(cfg, step)

        # 1. Encode the text once, for the attack and the update alike: the perturbation does not touch it.
        with amp:
            text = gather(model.encode_text(tokens))                   # [B, D], the whole batch
        fixed_text, fixed_scale = text.detach(), model.logit_scale.detach()

        def loss_of(images: Tensor) -> Tensor:
            """The loss of the global batch as a function of this rank's images, all else fixed."""
            with amp:
                features = model(images)
            return info_nce(gather(features), fixed_text, fixed_scale)

        # 2. Attack the images: the maximisation over δ. Every rank perturbs its own, against everybody's negatives.
        x_adv = x
        with frozen(model.visual):
            if k > 0:
                noise = [data.generator(cfg.seed, 'start', step * cfg.batch_size + rank * len(x) + i) for i in range(len(x))]
                x_adv = attacks.pgd(loss_of, x, eps, alpha, k, attacks.random_start(x, eps, noise))
                attacks.check(x, x_adv, eps)
            attack_ms = clock.lap_ms()
            with torch.no_grad():
                loss_clean = loss_of(x).item() if logging else None
            clock.lap_ms()                                             # measuring the clean loss is not training

        # 3. Update the weights on the adversarial images only: the minimisation over θ.
        with amp:
            features = step_model(x_adv)
        loss = info_nce(gather(features), text, model.logit_scale)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        if not math.isfinite(loss.item()) or not math.isfinite(grad_norm.item()):  # the same on all ranks
            run.fail(step, loss.item(), grad_norm.item())
        for group in optimizer.param_groups:
            group['lr'] = lr_at(cfg, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        train_ms = clock.lap_ms()

        # 4. Log, save, and stop when asked to, all ranks at the same step.
        if logging:
            run.log(step + 1, bar, cfg.batch_size, loss_adv=loss.item(), loss_clean=loss_clean, eps=eps * 255, alpha=alpha * 255, k=k,
                    lr=lr_at(cfg, step), grad_norm=grad_norm.item(), logit_scale=model.logit_scale.exp().item(),
                    attack_ms=attack_ms, train_ms=train_ms)
        run.save_or_leave(step + 1, (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps, bar, world, device)
    bar.close()
    wrong = not_in_hf(whole_of(model), tokenizer)
    run.finish(f'{cfg.out} opens in open_clip as local-dir:{cfg.out}' + (f' (but not in transformers, whose CLIPModel cannot be this model: {"; ".join(wrong)})'
               if wrong else f' and in transformers as {cfg.out}') + f'; measure it with: python eval.py zeroshot {cfg.out}')


# ====================================================================================================================
# Below: formats and plumbing. Nothing of the method is hidden here.
# ====================================================================================================================

# ------------------------------------------------------------------------------------- model configuration (open_clip's)
VISION = dict(image_size=224, patch_size=16, width=768, layers=12, head_width=64, mlp_ratio=4.0, no_ln_pre=False,
              pool_type='tok', final_ln_after_pool=False, act_kwargs=None, norm_kwargs=None)
TEXT = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12, mlp_ratio=4.0, no_causal_mask=False,
            pool_type='argmax', eos_id=2, act_kwargs=None, norm_kwargs=None,
            hf_tokenizer_name=None, tokenizer_mode=None, tokenizer_kwargs=None, vocab_path=None)  # these four: which tokenizer, not which tower
PREPROCESS = dict(size=None, mode='RGB', mean=[0.48145466, 0.4578275, 0.40821073], std=[0.26862954, 0.26130258, 0.27577711],
                  interpolation='bicubic', resize_mode='shortest', fill_color=0)
OUR_PREPROCESS = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], interpolation='bilinear',
                      resize_mode='shortest')  # ΔCLIP's: ImageNet's mean and std


def complete(model_cfg: dict, preprocess_cfg: dict, place: str = '') -> tuple[dict, dict]:
    """open_clip's configuration with its defaults filled in. A key or a value that we would not obey is an error.   place: where it lies, for that"""
    at = f'error: {place}: ' if place else 'error: '

    def fill(given: dict, defaults: dict, where: str) -> dict:
        if not isinstance(given, dict):
            raise SystemExit(f'{at}{where} is {given!r}; expected an object')
        if unknown := sorted(set(given) - set(defaults)):
            raise SystemExit(f'{at}{where}: unknown key {", ".join(unknown)}; supported: {", ".join(defaults)}')
        return {**defaults, **given}
    cfg = fill(model_cfg, dict(embed_dim=512, vision_cfg={}, text_cfg={}, quick_gelu=False), 'model_cfg')
    cfg['vision_cfg'] = fill(cfg['vision_cfg'], VISION, 'vision_cfg')
    cfg['text_cfg'] = fill(cfg['text_cfg'], TEXT, 'text_cfg')
    preprocess = fill(preprocess_cfg, PREPROCESS, 'preprocess_cfg')
    v, t = cfg['vision_cfg'], cfg['text_cfg']
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    for of, name, defaults in ((cfg, 'model_cfg', {'embed_dim': 1, 'quick_gelu': False}), (v, 'vision_cfg', VISION), (t, 'text_cfg', TEXT)):
        for key, default in defaults.items():
            if isinstance(default, bool) and not isinstance(of[key], bool):
                raise SystemExit(f'{at}{name}.{key} is {of[key]!r}; supported: true, false')
        whole_numbers(of, {key: 0 if key == 'eos_id' else 1 for key, default in defaults.items() if type(default) is int}, f'{at}{name}.', ' (a ViT, square images)')
        if not number(of.get('mlp_ratio', 4)):
            raise SystemExit(f'{at}{name}.mlp_ratio is {of["mlp_ratio"]!r}; supported: a positive number')
        for key, inner, allowed in (('act_kwargs', 'approximate', lambda x: x in ('none', 'tanh')), ('norm_kwargs', 'eps', number)):
            given = of.get(key) or {}
            if unknown := set(given) - {inner}:
                raise SystemExit(f'{at}{name}.{key}: unknown key {", ".join(sorted(unknown))}; supported: {inner}')
            if given and not allowed(given[inner]):
                raise SystemExit(f'{at}{name}.{key}.{inner} is {given[inner]!r}; supported: ' + ('none, tanh' if inner == 'approximate' else 'a positive number'))
    for key in ('mean', 'std'):
        if not isinstance(preprocess[key], (list, tuple)) or len(preprocess[key]) != 3 or not all(number(x) or key == 'mean' and x == 0 for x in preprocess[key]):
            raise SystemExit(f'{at}preprocess_cfg.{key} is {preprocess[key]!r}; supported: three numbers, of images in [0, 1]')
    for value, allowed, where in [
            (v['pool_type'], ('tok', 'avg'), 'vision_cfg.pool_type'),
            (t['pool_type'], ('argmax', 'eos', 'last', 'first'), 'text_cfg.pool_type'),
            (preprocess['interpolation'], ('bilinear', 'bicubic'), 'preprocess_cfg.interpolation'),
            (preprocess['resize_mode'], ('shortest', 'squash', 'longest'), 'preprocess_cfg.resize_mode'),
            (preprocess['mode'], ('RGB',), 'preprocess_cfg.mode'), (preprocess['fill_color'], (0,), 'preprocess_cfg.fill_color')]:
        if value not in allowed:
            raise SystemExit(f'{at}{where} is {value!r}; supported: {", ".join(map(str, allowed))}')
    for value, divisor, what in [(v['image_size'], v['patch_size'], 'image size (--size) must be divisible by the patch (--patch)'),
                                 (v['width'], v['head_width'], 'width (--width) must be divisible by the head width (--head_width)'),
                                 (t['width'], t['heads'], 'text width (--text_width) must be divisible by the heads (--text_heads)')]:
        if value % divisor:
            raise SystemExit(f'error: the {what}: {value} / {divisor}')
    return cfg, preprocess


def whole_numbers(config: dict, least: dict[str, int], where: str, hint: str = '') -> None:
    """Refuses what is no whole number, or less than the least.   where: what the message begins with"""
    for key, bound in least.items():
        if key in config and (type(config[key]) is not int or config[key] < bound):
            raise SystemExit(f'{where}{key} is {config[key]!r}; supported: a whole number{hint}')


def whole_of(model: CLIP) -> dict:
    """All that a CLIP is made of: model_cfg with its defaults, and preprocess_cfg in it."""
    whole, preprocess = complete(model.model_cfg, model.preprocess_cfg)
    return whole | {'preprocess_cfg': preprocess}


def create(model_cfg: dict, preprocess_cfg: dict, seed: int = 0) -> CLIP:
    """A CLIP with random weights that depend on the seed alone; the global generator is left as it was."""
    with seeded(seed):
        return CLIP(model_cfg, preprocess_cfg)


@contextlib.contextmanager
def seeded(seed: int):
    """PyTorch's layers draw their first weights from the global generator. In here it is seeded; afterwards it is what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def build(cfg: Config, given: set[str] | None, pairs: data.Pairs, state: dict | None) -> tuple[CLIP, data.Tokenizer]:
    """The model and its tokenizer: of the checkpoint being resumed, of --init, of --arch, or of the flags."""
    if state is not None:
        model = create(state['model_cfg'], state['preprocess_cfg'])
        load_weights(model, state['model'], f'{cfg.out}/train_state.pt')
        return model, data.tokenizer_from_text(state['tokenizer'], complete(state['model_cfg'], {})[0]['text_cfg'])
    if cfg.init:
        model, tokenizer = load_clip(cfg.init, cfg.size if 'size' in typed(cfg, given) else None, cfg.arch, cfg.tokenizer, '--init')
        v, t = (complete(model.model_cfg, {})[0][f'{n}_cfg'] for n in ('vision', 'text'))
        theirs = dict(patch=v['patch_size'], width=v['width'], layers=v['layers'], head_width=v['head_width'],
                      embed_dim=model.model_cfg['embed_dim'], text_width=t['width'], text_layers=t['layers'],
                      text_heads=t['heads'], context=t['context_length'])
        for name, value in theirs.items():
            if name in typed(cfg, given) and getattr(cfg, name) != value:
                raise SystemExit(f'error: --init {cfg.init} is of another architecture: its {name} is {value}, '
                                 f'--{name} says {getattr(cfg, name)}; leave the flag out (only --size may differ)')
        return model, tokenizer
    model_cfg = read_arch(cfg.arch)['model_cfg'] if cfg.arch else {}
    context = cfg.context
    if cfg.arch:  # its own size and context length, unless the flags say otherwise
        if 'size' in typed(cfg, given):
            model_cfg['vision_cfg']['image_size'] = cfg.size
        if 'context' not in typed(cfg, given):
            context = complete(model_cfg, {})[0]['text_cfg']['context_length']
        model_cfg['text_cfg']['context_length'] = context
    if cfg.tokenizer:
        tokenizer = data.read_tokenizer(cfg.tokenizer, context, pool=complete(model_cfg, {})[0]['text_cfg']['pool_type'])
    else:
        tokenizer = data.train_tokenizer(pairs.captions, context, cfg.vocab_size)
    if not cfg.arch:
        model_cfg = dict(
            embed_dim=cfg.embed_dim,
            vision_cfg=dict(image_size=cfg.size, patch_size=cfg.patch, width=cfg.width, layers=cfg.layers,
                            head_width=cfg.head_width, mlp_ratio=cfg.mlp_ratio),
            text_cfg=dict(context_length=context, width=cfg.text_width, heads=cfg.text_heads, layers=cfg.text_layers))
        if tokenizer.mode == 'clips':  # the last token is always [CLS], and only without a causal mask it is of any use
            model_cfg['text_cfg'] |= dict(pool_type='last', no_causal_mask=True)
    model_cfg['text_cfg'] = own_tokenizer(model_cfg['text_cfg'], tokenizer) | dict(vocab_size=tokenizer.vocab_size)
    return create(model_cfg, OUR_PREPROCESS, cfg.seed), tokenizer


# ------------------------------------------------------------------------------------------------- loading and saving
def load_clip(path: str | os.PathLike, size: int | None = None, arch: str = '', tokenizer: str | None = '', what: str = '') -> tuple[CLIP, data.Tokenizer | None]:
    """A CLIP, from wherever it comes → (model in eval mode, tokenizer).

    path: a run directory; an open_clip directory; a file of open_clip's weights (.safetensors, .bin, .pt) beside an open_clip_config.json; a
    Hugging Face directory of a CLIPModel; or a repository id of the hub.  size: interpolates the position embedding to images of this side.
    arch, tokenizer: what a file of weights is, where no open_clip_config.json lies beside it; with tokenizer None, none is looked for, and None
    is returned (stage 2 needs the image tower alone).  what: the flag that named it, for errors.
    """
    if str(path) == Config.out and not Path(path).exists():
        raise SystemExit(f'error: {what or "DIR"} {path}: no such directory; make it first: python clip_adv.py')
    place = data.locate(path, what)
    config, hugging_face = description(place, arch, tokenizer)
    whole, preprocess = complete(config['model_cfg'], config['preprocess_cfg'], str(place))
    vision, text = whole['vision_cfg'], whole['text_cfg']

    with torch.device('meta'):  # no first weights are drawn, and none are held twice
        shapes = {name: w.shape for name, w in CLIP(config['model_cfg'], preprocess).state_dict().items()}
    weights = dict(stored(place, HF_FILES if hugging_face else OPEN_CLIP_FILES))
    if 'logit_scale' in weights and weights['logit_scale'].numel() == 1:
        weights['logit_scale'] = weights['logit_scale'].reshape(())  # some have it as a vector of one
    weights = (from_hf if hugging_face else fitting)(weights, shapes, str(place))

    tokens = None
    if tokenizer:
        tokens = data.read_tokenizer(tokenizer, text['context_length'], data.tokenizer_mode(text), text['pool_type'])
    elif tokenizer is not None:
        tokens = data.tokenizer_of(place if place.is_dir() else place.parent, text)
    if tokens and (tokens.vocab_size > text['vocab_size'] or text['pool_type'] == 'eos' and tokens.eos != text['eos_id']):
        raise SystemExit(f'error: {path}: the tokenizer has {tokens.vocab_size} ids and ends a text with {tokens.eos}; the model has {text["vocab_size"]}'
                         + f' and looks for {text["eos_id"]}' * (text['pool_type'] == 'eos'))

    vision_cfg, text_cfg = (dict(config['model_cfg'].get(name, {})) for name in ('vision_cfg', 'text_cfg'))
    model_cfg = {**config['model_cfg'], 'vision_cfg': vision_cfg, 'text_cfg': own_tokenizer(text_cfg, tokens) if tokens else text_cfg}
    if size is not None and size != vision['image_size']:
        model_cfg['vision_cfg']['image_size'], preprocess['size'] = size, None
        complete(model_cfg, preprocess)
        weights['visual.positional_embedding'] = resize_positions(weights['visual.positional_embedding'], size // vision['patch_size'])
    with torch.device('meta'):
        model = CLIP(model_cfg, preprocess)
    model.load_state_dict({name: torch.empty(w.shape).copy_(weights.pop(name)) for name, w in model.state_dict().items()}, assign=True)
    return model.eval(), tokens


def description(place: Path, arch: str, tokenizer: str) -> tuple[dict, bool]:
    """({'model_cfg', 'preprocess_cfg'} of open_clip's kind, whether the weights have Hugging Face's names) of a directory or a file of weights"""
    file = (place if place.is_dir() else place.parent) / 'open_clip_config.json'
    if (arch or tokenizer) and (place.is_dir() or file.is_file()):
        raise SystemExit(f'error: --arch and --tokenizer say what a file of weights is; {place} says it of itself: leave them out')
    if file.is_file():
        config = data.read_json(file, str(place), dict)
        if missing := {'model_cfg', 'preprocess_cfg'} - set(config):
            raise SystemExit(f'error: {file} has no "{min(missing)}"')
        return config, False
    if place.is_file():
        if not arch:
            raise SystemExit(f'error: {place}: no open_clip_config.json beside it, so that it is not known what the weights are of: '
                             f'name open_clip\'s model configuration, --arch FILE.json (or its name, with open_clip installed)')
        return read_arch(arch), False
    kind = model_type(place)
    if kind == 'clip':
        return from_hf_config(place), True
    raise SystemExit(f'error: {place} is no CLIP: no open_clip_config.json, and ' + (
        f'config.json says {kind!r}' + ' (a LLaVA: what is in it is not a whole CLIP)' * (kind == 'llava') if kind else 'no config.json whose model_type is clip'))


OPEN_CLIP_FILES = [(None, name) for name in ('open_clip_model.safetensors', 'open_clip_pytorch_model.safetensors', 'open_clip_pytorch_model.bin',
                                             'model.safetensors', 'pytorch_model.bin')]  # in open_clip's order
HF_FILES = [('model.safetensors.index.json', 'model.safetensors'), ('pytorch_model.bin.index.json', 'pytorch_model.bin')]  # shards' index, single file


def model_type(place: Path) -> str | None:
    """What the config.json of a Hugging Face directory says that it is."""
    return (data.peek_json(place / 'config.json') or {}).get('model_type')


def read_arch(arch: str) -> dict:
    """{'model_cfg', 'preprocess_cfg'} of a model configuration of open_clip: a JSON file, or its name where open_clip is installed."""
    import importlib.util
    file, found = Path(arch), importlib.util.find_spec('open_clip')
    if not file.is_file() and found and (known := Path(found.origin).parent / 'model_configs' / f'{arch.replace("/", "-")}.json').is_file():
        file = known
    config = data.read_json(file, '--arch', dict)
    config = config if 'model_cfg' in config else {'model_cfg': config}
    if missing := {'vision_cfg', 'text_cfg'} - set(config['model_cfg'] or {}):
        raise SystemExit(f'error: --arch {arch}: no {", ".join(sorted(missing))}; expected a model configuration of open_clip')
    return {'preprocess_cfg': {}, **config}


def own_tokenizer(text_cfg: dict, tokenizer: data.Tokenizer) -> dict:
    """text_cfg of a directory that the tokenizer will lie in: any non-empty name makes open_clip read it from there."""
    kept = {k: v for k, v in text_cfg.items() if k not in ('vocab_path', 'tokenizer_mode', 'tokenizer_kwargs')}
    layout = {'eot': {}, 'clips': {'tokenizer_mode': 'clips'}, 'strip_sep_token': {'tokenizer_kwargs': {'strip_sep_token': True}}}
    return kept | {'hf_tokenizer_name': 'tokenizer.json'} | layout[tokenizer.mode]


def stored(place: Path, names: list[tuple[str | None, str]]):
    """Yields (name, tensor) of a weights file, or of a directory's, one at a time.   names: (index of shards or None, file), the first that
    exists, and of these the file, as in transformers"""
    return once(read_weights(weight_files(place, names)), place)


def once(weights, where: str | os.PathLike):
    """Yields what it is given. A name that comes twice, in two shards or (where old names became new ones) under two names, is an error: one would be lost."""
    seen = set()
    for name, w in weights:
        if name in seen:
            raise SystemExit(f'error: {where} is of another architecture:\n  {name}: surplus, {tuple(w.shape)}; it is there twice (in two files, or under an older name as well)')
        seen.add(name)
        yield name, w


def weight_files(place: Path, names: list[tuple[str | None, str]]) -> list[Path]:
    """See stored."""
    if place.is_file():
        return [place]
    for index, single in names:
        if (place / single).is_file():
            return [place / single]
        if index and (place / index).is_file():
            shards = data.read_json(place / index, str(place), dict).get('weight_map')
            if not isinstance(shards, dict) or not shards:
                raise SystemExit(f'error: {place / index}: weight_map is {str(shards)[:60]!r}; expected names of weights and their files')
            return sorted({place / str(name) for name in shards.values()})
    raise SystemExit(f'error: {place} has no weights: none of {", ".join(single for _, single in names)}' + ', whole or in shards with an index' * bool(names[0][0]))


def read_weights(files: list[Path]):
    """Yields (name, tensor) of all files; nothing in them is run."""
    for file in files:
        try:
            if file.suffix == '.safetensors':
                from safetensors import safe_open
                with safe_open(file, 'pt') as tensors:
                    for name in tensors.keys():
                        yield name, tensors.get_tensor(name)
            else:  # weights_only: no code in the file is run
                try:
                    tensors = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
                except RuntimeError as e:  # not a zip file: the legacy kind
                    if 'TorchScript' in str(e):
                        raise ValueError('it is a program (TorchScript), as OpenAI published its models first, and running it is not safe; the same '
                                         'weights are on the hub as openai/clip-vit-…') from None
                    tensors = torch.load(file, map_location='cpu', weights_only=True)
                tensors = tensors.get('state_dict', tensors)  # a training checkpoint of open_clip
                if strange := [str(name) for name, w in tensors.items() if not isinstance(w, Tensor)]:
                    raise ValueError(f'it holds more than weights ({", ".join(strange[:5])})' + '; of a run give the directory' * (file.name in STATE_FILES))
                prefix = 'module.' if all(name.startswith('module.') for name in tensors) else ''  # of a training with DistributedDataParallel
                for name, w in tensors.items():
                    yield name.removeprefix(prefix), w
        except Exception as e:
            raise SystemExit(f'error: cannot read {file}: {type(e).__name__}: {str(e)[:300]}') from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Strict: a weight that is missing, surplus or of another shape is an error that lists names and shapes."""
    model.load_state_dict(fitting(weights, {name: w.shape for name, w in model.state_dict().items()}, where))


def fitting(weights: dict[str, Tensor], shapes: dict[str, torch.Size], where: str) -> dict[str, Tensor]:
    """The weights, if they are those and no others; else the error that load_weights promises."""
    ours, theirs = ({name: tuple(shape) for name, shape in of.items()} for of in (shapes, {name: w.shape for name, w in weights.items()}))
    wrong = [f'{n}: missing, {s} expected' for n, s in ours.items() if n not in theirs]
    wrong += [f'{n}: surplus, {s}' for n, s in theirs.items() if n not in ours]
    wrong += [f'{n}: {theirs[n]}, {s} expected' for n, s in ours.items() if n in theirs and theirs[n] != s]
    wrong += [f'{n}: {weights[n].dtype}, numbers with a fraction expected (quantised weights are not supported)' for n in ours
              if n in theirs and not weights[n].is_floating_point()]
    if wrong:
        raise SystemExit(f'error: {where} is of another architecture:\n  ' + '\n  '.join(wrong))
    return weights


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """[1 + n², W] → [1 + grid², W], bicubic with antialiasing, as open_clip does. The class token keeps its own."""
    old = math.isqrt(len(positions) - 1)
    image = positions[1:].float().T.reshape(1, -1, old, old)
    image = F.interpolate(image, (grid, grid), mode='bicubic', antialias=True, align_corners=False)
    return torch.cat([positions[:1], image[0].flatten(1).T.to(positions.dtype)])


def export(model: CLIP, tokenizer: data.Tokenizer, out: Path) -> None:
    """Writes what open_clip (`local-dir:RUN`) and load_clip read; and, where Hugging Face's CLIP can be this model, what transformers reads."""
    from safetensors.torch import save_file
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    config = {'model_cfg': model.model_cfg,
              'preprocess_cfg': {**model.preprocess_cfg, 'size': [model.visual.size] * 2}}
    files = {'open_clip_config.json': json.dumps(config, indent=2), **tokenizer.files()}
    for name, text in files.items():
        write(out / name, lambda file: file.write_text(text, encoding='utf-8'))
    write(out / EXPORT, lambda file: save_file(weights, file, metadata={'format': 'pt'}))
    whole = whole_of(model)
    (out / 'config.json').unlink(missing_ok=True)  # it comes back last: where it is, the rest is there and belongs to it
    if not_in_hf(whole, tokenizer):
        return
    renamed = {n: t.contiguous() for name, w in weights.items() for n, t in to_hf(name, w)}
    write(out / 'model.safetensors', lambda file: save_file(renamed, file, metadata={'format': 'pt'}))
    for name, content in (('preprocessor_config.json', hf_preprocessor(model.preprocess_cfg, model.visual.size, 'CLIPProcessor')),
                          ('config.json', hf_config(whole, tokenizer))):
        write(out / name, lambda file: file.write_text(json.dumps(content, indent=2), encoding='utf-8'))


# ------------------------------------------------------------------------------------------------- Hugging Face's CLIPModel
BLOCK_NAMES = {'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'attn.out_proj': 'self_attn.out_proj', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}
OTHER_NAMES = {'class_embedding': 'embeddings.class_embedding', 'conv1.weight': 'embeddings.patch_embedding.weight', 'ln_pre': 'pre_layrnorm',  # (sic)
               'ln_post': 'post_layernorm', 'token_embedding.weight': 'embeddings.token_embedding.weight',
               'positional_embedding': 'embeddings.position_embedding.weight', 'ln_final': 'final_layer_norm'}
PROJECTIONS = {'visual.proj': 'visual_projection.weight', 'text_projection': 'text_projection.weight'}  # transposed


def to_hf(name: str, w: Tensor) -> list[tuple[str, Tensor]]:
    """A weight of CLIP as CLIPModel has it: [(name, tensor)]; three for q, k and v, which are one matrix here."""
    if name == 'logit_scale':
        return [(name, w)]
    if name in PROJECTIONS:
        return [(PROJECTIONS[name], w.T)]
    tower = 'vision_model' if name.startswith('visual.') else 'text_model'
    name = name.removeprefix('visual.')
    if not name.startswith('transformer.resblocks.'):
        known = next(k for k in OTHER_NAMES if name == k or name.startswith(k + '.'))
        return [(f'{tower}.{OTHER_NAMES[known]}{name[len(known):]}', w)]
    _, _, layer, rest = name.split('.', 3)
    stem = f'{tower}.encoder.layers.{layer}.'
    if rest.startswith('attn.in_proj_'):
        return [(f'{stem}self_attn.{part}_proj.{rest.removeprefix("attn.in_proj_")}', of_part) for part, of_part in zip('qkv', w.chunk(3))]
    part, _, leaf = rest.rpartition('.')
    return [(f'{stem}{BLOCK_NAMES[part]}.{leaf}', w)]


def from_hf(weights: dict[str, Tensor], shapes: dict[str, torch.Size], where: str, tower: str = 'vision_model.') -> dict[str, Tensor]:
    """CLIPModel's weights under the names of CLIP, whose shapes are given. Strict, as load_weights is.   tower: how the image tower's names begin"""
    parts = {name: [(n.replace('vision_model.', tower, 1), t) for n, t in to_hf(name, torch.empty(shape, device='meta'))] for name, shape in shapes.items()}
    weights = {n: w for n, w in weights.items() if not n.endswith('.position_ids')}  # older versions saved 0, 1, 2, … as well
    fitting(weights, {n: t.shape for of in parts.values() for n, t in of}, where)
    whole = {name: torch.cat([weights[n] for n, _ in of]) if len(of) > 1 else weights[of[0][0]] for name, of in parts.items()}
    return {name: w.T if name in PROJECTIONS else w for name, w in whole.items()}


def hidden_act(tower_cfg: dict, quick_gelu: bool) -> str | None:
    """Hugging Face's name of the activation; None if it has none."""
    return 'quick_gelu' if quick_gelu else {'none': 'gelu', 'tanh': 'gelu_pytorch_tanh'}.get((tower_cfg['act_kwargs'] or {}).get('approximate', 'none'))


def vision_not_in_hf(whole: dict) -> list[str]:
    """What keeps Hugging Face's CLIPVisionModel from being this image tower, as far as its blocks."""
    v = whole['vision_cfg']
    return ['the image tower has no LayerNorm before its blocks'] * v['no_ln_pre'] + [
        f'its activation is {v["act_kwargs"]}'] * (hidden_act(v, whole['quick_gelu']) is None) + ['images are padded'] * (whole['preprocess_cfg']['resize_mode'] == 'longest')


def not_in_hf(whole: dict, tokenizer: data.Tokenizer) -> list[str]:
    """What keeps Hugging Face's CLIPModel from being this CLIP; nothing: it can be.   whole: see whole_of"""
    v, t = whole['vision_cfg'], whole['text_cfg']
    eos = t['eos_id'] if t['pool_type'] == 'eos' else tokenizer.eos
    return vision_not_in_hf(whole) + ['its patches are averaged'] * (v['pool_type'] == 'avg') + ['the text tower has no causal mask'] * t['no_causal_mask'] + [
        f'the text is pooled at the {t["pool_type"]} token'] * (t['pool_type'] in ('first', 'last')) + [
        f'the activation of the text tower is {t["act_kwargs"]}'] * (hidden_act(t, whole['quick_gelu']) is None) + [
        'the end of the text has the id 2, which means something else there'] * (eos == 2)


def hf_vision(whole: dict) -> dict:
    """vision_config of a CLIPModel, or of a LLaVA."""
    v = whole['vision_cfg']
    return {'model_type': 'clip_vision_model', 'hidden_size': v['width'], 'intermediate_size': int(v['width'] * v['mlp_ratio']), 'num_hidden_layers': v['layers'],
            'num_attention_heads': v['width'] // v['head_width'], 'image_size': v['image_size'], 'patch_size': v['patch_size'], 'num_channels': 3,
            'hidden_act': hidden_act(v, whole['quick_gelu']), 'projection_dim': whole['embed_dim'], 'layer_norm_eps': (v['norm_kwargs'] or {}).get('eps', 1e-5)}


def hf_config(whole: dict, tokenizer: data.Tokenizer) -> dict:
    """config.json of a CLIPModel."""
    t = whole['text_cfg']
    text = {'model_type': 'clip_text_model', 'hidden_size': t['width'], 'intermediate_size': int(t['width'] * t['mlp_ratio']), 'num_hidden_layers': t['layers'],
            'num_attention_heads': t['heads'], 'max_position_embeddings': t['context_length'], 'vocab_size': t['vocab_size'],
            'hidden_act': hidden_act(t, whole['quick_gelu']), 'projection_dim': whole['embed_dim'], 'layer_norm_eps': (t['norm_kwargs'] or {}).get('eps', 1e-5),
            'bos_token_id': tokenizer.bos, 'pad_token_id': tokenizer.pad,
            'eos_token_id': t['eos_id'] if t['pool_type'] == 'eos' else tokenizer.eos}  # never 2, which switches to an older kind of pooling
    return {'architectures': ['CLIPModel'], 'model_type': 'clip', 'projection_dim': whole['embed_dim'], 'text_config': text, 'vision_config': hf_vision(whole),
            'dtype': 'float32'}


def hf_preprocessor(how: dict, size: int, processor: str, pad: bool = False) -> dict:
    """preprocessor_config.json.   how: preprocess_cfg.  pad: to a square with the mean colour first, as LLaVA 1.5 does"""
    squash, square = how['resize_mode'] == 'squash', {'height': size, 'width': size}
    return {'image_processor_type': 'LlavaImageProcessor' if pad else 'CLIPImageProcessor', **({'do_pad': True} if pad else {}), 'processor_class': processor,
            'do_convert_rgb': True, 'do_resize': True, 'size': square if squash else {'shortest_edge': size}, 'resample': FILTERS[how['interpolation']],
            'do_center_crop': not squash, 'crop_size': square, 'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True,
            'image_mean': how['mean'], 'image_std': how['std']}


FILTERS = {'bilinear': 2, 'bicubic': 3}  # PIL's numbers
HF_VISION = {'hidden_size': 768, 'intermediate_size': 3072, 'projection_dim': 512, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'image_size': 224,
             'patch_size': 32, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5}  # what a config.json leaves out
HF_TEXT = {'hidden_size': 512, 'intermediate_size': 2048, 'num_hidden_layers': 12, 'num_attention_heads': 8, 'max_position_embeddings': 77,
           'vocab_size': 49408, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'eos_token_id': 49407}


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio that Block makes this hidden width of: it cuts the product and does not round it."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def from_hf_tower(config: dict, where: str) -> tuple[dict, bool]:
    """(what vision_cfg and text_cfg have in common, quick_gelu) of a vision_config or text_config"""
    acts = {'quick_gelu': None, 'gelu': None, 'gelu_pytorch_tanh': {'approximate': 'tanh'}}
    if str(config['hidden_act']) not in acts:
        raise SystemExit(f'error: {where}/config.json: hidden_act {config["hidden_act"]!r}; supported: {", ".join(acts)}')
    whole_numbers(config, {key: 1 for key, default in {**HF_VISION, **HF_TEXT}.items() if type(default) is int}, f'error: {where}/config.json: ')
    act, eps, heads = acts[config['hidden_act']], config['layer_norm_eps'], config['num_attention_heads']
    if config['hidden_size'] % heads:
        raise SystemExit(f'error: {where}/config.json: {heads} heads do not divide the width {config["hidden_size"]}')
    return {'width': config['hidden_size'], 'layers': config['num_hidden_layers'], 'mlp_ratio': mlp_ratio(config['intermediate_size'], config['hidden_size']),
            **({'act_kwargs': act} if act else {}), **({'norm_kwargs': {'eps': eps}} if eps != 1e-5 else {})}, config['hidden_act'] == 'quick_gelu'


def from_hf_vision(vision: dict, where: str) -> tuple[dict, bool]:
    """(vision_cfg, quick_gelu) of the vision_config of a CLIPModel or a LLaVA"""
    vision = HF_VISION | vision
    cfg, quick = from_hf_tower(vision, where)
    return {**cfg, 'image_size': vision['image_size'], 'patch_size': vision['patch_size'], 'head_width': cfg['width'] // vision['num_attention_heads']}, quick


def from_hf_config(place: Path) -> dict:
    """{'model_cfg', 'preprocess_cfg'} of a directory of a CLIPModel"""
    config = data.read_json(place / 'config.json', str(place), dict)
    of = lambda name: {**(config.get(f'{name}_config') or {}), **(config.get(f'{name}_config_dict') or {})}  # the second as older versions had it
    vision, quick = from_hf_vision(of('vision'), str(place))
    text = HF_TEXT | of('text')
    tower, quick2 = from_hf_tower(text, str(place))
    if quick != quick2:
        raise SystemExit(f'error: {place}/config.json: one tower has the activation quick_gelu, the other has not; supported: both or neither')
    pool = dict(pool_type='argmax') if text['eos_token_id'] == 2 else dict(pool_type='eos', eos_id=text['eos_token_id'])  # 2: transformers' mark for the older kind
    text = {**tower, 'heads': text['num_attention_heads'], 'context_length': text['max_position_embeddings'], 'vocab_size': text['vocab_size'], **pool,
            'hf_tokenizer_name': 'tokenizer.json'}  # it lies in the directory
    return {'model_cfg': {'embed_dim': config.get('projection_dim', 512), 'quick_gelu': quick, 'vision_cfg': vision, 'text_cfg': text},
            'preprocess_cfg': from_hf_preprocessor(place, vision['image_size'])[0]}


def from_hf_preprocessor(place: Path, size: int) -> tuple[dict, bool]:
    """(preprocess_cfg, whether images are padded to a square first) of a Hugging Face directory whose image tower takes images of this size"""
    file = next((f for f in (place / 'preprocessor_config.json', place / 'processor_config.json') if f.is_file()), place / 'preprocessor_config.json')
    how = data.read_json(file, str(place), dict)
    how = how.get('image_processor', how)  # in processor_config.json, where transformers 5 writes it
    side = lambda of: {of} if isinstance(of, int) else set(of.values())
    resized, cropped = how.get('size', {'shortest_edge': 224}), how.get('do_center_crop', True)
    squash = not isinstance(resized, int) and 'height' in resized
    names = {number: name for name, number in FILTERS.items()}
    for fits, key in [(side(resized) == {size}, 'size'), (not cropped and squash or cropped and side(how.get('crop_size', size)) == {size}, 'crop_size'),
                      (how.get('resample', 3) in names, 'resample'), (abs(how.get('rescale_factor', 1 / 255) - 1 / 255) < 1e-9, 'rescale_factor'),
                      *((how.get(key, True), key) for key in ('do_resize', 'do_rescale', 'do_normalize')),
                      *((len(how.get(key, '')) == 3, key) for key in ('image_mean', 'image_std'))]:
        if not fits:
            raise SystemExit(f'error: {file}: {key} is {how.get(key)}, do_center_crop {cropped}; supported: resize to {size} (the size of the image tower) and '
                             f'crop to the same, resample 2 (bilinear) or 3 (bicubic), values in [0, 1] less image_mean over image_std')
    return {'mean': how['image_mean'], 'std': how['image_std'], 'interpolation': names[how.get('resample', 3)],
            'resize_mode': 'squash' if squash else 'shortest'}, bool(how.get('do_pad'))


# ----------------------------------------------------------------------------------------------------------- files
def write(path: Path, writer, keep_previous: bool = False) -> None:
    """Writes beside, fsyncs, renames: a file is the old one or the new one, never half of one. Disk full: says so."""
    beside = path.with_name(path.name + '.tmp')
    try:
        writer(beside)
        with open(beside, 'rb') as file:
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, path.with_name('previous_' + path.name))
        os.replace(beside, path)
    except Exception as e:  # torch.save and safetensors raise their own kinds for a full disk
        beside.unlink(missing_ok=True)
        raise SystemExit(f'error: cannot write {path}: {e}. What was saved before is intact; '
                         f'free some space and run again with --resume') from None


# ------------------------------------------------------------------------------------- command line and configuration
def parse(config_class, doc: str, argv: list[str] | None = None) -> tuple[object, set[str]]:
    """Command line → (config, names of the flags that were given). The help texts are the comments in the dataclass."""
    import inspect
    comments = {line.split(':')[0].strip(): line.split('#')[1].strip()
                for line in inspect.getsource(config_class).splitlines() if '#' in line and ':' in line.split('#')[0]}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = next((t for t in typing.get_args(hints[field.name]) if t is not type(None)), hints[field.name])
        how = {'action': argparse.BooleanOptionalAction} if kind is bool else {'type': kind, 'metavar': kind.__name__}
        default = '' if field.default in (None, '', False) else f' (default: {field.default})'
        parser.add_argument('--' + field.name, help=(comments[field.name] + default).replace('%', '%%'), **how)
    flags = vars(parser.parse_args(argv))
    return config_class(**flags), set(flags)


def typed(cfg, given: set[str] | None) -> set[str]:
    return given if given is not None else {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}


def check_config(cfg: Config, world: int, resumed: bool = False) -> None:
    """Fills in α; refuses what cannot be meant, with what, value, limit and flag."""
    refuse(wrong_attack(cfg) + [
            (not 0 <= cfg.eps_from <= cfg.eps_to <= 1, f'--eps_from {cfg.eps_from:g} --eps_to {cfg.eps_to:g}: must be '
                                                       f'fractions of the run, 0 ≤ from ≤ to ≤ 1'),
            (not 0 <= cfg.k_from <= 1, f'--k_from {cfg.k_from:g}: must be a fraction of the run, 0 … 1'),
            (cfg.init and (cfg.tokenizer or cfg.arch) and not resumed and Path(cfg.init).is_dir(),
             f'--init {cfg.init} brings its own model and tokenizer: leave --arch and --tokenizer out'),
            (cfg.batch_size < 2, f'--batch_size {cfg.batch_size}: a contrastive loss needs at least 2 pairs'),
            (cfg.batch_size % world, f'--batch_size {cfg.batch_size}: must be divisible by the {world} processes (it is global)'),
            (cfg.steps < 1, f'--steps {cfg.steps}: must be at least 1'),
            (cfg.lr <= 0, f'--lr {cfg.lr:g}: must be positive'), (cfg.clip <= 0, f'--clip {cfg.clip:g}: must be positive'),
            (cfg.vocab_size < 260, f'--vocab_size {cfg.vocab_size}: must be at least 260 (256 bytes, 3 special tokens, a word)'),
            (cfg.log_every < 1, f'--log_every {cfg.log_every}: must be at least 1'),
            (cfg.save_every < 1, f'--save_every {cfg.save_every}: must be at least 1'),
            (min(cfg.size, cfg.patch, cfg.width, cfg.layers, cfg.head_width, cfg.embed_dim, cfg.text_width, cfg.text_layers,
                 cfg.text_heads) < 1, 'the sizes of the model must be positive')])


def wrong_attack(cfg) -> list[tuple[bool, str]]:
    """Fills in α. For refuse, in both stages."""
    if cfg.alpha is None:
        cfg.alpha = 0.75 * cfg.eps
    return [(not 0 <= cfg.eps <= 255, f'--eps {cfg.eps:g}: must be in 0 … 255 (it is in 1/255)'),
            (0 < cfg.eps < 0.25, f'--eps {cfg.eps:g}: it is in 1/255; did you mean {cfg.eps * 255:.3g}?'),
            (cfg.eps > 0 and not 0 < cfg.alpha <= 2 * cfg.eps,
             f'--alpha {cfg.alpha:g}: must be in 0 … 2ε = {2 * cfg.eps:g} (in 1/255): a longer step crosses the whole ball'),
            (cfg.k < 1, f'--k {cfg.k}: must be at least 1; train without an attack with --eps 0')]


def refuse(checks: list[tuple[bool, str]]) -> None:
    """Ends with the first message whose condition holds."""
    for wrong, message in checks:
        if wrong:
            raise SystemExit('error: ' + message)


# ----------------------------------------------------------------------------------------------------------- processes
def start_processes(patience: timedelta | None = None) -> tuple[int, int, torch.device]:
    """(rank, world size, device), from torchrun's environment if there is one. gloo on CPUs, NCCL on GPUs.

    patience: how long a rank waits for the others; default: torch's, minutes.
    """
    keep_freed_memory()
    if 'RANK' not in os.environ:
        return 0, 1, torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    device = torch.device('cpu')
    if torch.cuda.is_available():
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=patience)
    return dist.get_rank(), dist.get_world_size(), device


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed tensors instead of handing them back to the kernel after each operation and asking for
    zeroed pages again. A few per cent of a CPU step, see tests/bench_train.py; no effect elsewhere."""
    import ctypes
    if platform.system() == 'Linux' and platform.libc_ver()[0] == 'glibc':
        libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
        if libc.mallopt(M_MMAP_THRESHOLD, 32 << 20):  # older glibc takes no more; setting the other alone would do harm
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compile_towers(model: CLIP, cfg: Config, device: torch.device) -> None:
    """In place, before DDP: parameter names stay as they are, and whoever calls a tower enters the compiled one."""
    if not (device.type == 'cuda' if cfg.compile is None else cfg.compile):
        return
    compiler = os.environ.get('CXX', 'g++')
    if device.type == 'cpu' and not shutil.which(compiler):
        raise SystemExit(f'error: --compile on a CPU needs a C++ compiler and there is no {compiler}: install one '
                         f'(Debian: apt-get install g++), name it in CXX, or use --no-compile')
    model.visual.compile()
    model.transformer.compile()


class Clock:
    """Milliseconds since the last lap. Waits for a GPU, so it runs on logged steps only (device None: it does not)."""

    def __init__(self, device: torch.device | None):
        self.device = device
        self.lap_ms()

    def lap_ms(self) -> float | None:
        if self.device is None:
            return None
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.last = 1000 * (now - getattr(self, 'last', now)), now
        return elapsed


# ------------------------------------------------------------------------------------------------------- run directory
STATE_FILES, EXPORT = ('train_state.pt', 'previous_train_state.pt'), 'open_clip_model.safetensors'
MODEL_FILES = (*STATE_FILES, EXPORT, 'model.safetensors', 'open_clip_config.json', 'tokenizer.json', 'tokenizer_config.json', 'config.json',
               'generation_config.json', 'preprocessor_config.json', 'processor_config.json', 'chat_template.jinja')  # of both stages
RUN_FILES = (*MODEL_FILES, 'train_config.json', 'log.jsonl')
NOT_OURS = ('model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json', 'open_clip_pytorch_model.safetensors', 'open_clip_pytorch_model.bin',
            'adapter_config.json', 'chat_template.json')  # of models that others wrote; beside a run they would be taken for it
FREE_ON_RESUME = {'out', 'resume', 'overwrite', 'workers', 'compile', 'log_every', 'save_every'}  # change no result


def open_run(cfg, given: set[str] | None) -> tuple[dict | None, object]:
    """(the state to resume or None, the configuration that holds)

    A folder with a model that is no run of ours is not touched, whatever the flags. Changes nothing on the disk: what --overwrite replaces is
    put aside when training begins (Run.introduce), and deleted with the first checkpoint of the new run (Run.save).
    """
    out, state, fields = Path(cfg.out), None, {f.name for f in dataclasses.fields(cfg)}
    if cfg.resume and cfg.overwrite:
        raise SystemExit('error: --resume and --overwrite exclude each other')
    resume = cfg.resume or int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # torchrun restarted us: go on
    found, others = ([name for name in names if (out / name).exists()] for names in (RUN_FILES, NOT_OURS))
    model = [name for name in found if name in MODEL_FILES]
    if strange := (found if not is_run(out) else []) + others:  # such as a model of Hugging Face's
        raise SystemExit(f'error: --out {out} holds files that are of no run ({", ".join(strange)}) and would be mixed with it, or lost: give another --out, '
                         f'or move them away')
    if resume:
        state = load_state([out / name for name in STATE_FILES])
        if state is None and model and not cfg.overwrite:
            raise SystemExit(f'error: --resume: --out {out} holds a model ({", ".join(model)}) but no train_state.pt to continue from; '
                             f'give another --out (and --init {out} to start from that model)')
        if state is not None:
            if unknown := set(state['config']) - fields:
                raise SystemExit(f'error: --resume: the run in --out {out} is not of this stage or of this version (its settings include {", ".join(sorted(unknown)[:3])}); '
                                 f'continue it with what began it, or give another --out')
            old = {**dataclasses.asdict(type(cfg)()), **state['config']}  # a run of before a setting was there has its default
            # restarted, it is the very run, if it is ours; or an older one that --overwrite had no time to replace
            for name in sorted((typed(cfg, given) if cfg.resume else {n for n in fields if getattr(cfg, n) is not None}) - FREE_ON_RESUME):
                if getattr(cfg, name) != old[name]:
                    raise SystemExit(f'error: --{name} {getattr(cfg, name)}: the run in {out} has {old[name]}; leave the flag '
                                     f'out to continue it, or give another --out')
            kept = {n: v for n, v in old.items() if n not in typed(cfg, given) and n not in ('out', 'resume', 'overwrite')}
            cfg = dataclasses.replace(cfg, **kept)
    if not resume and found and not cfg.overwrite:
        raise SystemExit(f'error: --out {out} holds a run: continue it with --resume, replace it with --overwrite, '
                         f'or give another --out')
    return state, cfg


def is_run(out: Path) -> bool:
    """Whether our training wrote what is there: by its train_config.json, or by a checkpoint."""
    about = data.peek_json(out / 'train_config.json')
    return any((out / name).exists() for name in STATE_FILES) if about is None else {'config', 'commit', 'versions', 'processes'} <= set(about)


def all_agree(step: int, cfg, world: int) -> None:
    """Every rank read --out for itself. Without a file system that all nodes share, they would train different runs."""
    if world > 1:
        mine = (step, {n: v for n, v in dataclasses.asdict(cfg).items() if n not in FREE_ON_RESUME})
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
        if any(theirs != everyone[0] for theirs in everyone):
            raise SystemExit(f'error: --out {cfg.out}: the ranks found different checkpoints or settings (steps '
                             f'{[theirs[0] for theirs in everyone]}); all nodes must see the same files there')


def load_state(files: list[Path]) -> dict | None:
    """The newest of the files that can be read; None if there is none at all. Never unpickles anything but tensors."""
    broken = []
    for file in files:
        if file.exists():
            try:
                state = torch.load(file, map_location='cpu', weights_only=True)
                if broken and int(os.environ.get('RANK', 0)) == 0:
                    print(f'warning: {broken[0]}; going on from the one before, {file}', file=sys.stderr)
                return state
            except Exception as e:
                broken.append(f'cannot read {file} ({type(e).__name__}: {str(e)[:100]!r})')
    if broken:
        raise SystemExit(f'error: {"; ".join(broken)}. Start again with --overwrite')
    return None


class Run:
    """What happens around a step: first output, log lines, checkpoints, signals. Stage 2 has its own files and says other things."""
    HEADER = '---\nlibrary_name: open_clip\npipeline_tag: zero-shot-image-classification\ntags:\n- clip\n- adversarial-robustness\n---\n'

    def __init__(self, cfg: Config, model: CLIP, tokenizer: data.Tokenizer, optimizer, rank: int, first_step: int, steps: int):
        self.cfg, self.model, self.tokenizer, self.optimizer, self.rank, self.steps = cfg, model, tokenizer, optimizer, rank, steps
        self.out, self.saved_step, self.started, self.signal = Path(cfg.out), first_step, time.time(), 0
        self.last_log = (time.time(), first_step)
        # what makes the run what it is; not how this process came to it
        self.settings = {**dataclasses.asdict(cfg), 'resume': False, 'overwrite': False}
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def arithmetic(self, pairs: data.Pairs, world: int) -> str:
        """What is trained on what, and what an update costs, for the first output."""
        cfg, n = self.cfg, sum(p.numel() for p in self.model.parameters())
        attack = (f'ε {cfg.eps:g}/255, α {cfg.alpha:g}/255 × {cfg.k} steps; {cfg.k + 1} forward-backward passes per update at '
                  f'full strength' if cfg.eps else 'ε 0: no attack; 1 forward-backward pass per update')
        cut = self.tokenizer.too_long(pairs.captions)
        return (pairs.note + f'\nwarning: {cut} of {len(pairs)} captions are cut at {self.tokenizer.context} tokens; see --context' * (cut > 0) +
                f'\nCLIP with {n / 1e6:.2f} M parameters at {self.model.visual.size} px, {self.tokenizer.vocab_size} token ids\n'
                f'global batch {cfg.batch_size} = {world} process{"es" * (world > 1)} × {cfg.batch_size // world}; {attack}; '
                f'{cfg.steps} updates = {cfg.steps * cfg.batch_size / len(pairs):.1f} epochs of {len(pairs)} pairs')

    def introduce(self, arithmetic: str, world: int, device: torch.device) -> None:
        """The first output; and the files of the run, as they belong to the step that it begins with. (All ranks have
        looked at --out by now: they have met in DDP's constructor.)"""
        first_step = self.saved_step
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise SystemExit(f'error: --out {self.out}: {e}') from None
        if not first_step:
            worth_keeping = any((self.out / name).exists() for name in MODEL_FILES)
            card = all(mark in read_text(self.out / CARD) for name in ('training', 'results') for mark in marks(name))  # a README.md of somebody else stays
            measured = [f'eval/{file.name}' for file in (self.out / 'eval').glob('*.json') if is_measurement(file)] if worth_keeping else []
            if measured:
                remove(self.out / 'replaced_eval')
                (self.out / 'replaced_eval').mkdir()
            for file in [self.out / name for name in (*RUN_FILES, *[CARD] * card, *measured) if (self.out / name).exists()]:
                aside = self.out / f'replaced_{file.relative_to(self.out)}'
                remove(aside if worth_keeping else file)
                if worth_keeping:
                    os.replace(file, aside)
            if measured:
                with contextlib.suppress(OSError):  # something else is in it
                    (self.out / 'eval').rmdir()
        self.facts = arithmetic
        about = {'config': self.settings, 'commit': commit(), 'versions': versions(), 'processes': world}
        write(self.out / 'train_config.json', lambda f: f.write_text(json.dumps(about, indent=2), encoding='utf-8'))
        log = self.out / 'log.jsonl'
        lines = log.read_text().splitlines() if log.exists() and first_step else []
        kept = [line for line in lines if line.endswith('}') and json.loads(line)['step'] <= first_step]
        write(log, lambda f: f.write_text(''.join(line + '\n' for line in kept)))
        if first_step:
            self.export(first_step)
            self.write_card(first_step)
        print(textwrap.fill(', '.join(f'{name} {value!r}' for name, value in self.settings.items()), 120))
        print(f'commit {about["commit"]}, {", ".join(f"{k} {v}" for k, v in about["versions"].items())}, {device}\n{arithmetic}'
              + (f'; continuing after update {first_step}' if first_step else ''), flush=True)

    def log(self, step: int, bar: tqdm, batch_size: int, **row) -> None:
        """One line in log.jsonl; see README for what the quantities mean."""
        if self.rank > 0:
            return
        now, (before, step_before) = time.time(), self.last_log
        self.last_log = (now, step)
        seen = (step - step_before) * batch_size
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()
        row = {'step': step, **row, 'images_per_s': seen / (now - before), 'peak_memory_mb': peak / 2**20}
        with open(self.out / 'log.jsonl', 'a') as file:
            file.write(json.dumps({k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in row.items()}) + '\n')
        bar.set_postfix_str(f'ε {row["eps"]:.1f} loss adv {row["loss_adv"]:.3f} clean {row["loss_clean"]:.3f} '
                            f'{row["images_per_s"]:.0f} img/s', refresh=False)

    def save(self, step: int) -> None:
        """train_state.pt first, since all else can be derived from it."""
        if self.rank == 0:
            state = {'step': step, 'config': self.settings, 'optimizer': self.optimizer.state_dict(), **self.contents()}
            write(self.out / 'train_state.pt', lambda file: torch.save(state, file), keep_previous=True)
            self.export(step)
            self.write_card(step)
            for name in (*RUN_FILES, CARD, 'eval'):  # what --overwrite put aside
                remove(self.out / f'replaced_{name}')
        self.saved_step = step

    def contents(self) -> dict:
        """What a checkpoint holds beside step, settings and optimizer."""
        return {'model': self.model.state_dict(), 'model_cfg': self.model.model_cfg, 'preprocess_cfg': self.model.preprocess_cfg,
                'tokenizer': self.tokenizer.backend.to_str()}

    def export(self, step: int) -> None:
        export(self.model, self.tokenizer, self.out)

    def write_card(self, step: int) -> None:
        """The model card; what somebody wrote outside of its two marked blocks stays."""
        with locked(self.out):
            blocks = {'training': self.about(step), 'results': results(self.out)}
            new = self.HEADER + f'\n# {self.out.name}\n\n' + '\n\n## Results\n\n'.join('\n'.join(marks(n)) for n in blocks) + '\n'
            if not rewrite(self.out / CARD, blocks, new) and step == self.steps:
                print(f'note: {self.out / CARD} is not a card of a run (it has no {marks("training")[0]}); it is left as it is', flush=True)

    def about(self, step: int) -> str:
        """The card's part that training writes: data, ε, attack, how to load it, limits."""
        name, missing, side = self.out.name, not_in_hf(whole_of(self.model), self.tokenizer), self.model.visual.size
        kind = 'on adversarial images only' if self.cfg.eps else 'on clean images, as the baseline of one trained on adversarial images'
        load = snippet(OPEN_CLIP_SNIPPET, name) + '\n'
        load += f'transformers does not open it, since its CLIPModel cannot be this model: {"; ".join(missing)}.' if missing else \
            f'With transformers:\n\n{snippet(CLIP_SNIPPET, name)}'.rstrip()
        return (f'A CLIP trained {kind}: stage 1 of [Double Visual Defense](https://arxiv.org/abs/2501.09446), with `clip_adv.py`, commit {commit()}.\n\n'
                f'{listed(step, self.steps, self.facts)}\n\n'
                f'### Load it\n\nFrom the folder that `{name}` is in, with open_clip:\n\n{load}\n\n### Limits\n\n{common_limits(self.cfg)}\n'
                f'- Images are seen at {side} × {side} pixels, captions up to {self.tokenizer.context} tokens.\n'
                + (f'- It began as `{self.cfg.init}`, whose limits are also its own.' if self.cfg.init else
                   '- It knows what its training captions speak of, and nothing else.'))

    def kept(self) -> str:
        return f'the checkpoint after update {self.saved_step} is kept' if self.saved_step else 'no checkpoint was saved yet'

    def read(self, batches):
        """The batches; an image that cannot be decoded ends the run with its name."""
        try:
            yield from batches
        except data.BadImage as e:  # from a worker it comes with the worker's traceback before it
            raise SystemExit(f'error: {str(e).strip().splitlines()[-1]}; stopped, {self.kept()}. Replace the image, then --resume') from None

    def on_signal(self, number, frame) -> None:
        self.signal = number
        signal.signal(number, self.handlers[number])  # a second one ends the process at once

    def signal_received(self, device: torch.device) -> int:
        """The signal that any of the ranks got, or 0."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.signal
        received = torch.tensor(self.signal, device=device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)

    def save_or_leave(self, step: int, due: bool, bar: tqdm, world: int, device: torch.device) -> None:
        """Saves when it is time to, and when a signal came; then the process ends."""
        stop = self.signal_received(device)
        if stop or due:
            self.save(step)
        if stop:
            bar.close()
            self.leave(step, stop, world)

    def leave(self, step: int, number: int, world: int) -> None:
        if self.rank == 0:
            launcher = f'torchrun --nproc_per_node {world} ' if dist.is_initialized() else 'python '
            print(f'{signal.Signals(number).name}: saved after update {step} of {self.steps}. Continue with\n'
                  f'  {launcher}{shlex.quote(sys.argv[0])} --out {shlex.quote(str(self.out))} --resume', flush=True)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        sys.exit(128 + number)

    def fail(self, step: int, loss: float, grad_norm: float) -> None:
        raise SystemExit(f'error: update {step + 1}: the loss is {loss:g} and the gradient norm {grad_norm:g}; stopped, {self.kept()}. '
                         f'Try a lower --lr or a longer --warmup')

    def finish(self, what_now: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.rank == 0:
            seconds = time.time() - self.started
            print(f'done: {self.steps} updates, {seconds / 60:.1f} minutes; {what_now}')
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- model card
CARD = 'README.md'
MEASURES = {  # what the card's results speak of, measured or not; eval.py says which of them a measurement is
    EXPORT: ('zero-shot accuracy', 'recall@1, image → text', 'accuracy with a wrong name written on the image', 'audit: is the robustness real?'),
    'model.safetensors': ('VQA accuracy', 'POPE, F1', 'ScienceQA accuracy', 'captions, CIDEr', 'forced sentences, success')}
OPEN_CLIP_SNIPPET = """import open_clip
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms('local-dir:RUN')
image, text = preprocess(Image.open('cat.jpg'))[None], open_clip.get_tokenizer('local-dir:RUN')(['a red circle', 'a blue circle'])
print((100 * model.encode_image(image, normalize=True) @ model.encode_text(text, normalize=True).T).softmax(-1))"""
CLIP_SNIPPET = """from PIL import Image
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained('RUN'), CLIPProcessor.from_pretrained('RUN')
inputs = processor(text=['a red circle', 'a blue circle'], images=Image.open('cat.jpg'), padding=True, truncation=True, return_tensors='pt')
print(model(**inputs).logits_per_image.softmax(-1))"""


def snippet(code: str, run: str) -> str:
    return f'```python\n{code.replace("RUN", run)}\n```\n'


def listed(step: int, steps: int, facts: str) -> str:
    return '\n'.join(f'- {line}' for line in [f'state: after update {step} of {steps}', *facts.splitlines(),
                                              'all settings, commit and versions: `train_config.json`; the course of the training: `log.jsonl`'])


def common_limits(cfg) -> str:
    attack = (f'- Trained against l∞ perturbations of ε = {cfg.eps:g}/255 at the resolution of the model. Of larger ones, of other norms and of other changes of an '
              f'image nothing follows.' if cfg.eps else '- Trained without an attack: expect nothing of it under one.')
    return f'{attack}\n- Robustness is measured with attacks and not proved: a stronger attack can find more.'


def marks(name: str) -> tuple[str, str]:
    return f'<!-- {name}: written by the scripts -->', f'<!-- end of {name} -->'


@contextlib.contextmanager
def locked(folder: Path):
    """One process at a time, where the system knows such locks: several may evaluate a run at once."""
    place = None
    try:
        import fcntl
        place = os.open(folder, os.O_RDONLY)
        fcntl.flock(place, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if place is not None:
            os.close(place)


def rewrite(file: Path, blocks: dict[str, str], new: str = '') -> bool:
    """Puts each block between its marks and leaves the rest of the file as it is; False where the marks are missing.   new: the file if there is none"""
    try:
        text = file.read_bytes().decode('utf-8') if file.exists() else new
    except (UnicodeDecodeError, OSError):  # not written by us (a folder, for one), and it must not be damaged
        return False
    for name, content in blocks.items():
        begin, end = marks(name)
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            return False
        text = f'{before}{begin}\n\n{content}\n\n{end}{after}'
    write(file.resolve(), lambda beside: beside.write_bytes(text.encode('utf-8')))  # a link stays one
    return True


def read_text(file: Path) -> str:
    return file.read_text(encoding='utf-8', errors='replace') if file.is_file() else ''


def weights_of(out: Path) -> Path:
    """The file of the weights that are measured, of a run of either stage."""
    return out / (EXPORT if (out / EXPORT).is_file() else 'model.safetensors')


def is_measurement(file: Path) -> bool:
    """Whether eval.py wrote it."""
    return {'weights', 'card', 'results'} <= set(data.peek_json(file) or {})


def results(out: Path) -> str:
    """The card's table: all that out/eval holds about the weights that are there now."""
    files, rows, others = sorted((out / 'eval').glob('*.json')), [], []
    weights = weights_of(out)
    now = digest(weights) if files else ''
    for file in files:
        try:
            report = json.loads(file.read_text(encoding='utf-8'))
            ours = report['weights'] == now
            rows += [({key: str(row[key]) for key in ('measure', 'data', 'attack', 'clean', 'attacked')}, file.name, report['commit']) for row in report['card']] if ours else []
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        others += [] if ours else [f'`eval/{file.name}`']
    lines = ['| | data | attack | unperturbed | under attack | details, commit |', '|---|---|---|---|---|---|']
    for measure in MEASURES[weights.name]:
        found = [f'| {measure} | {r["data"]} | {r["attack"]} | {r["clean"]} | {r["attacked"]} | [eval/{name}](eval/{name}), {commit} |'
                 for r, name, commit in rows if r['measure'] == measure]
        lines += found or [f'| {measure} | | | not measured | not measured | |']
    stale = f'\n\nMeasured on other weights than those that are here now, or not readable: {", ".join(others)}.' if others else ''
    return '\n'.join(lines) + '\n\nIn %, ε in 1/255 (l∞).' + stale


def digest(file: Path) -> str:
    """Of a file's content; of none: ''."""
    if not file.is_file():
        return ''
    found = hashlib.blake2b(digest_size=8)
    with open(file, 'rb') as content:
        while part := content.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- facts
def peak_rss() -> int:
    """Bytes of memory that this process had at most."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == 'Darwin' else 1024)


def commit() -> str:
    """Short hash of this code's commit, with '-dirty' where the code differs from it."""
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty', '--exclude', '*'], cwd=Path(__file__).parent,
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def versions() -> dict[str, str]:
    import numpy
    import torchvision
    return {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
            'numpy': numpy.__version__}


if __name__ == '__main__':
    main(*parse(Config, __doc__))
