"""What is read and written: pairs and conversations, their pixels in [0, 1], order, tokenizers and prompts;
files of weights, settings from the command line, processes, the run directory. No model, no attack.

    pairs = load_pairs('easyvqa', 'train')    # image-text pairs; or a folder, or tar shards
    chats = load_chats('easyvqa', 'train')    # conversations; or a JSON file in LLaVA's format
    batches = loader(PairDataset(pairs, tokenizer, fit, seed), order(pairs.sizes, batch_size, …))
    python data.py shards CIFAR10 cifar10/train --split train --download    # writes shards: see --help

Everything random here is a function of (seed, purpose, number of the sample in the stream), never of a rank,
a worker or a batch size.
"""

import argparse
import contextlib
import csv
import ctypes
import difflib
import fcntl
import fnmatch
import functools
import glob
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import typing
import uuid
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np

if 'OMP_WAIT_POLICY' not in os.environ:  # waiting threads would spin for long and take cores from others
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
import jinja2.sandbox
import sentencepiece
import torch
import torch.distributed as dist
import torchvision
from huggingface_hub import HfApi, snapshot_download
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

PARENT = os.getppid()  # torchrun, if it started this
COLOURS = ('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow')
SHAPES = ('circle', 'rectangle', 'triangle')
IMAGE = '<image>'  # in a text: where the image's tokens go
CAPTION_QUESTION = 'Provide a short caption for this image.'  # the prompt of the authors' evaluation


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator that depends on its three arguments alone; the global one is never touched."""
    digest = hashlib.blake2b(f'{seed}/{purpose}/{number}'.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)


def fail(message: str) -> typing.NoReturn:
    raise SystemExit(f'error: {message}')


def said_by(e: BaseException) -> str:
    """Its message, without torch's advice how to load what it has just refused."""
    return str(e).partition(' In PyTorch')[0]


@contextlib.contextmanager
def reading(what: str, expected: str):
    """An error in here, of whatever kind, ends the program; the message says what was read and expected."""
    try:
        yield
    except BaseException as e:  # libraries raise many kinds, bare ones among them
        if not (isinstance(e, Exception) or type(e).__name__ == 'PanicException'):  # of Rust
            raise
        fail(f'{what}: {type(e).__name__}: {said_by(e)[:400]}; expected {expected}')


def read_text(file: Path, what: str) -> str:
    """A text in UTF-8, without the byte-order mark that Windows writes.   what: as in read_json"""
    with reading(f'{what}: cannot read {file}', 'a text in UTF-8'):
        return file.read_text(encoding='utf-8-sig')


def read_lines(file: Path, what: str) -> list[str]:
    """Empty lines at the end do not count; others do: a published list has a class without a name."""
    return [line.strip() for line in read_text(file, what).rstrip().split('\n')]


def read_json(path: Path, what: str) -> dict:
    """The content of a JSON file.   what: the flag or the directory that named it, for errors"""
    with reading(f'{what}: cannot read {path}', 'a JSON object'):
        content = from_json(path.read_text(encoding='utf-8-sig'))
        if not isinstance(content, dict):
            raise TypeError(f'it holds {str(content)[:60]!r}')
        return content


def from_json(text: str):
    content = json.loads(text)
    if '\\ud' in text.lower():  # half of a pair \ud83d\ude00 is no character, and breaks whoever prints it
        json.dumps(content, ensure_ascii=False).encode()
    return content


def inside(root: str | Path, name: str) -> Path:
    """root/name, a file that a data set names: not one outside of root, if there is a root ('': none)."""
    name = name.replace('\\', '/')  # of Windows
    path = Path(root, name)
    if root != '' and (name.startswith('/') or '..' in name):
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
            raise ValueError(f'{name!r} leads out of the folder {root}')
    return path


# ------------------------------------------------------------------------------------------- image-text pairs
@dataclass
class Pairs:
    """n images and their captions. `augment` names the distortion that suits them ('shapes', 'crop')."""

    files: list[Path]
    captions: list[str]
    augment: str
    note: str  # one line for the user: where the captions come from and how many there are
    left_out = ()  # see Shards

    def __len__(self) -> int:
        return len(self.files)

    @property
    def sizes(self) -> list[int]:
        """For `order`: it is one shard."""
        return [len(self)]

    def texts(self, limit: int = 0) -> list[str]:
        return self.captions

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.captions, self.files)

    def read(self, row: int, side: int, seed: int, number: int) -> tuple[Image.Image, str]:
        """(image, caption).   side, seed, number: as in Shards.read"""
        return read_image(self.files[row], side=side), self.captions[row]


def load_pairs(
    data: str, split='train', holdout='', caption_key='text', index_dir='', max_bad: float = 0, without=()
) -> 'Pairs | Shards':
    """data: 'easyvqa', a folder, or the tars of Shards, which index_dir, max_bad and without are for.
    split: train, val or test.  holdout: 'red circle,blue triangle', say"""
    if data.endswith('.tar'):
        if holdout:
            fail(f'--holdout {holdout}: not with shards, whose captions nobody has in a list')
        return Shards(shard_files(data), caption_key, index_dir, max_bad, without)
    pairs = easyvqa(split) if data == 'easyvqa' else folder(Path(data), split, caption_key)
    if held := held_out(holdout):
        if missing := set(held) - set(map(pair_name, pairs.captions)):
            fail(f'--holdout {", ".join(sorted(missing))}: no caption of --data {data} says so')
        rows = [i for i, caption in enumerate(pairs.captions) if pair_name(caption) not in held]
        note = f'{pairs.note}; {len(pairs) - len(rows)} images of {len(held)} held-out captions left out'
        kept = [pairs.files[i] for i in rows], [pairs.captions[i] for i in rows]
        pairs = Pairs(*kept, pairs.augment, note)
    if not len(pairs):
        fail(f'--data {data}: no image is left for --split {split}')
    return pairs


def held_out(holdout: str) -> list[str]:
    """'red circle, a blue triangle' → ['red circle', 'blue triangle']"""
    return [pair_name(h) for h in holdout.split(',') if h.strip()]


def pair_name(caption: str) -> str:
    """'a red circle' → 'red circle'"""
    return re.sub(r'^(a|an|the) ', '', ' '.join(caption.lower().split()))


def easyvqa(split: str) -> Pairs:
    """easy-VQA (MIT): images of one coloured shape; the captions follow from its questions."""
    facts, asked, root = easyvqa_split(split)
    captions, of = [f'a {colour} {shape}' for colour, shape in facts.values()], len({i for *_, i in asked})
    note = f'easyvqa {split}: {len(facts)} of {of} images have a caption that follows from the questions'
    return Pairs([root / f'{i}.png' for i in facts], captions, 'shapes', note)


def easyvqa_split(split: str) -> tuple[dict[int, tuple[str, str]], list[tuple[str, str, int]], Path]:
    """({image: (colour, shape)} where these are known, [(question, answer, image)], folder of the images)

    val is a tenth of the captioned training images and never trained on, whatever --seed a run has."""
    if split not in ('train', 'val', 'test'):
        fail(f'--split {split}: easyvqa has train, val and test')
    with reading('--data easyvqa', 'the package easy-vqa: pip install easy-vqa'):
        import easy_vqa
    published = 'test' if split == 'test' else 'train'
    asked = list(zip(*getattr(easy_vqa, f'get_{published}_questions')(), strict=True))
    facts = easyvqa_facts(asked)
    if split != 'test':
        images = list(facts)
        order = torch.randperm(len(images), generator=generator(0, 'easyvqa val', 0)).tolist()
        val = {images[i] for i in order[: len(images) // 10]}
        facts = {i: fact for i, fact in facts.items() if (i in val) == (split == 'val')}
        asked = [row for row in asked if (row[2] in val) == (split == 'val')]
    return facts, asked, Path(easy_vqa.__file__).parent / 'data' / published / 'images'


def easyvqa_facts(asked: list[tuple[str, str, int]]) -> dict[int, tuple[str, str]]:
    """{image: (colour, shape)} where the questions leave one of each, by image.

    Three ways to know without guessing: a direct answer ("what color is the circle?" "red": red, and a
    circle); a yes, or the no to a negation ("is there not a circle?" "no"); a no to all other values."""
    possible: dict[int, tuple[set, set]] = {}
    for question, answer, image in asked:
        colours, shapes = possible.setdefault(image, (set(COLOURS), set(SHAPES)))
        words = re.findall('[a-z]+', question.lower())
        named = [w for w in words if w in COLOURS or w in SHAPES]
        if answer in ('yes', 'no'):
            holds = (answer == 'yes') != ('not' in words or 'no' in words)
        else:  # the answer is a fact, and so is what the question takes for granted
            named, holds = named + [answer], True
        for value in named:
            values = colours if value in COLOURS else shapes
            (values.intersection_update if holds else values.difference_update)({value})
    if broken := [i for i, (c, s) in possible.items() if not c or not s]:
        raise ValueError(f'easy-VQA: the questions on image {broken[0]} contradict each other')
    return {i: (*c, *s) for i, (c, s) in sorted(possible.items()) if len(c) == len(s) == 1}


class Prompts(typing.NamedTuple):
    """Class names and templates: captions of photos of classes are one in the other."""

    names: list[str]
    templates: list[str]  # with {c} where the name goes

    def texts(self, limit: int = 0) -> list[str]:
        """[classes · templates], all templates of a class in a row"""
        return [template.replace('{c}', name) for name in self.names for template in self.templates]

    def label(self, text: str) -> int:
        """Of the class that a text names, the longest name of several. BadSample: none"""
        text, *names = (f' {" ".join(re.findall("[^ .,;:!?]+", t.lower()))} ' for t in (text, *self.names))
        named = [i for i, name in enumerate(names) if name in text]
        if not named:
            raise BadSample('the caption names none of the classes', f'{text!r:.80}')
        return max(named, key=lambda i: len(self.names[i]))

    def caption(self, text: str, seed: int, number: int) -> str:
        """The class that it names in the template that is drawn for this number."""
        drawn = int(torch.rand(1, generator=generator(seed, 'template', number)).item() * len(self.templates))
        return self.templates[drawn].replace('{c}', self.names[self.label(text)])


def load_prompts(place: str) -> Prompts:
    """Of a folder with CLIP_benchmark's classnames.txt and zeroshot_classification_templates.txt"""
    files = (Path(place, name) for name in ('classnames.txt', 'zeroshot_classification_templates.txt'))
    names, templates = (read_lines(file, '--classes') for file in files)
    if wrong := [template for template in templates if '{c}' not in template]:
        fail(f'--classes {place}: the template {wrong[0]!r} has no {{c}}, where the class name goes')
    return Prompts(names, templates)


TABLES = ('metadata.jsonl', 'metadata.csv')


def has_table(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TABLES)


def tables_of(root: Path) -> list[Path]:
    """Its own; else those further down, one to a folder."""
    if has_table(root):
        return [root / name for name in TABLES if (root / name).is_file()][:1]
    found = {file.parent: file for name in reversed(TABLES) for file in sorted(root.rglob(name))}
    return list(found.values())


def split_folder(path: Path, split: str) -> Path:
    """path/split; or path, if not divided. (A class may be called so, and a folder that a table lists.)"""
    names, listed = 'train training val valid validation test testing dev', has_table(path)
    if (path / split).is_dir() and has_table(path / split) >= listed:
        return path / split
    kinds = TABLES if listed else ('*/*', '*.tar', *TABLES)
    if there := [name for name in names.split() if any(any((path / name).glob(kind)) for kind in kinds)]:
        fail(f'--split {split}: {path} has {", ".join(there)}')
    return path


def folder(path: Path, split: str, caption_key: str) -> Pairs:
    """A folder in the form of Hugging Face's imagefolder, or its subfolder train/, val/, test/: images, and a
    metadata.jsonl, {"file_name": …, "text": …} a line, or .csv; or several of these, further down."""
    if not path.is_dir():
        fail(f'--data {path}: no such folder (and not the name "easyvqa")')
    root = split_folder(path, split)
    tables = tables_of(root)
    if not tables:
        fail(f'--data {path}: no metadata.jsonl in {root}, {{"file_name": …, "text": …}} a line, and no .csv')
    files, captions, wrong = [], [], []
    for table in tables:
        text = read_text(table, f'--data {path}')
        if table.suffix == '.csv':
            with reading(f'cannot read {table}', 'commas between its values'):
                rows = list(enumerate(csv.DictReader(io.StringIO(text)), 2))
        else:  # splitlines() also cuts at U+2028
            rows = [(number, line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
        for number, row in rows:
            try:
                row = from_json(row) if isinstance(row, str) else row
                if not {'file_name', caption_key} <= set(row):
                    raise ValueError(f'its keys are {", ".join(map(str, row))}; see --caption_key')
                file, caption = inside(table.parent, row['file_name']), row[caption_key].strip()
                if not caption or not file.is_file():
                    raise ValueError('the text is empty' if not caption else f'no file {file}')
                files.append(file)
                captions.append(caption)
            except Exception as e:
                wrong.append(f'  {table}, line {number}: {type(e).__name__}: {str(e)[:200]}')
    if wrong:
        expected = f'{{"file_name": …, "{caption_key}": …}}, a file in the folder and a text'
        fail(f'--data {path}: {len(wrong)} bad lines; expected {expected}:\n' + '\n'.join(wrong[:10]))
    return Pairs(files, captions, 'crop', f'{tables[0]}: {len(files)} pairs')


def fingerprint(texts, files: list[Path | None]) -> dict[str, str]:
    """What a checkpoint knows the data of its run by.   texts: in their order, of any structure"""
    of = {'texts': texts, 'names of images': (file and file.parts[-2:] for file in files)}
    of['sizes of images'] = (file and file.stat().st_size for file in files)
    return digests_of(of)


def digests_of(of: dict[str, typing.Iterable]) -> dict[str, str]:
    digests = {what: hashlib.blake2b(digest_size=8) for what in of}
    for what, values in of.items():
        for value in values:
            digests[what].update(f'{value!r}\n'.encode())
    return {what: digest.hexdigest() for what, digest in digests.items()}


# ------------------------------------------------------------------------------------------------- tar shards
IMAGE_ENDINGS = 'jpg png webp jpeg gif jfif avif bmp tif tiff'.split()
WINDOW = 16  # shards whose samples are mixed, see `order`
IN_A_ROW = 100  # so many bad samples one after another stop a run
LOST_SHARD = 'the shard cannot be read'  # a kind of bad sample
INDEX_MARK = int.from_bytes(b'tar-idx1', 'little')


def members(file):
    """(key, ending, TarInfo, where it ends) of the members of a tar, by webdataset's rule: 'a/b.c.png' is the
    'c.png' of the sample 'a/b'; what is hidden is no part of any, such as macOS' ._NAME.

    Headers that are damaged are passed over, up to the next good one; a tar that is cut off ends there."""
    size, start = file.seek(0, os.SEEK_END), 0
    while start < size:
        file.seek(start)
        try:
            archive = tarfile.open(fileobj=file, mode='r:', ignore_zeros=True)
            while member := archive.next():
                where, slash, name = member.name.rpartition('/')
                key, _, ending = name.partition('.')
                if member.isreg() and key and ending:
                    yield where + slash + key, ending.lower(), member, archive.offset
                archive.members.clear()
                start = archive.offset
            return
        except (tarfile.TarError, ValueError, OverflowError):  # such as a damaged one behind one of PAX
            start += 512


def shard_files(pattern: str) -> list[str]:
    """'a/{00..11}.tar' or {x,y} as the shell has it; or *; several with :: between, as in webdataset."""

    def expanded(text: str) -> list[str]:
        if not (found := re.search(r'\{([^{}]*)\}', text)):
            return [text]
        first, dots, last = found[1].partition('..')
        values = found[1].split(',')
        if dots:
            with reading(f'--data {pattern}: {found[0]}', 'two numbers, such as {00000..01023}'):
                values = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        return [t for v in values for t in expanded(text[: found.start()] + v + text[found.end() :])]

    parts = [part for text in pattern.split('::') for part in dict.fromkeys(expanded(text))]
    by_number = functools.partial(re.sub, r'\d+', lambda n: n[0].zfill(9))  # 10.tar is after 9.tar
    lists = [sorted(glob.glob(p), key=by_number) if glob.has_magic(p) else [p] for p in parts]
    return sum(lists, []) or fail(f'--data {pattern}: there is no such file')


def index_shard(shard: str, index: str) -> tuple[int, int, bool]:
    """Makes the index of a shard; returns what read_index does.

    It is: uint64 mark, size and mtime_ns of the shard, 2 × number of samples + (is it cut off?); then for
    each sample uint32 the first of its blocks of 512 bytes and how many these are. A sample is neighbours of
    one key; one that comes again, with the same ending too, is another sample."""
    with open(shard, 'rb') as file:
        stat, groups, last, end = os.fstat(file.fileno()), [], None, 0  # groups: [first, end, endings]
        for key, ending, member, end in members(file):
            if key != last or ending in groups[-1][2]:
                groups.append([member.offset // 512, 0, set()])
            last, groups[-1][1] = key, end // 512
            groups[-1][2].add(ending)
        file.seek(end)
        tail = file.read(512)
        cut = end > stat.st_size or len(tail) < 512 or any(tail)  # the end is a block of zeros
    known = {*IMAGE_ENDINGS, 'txt', 'json', 'cls'}  # whatever the --caption_key
    rows = np.array([(first, end - first) for first, end, endings in groups if endings & known], '<u4')
    head = np.array([INDEX_MARK, stat.st_size, stat.st_mtime_ns, 2 * len(rows) + cut], '<u8')
    beside = Path(f'{index}.{uuid.uuid4().hex}')  # of this process alone
    write(beside, lambda f: f.write_bytes(head.tobytes() + rows.tobytes()))
    os.replace(beside, index)
    return len(rows), stat.st_size, cut


def read_index(shard: str, index: str) -> tuple[int, int, bool] | None:
    """(samples, size of the shard, whether it is cut off), if the index is there and of this shard. A shard
    that is gone is taken at the word of its index: its samples keep their places."""
    with contextlib.suppress(OSError, ValueError):
        mark, size, mtime, count = np.fromfile(index, '<u8', 4).tolist()
        with contextlib.suppress(OSError):
            stat = os.stat(shard)
            mark *= (size, mtime) == (stat.st_size, stat.st_mtime_ns)
        if mark == INDEX_MARK and os.path.getsize(index) == 32 + count // 2 * 8:
            return count // 2, size, bool(count % 2)


def short(shard: str) -> str:
    """The name by which a run knows it, wherever its data are moved."""
    return '/'.join(Path(shard).parts[-2:])


@functools.lru_cache(2 * WINDOW)
def opened(shard: str):
    return open(shard, 'rb', buffering=0)


@functools.lru_cache(2 * WINDOW)
def mapped(index: str) -> np.ndarray:
    return np.memmap(index, '<u4', 'r', 32).reshape(-1, 2)


class Shards:
    """Samples in tar files, for millions of them: in memory is a count for each shard. A sample is read as a
    whole, at the place that its shard's index gives; the index is made when it is first needed, by all
    processes together, beside the shard or in index_dir.

    caption_key: a member's ending or a key of the sample's json; 'text' is the txt, or else that key. Of
    several with weights, 'txt:0.2,alt:0.8', one is drawn for each sample; or another, where it is missing.
    max_bad: fraction of the shards that may be unreadable; 0: none may even be cut off.
    without: names of shards that the run began without, and goes on without (left_out)."""

    augment = 'crop'

    def __init__(self, files: list[str], caption_key='text', index_dir='', max_bad: float = 0, without=()):
        pattern = re.compile(r'\s*([^\s:]+)(?::(?=[\d.]*[1-9])(\d*\.?\d*))?\s*')
        keys = [pattern.fullmatch(key) for key in caption_key.split(',')]
        if not all(keys):
            fail(f'--caption_key {caption_key}: must be KEY, or KEY:WEIGHT,KEY:WEIGHT,… (positive weights)')
        self.keys, self.weights = [key[1] for key in keys], np.cumsum([float(key[2] or 1) for key in keys])
        self.index_dir = index_dir
        whole, wrong = [], {}
        for f, found in self.open_indexes([f for f in files if short(f) not in without]).items():
            if isinstance(found, str):
                wrong[f] = found
            elif not found[0]:
                wrong[f] = 'no sample is in it, or it is no tar'
            else:
                whole.append((f, *found[:2]))
                wrong |= {f: 'it is cut off'} if found[2] else {}
        said = [f'{f}: {why}' for f, why in wrong.items()][:10]
        if not whole or len(files) - len(whole) > max_bad * len(files) or wrong and not max_bad:
            limit = f' (--max_bad {max_bad:g})' if max_bad else ''
            many = f'{len(wrong)} of {len(files)} shards cannot be read as a whole{limit}:'
            fail('\n  '.join([f'--data: {many}', *said]))
        self.files, *columns = zip(*whole)
        self.sizes, self.bytes = map(np.array, columns)
        self.ends = np.cumsum(self.sizes)
        self.left_out = sorted({*map(short, files)} - {*map(short, self.files)})
        self.note = f'{self.files[0]} …: {len(self)} pairs in {len(self.files)} of {len(files)} shards'
        self.note += ''.join(f'\nwarning: {line}' for line in said)

    def open_indexes(self, files: list[str]) -> dict[str, tuple[int, int, bool] | str]:
        """{shard: what its index says, or why it has none}; those that are missing are made by all processes
        together. Rank 0 looks for all: others may see a shared folder as it was a while ago."""
        found = from_rank_0(lambda: {f: read_index(f, self.index(f)) for f in files})
        missing, (rank, world) = [f for f in found if not found[f]], rank_and_world()
        if self.index_dir:
            with reading(f'--index_dir {self.index_dir}', 'a folder that can be made'):
                os.makedirs(self.index_dir, exist_ok=True)
        else:
            for folder in {Path(f).absolute().parent for f in missing}:
                if folder.is_dir() and not os.access(folder, os.W_OK):
                    fail(f'{folder}: no index can be written there: give --index_dir')
        for i in tqdm(range(0, len(missing), world), 'index', disable=rank > 0 or not missing, unit='shard'):
            made = {}
            for shard in missing[i + rank : i + rank + 1]:
                try:
                    made[shard] = index_shard(shard, self.index(shard))
                except (OSError, OverflowError) as e:  # the latter: of more than 2 TiB
                    made[shard] = str(e)
            for those in gather_objects(made):  # at each of them, so that none waits for long
                found |= those
        opened.cache_clear(), mapped.cache_clear()
        return found

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def index(self, shard: str) -> str:
        if not self.index_dir:
            return shard + '.idx'
        where, name = os.path.split(os.path.abspath(shard))  # shards of two folders may have one name
        return f'{self.index_dir}/{hashlib.blake2b(where.encode(), digest_size=4).hexdigest()}-{name}.idx'

    def fingerprint(self) -> dict[str, str]:
        of = {'names of shards': map(short, self.files)}
        return digests_of(of | {'sizes of shards': self.bytes.tolist(), 'samples': self.sizes.tolist()})

    def members(self, row: int) -> tuple[str, dict[str, bytes]]:
        """(name, {ending: content}) of a sample. BadSample: it cannot be read."""
        shard = int(np.searchsorted(self.ends, row, 'right'))
        tar = self.files[shard]
        try:
            first, blocks = mapped(self.index(tar))[row - self.ends[shard]].tolist()  # from the shard's end
            content = os.pread(opened(tar).fileno(), 512 * blocks, 512 * first)
        except (OSError, ValueError) as e:
            raise BadSample(LOST_SHARD, f'{tar}: {e}') from None
        found, name = {}, f'{tar}/sample {row}'
        for key, ending, member, end in members(io.BytesIO(content)):
            name = f'{tar}/{key}'
            if end <= len(content):
                found[ending] = content[member.offset_data : member.offset_data + member.size]
        if not found or len(content) < 512 * blocks and not found.keys() & set(IMAGE_ENDINGS):
            raise BadSample('the shard is cut off or damaged here', name)
        return name, found

    def image(self, name: str, found: dict[str, bytes], side: int = 0) -> Image.Image:
        """BadSample: there is none; BadImage: it cannot be decoded."""
        ending = next((e for e in IMAGE_ENDINGS if e in found), None)
        if ending is None:
            raise BadSample('no image', f'{name}: has {", ".join(found)}, but no jpg or png or webp')
        return read_image(io.BytesIO(found[ending]), f'{name}.{ending}', side)

    def caption(self, name: str, found: dict[str, bytes], seed: int, number: int) -> str:
        """By the key that is drawn for this number, or another one. BadSample: by none of them."""
        keys, why = self.keys, []
        if len(keys) > 1:
            drawn = torch.rand(1, generator=generator(seed, 'caption', number)).item() * self.weights[-1]
            keys = [keys[np.searchsorted(self.weights, drawn, 'right')], *keys]
        for key in keys:
            ending = 'txt' if key == 'text' and 'txt' in found else key
            try:
                if ending in found:
                    text = found[ending].decode('utf-8-sig')
                else:
                    text = from_json(found['json'].decode('utf-8-sig'))[key]
                if text.strip():
                    return text.strip()
                why.append(('the caption is empty', f'{name}.{ending} holds no caption'))
            except UnicodeError as e:
                why.append(('the caption is not UTF-8', f'{name}.{ending}: {type(e).__name__}: {e}'))
            except Exception:  # whatever is in the json
                why.append(('no caption', f'{name}: has {", ".join(found)}, but no text {key} in any'))
        raise BadSample(*why[0])

    def read(self, row: int, side: int, seed: int, number: int) -> tuple[Image.Image, str]:
        """(image, caption).   side: as in read_image; number: of the sample, which its caption is drawn by"""
        name, found = self.members(row)
        try:
            image, caption = self.image(name, found, side), self.caption(name, found, seed, number)
        except BadSample:
            raise
        except Exception as e:  # PIL has many kinds
            raise BadSample('the image cannot be decoded', said_by(e)) from None
        if max(image.size) > 50 * min(image.size):  # with its short side resized it would be huge
            raise BadSample('the image is a strip', f'{name}: {image.width} × {image.height} pixels')
        return image, caption

    def texts(self, limit: int) -> list[str]:
        """The captions of so many samples, evenly spaced; of all of them it would take hours."""
        texts, bad, rows = [], [], np.linspace(0, len(self) - 1, min(limit, len(self))).astype(int).tolist()
        for row in rows:
            try:
                texts.append(self.caption(*self.members(row), 0, row))
            except BadSample as e:
                bad.append(e.args[1])
        return texts or fail(f'--caption_key: no caption in any of {len(rows)} samples: {bad[0]}')


# --------------------------------------------------------------------------- the command that writes shards
def torchvision_set(name: str, split: str, root: str, download: bool) -> tuple[typing.Any, list[str], str]:
    """(the set, its classes' names, split or '' if it is not divided) of a class of torchvision.datasets"""
    kind = getattr(torchvision.datasets, name)
    takes = inspect.signature(kind).parameters
    if download and 'download' not in takes:
        fail(f'--download: torchvision cannot fetch {name}; put it into --root {root}')
    if 'train' in takes and 'split' not in takes and split not in ('train', 'test'):
        fail(f'--split {split}: {name} has train and test')
    settings = {'root': root, 'download': download, 'split': split, 'train': split == 'train'}
    how = '' if download or 'download' not in takes else ' (--download fetches it)'
    with reading(f'--data {name}, --split {split}, --root {root}', f'its files to be there{how}'):
        images = kind(**{key: value for key, value in settings.items() if key in takes})
    names = getattr(images, 'classes', None) or getattr(images, 'categories', [])
    names = [c if isinstance(c, str) else c[0] for c in names]  # of synonyms the first
    return images, names, split if {'train', 'split'} & set(takes) else ''


def write_shards(src: str, out: Path, split: str, root: str, download: bool, per_shard: int) -> None:
    """src as in `main`. A shard is there when it is whole. The samples are shuffled (training mixes those of
    WINDOW shards only); files stay as they are, other images become PNG."""
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        fail(f'{out} is not empty: give another OUT')
    if per_shard < 1:
        fail(f'--per_shard {per_shard}: must be positive')
    if src == 'easyvqa' or Path(src).is_dir() and tables_of(split_folder(Path(src), split)):
        pairs, names = load_pairs(src, split), []
        n, item = len(pairs), lambda i: (pairs.files[i], pairs.captions[i])
    else:
        if Path(src).is_dir():
            with reading(src, 'metadata.jsonl, or a folder of images for each class'):
                images = torchvision.datasets.ImageFolder(str(split_folder(Path(src), split)))
            names = images.classes
        elif inspect.isclass(getattr(torchvision.datasets, src, None)):
            images, names, _ = torchvision_set(src, split, root, download)
        else:
            fail(f'{src}: no such folder, and no class of torchvision.datasets')
        n, names = len(images), [name.replace('_', ' ') for name in names] or fail(f'{src}: no class names')
        item = getattr(images, 'samples', images).__getitem__  # of an ImageFolder the files
    rows = torch.randperm(n, generator=generator(0, 'shards', 0)).tolist()

    def parts(image: str | Path | Image.Image, said: str | int) -> dict[str, bytes]:
        """{ending: content}.   said: the caption, or the number of the class"""
        found, ending = {}, 'PIL' if isinstance(image, Image.Image) else Path(image).suffix.lower()[1:]
        if ending in IMAGE_ENDINGS:
            found[ending] = Path(image).read_bytes()
        else:
            (image if ending == 'PIL' else read_image(image)).save(png := io.BytesIO(), 'PNG')
            found['png'] = png.getvalue()
        if names:
            name, found['cls'] = names[int(said)], b'%d' % said
            said = f'a photo of {"an" if name[:1].lower() in [*"aeiou"] else "a"} {name}'
        return found | {'txt': said.encode()}

    def content(numbers: range, file: Path) -> None:
        with tarfile.open(file, 'w') as tar:
            for number in numbers:
                try:
                    found = parts(*item(rows[number]))
                except BadImage as e:  # else `write` would take it for a disk that is full
                    fail(str(e))
                for ending, part in found.items():
                    member = tarfile.TarInfo(f'{number:09}.{ending}')
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
                bar.update()

    beside = out.with_name(f'{out.name}.tmp')  # so that OUT is all of them, or none
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    with tqdm(total=n, desc='shards', unit='sample') as bar:
        for first in range(0, n, per_shard):
            numbers = range(first, min(first + per_shard, n))
            write(beside / f'{first // per_shard:05}.tar', functools.partial(content, numbers))
    if names:
        write(beside / 'classnames.txt', '\n'.join(names) + '\n')
    os.replace(beside, out)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description='Writes tar shards for clip_adv.py and eval.py: OUT/00000.tar, …')
    parser.add_argument('command', choices=['shards'])
    src = 'a folder with metadata.jsonl, one with a folder for each class, or a class of torchvision.datasets'
    parser.add_argument('src', metavar='SRC', help=src)
    parser.add_argument('out', metavar='OUT', type=Path, help='an empty or new folder')
    parser.add_argument('--split', default='train')
    parser.add_argument('--root', default='data', help="where torchvision's files are, or go to")
    parser.add_argument('--download', action='store_true')
    parser.add_argument('--per_shard', type=int, default=10_000, help='samples in a shard')
    given = vars(parser.parse_args(argv))
    del given['command']
    write_shards(**given)


# ---------------------------------------------------------------------------------------------- conversations
@dataclass
class Chat:
    """A training sample of stage 2: what was asked and answered, turn by turn, about one image or none."""

    image: Path | None
    turns: list[tuple[str, str]]  # (question, answer); with an image, IMAGE stands once in the questions
    name: str  # where it comes from: its own


class BadSample(ValueError):
    """A pair or conversation that cannot be learned from.   args: (kind, by which they are counted; more)"""


@dataclass
class Chats:
    chats: list[Chat]
    augment: str  # as in Pairs, or '' for none
    note: str
    bad: dict[str, tuple[str, str]] | tuple[()] = ()  # name of what was left out → why, see BadSample

    def __len__(self) -> int:
        return len(self.chats)


def load_chats(data: str, split='train', image_root='', captions: bool = False, turns: int = 1) -> Chats:
    """data: 'easyvqa', or a JSON file in LLaVA's format, whose images lie in image_root.

    captions (easyvqa): image and sentence, for the projector; else questions, `turns` to a chat, too."""
    if data != 'easyvqa':
        return llava_json(Path(data), image_root)
    if not captions:
        return easyvqa_chats(split, turns)
    facts, _, root = easyvqa_split(split)
    rows = [(i, sentence) for i, fact in facts.items() for sentence in describe(*fact)]
    chats = [Chat(root / f'{i}.png', [(IMAGE, said)], f'easyvqa, image {i}: {said}') for i, said in rows]
    return Chats(chats, 'shapes', f'easyvqa: {len(facts)} images with 5 sentences each')


def describe(colour: str, shape: str) -> list[str]:
    """Five sentences that say the same two facts, for captions that a metric of n-grams can judge."""
    return [
        f'there is a {colour} {shape} in the image',
        f'the image shows a single {colour} {shape}',
        f'a picture of one {shape} which is {colour}',
        f'this is a {shape} and its color is {colour}',
        f'a {colour} {shape} on a plain background',
    ]


def balanced(asked: list[tuple[str, str]]) -> list[int]:
    """Numbers of yes/no questions, for each text as many yes as no: who never looks is half right.

    asked: (question, answer, …)"""
    of: dict[str, dict[str, list[int]]] = {}
    for n, (question, answer, *_) in enumerate(asked):
        if answer in ('yes', 'no'):
            of.setdefault(question, {'yes': [], 'no': []})[answer].append(n)
    kept = []
    for text, groups in of.items():
        least = min(map(len, groups.values()))
        for answer, numbers in groups.items():
            g = generator(0, f'balanced {text} {answer}', 0)
            kept += [numbers[i] for i in torch.randperm(len(numbers), generator=g).tolist()[:least]]
    return sorted(kept)


def easyvqa_chats(split: str, turns: int) -> Chats:
    """Three of four questions are yes/no, and most of their answers follow from the question alone. So of
    these only the balanced ones are kept: it takes a look at the image to gain anything on them."""
    facts, asked, root = easyvqa_split(split)
    kept = set(balanced(asked))
    of: dict[int, list[tuple[str, str]]] = {}
    for n, (question, answer, image) in enumerate(asked):
        if answer not in ('yes', 'no') or n in kept:
            of.setdefault(image, []).append((question, answer))
    chats = []
    for image, questions in sorted(of.items()):
        conversations = []
        if image in facts:  # two of the sentences, so that a quarter of the answers are captions
            pick = torch.randperm(5, generator=generator(0, 'easyvqa sentence', image)).tolist()
            conversations += [[(CAPTION_QUESTION, describe(*facts[image])[s])] for s in pick[:2]]
        order = torch.randperm(len(questions), generator=generator(0, 'easyvqa turns', image)).tolist()
        conversations += [[questions[q] for q in order[i : i + turns]] for i in range(0, len(order), turns)]
        for (question, answer), *others in conversations:
            said = [(f'{IMAGE}\n{question}', answer), *others]
            chats.append(Chat(root / f'{image}.png', said, f'easyvqa, image {image}: {said}'))
    questions = f'{sum(map(len, of.values()))} of {len(asked)} questions and {2 * len(facts)} captions'
    return Chats(chats, 'shapes', f'easyvqa: {len(chats)} conversations about {len(of)} images, {questions}')


def llava_json(file: Path, image_root: str) -> Chats:
    """[{"image" (none: text only), "conversations": [{"from": "human" | "gpt", "value": …}, …]}, …]"""
    with reading(f"--data {file} ('easyvqa', or a JSON file in LLaVA's format)", 'a JSON list'):
        rows = [] + json.loads(file.read_text(encoding='utf-8-sig'))  # one half character spoils one row
    if not rows:
        fail(f'--data {file}: no conversation in it')
    chats, bad = [], {}
    for number, row in enumerate(rows):
        name = f'{file}, entry {number}'
        try:
            chats.append(llava_chat(row, image_root, f'{name} (id {row.get("id", "none")!r})'))
        except Exception as e:  # what is not in the format raises many kinds
            bad[name] = e.args if isinstance(e, BadSample) else ("not in LLaVA's format", repr(e)[:200])
    without = sum(chat.image is None for chat in chats)
    return Chats(chats, '', f'{file}: {len(rows)} conversations, {without} without an image', bad)


def llava_chat(row: dict, image_root: str, name: str) -> Chat:
    """<image> goes to the front of its question, once; that question is stripped, no other text is.
    official: LLaVA/llava/train/train.py, preprocess_multimodal"""
    said = [(turn['from'], turn['value']) for turn in row['conversations']]
    said = said[1:] if said and said[0][0] == 'gpt' else said  # some published ones open with an answer
    roles = [role for role, _ in said]
    texts = [text for _, text in said[: len(said) // 2 * 2]]  # without a last question that has no answer
    questions, answers, image = texts[::2], texts[1::2], row.get('image') or None
    [image] = image if isinstance(image, list) else [image]
    if image and questions:
        try:
            image = inside(image_root, image)
        except ValueError as e:
            raise BadSample('its image leads out of --image_root', str(e)) from None
        place = next((n for n, question in enumerate(questions) if IMAGE in question), 0)
        questions = [q.replace(IMAGE, '').strip() if IMAGE in q else q for q in questions]
        questions[place] = f'{IMAGE}\n{questions[place]}'.strip()
    ''.join([*texts, str(image)]).encode()  # fails where half a character is
    wrong = {
        'the turns are not human, gpt, human, gpt, …': roles != (['human', 'gpt'] * len(said))[: len(said)],
        'no answer, or an empty text': not texts or not all(text.strip() for text in texts),
        'no such image file (see --image_root)': image and not os.path.isfile(image),
        f'the word {IMAGE} where no image is shown': any(IMAGE in t for t in (answers if image else texts)),
    }
    for kind in filter(wrong.get, wrong):  # the first
        raise BadSample(kind, f'{image or "no image"}, {row}'[:200])
    return Chat(image, list(zip(questions, answers)), name)


# ----------------------------------------------------------------------------------------------------- pixels
class BadImage(ValueError):
    """An image that cannot be decoded; the message names it."""


def read_image(file: Path | io.BytesIO, name: str = '', side: int = 0) -> Image.Image:
    """Decodes to RGB, upright as EXIF says: alpha on white, 16-bit scaled, palette and CMYK converted.

    side: a JPEG whose sides are n times as long or more is decoded at 1/n of its size, n = 2, 4 or 8"""
    try:
        with Image.open(file) as image:
            if side:
                image.draft(None, (side, side))
            image.load()
            return to_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        said = str(e).replace(repr(file), 'it')
        raise BadImage(f'cannot decode the image {name or file}: {said}') from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):  # these have 16 bits
        raise ValueError(f'pixels of mode {image.mode} have no range that is known; save 8 or 16 bits')
    with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # PIL's own conversion would clip at 255
        values = np.asarray(image).astype(np.float32) / 65535
        return Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8)).convert('RGB')
    if 'A' in image.getbands() or 'transparency' in image.info:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('RGB')


@dataclass
class Fit:
    """RGB image → uint8 [3, size, size], as open_clip's preprocess_cfg says. (Workers can pickle a class.)"""

    size: int
    interpolation: str = 'bilinear'
    resize_mode: str = 'shortest'
    pad_colour: list[float] | None = None  # in [0, 1]: padded to a square with it first, as LLaVA 1.5 does

    def __call__(self, image: Image.Image) -> Tensor:
        if self.pad_colour is not None:
            image = pad_to_square(image, self.pad_colour)
        return TF.pil_to_tensor(resize(image, self.size, self.interpolation, self.resize_mode))


def resize(image: Image.Image | Tensor, size: int, interpolation: str, resize_mode: str):
    """To size × size. resize_mode 'shortest' (resize the short side, centre crop), 'squash' (ignore the
    aspect ratio) or 'longest' (resize the long side, pad with black). Takes tensors [..., 3, H, W], too."""
    h, w = TF.get_size(image)
    scale = size / max(h, w)
    sides = {'shortest': [size], 'squash': [size, size], 'longest': [round(h * scale), round(w * scale)]}
    resized = TF.resize(image, sides[resize_mode], TF.InterpolationMode(interpolation))
    return TF.center_crop(resized, [size, size])


def pad_to_square(image: Image.Image, colour: list[float]) -> Image.Image:
    """The image in the middle of a square of the colour (in [0, 1]), so that nothing is cut off."""
    side = max(image.size)
    square = Image.new('RGB', (side, side), tuple(int(c * 255) for c in colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def shift_and_flip(image: Tensor, g: torch.Generator) -> Tensor:
    """For easy-VQA: mirror, and move by up to a sixteenth of the side. Triangles stay upright."""
    reach = image.shape[-1] // 16
    ranges = torch.tensor([2, 2 * reach + 1, 2 * reach + 1])
    flip, dy, dx = (torch.rand(3, generator=g) * ranges).int().tolist()
    padded = TF.pad(image.flip(-1) if flip else image, [reach] * 4, padding_mode='edge')
    return padded[:, dy : dy + image.shape[1], dx : dx + image.shape[2]]


def random_crop(image: Image.Image, g: torch.Generator, least=0.9, flip=False) -> Image.Image:
    """For photos: a part of at least this share of the area, at a random place; mirrored half of the time"""
    area, y, x, mirror = torch.rand(4, generator=g).tolist()
    side = (least + (1 - least) * area) ** 0.5
    w, h = round(image.width * side), round(image.height * side)
    image = TF.crop(image, int(y * (image.height - h + 1)), int(x * (image.width - w + 1)), h, w)
    return TF.hflip(image) if flip and mirror < 0.5 else image


# ---------------------------------------------------------------------------------------- the training stream
class PairBatch(typing.NamedTuple):
    images: Tensor  # uint8 [b, 3, S, S]
    tokens: Tensor  # int64 [b, L]
    bad: list[tuple[int, str, str]]  # (number in the stream, kind, more) of those that others stand in for


def collate_pairs(items: list[tuple]) -> PairBatch:
    images, tokens = torch.utils.data.default_collate([item[:2] for item in items])
    return PairBatch(images, tokens, [bad for *_, found in items for bad in found])


class PairDataset(torch.utils.data.Dataset):
    """Item (row, number) → (uint8 [3, S, S], token ids [L], [(number, kind, more)] of bad samples met);
    `number` counts samples since training began.

    In the place of a bad sample, as shards have them, is another one, drawn by (seed, number, attempt); after
    IN_A_ROW of them a blank one: `Run` stops, on all ranks."""

    def __init__(self, pairs, tokenizer: 'Tokenizer', fit: Fit, seed, crop=0.9, flip=False, prompts=None):
        self.pairs, self.tokenizer, self.fit, self.seed = pairs, tokenizer, fit, seed
        self.crop, self.flip, self.prompts = crop, flip, prompts
        self.side = math.ceil(2 * fit.size / crop**0.5)  # of what random_crop leaves, twice the size at least
        self.shapes = pairs.augment == 'shapes'  # few and small: decoded, resized and encoded once
        self.images = [fit(read_image(f)) for f in pairs.files] if self.shapes else []
        self.tokens = tokenizer(pairs.captions) if self.shapes else None

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, list]:
        row, number = item
        g = generator(self.seed, 'augment', number)
        if self.shapes:
            return shift_and_flip(self.images[row], g), self.tokens[row], []
        bad = []
        for attempt in range(IN_A_ROW):
            try:
                image, caption = self.pairs.read(row, self.side, self.seed, number)
                caption = self.prompts.caption(caption, self.seed, number) if self.prompts else caption
                image = random_crop(image, g, self.crop, self.flip)
                return self.fit(image), self.tokenizer([caption])[0], bad
            except BadSample as e:
                bad.append((number, *e.args))
                other = generator(self.seed, f'in place {attempt}', number)
                row = int(torch.randint(len(self.pairs), (), generator=other))
        return torch.zeros(3, *[self.fit.size] * 2, dtype=torch.uint8), self.tokenizer([''])[0], bad


def order(sizes: int | typing.Sequence[int], batch_size: int, steps: range, seed: int, rank: int, world: int):
    """Batch sampler: for each step the rank's share of the global batch, as (row, number of the sample).
    sizes: samples in each shard, whose rows follow one another; or in the one that there is

    The stream is epoch after epoch, each used to its last sample: the shards in an order drawn from (seed,
    epoch), and of WINDOW of them at a time all samples in an order drawn from (seed, epoch, window). So only
    these shards are in use, and only their samples' order is in memory (2 bytes or 4 a sample); with 10,000
    samples in a shard, a large batch of 32,768 is a fifth of a window.
    Step s takes samples s·B … s·B+B−1, rank r the r-th part of them: W ranks see what one process sees. It
    is a function of the step: nothing has to be played back to go on from there."""
    sizes = np.atleast_1d(sizes)
    starts, n = np.cumsum(sizes) - sizes, int(sizes.sum())

    def shards(epoch: int) -> tuple[torch.Generator, np.ndarray]:
        g = generator(seed, 'epoch', epoch)
        return g, torch.randperm(len(sizes), generator=g).numpy()  # draws nothing where there is one

    @functools.lru_cache(1)
    def first_of_windows(epoch: int) -> np.ndarray:
        """Number, in the epoch, of each window's first sample."""
        return np.cumsum(np.append(0, sizes[shards(epoch)[1]]))[:-1:WINDOW]

    @functools.lru_cache(1)  # numbers only rise
    def rows(epoch: int, window: int) -> np.ndarray:
        g, those = shards(epoch)
        g = generator(seed, f'epoch {epoch} window', window) if window else g
        those = those[window * WINDOW :][:WINDOW]
        kind = np.min_scalar_type(n)
        found = np.concatenate([np.arange(starts[i], starts[i] + sizes[i], dtype=kind) for i in those])
        return found[torch.randperm(len(found), generator=g).numpy()]

    def row(number: int) -> int:
        epoch, position = divmod(number, n)
        window = int(np.searchsorted(first_of_windows(epoch), position, 'right')) - 1
        return int(rows(epoch, window)[position - first_of_windows(epoch)[window]])

    share = range(rank * batch_size // world, (rank + 1) * batch_size // world)
    for step in steps:
        yield [(row(number), number) for number in (step * batch_size + position for position in share)]


def loader(dataset, order, workers: int = 0, collate=collate_pairs):
    """The dataset's items in that order.   workers: decoding processes; 0 decodes in this one"""
    own = torch.Generator()  # else the loader draws its workers' seeds from the global generator
    how = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())
    how['worker_init_fn'] = leave_signals
    return torch.utils.data.DataLoader(dataset, batch_sampler=order, collate_fn=collate, generator=own, **how)


def leave_signals(worker: int) -> None:
    """To the rank: torchrun and Ctrl-C send them to its group, and its last update still needs the worker."""
    os.setsid()


class ChatDataset(torch.utils.data.Dataset):
    """Item (row, number) → Sample"""

    def __init__(self, chats: Chats, prompt: 'Prompt', fit: Fit, seed: int):
        self.chats, self.prompt, self.fit, self.seed = chats, prompt, fit, seed
        files = {chat.image for chat in chats.chats if chat.image} if chats.augment == 'shapes' else ()
        self.cache = {file: fit(read_image(file)) for file in sorted(files)}  # as in PairDataset

    def __getitem__(self, item: tuple[int, int]) -> 'Sample':
        row, number = item
        chat, image = self.chats.chats[row], None
        if chat.image in self.cache:
            image = shift_and_flip(self.cache[chat.image], generator(self.seed, 'augment', number))
        elif chat.image:
            image = self.fit(read_image(chat.image))
        return Sample(image, *self.prompt(chat), number)


@dataclass
class Sample:
    """One conversation, as the model reads it."""

    image: Tensor | None  # uint8 [3, S, S]
    ids: list[int]  # token ids, each image token included
    labels: list[bool]  # which of them are to be predicted
    number: int  # of samples since the start of the (sub-stage of) training, for its randomness


class Batch(typing.NamedTuple):
    """Samples as tensors: token ids padded on the right, and which tokens are to be predicted, from where."""

    images: Tensor  # uint8 [m, 3, S, S], of the samples that have one
    ids: Tensor  # int64 [b, T]
    rows: Tensor  # int64 [n]  the n supervised tokens: in which sample, …
    columns: Tensor  # int64 [n]  … predicted at which token (the one before), …
    targets: Tensor  # int64 [n]  … and what they are
    start: int  # the first of the columns
    keys: Tensor  # int32 [b]  what the samples' dropout is drawn from

    def to(self, device: torch.device) -> 'Batch':
        return Batch(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in self))


def collate(samples: list[Sample], pad: int, seed: int = 0) -> Batch:
    """Samples without an image are in ids, not in images."""
    longest = max(len(s.ids) for s in samples)
    places = [(r, c) for r, s in enumerate(samples) for c, label in enumerate(s.labels) if label]
    rows, columns = torch.tensor(places).T
    ids = torch.tensor([s.ids + [pad] * (longest - len(s.ids)) for s in samples])
    images = [s.image for s in samples if s.image is not None] or [torch.empty(0, 3, 1, 1, dtype=torch.uint8)]
    images = torch.stack(images) if images[0].ndim == 3 else images[0]
    names = [f'{seed}/dropout/{s.number}'.encode() for s in samples]
    digests = [hashlib.blake2b(name, digest_size=4).digest() for name in names]
    keys = torch.tensor([int.from_bytes(d, 'little', signed=True) for d in digests], dtype=torch.int32)
    return Batch(images, ids, rows, columns - 1, ids[rows, columns], int(columns.min()) - 1, keys)


# ---------------------------------------------------------------------------------------------------- prompts
# Vicuna's, word for word
V1_SYSTEM = 'A chat between a curious user and an artificial intelligence assistant. '
V1_SYSTEM += "The assistant gives helpful, detailed, and polite answers to the user's questions."


class BadTemplate(SystemExit):
    """A chat template that cannot be trained on. Where the user asked for it, this ends the program."""

    def __init__(self, why: str):
        super().__init__(f'error: --prompt chat: the chat template of the LLM {why}; use --prompt v1')
        self.why = why


def prompt_style(style: str, tokenizer: 'LLMTokenizer') -> str:
    """The one that was asked for; else 'chat' where there is a template that can be trained on, else 'v1'."""
    if style or not tokenizer.chat_template:
        return style or 'v1'
    try:
        Prompt(tokenizer, 'chat', 1, 1 << 30).text([('Is it?', 'Yes')])
        return 'chat'
    except BadTemplate as e:  # such as that of llava-1.5-7b-hf, whose answers have no end
        if rank_and_world()[0] == 0:
            print(f"note: the chat template {e.why}; so questions are put as Vicuna's (--prompt v1)")
        return 'v1'


class Prompt:
    """Conversations → text → token ids and labels.

    'plain'  BOS <image> caption newline                                  loss on the caption and the newline
    'v1'     BOS system USER: <image>\\nquestion ASSISTANT: answer EOS …   loss on the answers and their EOS
    'chat'   the LLM's own template                                       the same"""

    def __init__(self, tokenizer: 'LLMTokenizer', style: str, image_tokens: int, max_length: int):
        self.tokenizer, self.style = tokenizer, style
        self.image_tokens, self.max_length = image_tokens, max_length
        v1 = functools.partial(tokenizer.fill_template, V1_TEMPLATE)
        self.render = v1 if style == 'v1' else tokenizer.render
        if style == 'chat' and not tokenizer.chat_template:
            raise BadTemplate('is not there')

    def text(self, turns: list[tuple[str, str | None]]) -> list[tuple[str, bool]]:
        """[(text, whether it is to be predicted)]; the answer None is the one to be generated. What a
        template puts around an answer is found by leaving the answer out."""
        parts, messages, done, eos = [], [], '', self.tokenizer.eos_token
        if self.style == 'plain':
            start, answer = (self.tokenizer.bos_token or '') + IMAGE, turns[0][1]
            return [(start, False)] + ([(f'{answer}\n', True)] if answer is not None else [])
        for question, answer in turns:
            messages.append({'role': 'user', 'content': question})
            asked = self.render(messages, add_generation_prompt=True)
            parts.append((asked[len(done) :], False))
            if answer is None:
                break
            messages.append({'role': 'assistant', 'content': answer})
            done = self.render(messages, add_generation_prompt=False)
            if not done.startswith(asked):
                raise BadTemplate('rewrites what was said before')
            rest = done[len(asked) :]
            if eos not in rest:
                raise BadTemplate(f'does not put its end-of-text token {eos!r} behind an answer')
            end = rest.rfind(eos) + len(eos)
            parts += [(rest[:end], True), (rest[end:], False)]
        return parts

    def encode(self, turns: list[tuple[str, str | None]]) -> tuple[list[int], list[bool]]:
        """(token ids, which are to be predicted). Tokenized whole; a token belongs to the part it ends in."""
        parts = self.text(turns)
        tokens, spans = self.tokenizer.encode(''.join(text for text, _ in parts))
        ends = np.cumsum([len(text) for text, _ in parts])
        ids, labels = [], []
        for token, (_, end) in zip(tokens, spans, strict=True):
            many = self.image_tokens if token == self.tokenizer.image else 1
            ids += [token] * many
            labels += [parts[np.searchsorted(ends, end)][1]] * many
        return ids, labels

    def __call__(self, chat: Chat) -> tuple[list[int], list[bool]]:
        return self.cut(chat)[:2]

    def cut(self, chat: Chat) -> tuple[list[int], list[bool], bool]:
        """(token ids, which are to be predicted, whether they were cut). BadSample: nothing to train on."""
        ids, labels = self.encode(chat.turns)
        length, ids, labels = len(ids), ids[: self.max_length], labels[: self.max_length]
        size = f'{length} tokens; --max_length is {self.max_length}'
        if not any(labels[1:]):
            raise BadSample('no answer to predict is left', size)
        if ids.count(self.tokenizer.image) != self.image_tokens * (chat.image is not None):
            kind = 'its image is cut off' if chat.image else 'no image, which sub-stage A needs'
            raise BadSample(kind, size)
        return ids, labels, length > self.max_length


# ------------------------------------------------------------------------------------ tokenizers, of captions
class Tokenizer:
    """Captions → int64 [n, context]. The layouts, called as open_clip's `tokenizer_mode` and
    `tokenizer_kwargs`:

    'eot'             start w… end pad…          OpenAI's CLIP, which pools at the end: the highest id
    'clips'           start w… end pad… [CLS]    ΔCLIP: BERT's WordPiece, pooled at the last token
    'strip_sep_token' start w… pad…              CLIPA: the same, without the end

    pool: where the text tower pools (text_cfg.pool_type)."""

    def __init__(self, backend: HFTokenizer, context: int, mode: str = 'eot', pool: str = 'argmax'):
        self.backend, self.context, self.mode = backend, context, mode
        self.backend.no_padding(), self.backend.no_truncation()
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.room = context - (3 if mode == 'clips' else 2)  # tokens of a caption between the special ones
        if mode == 'clips':
            self.bos, self.eos, self.pad, self.cls = 1, 2, 0, backend.token_to_id('[CLS]')
            if self.cls is None or backend.token_to_id('[PAD]') != 0 or self.room < 1:
                fail('--tokenizer: vocab.txt must begin with [PAD] and hold [CLS]; --context at least 4')
            return
        ids = backend.encode('a').ids
        pads = [backend.token_to_id(t) for t in ('<pad>', '[PAD]', '<|pad|>')]
        self.pad = next((p for p in pads if p is not None), 0)
        if len(ids) < 3 or pool == 'argmax' and ids[-1] != self.vocab_size - 1 or self.room < 1:
            needed = f'a start and an end with the highest id ({self.vocab_size - 1}) around every text'
            fail(f'--tokenizer: must put {needed}, not {ids} for "a"; --context must be at least 3')
        self.bos, self.eos = ids[0], ids[-1]

    def __call__(self, captions: list[str]) -> Tensor:
        rows = []
        for caption in captions:
            words = self.backend.encode(' '.join(caption.split()), add_special_tokens=False).ids
            words = [self.bos, *words[: self.room], self.pad if self.mode == 'strip_sep_token' else self.eos]
            row = words + [self.pad] * (self.context - len(words))
            rows.append(row[:-1] + [self.cls] if self.mode == 'clips' else row)
        return torch.tensor(rows)

    def too_long(self, captions: list[str]) -> int:
        """How many of the captions are cut at the context length."""
        return sum(len(self.backend.encode(c, add_special_tokens=False).ids) > self.room for c in captions)

    def files(self) -> dict[str, str]:
        """File name → content, such that transformers' AutoTokenizer (and so open_clip) reads the same."""
        special = {'pad_token': self.pad, 'bos_token': self.bos, 'eos_token': self.eos}
        special |= {'cls_token': self.cls} if self.mode == 'clips' else {}
        special |= {'sep_token': self.eos} if self.mode == 'strip_sep_token' else {}
        named = {k: self.backend.id_to_token(v) for k, v in special.items()}
        if not self.backend.get_added_tokens_decoder().get(self.pad) and '[PAD]' != named['pad_token']:
            named['pad_token'] = named['eos_token']  # OpenAI's pads with 0, the word "!", to the same effect
        return tokenizer_files(self.backend, {'model_max_length': self.context, **named})


def tokenizer_files(backend: HFTokenizer, settings: dict) -> dict[str, str]:
    kind = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    kind['model_input_names'] = ['input_ids', 'attention_mask']  # transformers 4: no token types, then
    settings = json.dumps({**kind, **settings}, indent=2)
    return {'tokenizer.json': backend.to_str(pretty=True), 'tokenizer_config.json': settings}


def byte_level_bpe(texts, vocab_size: int, special: list[str], normalizer=None, prefix_space=False):
    bpe = HFTokenizer(models.BPE())
    bpe.normalizer = normalizer
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    bpe.decoder = decoders.ByteLevel()
    how = dict(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    trainer = trainers.BpeTrainer(**how, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return bpe


def between(backend: HFTokenizer, start: str, end: str):
    """Puts the start and the end around every text."""
    ids = [(t, backend.token_to_id(t)) for t in (start, end)]
    return processors.TemplateProcessing(single=f'{start} $A {end}', special_tokens=ids)


def train_tokenizer(captions: list[str], context: int, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size entries, lower-cased; <pad> is 0, the end has the highest id."""
    start, end = '<|startoftext|>', '<|endoftext|>'
    space = [normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Strip()]
    normalizer = normalizers.Sequence([normalizers.NFC(), *space, normalizers.Lowercase()])
    bpe = byte_level_bpe(captions, vocab_size - 1, ['<pad>', start], normalizer, prefix_space=True)
    bpe.add_special_tokens([end])
    bpe.post_processor = between(bpe, start, end)
    return Tokenizer(bpe, context)


def read_tokenizer(file: Path, what: str = 'the tokenizer') -> HFTokenizer:
    """tokenizer.json; or vocab.txt, BERT's WordPiece with an entry a line, as ΔCLIP has it."""
    with reading(f'cannot read {what} {file}', 'a tokenizer.json or a WordPiece vocab.txt'):
        if file.suffix != '.txt':
            return HFTokenizer.from_str(read_text(file, what))
        words = read_text(file, what).rstrip('\n').split('\n')
    wordpiece = HFTokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    if {'[CLS]', '[SEP]'} <= set(words):
        wordpiece.post_processor = between(wordpiece, '[CLS]', '[SEP]')
    return wordpiece


def tokenizer_for(text_cfg, backend: HFTokenizer) -> Tokenizer:
    """In the layout that text_cfg stands for.   official: CLIP_benchmark/…/open_clip/factory.py"""
    mode = 'strip_sep_token' if (text_cfg.tokenizer_kwargs or {}).get('strip_sep_token') else 'eot'
    mode = 'clips' if text_cfg.tokenizer_mode or text_cfg.vocab_path else mode
    return Tokenizer(backend, text_cfg.context_length, mode, text_cfg.pool_type)


def tokenizer_of(place: Path, text_cfg) -> Tokenizer:
    """The tokenizer of an open_clip or Hugging Face directory, as its text_cfg says: in the directory, else
    in the repository that hf_tokenizer_name names; where none is named, open_clip takes CLIP's."""
    named = text_cfg.hf_tokenizer_name or text_cfg.vocab_path
    names = [Path(text_cfg.vocab_path or '').name, 'tokenizer.json', 'vocab.txt']

    def found_in(folder: Path) -> HFTokenizer | None:
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        backend = read_tokenizer(file) if file else None
        return backend if named or backend and backend.get_vocab_size() == 49408 else None

    backend = found_in(place)
    elsewhere = text_cfg.hf_tokenizer_name if named else 'openai/clip-vit-base-patch32'
    if backend is None and elsewhere not in (None, 'tokenizer.json'):
        said = f'the tokenizer of {place} is that of {elsewhere}, which is not in the directory'
        backend = found_in(fetch(elsewhere, said))
    if backend is None:
        fail(f'{place} has no tokenizer: none of {", ".join(filter(None, names))}')
    return tokenizer_for(text_cfg, backend)


# ----------------------------------------------------------------------------- tokenizers, of language models
class LLMTokenizer:
    """Text → token ids, for a language model. <image> and <pad> are added where it has none.

    bos: id that starts every text, or None;  eos: id that ends an answer, ends: all of these (Llama 3 has
    several); chat_template: its own (Jinja), or None."""

    def __init__(self, backend: HFTokenizer, special: dict, chat_template=None, ends=(), where: str = ''):
        """special: {'bos', 'eos', 'pad': token or None}"""
        self.backend, self.chat_template = backend, chat_template
        self.backend.no_padding(), self.backend.no_truncation()
        self.bos_token, self.eos_token = special.get('bos'), special.get('eos')
        self.pad_token = special.get('pad') or '<pad>'
        for name, token in (('bos', self.bos_token), ('eos', self.eos_token)):
            if (name == 'eos' or token) and (token is None or backend.token_to_id(token) is None):
                fail(f'{where}: {name}_token {token!r} is not in the tokenizer; see tokenizer_config.json')
        backend.add_special_tokens([t for t in (IMAGE, self.pad_token) if backend.token_to_id(t) is None])
        self.bos = backend.token_to_id(self.bos_token) if self.bos_token else None
        self.eos, self.pad, self.image = map(backend.token_to_id, (self.eos_token, self.pad_token, IMAGE))
        self.ends = {self.eos, *ends}
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, where each begins and ends in the text); special tokens are recognised, none is added."""
        found = self.backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True).strip()

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """The LLM's own chat template.   messages: [{'role': 'user' | 'assistant', 'content': text}]"""
        if self.takes_parts:
            messages = [{**m, 'content': as_parts(m['content'])} for m in messages]
        return self.fill_template(self.chat_template, messages, add_generation_prompt)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Templates of models that see take a list of images and texts, and show nothing of a mere text."""
        for content, parts in (('Is it?', False), (as_parts('Is it?'), True)):
            asked = [{'role': 'user', 'content': content}]
            if 'Is it?' in self.fill_template(self.chat_template, asked, False):
                return parts
        raise BadTemplate('does not show what the user says')

    def fill_template(self, template: str, messages: list[dict], add_generation_prompt: bool) -> str:
        def refuse(message: str):
            raise jinja2.TemplateError(message)

        def step(frame, event, argument):  # is called at each line that is run
            if next(left, None) is None or text.tell() > 5_000_000:
                raise jinja2.TemplateError('five million steps or characters')
            return step

        tokens = {'bos_token': self.bos_token or '', 'eos_token': self.eos_token, 'raise_exception': refuse}
        text, left, traced = io.StringIO(), iter(range(5_000_000)), sys.gettrace()
        try:
            if template not in (V1_TEMPLATE, SHORT_TEMPLATE):  # ours end, and are rendered for every sample
                sys.settrace(step)  # a sandbox does not end what is endless
            made = compiled_template(template).generate
            text.writelines(made(tokens, messages=messages, add_generation_prompt=add_generation_prompt))
            return text.getvalue()
        except Exception as e:  # a template can compute anything
            raise BadTemplate(f'ends in {type(e).__name__}: {str(e)[:400]}') from None
        finally:
            sys.settrace(traced)

    def files(self, max_length: int, template: str | None = None) -> dict[str, str]:
        """File name → content, for transformers' AutoTokenizer.   template: in place of its own"""
        template = template or self.chat_template
        named = {'bos_token': self.bos_token, 'eos_token': self.eos_token, 'pad_token': self.pad_token}
        settings = {'model_max_length': max_length, **named, 'image_token': IMAGE, 'chat_template': template}
        files = tokenizer_files(self.backend, {k: v for k, v in settings.items() if v is not None})
        return files | ({'chat_template.jinja': template} if template else {})


def as_parts(text: str) -> list[dict]:
    words = {'type': 'text', 'text': text.replace(f'{IMAGE}\n', '').replace(IMAGE, '')}
    return [{'type': 'image'}] * (IMAGE in text) + [words]


@functools.lru_cache(4)
def compiled_template(template: str):
    """In Jinja's sandbox, since it comes with the weights; the settings are those of transformers."""
    # the tag by which transformers finds what an assistant says renders to what is inside
    template = re.sub(r'\{%(-?)\s*generation\s*(-?)%\}', r'{%\1 if true \2%}', template)
    template = re.sub(r'\{%(-?)\s*endgeneration\s*(-?)%\}', r'{%\1 endif \2%}', template)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template)


# The template of the tiny language model; and v1, which has the system sentence before it.
SHORT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}"
SHORT_TEMPLATE += " ASSISTANT:{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
V1_TEMPLATE = SHORT_TEMPLATE.replace('{{ bos_token }}', '{{ bos_token }}' + V1_SYSTEM + ' ')
# Before a template that knows mere text: lets it be given a list of images and texts, as transformers does.
TAKES_PARTS = """{%- set ns = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- set text = m['content'] -%}
{%- if text is not string -%}
{%- set images = text | selectattr('type', 'equalto', 'image') | list -%}
{%- set words = text | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- set text = '<image>\n' * (images | length) + words -%}
{%- endif -%}
{%- set ns.messages = ns.messages + [{'role': m['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""


def train_llm_tokenizer(texts: list[str], vocab_size: int) -> LLMTokenizer:
    """A byte-level BPE for the tiny language model."""
    bpe = byte_level_bpe(texts, vocab_size, ['<s>', '</s>', '<pad>', IMAGE])
    return LLMTokenizer(bpe, {'bos': '<s>', 'eos': '</s>', 'pad': '<pad>'}, SHORT_TEMPLATE)


def read_llm_tokenizer(place: Path) -> LLMTokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.json, or sentencepiece's tokenizer.model."""
    settings, special = {}, {}
    for name in ('chat_template.json', 'config.json', 'special_tokens_map.json', 'tokenizer_config.json'):
        if (place / name).is_file():  # the last one counts
            settings |= {k: v for k, v in read_json(place / name, str(place)).items() if v not in (None, -1)}
    template = settings.get('chat_template')
    if (place / 'chat_template.jinja').is_file():
        template = read_text(place / 'chat_template.jinja', str(place))
    with reading(f'{place}: tokens and chat_template of tokenizer_config.json', 'what transformers writes'):
        if (place / 'tokenizer.json').is_file():
            backend = read_tokenizer(place / 'tokenizer.json')
        elif (place / 'tokenizer.model').is_file():
            backend = from_sentencepiece(place / 'tokenizer.model', settings)
        else:
            fail(f'{place} has neither tokenizer.json nor tokenizer.model')
        for name in ('bos', 'eos', 'pad'):
            token, number = settings.get(f'{name}_token'), settings.get(f'{name}_token_id')
            token = token['content'] if isinstance(token, dict) else token
            special[name] = backend.id_to_token(number) if token is None and number is not None else token
        if isinstance(template, list):  # several, by name
            template = next((t['template'] for t in template if t['name'] == 'default'), None)
        ends = settings.get('eos_token_id', settings.get('text_config', {}).get('eos_token_id'))  # of a LLaVA
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        list(map(backend.id_to_token, ends))  # are these ids?
        return LLMTokenizer(backend, special, template, ends, str(place))


def from_sentencepiece(file: Path, settings: dict) -> HFTokenizer:
    """sentencepiece's BPE (Llama, Vicuna) for the tokenizers library.   settings: of tokenizer_config.json"""
    with reading(f'cannot read {file}', "sentencepiece's tokenizer.model"):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    control = [i for i in vocab.values() if pieces.is_control(i) or pieces.is_unknown(i)]
    odd = {*control, *(i for i in vocab.values() if pieces.is_byte(i) or pieces.is_unused(i))}
    ordinary = {piece for piece, i in vocab.items() if i not in odd}
    merges = []  # a piece's score says when it is made, from any two pieces that make it up; a run of one
    for piece in ordinary:  # character grows from the left, so that of equal scores the longer left part wins
        for a, b in [(piece[:k], piece[k:]) for k in range(1, len(piece))]:
            if a in ordinary and b in ordinary:
                merges.append((-pieces.get_score(vocab[piece]), -len(a), -len(b), a, b))
    how = dict(unk_token=pieces.id_to_piece(pieces.unk_id()), fuse_unk=True, byte_fallback=True)
    backend = HFTokenizer(models.BPE(vocab, [(a, b) for *_, a, b in sorted(merges)], **how))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    text = '  '.join(['ﬁ ½ ☃', *sorted(ordinary), '']).replace('▁', ' ')
    if backend.encode(text).ids != pieces.encode(text):
        fail(f"{file}: no BPE with Llama's settings; have transformers write a tokenizer.json beside it")
    start = settings.get('add_prefix_space', True)
    if not (start and settings.get('legacy', True)):  # no space before what follows a special token
        scheme, backend.normalizer = 'first' if start else 'never', normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Metaspace('▁', prepend_scheme=scheme, split=False)
    steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(' ', 1 if start else 0, 0)])
    tokens = {i: {'content': pieces.id_to_piece(i), 'special': True} for i in control}
    tokens |= {int(i): token for i, token in settings.get('added_tokens_decoder', {}).items()}
    backend.add_tokens([AddedToken(**tokens[i] | {'normalized': False}) for i in sorted(tokens)])
    if wrong := [i for i in tokens if backend.token_to_id(tokens[i]['content']) != i]:
        fail(f'{file}: added_tokens_decoder has the id {wrong[0]}; ids must follow one another')
    return backend


# ------------------------------------------------------------------------------------------- files of weights
OPEN_CLIP_FILES = ['open_clip_model.safetensors', 'open_clip_pytorch_model.safetensors']
OPEN_CLIP_FILES += ['open_clip_pytorch_model.bin']
HF_FILES = [file + end for file in ('model.safetensors', 'pytorch_model.bin') for end in ('', '.index.json')]


def read_weights(place: Path, names: list[str], rename=str) -> dict[str, Tensor]:
    """All weights of a directory, mapped into memory and read when they are used; nothing in a file is run.

    names: of the files, the first that exists counts; an index stands for its shards.  rename: their name →
    the one wanted here, '' to leave it out."""
    file = next((place / name for name in names if (place / name).is_file()), None)
    if file is None:
        fail(f'{place} has no weights: none of {", ".join(names)}')
    files = [file]
    if file.name.endswith('.index.json'):
        shards = read_json(file, str(place)).get('weight_map')
        if not isinstance(shards, dict) or not shards:
            fail(f'{file}: weight_map is {str(shards)[:60]!r}; expected names of weights and their files')
        with reading(f'{file}: weight_map', 'files beside it'):
            files = sorted({inside(place, str(name)) for name in shards.values()})
    weights: dict[str, Tensor] = {}
    for name, w in ((name, w) for file in files for name, w in read_file(file).items() if rename(name)):
        if rename(name) in weights:
            fail(f'{place}: {name}: surplus, it is there twice (or under an older name as well)')
        weights[rename(name)] = w
    return weights


def read_file(file: Path) -> dict[str, Tensor]:
    check_export(file)
    with reading(f'cannot read {file}', 'weights by their names, and nothing else'):
        if file.suffix == '.safetensors':
            return load_file(file)
        weights = torch.load(file, map_location='cpu', weights_only=True, mmap=True)  # runs no code
        if not all(isinstance(w, Tensor) for w in weights.values()):
            raise ValueError('it holds more than weights')
        return weights


def check_weights(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Strict: a weight that is missing, surplus, of another shape or quantised is listed as an error."""
    wrong = [f'{n}: missing, {tuple(w.shape)} expected' for n, w in expected.items() if n not in found]
    for name, w in found.items():
        shape = tuple(w.shape)
        if name not in expected:
            wrong.append(f'{name}: surplus, {shape}')
        elif w.shape != expected[name].shape or not w.is_floating_point():
            wrong.append(f'{name}: {w.dtype} {shape}, floating point {tuple(expected[name].shape)} expected')
    if wrong:
        fail(f'{where} is of another architecture:\n  ' + '\n  '.join(wrong))


def fill(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Gives every parameter its weight, strictly, as a copy in the parameter's dtype. A model on the meta
    device comes to life by it: no first weights are drawn, none are held twice."""
    ours = model.state_dict()
    check_weights(weights, ours, where)
    new = {name: torch.empty(w.shape, dtype=w.dtype, device='cpu') for name, w in ours.items()}
    model.load_state_dict({n: w.copy_(weights[n]) for n, w in new.items()}, assign=True)


def write_weights(file: Path, weights: dict[str, Tensor]) -> None:
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    write(file, lambda beside: save_file(weights, beside, metadata={'format': 'pt'}))


def save_directory(folder: Path, config: dict, weights: dict[str, Tensor], files: dict[str, str]) -> None:
    """A model as Hugging Face has it; config.json is written last.   files: of tokenizer and processor"""
    (folder / 'config.json').unlink(missing_ok=True)
    tied = config.get('tie_word_embeddings')
    kept = {name: w for name, w in weights.items() if not (tied and name.endswith('lm_head.weight'))}
    write_weights(folder / 'model.safetensors', kept)
    for name, text in {**files, 'config.json': json.dumps(config, indent=2)}.items():
        write(folder / name, text)


def model_type(place: Path) -> str | None:
    """What the config.json of a Hugging Face directory says that it is."""
    file = place / 'config.json'
    return read_json(file, str(place)).get('model_type') if file.is_file() else None


# ---------------------------------------------------------------------------------------------------- the hub
SMALL_FILES = ['*.json', '*.jinja', '*.txt', 'tokenizer.model']
# the first of these that a repository has is fetched
WEIGHTS = [['adapter_model.*', 'non_lora_trainables.bin'], *([name] for name in OPEN_CLIP_FILES)]
WEIGHTS += [['model.safetensors', 'model-*.safetensors'], ['pytorch_model*.bin']]


def locate(name: str | os.PathLike, flag: str = '') -> Path:
    """A directory as it is; else a repository of Hugging Face's hub by its id, fetched.   flag: for errors"""
    if Path(name).exists():
        return Path(name)
    said = f'{flag} {name}'.strip() + ': no such file or directory'
    if not is_id(name):
        fail(f"{said}, and no repository id of the hub such as 'openai/clip-vit-large-patch14'")
    return fetch(str(name).removeprefix('hf-hub:'), said, with_weights=True)


def is_id(name: str | os.PathLike) -> bool:
    """Whether it can only be a repository id: of the form org/name, and neither it nor org is here."""
    fits = re.fullmatch(r'(hf-hub:)?[\w-][\w.-]*/[\w.-]+', str(name)) and not str(name).startswith('runs/')
    return bool(fits) and not Path(name).exists() and not Path(name).parent.is_dir()


@functools.cache
def fetch(name: str, said: str, with_weights: bool = False) -> Path:
    """A repository of the hub → the folder it was fetched into (~/.cache/huggingface): its small files and
    one kind of weights. Where there is no network, what was fetched before.   said: for errors"""
    with reading(f'{said}, and fetching {name} from the hub failed', 'its files there, or fetched before'):
        try:
            files = HfApi().list_repo_files(name)
        except Exception:
            with contextlib.suppress(Exception):
                return Path(snapshot_download(name, allow_patterns=SMALL_FILES, local_files_only=True))
            raise  # this one says more than that nothing was fetched before
        groups = WEIGHTS if with_weights else []
        group = next((g for g in groups if any(fnmatch.filter(files, pattern) for pattern in g)), [])
        return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *group]))


# --------------------------------------------------------------------------------------------------- settings
class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One line; of a flag that does not exist, the nearest one."""
        typed = re.findall(r'(?<!\S)--[^\s=]+', message.partition('unrecognized arguments:')[2])
        near = [n for t in typed for n in difflib.get_close_matches(t, self._option_string_actions, 1)]
        meant = f'; did you mean {", ".join(near)}?' if near else ''
        self.exit(2, f'error: {message}{meant} ({self.prog} --help lists the settings)\n')


def finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f'{text} is not finite')
    return float(text)


def whole(text: str) -> int:
    if not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f'{text} has more than 64 bits')
    return int(text)


NUMBERS = {float: finite, int: whole}  # how a flag of this type is read


def parse(config_class, doc: str, argv: list[str] | None = None) -> tuple[object, set[str]]:
    """Command line → (config, names of the flags given). Help texts are the comments in the dataclass."""
    field_lines = re.findall(r'^ +(\w+): [^#\n]*# *(.*)$', inspect.getsource(config_class), re.M)
    comments, hints = dict(field_lines), typing.get_type_hints(config_class)
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser = Parser(description=doc, allow_abbrev=False, **how)
    for field in fields(config_class):
        hint, inner = hints[field.name], typing.get_args(hints[field.name])
        if typing.get_origin(hint) is typing.Literal:
            how = {'choices': [value for value in inner if value]}
        else:
            kind = next((t for t in inner if t is not type(None)), hint)  # X of X | None
            how = {'type': NUMBERS.get(kind, kind), 'metavar': kind.__name__}
            how = {'action': argparse.BooleanOptionalAction} if kind is bool else {**how, **field.metadata}
        default = '' if field.default in (None, '', False) else f' (default: {field.default})'
        text = comments.get(field.name, '') + default
        parser.add_argument('--' + field.name, help=text.replace('%', '%%'), **how)
    flags = vars(parser.parse_args(argv))
    return config_class(**flags), set(flags)


# -------------------------------------------------------------------------------------------------- processes
def start_processes(hours: int | None = None) -> tuple[int, int, torch.device]:
    """(rank, world size, device), from torchrun's environment if there is one. gloo on CPUs, NCCL on GPUs.

    hours: that a rank waits for the others; default: torch's, minutes."""
    keep_freed_memory()
    for name in ('stdout', 'stderr'):
        if not isinstance(getattr(sys, name), Screen):
            setattr(sys, name, Screen(getattr(sys, name)))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if 'RANK' in os.environ:
        needed = {'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'}
        if missing := sorted(needed - set(os.environ)):
            fail(f'RANK is set, but not {", ".join(missing)}: start it with torchrun, or unset RANK')
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        how = {'timeout': timedelta(hours=hours)} if hours else {}
        store, rank, world = next(dist.rendezvous('env://', **how))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':  # torchrun's store knows the addresses of killed ranks
            store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, **how)
    return *rank_and_world(), device


class Screen:
    """stdout or stderr. Once nobody reads it, or its disk is full, what is written goes nowhere: training and
    measuring are not lost with it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as e:
            self.stream = open(os.devnull, 'w')
            print(f'note: the output cannot be written any more ({e}); it goes on', file=sys.stderr)

    def flush(self) -> None:
        """It is done already."""


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def launcher_gone() -> bool:
    return dist.is_initialized() and os.getppid() != PARENT


def end_launcher() -> None:
    """Where all ranks stop on purpose: torchrun would end in a traceback, or start them again."""
    first = 'TORCHELASTIC_RUN_ID' in os.environ and os.environ['LOCAL_RANK'] == '0'
    if first and os.getppid() == PARENT:
        os.kill(PARENT, signal.SIGUSR1)


def gather_objects(value) -> list:
    """[value of rank 0, value of rank 1, …] on all ranks."""
    everyone = [value] * rank_and_world()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def from_rank_0(function):
    """What it returns on rank 0, on all ranks. The others do not call it."""
    values = [function() if rank_and_world()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def keep_freed_memory() -> None:
    """Lets glibc reuse freed tensors; else it hands them back after each operation and gets zeroed pages."""
    if platform.libc_ver()[0] == 'glibc':
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
        if libc.mallopt(mmap_threshold, 32 << 20):  # no more is taken; the other one alone would do harm
            libc.mallopt(trim_threshold, 2**31 - 1)


@functools.cache  # what is running, whatever happens to the files meanwhile
def commit() -> str:
    """Short hash of this code's commit, with '-dirty' where the code differs from it."""
    command = "git describe --always --dirty --exclude '*'"
    found = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or 'unknown'


@functools.cache
def code() -> str:
    """A digest of this project's files that the process runs, as they were when it first asked."""
    loaded = {os.path.realpath(m.__file__) for m in [*sys.modules.values()] if getattr(m, '__file__', None)}
    files = sorted(Path(os.path.realpath(__file__)).parent.glob('*.py'))
    return digest([sha256(file) for file in files if str(file) in loaded])


def digest(of) -> str:
    return hashlib.blake2b(json.dumps(of).encode(), digest_size=3).hexdigest()


def versions() -> dict[str, str]:
    libraries = {library.__name__: library.__version__ for library in (torch, torchvision, np)}
    return {'python': platform.python_version(), **libraries}


# ---------------------------------------------------------------------------------------------- run directory
STATE = {'step': int, **dict.fromkeys(('config', 'model', 'optimizer', 'data'), dict)}  # of a checkpoint
# settings that change no result, but for rounding
FREE_ON_RESUME = 'out resume workers compile micro_batch log_every save_every chat max_bad index_dir'
FREE_ON_RESUME = {*FREE_ON_RESUME.split(), 'plan', 'mfu', 'gpu'}


def write(path: Path, content, kept_as: str = '') -> None:
    """Writes beside, fsyncs, renames: a file is the old one or the new one, never half. Disk full: says so.

    content: a text, or a function that is given the path to write to.  kept_as: name for the old file"""
    beside = path.with_name(path.name + '.tmp')
    try:
        beside.unlink(missing_ok=True)
        beside.touch()
        mode = beside.stat().st_mode  # as the umask has it; safetensors lets nobody else read
        beside.write_text(content, encoding='utf-8') if isinstance(content, str) else content(beside)
        beside.chmod(mode)
        with open(beside, 'rb') as file:
            os.fsync(file.fileno())
        if kept_as and path.exists():
            os.replace(path, path.with_name(kept_as))
        os.replace(beside, path)
    except Exception as e:  # torch.save and safetensors raise their own kinds for a full disk
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        said = f'cannot write {path}: {e}. What was saved before is intact; when there is room and permission'
        fail(f'{said}, give the same command again, to a training with --resume')


@functools.cache
def lock(out: Path):
    """A run's folder is for one process at a time; the kernel releases it, however that one ends."""
    file = open(out / 'lock', 'w')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f'--out {out}: another process is training there; wait for it, end it, or give another --out')
    except OSError:  # a file system without locks
        pass
    return file


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, 'rb') as content:
        while part := content.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def settings_of(out: Path) -> dict:
    """train_config.json, if our training wrote it; else nothing: it is no run."""
    try:
        about = json.loads((out / 'train_config.json').read_text(encoding='utf-8'))
        return about if {'config', 'commit', 'versions', 'processes'} <= set(about) else {}
    except (OSError, ValueError, TypeError, RecursionError):  # none is there, or somebody else's
        return {}


def check_export(file: Path) -> None:
    """Weights in a run are as training exported them."""
    known = settings_of(file.parent).get('sha256')
    if known is not None and known.get(file.name) != sha256(file):
        why = 'by the sha256 in train_config.json: it is damaged, replaced or being written'
        fail(f'{file} is not what training wrote, {why}. --resume of that run writes it again')


def open_run(cfg, given: set[str]) -> tuple[dict | None, object]:
    """(the state to resume or None, the configuration that holds). An --out that is neither empty nor a run
    to --resume is refused; a run goes on with its own settings. Changes nothing on the disk."""
    out, state, old = Path(cfg.out), None, {}
    if not cfg.out.strip():
        fail('--out: must be the name of a folder')
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # by torchrun: goes on
    if out.is_dir() and any(file.name != 'lock' for file in out.iterdir()) or out.is_file():
        if not (about := settings_of(out)):
            fail(f'--out {out} is not empty and holds no run: give another --out')
        if not (cfg.resume or restarted):
            fail(f'--out {out} holds a run: continue it with --resume, or give another --out')
        state = load_state(out)
        if state is None and any((out / name).exists() for name in (OPEN_CLIP_FILES[0], HF_FILES[0])):
            fail(f'--out {out} holds a model but no train_state.pt to go on from: give another --out')
        old = (state or about)['config']
    known = {f.name for f in fields(cfg)}
    if unknown := sorted(set(old) - known):
        fail(f'--resume: the run in {out} is not of this stage, or of another version: it has --{unknown[0]}')
    derived = {'steps'} if getattr(cfg, 'samples', 0) else set()
    for name in (given if cfg.resume else known - derived) & set(old) - FREE_ON_RESUME:  # else: this very run
        if getattr(cfg, name) not in (old[name], None, ''):  # these are filled in
            fail(f'--{name} {getattr(cfg, name)}: the run in {out} has {old[name]}; leave it out to continue')
    kept = {name: value for name, value in old.items() if name not in given | {'out', 'resume'}}
    cfg = replace(cfg, **kept, resume=False)
    settings = {name: v for name, v in asdict(cfg).items() if name not in FREE_ON_RESUME}
    first, *others = gather_objects((state and state['step'], settings))
    if any(theirs != first for theirs in others):  # without a file system that all ranks share
        fail(f'--out {out}: the ranks found different checkpoints or settings there')
    return state, cfg


def load_state(out: Path) -> dict | None:
    """The newest checkpoint that can be read; None if there is none. Nothing but tensors is unpickled."""
    broken = []
    for file in [f for f in (out / 'train_state.pt', out / 'previous_train_state.pt') if f.exists()]:
        try:
            if damaged := zipfile.ZipFile(file).testzip():  # torch.load looks at no checksum
                raise ValueError(f'{damaged} is not as it was written')
            state = torch.load(file, 'cpu', weights_only=True, mmap=True)  # all ranks share its pages
            held = state.get if isinstance(state, dict) else {}.get
            if not all(isinstance(held(key), kind) for key, kind in STATE.items()):
                raise ValueError('it is no checkpoint of this version')
            if broken and rank_and_world()[0] == 0:
                print(f'warning: {broken[0]}; going on from the one before, {file}', file=sys.stderr)
            return state
        except Exception as e:
            broken.append(f'cannot read {file} ({type(e).__name__}: {said_by(e)[:100]!r})')
    if broken:
        fail(f'{"; ".join(broken)}: nothing is left to resume; start again in another --out')


def check_resumed(state: dict | None, known_by: dict[str, dict[str, str]]) -> None:
    """A run goes on with what it began with.   known_by: {flag: {what of it: its fingerprint}}"""
    for flag, found in known_by.items() if state else ():
        if differ := [what for what in found if state['data'].get(flag, {}).get(what) != found[what]]:
            said = f'the {" and the ".join(differ)} of {flag} are not those that the run began with'
            fail(f'--resume: {said}: put them back as they were, or train in another --out')


def load_optimizer(optimizer, state: dict) -> None:
    with reading('train_state.pt: the optimizer', 'that of this run'):
        optimizer.load_state_dict(state['optimizer'])
        for p, of in optimizer.state.items():
            if any(v.shape not in (p.shape, ()) for v in of.values()):
                raise ValueError(f'it is of a weight of another shape than {tuple(p.shape)}')


def write_settings(cfg, updates: int = 0) -> dict:
    """train_config.json, by which a folder is known to be a run.   updates: of the model exported there"""
    out, about = Path(cfg.out), {'config': asdict(cfg), 'commit': commit(), 'versions': versions()}
    before = settings_of(out)
    if updates and updates == before.get('updates'):  # nothing was trained since then
        about['commit'], about['code'] = before['commit'], before.get('code', [])
    else:
        about['code'] = list(dict.fromkeys([*before.get('code', []), code()]))
    about |= {'processes': rank_and_world()[1], 'threads': torch.get_num_threads(), 'updates': updates}
    with reading(f'--out {cfg.out}', 'a folder that can be made and written into'):
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
    exported = [file for file in (out / OPEN_CLIP_FILES[0], out / HF_FILES[0]) if updates and file.is_file()]
    about['sha256'] = {file.name: sha256(file) for file in exported}
    write(out / 'train_config.json', json.dumps(about, indent=2))
    return about


def hear(handler) -> dict:
    """Of the signals that end a program, SIGHUP unless nohup has it ignored. Returns the handlers before."""
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM, *hangup)}


def step_of(line: str) -> float:
    """Of a line of log.jsonl; infinite where it is damaged."""
    try:
        return int(json.loads(line)['step'])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


class Run:
    """What happens around the steps of either stage: first output, log lines, checkpoints, signals.

    facts: what is trained on what, and what an update costs, for the first output.  pairs: in the data"""

    def __init__(self, cfg, first_step: int, steps: int, facts: str, device: torch.device, pairs: int = 0):
        self.cfg, self.steps, self.pairs = cfg, steps, pairs
        self.out, self.saved_step, self.started, self.signal = Path(cfg.out), first_step, time.time(), 0
        self.rank, self.world = rank_and_world()
        self.last_log, self.last_lap = (self.started, first_step), 0.0
        if not 0 <= first_step <= steps:
            fail(f'{self.out}/train_state.pt is after update {first_step} of {steps}: it is not of this run')
        self.handlers = hear(self.on_signal)
        self.unwritten = ''
        self.bad, self.new_bad, self.new_samples, self.samples, self.row = Counter(), [], 0, 0, (-2, 0)
        if self.rank > 0:
            return
        before = settings_of(self.out) if first_step else {}
        about = write_settings(cfg)
        log = self.out / 'log.jsonl'  # of a run that goes on: as far as its checkpoint
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines() if log.exists() else []
        write(log, ''.join(f'{line}\n' for line in lines if step_of(line) <= first_step))
        if broken := sum(step_of(line) == math.inf for line in lines):
            print(f'note: {log}: {broken} damaged lines left out')
        for what in ('processes', 'threads'):
            if (then := before.get(what, about[what])) != about[what]:
                print(f'note: {then} {what} until now, {about[what]} from here on: other rounding of sums')
        print(textwrap.fill(', '.join(f'{name} {value!r}' for name, value in about['config'].items()), 120))
        names = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
        print(f'commit {about["commit"]}, {names}, {device}\n{facts}')
        print(f'continuing after update {first_step}\n' * (first_step > 0), end='', flush=True)

    def bar(self, batches, name: str, done: int, total: int) -> tqdm:
        """A progress bar around them; in a file, no line for each update."""
        how = dict(disable=self.rank > 0, smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30)
        return tqdm(batches, initial=done, total=total, desc=name, **how)

    def lap_ms(self, wait: bool) -> float:
        """Milliseconds since the last lap.   wait: for a GPU, which takes time, to be exact"""
        if wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        before, self.last_lap = self.last_lap, time.perf_counter()
        return 1000 * (self.last_lap - before)

    def log(self, step: int, samples: int, bar, **row) -> None:
        """One line in log.jsonl; results/README.md says what they mean.   samples: to an update"""
        if self.rank > 0:
            return
        (before, step_before), self.last_log = self.last_log, (time.time(), step)
        seconds, unit = self.last_log[0] - before, 1 if platform.system() == 'Darwin' else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
        row = {'step': step, **row, 'images_per_s': (step - step_before) * samples / seconds}
        row['peak_memory_mb'] = peak / 2**20
        rounded = {k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in row.items()}
        self.unwritten += json.dumps(rounded) + '\n'
        log = self.out / 'log.jsonl'
        size = log.stat().st_size if log.exists() else 0
        try:
            with open(log, 'a') as file:
                file.write(self.unwritten)
            self.unwritten = ''
        except OSError as e:  # a full disk: training goes on, and the lines wait
            with contextlib.suppress(OSError):
                os.truncate(log, size)
            print(f'warning: cannot write {log}: {e}; its lines wait for the next one', file=sys.stderr)
        losses = f'loss adv {row["loss_adv"]:.3f} clean {row["loss_clean"]:.3f}'
        bar.set_postfix_str(f'ε {row["eps"]:.1f} {losses} {row["images_per_s"]:.0f} img/s', refresh=False)

    def save(self, step: int, state: dict) -> None:
        """train_state.pt first, since all else can be derived from it; the one before it is kept."""
        self.saved_step = step
        if self.rank > 0:
            return
        state = {'step': step, 'config': asdict(self.cfg), **state}
        write(self.out / 'train_state.pt', lambda f: torch.save(state, f), kept_as='previous_train_state.pt')

    def write_card(self, text: str) -> None:
        """Once: what is written into it afterwards, by eval.py or by hand, stays."""
        if not (self.out / 'README.md').exists():
            write(self.out / 'README.md', text)

    def kept(self) -> str:
        kept = f'the checkpoint after update {self.saved_step} is kept'
        return kept if self.saved_step else 'nothing was saved yet'

    def read(self, batches):
        """The batches; an image that cannot be decoded ends the run with its name."""
        try:
            for batch in batches:
                if isinstance(batch, PairBatch):
                    self.new_bad += batch.bad
                    self.new_samples += len(batch.images)
                yield batch
        except BadImage as e:  # from a worker it comes with the worker's traceback before it
            said = str(e).strip().splitlines()[-1]
            what_now = 'With the same file put back, --resume; with another one, train in another --out'
            fail(f'{said}; stopped, {self.kept()}. {what_now}')

    def stop_if_not_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if not math.isfinite(grad_norm):  # the same on all ranks
            said = f'the loss is {loss:g} and the gradient norm {grad_norm:g}; stopped, {self.kept()}'
            fail(f'update {step + 1}: {said}. Try a lower --lr or a longer --warmup in another --out')

    def on_signal(self, number, frame) -> None:
        self.signal = number
        if not dist.is_initialized():  # else it may be the same one, of Slurm and again of torchrun
            signal.signal(number, self.handlers[number])  # a second one ends the process at once

    def asked_to_stop(self) -> int:
        """The signal that any of the ranks got, or 0. When torchrun is gone, nobody else ends its ranks."""
        if launcher_gone():
            self.signal = self.signal or signal.SIGTERM
        signals, bad, samples = zip(*gather_objects((self.signal, self.new_bad, self.new_samples)))
        self.new_bad, self.new_samples = [], 0
        self.count_bad(sorted(sum(bad, [])), sum(samples))
        return max(signals)

    def count_bad(self, found: list[tuple[int, str, str]], samples: int) -> None:
        """Of an update: the bad samples of all ranks, as PairBatch has them. Too many, and all ranks stop."""
        longest, before = 0, self.bad.total()
        for number, kind, more in found:
            last, length = self.row
            self.row = number, length + 1 if number <= last + 1 else 1
            longest = max(longest, self.row[1])
            self.bad[kind] += 1
            if self.rank == 0 and self.bad.total() <= 10:
                print(f'warning: {kind}: {more}; another sample takes its place', file=sys.stderr)
        if self.rank == 0 and found:
            with contextlib.suppress(OSError), open(self.out / 'bad_samples.txt', 'a') as file:
                file.writelines(f'{number}: {kind}: {more}\n' for number, kind, more in found)
        self.samples, total, lost = self.samples + samples, self.bad.total(), self.bad[LOST_SHARD]
        if self.rank == 0 and total > 10 and total.bit_length() > before.bit_length():  # twice as many
            print(f'warning: {self.bad_samples()}', file=sys.stderr)
        # a lost shard is many of its window's samples: what counts is how many these are of all
        met, limit = self.samples + total, self.cfg.max_bad
        over = lost > limit * max(met, self.pairs) or self.samples >= 1000 and total - lost > limit * met
        if longest >= IN_A_ROW or over:
            many = f'{IN_A_ROW} in a row' if longest >= IN_A_ROW else f'more than --max_bad {limit:g}'
            fail(f'{many}: {self.bad_samples()}; stopped, {self.kept()}')

    def bad_samples(self) -> str:
        kinds = ', '.join(f'{n} × {kind}' for kind, n in self.bad.most_common())
        return f'{self.bad.total()} bad samples beside {self.samples} good ones since the start ({kinds})'

    def leave(self, step: int, number: int) -> None:
        """After a signal, when everything is saved."""
        if self.rank == 0:
            hosts = int(os.environ.get('GROUP_WORLD_SIZE', 1))  # as torchrun calls it
            launcher = f'torchrun {f"--nnodes {hosts} … " * (hosts > 1)}--nproc_per_node'
            launcher = f'{launcher} {self.world // hosts}' if dist.is_initialized() else 'python'
            command = f'{launcher} {shlex.quote(sys.argv[0])} --out {shlex.quote(str(self.out))} --resume'
            said = f'saved after update {step} of {self.steps}. Continue with\n  {command}'
            print(f'{signal.Signals(number).name}: {said}', flush=True)
        self.end_processes()
        end_launcher()
        sys.exit(128 + number)

    def finish(self, what_now: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.rank == 0:
            if self.bad:
                print(self.bad_samples())
            print(f'done: {self.steps} updates, {(time.time() - self.started) / 60:.1f} minutes; {what_now}')
        self.end_processes()

    def end_processes(self) -> None:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
