"""Evaluation: one sub-command per question. Each prints a table; --json FILE keeps what was measured.

    python eval.py zeroshot runs/clip runs/clip_adv --eps 4 8    # which class, clean and under attack
    python eval.py retrieval runs/clip_adv --data DIR --eps 4    # image → text and text → image
    python eval.py typographic runs/clip runs/clip_adv           # a wrong class name written on the image
    python eval.py audit runs/clip_adv runs/clip --eps 8         # is it robust, or are gradients masked?
    python eval.py show runs/clip_adv --image cat.jpg --labels 'a cat,a dog'
    python eval.py vqa runs/llava_adv                            # also pope, sqa, caption: of a LLaVA
    torchrun --nproc_per_node 8 -- eval.py zeroshot ...          # on 8 processes, with the same result

ε is in 1/255, logits are 100·cos, networks compute in float32. Random starts are drawn from (seed, image,
restart): batch size, order and number of processes change nothing but the rounding of sums.

What is measured is a row {model, data, split, n, measure, attack, eps, value, stderr}. Tables, plots, --json
and the results in a run's card are made of rows. Those about a run of ours are also kept in RUN/eval/.
"""

import argparse
import contextlib
import fcntl
import glob
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Callable, NamedTuple

import data  # before torch: it says how threads wait

import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import EvalResult, ModelCard
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import attacks
import clip_adv
import llava_adv

PGD_STEPS, PGD_RESTARTS = 50, 2
ATTACKS = {
    'none': 'no attack',
    'pgd': f'PGD-{PGD_STEPS} with {PGD_RESTARTS} restarts',
    'apgd': 'APGD-CE, 100 iterations, 1 restart',
    'ensemble': 'ensemble: APGD-CE 100 × 5, then targeted APGD-DLR 100 × 9',
}
COLUMNS = ('model', 'data', 'split', 'n', 'measure', 'attack', 'eps', 'value', 'stderr')


# ===================================================================================== one loop that measures
def measure(args, task, numbers: list[int], levels: list[float], name: str) -> dict[float, dict[int, tuple]]:
    """The loop of every command → {level: {number: outcome}}, complete on every process.
    numbers: of images or questions.  levels: radii in 1/255, 0: the image as it is; or heights of letters.
    task.load(numbers) opens some of them;  task.judge(loaded, level) → {number: outcome}, plain values.
    What is found is kept (see Kept) and not judged again when the same command is given again."""
    mine = numbers[args.rank :: args.world]  # strided: the processes get about as many hard images each
    known, found = args.kept.before(), {level: {} for level in levels}
    quiet, often = args.quiet or args.rank > 0, 0.5 if sys.stderr.isatty() else 60
    with tqdm(total=len(mine) * len(levels), desc=name, disable=quiet, mininterval=often) as bar:
        for pool in chunks(mine, max(task.pool, args.batch_size)):  # batches stay full when images leave
            if data.launcher_gone():
                raise KeyboardInterrupt(signal.SIGTERM)
            loaded = None
            for level in levels:
                judged = {i: known[level, i] for i in pool if (level, i) in known}
                if len(judged) < len(pool):
                    loaded = loaded or task.load(pool)
                    judged = task.judge(loaded, level)
                    args.kept.add(level, judged)
                found[level] |= judged
                bar.update(len(pool))
    parts = data.gather_objects(found)
    return {level: {i: outcome for part in parts for i, outcome in part[level].items()} for level in levels}


class Kept:
    """Outcomes so far, image by image, in a file for each process, beside what the command will write. Given
    again, for the same models, data, settings and code, it goes on with them; as all that is random belongs
    to the image, with the same result."""

    def __init__(self, args):
        self.file, self.calls, self.rank = None, 0, args.rank
        runs = [Path(p) / 'eval' / args.command for p in args.dirs if data.settings_of(Path(p))]
        beside = [Path(args.json)] if args.json else runs
        if not beside or args.run in (audit, transfer, show) or args.run is caption and args.grid:
            return
        ends = ('.safetensors', '.bin', '.json', '.jinja', '.model', '.txt')
        used = [file for p in args.dirs for file in Path(p).glob('*.*') if file.suffix in ends]
        for place in (Path(name, part) for name in args.data for part in ('', args.split)):
            used += [*place.glob('*.tar')] or [place]  # an index that is written there changes the folder
        flags = ('classnames', 'templates', 'annotations')
        used += [Path(getattr(args, flag, '') or 'none') for flag in flags]
        used += Path(__file__).parent.glob('*.py')
        stamps = sorted(file.stat().st_mtime_ns for file in used if file.exists())
        same = data.digest([args.dirs, *identity(args), stamps])
        self.file = beside[0].with_name(f'{beside[0].name}_{same}.partial')

    def before(self) -> dict[tuple[float, int], tuple]:
        """{(level, number): outcome} of this call of `measure`, of all processes"""
        self.calls, found = self.calls + 1, {}
        for line in (line for file in self.files() for line in file.read_text().split('\n')):
            with contextlib.suppress(ValueError, TypeError):  # the last line may be half of one
                call, level, outcomes = json.loads(line)
                found |= {(level, int(i)): tuple(of) for i, of in outcomes.items() if call == self.calls}
        return found

    def add(self, level: float, outcomes: dict[int, tuple]) -> None:
        if not self.file:
            return
        try:
            self.file.parent.mkdir(exist_ok=True)
            with open(f'{self.file}{self.rank}', 'a') as file:
                file.write(json.dumps([self.calls, level, outcomes]) + '\n')
        except OSError as e:
            print(f'warning: cannot keep what is measured, in case that it is stopped: {e}', file=sys.stderr)
            self.file = None

    def files(self) -> list[Path]:
        return [Path(file) for file in sorted(glob.glob(f'{glob.escape(f"{self.file}")}*')) if self.file]

    def forget(self) -> None:
        for file in self.files():
            file.unlink()


def stop(number, frame):
    raise KeyboardInterrupt(number)


def chunks(items: list, size: int):
    return (items[i : i + size] for i in range(0, len(items), size))


def sample(n: int, name: str, args, keep: list[int] | None = None) -> list[int]:
    """The numbers of --n of n images (or of those to keep), drawn by --seed: the same for every model."""
    numbers, place = list(range(n)) if keep is None else keep, f'{name}, split {args.split}'
    if not numbers:
        data.fail(f'{place}: no image is left' + ('' if keep is None else f' by --subset {args.subset}'))
    if args.n > len(numbers) and args.rank == 0:
        print(f'note: --n {args.n}: {place}, has {len(numbers)} images; all are used', file=sys.stderr)
    return draw(numbers, args.n, args.seed)


def draw(items: list, n: int, seed: int) -> list:
    """n of them by seed; a larger n only adds to them. 0: all."""
    order = torch.randperm(len(items), generator=data.generator(seed, 'sample', 0)).tolist()
    return [items[i] for i in order[: n or len(items)]]


# ------------------------------------------------------------------------------------------ rows and outcomes
def say_what_was_trained_on(args, runs: list[Path]) -> None:
    for run in runs:
        about = data.settings_of(run)
        if args.rank == 0 and 0 < about.get('updates', 0) < about['config'].get('steps', 0):
            print(
                f'note: {run} is at update {about["updates"]} of {about["config"]["steps"]}', file=sys.stderr
            )
    for run, name in itertools.product(runs, map(Path, args.data)):
        of = data.settings_of(run)['config'].get('data', '')
        if os.path.realpath(of) == os.path.realpath(name) and args.rank == 0:
            whole = name.suffix == '.tar' or name.is_dir() and data.split_folder(name, args.split) == name
            if args.split == 'train' or whole:
                print(f'note: {run} was trained on these images', file=sys.stderr)


def training_of(run: Path) -> dict:
    """How a run of stage 1 came about: command, seed, commit, code and cost, with that of what it began with.

    passes: images · passes through the image tower (forward, gradient of the activations, of the weights: 1
    each; so a step of the attack takes 2). flops: of matrix products, both towers. minutes: by the log. None:
    not known, as of a model that is no longer there."""
    about = data.settings_of(run)
    if 'objective' not in about.get('config', {}):  # of stage 2, or from before there was a choice
        return {}
    cfg, flags = clip_adv.Config(**about['config']), []
    usual = replace(cfg, alpha=None)
    for of in (cfg, usual):
        clip_adv.check_attack(of)  # fills in α
    for key, default in vars(clip_adv.Config(alpha=usual.alpha)).items():
        if (value := getattr(cfg, key)) != default and key != 'resume':
            flags += (
                [f'--{key}', str(value)] if not isinstance(value, bool) else [f'--{"no-" * (not value)}{key}']
            )
    meter, _ = clip_adv.metered(cfg, *clip_adv.settings_in(run)[1:])
    found, before, code = Counter(updates=about['updates']), 0, about['code']
    for k, updates in Counter(clip_adv.attack_at(cfg, step)[2] for step in range(about['updates'])).items():
        found['passes'] += updates * cfg.batch_size * (2 * k + 3 + clip_adv.is_held(cfg))
        found['flops'] += updates * (k * meter.flops['attack'] + meter.flops['update'])
    log = run / 'log.jsonl'
    for line in map(json.loads, log.read_text().splitlines() if log.exists() else []):
        found['minutes'] += cfg.batch_size * (line['step'] - before) / line['images_per_s'] / 60
        before = line['step']
    costs = {key: found[key] or None for key in ('updates', 'passes', 'flops', 'minutes')}
    if cfg.init:
        began = training_of(Path(cfg.init)) if Path(cfg.init).is_dir() else {}
        costs = {key: began.get(key) and costs[key] and costs[key] + began[key] for key in costs}
        code = dict.fromkeys([*began.get('code', '').split(), *code])
    command = shlex.join(['python', 'clip_adv.py', *flags])
    return {'command': command, 'seed': cfg.seed, 'commit': about['commit'], 'code': ' '.join(code), **costs}


class Report(NamedTuple):
    """What a command hands back. All that is shown and kept is made of the rows."""

    rows: list[dict]
    outcomes: list[dict]  # what became of each image: enough to compute the values again
    title: str
    down: list[str]  # of the table: the keys of its first columns; …
    across: str = ''  # … and the key of which every value is a column
    plotted: tuple[str, ...] = ()  # the measures that --plot shows


def about(args, model: str, eps: float, **more) -> dict:
    """What rows and outcomes of a model at one ε (in 1/255; 0: unperturbed) share.   more: where needed"""
    by, how = args.attack if eps else 'none', vars(args) if eps else {}
    more |= {key: how[key] for key in ('native', 'iterations') if how.get(key)}
    return {'model': model, 'data': args.data[0], 'split': args.split, 'attack': by, 'eps': eps, **more}


def row(common: dict, name: str, values: list | float, n: int = 0) -> dict:
    """A measurement: the mean of a value of each image and its standard error, or a figure of all n images.
    value: a fraction (CIDEr: 0 … 10).  stderr: √(p(1−p)/n) of shares, else of the mean; None of a figure."""
    value, error = values, None
    if isinstance(values, list):
        n, value = len(values), fmean(values)
        if set(values) <= {0, 1}:
            error = math.sqrt(value * (1 - value) / n)
        elif n > 1:
            error = stdev(values) / math.sqrt(n)
    return {**dict.fromkeys(COLUMNS), **common, 'n': n, 'measure': name, 'value': value, 'stderr': error}


# ======================================================================================== a CLIP under attack
class Classifier:
    """A CLIP and its embeddings of classes; called with images it gives logits.   [b, 3, h, w] → [b, classes]
    native: images come at their own size and are resized in here, so that an attack acts before that."""

    def __init__(self, path: str, device: torch.device, native: bool = False):
        self.path, (self.model, self.tokenizer) = path, clip_adv.load_clip(path)
        self.model.to(device).requires_grad_(False)  # so there is a graph only where an attack asks for one
        self.device, self.native, how = device, native, self.model.preprocess
        self.how = (self.model.visual.size, how.interpolation, how.resize_mode)

    def pixels(self, image) -> Tensor:
        """RGB image → float32 [3, h, w] in [0, 1]: the pixels that the attack may change"""
        uint8 = data.TF.pil_to_tensor(image) if self.native else data.Fit(*self.how)(image)
        return uint8.to(self.device).float() / 255

    def embed_texts(self, texts: list[str]) -> Tensor:
        """→ unit vectors [texts, D]"""
        return finite(clip_adv.embed_texts(self.model, self.tokenizer, texts), self.path)

    def embed_classes(self, classes: list[str], templates: list[str]) -> 'Classifier':
        of_prompt = self.embed_texts(data.Prompts(classes, templates).texts())
        self.text = clip_adv.class_directions(of_prompt, len(templates))
        return self

    def embed(self, x: Tensor) -> Tensor:
        """[b, 3, h, w] in [0, 1] → unit vectors [b, D]"""
        if self.native:
            x = data.resize(x, *self.how).clamp(0, 1)  # bicubic leaves the box
        return finite(self.model(x), self.path)

    def __call__(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        return 100 * self.embed(x) @ self.text.T


def finite(x: Tensor, path: str) -> Tensor:
    if not x.isfinite().all():
        data.fail(f'{path}: what the model computes is not finite (NaN or infinite): nothing can be measured')
    return x


class Images(NamedTuple):
    """Some images of one shape, which are judged and attacked together."""

    numbers: list[int]  # in their data set: what is random about an image is drawn from its number
    x: Tensor  # float32 [n, 3, h, w] in [0, 1]
    y: Tensor  # int64 [n], labels


def attack(args, logits, images: Images, eps: float) -> Tensor:
    """Under --attack.   logits: (x [b, 3, h, w], their rows in images [b]) → [b, classes].  eps: in [0, 1]"""

    def noise(restart: int, row: int) -> torch.Generator:
        return data.generator(args.seed, f'restart {restart}', images.numbers[row])

    x, y, size = images.x, images.y, args.batch_size
    if args.attack == 'none':
        return x
    if args.attack != 'pgd':
        few = {'restarts': 1, 'targets': 0} if args.attack == 'apgd' else {}
        return attacks.ensemble(logits, x, y, eps, noise, batch_size=size, **few).images
    found = x.clone()
    for rows in torch.arange(len(x), device=x.device).split(size):
        for restart in range(PGD_RESTARTS):
            rows = rows[logits(found[rows], rows).argmax(1) == y[rows]]
            if not len(rows):  # what is wrong already stays as it is
                break
            start = attacks.random_start(x[rows], eps, [noise(restart, i) for i in rows.tolist()])
            found[rows] = climb(logits, images, rows, eps, start)
    return found


def climb(logits, images: Images, rows: Tensor, eps: float, start: Tensor) -> Tensor:
    """These rows of the images after PGD_STEPS steps of ε/10 up the margin."""
    x, y, alpha = images.x[rows], images.y[rows], eps / 10
    found = attacks.pgd(lambda z: attacks.margin(logits(z, rows), y).sum(), x, eps, alpha, PGD_STEPS, start)
    attacks.check(x, found, eps)
    return found


def never_done(classifier, loss, y: Tensor):
    """For an attack to the highest loss, and not to the first success.   loss: (logits, labels) → [b]"""
    return lambda x, rows: (loss(classifier(x), y[rows]), y[rows] < 0)


def ranks(logits, x: Tensor, y: Tensor, batch_size: int) -> list[int]:
    """How many classes are ahead of the right one, 0: correct. Of equals the first is ahead, as in argmax."""
    found = []
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        z, label = logits(x[rows], rows), y[rows, None]
        right, before = z.gather(1, label), torch.arange(z.shape[1], device=x.device) < label
        found += ((z > right) | (z == right) & before | z.isnan()).sum(1).tolist()
    return found


# ----------------------------------------------------------------------------------- zero-shot classification
class ZeroShot:
    """For `measure`: which class is nearest?   outcome: (how many are ahead of the right one, that one)"""

    pool = 256  # images that are opened together

    def __init__(self, args, classifier: Classifier, images):
        self.args, self.classifier, self.images = args, classifier, images

    def item(self, number: int) -> tuple[Tensor, int]:
        image, label = self.images.item(number)
        return self.classifier.pixels(image), label

    def logits(self, images: Images, x: Tensor, rows: Tensor) -> Tensor:
        return self.classifier(x)

    def load(self, numbers: list[int]) -> list[Images]:
        """By their shapes, of which there is one unless --native."""
        groups: dict[torch.Size, list] = {}
        for number in numbers:
            x, label = self.item(number)
            groups.setdefault(x.shape, []).append((number, x, label))
        found = (zip(*group) for group in groups.values())
        return [Images(list(i), torch.stack(x), torch.tensor(y, device=x[0].device)) for i, x, y in found]

    def judge(self, groups: list[Images], eps: float) -> dict[int, tuple]:
        found = {}
        for images in groups:
            logits = partial(self.logits, images)
            x = attack(self.args, logits, images, eps / 255) if eps else images.x
            ahead = ranks(logits, x, images.y, self.args.batch_size)
            found |= zip(images.numbers, zip(ahead, self.beside(images, x)))
        return found

    def beside(self, images: Images, x: Tensor):
        return images.y.tolist()


def zeroshot(args) -> Report:
    """Which of the classes is nearest to the image? Several data sets: each of them, and the average.

    DIR: a CLIP each. --data: 'easyvqa'; a folder (metadata.jsonl; or classnames.txt, and SPLIT/*.tar or a
    folder for each class); or a class of torchvision.datasets."""
    rows, outcomes = [], []
    for path in args.dirs:
        classifier, own = Classifier(path, args.device, args.native), []
        for name in args.data:
            images = load_set(name, args)
            classifier.embed_classes(images.classes, images.templates)
            numbers = sample(images.n, name, args, keep=subset(images, path, args))
            task, title = ZeroShot(args, classifier, images), f'{Path(path).name} {Path(name).name}'
            for eps, of in measure(args, task, numbers, [0.0, *args.eps], title).items():
                common = about(args, path, eps, subset=args.subset, data=name, split=images.split)
                ahead, labels = map(list, zip(*(of[i] for i in numbers)))
                own += zeroshot_rows({**common, 'classes': len(images.classes)}, labels, ahead)
                stands = ''.join('0' if k else '1' for k in ahead)
                more = {'asked': images.note, 'labels': labels, 'classes_ahead': ahead}
                outcomes.append({**common, 'survives': stands, **more})
        rows += own + (average(own) if len(args.data) > 1 else [])
    asked = '; '.join(dict.fromkeys(outcome['asked'] for outcome in outcomes))
    title = f'zero-shot classification, in %, {args.subset} captions; {attack_text(args)}; {asked}'
    return Report(rows, outcomes, title, ['measure', 'model', 'data', 'n'], 'eps', ('accuracy',))


def zeroshot_rows(common: dict, labels: list[int], ahead: list[int]) -> list[dict]:
    """ahead: how many classes are ahead of each image's label"""
    of_class = [[k == 0 for of, k in zip(labels, ahead) if of == label] for label in dict.fromkeys(labels)]
    return [
        row(common, 'accuracy', [k == 0 for k in ahead]),
        row(common, 'top-5 accuracy', [k < 5 for k in ahead]),
        row(common, 'mean per-class recall', fmean(map(fmean, of_class)), len(labels)),
    ]


def average(rows: list[dict]) -> list[dict]:
    """Over data sets: a row for each measure and ε."""
    found = []
    for key in dict.fromkeys((r['measure'], r['eps']) for r in rows):
        of = [r for r in rows if (r['measure'], r['eps']) == key]
        errors, value, n = [r['stderr'] for r in of], fmean(r['value'] for r in of), sum(r['n'] for r in of)
        error = None if None in errors else math.hypot(*errors) / len(of)
        found.append({**of[0], 'data': 'average', 'n': n, 'value': value, 'stderr': error, 'classes': None})
    return found


def load_set(name: str, args) -> 'ClassSet':
    how = (args.root, args.download, args.classnames, args.templates, args.caption_key, args.index_dir)
    read = partial(class_set, name, args.split, *how)
    fetched = args.download and not name.endswith('.tar') and not Path(name).exists()
    images = read() if args.rank == 0 or not fetched else None  # the others find what rank 0 fetches
    data.gather_objects(None)
    return images or read()


def subset(images: 'ClassSet', path: str, args) -> list[int] | None:
    """The images whose caption the run never saw ('held-out'), or the others ('seen'); None: all."""
    if args.subset == 'all':
        return None
    held = data.held_out(data.settings_of(Path(path)).get('config', {}).get('holdout', ''))
    if not held:
        data.fail(f'--subset {args.subset}: {path} was trained without --holdout')
    is_held = [data.pair_name(c) in held for c in images.classes]
    return [i for i in range(images.n) if is_held[images.item(i)[1]] == (args.subset == 'held-out')]


# -------------------------------------------------------------------------------------------------- retrieval
class Retrieval(ZeroShot):
    """For `measure`: is one of its captions nearest?   outcome: (how many others are ahead, embedding [D])
    For an attack the last class is "one of its captions", all other texts come first. (A tie is a miss.)"""

    def __init__(self, args, classifier: Classifier, images: tuple, numbers: list[int]):
        captions, self.image = images  # of each image, and number → image
        super().__init__(args, classifier, images)
        texts = list(dict.fromkeys(caption for i in numbers for caption in captions[i]))
        if len(texts) < 2:
            data.fail(f'--data {args.data[0]}: {len(texts)} different caption; retrieval needs at least 2')
        place, self.row = ({one: i for i, one in enumerate(of)} for of in (texts, numbers))
        self.right = torch.zeros(len(numbers), len(texts), dtype=torch.bool)  # whose text it is
        for i in numbers:
            self.right[self.row[i], [place[caption] for caption in captions[i]]] = True
        self.text = classifier.embed_texts(texts)  # [texts, D]

    def item(self, number: int) -> tuple[Tensor, int]:
        return self.classifier.pixels(self.image(number)), len(self.text)

    def logits(self, images: Images, x: Tensor, rows: Tensor) -> Tensor:
        right = self.right[[self.row[images.numbers[i]] for i in rows.tolist()]].to(x.device)
        z = 100 * self.classifier.embed(x) @ self.text.T
        nearest = z.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        return torch.cat([z.masked_fill(right, -math.inf), nearest], 1)

    def beside(self, images: Images, x: Tensor):
        parts = x.split(self.args.batch_size)
        return torch.cat([self.classifier.embed(part) for part in parts]).tolist()

    def images_ahead(self, embedded: Tensor) -> list[int]:
        """Of each text: how many images are ahead of the nearest of its own.   embedded: [images, D]"""
        similarity, right = self.text.cpu() @ embedded.T, self.right.T  # [texts, images]
        nearest = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        return (~right & (similarity >= nearest)).sum(1).tolist()


def retrieval(args) -> Report:
    """recall@k: is one of an image's captions among the k nearest texts, and the other way?

    Attacked are the images, against all their captions (image → text); text → image is measured on the same.
    DIR: a CLIP each. --data: 'easyvqa', a folder with metadata.jsonl or SPLIT/*.tar, or 'DIR/*.tar'."""
    rows, outcomes, how = [], [], (args.split, args.caption_key, args.index_dir)
    n, captions, image = caption_set(args.data[0], *how)
    numbers = sample(n, args.data[0], args)
    images = {i: captions(i) for i in numbers}, image
    for path in args.dirs:
        task = Retrieval(args, Classifier(path, args.device, args.native), images, numbers)
        for eps, found in measure(args, task, numbers, [0.0, *args.eps], Path(path).name).items():
            texts_ahead = [found[i][0] for i in numbers]
            images_ahead = task.images_ahead(torch.tensor([found[i][1] for i in numbers]))
            common = about(args, path, eps)
            for way, ahead in (('image→text', texts_ahead), ('text→image', images_ahead)):
                rows += [row(common, f'{way} R@{k}', [a < k for a in ahead]) for k in (1, 5, 10)]
            outcomes.append({**common, 'texts_ahead': texts_ahead, 'images_ahead': images_ahead})
    counts = f'{args.data[0]} {args.split}, {len(numbers)} images, {len(task.text)} texts'
    title, plotted = f'recall@k in %, {counts}; {attack_text(args)}', ('image→text R@1', 'text→image R@1')
    return Report(rows, outcomes, title, ['model', 'eps'], 'measure', plotted)


# ------------------------------------------------------------------------------------------------ typographic
class Typographic(ZeroShot):
    """For `measure`: a wrong name on the image.   outcome: (its class, what is written, what is seen)"""

    def load(self, numbers: list[int]) -> list[tuple]:
        return [(i, *self.images.item(i)) for i in numbers]

    def judge(self, loaded: list[tuple], height: float) -> dict[int, tuple]:
        found = {}
        for part in chunks(loaded, self.args.batch_size):
            wrong = [another_class(self.images, i, right, self.args.seed) for i, _, right in part]
            drawn = [written(image, self.images.classes[w], height) for (_, image, _), w in zip(part, wrong)]
            seen = self.classifier(torch.stack([self.classifier.pixels(image) for image in drawn])).argmax(1)
            found |= {i: (right, w, s) for (i, _, right), w, s in zip(part, wrong, seen.tolist())}
        return found


def typographic(args) -> Report:
    """Does a wrong class name, written on the image, change the class? --grid: large targeted perturbations.

    The name is drawn before the model's resize, at the image's own size. DIR and --data: as for zeroshot."""
    rows, outcomes, images = [], [], load_set(args.data[0], args)
    numbers = sample(images.n, args.data[0], args)
    for path in args.dirs:
        classifier = Classifier(path, args.device).embed_classes(images.classes, images.templates)
        task = Typographic(args, classifier, images)
        for height, found in measure(args, task, numbers, args.font, Path(path).name).items():
            how = {'attack': 'letters' if height else 'none', 'split': images.split}
            common = about(args, path, 0.0, height=height, **how)
            right, wrong, seen = map(list, zip(*(found[i] for i in numbers)))
            rows.append(row(common, 'accuracy', [s == r for s, r in zip(seen, right)]))
            rows.append(row(common, 'the written class', [s == w for s, w in zip(seen, wrong)]))
            outcomes.append({**common, 'labels': right, 'written': wrong, 'seen': seen})
    if args.grid and args.rank == 0:
        targeted_grid(args, images, numbers[0])
    title = f'a wrong class name, in %, by height of letters; n = {len(numbers)} of {images.note}'
    return Report(rows, outcomes, title, ['model', 'measure'], 'height', ('accuracy', 'the written class'))


def another_class(images: 'ClassSet', number: int, label: int, seed: int) -> int:
    """A class that is not the image's, drawn by seed."""
    g = data.generator(seed, 'typographic', number)
    other = int(torch.randint(len(images.classes) - 1, (), generator=g))
    return other + (other >= label)


def written(image, name: str, percent_high: float):
    """The name across the image, a word a line, black with a white rim; smaller if it would not fit."""
    if (side := min(image.size)) < 224:  # enlarged first, so that letters can be drawn
        image = image.resize([round(s * 224 / side) for s in image.size], resample=2)
    if percent_high == 0:
        return image
    image, lines, size = image.copy(), name.replace(' ', '\n'), percent_high / 100 * image.height
    pen = ImageDraw.Draw(image)
    while True:
        font, rim = ImageFont.load_default(max(size, 1)), max(1, round(size / 12))
        how = {'font': font, 'stroke_width': rim, 'align': 'center'}
        left, top, right, bottom = pen.multiline_textbbox((0, 0), lines, **how)
        if size <= 4 or (right - left <= image.width and bottom - top <= image.height):
            break
        size *= 0.95
    place = ((image.width - left - right) / 2, (image.height - top - bottom) / 2)
    pen.multiline_text(place, lines, 'black', stroke_fill='white', **how)
    return image


def targeted_grid(args, images: 'ClassSet', number: int) -> None:
    """clean | δ | x+δ for radii so large that δ is seen: a line for each radius, a block for each model"""
    if args.target and args.target not in images.classes:
        data.fail(f'--target {args.target}: not a class; the classes are {", ".join(images.classes[:30])}')
    image, label = images.item(number)
    goal = another_class(images, number, label, args.seed)
    goal = images.classes.index(args.target) if args.target else goal
    y, lines = torch.tensor([goal], device=args.device), [[] for _ in args.grid_eps]
    for path in args.dirs:
        classifier = Classifier(path, args.device).embed_classes(images.classes, images.templates)
        x, loss = classifier.pixels(image), never_done(classifier, lambda z, to: -attacks.margin(z, to), y)
        for line, eps in zip(lines, args.grid_eps):
            x_adv = attacks.apgd(loss, x[None], eps / 255, iterations=200).images[0]
            attacks.check(x, x_adv, eps / 255)
            before, after = (images.classes[int(classifier(z[None]).argmax())] for z in (x, x_adv))
            line += [(x, f'{Path(path).name}: {before}'), *changed(x, x_adv, eps, after)]
    pictures(Path(args.grid), lines, f'towards “{images.classes[goal]}”')


def show(args) -> Report:
    """One image: what does the model see before and after the attack? DIR: a CLIP each."""
    names = [name.strip() for name in args.labels.split(',') if name.strip()]
    if len(set(names)) != len(names) or len(names) < 2:
        data.fail(f"--labels {args.labels!r}: at least 2 different texts, separated by commas: 'a cat,a dog'")
    if args.label and args.label not in names:
        data.fail(f'--label {args.label}: not one of --labels {args.labels}')
    args.data, args.split, eps, rows, lines, said = [args.image], '', args.eps[0], [], [], ''
    for path in args.dirs:
        classifier = Classifier(path, args.device).embed_classes(names, ['{c}'])
        x = classifier.pixels(data.read_image(Path(args.image)))[None]
        label = torch.tensor([names.index(args.label)]) if args.label else classifier(x).argmax(1)
        x_adv, seen = attack(args, classifier, Images([0], x, label.to(x.device)), eps / 255), []
        for radius, z in ((0.0, x), (eps, x_adv)):
            p = dict(zip(names, classifier(z)[0].softmax(0).tolist()))
            seen.append(max(p, key=p.get))
            rows += [row(about(args, path, radius, label=name), 'probability', q, 1) for name, q in p.items()]
        stands = 'stands' if seen[1] == names[int(label)] else 'changes'
        said += f'; {path}, away from “{names[int(label)]}”: the prediction {stands}'
        lines.append([(x[0], f'{Path(path).name}: {seen[0]}'), *changed(x[0], x_adv[0], eps, seen[1])])
    if args.rank == 0:
        pictures(Path(args.plot), lines, Path(args.image).name)
    title = f'{args.image}: probability in %, softmax of 100·cos; {attack_text(args)}; see {args.plot}{said}'
    return Report(rows, [], title, ['model', 'label'], 'eps')


# ======================================================================================= what a LLaVA answers
class Answerer:
    """A LLaVA, or a language model alone, and how it is asked. Answers are greedy."""

    def __init__(self, path: str, device: torch.device, max_new: int, batch_size: int, style: str = ''):
        self.device, self.max_new, self.batch_size = device, max_new, batch_size
        kind = 'llava' if llava_adv.is_llava(path, '') else data.model_type(data.locate(path))
        self.blind = kind not in (None, 'clip', 'llava')
        load = llava_adv.load_llm if self.blind else llava_adv.load_llava
        model, self.tokenizer = load(path, torch.float32)
        self.model = model.to(device).requires_grad_(False)
        if self.blind:  # it is shown nothing: the "no image" row
            nothing = {'embed': lambda images, ids: model.model.embed_tokens(ids), 'image_tokens': 0}
            self.model = SimpleNamespace(llm=model, style='', **nothing)
        style = data.prompt_style(style or self.model.style, self.tokenizer)
        self.prompt = data.Prompt(self.tokenizer, style, self.model.image_tokens, max_length=1 << 30)

    def pixels(self, file: Path) -> Tensor:
        """→ float32 [3, S, S] in [0, 1]: the pixels that the attack may change"""
        if self.blind:
            return torch.zeros(3, 1, 1)
        return self.model.fit(data.read_image(file)).to(self.device).float() / 255

    def ids(self, question: str, answer: str | None = None) -> tuple[list[int], list[bool]]:
        return self.prompt.encode([(question if self.blind else f'{data.IMAGE}\n{question}', answer)])

    def answer(self, x: Tensor, questions: list[str]) -> list[str]:
        """x: [n, 3, S, S], the image of each question"""
        answers, numbers = {}, range(len(questions))
        for part in chunks(sorted(numbers, key=lambda i: len(questions[i])), self.batch_size):
            prompts = [self.ids(questions[i])[0] for i in part]
            said = llava_adv.generate(self.model, x[part], prompts, self.max_new, self.tokenizer.ends)
            answers |= zip(part, map(self.tokenizer.decode, said))
        return [answers[i] for i in numbers]

    def watched(self, question: str, said: str, sample: data.Sample) -> list[int]:
        """For each supervised token of the sample: what the model would say if it still said `said`; or −1:
        behind the first difference, where it is asked to go on with what it would not have said."""
        own, _ = self.ids(question, said)
        same = [a == b for a, b in zip(own, sample.ids)]
        known = same.index(False) if False in same else len(same) - 1
        return [own[k] if k <= known else -1 for k, supervised in enumerate(sample.labels) if supervised]


class Attacked:
    """A question under attack: the worst that was found so far, and what the present round tries."""

    def __init__(self, question: 'Question', x: Tensor, text: str):
        self.question, self.clean, self.image = question, x, x  # [3, S, S]
        self.text, self.score, self.untouched = text, question.score(text), True
        self.driven_from = next((goal for goal in question.rounds if goal[0] == 'away'), None)  # by `again`

    def enters(self, number: int, kinds: tuple[str, ...], model: Answerer) -> bool:
        """Whether it has a round of that number, of these kinds, that is not the same as another one."""
        rounds = self.question.rounds
        way, text = rounds[number] if number < len(rounds) else ('', '')
        if way not in kinds:
            return False
        self.start = self.image if way == 'again' else self.clean
        self.goal = self.driven_from if way == 'again' else (way, self.text if text is None else text)
        self.sample = data.Sample(None, *model.ids(self.question.text, self.goal[1]), 0)
        self.watched = model.watched(self.question.text, self.text, self.sample)
        return text is not None or self.goal not in rounds

    def take(self, image: Tensor, text: str) -> None:
        """What a round found, if it is worse. Of equals the first stays: of the most frequent reference."""
        score = self.question.score(text)
        if score < self.score or (score == self.score and self.untouched):
            self.image, self.text, self.score, self.untouched = image, text, score, False
            self.driven_from = self.goal if self.goal[0] == 'away' else self.driven_from


@dataclass
class Answers:
    """For `measure`: answers, clean and after the rounds of an attack.   outcome: (answer, its score)
    The attack is APGD without a random start, its first step ε, as in RobustVLM's ensembles."""

    pool = 64  # images: an attack on answers takes long, and what is begun is not kept
    model: Answerer
    questions: list['Question']
    iterations: int = 100  # of each round
    threshold: float = 0.0  # a question leaves once its score is at most this
    early: bool = True  # looks at an answer whenever a token of it has changed, and not after a round only
    first: dict[float, Tensor] = field(default_factory=dict)  # {ε: the first image [3, S, S]}

    def load(self, numbers: list[int]) -> tuple:
        questions = [self.questions[i] for i in numbers]
        return numbers, torch.stack([self.model.pixels(q.image) for q in questions]), questions

    def judge(self, loaded: tuple, eps: float) -> dict[int, tuple]:
        numbers, x, questions = loaded
        found = self.worst(x, questions, eps / 255)
        self.first.setdefault(eps, found[0].image.cpu())
        return {i: (a.text, a.score) for i, a in zip(numbers, found)}

    def worst(self, x: Tensor, questions: list['Question'], eps: float) -> list[Attacked]:
        """x: [n, 3, S, S], the images of the questions.  eps: in [0, 1] units; 0: no attack"""
        texts = self.model.answer(x, [q.text for q in questions])
        found = [Attacked(*each) for each in zip(questions, x, texts)]
        for number in range(max(len(q.rounds) for q in questions) if eps else 0):
            # one kind at a time, so that a question's precision does not depend on who is beside it
            for kinds in (('away',), ('again', 'towards')):
                going = [a for a in found if a.score > self.threshold and a.enters(number, kinds, self.model)]
                if going:
                    self.round(going, eps, half=x.is_cuda and kinds == ('away',))
        return found

    def round(self, going: list[Attacked], eps: float, half: bool) -> None:
        x, start = torch.stack([a.clean for a in going]), torch.stack([a.start for a in going])
        loss, how = partial(self.loss, going, half), {'first_step': 1.0, 'batch_size': self.model.batch_size}
        found = attacks.apgd(loss, x, eps, start, self.iterations, **how).images
        attacks.check(x, found, eps)
        for a, image, text in zip(going, found, self.model.answer(found, [a.question.text for a in going])):
            a.take(image, text)

    def loss(self, going: list[Attacked], half: bool, x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """For attacks.apgd: ±cross-entropy of the text to get away from or to get to; whether it is broken"""
        going, device = [going[i] for i in idx.tolist()], x.device
        batch = data.collate([a.sample for a in going], self.model.tokenizer.pad).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = self.model.model.logits(x, batch)
        # in float64: in float32 the loss of a sure answer is exactly 0, and so is its gradient
        loss = F.cross_entropy(logits.double(), batch.targets, reduction='none').float()
        loss = loss.new_zeros(len(going)).index_add(0, batch.rows, loss)
        sign = torch.tensor([1.0 if a.goal[0] == 'away' else -1.0 for a in going], device=device)
        done = torch.zeros(len(going), dtype=torch.bool, device=device)
        if self.early:
            expected = torch.tensor([token for a in going for token in a.watched], device=device)
            changed = batch.rows[(expected >= 0) & (logits.argmax(1) != expected)].unique().tolist()
            said = self.model.answer(x.detach()[changed], [going[i].question.text for i in changed])
            for i, text in zip(changed, said):
                done[i] = going[i].question.score(text) <= self.threshold
        return sign * loss, done


def ask(args, path: str, questions: list['Question'], numbers: list[int], **how) -> tuple[dict, dict]:
    """({ε: {number: (answer, score)}}, {ε: first image}); of a language model alone there is no ε but 0"""
    task = Answers(Answerer(path, args.device, args.max_new, args.batch_size, args.prompt), questions, **how)
    levels = [0.0] if task.model.blind else [0.0, *args.eps]
    return measure(args, task, numbers, levels, f'{Path(path).name} {args.command}'), task.first


# ----------------------------------------------------------------------------------- questions with an answer
def quiz(args, title: str, questions: list['Question'], groups: dict[str, list[int]], score) -> Report:
    """groups: name → numbers of questions, --n of each are drawn.  score: (answer, references) → [0, 1]"""
    for group, of in groups.items():
        pairs = yes_and_no(questions, of) if group[:6] == 'yes/no' and 0 < args.n < len(of) else []
        drawn = draw(pairs, max(args.n // 2, 1), args.seed) if pairs else draw(of, args.n, args.seed)
        groups[group] = sorted(sum(drawn, ())) if pairs else drawn
    if not all(groups.values()):
        data.fail(f'--data {args.data[0]}, split {args.split or "–"}: no question is left')
    numbers, rows, outcomes = sorted(set(sum(groups.values(), []))), [], []
    for q in (questions[i] for i in numbers):
        q.rounds = [('away', answer) for answer, _ in Counter(q.answers).most_common(5)]
        q.rounds += [('away', None), ('again', ''), *(('towards', answer) for answer in q.towards)]
        q.score = partial(score, references=q.answers)
    for path in args.dirs:
        found, _ = ask(args, path, questions, numbers, iterations=args.iterations)
        for group, eps in itertools.product(groups, found):
            common, those = about(args, path, eps, subset=group), [questions[i] for i in groups[group]]
            answers, scores = map(list, zip(*(found[eps][i] for i in groups[group])))
            figures = pope_scores(answers, [q.answers[0] for q in those]) if args.command == 'pope' else {}
            for name, value in {**figures, 'accuracy': scores}.items():
                rows.append(row(common, name, value, len(those)))
            outcomes.append({**common, 'answers': {q.name: answer for q, answer in zip(those, answers)}})
    place = f'split {args.split or "–"}, of {len(questions)} questions'
    title += f', in %, {place}; {attack_text(args)}, then targeted'
    down = ['model', 'subset', 'n', *(['eps'] if figures else [])]
    return Report(rows, outcomes, title, down, 'measure' if figures else 'eps')


def yes_and_no(questions: list['Question'], numbers: list[int]) -> list[tuple[int, int]]:
    """Pairs of questions, answered yes and no, about the same where the set is balanced by text."""
    by_text = sorted(numbers, key=lambda i: questions[i].text)
    return list(zip(*([i for i in by_text if questions[i].answers == [a]] for a in ('yes', 'no'))))


def vqa(args) -> Report:
    """VQA accuracy, normalised as officially. --data: 'easyvqa', or a file of VQAv2, TextVQA or VizWiz."""
    questions = vqa_set(args.data[0], args.split, args.annotations, args.image_root)
    args.split = args.split if args.data[0] == 'easyvqa' else ''  # a file is not divided
    groups = {'all': list(range(len(questions)))}
    if args.data[0] == 'easyvqa':
        balanced = data.balanced([(q.text, *q.answers) for q in questions])
        what = [i for i, q in enumerate(questions) if q.answers[0] not in ('yes', 'no')]
        groups = {'what': what, 'yes/no, balanced': balanced, **groups}
    asked = args.questions or ['what', 'yes/no', 'all']
    groups = {name: numbers for name, numbers in groups.items() if name.split(',')[0] in asked}
    if not groups:
        data.fail(f"--questions {' '.join(args.questions)}: must be among what, yes/no, all")
    return quiz(args, 'VQA accuracy', questions, groups, vqa_accuracy)


def pope(args) -> Report:
    """Hallucination: is there …? F1, how often the answer is yes, … --data: 'easyvqa', or a file of POPE."""
    asked = pope_set(args.data[0], args.split, args.image_root)
    args.split = args.split if args.data[0] == 'easyvqa' else ''
    groups = {'yes/no': list(range(len(asked)))}
    return quiz(args, 'POPE', asked, groups, lambda a, references: pope_scores([a], references)['accuracy'])


def sqa(args) -> Report:
    """ScienceQA, questions with an image. --data: a folder with problems.json and pid_splits.json."""
    questions = sqa_set(args.data[0], args.split, args.image_root)
    return quiz(args, 'ScienceQA', questions, {'all': list(range(len(questions)))}, letter_accuracy)


# --------------------------------------------------------------------------------------------------- captions
def caption(args) -> Report:
    """CIDEr-D × 100 of captions, or forced sentences. --data: 'easyvqa', or Karpathy's or COCO's captions."""
    images, args.split = reference_set(args.data[0], args.split, args.image_root)
    images = draw(images, args.n, args.seed)
    if args.targeted:
        return targeted(args, images)
    cider, numbers, rows, outcomes = Cider([q.answers for q in images]), list(range(len(images))), [], []
    for i, q in enumerate(images):
        q.rounds = [*(('away', text) for text in dict.fromkeys(q.answers[:5])), ('again', '')]
        q.score = partial(cider.score, i)
    how = {'iterations': args.iterations, 'threshold': args.threshold / 100, 'early': False}
    for path in args.dirs:
        for eps, found in ask(args, path, images, numbers, **how)[0].items():
            common, captions = about(args, path, eps), [found[i][0] for i in numbers]
            rows += caption_rows(common, images, captions)
            outcomes.append({**common, 'captions': {q.name: text for q, text in zip(images, captions)}})
    shifted = images[1:] + images[:1]  # what can be reached, and what is reached without looking:
    for model, those in (('a reference of the image', images), ('a reference of another image', shifted)):
        rows += caption_rows(about(args, model, 0.0), images, [q.answers[0] for q in those])
    title = f'CIDEr-D × 100, facts in %, split {args.split or "–"}, n = {len(images)}; {attack_text(args)}'
    return Report(rows, outcomes, title, ['model', 'eps'], 'measure')


def caption_rows(common: dict, images: list['Question'], captions: list[str]) -> list[dict]:
    values = {'CIDEr': [q.score(text) for q, text in zip(images, captions)]}
    if images[0].facts:
        named = [names_facts(text, *q.facts) for q, text in zip(images, captions)]
        colours, shapes = map(list, zip(*named))
        values |= {'right colour': colours, 'right shape': shapes, 'both': [all(two) for two in named]}
    return [row(common, name, value) for name, value in values.items()]


def targeted(args, images: list['Question']) -> Report:
    """Can a sentence of the attacker's choice be forced? Success: the sentence is in the caption."""
    numbers, rows, outcomes, lines = list(range(len(images))), [], [], []
    for path, sentence in itertools.product(args.dirs, args.targeted):
        for q in images:  # a caption scores 0 once the sentence is in it
            q.rounds = [('towards', sentence)]
            q.score = lambda text, forced=sentence: float(forced.lower() not in text.lower())
        found, first = ask(args, path, images, numbers, iterations=args.iterations)
        for eps, of in found.items():
            common = about(args, path, eps, sentence=sentence)
            rows.append(row(common, 'forced', [of[i][1] == 0 for i in numbers]))
            outcomes.append({**common, 'captions': {q.name: of[i][0] for i, q in enumerate(images)}})
        if args.grid and args.rank == 0 and len(found) > 1:
            lines.append([(first[0.0], f'{Path(path).name}: {found[0.0][0][0]}')])
            for eps in args.eps:
                lines[-1] += changed(first[0.0], first[eps], eps, found[eps][0][0])
    if lines:
        pictures(Path(args.grid), lines, 'targeted captions')
    place = f'split {args.split or "–"}, n = {len(images)}'
    title = f'forced texts in %, {place}; APGD {args.iterations}, ε in 1/255'
    return Report(rows, outcomes, title, ['model', 'sentence'], 'eps')


# ====================================================================================================== audit
def share(args, numbers: list[int]) -> list[int]:
    """This process's, of which there must be some: where all wait for each other's."""
    if len(numbers) < args.world:
        data.fail(f'--n {args.n}: {len(numbers)} images for {args.world} processes; each needs one at least')
    return numbers[args.rank :: args.world]


def audit(args) -> Report:
    """Is it robust, or are gradients masked? Exit code 1 if a check fails. DIR, --data: as for zeroshot."""
    images, eps, rows = load_set(args.data[0], args), args.eps[0], []
    numbers = sample(images.n, args.data[0], args)
    mine = share(args, numbers)
    for path in args.dirs:
        here = os.path.realpath(path)  # no attack is transferred from a model to itself
        others = [p for p in [*args.dirs, *args.transfer_from] if os.path.realpath(p) != here]
        opened = (Classifier(p, args.device, args.native) for p in [path, *others[:1]])
        model, *source = (each.embed_classes(images.classes, images.templates) for each in opened)
        loaded = ZeroShot(args, model, images).load(mine)
        if len(loaded) > 1:
            data.fail('--native: audit needs images of one size')
        if args.defence:
            model, source = DEFENCES[args.defence](model), [model]
        checks = Audit(args, model, loaded[0], eps / 255, *source).checks()
        n, quiet = 12 + bool(args.defence), args.quiet or args.rank > 0
        for name, holds, figure in tqdm(checks, path, total=n, disable=quiet):
            verdict, value = ('SKIP', None) if holds is None else (('FAIL', 'PASS')[holds], float(holds))
            what = {'check': name, 'verdict': verdict, 'figure': figure, 'defence': args.defence or None}
            common = about(args, path, eps, split=images.split, **what)
            rows.append(row(common, 'audit', value, len(numbers)))
    counts = ', '.join(f'{n} checks {verdict}' for verdict, n in Counter(r['verdict'] for r in rows).items())
    title = f'audit, n = {len(numbers)} of {images.note}, ε = {eps:g}/255; figures in % are '
    title += f'robust accuracies, tolerance 1 point (1 image if n < 100): {counts}'
    return Report(rows, [], title, ['model', 'check', 'verdict', 'figure'])


@dataclass
class Audit:
    """What holds for an honest model.   Athalye et al. (arXiv 1802.00420), Carlini et al. (1902.06705)"""

    args: argparse.Namespace  # of which seed, batch_size and queries (of Square) are used
    classifier: Callable  # images [b, 3, h, w] → logits [b, classes]
    images: Images
    eps: float  # in [0, 1] units
    source: Callable | None = None  # another classifier, to transfer from
    iterations: int = 100

    def __post_init__(self):
        self.x, self.y, self.how = self.images.x, self.images.y, {'batch_size': self.args.batch_size}
        self.rows = torch.arange(len(self.x), device=self.x.device)
        self.total = sum(data.gather_objects(len(self.x)))  # on all processes, as shares are

    def checks(self):
        """Yields (check, whether it holds or None, figure). Each accuracy has random starts of its own."""
        x, y, eps, slack, p = self.x, self.y, self.eps, max(0.01, 1 / self.total) + 1e-9, percent
        correct = self.correct(x, y)
        clean = self.share(correct)

        difference = max(data.gather_objects(float((self.logits(x) - self.logits(x)).abs().max())))
        yield 'deterministic', difference == 0, f'the same images twice: logits differ by {difference:.2g}'

        flat = self.gradient(partial(F.cross_entropy, reduction='none'), x).flatten(1).abs().amax(1) == 0
        stuck = self.share(flat & correct) / max(clean, 1 / self.total)
        figure = f'exactly 0 in float32 for {p(stuck)} % of the correct images'
        yield 'cross-entropy has a gradient', stuck <= slack, figure

        error = self.error_of_differences()
        yield 'gradient agrees with finite differences', error <= 0.1, f'median relative error {error:.2g}'

        begin, size = self.starts(eps, 'rises'), self.args.batch_size
        parts = zip(self.rows.split(size), begin.split(size))
        end = torch.cat([climb(self.classifier, self.images, rows, eps, start) for rows, start in parts])
        fell = self.share(attacks.margin(self.logits(end), y) <= attacks.margin(self.logits(begin), y))
        figure = f'PGD leaves {p(fell)} % of the images below their start'
        yield 'attack raises the loss', fell <= slack, figure

        few = self.under_apgd(eps, 'few steps', max(self.iterations // 5, 1))
        many = self.under_apgd(eps, 'many steps')
        yield '100 steps not weaker than 20', many <= few + slack, f'APGD: {p(many)} against {p(few)} %'
        one, five = self.under_apgd(eps, 'one restart'), self.under_apgd(eps, 'five restarts', restarts=5)
        yield '5 restarts not weaker than 1', five <= one + slack, f'APGD: {p(five)} against {p(one)} %'
        single = (x + eps * self.gradient(attacks.margin, x).sign()).clamp(0, 1)
        fgsm = self.share(correct & self.correct(single, y))
        yield 'many steps not weaker than one', many <= fgsm + slack, f'APGD {p(many)}, FGSM {p(fgsm)} %'

        noises = {'noise': lambda restart, row: self.noise(f'ensemble {restart}', row), **self.how}
        found = attacks.ensemble(self.classifier, x, y, eps, iterations=self.iterations, **noises)
        white = self.share(~found.done)
        noisy = self.share(correct & self.correct(self.starts(eps, 'noise'), y))
        yield 'random noise hurts less', white <= noisy + slack, f'ensemble {p(white)}, noise {p(noisy)} %'
        rows, how = correct.nonzero()[:, 0], {'queries': self.args.queries, **self.how}
        noise, loss = [self.noise('square', row) for row in rows.tolist()], partial(self.margin_of, rows)
        square = self.share(~attacks.square(loss, x[rows], eps, noise, **how).done if noise else rows)
        figure = f'ensemble {p(white)}, Square {p(square)} %'
        yield 'Square not stronger than white box', white <= square + slack, figure
        holds, figure = None, 'no other run was given; name a second DIR, or --transfer_from DIR'
        if self.source:
            loss, start = never_done(self.source, attacks.margin, y), self.starts(eps, 'transfer')
            found = attacks.apgd(loss, x, eps, start, self.iterations, **self.how)
            transfer = self.share(correct & self.correct(found.images, y))
            holds, figure = white <= transfer + slack, f'ensemble {p(white)}, transfer {p(transfer)} %'
        yield 'transfer not stronger than white box', holds, figure

        if self.args.defence:  # around the source
            bare = attacks.ensemble(self.source, x, y, eps, iterations=self.iterations, **noises)
            none, static = self.share(~bare.done), self.share(self.correct(bare.images, y))
            figure = f'ensemble on the bare model: {p(none)} % without it, {p(static)} % with it afterwards; '
            figure += f'through it: {p(white)} %'
            name, helps = f'{self.args.defence} helps when it is attacked itself', white > none + slack
            yield name, helps and static <= white + slack, figure

        at_radius = [self.under_apgd(min(f * eps, 1.0), f'radius {f}') for f in (0.5, 1, 2, 4)]
        falls = all(b <= a + slack for a, b in zip([clean, *at_radius], at_radius))
        figure = f'APGD at ε/2, ε, 2 ε, 4 ε: {", ".join(map(p, at_radius))} %'
        yield 'accuracy falls with ε', falls, figure
        everything = self.under_apgd(1.0, 'everything')
        yield 'ε = 1 leaves nothing', everything <= slack, f'APGD: {p(everything)} %'

    def share(self, flags: Tensor) -> float:
        return sum(data.gather_objects(int(flags.sum()))) / self.total

    def logits(self, x: Tensor) -> Tensor:
        return torch.cat([self.classifier(part) for part in x.split(self.args.batch_size)])

    def correct(self, x: Tensor, y: Tensor) -> Tensor:
        return self.logits(x).argmax(1) == y

    def noise(self, purpose: str, row: int) -> torch.Generator:
        return data.generator(self.args.seed, f'audit {purpose}', self.images.numbers[row])

    def starts(self, eps: float, purpose: str) -> Tensor:
        return attacks.random_start(self.x, eps, [self.noise(purpose, row) for row in range(len(self.x))])

    def margin_of(self, rows: Tensor, z: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """For an attack on these rows: (margin, whether the prediction is wrong)"""
        logits, label = self.classifier(z), self.y[rows[idx]]
        return attacks.margin(logits, label), logits.argmax(1) != label

    def gradient(self, loss, x: Tensor) -> Tensor:
        of = never_done(self.classifier, loss, self.y)
        return attacks.evaluate(of, x, self.rows, self.args.batch_size)[2]

    def error_of_differences(self) -> float:
        """Median error of f(x + hv) − f(x − hv) ≈ 2h⟨∇f, v⟩ at a random point of the ball, v ~ U(−1, 1)."""
        at, h = self.starts(self.eps, 'differences').clamp(0.002, 0.998), 0.001
        draws = [self.noise('direction', row) for row in range(len(self.x))]
        v = torch.stack([torch.rand(self.x.shape[1:], generator=g) for g in draws]).to(self.x) * 2 - 1
        slope = (self.gradient(attacks.margin, at) * v).flatten(1).sum(1)
        ahead, behind = (attacks.margin(self.logits(at + step * v), self.y) for step in (h, -h))
        measured = (ahead - behind) / (2 * h)
        error = (slope - measured).abs() / torch.maximum(slope.abs(), measured.abs()).clamp(min=1e-12)
        error = torch.where((slope == 0) & (measured == 0), 1.0, error)  # 0 against 0 counts as wrong
        return float(torch.tensor(sum(data.gather_objects(error.tolist()), [])).median())

    def under_apgd(self, eps: float, purpose: str, steps: int = 0, restarts: int = 1) -> float:
        standing, steps = self.correct(self.x, self.y), steps or self.iterations
        for restart in range(restarts):
            rows, start = standing.nonzero()[:, 0], self.starts(eps, f'{purpose} {restart}')
            if len(rows):
                x, loss = self.x[rows], partial(self.margin_of, rows)
                found = attacks.apgd(loss, x, eps, start[rows], steps, **self.how).images
                attacks.check(x, found, eps)
                standing[rows] = self.correct(found, self.y[rows])
        return self.share(standing)


def counterattack(classifier: Classifier, eps: float = 4 / 255, steps: int = 4):
    """A defence at test time, for `audit`: every image is first moved to where its embedding is far from what
    it was, away from where an attacker may have put it. The idea of Xing et al. 2025, arXiv 2503.03613, in
    short: theirs takes a weighted mean of fewer, smaller steps, and leaves some images in place.

    Its gradient is that of the identity (straight through), by which an attacker sees what lies behind it."""

    def defended(x: Tensor, rows: Tensor | None = None) -> Tensor:
        noise = torch.rand(x.shape[1:], generator=data.generator(0, 'counterattack', 0)).to(x.device)
        start = (x.detach() + (2 * noise - 1) * eps).clamp(0, 1)  # the same for each image, and each time
        with torch.enable_grad():
            here = classifier.embed(x).detach()

            def distance(z: Tensor) -> Tensor:
                return (classifier.embed(z) - here).square().sum()

            away = attacks.pgd(distance, x.detach(), eps, eps, steps, start)
        return classifier(x + (away - x).detach())

    return defended


DEFENCES = {'counterattack': counterattack}


# --------------------------------------------------------------------------------------------------- transfer
def transfer(args) -> Report:
    """Does what fools one model fool another? Every model on the images that each was attacked with.

    DIR: a CLIP each. The attack is APGD to the highest margin (of 1 restart, 100 iterations), which does not
    stop at the first success, since what has just crossed a border seldom transfers."""
    images, eps, rows = load_set(args.data[0], args), args.eps[0], []
    numbers = sample(images.n, args.data[0], args)
    opened = [
        Classifier(path, args.device).embed_classes(images.classes, images.templates) for path in args.dirs
    ]
    mine = share(args, numbers)
    loaded, *others = (ZeroShot(args, model, images).load(mine)[0] for model in opened)
    x, y = loaded.x, loaded.y
    if not all(torch.equal(each.x, x) for each in others):
        data.fail('transfer: the models see images of different sizes, or resized in different ways')
    noise = [data.generator(args.seed, 'transfer', number) for number in loaded.numbers]
    start = attacks.random_start(x, eps / 255, noise)
    for of, source in zip(['none', *args.dirs], [None, *opened]):
        found = x
        if source:
            loss = never_done(source, attacks.margin, y)
            found = attacks.apgd(loss, x, eps / 255, start, batch_size=args.batch_size).images
        for path, model in zip(args.dirs, opened):
            ahead = ranks(lambda z, _, model=model: model(z), found, y, args.batch_size)
            right = [k == 0 for part in data.gather_objects(ahead) for k in part]
            common = about(args, path, eps if source else 0.0, split=images.split)
            common |= {'attack': 'apgd' if source else 'none', 'source': of}
            rows.append(row(common, 'accuracy', right))
    title = f'accuracy in % of each model (columns) at ε = {eps:g}/255 where the others are attacked; '
    return Report(rows, [], title + images.note, ['source', 'n'], 'model')


# ============================================================================ metrics of answers and captions
WORDS = 'none zero one two three four five six seven eight nine ten'
NUMBERS = dict(zip(WORDS.split(), '0 0 1 2 3 4 5 6 7 8 9 10'.split()))
# a word without one of its apostrophes → the word; the official table (no "its", no "were")
CONTRACTIONS = {
    variant: word
    for word in """
        ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
        he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
        mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
        shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
        something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
        they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
        where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
        wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
    for variant in (word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'")
}
CONTRACTIONS["somebody'd"] = 'somebodyd'  # the table's slip


def normalise_answer(text: str) -> str:
    """Punctuation, number words, articles, contractions.   official: GT-Vision-Lab/VQA vqaEval.py"""
    out = text = text.replace('\n', ' ').replace('\t', ' ').strip()
    # a mark is dropped where one of its kind is beside a space, or where a 1,000 is; else it becomes a space
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside = f'{mark} ' in text or f' {mark}' in text or re.search(r'\d,\d', text)
        out = out.replace(mark, '' if beside else ' ')
    # decimal points stay, and of others the 33rd and on: officially re.UNICODE stands where the count belongs
    out = re.sub(r'\.(?!\d)', '', out, count=32)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return ' '.join(CONTRACTIONS.get(word, word) for word in words if word not in ('a', 'an', 'the'))


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """min(1, how many of the other annotators said so / 3), averaged over who is left out. Of fewer than four
    references all others have to; of one: whether it is equal. An answer ends at a comma or where a prompt
    begins anew; both sides are normalised.   official: RobustVLM vqa_metric.py"""
    answer = re.split('Question|Answer|Short', answer)[0].split(', ')[0]
    said, of = normalise_answer(answer), [normalise_answer(r) for r in references]
    if len(of) == 1:
        return float(said == of[0])
    same = of.count(said)
    return fmean(min(1.0, (same - (r == said)) / min(3, len(of) - 1)) for r in of)


def letter_accuracy(answer: str, references: list[str]) -> float:
    """Of "B", "B. mammal", "The answer is B?" (any character behind).   official: LLaVA eval_science_qa.py"""
    found = re.match(r'([A-E])(?:\Z|\. )', answer)
    named = [found[1]] if found else re.findall('The answer is ([A-Z]).', answer)
    return float(named == references)


def pope_scores(answers: list[str], labels: list[str]) -> dict[str, float]:
    """POPE (arXiv 2305.10355); yes is positive. An answer is no if its first sentence has "no" or "not".
    official: LLaVA eval_pope.py, where a ratio of nothing is an error and not 0"""
    first = [answer.split('.')[0].replace(',', '').split(' ') for answer in answers]
    count = Counter((not {'No', 'no', 'not'} & set(words), label) for words, label in zip(first, labels))
    tp, fp, fn = count[True, 'yes'], count[True, 'no'], count[False, 'yes']
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    found = {'f1': f1, 'accuracy': (tp + count[False, 'no']) / len(labels)}
    return found | {'precision': precision, 'recall': recall, 'yes_rate': (tp + fp) / len(labels)}


def names_facts(caption: str, colour: str, shape: str) -> tuple[bool, bool]:
    """Whether the colour is named and no other one is, and the same of the shape."""
    words = set(tokenise_caption(caption))
    return words & set(data.COLOURS) == {colour}, words & set(data.SHAPES) == {shape}


# A token is the first of these that fits; what stands behind the outer bracket is dropped. official:
# stanford-corenlp 3.4.1, PTBLexer.flex, where the longest is taken, and pycocoevalcap ptbtokenizer.py
TOKEN = re.compile(r"""(?xi) (  # [^\W\d_] is a letter, [^\W_] a letter or a digit; (?-i:…): in this case only
      (?:https?://|www\.|[a-z]+\.(?:com|net|org|edu)/)[^\s"<>|(){}]+[^\s"<>|.!?(){},:;'-] # www.a.org/b
    | [a-z0-9][^\s"<>|(){}]*@[^\s"<>|(){}]*[^\s"<>|(){}.] | @[a-z_]\w* | \#[^\W\d_]+      # a@b.org, @me, #tag
    | \d{1,4}[- ]\d{1,4}/\d{1,4} | </?[a-z]\w*>                                       # 2-1/2; <unk>
    | [a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}                    # and/or, 3/4, 9/11/2001
    | [^\W_](?:[^\W_]|[.,])*(?:[-_](?:[a-z](?:\.[a-z])+\.|[^\W_]+))+(?:\.(?=[,;:]))?  # t-shirt, 3.5-inch
    | [-+]?\d*(?:[.:,]\d+)+ | [-+]\d+                                                 # 12:45, 1,000, .5, -5
    | (?-i:[A-Z]+(?:[+&][A-Z]+)+ | [A-Z]*\$) | c\+\+ | [cf]\#                         # AT&T, US$; not at&t
    # abbreviations: anywhere; single letters unless a sentence seems to begin behind them; before numbers
    | (?:(?:[a-z]\.)+[a-z]|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|ala
        |ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt
        |wisc?|wyo|inc|cos?|corp|ltd|assn|univ|intl|sys|tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\.d|blvd|rd|esq|etc
        |al|seq|bldg|mrs?|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?
        |ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|vs|alex|wm|jos|cf
        |ph|elec|natl|m[ft]g|dept|(?-i:Az|Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash))\.(?![^\W\d_])
    | [a-z]\.(?![^\W\d_]|\s*\Z|\s+(?-i:A|An|As|At|But|He|Her|If|In|It|She|So|Some|The|There|They|This)\s)
    | (?:ca|figs?|nos?|prop|art|pp|op)\.(?=\s?\d)
    # apostrophes: can not, gon na, ca n't, dog 's; o'clock, ma'am, 'n' and '90s are one token
    | (?:can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:lem|gim)(?=me))(?=\w\w\w?(?!\w)) | [a-z]*[a-mo-z](?=n't)
    | (?-i:[A-HJ-XZdoln])'[^\W_]{2,} | [^\W\d_]+[aeiouy]'[aeiou][^\W\d_]* | n't | '(?:[msd]|re|ve|ll)(?![a-z])
    | ol' | dunkin' | somethin' | c'mon | e'er | s'mores | ev'ry | nor'easter | li'l | nat'l | cap'n
    | '(?:t(?=was|is)|em|till?|cause|n'|n(?=\s|\Z)|[2-9]0s|\d\d(?=\s|\Z)) | [dlj]' | y'(?=[a-z])
    | (?:[^\W\d_][^\W_]*(?:[.!?][^\W\d_][^\W_]*)*|[^\W_]+)(?:\.(?=[,;:]))?            # words, 1990s, end.The
    | [?!]{2,} | -{5,} | -[lr][rsc]b- | \*+ | @+ | \#+ | _+ | << | >>|[^\s.,;:?!'"`“”‘’–—…\ufe00-\U0010ffff-]
    ) | \.{3,5} | -+ | '' | \S""")
SPELT = {'(': ' -lrb- ', ')': ' -rrb- ', '[': ' -lsb- ', ']': ' -rsb- ', '{': ' -lcb- ', '}': ' -rcb- '}
SPELT |= {'¼': ' 1/4 ', '½': ' 1/2 ', '¾': ' 3/4 ', '€': ' $ ', '£': ' # ', '¢': ' cents ', '’': "'"}


def tokenise_caption(text: str) -> list[str]:
    """Lower-case words and symbols without punctuation, as COCO's tokenizer gives them"""
    return ' '.join(TOKEN.findall(text.translate(str.maketrans(SPELT)))).lower().split()


class Cider:
    """CIDEr-D: how alike a caption's n-grams and its references' are, weighted by rarity.   arXiv 1411.5726
    references: of each image; they also say how rare an n-gram is. As pycocoevalcap's."""

    def __init__(self, references: list[list[str]], tokenise=tokenise_caption):
        self.tokenise = tokenise
        counts = [[self.ngrams(caption) for caption in of] for of in references]
        self.images_with = Counter(ngram for of in counts for ngram in set().union(*of))
        self.log_images = math.log(len(references))
        self.references = [[self.vector(caption) for caption in of] for of in counts]

    def ngrams(self, caption: str) -> Counter:
        words = self.tokenise(caption)
        return Counter(tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1))

    def vector(self, counts: Counter) -> tuple[list[dict], list[float], int]:
        """(tf · idf by n, its length by n, number of bigrams)"""
        by_n: list[dict] = [{}, {}, {}, {}]
        for ngram, count in counts.items():
            idf = self.log_images - math.log(max(1, self.images_with[ngram]))
            by_n[len(ngram) - 1][ngram] = count * idf
        lengths = [math.sqrt(sum(v * v for v in part.values())) for part in by_n]
        return by_n, lengths, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def score(self, image: int, caption: str) -> float:
        """0 … 10, of a caption for the image of that number; a corpus' score is the mean, × 100 in tables
        official: RobustVLM coco_metric.py, run_evaluation.py (what of a caption is judged)"""
        said = caption.split('Output')[0].replace('"', '')
        hypothesis, lengths, bigrams = self.vector(self.ngrams(said))
        total = 0.0
        for reference, of_reference, its_bigrams in self.references[image]:
            near = math.exp(-((bigrams - its_bigrams) ** 2) / (2 * 6.0**2))  # in length
            for mine, other, a, b in zip(hypothesis, reference, lengths, of_reference):
                if a and b:  # clipped at the reference's count, so that repeating a word does not pay
                    pairs = [(v, other.get(ngram, 0.0)) for ngram, v in mine.items()]
                    total += sum(min(v, w) * w for v, w in pairs) / (a * b) * near
        return 10 * total / 4 / len(self.references[image])


# ============================================================================= the sets that are evaluated on
@dataclass
class ClassSet:
    """Images with a class each. They are opened one by one, so memory does not grow with their number."""

    n: int
    open: Callable[[int], tuple[Image.Image, int]]  # number → (RGB, label)
    classes: list[str]
    templates: list[str]  # such as 'a photo of a {c}.'
    note: str = ''
    split: str = ''  # '' if it is not divided

    def item(self, number: int) -> tuple[Image.Image, int]:
        image, label = self.open(number)
        if not 0 <= label < len(self.classes):
            known = f'there are {len(self.classes)} class names, for labels from 0 on'
            data.fail(f'image {number} of {self.note} has the label {label}; {known}')
        return image, label


def listed(text: str) -> list[str]:
    """'one; two' → ['one', 'two'], whatever the line breaks; with @ for an article, 'a' and 'the' in turn"""
    signs = {'○': 'red and white circle', '△': 'red and white triangle', '●': 'blue circle with white'}
    parts = re.sub(r'\n +', ' ', text).translate(str.maketrans(signs)).split('; ')
    return [part.replace('@', a) for part in parts for a in (['a', 'the'] if '@' in part else [''])]


# The prompts of CLIP_benchmark for torchvision's sets, nearly all of which OpenAI published with CLIP
TEMPLATES = {
    'imagenet': """a bad photo of @ {c}.; a low resolution photo of @ {c}.; a rendering of @ {c}.; a cropped
      photo of @ {c}.; a bright photo of @ {c}.; a dark photo of @ {c}.; a close-up photo of @ {c}.; a black
      and white photo of @ {c}.; a pixelated photo of @ {c}.; a jpeg corrupted photo of @ {c}.; a blurry photo
      of @ {c}.; a good photo of @ {c}.; itap of @ {c}.; a photo of @ hard to see {c}.; a photo of @ clean
      {c}.; a photo of @ dirty {c}.; a photo of @ cool {c}.; a photo of @ large {c}.; a photo of @ nice {c}.;
      a photo of @ weird {c}.; a photo of @ small {c}.; a photo of many {c}.; a photo of my {c}.; a photo of
      one {c}.; itap of my {c}.""",
    'cifar': """a photo of @ {c}.; a blurry photo of @ {c}.; a black and white photo of @ {c}.; a low contrast
      photo of @ {c}.; a high contrast photo of @ {c}.; a bad photo of @ {c}.; a good photo of @ {c}.; a photo
      of @ small {c}.; a photo of @ big {c}.""",
    'Caltech101': """a photo of @ {c}.; a painting of @ {c}.; a sculpture of @ {c}.; a sketch of @ {c}.; a
      tattoo of @ {c}.; a rendition of @ {c}.; art of @ {c}.; graffiti of @ {c}.; a drawing of @ {c}.; a
      doodle of @ {c}.; @ embroidered {c}.; @ plastic {c}.; @ origami {c}.; @ toy {c}.; @ cartoon {c}.; @
      plushie {c}.; @ {c} in a video game.""",
    'Country211': """a photo i took in {c}.; a photo i took while visiting {c}.; a photo from my home country
      of {c}.; a photo from my visit to {c}.; a photo showing the country of {c}.""",
    'DTD': """a photo of @ {c} texture.; a photo of @ {c} pattern.; a photo of @ {c} thing.; a photo of @ {c}
      object.""",
    'EuroSAT': 'a centered satellite photo of {c}.; a centered satellite photo of @ {c}.',
    'FER2013': """a photo of a {c} looking face.; a photo of a face showing the emotion: {c}.; a photo of a
      face looking {c}.; a face that looks {c}.; they look {c}.; look at how {c} they are.""",
    'FGVCAircraft': 'a photo of @ {c}, a type of aircraft.',
    'Flowers102': 'a photo of a {c}, a type of flower.',
    'Food101': 'a photo of {c}, a type of food.',
    'GTSRB': """a zoomed in photo of a "{c}" traffic sign.; a centered photo of a "{c}" traffic sign.; a close
      up photo of a "{c}" traffic sign.""",
    'MNIST': 'a photo of the number: "{c}".',
    'OxfordIIITPet': 'a photo of a {c}, a type of pet.',
    'PCAM': 'a histopathology slide showing {c}; histopathology image of {c}',
    'RenderedSST2': 'a {c} review of a movie.',
    'STL10': 'a photo of @ {c}.',
    'SVHN': """a photo of the number {c} written on a sign; an outdoor house number {c}; the number {c} in the
      center of the image; an outdoor number {c} writte on a sign; an outdoor number {c}; a centered image of
      the number {c}""",
    'StanfordCars': """a photo of @ {c}.; a photo of my {c}.; i love my {c}!; a photo of my dirty {c}.; a
      photo of my clean {c}.; a photo of my new {c}.; a photo of my old {c}.""",
}
TEMPLATES = {name: listed(text) for name, text in TEMPLATES.items()}
TEMPLATES['imagenet'] += TEMPLATES['Caltech101']
TEMPLATES |= {'CIFAR10': TEMPLATES['cifar'], 'CIFAR100': TEMPLATES['cifar'], 'SUN397': TEMPLATES['STL10']}
# CLIP_benchmark's class names (en_classnames.json) in the order of torchvision's labels, where torchvision
# has none or others; or only those that differ: torchvision's=CLIP_benchmark's
CLASS_NAMES = {
    'Caltech101': """Faces=off-center face; Faces_easy=centered face; Leopards=leopard; Motorbikes=motorbike;
      airplanes=airplane; car_side=side of a car; cougar_body=body of a cougar cat; cougar_face=face of a
      cougar cat; crocodile_head=head of a  crocodile; flamingo_head=head of a flamingo; snoopy=snoopy
      (cartoon beagle); yin_yang=yin and yang symbol""",
    'Country211': """Andorra; United Arab Emirates; Afghanistan; Antigua and Barbuda; Anguilla; Albania;
      Armenia; Angola; Antarctica; Argentina; Austria; Australia; Aruba; Aland Islands; Azerbaijan; Bosnia and
      Herzegovina; Barbados; Bangladesh; Belgium; Burkina Faso; Bulgaria; Bahrain; Benin; Bermuda; Brunei
      Darussalam; Bolivia; Bonaire, Saint Eustatius and Saba; Brazil; Bahamas; Bhutan; Botswana; Belarus;
      Belize; Canada; DR Congo; Central African Republic; Switzerland; Cote d'Ivoire; Cook Islands; Chile;
      Cameroon; China; Colombia; Costa Rica; Cuba; Cabo Verde; Curacao; Cyprus; Czech Republic; Germany;
      Denmark; Dominica; Dominican Republic; Algeria; Ecuador; Estonia; Egypt; Spain; Ethiopia; Finland; Fiji;
      Falkland Islands; Faeroe Islands; France; Gabon; United Kingdom; Grenada; Georgia; French Guiana;
      Guernsey; Ghana; Gibraltar; Greenland; Gambia; Guadeloupe; Greece; South Georgia and South Sandwich Is.;
      Guatemala; Guam; Guyana; Hong Kong; Honduras; Croatia; Haiti; Hungary; Indonesia; Ireland; Israel; Isle
      of Man; India; Iraq; Iran; Iceland; Italy; Jersey; Jamaica; Jordan; Japan; Kenya; Kyrgyz Republic;
      Cambodia; St. Kitts and Nevis; North Korea; South Korea; Kuwait; Cayman Islands; Kazakhstan; Laos;
      Lebanon; St. Lucia; Liechtenstein; Sri Lanka; Liberia; Lithuania; Luxembourg; Latvia; Libya; Morocco;
      Monaco; Moldova; Montenegro; Saint-Martin; Madagascar; Macedonia; Mali; Myanmar; Mongolia; Macau;
      Martinique; Mauritania; Malta; Mauritius; Maldives; Malawi; Mexico; Malaysia; Mozambique; Namibia; New
      Caledonia; Nigeria; Nicaragua; Netherlands; Norway; Nepal; New Zealand; Oman; Panama; Peru; French
      Polynesia; Papua New Guinea; Philippines; Pakistan; Poland; Puerto Rico; Palestine; Portugal; Palau;
      Paraguay; Qatar; Reunion; Romania; Serbia; Russia; Rwanda; Saudi Arabia; Solomon Islands; Seychelles;
      Sudan; Sweden; Singapore; St. Helena; Slovenia; Svalbard and Jan Mayen Islands; Slovakia; Sierra Leone;
      San Marino; Senegal; Somalia; South Sudan; El Salvador; Sint Maarten; Syria; Eswatini; Togo; Thailand;
      Tajikistan; Timor-Leste; Turkmenistan; Tunisia; Tonga; Turkey; Trinidad and Tobago; Taiwan; Tanzania;
      Ukraine; Uganda; United States; Uruguay; Uzbekistan; Vatican; Venezuela; British Virgin Islands; United
      States Virgin Islands; Vietnam; Vanuatu; Samoa; Kosovo; Yemen; South Africa; Zambia; Zimbabwe""",
    'EuroSAT': """annual crop land; forest; brushland or shrubland; highway or road; industrial buildings or
      commercial buildings; pasture land; permanent crop land; residential buildings or homes or apartments;
      river; lake or sea""",
    'FER2013': 'angry; disgusted; fearful; happy; sad; surprised; neutral',  # there A to Z, as its files are
    'Flowers102': """globe-flower=globe flower; pink-yellow dahlia?=pink and yellow dahlia; ball moss=air
      plant""",
    'GTSRB': """○ 20 kph speed limit; ○ 30 kph speed limit; ○ 50 kph speed limit; ○ 60 kph speed limit; ○ 70
      kph speed limit; ○ 80 kph speed limit; end / de-restriction of 80 kph speed limit; ○ 100 kph speed
      limit; ○ 120 kph speed limit; ○ red car and black car no passing; ○ red truck and black car no passing;
      △ road intersection warning; white and yellow diamond priority road; red and white upside down triangle
      yield right-of-way; stop; empty ○; ○ no truck entry; red circle with white horizonal stripe no entry; △
      with exclamation mark warning; △ with black left curve approaching warning; △ with black right curve
      approaching warning; △ with black double curve approaching warning; △ rough / bumpy road warning; △ car
      skidding / slipping warning; △ with merging / narrow lanes warning; △ with person digging / construction
      / road work warning; △ with traffic light approaching warning; △ with person walking warning; △ with
      child and person walking warning; △ with bicyle warning; △ with snowflake / ice warning; △ with deer
      warning; white circle with gray strike bar no speed limit; ● right turn arrow mandatory; ● left turn
      arrow mandatory; ● forward arrow mandatory; ● forward or right turn arrow mandatory; ● forward or left
      turn arrow mandatory; ● keep right arrow mandatory; ● keep left arrow mandatory; ● arrows indicating a
      traffic circle; white circle with gray strike bar indicating no passing for cars has ended; white circle
      with gray strike bar indicating no passing for trucks has ended""",
    'MNIST': '0; 1; 2; 3; 4; 5; 6; 7; 8; 9',
    'PCAM': 'lymph node; lymph node containing metastatic tumor tissue',
    'SVHN': 'zero; one; two; three; four; five; six; seven; eight; nine',
}
NAMES = 'give --classnames FILE, a name a line, line 1 for label 0'
SHORT = '\nAnswer the question using a single word or phrase.'  # how LLaVA is asked


def class_set(
    name, split='test', root='', download=False, classnames='', templates='', caption_key='text', index_dir=''
) -> ClassSet:
    """name: 'easyvqa'; a folder (metadata.jsonl, whose captions are the classes; CLIP_benchmark's layout:
    classnames.txt, SPLIT/*.tar; or one for each class); 'SPLIT/*.tar'; or a class of torchvision.datasets.
    classnames, templates: files, a line each, instead of the data's own; templates: or a key of TEMPLATES."""
    path, file, whose, pattern = Path(name), classnames, 'captions', name.endswith('.tar')
    inner = Path(data.shard_files(name)[0]).parent if pattern else path / split
    tars = name if pattern else inner if any(inner.glob('*.tar')) else None
    named = file or tars or (path / 'classnames.txt').is_file()

    def shipped(file: str) -> Path:
        return inner / file if (inner / file).is_file() else inner.parent / file

    nested = path.is_dir() and not named and data.tables_of(data.split_folder(path, split))
    if name == 'easyvqa' or data.has_table(path) or data.has_table(path / split) or nested:
        found = captions_as_classes(name, split, caption_key)
    elif tars:
        how = (name, '') if pattern else (f'{path}, split {split}', split)
        found = shards(tars, shipped('zeroshot_classification_templates.txt'), *how, index_dir)
        file = file or shipped('classnames.txt')
    elif path.is_dir():
        found, file = image_folder(path, split), file or path / 'classnames.txt'
    elif inspect.isclass(getattr(torchvision.datasets, name, None)):
        found = from_torchvision(name, split, root, download)
        whose = 'CLIP_benchmark' if name in TEMPLATES else 'torchvision'
    else:
        known = "'easyvqa', or a class of torchvision.datasets such as CIFAR10 (upper and lower case matter)"
        data.fail(f'--data {name}: no such folder, and no name that is known: {known}')
    if file:
        names = data.read_lines(Path(file), f'--data {name}: no class names ({NAMES})')
        if len(names) != len(found.classes or names):  # of shards nothing is known before they are read
            data.fail(f'{file} has {len(names)} lines; {found.note} has {len(found.classes)} classes')
        found.classes, whose = names, f'--classnames {file}' if classnames else 'its classnames.txt'
    if templates:
        flag = f'--templates (also: {", ".join(TEMPLATES)})'
        found.templates = TEMPLATES.get(templates) or data.read_lines(Path(templates), flag)
    if wrong := [template for template in found.templates if '{c}' not in template]:
        data.fail(f'{found.note}: the template {wrong[0]!r} has no {{c}}, where the class name goes')
    if len(found.classes) < 2:
        data.fail(f'--data {name}: {len(found.classes) or "no"} class names for it; 2 at least: {NAMES}')
    known = [f"CLIP_benchmark's for {key}" for key, of in TEMPLATES.items() if of == found.templates]
    by = [*known, f'--templates {templates}' if templates else 'its own'][0]
    first = found.templates[0].replace('{c}', found.classes[0])
    odd = [name for name, times in Counter(found.classes).items() if times > 1 or not name]
    found.note += f' (class names: {whose}; templates: {by}, as {first!r})'
    found.note += f'; empty or equal names, of which the first wins: {odd}' if odd else ''
    return found


def captions_as_classes(name: str, split: str, caption_key: str) -> ClassSet:
    """easyvqa: all its colours and shapes, as 'a red circle'. A folder: the captions that it has."""
    pairs, easy = data.load_pairs(name, split, caption_key=caption_key), name == 'easyvqa'
    classes = [f'{c} {s}' for c in data.COLOURS for s in data.SHAPES] if easy else sorted(set(pairs.captions))
    template = 'a {c}' if easy else '{c}'
    label = {template.replace('{c}', c): i for i, c in enumerate(classes)}
    of, labels = pairs.files, [label[c] for c in pairs.captions]
    how = classes, [template], pairs.note, split
    return ClassSet(len(of), lambda i: (data.read_image(of[i]), labels[i]), *how)


def tars_in(where: Path | str, caption_key: str = 'text', index_dir: str = '') -> data.Shards:
    """where: a folder of tars, of which nshards.txt, if it is there, says how many; or a pattern of tars"""
    files = data.shard_files(where if isinstance(where, str) else f'{glob.escape(str(where))}/*.tar')
    said = Path(where) / 'nshards.txt'
    if said.is_file() and (text := data.read_text(said, '--data').strip()) != str(len(files)):
        data.fail(f'{said} says {text} shards; there are {len(files)} *.tar')
    return data.Shards(files, caption_key, index_dir)


def shards(where: Path | str, templates: Path, note: str, split: str, index_dir: str) -> ClassSet:
    """CLIP_benchmark's layout: classnames.txt, templates, SPLIT/*.tar with images and .cls; or, in place of
    that, as for training, .txt, which names its class"""
    tars = tars_in(where, index_dir=index_dir)

    def item(number: int) -> tuple[Image.Image, int]:
        name, found = tars.members(number)
        if 'txt' in found and 'cls' not in found:
            image = tars.image(name, found)
            with contextlib.suppress(data.BadSample):
                return image, data.Prompts(images.classes, []).label(tars.caption(name, found, 0, number))
        if not (label := found.get('cls', b'').strip()).removeprefix(b'-').isdigit():
            had = f'{label[:20]!r} is no class number' if 'cls' in found else 'but no cls'
            data.fail(f'{name}: has {", ".join(found)}, {had}')
        return tars.image(name, found), int(label)

    used = data.read_lines(templates, 'templates') if templates.is_file() else TEMPLATES['imagenet']
    images = ClassSet(len(tars), item, [], used, note, split)
    return images


def image_folder(path: Path, split: str) -> ClassSet:
    """A folder for each class, in SPLIT/ where there is one; line i of classnames.txt names the i-th. Sorted
    as by torchvision's ImageFolder, or as numbers if all are (ImageNetV2); nothing that is hidden counts."""
    root, find = data.split_folder(path, split), partial(glob.glob, '**/*.*', recursive=True)
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != '.')
    names.sort(key=int if all(map(str.isdecimal, names)) else str)
    files = [(root / c / f, i) for i, c in enumerate(names) for f in sorted(find(root_dir=root / c))]
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    of = [(file, label) for file, label in files if file.suffix.lower() in endings]
    if not of:
        data.fail(f'--data {path}, split {split}: neither *.tar, nor images in subfolders of {root}')
    others = len(files) - len(of)
    note = f'{root}, without {others} files that are no images' if others else f'{root}'
    how = names, TEMPLATES['imagenet'], note, split if root != path else ''
    return ClassSet(len(of), lambda i: (data.read_image(of[i][0]), of[i][1]), *how)


def from_torchvision(name: str, split: str, root: str, download: bool) -> ClassSet:
    """Any data set of torchvision whose items are (image, label), with CLIP_benchmark's names where known."""
    images, theirs, split = data.torchvision_set(name, split, root, download)
    classes, marks = listed(CLASS_NAMES.get(name, '')), {'CIFAR100': '', 'SUN397': '_/'}.get(name, '_')
    if name not in CLASS_NAMES or '=' in CLASS_NAMES[name]:  # marks: what CLIP_benchmark turns into spaces
        renamed, spaced = dict(c.split('=') for c in classes if c), str.maketrans(marks, ' ' * len(marks))
        classes = [renamed.get(c) or c.translate(spaced) for c in theirs]
    if len(theirs) not in (0, len(classes)):
        data.fail(f'--data {name}: {len(theirs)} classes in --root {root}, of {len(classes)}')

    def item(number: int) -> tuple[Image.Image, int]:
        with data.reading(f"image {number} of torchvision's {name}", 'an image and a class number'):
            image, label = images[number]
            return data.to_rgb(image), int(label)

    templates, note = TEMPLATES.get(name, TEMPLATES['imagenet']), f'torchvision.datasets.{name} {split}'
    return ClassSet(len(images), item, classes, templates, note.strip(), split)


def caption_set(name: str, split='test', caption_key='text', index_dir='') -> tuple[int, Callable, Callable]:
    """(how many images, number → captions, number → image) of 'easyvqa', a folder with metadata.jsonl (an
    image may have several lines), or shards, whose texts have a caption a line (CLIP_benchmark's MS-COCO)"""
    pattern = name.endswith('.tar')
    where = name if pattern else data.split_folder(Path(name), split)
    if pattern or any(where.glob('*.tar')):
        tars = tars_in(where, caption_key, index_dir)

        def captions(number: int) -> list[str]:
            text = tars.caption(*tars.members(number), 0, number)
            return [c.strip() for c in text.split('\n') if c.strip()]

        return len(tars), captions, lambda number: tars.image(*tars.members(number))
    pairs, of = data.load_pairs(name, split, caption_key=caption_key), {}
    for file, caption in zip(pairs.files, pairs.captions):
        of.setdefault(file, []).append(caption)
    files = list(of)
    return len(of), lambda number: of[files[number]], lambda number: data.read_image(files[number])


# ------------------------------------------------------------------------------------- questions and captions
@dataclass
class Question:
    """Something that is asked about an image: a question with an answer, or for a caption."""

    image: Path
    text: str
    answers: list[str]  # of ten annotators (VQAv2, TextVQA), reference captions, or the one that is right
    name: str  # which one it is, for reports
    towards: tuple[str, ...] = ()  # answers that the last rounds of an attack try to get
    facts: tuple[str, str] | None = None  # of easyvqa's captions: colour and shape
    # Attacks on the answer: ('away' from | 'towards', a text; None: what it says then, unless another round
    # names that), or ('again', ''): from the worst image so far on, in full precision. They want a low score.
    rounds: list[tuple[str, str | None]] = ()
    score: Callable[[str], float] | None = None

    def __post_init__(self):
        if not self.image.is_file():
            data.fail(f'--data: no image {self.image}; see --image_root')
        if not self.answers:
            data.fail(f'--data (or --annotations): question {self.name}, on {self.image}, has no answers')


def vqa_set(name: str, split: str = 'test', annotations: str = '', image_root: str = '') -> list[Question]:
    """'easyvqa'; TextVQA's file; or questions in VQA's format, with annotations, the file of the answers: of
    VQAv2 or OK-VQA (an image is a number), TextVQA (a name without .jpg) or VizWiz (a name)"""
    if name == 'easyvqa':
        _, asked, root = data.easyvqa_split(split)
        rows = [(root / f'{image}.png', text, [answer]) for text, answer, image in asked]
        return [Question(*each, f'{n}', ('maybe', 'Word')) for n, each in enumerate(rows)]
    content, root, found = data.read_json(Path(name), '--data'), Path(image_root), []
    with data.reading(f'--data {name}', 'the published file'):
        if 'questions' in content:
            what = f"--data {name}: VQAv2's questions, of which the answers are in --annotations FILE"
            answers = data.read_json(Path(annotations), what)
            with data.reading(f'--annotations {annotations}', 'the published file'):
                of = answers['annotations']
                answers = {a['question_id']: [b['answer'] for b in a['answers']] for a in of}
            asked = [{**q, 'answers': answers.get(q['question_id'])} for q in content['questions']]
        elif 'data' in content:
            asked = content['data']
        else:
            data.fail(f'--data {name}: neither VQAv2 (it has a key "questions") nor TextVQA (a key "data")')
        for q in asked:
            number, image = f'{q["question_id"]}', q['image_id']
            if isinstance(image, int):  # of COCO, whose folders are called val2014, …
                image = f'COCO_{content.get("data_subtype") or root.resolve().name}_{image:012d}'
            file = data.inside(image_root, image if Path(image).suffix else f'{image}.jpg')
            found.append(Question(file, q['question'] + SHORT, q.get('answers'), number, ('maybe', 'Word')))
    return found


def pope_set(name: str, split: str = 'test', image_root: str = '') -> list[Question]:
    """easyvqa's balanced yes/no questions, or a file of POPE, or LLaVA's of it, which has no labels: the k-th
    question of a category has the k-th of coco_pope_CATEGORY.json beside it (as in its eval_pope.py)"""
    found, labelled, other = [], {}, {'yes': ('no',), 'no': ('yes',)}
    if name == 'easyvqa':
        asked = vqa_set(name, split)
        kept = [asked[i] for i in data.balanced([(q.text, *q.answers) for q in asked])]
        return [replace(q, towards=other[q.answers[0]]) for q in kept]
    with data.reading(f'--data {name}', '{"question_id", "image", "text", "label": "yes" | "no"} a line'):
        lines = data.read_text(Path(name), f'--data {name}').split('\n')
        for q in map(data.from_json, filter(str.strip, lines)):
            number, image = f'{q["question_id"]}', data.inside(image_root, q['image'])
            if 'label' not in q:
                file = data.inside(Path(name).parent, f'coco_pope_{q["category"]}.json')
                if file not in labelled:
                    labelled[file] = pope_set(f'{file}', split, image_root)
                own = labelled[file].pop(0)
                q['label'] = own.answers[0]
                if own.image != image or own.text.split(' in ')[0] not in q['text']:
                    raise ValueError(f'question {number} is not the same as in {file}')
            text, label = q['text'].removesuffix(SHORT) + SHORT, q['label'].lower()
            if label not in other:
                data.fail(f'--data {name}: question {number} has the label {label!r}; must be yes or no')
            found.append(Question(image, text, [label], number, other[label]))
    return found


def sqa_set(name: str, split: str = 'test', image_root: str = '') -> list[Question]:
    """ScienceQA's folder: the questions with an image, asked as LLaVA 1.5 is asked; the answer is a letter.
    official: LLaVA convert_sqa_to_llava_base_prompt.py (CQM), model_vqa_science.py (--single-pred-prompt)"""
    folder, root, found = Path(name), Path(image_root or f'{name}/images'), []
    problems = data.read_json(folder / 'problems.json', '--data')
    splits = data.read_json(folder / 'pid_splits.json', '--data')
    if split not in splits:
        data.fail(f'--split {split}: {folder / "pid_splits.json"} has {", ".join(splits)}')
    for number in splits[split]:
        with data.reading(f'--data {name}', f'the published files (problem {number})'):
            p = problems[number]
            letters, hint = 'ABCDEFGHIJ'[: len(p['choices'])], p.get('hint', '').strip() or 'N/A'
            options = ' '.join(f'({letter}) {choice}' for letter, choice in zip(letters, p['choices']))
            text = f'Context: {hint}\nQuestion: {p["question"]}\nOptions: {options}'
            text = text.replace('  ', ' ').strip()
            text += "\nAnswer with the option's letter from the given choices directly."
            if p.get('image'):
                right = dict(enumerate(letters))[p['answer']]
                image = data.inside(root, f'{p.get("split", split)}/{number}/{p["image"]}')
                found.append(Question(image, text, [right], number, tuple(letters.replace(right, ''))))
    return found


def reference_set(name: str, split: str = 'test', image_root: str = '') -> tuple[list[Question], str]:
    """'easyvqa' (five sentences from two facts), Karpathy's dataset_*.json, or COCO's captions_*.json;
    and the split, of which COCO's file names none"""
    if name == 'easyvqa':
        facts, _, root = data.easyvqa_split(split)
        rows = [(root / f'{i}.png', data.describe(*of), f'{i}', of) for i, of in facts.items()]
        found = [Question(file, data.CAPTION_QUESTION, texts, n, facts=of) for file, texts, n, of in rows]
        return found, split
    content, of = data.read_json(Path(name), '--data'), {}
    with data.reading(f'--data {name}', "Karpathy's dataset_*.json or COCO's captions_*.json"):
        if 'annotations' in content:
            split = ''
            for a in content['annotations']:
                of.setdefault(a['image_id'], []).append(a['caption'])
            rows = [(i['file_name'], of[i['id']], f'{i["id"]}') for i in content['images'] if i['id'] in of]
        else:
            splits = (split, 'restval') if split == 'train' else (split,)  # as most papers count it
            images = [i for i in content['images'] if i['split'] in splits]
            files = [f'{Path(i.get("filepath", ""), i["filename"])}' for i in images]
            texts = [[sentence['raw'] for sentence in i['sentences']] for i in images]
            rows = zip(files, texts, [i['filename'] for i in images])
        rows = [(data.inside(image_root, file), texts, number) for file, texts, number in rows]
        found = [Question(file, data.CAPTION_QUESTION, texts, number) for file, texts, number in rows]
    if not found:
        there = {i.get('split', 'images, but no captions') for i in content['images']}
        said = f'no image of --split {split or "–"}; it has {", ".join(sorted(there)) or "none"}'
        data.fail(f'--data {name}: {said}')
    return found, split


# ===================================================================================================== output
def percent(fraction: float | None) -> str:
    return '–' if fraction is None else f'{100 * fraction:.1f}'


def attack_text(args) -> str:
    where = 'before the resize, on native pixels' if args.native else "at the model's resolution"
    name = ATTACKS[args.attack]
    if 'iterations' in args and args.attack != 'none':
        name = f'APGD {args.iterations} away from each distinct reference, again from the worst image'
    return name if args.attack == 'none' else f'{name}; l∞, ε in 1/255, {where}'


def table(rows: list[dict], down: list[str], across: str, cell=lambda r: percent(r['value'])) -> str:
    """Markdown, values in %: a line for the rows that agree in the keys `down`, a column for each value of
    the key `across`. Columns of numbers are set to the right.   cell: row → what is shown of it"""
    lines: dict[tuple, dict] = {}
    for r in rows:
        lines.setdefault(tuple(r[key] for key in down), {})[r.get(across)] = cell(r)
    columns = list(dict.fromkeys(r[across] for r in rows)) if across else []
    head = {'eps': 'ε = {:g}', 'height': '{:g} %'}.get(across, '{}')
    cells, printed = [[*down, *(head.format(c) for c in columns)]], []
    for key, of in lines.items():
        names = [f'{v:g}' if isinstance(v, float) else f'{v}' for v in key]
        cells.append(names + [of.get(c, '–') for c in columns])
    for name, *column in zip(*cells):
        width = max(map(len, [name, *column]))
        numbers = all(re.fullmatch('[0-9.± ]+|–', cell) for cell in column)
        side, rule = '>' if numbers else '<', '-' * (width + 1) + (':' if numbers else '-')
        first, *others = (f' {cell:{side}{width}} ' for cell in [name, *column])
        printed.append([first, rule, *others])
    return '\n'.join('|' + '|'.join(line) + '|' for line in zip(*printed))


METHODS = {
    'vanilla': 'vanilla CLIP',
    'tecoa': 'TeCoA',
    'fare': 'FARE',
    'anchored': 'anchored',
    'delta': 'ΔCLIP',
}
METHODS |= {f'{key}_tenth': f'{METHODS[key]}, a tenth' for key in ('tecoa', 'fare', 'anchored')}
METHODS |= {'half': 'half of vanilla CLIP', 'k1': 'K = 1', 'k3': 'K = 3', 'eps8': 'ε = 8'}
METHODS |= {'eps20': 'ε = 20', 'no_clean_start': 'no clean start', 'half_size': 'half the resolution first'}
METHODS |= {'groups': 'negatives in groups of 8', 'drop': 'half of the patches'}


def tables(args) -> int:
    """What zeroshot, transfer and audit have measured of runs METHOD.SEED, in DIR/*/*.json, as Markdown

    DIR: such as results. For each folder, data set, attack and --subset: accuracy in %, mean ± standard
    deviation over seeds (of one seed ± its standard error), what the trainings cost, and a digest of the
    code that trained. Writes DIR/tables.md, DIR/rows.jsonl (each row with command, seed, commit and the
    training of its model) and, of DIR/ablation, DIR/ablation.png."""
    root, order, rows, text = Path(args.dirs[0]), [*METHODS.values()], [], []
    for file in sorted(root.glob('*/*.json')):
        report = data.read_json(file, str(root))
        kept = {key: report.get(key) for key in ('command', 'commit', 'seed')}
        for r in report.get('rows', []) if report.get('trained') else []:
            name, _, seed = Path(r['model']).name.rpartition('.')
            if r['measure'] in ('accuracy', 'audit') and seed.isdigit() and r['model'] in report['trained']:
                kind = 'audit' if r['measure'] == 'audit' else 'transfer' if 'source' in r else 'zeroshot'
                about = {'table': f'{file.parent.name}: {kind}', 'method': METHODS.get(name, name)}
                rows.append({**about, **r, **kept, 'trained': report['trained'][r['model']]})
    rows.sort(key=lambda r: (r['table'], order.index(r['method']) if r['method'] in order else -1, r['eps']))
    attack = {(r['table'], r['model']): r['attack'] for r in rows if r['eps']}
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        by = r['attack'] if r['eps'] else attack.get((r['table'], r['model']), 'none')
        key = r['table'], Path(r['data']).name, r['split'], r['n'], by, r.get('subset') or 'all'
        groups.setdefault(key, []).append(r)
    for (title, *of_what, n, by, part), of in groups.items():
        text.append(f'## {title}, {" ".join(of_what)}, {part} captions, n = {n}, {by}')
        if title.endswith('zeroshot'):
            text.append(table(over_seeds(of), ['model', 'seeds'], 'column', lambda r: r['value']))
        elif title.endswith('transfer'):
            of = [{**r, 'attacked': f'{Path(r["source"]).name}, ε = {r["eps"]:g}'} for r in of]
            text.append(table(of, ['attacked'], 'method'))
        else:
            of = [{**r, 'model': f'{r["method"]} {r["defence"] or ""} ε = {r["eps"]:g}'} for r in of]
            text.append(table(of, ['check'], 'model', lambda r: r['verdict']))
            text += [f'* {r["model"]}: {r["check"]}: {r["figure"]}' for r in of if r['verdict'] == 'FAIL']
    data.write(root / 'rows.jsonl', ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows))
    data.write(root / 'tables.md', '\n\n'.join(text) + '\n')
    print('\n\n'.join(text))
    if of := [r for r in rows if r['table'] == 'ablation: zeroshot' and r['eps'] == 8]:
        against_flops(root / 'ablation.png', of)
    return 0


def over_seeds(rows: list[dict]) -> list[dict]:
    """→ [{model, seeds, column, value: what is shown}]"""
    found = []
    for name in dict.fromkeys(r['method'] for r in rows):
        of_name, shown = [r for r in rows if r['method'] == name], {}
        for eps in dict.fromkeys(r['eps'] for r in of_name):
            of = {r['trained']['seed']: r for r in of_name if r['eps'] == eps}
            values, errors = zip(*((r['value'], r['stderr']) for r in of.values()))
            error = stdev(values) if len(of) > 1 else errors[0]
            shown[f'ε = {eps:g}' if eps else 'clean'] = f'{percent(fmean(values))} ± {percent(error)}'
        for key, head, unit in (
            ('passes', 'M passes', 1e6),
            ('flops', 'TFLOP', 1e12),
            ('minutes', 'minutes', 1),
        ):
            costs = [r['trained'][key] for r in of_name]
            shown[head] = '–' if None in costs else f'{fmean(costs) / unit:.3g}'
        shown['code'] = ' '.join(dict.fromkeys(' '.join(r['trained']['code'] for r in of_name).split()))
        seeds = ' '.join(map(str, sorted({r['trained']['seed'] for r in of_name})))
        found += [{'model': name, 'seeds': seeds, 'column': key, 'value': shown[key]} for key in shown]
    return found


def against_flops(file: Path, rows: list[dict]) -> None:
    """Accuracy against what the training cost, a point for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.add_subplot()
    for name in dict.fromkeys(r['method'] for r in rows):
        of = [r for r in rows if r['method'] == name]
        axes.plot([r['trained']['flops'] / 1e12 for r in of], [100 * r['value'] for r in of], 'o', label=name)
    axes.set(xlabel='TFLOP of the training', ylabel=f'accuracy in % at ε = {rows[0]["eps"]:g}/255')
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    data.write(file, partial(figure.savefig, dpi=150, format='png'))


def curves(file: Path, report: Report) -> None:
    """The plotted measures over ε, or over the letters' height, of the last data set (the average)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout='constrained')
    axes, last = figure.add_subplot(), report.rows[-1]
    x = 'height' if report.across == 'height' else 'eps'
    label = {'eps': 'ε in 1/255 (l∞)', 'height': 'height of the letters in % of the image'}[x]
    rows = [r for r in report.rows if r['measure'] in report.plotted and r['data'] == last['data']]
    for model, name in dict.fromkeys((r['model'], r['measure']) for r in rows):
        points = sorted((r[x], 100 * r['value']) for r in rows if (r['model'], r['measure']) == (model, name))
        axes.plot(*zip(*points), 'o-', label=f'{Path(model).name}, {name}')
    if rows[0].get('classes'):
        axes.axhline(100 / rows[0]['classes'], color='gray', linestyle=':', label='chance')
    axes.set(xlabel=label, ylabel='in %', ylim=(-2, 102))
    title = f'{Path(last["data"]).name} {last["split"]}, n = {last["n"]}, {last["attack"]}'
    axes.set_title(title, fontsize=10, wrap=True)
    axes.legend()
    axes.grid(alpha=0.3)
    data.write(file, partial(figure.savefig, dpi=150, format=file.suffix[1:]))


def changed(x: Tensor, x_adv: Tensor, eps: float, says: str) -> list[tuple[Tensor, str]]:
    """δ, scaled to gray ± 1/2, and x + δ, for `pictures`.   images [3, h, w] in [0, 1], ε in 1/255"""
    return [((x_adv - x) / (2 * eps / 255) + 0.5, f'δ, ε = {eps:g}/255'), (x_adv, f'x + δ: {says}')]


def pictures(file: Path, lines: list[list[tuple[Tensor, str]]], title: str) -> None:
    """A grid of (image [3, h, w] in [0, 1], caption)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(lines[0]), 2.9 * len(lines) + 0.3), layout='constrained')
    axes = figure.subplots(len(lines), len(lines[0]), squeeze=False)
    for place, (image, text) in zip(axes.flat, sum(lines, [])):
        place.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation='nearest')
        place.set_title(textwrap.fill(text, 28), fontsize=8)
        place.axis('off')
    figure.suptitle(title, fontsize=10)
    data.write(file, partial(figure.savefig, dpi=150, format=file.suffix[1:]))


def as_json(report: dict) -> str:
    """A row or an outcome is a line, so that files can be read and compared."""
    one = partial(json.dumps, ensure_ascii=False)
    lists = {key: ',\n  '.join(map(one, value)) for key, value in report.items() if isinstance(value, list)}
    lines = [f'"{key}": ' + (f'[\n  {lists[key]}\n]' if key in lists else one(report[key])) for key in report]
    return '{\n' + ',\n'.join(lines) + '\n}\n'


# -------------------------------------------------------------------------------------- RUN/eval and the card
def keep(report: dict, run: Path, args) -> None:
    """Writes the run's part of the report into RUN/eval/, and all results there into its card's header.
    The same measurement again replaces its file, another one adds one."""
    own = {key: [r for r in report[key] if Path(r['model']) == run] for key in ('rows', 'outcomes')}
    number = data.digest(identity(args))
    try:
        (run / 'eval').mkdir(exist_ok=True)
        folder = os.open(run, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        data.write(run / 'eval' / f'{args.command}_{number}.json', as_json({**report, **own}))
        write_card(run)
        os.close(folder)
    except (Exception, SystemExit) as e:  # the measurement goes on to --json, and the table is printed
        said = str(e).removeprefix('error: ')
        print(f'warning: not all kept in {run}: {said}', file=sys.stderr, flush=True)


def identity(args) -> list:
    """What a measurement is known by: its settings, and where its data are."""
    no_settings = 'run dirs data transfer_from index_dir json plot grid quiet batch_size'.split()
    no_settings += 'device rank world kept'.split()
    settings = {key: value for key, value in vars(args).items() if key not in no_settings}
    others = {'audit': [args.dirs, getattr(args, 'transfer_from', [])], 'transfer': [args.dirs]}
    used = sum(others.get(args.command, []), [*args.data])
    return [settings, sorted({os.path.realpath(p) if os.path.exists(p) else p for p in used})]


def write_card(run: Path) -> None:
    """`model-index` in the header of RUN/README.md, for the hub: all about the weights that are there"""
    file, results = run / 'README.md', []
    if not file.exists():
        return
    text = file.read_bytes().decode('utf-8')  # with the line ends that it has
    if not re.match(r'---\r?\n.*?\n---', text, re.DOTALL):
        data.fail(f'{file} has no header in YAML, so it can show no results')
    updates = data.settings_of(run).get('updates')
    for measured in sorted((run / 'eval').glob('*.json')):
        report = data.read_json(measured, str(run))
        if report.get('updates') == updates:
            rows = [r for r in report.get('rows', []) if r['value'] is not None]
            results += [result(r, command=measured.name.partition('_')[0]) for r in rows]
    card = ModelCard(text)
    card.data.model_name, card.data.eval_results = card.data.model_name or run.resolve().name, results
    data.write(file.resolve(), str(card))  # a link stays one


def result(r: dict, command: str):
    """A row as the hub has it."""
    tasks = {'caption': 'image-to-text', **dict.fromkeys(('vqa', 'pope', 'sqa'), 'visual-question-answering')}
    more = {key: value for key, value in r.items() if key not in COLUMNS and value is not None}
    under = [f'{r["attack"]} ε = {r["eps"]:g}/255'] if r['eps'] else []
    words = [r['measure'], *under, *(f'{key} {value}' for key, value in more.items() if key != 'figure')]
    name, measure = Path(r['data']).name, re.sub(r'\W+', '_', r['measure'].lower())
    how = {'metric_args': {key: r[key] for key in ('n', 'attack', 'eps', 'stderr')} | more}
    how |= {'dataset_split': r['split'], 'metric_name': ', '.join(words)}
    task = tasks.get(command, 'zero-shot-image-classification')
    return EvalResult(task, re.sub(r'\W+', '-', name.lower()), name, measure, r['value'], **how)


# =============================================================================================== command line
CLIP_DIRS = "a CLIP each: a run, a directory of open_clip or of Hugging Face's CLIPModel, or a repository id"
LLAVA_DIRS = 'a LLaVA each: a run, a directory of Hugging Face, adapters, a repository id; or an LLM alone'
HELP = {
    'seed': 'what samples and random starts are drawn from',
    'batch_size': 'images at a time, on each process; changes no result',
    'json': 'file to write what was measured into',
    'quiet': 'no progress bar',
    'data': "'easyvqa', or what is said above; a folder as for training",
    'split': 'choose on val, report on test',
    'caption_key': 'which key of metadata.jsonl (column of metadata.csv) or of shards has the captions',
    'index_dir': 'for the indexes of shards; default: beside these',
    'n': 'images (questions of each kind), drawn by --seed; 0: all',
    'attack': '; '.join(f'{name}: {text}' for name, text in ATTACKS.items()),
    'eps': 'radius in 1/255',
    'native': "attack before the resize, on the image's own pixels",
    'plot': 'draw it (png, pdf or svg)',
    'subset': "captions that the run's --holdout left out, or kept",
    'root': 'where data sets of torchvision are',
    'download': 'let torchvision fetch the data set into --root',
    'classnames': 'file of class names, a line each, line 1 for label 0',
    'templates': "file of prompts with {c} for the name, a line each; or 'imagenet' (80), 'cifar' (18), …",
    'font': 'height of the letters in %% of the image',
    'grid': 'also draw clean | δ | x+δ of one image, targeted',
    'grid_eps': 'radii of --grid in 1/255',
    'target': 'class that --grid goes towards; default: a wrong one, drawn by --seed',
    'transfer_from': 'models to transfer attacks from; default: the other DIRs',
    'queries': 'of Square Attack',
    'defence': 'at test time, around each model: is it one?',
    'image': 'file',
    'labels': "texts to choose from, separated by commas: 'a cat,a dog'",
    'label': 'the true one, which is attacked; default: what the model sees in the clean image',
    'image_root': 'folder that the images of the file lie in',
    'annotations': 'VQAv2: the file of the answers',
    'questions': 'easyvqa: only what, yes/no or all',
    'iterations': 'of each round of the attack',
    'max_new': 'tokens of an answer (TextVQA: 10)',
    'prompt': "'v1' (Vicuna), 'chat' (the LLM's own template); default: as it was trained, else chat",
    'threshold': 'CIDEr below which an image is dropped from later rounds (COCO 10, Flickr30k 2)',
    'targeted': 'sentences: measure how often they can be forced, instead',
}
CHOICES = {'subset': ['all', 'held-out', 'seen'], 'defence': ['', *DEFENCES], 'prompt': ['', 'v1', 'chat']}
EVERY = {'seed': 0, 'batch_size': 32, 'json': '', 'quiet': False}
SET = {'data': ['easyvqa'], 'split': 'test', 'n': 500}
PAIRS = {**SET, 'caption_key': 'text', 'index_dir': ''}
CLASSES = {**PAIRS, 'root': 'data', 'download': False, 'classnames': '', 'templates': ''}
ATTACKED = {'attack': 'ensemble', 'native': False}
ROUNDS = {**SET, 'image_root': '', 'attack': 'ensemble', 'eps': [12.0], 'iterations': 100, 'prompt': ''}
LETTERS, SHOWN = {'font': [0.0, 5.0, 10.0, 15.0, 20.0, 30.0]}, {'image': None, 'labels': None, 'label': ''}
COMMANDS = {  # a command: its flags and their defaults; None: it must be given
    zeroshot: {**CLASSES, **ATTACKED, 'eps': [2.0, 4.0, 8.0, 16.0], 'subset': 'all', 'plot': ''},
    retrieval: {**PAIRS, **ATTACKED, 'eps': [2.0, 4.0, 8.0], 'plot': ''},
    typographic: {**CLASSES, **LETTERS, 'plot': '', 'grid': '', 'grid_eps': [16.0, 32.0, 64.0], 'target': ''},
    audit: {
        **CLASSES,
        **ATTACKED,
        'n': 100,
        'eps': [8.0],
        'transfer_from': [],
        'queries': 5000,
        'defence': '',
    },
    transfer: {**CLASSES, 'eps': [8.0]},
    tables: {},
    show: {**SHOWN, 'attack': 'ensemble', 'eps': [8.0], 'plot': 'show.png'},
    vqa: {**ROUNDS, 'max_new': 5, 'annotations': '', 'questions': []},
    pope: {**ROUNDS, 'max_new': 5},
    sqa: {**ROUNDS, 'max_new': 5, 'data': None},
    caption: {**ROUNDS, 'max_new': 20, 'threshold': 10.0, 'targeted': [], 'grid': ''},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = data.Parser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)
    for run, defaults in COMMANDS.items():
        texts = {'help': run.__doc__.split('\n')[0], 'description': run.__doc__}
        c = commands.add_parser(run.__name__, allow_abbrev=False, **texts)
        llava = 'iterations' in defaults
        c.add_argument('dirs', nargs='+', metavar='DIR', help=LLAVA_DIRS if llava else CLIP_DIRS)
        c.set_defaults(run=run, native=False, attack='', eps=[], data=[])
        few = ['ensemble', 'none'] if llava else ['ensemble'] if run is audit else list(ATTACKS)
        more = {'batch_size': 128} if torch.cuda.is_available() and not llava else {}
        for flag, default in ({**EVERY, **more, **defaults} if run is not tables else defaults).items():
            first = default[0] if isinstance(default, list) and default else default
            shown = [] if default in (None, '') or default is False else default
            shown = ' '.join(map(str, shown if isinstance(shown, list) else [shown]))
            text = HELP[flag] + (f' (default: {shown})' if shown else '')
            how = {'default': default, 'help': text, 'required': default is None}
            if isinstance(default, bool):
                how['action'] = 'store_true'
            else:
                how['type'] = data.NUMBERS.get(type(first), str)
                how['choices'] = few if flag == 'attack' else CHOICES.get(flag)
            if isinstance(default, list) or flag == 'data':
                how['nargs'] = '*' if flag in ('eps', 'transfer_from') else '+'
            c.add_argument(f'--{flag}', **how)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f'unrecognized arguments: {" ".join(unknown)}')
    args.dirs = list({os.path.realpath(p): p for p in reversed(args.dirs)}.values())[::-1]  # each once
    for message in wrong_flags(args):
        commands.choices[args.command].error(message)
    if args.attack == 'none' and args.command != 'show':
        args.eps = []
    return args


def wrong_flags(args):
    """Yields what cannot be meant. An ε that is given twice counts once."""
    for flag in {'eps', 'grid_eps'} & set(vars(args)):
        given = list({f'{eps:g}': eps for eps in getattr(args, flag)}.values())
        setattr(args, flag, given)
        for eps in (eps for eps in given if not 0.25 <= eps <= 255):
            hint = f'; did you mean {eps * 255:.3g}?' if 0 < eps < 0.25 else ''
            yield f'--{flag} {eps:g}: it is in 1/255, 0.25 … 255; clean is always shown{hint}'
    if args.command == 'tables' and (len(args.dirs) > 1 or not Path(args.dirs[0]).is_dir()):
        yield 'tables takes one DIR, a folder of results that is there'
    if getattr(args, 'defence', '') and args.transfer_from:
        yield '--defence: with it attacks are transferred from the bare model, not --transfer_from another'
    if args.command in ('audit', 'transfer', 'show') and len(args.eps) != 1:
        yield f'--eps: {args.command} takes one'
    if args.command not in ('zeroshot', 'show', 'tables') and len(args.data) != 1:
        yield f'--data {" ".join(args.data)}: {args.command} takes one data set'
    for flag, least in {'n': 0, 'batch_size': 1, 'queries': 1, 'iterations': 1, 'max_new': 1}.items():
        if getattr(args, flag, least) < least:
            yield f'--{flag} {getattr(args, flag)}: must be at least {least}'
    if args.command == 'caption' and args.grid and not (args.targeted and args.eps and args.attack != 'none'):
        yield f'--grid {args.grid}: it shows forced sentences, so it needs --targeted and an --eps'
    if not all(0 <= size <= 100 for size in getattr(args, 'font', [])):
        yield '--font: must be in 0 … 100 (% of the image)'
    for flag in ('json', 'plot', 'grid'):
        file = Path(getattr(args, flag, ''))
        if not file.parent.is_dir() or file.name and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            yield f'--{flag} {file}: no folder {file.parent}, or no file that can be written into it'
        if flag != 'json' and file.name and file.suffix not in ('.png', '.pdf', '.svg'):
            yield f'--{flag} {file}: must end in .png, .pdf or .svg'


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if args.run is tables:
        return tables(args)
    begin = time.time()
    args.rank, args.world, args.device = data.start_processes(hours=168)  # one may have the harder images
    handlers, args.kept = data.hear(stop), Kept(args)
    try:
        runs = [p for p in map(Path, args.dirs) if data.settings_of(p) and args.command != 'show']
        say_what_was_trained_on(args, runs)
        updates = {run: data.settings_of(run).get('updates') for run in runs}  # now: it may train meanwhile
        trained = {str(run): training_of(run) for run in runs if args.rank == 0}
        report = {'command': shlex.join(['python', 'eval.py', *sys.argv[1:]]), 'commit': data.commit()}
        found = args.run(args)
        report |= {'versions': data.versions(), 'device': str(args.device), 'processes': args.world}
        report['trained'] = {run: of for run, of in trained.items() if of}
        report |= dict(seed=args.seed, seconds=time.time() - begin, rows=found.rows, outcomes=found.outcomes)
        if args.rank == 0:
            print(textwrap.fill(found.title, 120, break_on_hyphens=False), flush=True)
            print(table(found.rows, found.down, found.across), flush=True)
            if found.plotted and args.plot:
                curves(Path(args.plot), found)
            for run in runs:
                keep({**report, 'updates': updates[run]}, run, args)
            if args.json:
                data.write(Path(args.json), as_json(report))
            args.kept.forget()
    except (data.BadImage, data.BadSample) as e:  # which training on shards passes over
        data.fail(e.args[-1])
    except KeyboardInterrupt as e:
        number, where = (*e.args, signal.SIGINT)[0], args.kept.file
        what = f'what was measured is kept in {where}{args.rank}: the same command goes on' if where else ''
        nothing = 'nothing is kept' + ' (it would be with --json FILE)' * (
            args.run not in (audit, transfer, show)
        )
        if args.rank == 0:
            print(f'{signal.Signals(number).name}: stopped; {what or nothing}', flush=True)
        if args.world > 1:
            time.sleep(1)  # until torchrun, which does it one by one, has told all ranks
        data.end_launcher()
        return 128 + number
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return int(any(r.get('verdict') == 'FAIL' for r in found.rows))


if __name__ == '__main__':
    sys.exit(main(parse()))
