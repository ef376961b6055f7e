"""Evaluation: one sub-command per question. Every command prints a table; --json FILE keeps what it measured, as do RUN/eval/ and the run's card.

    python eval.py zeroshot runs/clip runs/clip_adv --eps 4 8          # which class, clean and under attack
    python eval.py retrieval runs/clip_adv --data DIR --eps 4          # image → text and text → image
    python eval.py typographic runs/clip runs/clip_adv                 # a wrong class name written on the image
    python eval.py audit runs/clip_adv runs/clip --eps 8               # is the robustness real, or are gradients masked?
    python eval.py show runs/clip_adv --image cat.jpg --labels 'a cat,a dog'
    python eval.py zeroshot openai/clip-vit-large-patch14 ...          # models of open_clip and Hugging Face, too: README, "Use it elsewhere"
    torchrun --nproc_per_node 8 -- eval.py zeroshot ...                # the images split over 8 processes, same result

The attack is `ensemble` (attacks.py) unless --attack names a cheaper one. Logits are 100·cos, networks compute in float32,
ε is in 1/255 on the command line. Random starts are drawn from (seed, image, restart): the batch size, the order and the
number of processes change nothing but the rounding of sums.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import attacks
import clip_adv
import data
import llava_adv

PGD_STEPS, PGD_RESTARTS = 50, 2
ATTACKS = {  # what they are called in tables, and the forward passes that an image which survives costs
    'none': ('no attack', 0),
    'pgd': (f'PGD-{PGD_STEPS} with {PGD_RESTARTS} restarts', PGD_RESTARTS * (PGD_STEPS + 1) + 2),
    'apgd': ('APGD-CE, 100 iterations, 1 restart', 101 + 2),
    'ensemble': ('ensemble: APGD-CE 100 × 5, then targeted APGD-DLR 100 × 9', 14 * 101 + 2)}


# ============================================================================================================ the model
class Classifier:
    """A CLIP and the embeddings of the classes; called with images, it returns logits.   [b, 3, h, w] → [b, classes]

    native: images come at their own size, and are resized in here, so that the attack acts before the resize.
    """

    def __init__(self, path: str, device: torch.device, native: bool = False, arch: str = '', tokenizer: str = ''):
        is_file = Path(path).is_file()  # --arch and --tokenizer say what a file is, and directories say it themselves
        self.model, self.tokenizer = clip_adv.load_clip(path, arch=arch if is_file else '', tokenizer=tokenizer if is_file else '')
        self.model.to(device).requires_grad_(False)
        self.device, self.native, self.path = device, native, path
        how = self.model.preprocess_cfg
        self.how = (self.model.visual.size, how['interpolation'], how['resize_mode'])

    def pixels(self, image) -> Tensor:
        """RGB image → float32 [3, h, w] in [0, 1]: the pixels that the attack may change."""
        uint8 = data.TF.pil_to_tensor(image) if self.native else data.fit(image, *self.how)
        return uint8.to(self.device).float() / 255

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """→ unit vectors [texts, D]"""
        return torch.cat([self.model.encode_text(self.tokenizer(part).to(self.device)) for part in chunks(texts, 256)])

    def embed_classes(self, classes: list[str], prompts) -> 'Classifier':
        """prompts(name) → the class's prompts; a class is the direction of their mean (a template ensemble)."""
        per_class = [prompts(name) for name in classes]
        texts = self.embed_texts([p for each in per_class for p in each]).split([len(each) for each in per_class])
        self.text = torch.nn.functional.normalize(torch.stack([t.mean(0) for t in texts]), dim=-1)
        return self

    def embed(self, x: Tensor) -> Tensor:
        """[b, 3, h, w] in [0, 1] → unit vectors [b, D]"""
        return self.model(data.resize(x, *self.how).clamp(0, 1) if self.native else x)  # bicubic leaves the box

    def __call__(self, x: Tensor, numbers=None) -> Tensor:
        return 100 * self.embed(x) @ self.text.T


def classifier_of(path: str, device: torch.device, args) -> Classifier:
    return Classifier(path, device, getattr(args, 'native', False), args.arch, args.tokenizer)


def attack(kind: str, logits, x: Tensor, y: Tensor, eps: float, numbers: list[int], seed: int, batch_size: int) -> Tensor:
    """x under one of ATTACKS.   logits: (images [b, 3, h, w], rows of x [b]) → [b, classes].  y: labels [N].
    eps: in [0, 1] units.  numbers: of the images in their data set, which the random starts are drawn from."""
    noise = lambda restart, row: data.generator(seed, f'restart {restart}', numbers[row])
    if kind == 'ensemble':
        return attacks.ensemble(logits, x, y, eps, noise, batch_size=batch_size).images
    if kind == 'apgd':
        return attacks.ensemble(logits, x, y, eps, noise, restarts=1, targets=0, batch_size=batch_size).images
    found = x.clone()
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        standing = rows[stands(logits, x, y, rows)]  # an image that is wrong unperturbed stays wrong
        for restart in range(PGD_RESTARTS):
            if not len(standing):
                break
            start = attacks.random_start(x[standing], eps, [noise(restart, i) for i in standing.tolist()])
            found[standing] = attacks.pgd(lambda z: attacks.margin(logits(z, standing), y[standing]).sum(), x[standing], eps,
                                          eps / 10, PGD_STEPS, start)
            attacks.check(x[standing], found[standing], eps)
            standing = standing[stands(logits, found, y, standing)]
    return found


@torch.no_grad()
def stands(logits, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    return logits(x[rows], rows).argmax(1) == y[rows]


@torch.no_grad()
def ranks(logits, x: Tensor, y: Tensor, batch_size: int) -> list[int]:
    """How many classes are ahead of the right one: 0 is correct. Of equal logits the first is ahead, as argmax has it."""
    found = []
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        z, label = logits(x[rows], rows), y[rows, None]
        right = z.gather(1, label)
        before = torch.arange(z.shape[1], device=x.device) < label
        found += ((z > right) | (z == right) & before | z.isnan()).sum(1).tolist()
    return found


def attacked(logits, item, numbers: list[int], args, bar: tqdm):
    """Yields (ε, numbers, x, y, x_adv, logits of rows) for ε = 0 and every radius, for all images, some at a time.

    logits: (images, list of numbers) → [b, classes].  item: number → (pixels [3, h, w], label).
    """
    spent = 0

    def budgeted(eps: float) -> int:
        return ATTACKS[args.attack][1] if eps else 1

    for pool in chunks(numbers, 8 * args.batch_size):  # several batches, so that they stay full when images leave
        loaded = [(i, *item(i)) for i in pool]
        shapes = {tuple(x.shape): None for _, x, _ in loaded}  # one, unless --native
        for group in [[row for row in loaded if tuple(row[1].shape) == shape] for shape in shapes]:
            names = [i for i, _, _ in group]
            x, y = torch.stack([x for _, x, _ in group]), torch.tensor([y for _, _, y in group], device=group[0][1].device)

            def of_rows(images: Tensor, rows: Tensor) -> Tensor:
                nonlocal spent
                spent += len(images)
                bar.update(len(images))
                return logits(images, [names[i] for i in rows.tolist()])

            for eps in [0., *args.eps]:
                spent = 0
                x_adv = attack(args.attack, of_rows, x, y, eps / 255, names, args.seed, args.batch_size) if eps else x
                yield eps, names, x, y, x_adv, of_rows
                bar.update(budgeted(eps) * len(x) - spent)  # what broken images left over


# ============================================================================================================= commands
def zeroshot(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """Which of the classes is nearest to the image? A row for each run and data set."""
    results = []
    for path in args.dirs:
        classifier, own = classifier_of(path, device, args), []
        for name in args.data:
            images = load_set(name, args, rank)
            classifier.embed_classes(images.classes, images.prompts)
            numbers = sample(images.n, name, args, rank, keep=subset(images, name, path, args))
            mine = numbers[rank::world]  # strided: the ranks get about as many hard images each

            def item(i: int) -> tuple[Tensor, int]:
                image, label = images.item(i)
                return classifier.pixels(image), label

            record: dict[float, dict[int, tuple[int, int]]] = {}
            with progress(args, rank, len(mine), f'{Path(path).name} {Path(name).name}') as bar:
                for eps, names, x, y, x_adv, logits in attacked(classifier, item, mine, args, bar):
                    found = ranks(logits, x_adv, y, args.batch_size)
                    record.setdefault(eps, {}).update(zip(names, zip(y.tolist(), found)))
            record = {eps: {k: v for part in gather(record) for k, v in part.get(eps, {}).items()} for eps in [0., *args.eps]}
            row = {'dir': str(path), 'data': name, 'n': len(numbers), 'classes': len(images.classes), 'templates': len(images.templates)}
            for metric, measure in METRICS.items():
                of = {eps: measure([record[eps][i] for i in numbers]) for eps in record}
                row |= {f'clean_{metric}': of[0.], f'adv_{metric}': {f'{eps:g}': of[eps] for eps in args.eps}}
            row['survives'] = {f'{eps:g}': ''.join('1' if record[eps][i][1] == 0 else '0' for i in numbers) for eps in record}
            own.append(row)
        if len(own) > 1:
            own.append({'dir': str(path), 'data': 'average', 'n': sum(r['n'] for r in own), **{
                key: {eps: mean([r[key][eps] for r in own]) for eps in own[0][key]} if key.startswith('adv') else mean([r[key] for r in own])
                for metric in METRICS for key in (f'clean_{metric}', f'adv_{metric}')}})
        results += own
    if rank == 0:
        say(f'zero-shot classification, accuracy in %, split {args.split}{"" if args.subset == "all" else f", {args.subset} captions"}; '
            f'{attack_text(args)}')
        for metric, title in (('acc', 'top-1'), ('acc5', 'top-5'), ('mean_per_class_recall', 'mean per-class recall')):
            table([title, 'data', 'n', 'clean', *(f'ε = {eps:g}' for eps in args.eps)],
                  [[r['dir'], r['data'], str(r['n']), percent(r[f'clean_{metric}']), *map(percent, r[f'adv_{metric}'].values())] for r in results])
        if args.plot:
            shown = [r for r in results if r['data'] == ('average' if len(args.data) > 1 else args.data[0])]
            curves(Path(args.plot), [(Path(r['dir']).name, {0.: r['clean_acc'], **{float(e): a for e, a in r['adv_acc'].items()}}) for r in shown],
                   'ε in 1/255 (l∞)', 'zero-shot accuracy in %', f'{", ".join(Path(d).name for d in args.data)} {args.split}, n = '
                   f'{shown[0]["n"]}, {args.attack}', 1 / shown[0]['classes'] if 'classes' in shown[0] else None)
    return {'n': results[0]['n'], 'results': results}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def recall(record: list[tuple[int, int]]) -> float:
    """Mean over the classes of the share of its images that are right."""
    of: dict[int, list[bool]] = {}
    for label, rank in record:
        of.setdefault(label, []).append(rank == 0)
    return mean([mean(hits) for hits in of.values()])


METRICS = {'acc': lambda record: mean([r == 0 for _, r in record]), 'acc5': lambda record: mean([r < 5 for _, r in record]),
           'mean_per_class_recall': recall}  # of [(label, rank of the right class)]


def retrieval(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """recall@k: is one of an image's captions among the k nearest texts; is one of a caption's images among the k nearest?

    Attacked are the images, each against all its captions (image → text); text → image is measured on the same images.
    """
    if len(args.data) > 1:
        raise SystemExit(f'error: --data {" ".join(args.data)}: retrieval takes one data set')
    results = []
    for path in args.dirs:
        classifier, images = classifier_of(path, device, args), data.caption_set(args.data[0], args.split)
        numbers = sample(len(images.captions), args.data[0], args, rank)
        texts = list(dict.fromkeys(c for i in numbers for c in images.captions[i]))
        place = {text: t for t, text in enumerate(texts)}
        own = {i: [place[c] for c in images.captions[i]] for i in numbers}  # its captions, as places in texts
        if len(texts) < 2:
            raise SystemExit(f'error: --data {args.data[0]}: {len(texts)} different caption; retrieval needs at least 2')
        text = classifier.embed_texts(texts)

        def right(names: list[int]) -> Tensor:
            mask = torch.zeros(len(names), len(texts), dtype=torch.bool, device=device)
            for row, i in enumerate(names):
                mask[row, own[i]] = True
            return mask

        def logits(x: Tensor, names: list[int]) -> Tensor:
            """The last class is "one of its captions", the others are all other texts. (Last, so that a tie is a miss.)"""
            z, mask = 100 * classifier.embed(x) @ text.T, right(names)
            nearest = z.masked_fill(~mask, float('-inf')).amax(1, keepdim=True)
            return torch.cat([z.masked_fill(mask, float('-inf')), nearest], 1)

        ranks_of, embedded = {eps: {} for eps in [0., *args.eps]}, {eps: {} for eps in [0., *args.eps]}
        mine = numbers[rank::world]
        item = lambda i: (classifier.pixels(images.image(i)), len(texts))
        with progress(args, rank, len(mine), Path(path).name) as bar:
            for eps, names, x, y, x_adv, of_rows in attacked(logits, item, mine, args, bar):
                ranks_of[eps].update(zip(names, ranks(of_rows, x_adv, y, args.batch_size)))
                embedded[eps].update(zip(names, torch.cat([classifier.embed(part) for part in x_adv.split(args.batch_size)]).cpu()))
        parts = gather((ranks_of, embedded))
        row = {'dir': str(path), 'data': args.data[0], 'n': len(numbers), 'texts': len(texts)}
        for eps in [0., *args.eps]:
            i2t = {i: r for part, _ in parts for i, r in part[eps].items()}
            vector = {i: v for _, part in parts for i, v in part[eps].items()}
            similarity = text.cpu() @ torch.stack([vector[i] for i in numbers]).T                    # [texts, images]
            mask = right(numbers).T.cpu()
            nearest = similarity.masked_fill(~mask, float('-inf')).amax(1, keepdim=True)
            t2i = (~mask & (similarity >= nearest)).sum(1).tolist()
            row |= {('clean' if eps == 0 else f'adv_{eps:g}'): {
                **{f'image_to_text_recall@{k}': mean([i2t[i] < k for i in numbers]) for k in (1, 5, 10)},
                **{f'text_to_image_recall@{k}': mean([r < k for r in t2i]) for k in (1, 5, 10)}}}
        results.append(row)
    if rank == 0:
        say(f'retrieval, recall@k in %, {args.data[0]} {args.split}, {results[0]["n"]} images, {results[0]["texts"]} texts; '
            f'{attack_text(args)}, against image → text')
        table(['model', 'ε', *(f'{way} @{k}' for way in ('i→t', 't→i') for k in (1, 5, 10))],
              [[r['dir'], f'{eps:g}', *map(percent, r['clean' if eps == 0 else f'adv_{eps:g}'].values())]
               for r in results for eps in [0., *args.eps]])
        if args.plot:
            curves(Path(args.plot), [(f'{Path(r["dir"]).name}, {arrow}', {eps: r['clean' if eps == 0 else f'adv_{eps:g}'][f'{way}_recall@1']
                                      for eps in [0., *args.eps]}) for r in results for way, arrow in
                                     (('image_to_text', 'image → text'), ('text_to_image', 'text → image'))],
                   'ε in 1/255 (l∞)', 'recall@1 in %', f'retrieval, {Path(args.data[0]).name} {args.split}, n = {results[0]["n"]}, {args.attack}')
    return {'n': results[0]['n'], 'results': results}


def typographic(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """Does a wrong class name, written on the image, change the class? And what do large targeted perturbations look like?

    The name is drawn at the image's own size (enlarged to 224 pixels if it is smaller), before the model's resize.
    """
    images = one_set(args, rank)
    numbers = sample(images.n, args.data[0], args, rank)
    mine, results, named = numbers[rank::world], [], {}  # named: number → (right class, the one that is written)
    for i in dict.fromkeys([*mine, numbers[0]]):
        label = images.item(i)[1]
        other = int(torch.randint(len(images.classes) - 1, (), generator=data.generator(args.seed, 'typographic', i)))
        named[i] = (label, other + (other >= label))
    for path in args.dirs:
        classifier = classifier_of(path, device, args).embed_classes(images.classes, images.prompts)
        found = {}
        with tqdm(total=len(mine) * len(args.font), desc=Path(path).name, unit='image', disable=args.quiet or rank > 0) as bar, torch.no_grad():
            for size in args.font:
                for part in chunks(mine, args.batch_size):
                    drawn = [written(enlarged(images.item(i)[0]), images.classes[named[i][1]], size) for i in part]
                    seen = classifier(torch.stack([classifier.pixels(image) for image in drawn])).argmax(1).tolist()
                    found |= {(size, i): p for i, p in zip(part, seen)}
                    bar.update(len(part))
        row = {'dir': str(path), 'data': args.data[0], 'n': len(numbers)}
        for key, which in (('acc', 0), ('written_acc', 1)):  # saw what is there; saw what is written
            hits = gather([(size, p == named[i][which]) for (size, i), p in found.items()])
            row[key] = {f'{size:g}': mean([hit for part in hits for s, hit in part if s == size]) for size in args.font}
        results.append(row)
    if rank == 0:
        say(f'typographic attack, {args.data[0]} {args.split}, n = {len(numbers)}: a wrong class name on the image; height of the letters '
            f'in % of the image\'s (0: nothing written)')
        table(['in %', '', *(f'{size:g} %' for size in args.font)],
              [[r['dir'], what, *map(percent, r[key].values())] for r in results
               for key, what in (('acc', 'accuracy'), ('written_acc', 'the written class'))])
        if args.plot:
            curves(Path(args.plot), [(Path(r['dir']).name + what, {float(s): a for s, a in r[key].items()}) for r in results
                                     for key, what in (('acc', ''), ('written_acc', ': the written class'))],
                   'height of the letters in % of the image', 'images in %', f'a wrong class name on the image, {Path(args.data[0]).name}, n = {len(numbers)}')
        if args.grid:
            targeted_grid(args, images, numbers[0], named[numbers[0]], device)
    return {'n': len(numbers), 'results': results}


def enlarged(image):
    """At least 224 pixels high and wide, so that letters can be drawn."""
    side = min(image.size)
    return image if side >= 224 else image.resize([round(s * 224 / side) for s in image.size], resample=2)


def written(image, name: str, percent_high: float):
    """The name across the middle of the image, a word a line, black with a white rim; smaller if it would not fit."""
    from PIL import ImageDraw, ImageFont
    if percent_high == 0:
        return image
    image = image.copy()
    draw, lines, size = ImageDraw.Draw(image), name.replace(' ', '\n'), percent_high / 100 * image.height
    while True:
        font, rim = ImageFont.load_default(max(size, 1)), max(1, round(size / 12))
        left, top, right, bottom = draw.multiline_textbbox((0, 0), lines, font, stroke_width=rim, align='center')
        if size <= 4 or (right - left <= image.width and bottom - top <= image.height):
            break
        size *= .95
    place = ((image.width - left - right) / 2, (image.height - top - bottom) / 2)
    draw.multiline_text(place, lines, 'black', font, stroke_width=rim, stroke_fill='white', align='center')
    return image


def targeted_grid(args, images: data.ClassSet, number: int, named: tuple[int, int], device: torch.device) -> None:
    """clean | δ | x+δ for radii so large that the perturbation can be seen; a row for each radius, a block for each run."""
    target = images.classes.index(args.target) if args.target in images.classes else named[1]
    if args.target and args.target not in images.classes:
        raise SystemExit(f'error: --target {args.target}: not a class; the classes are {", ".join(images.classes[:30])}')
    rows = []
    for eps in args.grid_eps:
        row = []
        for path in args.dirs:
            classifier = classifier_of(path, device, args).embed_classes(images.classes, images.prompts)
            x = classifier.pixels(images.item(number)[0])[None]
            goal = torch.tensor([target], device=device)
            never = torch.zeros(1, dtype=torch.bool, device=device)  # not to the first success: to the highest loss
            loss = lambda z, idx: (-attacks.margin(classifier(z), goal), never)
            x_adv = attacks.apgd(loss, x, eps / 255, iterations=200).images
            attacks.check(x, x_adv, eps / 255)
            with torch.no_grad():
                before, after = (images.classes[int(classifier(z).argmax())] for z in (x, x_adv))
            row += [(x[0], f'{Path(path).name}: {before}'), ((x_adv - x)[0] / (2 * eps / 255) + .5, f'δ, ε = {eps:g}/255'),
                    (x_adv[0], f'x + δ: {after}')]
        rows.append(row)
    pictures(Path(args.grid), rows, f'towards “{images.classes[target]}”')


def show(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """One image: what does the model see before and after the attack?"""
    if rank > 0:
        return {}
    names = [name.strip() for name in args.labels.split(',') if name.strip()]
    if len(set(names)) != len(names) or len(names) < 2:
        raise SystemExit(f"error: --labels {args.labels!r}: at least 2 different texts, separated by commas: 'a cat,a dog'")
    image, eps, rows, results = data.read_image(Path(args.image)), args.eps[0], [], []
    for path in args.dirs:
        classifier = classifier_of(path, device, args).embed_classes(names, lambda name: [name])
        x = classifier.pixels(image)[None]
        with torch.no_grad():
            y = torch.tensor([names.index(args.label)], device=device) if args.label in names else classifier(x).argmax(1)
            if args.label and args.label not in names:
                raise SystemExit(f'error: --label {args.label}: not one of --labels {args.labels}')
        with progress(args, rank, 1, Path(path).name) as bar:
            def logits(images: Tensor, rows: Tensor) -> Tensor:
                bar.update(len(images))
                return classifier(images)
            x_adv = attack(args.attack, logits, x, y, eps / 255, [0], args.seed, args.batch_size) if args.attack != 'none' else x
            bar.update(bar.total - bar.n)
        with torch.no_grad():
            before, after = (classifier(z)[0].softmax(0).tolist() for z in (x, x_adv))
        seen = [names[max(range(len(names)), key=p.__getitem__)] for p in (before, after)]
        broken = seen[1] != names[int(y)]
        results.append({'dir': str(path), 'label': names[int(y)], 'clean': dict(zip(names, before)), f'adv_{eps:g}': dict(zip(names, after)),
                        'broken': broken})
        say(f'{path}: probability in % (softmax of 100·cos), attacked away from “{names[int(y)]}”, ε = {eps:g}/255, {ATTACKS[args.attack][0]}: '
            + ('the prediction changes' if broken else 'the prediction stands'))
        table(['label', 'clean', f'ε = {eps:g}'], [[n, percent(p), percent(q)] for n, p, q in zip(names, before, after)])
        rows.append([(x[0], f'{Path(path).name}: {seen[0]}'), ((x_adv - x)[0] / (2 * eps / 255) + .5, f'δ, ε = {eps:g}/255, scaled to gray ± 1/2'),
                     (x_adv[0], f'x + δ: {seen[1]}')])
    pictures(Path(args.plot), rows, Path(args.image).name)
    say(f'picture: {args.plot}')
    return {'n': 1, 'image': args.image, 'results': results}


# ============================================================================================== a LLaVA, and what it answers
@dataclass
class Asked:
    """A question about an image, and the attacks on its answer."""
    number: int
    image: Path
    question: str
    rounds: list[tuple[str, str | None]]  # ('away' from | 'towards', a text; None: from what it says then, unless a round named that),
                                          # or ('again', ''): from the worst image so far, in full precision
    score: Callable[[str], float]   # of an answer; the attack wants it low


class Answerer:
    """A LLaVA, asked about images; or a language model alone, which is asked and shown nothing (the "no image" row)."""

    def __init__(self, path: str, device: torch.device, max_new: int, batch_size: int, style: str = ''):
        self.path, self.device, self.max_new, self.batch_size, self.blind = path, device, max_new, batch_size, False
        if llava_adv.is_llava(path) or clip_adv.model_type(data.locate(path)) in (None, 'clip'):
            self.model, self.tokenizer = llava_adv.load_llava(path)
            self.model.to(device).requires_grad_(False)
            self.image_tokens, self.fit = self.model.image_tokens, llava_adv.fit(self.model)
        else:
            llm, self.tokenizer = llava_adv.load_llm(path, torch.float32)
            llm.to(device).requires_grad_(False)
            self.model = SimpleNamespace(llm=llm, embed=lambda images, ids: llm.model.embed_tokens(ids), ends=llava_adv.ends_of(llm, self.tokenizer))
            self.blind, self.image_tokens = True, 0
        self.prompt = llava_adv.Prompt(self.tokenizer, llava_adv.prompt_style(style or getattr(self.model, 'style', ''), self.tokenizer), self.image_tokens, 1 << 30)

    def pixels(self, file: Path) -> Tensor:
        """→ float32 [3, S, S] in [0, 1]: the pixels that the attack may change."""
        if self.blind:
            return torch.zeros(3, 1, 1)
        return self.fit(data.read_image(file)).to(self.device).float() / 255

    def ids(self, question: str, answer: str | None = None) -> tuple[list[int], list[bool]]:
        return self.prompt.encode([(question if self.blind else f'{data.IMAGE}\n{question}', answer)])

    def answer(self, x: Tensor, questions: list[str]) -> list[str]:
        """Greedy answers.   x: [n, 3, S, S]"""
        out, order = [''] * len(questions), sorted(range(len(questions)), key=lambda i: len(questions[i]))  # equal lengths together
        for part in chunks(order, self.batch_size):
            prompts = [self.ids(questions[i])[0] for i in part]
            for i, tokens in zip(part, llava_adv.generate(self.model, x[part], prompts, self.max_new, self.model.ends)):
                out[i] = self.tokenizer.decode(tokens)
        return out

    def watched(self, question: str, said: str, sample: data.Sample) -> list[int]:
        """For each supervised token of the sample: the one that the model would say there if it still said `said`; −1: cannot be known.

        What is predicted behind a text tells what the model says as long as it would have said that text: up to the first difference.
        """
        own, _ = self.ids(question, said)
        known = next((k for k, (a, b) in enumerate(zip(own, sample.ids)) if a != b), min(len(own), len(sample.ids)) - 1)
        return [own[k] if k <= known else -1 for k, supervised in enumerate(sample.labels) if supervised]

    def worst(self, x: Tensor, asked: list[Asked], eps: float, threshold: float, iterations: int = 100, early: bool = True,
              tick=lambda n: None) -> tuple[list[str], list[float], Tensor]:
        """(answers, scores, images [n, 3, S, S]) of the worst images that the rounds find; a sample leaves once its score is at most
        `threshold`.   METHOD.md, evaluation; RobustVLM's ensembles: APGD without random start, first step ε.

        eps: in [0, 1] units.  early: looks at the answer whenever a token of it has changed (see watched), and not after a round only.
        """
        texts = self.answer(x, [a.question for a in asked])
        scores, images = [a.score(t) for a, t in zip(asked, texts)], x.clone()
        against = [next((goal for goal in a.rounds if goal[0] == 'away'), ('', '')) for a in asked]  # what `again` drives the worst image away from
        attacked: set[int] = set()
        kinds = [(number, kind) for number in range(max((len(a.rounds) for a in asked), default=0)) for kind in (('away',), ('again', 'towards'))]
        for number, kind in kinds:  # one kind at a time, so that a sample's precision does not depend on who is beside it
            rows = [i for i, a in enumerate(asked) if number < len(a.rounds) and a.rounds[number][0] in kind]
            over = len(rows)
            rows = [i for i in rows if scores[i] > threshold]
            goals = [against[i] if asked[i].rounds[number][0] == 'again' else asked[i].rounds[number] for i in rows]
            goals = [(way, texts[i] if text is None else text) for i, (way, text) in zip(rows, goals)]
            new = [n for n, i in enumerate(rows) if asked[i].rounds[number][1] is not None or goals[n] not in asked[i].rounds]
            rows, goals = [rows[n] for n in new], [goals[n] for n in new]
            if not rows:
                tick(over)
                continue
            half = self.device.type == 'cuda' and kind == ('away',)
            start = torch.stack([images[i] if asked[i].rounds[number][0] == 'again' else x[i] for i in rows])
            samples = [data.Sample(None, *self.ids(asked[i].question, text), 0) for i, (_, text) in zip(rows, goals)]
            watched = [self.watched(asked[i].question, texts[i], sample) for i, sample in zip(rows, samples)]
            sign = torch.tensor([1. if way == 'away' else -1. for way, _ in goals], device=self.device)

            def loss(z: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
                names = idx.tolist()
                batch = llava_adv.collate([samples[n] for n in names], self.tokenizer.pad).to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    logits = self.model.logits(z, batch)
                # in float64: in float32 the loss of a sure answer is exactly 0, and so is its gradient
                value = torch.nn.functional.cross_entropy(logits.double(), batch.targets, reduction='none').float()
                value = value.new_zeros(len(names)).index_add(0, batch.rows, value)
                done = torch.zeros(len(names), dtype=torch.bool, device=self.device)
                if early:
                    expected = torch.tensor([token for n in names for token in watched[n]], device=self.device)
                    changed = (expected >= 0) & (logits.argmax(1) != expected)
                    look = batch.rows[changed].unique().tolist()
                    if look:
                        spoken = self.answer(z.detach()[look], [asked[rows[names[row]]].question for row in look])
                        for row, text in zip(look, spoken):
                            done[row] = asked[rows[names[row]]].score(text) <= threshold
                return sign[idx] * value, done

            found = attacks.apgd(loss, x[rows], eps, start, iterations, first_step=1., batch_size=self.batch_size)
            attacks.check(x[rows], found.images, eps)
            spoken = self.answer(found.images, [asked[i].question for i in rows])
            for n, (i, text) in enumerate(zip(rows, spoken)):
                score = asked[i].score(text)
                if score < scores[i] or score == scores[i] and i not in attacked:  # of equals the first stays: the most frequent reference's
                    scores[i], texts[i], images[i] = score, text, found.images[n]
                    attacked.add(i)
                    if goals[n][0] == 'away':
                        against[i] = goals[n]
            tick(over)
        return texts, scores, images


def asked_and_attacked(args, rank: int, world: int, device: torch.device, asked: list[Asked], threshold: float, name: str, path: str,
                       early: bool = True) -> tuple[dict, dict]:
    """{ε: {number: (answer, score)}}, clean as ε = 0; and on rank 0 {ε: x_adv [3, S, S]} of the first question's image."""
    model = Answerer(path, device, args.max_new, args.batch_size, args.prompt)
    radii = [] if model.blind or args.attack == 'none' else args.eps
    found, first, mine = {eps: {} for eps in [0., *radii]}, {}, asked[rank::world]
    rounds = max(len(a.rounds) for a in asked)
    with tqdm(total=len(mine) * (1 + len(radii) * rounds), desc=f'{Path(path).name} {name}', unit='question × round', disable=args.quiet or rank > 0,
              mininterval=.5 if sys.stderr.isatty() else 60) as bar:
        for pool in chunks(mine, 8 * args.batch_size):  # several batches, so that they stay full when samples leave
            x = torch.stack([model.pixels(a.image) for a in pool])
            texts = model.answer(x, [a.question for a in pool])
            found[0.] |= {a.number: (t, a.score(t)) for a, t in zip(pool, texts)}
            first.setdefault(0., x[0].cpu())
            bar.update(len(pool))
            for eps in radii:
                texts, scores, worst = model.worst(x, pool, eps / 255, threshold, args.iterations, early, bar.update)
                found[eps] |= {a.number: (t, s) for a, t, s in zip(pool, texts, scores)}
                first.setdefault(eps, worst[0].cpu())
                bar.update(sum(rounds - len(a.rounds) for a in pool))
    parts = gather(found)
    return {eps: {n: v for part in parts for n, v in part[eps].items()} for eps in found}, first


def questions(args, rank: int, world: int, device: torch.device, found: data.QuestionSet, groups: dict[str, list[int]], score, rounds, title: str,
              measures: dict) -> dict:
    """vqa, pope, sqa: the same but for the set, the score of an answer and what is reported.

    groups: name → numbers of questions; n of each are drawn.  score: (answer, question) → [0, 1].  rounds: question → attacks.
    measures: name → (answers, questions, scores) → fraction.
    """
    groups = {name: draw(numbers, args.n, args.seed) for name, numbers in groups.items()}
    if not all(groups.values()):
        raise SystemExit(f'error: --data {args.data[0]}, split {args.split}: no question is left')
    numbers = sorted({i for of in groups.values() for i in of})
    of = lambda i: found.questions[i]
    asked = [Asked(i, of(i).image, of(i).question, rounds(of(i)), lambda text, i=i: score(text, of(i))) for i in numbers]
    results = []
    for path in args.dirs:
        record, _ = asked_and_attacked(args, rank, world, device, asked, 0., args.command, path)
        for group, members in groups.items():
            row = {'dir': path, 'data': args.data[0], 'questions': group, 'n': len(members)}
            for name, measure in measures.items():
                value = {eps: measure([record[eps][i][0] for i in members], [of(i) for i in members], [record[eps][i][1] for i in members]) for eps in record}
                row |= {f'clean_{name}': value[0.], f'adv_{name}': {f'{eps:g}': value[eps] for eps in value if eps}}
            row['answers'] = {f'{eps:g}': {of(i).name: record[eps][i][0] for i in members} for eps in record}
            results.append(row)
    if rank == 0:
        say(f'{title}, split {args.split}; {answer_attack_text(args)}; {found.note}')
        at = lambda r, name, eps: percent(r[f'adv_{name}'][eps]) if eps else percent(r[f'clean_{name}'])
        radii = lambda r, name: ['', *r[f'adv_{name}']]  # none of a language model alone
        if len(measures) == 1:
            name, = measures
            table([name, 'questions', 'n', 'clean', *(f'ε = {eps:g}' for eps in args.eps)],
                  [[r['dir'], r['questions'], str(r['n']), *(at(r, name, eps) for eps in radii(r, name)), *['–'] * (len(args.eps) + 1 - len(radii(r, name)))]
                   for r in results])
        else:
            table(['in %', 'questions', 'n', 'ε', *measures], [[r['dir'], r['questions'], str(r['n']), eps or '0', *(at(r, name, eps) for name in measures)]
                                                              for r in results for eps in radii(r, next(iter(measures)))])
    return {'n': len(numbers), 'results': results}


def answer_attack_text(args) -> str:
    if args.attack == 'none':
        return 'no attack'
    then = '' if args.command == 'caption' else ', then targeted'
    return f"ensemble: APGD {args.iterations} away from each distinct reference, again from the worst image{then}; l∞, ε in 1/255, at the model's resolution"


def vqa(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """VQA accuracy, with the official normalisation of answers. A row for each run and kind of question."""
    found = data.vqa_set(args.data[0], args.split, args.annotations, args.image_root)
    place = {id(q): i for i, q in enumerate(found.questions)}
    groups = {'all': list(range(len(found.questions)))}
    if args.data[0] == 'easyvqa':
        groups = {'what': [i for i, q in enumerate(found.questions) if q.kind == 'what'],
                  'yes/no, balanced': [place[id(q)] for q in data.balanced(found.questions)], **groups}
    else:
        found.questions[:] = [dataclasses.replace(q, question=f'{q.question}\nAnswer the question using a single word or phrase.') for q in found.questions]
    groups = {name: numbers for name, numbers in groups.items() if not args.questions or name.split(',')[0] in args.questions}
    if not groups:
        raise SystemExit(f"error: --questions {' '.join(args.questions)}: must be among what, yes/no, all")

    def rounds(q: data.Question) -> list[tuple[str, str | None]]:
        common = [answer for answer, _ in Counter(q.answers).most_common(5)]
        return [*(('away', answer) for answer in common), ('away', None), ('again', ''), ('towards', 'maybe'), ('towards', 'Word')]
    return questions(args, rank, world, device, found, groups, lambda text, q: vqa_accuracy(text, q.answers), rounds, 'VQA accuracy in %',
                     {'accuracy': lambda answers, asked, scores: mean(scores)})


def pope(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """Hallucination: is there …? yes or no. Accuracy, precision, recall, F1 and how often the answer is yes."""
    found = data.pope_set(args.data[0], args.split, args.image_root)
    other = {'yes': 'no', 'no': 'yes'}
    measure = lambda key: lambda answers, asked, scores: pope_scores(answers, [q.answers[0] for q in asked])[key]
    return questions(args, rank, world, device, found, {'yes/no': list(range(len(found.questions)))},
                     lambda text, q: pope_scores([text], q.answers)['accuracy'],
                     lambda q: [('away', q.answers[0]), ('away', None), ('again', ''), ('towards', other[q.answers[0]])], 'POPE, in %',
                     {key: measure(key) for key in ('f1', 'accuracy', 'precision', 'recall', 'yes_rate')})


def sqa(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """ScienceQA, the questions with an image: is the letter of the answer right?"""
    found = data.sqa_set(args.data[0], args.split, args.image_root)
    letters = lambda q: [c for c in 'ABCDEFGHIJ' if f'({c}) ' in q.question.rpartition('\nOptions: ')[2]]
    return questions(args, rank, world, device, found, {'all': list(range(len(found.questions)))},
                     lambda text, q: float(option_letter(text) == q.answers[0]),
                     lambda q: [('away', q.answers[0]), ('away', None), ('again', ''), *(('towards', other) for other in letters(q) if other != q.answers[0])],
                     'ScienceQA, accuracy in %', {'accuracy': lambda answers, asked, scores: mean(scores)})


def caption(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """CIDEr-D × 100 of captions; on easyvqa also how many name the right colour and shape. --targeted: forced sentences instead."""
    found = data.references(args.data[0], args.split, args.image_root)
    numbers = draw(list(range(len(found.images))), args.n, args.seed)
    if args.targeted:
        return targeted(args, rank, world, device, found, numbers)
    cider = Cider([found.captions[i] for i in numbers])
    place = {i: n for n, i in enumerate(numbers)}
    asked = [Asked(i, found.images[i], data.CAPTION_QUESTION, [*(('away', c) for c in dict.fromkeys(found.captions[i][:5])), ('again', '')],
                   lambda text, i=i: cider.score(place[i], text)) for i in numbers]
    facts = data.easyvqa_split(args.split)[0] if args.data[0] == 'easyvqa' else {}
    fact_of = {i: facts[int(found.images[i].stem)] for i in numbers} if facts else {}

    def measured(captions: dict[int, str]) -> dict:
        row = {'cider': mean([cider.score(place[i], captions[i]) for i in numbers])}
        if fact_of:
            right = [names_facts(captions[i], *fact_of[i]) for i in numbers]
            row |= {'colour': mean([c for c, _ in right]), 'shape': mean([s for _, s in right]), 'both': mean([c and s for c, s in right])}
        return row
    results, header = [], ['captions', 'ε', 'CIDEr', *(['right colour', 'right shape', 'both'] if fact_of else [])]
    for path in args.dirs:
        record, _ = asked_and_attacked(args, rank, world, device, asked, args.threshold / 100, 'caption', path, early=False)
        row = {'dir': path, 'data': args.data[0], 'n': len(numbers)}
        for eps in record:
            row['clean' if eps == 0 else f'adv_{eps:g}'] = measured({i: record[eps][i][0] for i in numbers})
        row['captions'] = {f'{eps:g}': {found.names[i]: record[eps][i][0] for i in numbers} for eps in record}
        results.append(row)
    shift = numbers[1:] + numbers[:1]  # another image's
    bounds = {'a reference of the image': measured({i: found.captions[i][0] for i in numbers}),
              "a reference of another image": measured({i: found.captions[j][0] for i, j in zip(numbers, shift)})}
    if rank == 0:
        say(f'captions, CIDEr-D × 100 and facts in %, split {args.split}, n = {len(numbers)}; {answer_attack_text(args)}; a caption is dropped below '
            f'CIDEr {args.threshold:g}; {found.note}')
        table(header, [[r['dir'], '0' if key == 'clean' else key[4:], *map(percent, r[key].values())] for r in results for key in r
                       if key == 'clean' or key.startswith('adv_')] + [[name, '–', *map(percent, values.values())] for name, values in bounds.items()])
    return {'n': len(numbers), 'results': results, 'bounds': bounds}


def targeted(args, rank: int, world: int, device: torch.device, found: data.ReferenceSet, numbers: list[int]) -> dict:
    """Can the image be made to say a sentence of the attacker's choice? Success: the sentence is in the caption."""
    results, shown = [], []
    for path in args.dirs:
        row = {'dir': path, 'data': args.data[0], 'n': len(numbers), 'success': {}}
        for text in args.targeted:
            asked = [Asked(i, found.images[i], data.CAPTION_QUESTION, [('towards', text)], lambda said, text=text: float(text.lower() not in said.lower()))
                     for i in numbers]
            record, image = asked_and_attacked(args, rank, world, device, asked, 0., f'“{text}”', path)
            row['success'][text] = {f'{eps:g}': mean([record[eps][i][1] == 0 for i in numbers]) for eps in record}
            if rank == 0 and args.grid:
                first = numbers[0]
                x = data.TF.pil_to_tensor(data.read_image(found.images[first])) / 255
                shown.append([(x, f'{Path(path).name}: {record[0.][first][0]}')])
                for eps in [e for e in record if e]:
                    shown[-1] += [((image[eps] - image[0.]) / (2 * eps / 255) + .5, f'δ, ε = {eps:g}/255'),
                                  (image[eps], f'x + δ: {record[eps][first][0]}')]
        results.append(row)
    if rank == 0:
        radii = sorted({eps for r in results for rates in r['success'].values() for eps in rates}, key=float)  # of an LLM alone: 0
        say(f'targeted captions: success rate in % (the sentence is in the caption), split {args.split}, n = {len(numbers)}; APGD {args.iterations} towards '
            f'the sentence, l∞, ε in 1/255; ε = 0: unperturbed')
        table(['model', 'sentence', *(f'ε = {eps}' for eps in radii)],
              [[r['dir'], text, *(percent(rates[eps]) if eps in rates else '–' for eps in radii)] for r in results for text, rates in r['success'].items()])
        if args.grid:
            shown = [row for row in shown if len(row) == max(map(len, shown))]
            pictures(Path(args.grid), shown, 'targeted captions')
    return {'n': len(numbers), 'results': results}


# ================================================================================================================ audit
def sources_of(path: str, args: argparse.Namespace) -> list[str]:
    """The other models, from which attacks are transferred to the one at path. No attack is transferred from a model to itself."""
    return [other for other in [*args.dirs, *args.transfer_from] if os.path.realpath(other) != os.path.realpath(path)]


def audit(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict:
    """Is the robustness real? Checks for gradient masking; exit code 1 if one fails."""
    if args.attack != 'ensemble':
        raise SystemExit(f'error: --attack {args.attack}: audit compares attacks with each other and has no choice of one')
    images, eps, results = one_set(args, rank), args.eps[0], []
    numbers = sample(images.n, args.data[0], args, rank)
    mine = numbers[rank::world]
    if len(numbers) < world:
        raise SystemExit(f'error: --n {args.n}: {len(numbers)} images for {world} processes; each needs one at least')
    for path in args.dirs:
        classifier = classifier_of(path, device, args).embed_classes(images.classes, images.prompts)
        loaded = [images.item(i) for i in mine]
        if len({image.size for image, _ in loaded}) > 1 and args.native:
            raise SystemExit('error: --native: audit needs images of one size')
        x = torch.stack([classifier.pixels(image) for image, _ in loaded])
        y = torch.tensor([label for _, label in loaded], device=device)
        sources = sources_of(path, args)
        source = classifier_of(sources[0], device, args).embed_classes(images.classes, images.prompts) if sources else None
        with tqdm(total=len(CHECKS), desc=Path(path).name, unit='check', disable=args.quiet or rank > 0) as bar:
            checks = audit_checks(classifier, x, y, eps / 255, mine, args.seed, args.batch_size, source, bar=bar, queries=args.queries)
        failed = [c for c in checks if c['verdict'] == 'FAIL']
        results.append({'dir': str(path), 'data': args.data[0], 'n': len(numbers), 'eps': eps, 'passed': not failed, 'checks': checks})
        if rank == 0:
            say(f'audit of {path}: {args.data[0]} {args.split}, n = {len(numbers)}, ε = {eps:g}/255, tolerance 1 point (1 image if n < 100)')
            table(['check', 'verdict', 'figure (robust accuracy, if in %)'], [[c['check'], c['verdict'], c['figure']] for c in checks])
            say(f'{path}: ' + (f'{len(failed)} of {len(checks)} checks FAIL: {"; ".join(c["check"] for c in failed)}' if failed else
                               f'all {sum(c["verdict"] == "PASS" for c in checks)} checks PASS'))
    return {'n': len(numbers), 'results': results, 'exit': int(any(not r['passed'] for r in results))}


CHECKS = (  # what holds for an honest model; after Athalye et al. 2018 (arXiv 1802.00420) and Carlini et al. 2019 (1902.06705)
    'deterministic', 'cross-entropy has a gradient', 'gradient agrees with finite differences', 'attack raises the loss',
    '100 steps not weaker than 20', '5 restarts not weaker than 1', 'many steps not weaker than one', 'random noise hurts less',
    'Square not stronger than white box', 'transfer not stronger than white box', 'accuracy falls with ε', 'ε = 1 leaves nothing')


def audit_checks(logits, x: Tensor, y: Tensor, eps: float, names: list[int], seed: int, batch_size: int, source=None, bar=None,
                 queries: int = 5000, iterations: int = 100) -> list[dict]:
    """[{'check', 'figure', 'verdict'}] for a classifier: images [b, 3, h, w] → logits [b, classes].

    eps: in [0, 1] units.  source: another classifier, for transfer.  Every robust accuracy comes from a run of its own, with
    its own random starts. The tolerance is 1 point, and 1 image where a point is less than that. Split over ranks, if any.
    """
    device = x.device
    total = sum(gather(len(x)))
    tolerance = max(.01, 1 / total) + 1e-9
    checks = []

    def share(flags) -> float:
        """Of all images, on all ranks."""
        return sum(gather(int(torch.as_tensor(flags).sum()))) / total

    def verdict(name: str, ok: bool | None, figure: str) -> None:
        assert name in CHECKS
        checks.append({'check': name, 'figure': figure, 'verdict': 'SKIP' if ok is None else 'PASS' if ok else 'FAIL'})
        if bar is not None:
            bar.update()

    @torch.no_grad()
    def correct(images: Tensor, labels: Tensor = y) -> Tensor:
        return torch.cat([logits(a).argmax(1) == b for a, b in zip(images.split(batch_size), labels.split(batch_size))])

    def starts(radius: float, purpose: str) -> Tensor:
        return attacks.random_start(x, radius, [data.generator(seed, f'audit {purpose}', i) for i in names])

    def loss(images: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        z = logits(images)
        return attacks.margin(z, y[idx]), z.argmax(1) != y[idx]

    def under_apgd(radius: float, purpose: str, steps: int = iterations, restarts: int = 1) -> float:
        standing = correct(x)
        for restart in range(restarts):
            rows = standing.nonzero()[:, 0]
            if len(rows):
                found = attacks.apgd(lambda z, idx: loss(z, rows[idx]), x[rows], radius, starts(radius, f'{purpose} {restart}')[rows],
                                     steps, batch_size=batch_size)
                attacks.check(x[rows], found.images, radius)
                standing[rows] = correct(found.images, y[rows])
        return share(standing)

    def gradient_of(measure, images: Tensor) -> Tensor:
        return attacks.evaluate(lambda z, idx: (measure(logits(z), y[idx]), y[idx] < 0), images, torch.arange(len(images), device=device), batch_size)[2]

    with torch.no_grad():
        difference = max(gather(max([float((logits(a) - logits(a)).abs().max()) for a in x.split(batch_size)], default=0.)))
    verdict('deterministic', difference == 0, f'the same images twice: logits differ by {difference:.2g}')

    flat = gradient_of(lambda z, label: torch.nn.functional.cross_entropy(z, label, reduction='none'), x).flatten(1).abs().amax(1) == 0
    clean = share(correct(x))
    stuck = share(flat & correct(x)) / max(clean, 1 / total)
    verdict('cross-entropy has a gradient', stuck <= tolerance, f'exactly 0 in float32 for {percent(stuck)} % of the correct images')

    # f(x + hv) − f(x − hv) against 2h⟨∇f, v⟩, at a random point of the ball, v ~ U(−1, 1); 0 against 0 counts as wrong
    at, h = starts(eps, 'differences').clamp(.002, .998), .001
    v = torch.stack([torch.rand(x.shape[1:], generator=data.generator(seed, 'audit direction', i)) for i in names]).to(x) * 2 - 1
    slope = (gradient_of(attacks.margin, at) * v).flatten(1).sum(1)
    value = lambda images: torch.cat([attacks.margin(logits(a), b) for a, b in zip(images.split(batch_size), y.split(batch_size))])
    with torch.no_grad():
        measured = (value(at + h * v) - value(at - h * v)) / (2 * h)
    error = (slope - measured).abs() / torch.maximum(slope.abs(), measured.abs()).clamp(min=1e-12)
    error = torch.where((slope == 0) & (measured == 0), 1., error)
    median = float(torch.tensor([e for part in gather(error.tolist()) for e in part]).median())
    verdict('gradient agrees with finite differences', median <= .1, f'median relative error {median:.2g}')

    begin = starts(eps, 'rises')
    end = torch.cat([attacks.pgd(lambda z: attacks.margin(logits(z), b).sum(), a, eps, eps / 10, PGD_STEPS, s) for a, b, s in
                     zip(x.split(batch_size), y.split(batch_size), begin.split(batch_size))])
    with torch.no_grad():
        fell = share(value(end) <= value(begin))
    verdict('attack raises the loss', fell <= tolerance, f'PGD leaves {percent(fell)} % of the images below their start')

    few, many = under_apgd(eps, 'few steps', max(iterations // 5, 1)), under_apgd(eps, 'many steps')
    verdict('100 steps not weaker than 20', many <= few + tolerance, f'APGD: {percent(many)} against {percent(few)} %')
    one, five = under_apgd(eps, 'one restart'), under_apgd(eps, 'five restarts', restarts=5)
    verdict('5 restarts not weaker than 1', five <= one + tolerance, f'APGD: {percent(five)} against {percent(one)} %')
    single = (x + eps * gradient_of(attacks.margin, x).sign()).clamp(0, 1)
    fgsm = share(correct(single) & correct(x))
    verdict('many steps not weaker than one', many <= fgsm + tolerance, f'APGD {percent(many)}, FGSM {percent(fgsm)} %')

    found = attacks.ensemble(lambda images, rows: logits(images), x, y, eps, lambda restart, row: data.generator(seed, f'audit ensemble {restart}', names[row]),
                             iterations=iterations, batch_size=batch_size)
    white = share(~found.done)
    noisy = share(correct(x) & correct(starts(eps, 'noise')))
    verdict('random noise hurts less', white <= noisy + tolerance, f'ensemble {percent(white)}, noise {percent(noisy)} %')
    rows = correct(x).nonzero()[:, 0]
    blind = attacks.square(lambda z, idx: loss(z, rows[idx]), x[rows], eps, [data.generator(seed, 'audit square', names[i]) for i in rows.tolist()],
                           queries, batch_size) if len(rows) else None
    square = share(~blind.done if blind else [])
    verdict('Square not stronger than white box', white <= square + tolerance, f'ensemble {percent(white)}, Square {percent(square)} %')
    if source is None:
        verdict('transfer not stronger than white box', None, 'no other run was given; name a second DIR, or --transfer_from DIR')
    else:
        never = lambda z, idx: (attacks.margin(source(z), y[idx]), y[idx] < 0)  # to the highest loss, which transfers best
        foreign = attacks.apgd(never, x, eps, starts(eps, 'transfer'), iterations, batch_size=batch_size).images
        transfer = share(correct(x) & correct(foreign))
        verdict('transfer not stronger than white box', white <= transfer + tolerance, f'ensemble {percent(white)}, transfer {percent(transfer)} %')

    at_radius = [under_apgd(min(f * eps, 1.), f'radius {f}') for f in (.5, 1, 2, 4)]
    verdict('accuracy falls with ε', all(b <= a + tolerance for a, b in zip([clean, *at_radius], at_radius)),
            f'APGD at ε/2, ε, 2 ε, 4 ε: {", ".join(map(percent, at_radius))} %')
    everything = under_apgd(1., 'everything')
    verdict('ε = 1 leaves nothing', everything <= tolerance, f'APGD: {percent(everything)} %')
    return checks


# ====================================================================================== metrics of answers and captions
NUMBERS = dict(zip('none zero one two three four five six seven eight nine ten'.split(), '0 0 1 2 3 4 5 6 7 8 9 10'.split()))
CONTRACTIONS = {  # a word without (one of) its apostrophes → the word; the official table (which knows no "its" and no "were"), and a few more
    variant: word for word in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's "
        "isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've she's should've "
        "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
        "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll "
        "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
        "wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've").split()
    for variant in {word.replace("'", ''), word.replace("'", '', 1), "".join(word.rsplit("'", 1))} - {word}}


def normalise_answer(text: str) -> str:
    """VQA's normalisation: punctuation, number words, articles, contractions.   official: GT-Vision-Lab/VQA vqaEval.py"""
    text = text.replace('\n', ' ').replace('\t', ' ').strip()
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':  # away where it stands beside a space (or a comma between digits anywhere), else a space
        beside = f'{mark} ' in text or f' {mark}' in text or re.search(r'\d,\d', text)
        out = out.replace(mark, '' if beside else ' ')
    out = re.sub(r'\.(?!\d)', '', out)       # decimal points stay
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return ' '.join(CONTRACTIONS.get(word, word) for word in words if word not in ('a', 'an', 'the'))


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """min(1, how many of the other annotators said so / 3), averaged over who is left out. Of fewer than four references all the others
    have to; of a single one: whether it is equal.

    Answer and references are normalised alike. The official code normalises the answer always, of the references only the punctuation, and
    that only where they differ: the published ones are clean already.
    """
    said, of = normalise_answer(answer), [normalise_answer(r) for r in references]
    if len(of) == 1:
        return float(said == of[0])
    same = of.count(said)
    return mean([min(1., (same - (r == said)) / min(3, len(of) - 1)) for r in of])


def option_letter(text: str) -> str:
    """The option that an answer names: "B", "(B)", "B.", "B. mammal", "The answer is B."; else ''.   official: LLaVA eval_science_qa.py"""
    text = text.strip()
    if found := re.match(r'\(?([A-Z])\)?\.?$', text) or re.match(r'([A-Z])\. ', text):
        return found[1]
    named = re.findall(r'The answer is ([A-Z])\b', text)
    return named[0] if len(named) == 1 else ''


def tokenise_caption(text: str) -> list[str]:
    """Lower-case words, clitics split off, punctuation dropped: like the Penn Treebank tokenizer of COCO's evaluation on plain sentences."""
    return re.findall(r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-.,]\w+)*", text.lower())


class Cider:
    """CIDEr-D: how alike a caption's n-grams and its references' are, rare ones weighing more.   Vedantam et al. 2015, arXiv 1411.5726

    references: the captions of each image; they also say how rare an n-gram is. Equal to pycocoevalcap's on the same tokens.
    """

    def __init__(self, references: list[list[str]], tokenise=tokenise_caption):
        self.tokenise = tokenise
        counts = [[self.ngrams(caption) for caption in of] for of in references]
        self.images_with = Counter(ngram for of in counts for ngram in {ngram for caption in of for ngram in caption})
        self.log_images = math.log(len(references))
        self.references = [[self.vector(caption) for caption in of] for of in counts]

    def ngrams(self, caption: str) -> Counter:
        words = self.tokenise(caption)
        return Counter(tuple(words[i:i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1))

    def vector(self, counts: Counter) -> tuple[list[dict], list[float], int]:
        """(tf · idf by n, its length by n, number of bigrams)"""
        by_n: list[dict] = [{}, {}, {}, {}]
        for ngram, count in counts.items():
            by_n[len(ngram) - 1][ngram] = count * (self.log_images - math.log(max(1, self.images_with[ngram])))
        return by_n, [math.sqrt(sum(v * v for v in part.values())) for part in by_n], sum(c for ngram, c in counts.items() if len(ngram) == 2)

    def score(self, image: int, caption: str) -> float:
        """0 … 10, of one caption for the image of that number; ×100 is how tables give it (a corpus' score is the mean)."""
        hypothesis, lengths, bigrams = self.vector(self.ngrams(caption))
        total = 0.
        for reference, of_reference, its_bigrams in self.references[image]:
            for mine, other, a, b in zip(hypothesis, reference, lengths, of_reference):
                if a and b:  # clipped at the reference's count, so that repeating a word does not pay
                    same = sum(min(v, other.get(ngram, 0.)) * other.get(ngram, 0.) for ngram, v in mine.items())
                    total += same / (a * b) * math.exp(-(bigrams - its_bigrams) ** 2 / (2 * 6. ** 2))
        return 10 * total / 4 / len(self.references[image])


def pope_scores(answers: list[str], labels: list[str]) -> dict[str, float]:
    """Of POPE (Li et al. 2023, arXiv 2305.10355), yes being the positive: an answer is no if its first sentence has "no" or "not"."""
    said_no = [bool({'No', 'no', 'not'} & set(answer.split('.')[0].replace(',', '').split())) for answer in answers]
    hit = lambda no, label: sum(n == no and l == label for n, l in zip(said_no, labels))
    tp, fp, tn, fn = hit(False, 'yes'), hit(False, 'no'), hit(True, 'no'), hit(True, 'yes')
    ratio = lambda a, b: a / b if b else 0.
    precision, recalled = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {'accuracy': ratio(tp + tn, len(labels)), 'precision': precision, 'recall': recalled,
            'f1': ratio(2 * precision * recalled, precision + recalled), 'yes_rate': ratio(tp + fp, len(labels))}


def names_facts(caption: str, colour: str, shape: str) -> tuple[bool, bool]:
    """Whether the colour is named and no other one is, and the same of the shape."""
    words = set(tokenise_caption(caption))
    return words & set(data.COLOURS) == {colour}, words & set(data.SHAPES) == {shape}


# ==================================================================================================== sampling and ranks
def load_set(name: str, args, rank: int) -> data.ClassSet:
    several = args.download and dist.is_initialized()
    if several and rank > 0:
        dist.barrier()  # rank 0 fetches it, the others find it
    images = data.class_set(name, args.split, args.root, args.download, args.classnames, args.templates)
    if several and rank == 0:
        dist.barrier()
    return images


def one_set(args, rank: int) -> data.ClassSet:
    if len(args.data) > 1:
        raise SystemExit(f'error: --data {" ".join(args.data)}: {args.command} takes one data set')
    return load_set(args.data[0], args, rank)


def sample(n: int, name: str, args, rank: int, keep: list[int] | None = None) -> list[int]:
    """The numbers of the images, drawn by --seed: the same for every batch size and run, and a larger --n only adds to them."""
    numbers = list(range(n)) if keep is None else keep
    if not numbers:
        raise SystemExit(f'error: {name}, split {args.split}: no image is left' + (f' by --subset {args.subset}' if keep is not None else ''))
    if args.n > len(numbers) and rank == 0:
        print(f'note: --n {args.n}: {name}, split {args.split}, has {len(numbers)} images; all of them are used', file=sys.stderr)
    return draw(numbers, args.n, args.seed)


def draw(numbers: list[int], n: int, seed: int) -> list[int]:
    """n of them by seed; a larger n only adds to them. 0: all."""
    order = torch.randperm(len(numbers), generator=data.generator(seed, 'sample', 0)).tolist()
    return [numbers[i] for i in order[:n or len(numbers)]]


def subset(images: data.ClassSet, name: str, path: str, args) -> list[int] | None:
    """The images whose caption the run never saw ('held-out'), or the others ('seen'); None: all."""
    if args.subset == 'all':
        return None
    config = data.read_json(Path(path) / 'train_config.json', f'--subset {args.subset}: {path}')
    held = data.held_out(config['config']['holdout'])
    if not held:
        raise SystemExit(f'error: --subset {args.subset}: {path} was trained without --holdout')
    is_held = [data.pair_name(c) in held for c in images.classes]
    return [i for i in range(images.n) if is_held[images.item(i)[1]] == (args.subset == 'held-out')]


def gather(value) -> list:
    """[value of rank 0, value of rank 1, …] on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def chunks(items: list, size: int):
    return (items[i:i + size] for i in range(0, len(items), size))


# ======================================================================================================== the model card
def digests(dirs: list[str]) -> dict[str, str]:
    """{run directory: digest of its weights}, of those of DIRS that our training wrote; into others nothing is written."""
    runs = [path for path in dict.fromkeys(dirs) if clip_adv.is_run(Path(path))]
    return {path: clip_adv.digest(clip_adv.weights_of(Path(path))) for path in runs}


def keep(report: dict, args, weights: dict[str, str]) -> None:
    """Each run's part of the report into RUN/eval/, and from all that is there the results in the run's card. The same measurement again replaces
    its file. If it cannot be written, that is said, and the measurement goes on to where else it is wanted."""
    settings = {k: v for k, v in vars(args).items() if k not in ('run', 'dirs', 'transfer_from', 'json', 'plot', 'grid', 'quiet', 'batch_size')}
    settings |= {'data': [str(Path(d).resolve()) if Path(d).exists() else d for d in getattr(args, 'data', [])]}
    parts = [args.command, *(Path(name).stem for name in getattr(args, 'data', [])), getattr(args, 'split', ''), getattr(args, 'attack', '')]
    stem = re.sub(r'[^\w.-]+', '-', '_'.join(part for part in parts if part)).encode()[:100].decode(errors='ignore')  # names are limited in bytes
    for path, now in weights.items():
        folder, card = Path(path) / 'eval', Path(path) / clip_adv.CARD
        try:
            others = [str(Path(p).resolve()) for p in sources_of(path, args)][:1] if args.command == 'audit' else []  # what it transfers from
            number = hashlib.blake2b(json.dumps([settings, others], sort_keys=True).encode(), digest_size=3).hexdigest()
            rows = [row for row in report['results'] if row['dir'] == path]
            own = {**report, 'weights': now, 'card': [line for row in rows for line in card_lines(row, args)], 'results': rows}
            folder.mkdir(exist_ok=True)
            with clip_adv.locked(Path(path)):
                clip_adv.write(folder / f'{stem}_{number}.json', lambda file: file.write_text(json.dumps(own, indent=2), encoding='utf-8'))
                if card.is_file() and not clip_adv.rewrite(card, {'results': clip_adv.results(Path(path))}):
                    print(f'warning: {card} has no {clip_adv.marks("results")[0]} (or is not UTF-8); it is left as it is', file=sys.stderr, flush=True)
        except (Exception, SystemExit) as e:  # the measurement itself is on the screen and in --json
            print(f'warning: not kept in {folder}: {str(e).removeprefix("error: ")}', file=sys.stderr, flush=True)


def card_lines(row: dict, args) -> list[dict]:
    """What the card shows of a row of results."""
    at = lambda values: ', '.join(f'ε = {eps}: {percent(v)}' for eps, v in values.items()) or 'not measured'
    line = lambda measure, clean, attacked, attack=None, more='': {
        'measure': measure, 'data': f'{Path(row["data"]).name} {args.split}{more}, n = {row["n"]}', 'clean': clean, 'attacked': attacked,
        'attack': attack if attack is not None else getattr(args, 'attack', '') + ' on native pixels' * args.native}
    command = args.command
    if command == 'zeroshot':
        more = f', {args.subset} captions' * (args.subset != 'all') + (f', {row["classes"]} classes' if 'classes' in row else '')
        return [line('zero-shot accuracy', percent(row['clean_acc']), at(row['adv_acc']), more=more)]
    if command == 'retrieval':
        key = 'image_to_text_recall@1'
        return [line('recall@1, image → text', percent(row['clean'][key]), at({k[4:]: v[key] for k, v in row.items() if k.startswith('adv_')}), more=f', {row["texts"]} texts')]
    if command == 'typographic':
        sizes = {float(size): share for size, share in row['acc'].items()}
        return [line('accuracy with a wrong name written on the image', percent(sizes[0]) if 0 in sizes else 'not measured', attack='letters, in % of the height',
                     attacked=', '.join(f'{size:g} %: {percent(share)}' for size, share in sizes.items() if size))]
    if command == 'audit':
        verdicts = Counter(check['verdict'] for check in row['checks'])
        return [line('audit: is the robustness real?', '', ', '.join(f'{n} checks {verdict}' for verdict, n in verdicts.items()), f'several, ε = {row["eps"]:g}')]
    if command in ('vqa', 'pope', 'sqa'):
        measure, key = {'vqa': ('VQA accuracy', 'accuracy'), 'pope': ('POPE, F1', 'f1'), 'sqa': ('ScienceQA accuracy', 'accuracy')}[command]
        return [line(measure, percent(row[f'clean_{key}']), at(row[f'adv_{key}']), f'{args.attack}, {args.iterations} iterations' if args.eps else 'none', f', {row["questions"]}')]
    if command == 'caption' and 'success' in row:
        return [line('forced sentences, success', percent(rates['0']), at({k: v for k, v in rates.items() if k != '0'}),
                     f'APGD, {args.iterations} iterations, “{text}”'.replace('|', '/')) for text, rates in row['success'].items()]
    if command == 'caption':
        return [line('captions, CIDEr', percent(row['clean']['cider']), at({k[4:]: v['cider'] for k, v in row.items() if k.startswith('adv_')}),
                     f'{args.attack}, {args.iterations} iterations' if args.eps else 'none')]
    return []  # show: one image


# =============================================================================================================== output
def percent(fraction: float) -> str:
    return f'{100 * fraction:.1f}'


def attack_text(args) -> str:
    where = 'before the resize, on native pixels' if args.native else "at the model's resolution"
    return f'{ATTACKS[args.attack][0]}; l∞, ε in 1/255, {where}' if args.attack != 'none' else 'no attack'


def say(text: str) -> None:
    print(textwrap.fill(text, 120, break_on_hyphens=False), flush=True)


def progress(args, rank: int, n: int, name: str) -> tqdm:
    """In forward passes of one image; what broken images do not need is ticked off when their attack ends."""
    passes = n * (1 + len(args.eps) * ATTACKS[args.attack][1])
    return tqdm(total=passes, desc=name, unit='it', unit_scale=True, disable=args.quiet or rank > 0,
                mininterval=.5 if sys.stderr.isatty() else 60)


def table(header: list[str], rows: list[list[str]]) -> None:
    """A table that reads well on a terminal and is Markdown, too. Columns of numbers are set to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    text = [not all(row[i].replace('.', '').isdigit() for row in rows) for i in range(len(header))]
    line = lambda row: '| ' + ' | '.join(v.ljust(w) if t else v.rjust(w) for v, w, t in zip(row, widths, text)) + ' |'
    print('\n'.join([line(header), '|' + '|'.join('-' * (w + 1) + ('-' if t else ':') for w, t in zip(widths, text)) + '|',
                     *map(line, rows)]), flush=True)


def curves(file: Path, lines: list[tuple[str, dict[float, float]]], x_label: str, y_label: str, title: str, chance: float | None = None) -> None:
    """A line for each (name, {x: fraction}); the format is the file's ending (png, pdf, svg)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.add_subplot()
    for name, points in lines:
        axes.plot(sorted(points), [100 * points[x] for x in sorted(points)], 'o-', label=name)
    if chance is not None:
        axes.axhline(100 * chance, color='gray', linestyle=':', label='chance')
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(-2, 102))
    axes.set_title(title, fontsize=10, wrap=True)
    axes.legend()
    axes.grid(alpha=.3)
    save(figure, file)


def pictures(file: Path, rows: list[list[tuple[Tensor, str]]], title: str) -> None:
    """A grid of (image [3, h, w] in [0, 1], caption)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2.6 * len(rows[0]), 2.9 * len(rows) + .3), layout='constrained')
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, cells in zip(axes, rows):
        for cell, (image, caption) in zip(row, cells):
            cell.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation='nearest')
            cell.set_title(textwrap.fill(caption, 28), fontsize=8)
            cell.axis('off')
    figure.suptitle(title, fontsize=10)
    save(figure, file)


def save(figure, file: Path) -> None:
    # the name of the file beside has no ending that matplotlib knows, so the format is told
    clip_adv.write(file, lambda beside: figure.savefig(beside, dpi=150, format=file.suffix[1:]))


# ========================================================================================================= command line
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)

    def any_command(run, text: str, dirs: str, batch_size: int, drawn: str) -> argparse.ArgumentParser:
        c = commands.add_parser(run.__name__, help=text, description=run.__doc__, allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        c.add_argument('dirs', nargs='+', metavar='DIR', help=dirs)
        c.add_argument('--seed', type=int, default=0, help=f'of {drawn}')
        c.add_argument('--batch_size', type=int, default=batch_size, help='images at a time, on each process')
        c.add_argument('--json', default='', metavar='FILE', help='write what was measured')
        c.add_argument('--quiet', action='store_true', help='no progress bar')
        c.set_defaults(run=run)
        return c

    def command(run, text: str, eps: list[float], n: int) -> argparse.ArgumentParser:
        c = any_command(run, text, "a CLIP each: a run, a directory or weights file of open_clip, a directory of Hugging Face's CLIPModel, or a repository id", 128 if torch.cuda.is_available() else 32, 'the sample and the random starts')
        c.add_argument('--arch', default='', help="what a DIR that is a file of weights is: open_clip's model configuration, a JSON file or its name")
        c.add_argument('--tokenizer', default='', metavar='FILE', help='its tokenizer, a tokenizer.json or vocab.txt; default: the one that belongs to --arch')
        if run is not show:
            c.add_argument('--data', nargs='+', default=['easyvqa'], help="'easyvqa', a folder (metadata.jsonl; or classnames.txt with "
                           "SPLIT/*.tar or with a folder for each class), or a class of torchvision.datasets")
            c.add_argument('--split', default='test', help='choose on val, report on test')
            c.add_argument('--n', type=int, default=n, help='images, drawn by --seed; 0: all')
        if run not in (show, retrieval):
            c.add_argument('--root', default='data', help='where data sets of torchvision are')
            c.add_argument('--download', action='store_true', help='let torchvision fetch the data set into --root')
            c.add_argument('--classnames', default='', metavar='FILE', help='class names, a line each, line 1 for label 0')
            c.add_argument('--templates', default='', metavar='FILE', help="prompts with {c} for the class name, a line each; or 'imagenet' (80), "
                           "'cifar' (18), …")
        if run is not typographic:
            c.add_argument('--attack', default='ensemble', choices=list(ATTACKS), help='; '.join(f'{k}: {v}' for k, (v, _) in ATTACKS.items()))
            c.add_argument('--eps', type=float, nargs='*' if run in (zeroshot, retrieval) else 1, default=eps, help='radius in 1/255')
        if run in (zeroshot, retrieval, audit):
            c.add_argument('--native', action='store_true', help="attack before the resize, on the image's own pixels")
        if run is not audit:
            c.add_argument('--plot', default='show.png' if run is show else '', metavar='FILE', help='draw it (png, pdf or svg)')
        return c

    z = command(zeroshot, 'zero-shot classification, clean and under attack', [2., 4., 8., 16.], 500)
    z.add_argument('--subset', default='all', choices=['all', 'held-out', 'seen'], help="captions that the run's --holdout left out, or kept")
    command(retrieval, 'image → text and text → image, clean and under attack', [2., 4., 8.], 500)
    t = command(typographic, 'a wrong class name written on the image; targeted perturbations at large ε', [], 500)
    t.add_argument('--font', type=float, nargs='+', default=[0., 5., 10., 15., 20., 30.], help='height of the letters in %% of the image')
    t.add_argument('--grid', default='', metavar='FILE', help='also draw clean | δ | x+δ of one image, targeted, for every DIR')
    t.add_argument('--grid_eps', type=float, nargs='+', default=[16., 32., 64.], help='its radii in 1/255')
    t.add_argument('--target', default='', help='its target class; default: a wrong one, drawn by --seed')
    a = command(audit, 'checks for gradient masking; exit code 1 if one fails', [8.], 100)
    a.add_argument('--transfer_from', nargs='*', default=[], metavar='DIR', help='runs to transfer attacks from; default: the other DIRs')
    a.add_argument('--queries', type=int, default=5000, help='of Square Attack')
    s = command(show, 'one image, clean and attacked', [8.], 1)
    s.add_argument('--image', required=True, metavar='FILE')
    s.add_argument('--labels', required=True, help="texts to choose from, separated by commas: 'a cat,a dog'")
    s.add_argument('--label', default='', help='the true one, which is attacked; default: what the model sees in the clean image')
    for run, text, words in ((vqa, 'questions about images: VQA accuracy', 5), (pope, 'hallucination: yes or no', 5),
                             (sqa, 'ScienceQA, questions with an image', 5), (caption, 'captions: CIDEr; forced sentences', 20)):
        c = any_command(run, text, "a LLaVA each: a run, a directory of Hugging Face's format, adapters as the authors publish them, or a repository id; of a "
                        'language model alone: what it answers without the image', 32, 'the sample')
        what = {vqa: "'easyvqa', or a questions file of VQAv2 or TextVQA", pope: "'easyvqa', or a file of POPE", sqa: 'a folder with problems.json and '
                'pid_splits.json', caption: "'easyvqa', or a file of Karpathy's or of COCO's captions"}[run]
        c.add_argument('--data', nargs=1, **({'required': True} if run is sqa else {'default': ['easyvqa']}), help=what)
        c.add_argument('--split', default='test', help='choose on val, report on test')
        c.add_argument('--image_root', default='', metavar='DIR', help='where the images of the file lie')
        c.add_argument('--n', type=int, default=500, help='questions of each kind (images), drawn by --seed; 0: all')
        c.add_argument('--attack', default='ensemble', choices=['ensemble', 'none'])
        c.add_argument('--eps', type=float, nargs='*', default=[12.], help='radius in 1/255')
        c.add_argument('--iterations', type=int, default=100, help='of each round of the attack')
        c.add_argument('--max_new', type=int, default=words, help='tokens of an answer (TextVQA: 10)')
        c.add_argument('--prompt', default='', choices=['v1', 'chat'], help="what a question is put into: 'v1' (Vicuna), 'chat' (the LLM's own template); "
                       "default: as it was trained, else chat where there is a template")
        c.set_defaults(subset='all', native=False)
        if run is vqa:
            c.add_argument('--annotations', default='', metavar='FILE', help='VQAv2: the answers')
            c.add_argument('--questions', nargs='+', default=[], help='easyvqa: only what, yes/no or all')
        if run is caption:
            c.add_argument('--threshold', type=float, default=10., help='CIDEr below which an image is dropped from later rounds (COCO 10, Flickr30k 2)')
            c.add_argument('--targeted', nargs='+', default=[], metavar='SENTENCE', help='measure how often these can be forced, instead')
            c.add_argument('--grid', default='', metavar='FILE', help='with --targeted: draw clean | δ | x+δ of one image')
    args = parser.parse_args(argv)

    wrong = commands.choices[args.command].error
    args.dirs = list({os.path.realpath(path): path for path in reversed(args.dirs)}.values())[::-1]  # each once, however it is written
    for flag in ('eps', 'grid_eps'):
        if not hasattr(args, flag):
            continue
        setattr(args, flag, list({f'{eps:g}': eps for eps in getattr(args, flag)}.values()))  # each once
        for eps in getattr(args, flag):
            if not 0 < eps <= 255:
                wrong(f'--{flag} {eps:g}: must be above 0 and at most 255 (it is in 1/255; the clean accuracy is always shown)')
            if eps < 0.25:
                wrong(f'--{flag} {eps:g}: it is in 1/255; did you mean {eps * 255:.3g}?')
    if getattr(args, 'attack', '') == 'none':
        args.eps = [] if args.command != 'show' else args.eps
    for flag, least in (('n', 0), ('batch_size', 1), ('queries', 1), ('iterations', 1), ('max_new', 1)):
        if getattr(args, flag, least) < least:
            wrong(f'--{flag} {getattr(args, flag)}: must be at least {least}')
    if (getattr(args, 'arch', '') or getattr(args, 'tokenizer', '')) and not any(map(os.path.isfile, [*args.dirs, *getattr(args, 'transfer_from', [])])):
        wrong('--arch and --tokenizer say what a file of weights is, and directories say it themselves: leave them out')
    if any(not 0 <= size <= 100 for size in getattr(args, 'font', [])):
        wrong(f'--font {" ".join(f"{size:g}" for size in args.font)}: must be in 0 … 100 (% of the image)')
    for flag in ('json', 'plot', 'grid'):
        file = getattr(args, flag, '')
        if file and not os.path.isdir(os.path.dirname(file) or '.'):  # now, and not after an hour of attacks
            wrong(f'--{flag} {file}: no folder {os.path.dirname(file)}')
        if file and flag != 'json' and Path(file).suffix not in ('.png', '.pdf', '.svg'):
            wrong(f'--{flag} {file}: must end in .png, .pdf or .svg')
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    started = time.time()
    rank, world, device = clip_adv.start_processes(timedelta(days=7))  # one rank may have the harder images
    try:
        weights = digests(args.dirs) if rank == 0 else {}  # before: a training may save others meanwhile
        measured = args.run(args, rank, world, device)
        code = measured.pop('exit', 0)
        if rank == 0:
            report = {'command': shlex.join(['python', 'eval.py', *sys.argv[1:]]), 'commit': clip_adv.commit(), 'versions': clip_adv.versions(),
                      'device': str(device), 'processes': world, 'seed': args.seed, 'seconds': time.time() - started,
                      **{k: v for k, v in vars(args).items() if k in ('data', 'split', 'subset', 'attack', 'native', 'eps')}, **measured}
            try:
                if args.json:
                    clip_adv.write(Path(args.json), lambda file: file.write_text(json.dumps(report, indent=2), encoding='utf-8'))
            finally:
                keep(report, args, weights)
    except data.BadImage as e:
        raise SystemExit(f'error: {e}') from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return code


if __name__ == '__main__':
    sys.exit(main(parse()))
