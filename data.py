"""Data: image-text pairs, their pixels in [0, 1], their order, their tokens.

    pairs  = load_pairs('easyvqa', 'train')             # or a folder with metadata.jsonl
    loader = batches(pairs, tokenizer, size, ...)       # uint8 images [b, 3, S, S] and token ids [b, L]
    images = class_set('CIFAR10', 'test', root='data')  # for zero-shot classification: images, class names, templates
    images = caption_set('easyvqa', 'test')             # for retrieval: images and the captions of each

`python data.py` prints what the easy-VQA captions are derived from. Everything random here is a function of
(seed, number of the sample in the stream), never of a rank, a worker or a batch size.
"""
import fnmatch
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torchvision.transforms.v2 import functional as TF

COLOURS = ('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow')
SHAPES = ('circle', 'rectangle', 'triangle')


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator that depends on its three arguments and on nothing else; the global one is never touched."""
    digest = hashlib.blake2b(f'{seed}/{purpose}/{number}'.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)


def read_json(path: Path, what: str, kind: type = object):
    """The content of a JSON file.   what: the flag or the run that named it, for the error;  kind: dict where it must be an object"""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise SystemExit(f'error: {what}: cannot read {path}: {e}') from None
    if not isinstance(content, kind):
        raise SystemExit(f'error: {what}: {path} holds {str(content)[:60]!r}; expected a JSON object')
    return content


def peek_json(path: Path) -> dict | None:
    """The object in a JSON file, to see what a folder is; {} if it holds something else, None if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------------------ image-text pairs
@dataclass
class Pairs:
    """n images and their captions. `augment` names the distortion that suits them ('shapes', 'crop')."""
    files: list[Path]
    captions: list[str]
    augment: str
    note: str  # one line for the user: where the captions come from and how many there are

    def __len__(self) -> int:
        return len(self.files)

    def keep(self, rows: list[int], note: str) -> 'Pairs':
        return Pairs([self.files[i] for i in rows], [self.captions[i] for i in rows], self.augment, self.note + note)


def load_pairs(data: str, split: str = 'train', holdout: str = '') -> Pairs:
    """data: 'easyvqa' or a folder.  split: train, val or test.  holdout: 'red circle,blue triangle', captions left out."""
    if split not in ('train', 'val', 'test'):
        raise SystemExit(f'error: --split {split}: must be train, val or test')
    pairs = easyvqa(split) if data == 'easyvqa' else folder(Path(data), split)
    if held := held_out(holdout):
        known = {pair_name(c) for c in pairs.captions}
        if missing := [h for h in held if h not in known]:
            raise SystemExit(f'error: --holdout {", ".join(missing)}: no caption of --data {data} says so; '
                             f'captions look like "{pairs.captions[0]}"')
        rows = [i for i, c in enumerate(pairs.captions) if pair_name(c) not in held]
        pairs = pairs.keep(rows, f'; {len(pairs) - len(rows)} images of {len(held)} held-out captions left out')
    if not len(pairs):
        raise SystemExit(f'error: --data {data}: no image is left for --split {split}')
    return pairs


def held_out(holdout: str) -> list[str]:
    """'red circle, a blue triangle' → ['red circle', 'blue triangle']"""
    return [pair_name(h) for h in holdout.split(',') if h.strip()]


def pair_name(caption: str) -> str:
    """'a red circle' → 'red circle'"""
    return re.sub(r'^(a|an|the) ', '', ' '.join(caption.lower().split()))


def easyvqa(split: str) -> Pairs:
    """easy-VQA (`pip install easy-vqa`, MIT): images with one coloured shape; the captions follow from its questions.

    val is a tenth of the captioned training images and never trained on, whatever --seed a run has.
    """
    facts, n_images = easyvqa_facts('test' if split == 'test' else 'train')
    rows = sorted(facts)
    if split != 'test':
        order = torch.randperm(len(rows), generator=generator(0, 'easyvqa val', 0)).tolist()
        chosen = order[:len(rows) // 10] if split == 'val' else order[len(rows) // 10:]
        rows = [rows[i] for i in sorted(chosen)]
    root = easyvqa_root() / ('test' if split == 'test' else 'train') / 'images'
    return Pairs([root / f'{i}.png' for i in rows], [f'a {facts[i][0]} {facts[i][1]}' for i in rows], 'shapes',
                 f'easyvqa: {len(facts)} of {n_images} images have a caption that follows from the questions; '
                 f'{len(rows)} of them are --split {split}')


def easyvqa_root() -> Path:
    try:
        import easy_vqa
    except ImportError:
        raise SystemExit('error: --data easyvqa needs the package easy-vqa: pip install easy-vqa') from None
    return Path(easy_vqa.__file__).parent / 'data'


def easyvqa_facts(split: str) -> tuple[dict[int, tuple[str, str]], int]:
    """{image id: (colour, shape)} for all images whose questions leave one colour and one shape, and the image count.

    Three ways to know without guessing: a direct answer ("what color is the circle?" "red": red, and a circle);
    a yes, or the no to a negation ("is there not a circle?" "no"); elimination, when every other value is denied.
    """
    root = easyvqa_root()  # first, since it says clearly that the package is not there
    import easy_vqa
    questions = easy_vqa.get_train_questions() if split == 'train' else easy_vqa.get_test_questions()
    possible: dict[int, tuple[set, set]] = {}
    for question, answer, image in zip(*questions):
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
        raise ValueError(f'easy-VQA ({root}): the questions on image {broken[0]} contradict each other')
    facts = {i: (*c, *s) for i, (c, s) in possible.items() if len(c) == len(s) == 1}
    return facts, len(possible)


def folder(path: Path, split: str) -> Pairs:
    """A folder with metadata.jsonl: one {"file_name": …, "text": …} a line (Hugging Face's imagefolder convention).

    With subfolders train/, val/, test/, each has its own metadata.jsonl; without them, all of it is for training.
    """
    root = path / split if (path / split).is_dir() or split != 'train' else path
    table = root / 'metadata.jsonl'
    if not path.is_dir():
        raise SystemExit(f'error: --data {path}: no such folder (and not the name "easyvqa")')
    try:
        lines = table.read_text(encoding='utf-8').split('\n')  # splitlines() also cuts at U+2028, which JSON may hold
    except UnicodeDecodeError as e:
        raise SystemExit(f'error: {table}: {e}; it must be UTF-8') from None
    except OSError as e:
        raise SystemExit(f'error: --data {path}, split {split}: cannot read {table}: {e.strerror}; expected one '
                         f'{{"file_name": …, "text": …}} a line') from None
    files, captions = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file, caption = root / row['file_name'], row['text'].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SystemExit(f'error: {table}, line {number}: {type(e).__name__}: {e}; '
                             f'expected {{"file_name": …, "text": …}}') from None
        if not caption or not file.is_file():
            raise SystemExit(f'error: {table}, line {number}: ' + ('the text is empty' if not caption else f'no file {file}'))
        files.append(file)
        captions.append(caption)
    return Pairs(files, captions, 'crop', f'{table}: {len(files)} pairs')


# -------------------------------------------------------------------------------------------------- conversations
IMAGE = '<image>'  # in a text: where the image's tokens go
CAPTION_QUESTION = 'Provide a short caption for this image.'  # the prompt of the authors' evaluation


def describe(colour: str, shape: str) -> list[str]:
    """Five sentences that say the same two facts, for captions that a metric of n-grams can judge."""
    return [f'there is a {colour} {shape} in the image', f'the image shows a single {colour} {shape}',
            f'a picture of one {shape} which is {colour}', f'this is a {shape} and its color is {colour}',
            f'a {colour} {shape} on a plain background']


@dataclass
class Chat:
    """A training sample of stage 2: what was asked and answered, turn by turn, about one image or none."""
    image: Path | None
    turns: list[tuple[str, str]]  # (question, answer); with an image, IMAGE stands once in the questions
    name: str                     # for errors: where it comes from


@dataclass
class Chats:
    chats: list[Chat]
    augment: str  # as in Pairs, or '' for none
    note: str

    def __len__(self) -> int:
        return len(self.chats)


def load_chats(data: str, split: str = 'train', image_root: str = '', captions: bool = False, turns: int = 1) -> Chats:
    """data: 'easyvqa', or a JSON file in LLaVA's format, whose images lie in image_root.

    captions (easyvqa): pairs of image and sentence, for the projector; else questions, `turns` to a chat, and captions among them.
    """
    return easyvqa_chats(split, captions, turns) if data == 'easyvqa' else llava_json(Path(data), Path(image_root))


def easyvqa_split(split: str) -> tuple[dict[int, tuple[str, str]], list[tuple[str, str, int]], Path]:
    """(facts of the captioned images, questions (question, answer, image), folder of the images) of a split.

    val: the images of easyvqa's --split val, which stage 1 has not seen either.
    """
    published = 'test' if split == 'test' else 'train'
    facts, _ = easyvqa_facts(published)
    import easy_vqa
    asked = list(zip(*(easy_vqa.get_test_questions() if split == 'test' else easy_vqa.get_train_questions())))
    root = easyvqa_root() / published / 'images'
    if split != 'test':
        val = {int(file.stem) for file in easyvqa('val').files}
        facts = {i: fact for i, fact in facts.items() if (i in val) == (split == 'val')}
        asked = [a for a in asked if (a[2] in val) == (split == 'val')]
    return facts, asked, root


def easyvqa_chats(split: str, captions: bool, turns: int) -> Chats:
    facts, asked, root = easyvqa_split(split)
    chats = []
    if captions:
        for i, fact in sorted(facts.items()):
            chats += [Chat(root / f'{i}.png', [(IMAGE, sentence)], f'easyvqa, image {i}') for sentence in describe(*fact)]
        return Chats(chats, 'shapes', f'easyvqa: {len(facts)} images with 5 sentences each')
    # Three of four questions are yes/no, and most of their answers follow from the question alone. Only as many with yes as with no
    # are kept for each text, so that it takes a look at the image to gain anything on them.
    listed = as_questions(asked, root)
    even = {id(q) for q in balanced(listed)}
    of: dict[int, list[tuple[str, str]]] = {}
    for row, (question, answer, i) in zip(listed, asked):
        if row.kind == 'what' or id(row) in even:
            of.setdefault(i, []).append((question, answer))
    for i, questions in sorted(of.items()):
        order = torch.randperm(len(questions), generator=generator(0, 'easyvqa turns', i)).tolist()
        if i in facts:  # two of the sentences, so that a quarter of the answers are captions
            pick = torch.randperm(5, generator=generator(0, 'easyvqa sentence', i)).tolist()
            chats += [Chat(root / f'{i}.png', [(f'{IMAGE}\n{CAPTION_QUESTION}', describe(*facts[i])[s])], f'easyvqa, image {i}')
                      for s in pick[:2]]
        for start in range(0, len(questions), turns):
            part = [questions[q] for q in order[start:start + turns]]
            part[0] = (f'{IMAGE}\n{part[0][0]}', part[0][1])
            chats.append(Chat(root / f'{i}.png', part, f'easyvqa, image {i}'))
    return Chats(chats, 'shapes', f'easyvqa: {len(chats)} conversations about {len(of)} images, {sum(map(len, of.values()))} of {len(asked)} questions and '
                                  f'{2 * len(facts)} captions')


def llava_json(file: Path, image_root: Path) -> Chats:
    """[{"id", "image" (a path below image_root; absent: text only), "conversations": [{"from": "human" | "gpt", "value"}]}]"""
    try:
        rows = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: --data {file}: {e}; expected 'easyvqa' or a JSON file in LLaVA's format") from None
    if not isinstance(rows, list) or not rows:
        raise SystemExit(f'error: --data {file}: expected a list of conversations, got {type(rows).__name__} of length '
                         f'{len(rows) if hasattr(rows, "__len__") else 0}')
    chats = []
    for number, row in enumerate(rows):
        name = f'{file}, entry {number}'
        try:
            name += f' (id {row.get("id", "none")})'
            said = [(turn['from'], turn['value'].strip()) for turn in row['conversations']]
            image = image_root / row['image'] if row.get('image') else None
        except (KeyError, TypeError, AttributeError) as e:
            raise SystemExit(f'error: {name}: {type(e).__name__}: {e}; expected {{"image": …, "conversations": '
                             f'[{{"from": "human", "value": …}}, {{"from": "gpt", "value": …}}, …]}}') from None
        if said and said[0][0] == 'gpt':
            said = said[1:]  # some published ones open with an answer
        roles = [role for role, _ in said]
        if not said or roles != ['human', 'gpt'] * (len(said) // 2):
            raise SystemExit(f'error: {name}: the turns are {", ".join(roles) or "none"}; must be human, gpt, human, gpt, …')
        turns = [(q, a) for (_, q), (_, a) in zip(said[::2], said[1::2])]
        if any(IMAGE in a for _, a in turns):
            raise SystemExit(f'error: {name}: {IMAGE} in an answer; it may stand in a question only')
        places = sum(q.count(IMAGE) for q, _ in turns)
        if isinstance(row.get('image'), list) or places > 1:
            raise SystemExit(f'error: {name}: two images in one sample ({places} × {IMAGE}); one is supported')
        if image is not None and not image.is_file():
            raise SystemExit(f'error: {name}: no file {image}; see --image_root')
        if image is None and places:
            raise SystemExit(f'error: {name}: {IMAGE} in a question, and no "image"')
        if image is not None and not places:
            turns[0] = (f'{IMAGE}\n{turns[0][0]}', turns[0][1])
        chats.append(Chat(image, turns, name))
    without = sum(chat.image is None for chat in chats)
    return Chats(chats, '', f'{file}: {len(chats)} conversations' + (f', {without} of them without an image' if without else ''))


# ------------------------------------------------------------------------------------------- labelled images, to evaluate on
@dataclass
class ClassSet:
    """Images with a class each. They are opened one by one, so memory does not grow with their number."""
    n: int
    open: Callable[[int], tuple[Image.Image, int]]  # number → (RGB, label)
    classes: list[str]
    templates: list[str]                            # such as 'a photo of a {c}.'
    note: str = ''

    def item(self, number: int) -> tuple[Image.Image, int]:
        image, label = self.open(number)
        if not 0 <= label < len(self.classes):
            raise SystemExit(f'error: image {number} of {self.note} has the label {label}; there are {len(self.classes)} '
                             f'class names, so labels must be in 0 … {len(self.classes) - 1}')
        return image, label

    def prompts(self, name: str) -> list[str]:
        return [template.replace('{c}', name) for template in self.templates]


def both(prefixes: str, suffixes: str = '') -> list[str]:
    """'a photo of' → 'a photo of a {c}.' and 'a photo of the {c}.', for each of the prefixes (and of the suffixes)."""
    return [f'{p.strip()} {article} {s}{{c}}.'.strip() for p in prefixes.split(',')
            for s in [f'{s.strip()} ' if s.strip() else '' for s in suffixes.split(',')] for article in ('a', 'the')]


# The prompts that OpenAI published with CLIP (their notebook and data/prompts.md), ordered by their pattern.
TEMPLATES = {
    'imagenet': [
        *both('a bad photo of, a sculpture of, a low resolution photo of, a rendering of, graffiti of, a cropped photo of, a tattoo of, '
              'a bright photo of, a dark photo of, a drawing of, a close-up photo of, a black and white photo of, a painting of, '
              'a pixelated photo of, a jpeg corrupted photo of, a blurry photo of, a photo of, a good photo of, a doodle of, '
              'a sketch of, a rendition of, art of, itap of'),
        *both('', 'embroidered, plastic, origami, toy, cartoon, plushie'),
        *both('a photo of', 'hard to see, clean, dirty, cool, large, nice, weird, small'),
        'a {c} in a video game.', 'the {c} in a video game.', 'a photo of many {c}.', 'a photo of my {c}.', 'a photo of one {c}.',
        'itap of my {c}.'],
    'cifar': [*both('a photo of, a blurry photo of, a black and white photo of, a low contrast photo of, a high contrast photo of, '
                    'a bad photo of, a good photo of'), *both('a photo of', 'small, big')],
    'Food101': ['a photo of {c}, a type of food.'],
    'OxfordIIITPet': ['a photo of a {c}, a type of pet.'],
    'FGVCAircraft': ['a photo of a {c}, a type of aircraft.', 'a photo of the {c}, a type of aircraft.'],
    'Flowers102': ['a photo of a {c}, a type of flower.'],
    'DTD': [f'a photo of {article} {{c}} {noun}.' for noun in ('texture', 'pattern', 'thing', 'object') for article in ('a', 'the')],
    'EuroSAT': ['a centered satellite photo of {c}.', 'a centered satellite photo of a {c}.', 'a centered satellite photo of the {c}.'],
}
TEMPLATES |= {'CIFAR10': TEMPLATES['cifar'], 'CIFAR100': TEMPLATES['cifar']}


def class_set(data: str, split: str = 'test', root: str = 'data', download: bool = False, classnames: str = '',
              templates: str = '') -> ClassSet:
    """data: 'easyvqa'; a folder (metadata.jsonl, whose captions are the classes; CLIP_benchmark's layout: classnames.txt,
    SPLIT/*.tar; or a subfolder for each class and classnames.txt); or a class of torchvision.datasets, looked for in root.

    classnames, templates: files, a line each, in place of those that come with the data; templates also takes a key of TEMPLATES.
    """
    path = Path(data)
    if data == 'easyvqa' or any((p / 'metadata.jsonl').is_file() for p in (path, path / split)):
        found = captions_as_classes(data, split)
    elif path.is_dir():
        found = (shards if any((path / split).glob('*.tar')) else image_folder)(path, split, bool(classnames))
    elif inspect.isclass(getattr(torchvision.datasets, data, None)):
        found = from_torchvision(data, split, root, download, bool(classnames))
    else:
        raise SystemExit(f"error: --data {data}: no such folder, and no name that is known: 'easyvqa', or a class of "
                         f'torchvision.datasets such as CIFAR10, Food101, EuroSAT (upper and lower case matter)')
    if classnames:
        found.classes = read_lines(Path(classnames), '--classnames')
    if templates in TEMPLATES:
        found.templates = TEMPLATES[templates]
    elif templates:
        found.templates = read_lines(Path(templates), f'--templates (also: {", ".join(TEMPLATES)})')
    for template in found.templates:
        if '{c}' not in template:
            raise SystemExit(f'error: {found.note}: the template {template!r} has no {{c}}, where the class name goes')
    if len(found.classes) < 2:
        raise SystemExit(f'error: --data {data}: {len(found.classes)} class; zero-shot classification needs at least 2')
    if len(set(found.classes)) < len(found.classes):
        twice = next(c for c in found.classes if found.classes.count(c) > 1)
        raise SystemExit(f'error: {found.note}: the class name {twice!r} is there twice; they must differ')
    return found


def read_lines(file: Path, what: str) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding='utf-8').split('\n')]
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f'error: {what}: cannot read {file}: {e}') from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines or '' in lines:
        raise SystemExit(f'error: {what}: {file} ' + ('is empty' if not lines else f'has an empty line, {lines.index("") + 1}'))
    return lines


def names_beside(path: Path, overridden: bool) -> list[str]:
    """The class names that lie with a data set; with --classnames they are not asked for."""
    if overridden:
        return []
    if not (path / 'classnames.txt').is_file():
        raise SystemExit(f'error: --data {path}: no class names: there is no {path / "classnames.txt"} (a name a line, line 1 for '
                         f'label 0); write one, or give --classnames FILE')
    return read_lines(path / 'classnames.txt', f'--data {path}')


def captions_as_classes(data: str, split: str) -> ClassSet:
    """easyvqa: all its colours and shapes, as 'a red circle'. A folder with captions: the captions that it has."""
    pairs = load_pairs(data, split)
    classes = [f'{c} {s}' for c in COLOURS for s in SHAPES] if data == 'easyvqa' else sorted(set(pairs.captions))
    label = {f'a {name}' if data == 'easyvqa' else name: i for i, name in enumerate(classes)}
    return ClassSet(len(pairs), lambda i: (read_image(pairs.files[i]), label[pairs.captions[i]]), classes,
                    ['a {c}'] if data == 'easyvqa' else ['{c}'], pairs.note)


class Shards:
    """Samples in tar files, the webdataset convention: files of one name and several endings are one sample.

    Only the headers are read at first, the contents when they are asked for, in any order.
    """

    def __init__(self, folder: Path):
        self.samples: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []
        # by number: 10.tar comes after 9.tar
        tars = sorted(folder.glob('*.tar'), key=lambda p: [int(w) if w.isdigit() else w for w in re.split(r'(\d+)', p.name)])
        said = folder / 'nshards.txt'
        if said.is_file() and (text := said.read_text().strip()) != str(len(tars)):
            raise SystemExit(f'error: {said} says {text} shards; there are {len(tars)} *.tar')
        for tar in tars:
            found: dict[str, dict[str, tuple[int, int]]] = {}
            try:
                with tarfile.open(tar, 'r:') as archive:
                    for member in archive:
                        if member.isfile():
                            key, _, ending = member.name.rpartition('/')[2].partition('.')
                            found.setdefault(member.name[:-len(ending) - 1] if ending else key, {})[ending] = (member.offset_data, member.size)
            except (tarfile.TarError, OSError) as e:
                raise SystemExit(f'error: cannot read the shard {tar}: {e}; fetch it again') from None
            self.samples += [(tar, key, files) for key, files in found.items()]
        if not self.samples:
            raise SystemExit(f'error: {folder}: the shards have no samples')

    def read(self, number: int, endings: tuple[str, ...]) -> tuple[bytes, str]:
        """(content, name) of the file of that sample which has one of the endings."""
        tar, key, files = self.samples[number]
        ending = next((e for e in endings if e in files), None)
        if ending is None:
            raise SystemExit(f'error: {tar}: the sample {key} has {", ".join(files)}, but no {" or ".join(endings)}')
        offset, size = files[ending]
        with open(tar, 'rb') as file:
            file.seek(offset)
            return file.read(size), f'{tar}/{key}.{ending}'

    def image(self, number: int) -> Image.Image:
        content, name = self.read(number, ('jpg', 'png', 'webp', 'jpeg'))
        return read_image(io.BytesIO(content), name)


def shards(path: Path, split: str, overridden: bool) -> ClassSet:
    """CLIP_benchmark's layout: classnames.txt, zeroshot_classification_templates.txt, SPLIT/*.tar with images and .cls."""
    classes = names_beside(path, overridden)
    tars, shipped = Shards(path / split), path / 'zeroshot_classification_templates.txt'

    def label(number: int) -> int:
        content, name = tars.read(number, ('cls',))
        try:
            return int(content)
        except ValueError:
            raise SystemExit(f'error: {name}: {content[:20]!r} is no class number') from None
    return ClassSet(len(tars.samples), lambda i: (tars.image(i), label(i)), classes,
                    read_lines(shipped, 'templates') if shipped.is_file() else TEMPLATES['imagenet'], f'{path}, split {split}')


def image_folder(path: Path, split: str, overridden: bool) -> ClassSet:
    """A folder for each class, in SPLIT/ where there is one; line i of classnames.txt names the i-th folder by name."""
    root = path / split if (path / split).is_dir() else path
    classes = names_beside(path, overridden)
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    files = [(f, i) for i, folder in enumerate(folders) for f in sorted(folder.rglob('*'))
             if f.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS]
    if not files:
        raise SystemExit(f'error: --data {path}, split {split}: neither *.tar nor images in subfolders of {root}')
    if classes and len(classes) != len(folders):
        raise SystemExit(f'error: {path / "classnames.txt"} has {len(classes)} lines; {root} has {len(folders)} folders, one for each class')
    return ClassSet(len(files), lambda i: (read_image(files[i][0]), files[i][1]), classes, TEMPLATES['imagenet'], f'{root}')


def from_torchvision(name: str, split: str, root: str, download: bool, overridden: bool) -> ClassSet:
    """Any data set of torchvision whose items are (image, label)."""
    cls = getattr(torchvision.datasets, name)
    takes = inspect.signature(cls).parameters
    settings = {'root': root} if 'root' in takes else {}
    if 'train' in takes:
        settings['train'] = split == 'train'
    elif 'split' in takes:
        settings['split'] = split
    if 'download' in takes:
        settings['download'] = download
    elif download:
        raise SystemExit(f'error: --download: torchvision cannot fetch {name}; put it into --root {root}')
    try:
        images = cls(**settings)
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as e:
        raise SystemExit(f'error: --data {name}, --split {split}, --root {root}: {e}' +
                         ('' if download or 'download' not in takes else ' (--download fetches it)')) from None
    names = getattr(images, 'classes', None)
    if not names and not overridden:
        raise SystemExit(f'error: --data {name}: torchvision has no class names for it; give --classnames FILE, a name a line, '
                         f'line 1 for label 0')
    names = [(c if isinstance(c, str) else c[0]).replace('_', ' ') for c in names or []]
    if name == 'EuroSAT':  # AnnualCrop
        names = [re.sub('(?<=[a-z])(?=[A-Z])', ' ', c).lower() for c in names]

    def item(number: int) -> tuple[Image.Image, int]:
        try:
            image, label = images[number]
        except (UnidentifiedImageError, OSError, SyntaxError) as e:
            raise BadImage(f'cannot decode image {number} of torchvision\'s {name}: {e}') from None
        if not isinstance(image, Image.Image) or not isinstance(label, (int, np.integer)):
            raise SystemExit(f'error: --data {name}: its items are {type(image).__name__} and {type(label).__name__}, '
                             f'not an image and a class number')
        return to_rgb(image), int(label)
    note = f'torchvision.datasets.{name}' + (f', split {split}' if 'train' in takes or 'split' in takes else ', all of it')
    return ClassSet(len(images), item, names, TEMPLATES.get(name, TEMPLATES['imagenet']), note)


@dataclass
class CaptionSet:
    """Images with the captions of each (five, often)."""
    captions: list[list[str]]
    image: Callable[[int], Image.Image]
    note: str


def caption_set(data: str, split: str = 'test') -> CaptionSet:
    """'easyvqa', a folder with metadata.jsonl (an image may have several lines), or shards of images and .txt files with a
    caption a line (CLIP_benchmark's layout of MS-COCO and Flickr)."""
    path = Path(data)
    if any((path / split).glob('*.tar')):
        tars = Shards(path / split)
        read = [tars.read(i, ('txt',)) for i in range(len(tars.samples))]
        captions = [[c.strip() for c in text.decode('utf-8', 'replace').split('\n') if c.strip()] for text, _ in read]
        if [] in captions:
            raise SystemExit(f'error: {read[captions.index([])][1]} holds no caption')
        return CaptionSet(captions, tars.image, f'{path}, split {split}')
    pairs, of = load_pairs(data, split), {}
    for file, caption in zip(pairs.files, pairs.captions):
        of.setdefault(file, []).append(caption)
    files = list(of)
    return CaptionSet(list(of.values()), lambda i: read_image(files[i]), pairs.note)


# ------------------------------------------------------------------------------------- questions and captions, to evaluate on
@dataclass
class Question:
    image: Path
    question: str
    answers: list[str]  # of the annotators, ten in VQAv2 and TextVQA, one elsewhere
    kind: str           # 'what', 'yes/no' or ''
    name: str           # which one it is, for reports


@dataclass
class QuestionSet:
    questions: list[Question]
    note: str


@dataclass
class ReferenceSet:
    """Images with reference captions, five often."""
    images: list[Path]
    captions: list[list[str]]
    names: list[str]
    note: str


def present(file: Path, what: str) -> Path:
    if not file.is_file():
        raise SystemExit(f'error: {what}: no image {file}; see --image_root')
    return file


def as_questions(asked: list[tuple[str, str, int]], root: Path) -> list[Question]:
    """easy-VQA's (question, answer, image)."""
    return [Question(root / f'{i}.png', q, [a], 'yes/no' if a in ('yes', 'no') else 'what', f'{n}') for n, (q, a, i) in enumerate(asked)]


def vqa_set(data: str, split: str = 'test', annotations: str = '', image_root: str = '') -> QuestionSet:
    """'easyvqa', or a file of questions: VQAv2's (with `annotations`, the file of answers) or TextVQA's, told by what is in it."""
    if data == 'easyvqa':
        _, asked, root = easyvqa_split(split)
        found = as_questions(asked, root)
        return QuestionSet(found, f'easyvqa: {len(found)} questions, {sum(q.kind == "what" for q in found)} of them not yes/no')
    content, root, what = read_json(Path(data), '--data'), Path(image_root), f'--data {data}'
    try:
        if isinstance(content, dict) and 'questions' in content:
            if not annotations:
                raise SystemExit(f"error: {what}: these are VQAv2's questions; name the file of their answers: --annotations FILE")
            answers = {a['question_id']: [x['answer'] for x in a['answers']] for a in read_json(Path(annotations), '--annotations')['annotations']}
            subtype = content['data_subtype']  # 'val2014', say
            rows = [(f'COCO_{subtype}_{int(q["image_id"]):012d}.jpg', q['question'], answers.get(q['question_id']), q['question_id'])
                    for q in content['questions']]
        elif isinstance(content, dict) and 'data' in content:
            rows = [(f'{q["image_id"]}.jpg', q['question'], q.get('answers'), q['question_id']) for q in content['data']]
        else:
            raise SystemExit(f"error: {what}: neither VQAv2's questions (a key \"questions\") nor TextVQA's (a key \"data\")")
    except (KeyError, TypeError, ValueError) as e:
        raise SystemExit(f'error: {what}: {type(e).__name__}: {e}; is it the published file?') from None
    for _, question, of, number in rows:
        if not of:
            raise SystemExit(f'error: {what}: question {number} ({question!r}) has no answers' + (f' in {annotations}' if annotations else ''))
    return QuestionSet([Question(present(root / file, what), q, of, '', f'{number}') for file, q, of, number in rows], f'{data}: {len(rows)} questions')


def balanced(questions: list[Question]) -> list[Question]:
    """Of the yes/no questions, as many with yes as with no for each text: who does not look at the image is right half of the time."""
    of: dict[str, dict[str, list[int]]] = {}
    for n, q in enumerate(questions):
        if q.kind == 'yes/no':
            of.setdefault(q.question, {'yes': [], 'no': []})[q.answers[0]].append(n)
    kept: set[int] = set()
    for text, groups in of.items():
        least = min(map(len, groups.values()))
        for answer, numbers in groups.items():
            order = torch.randperm(len(numbers), generator=generator(0, f'balanced {text} {answer}', 0)).tolist()
            kept |= {numbers[i] for i in order[:least]}
    return [q for n, q in enumerate(questions) if n in kept]


def pope_set(data: str, split: str = 'test', image_root: str = '') -> QuestionSet:
    """easyvqa's balanced yes/no questions, or a file of POPE: a line {"question_id", "image", "text", "label": "yes" | "no"} each."""
    if data == 'easyvqa':
        found = balanced(vqa_set(data, split).questions)
        return QuestionSet(found, f'easyvqa: {len(found)} yes/no questions, of each text as many with yes as with no')
    try:
        lines = [json.loads(line) for line in Path(data).read_text(encoding='utf-8').split('\n') if line.strip()]
        found = [Question(Path(image_root) / row['image'], row['text'], [row['label'].lower()], 'yes/no', f'{row["question_id"]}') for row in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f'error: --data {data}: {type(e).__name__}: {e}; expected {{"question_id", "image", "text", "label"}} a line') from None
    for q in found:
        present(q.image, f'--data {data}')
        if q.answers[0] not in ('yes', 'no'):
            raise SystemExit(f'error: --data {data}: question {q.name} has the label {q.answers[0]!r}; must be yes or no')
    return QuestionSet(found, f'{data}: {len(found)} questions')


def sqa_set(data: str, split: str = 'test', image_root: str = '') -> QuestionSet:
    """ScienceQA's folder (problems.json, pid_splits.json): the questions with an image, asked as LLaVA 1.5 is asked; the answer is a letter.

    official: LLaVA scripts/convert_sqa_to_llava_base_prompt.py (CQM), llava/eval/model_vqa_science.py (--single-pred-prompt)
    """
    folder, root = Path(data), Path(image_root or data)
    problems, splits = read_json(folder / 'problems.json', '--data'), read_json(folder / 'pid_splits.json', '--data')
    if split not in splits:
        raise SystemExit(f'error: --split {split}: {folder / "pid_splits.json"} has {", ".join(splits)}')
    found = []
    for number in splits[split]:
        try:
            p = problems[number]
            if not p.get('image'):
                continue
            options = ' '.join(f'({chr(65 + i)}) {choice}' for i, choice in enumerate(p['choices']))
            text = f'Context: {p.get("hint", "").strip() or "N/A"}\nQuestion: {p["question"]}\nOptions: {options}'.replace('  ', ' ')
            text += "\nAnswer with the option's letter from the given choices directly."
            found.append(Question(root / split / number / p['image'], text, [chr(65 + p['answer'])], '', number))
        except (KeyError, TypeError) as e:
            raise SystemExit(f'error: {folder / "problems.json"}: problem {number}: {type(e).__name__}: {e}') from None
    for q in found:
        present(q.image, f'--data {data}')
    return QuestionSet(found, f'{data}: {len(found)} of {len(splits[split])} questions of {split} have an image')


def references(data: str, split: str = 'test', image_root: str = '') -> ReferenceSet:
    """'easyvqa' (five sentences from the same two facts), Karpathy's file (dataset_coco.json, dataset_flickr30k.json), or COCO's captions."""
    if data == 'easyvqa':
        facts, _, root = easyvqa_split(split)
        rows = [(root / f'{i}.png', describe(*fact), f'{i}') for i, fact in sorted(facts.items())]
        return ReferenceSet(*map(list, zip(*rows)), f'easyvqa: {len(rows)} images with 5 sentences each')
    content, root, what = read_json(Path(data), '--data'), Path(image_root), f'--data {data}'
    try:
        if 'annotations' in content:
            of: dict[int, list[str]] = {}
            for a in content['annotations']:
                of.setdefault(a['image_id'], []).append(a['caption'])
            rows = [(root / i['file_name'], of[i['id']], f'{i["id"]}') for i in content['images'] if i['id'] in of]
        else:
            name = lambda i: root / i.get('filepath', '') / i['filename']
            in_split = lambda i: ('train' if i['split'] == 'restval' else i['split']) == split  # as most papers count it
            rows = [(name(i), [s['raw'] for s in i['sentences']], i['filename']) for i in content['images'] if in_split(i)]
    except (KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"error: {what}: {type(e).__name__}: {e}; expected Karpathy's dataset_*.json or COCO's captions_*.json") from None
    if not rows:
        raise SystemExit(f'error: {what}: no image of --split {split}')
    for file, _, _ in rows:
        present(file, what)
    return ReferenceSet(*map(list, zip(*rows)), f'{data}: {len(rows)} images')


# ---------------------------------------------------------------------------------------------------------- pixels
class BadImage(ValueError):
    """An image that cannot be decoded; the message names it."""


def read_image(file: Path | io.BytesIO, name: str = '') -> Image.Image:
    """Decodes to RGB: alpha on white, 16-bit scaled to 8, palette and CMYK converted. Names the file if it cannot."""
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadImage(f'cannot decode the image {name or file}: {e}') from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I') or image.mode == 'F':  # 16 bits; PIL's own conversion would clip at 255
        values = np.asarray(image).astype(np.float32) / (65535 if image.mode.startswith('I') else 1)
        return Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8)).convert('RGB')
    if 'A' in image.getbands() or 'transparency' in image.info:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('RGB')


def fit(image: Image.Image, size: int, interpolation: str = 'bilinear', resize_mode: str = 'shortest') -> torch.Tensor:
    """RGB image → uint8 [3, size, size], as open_clip's preprocess_cfg has it; see resize."""
    return TF.pil_to_tensor(resize(image, size, interpolation, resize_mode))


def resize(image: Image.Image | torch.Tensor, size: int, interpolation: str, resize_mode: str) -> Image.Image | torch.Tensor:
    """To size × size. resize_mode 'shortest' (resize the short side, centre crop), 'squash' (ignore the aspect ratio) or
    'longest' (resize the long side, pad with black). Also takes tensors [..., 3, H, W], and then lets gradients through."""
    mode = {'bilinear': TF.InterpolationMode.BILINEAR, 'bicubic': TF.InterpolationMode.BICUBIC}[interpolation]
    w, h = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
    if resize_mode == 'squash':
        image = TF.resize(image, [size, size], mode)
    elif resize_mode == 'shortest':
        image = TF.center_crop(TF.resize(image, [size], mode), [size, size])
    elif resize_mode == 'longest':
        scale = size / max(h, w)
        image = TF.center_crop(TF.resize(image, [round(h * scale), round(w * scale)], mode), [size, size])
    else:
        raise ValueError(f'preprocess_cfg: resize_mode {resize_mode!r}: must be shortest, squash or longest')
    return image


def pad_to_square(image: Image.Image, colour: list[float]) -> Image.Image:
    """The image in the middle of a square of the colour (in [0, 1]), as LLaVA 1.5 does it, so that nothing is cut off."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new('RGB', (side, side), tuple(int(c * 255) for c in colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def shift_and_flip(image: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """For easy-VQA: mirror, and move by up to a sixteenth of the side. Triangles stand upright, so no vertical flip."""
    reach = image.shape[-1] // 16
    flip, dy, dx = (torch.rand(3, generator=g) * torch.tensor([2, 2 * reach + 1, 2 * reach + 1])).int().tolist()
    padded = TF.pad(image.flip(-1) if flip else image, [reach] * 4, padding_mode='edge')
    return padded[:, dy:dy + image.shape[1], dx:dx + image.shape[2]]


def random_crop(image: Image.Image, g: torch.Generator) -> Image.Image:
    """For photos, as CLIP is trained: a crop of 90–100 % of the area at a random place. No flip: captions say "left"."""
    area, y, x = torch.rand(3, generator=g).tolist()
    side = (0.9 + 0.1 * area) ** 0.5
    w, h = round(image.width * side), round(image.height * side)
    return TF.crop(image, int(y * (image.height - h + 1)), int(x * (image.width - w + 1)), h, w)


# ------------------------------------------------------------------------------------------------- the training stream
class PairDataset(torch.utils.data.Dataset):
    """Item (row, number) → (uint8 [3, S, S], token ids [L]); `number` counts samples since the start of training."""

    def __init__(self, pairs: Pairs, tokenizer, size: int, preprocess: dict, seed: int):
        self.pairs, self.tokenizer, self.size, self.preprocess, self.seed = pairs, tokenizer, size, preprocess, seed
        # the shapes are few and small: decode and resize them once
        self.cache = [self.fit(read_image(f)) for f in pairs.files] if pairs.augment == 'shapes' else None
        self.tokens: dict[str, torch.Tensor] = {}  # captions repeat; a plain dict, since workers may have to pickle this

    def fit(self, image: Image.Image) -> torch.Tensor:
        return fit(image, self.size, self.preprocess['interpolation'], self.preprocess['resize_mode'])

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        row, number = item
        g = generator(self.seed, 'augment', number)
        if self.cache is not None:
            image = shift_and_flip(self.cache[row], g)
        else:
            image = self.fit(random_crop(read_image(self.pairs.files[row]), g))
        caption = self.pairs.captions[row]
        if caption not in self.tokens:
            if len(self.tokens) >= 100_000:
                self.tokens.clear()
            self.tokens[caption] = self.tokenizer([caption])[0]
        return image, self.tokens[caption]


class Order:
    """Batch sampler: for each step the rank's share of the global batch, as (row, number of the sample).

    The stream is epoch after epoch, each a permutation drawn from (seed, epoch) and used to its last sample; step s
    takes samples s·B … s·B+B−1, rank r the r-th contiguous part of them. So W ranks see what one process sees.
    """

    def __init__(self, n: int, batch_size: int, first_step: int, last_step: int, seed: int, rank: int, world: int):
        self.n, self.batch_size, self.steps, self.seed = n, batch_size, range(first_step, last_step), seed
        self.share = range(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        @functools.lru_cache(2)  # a batch may straddle two epochs
        def permutation(epoch: int) -> list[int]:
            return torch.randperm(self.n, generator=generator(self.seed, 'epoch', epoch)).tolist()

        for step in self.steps:
            numbers = [step * self.batch_size + position for position in self.share]
            yield [(permutation(number // self.n)[number % self.n], number) for number in numbers]


def batches(pairs: Pairs, tokenizer, size: int, preprocess: dict, **how):
    """Iterates (images uint8 [b, 3, size, size], token ids int64 [b, L]); how: see stream."""
    return stream(PairDataset(pairs, tokenizer, size, preprocess, how['seed']), len(pairs), **how)


def stream(dataset, n: int, *, batch_size: int, first_step: int, last_step: int, seed: int, rank: int = 0, world: int = 1,
           workers: int = 0, collate=None):
    """The dataset's items in Order, for the steps first_step … last_step − 1.

    batch_size: of all ranks together.  workers: decoding processes; 0 decodes in this one.
    """
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=Order(n, batch_size, first_step, last_step, seed, rank, world),
        num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(), collate_fn=collate,
        generator=torch.Generator())  # else the loader draws its workers' seeds from the global generator


@dataclass
class Sample:
    """One conversation, as the model reads it."""
    image: torch.Tensor | None  # uint8 [3, S, S]
    ids: list[int]              # token ids, each image token included
    labels: list[bool]          # which of them are to be predicted
    number: int                 # of samples since the start of (the sub-stage of) training: what its randomness is drawn from


class ChatDataset(torch.utils.data.Dataset):
    """Item (row, number) → Sample.   encode: Chat → (ids, labels);  fit: RGB image → uint8 [3, S, S]"""

    def __init__(self, chats: Chats, encode, fit, seed: int):
        self.chats, self.encode, self.fit_image, self.seed = chats, encode, fit, seed
        files = {chat.image for chat in chats.chats if chat.image} if chats.augment == 'shapes' else ()
        self.cache = {file: fit(read_image(file)) for file in sorted(files)}  # as in PairDataset

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        row, number = item
        chat = self.chats.chats[row]
        image = None
        if chat.image is not None:
            image = self.cache[chat.image] if chat.image in self.cache else self.fit_image(read_image(chat.image))
            if self.chats.augment == 'shapes':
                image = shift_and_flip(image, generator(self.seed, 'augment', number))
        return Sample(image, *self.encode(chat), number)


# ------------------------------------------------------------------------------------------------------- tokenizers
TOKENIZER_CONFIG = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
                    'model_input_names': ['input_ids', 'attention_mask']}  # transformers 4 would else hand models token types, which they do not take


class Tokenizer:
    """Captions → int64 [n, context]. The layouts, called as open_clip's `tokenizer_mode` and `tokenizer_kwargs` do:

    'eot'             start w… end pad…          OpenAI's CLIP, which pools at the end: the highest id, so argmax finds it
    'clips'           start w… end pad… [CLS]    ΔCLIP: BERT's WordPiece, pooled at the last token
    'strip_sep_token' start w… pad…              CLIPA: the same, without the end

    pool: where the text tower pools (text_cfg.pool_type).
    """

    def __init__(self, backend: HFTokenizer, context: int, mode: str = 'eot', pool: str = 'argmax'):
        self.backend, self.context, self.mode = backend, context, mode
        self.backend.no_padding(), self.backend.no_truncation()
        self.vocab_size = max(backend.get_vocab().values()) + 1
        if mode == 'clips':
            self.bos, self.eos, self.pad, self.cls = 1, 2, 0, backend.token_to_id('[CLS]')
            if self.cls is None or backend.token_to_id('[PAD]') != 0 or context < 4:
                raise SystemExit(f'error: --tokenizer: a WordPiece vocab.txt needs [PAD] as its first entry and [CLS]; '
                                 f'--context {context} must be at least 4')
        else:
            ids = backend.encode('a').ids
            pads = [backend.token_to_id(t) for t in ('<pad>', '[PAD]', '<|pad|>')]
            self.pad = next((p for p in pads if p is not None), 0)
            if len(ids) < 3 or pool == 'argmax' and ids[-1] != self.vocab_size - 1 or context < 3:
                raise SystemExit(f'error: --tokenizer: the text tower pools at the end-of-text token, so the tokenizer must '
                                 f'put a start and an end around every text (got ids {ids} for "a"), the end having the '
                                 f'highest id ({self.vocab_size - 1}); --context {context} must be at least 3')
            self.bos, self.eos = ids[0], ids[-1]

    def __call__(self, captions: list[str]) -> torch.Tensor:
        rows = []
        for caption in captions:
            words = self.backend.encode(' '.join(caption.split()), add_special_tokens=False).ids
            words = [self.bos, *words[:self.room], self.pad if self.mode == 'strip_sep_token' else self.eos]
            row = words + [self.pad] * (self.context - len(words))
            rows.append(row[:-1] + [self.cls] if self.mode == 'clips' else row)
        return torch.tensor(rows)

    @property
    def room(self) -> int:
        """Tokens of a caption that fit between the special ones."""
        return self.context - (3 if self.mode == 'clips' else 2)

    def too_long(self, captions: list[str]) -> int:
        """How many of the captions are cut at the context length."""
        return sum(len(self.backend.encode(c, add_special_tokens=False).ids) > self.room for c in captions)

    def files(self) -> dict[str, str]:
        """File name → content, such that transformers' AutoTokenizer (and so open_clip) reads the same tokenizer."""
        special = {'pad_token': self.pad, 'bos_token': self.bos, 'eos_token': self.eos}
        if self.mode == 'clips':
            special['cls_token'] = self.cls
        if self.mode == 'strip_sep_token':
            special['sep_token'] = self.eos
        named = {k: self.backend.id_to_token(v) for k, v in special.items()}
        if not self.backend.get_added_tokens_decoder().get(self.pad) and '[PAD]' != named['pad_token']:
            named['pad_token'] = named['eos_token']  # OpenAI's pads with 0, which is the word "!"; behind the end it makes no difference
        config = {**TOKENIZER_CONFIG, 'model_max_length': self.context, **named}
        return {'tokenizer.json': self.backend.to_str(pretty=True), 'tokenizer_config.json': json.dumps(config, indent=2)}


def train_tokenizer(captions: list[str], context: int, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size entries, lower-cased; <pad> is 0 and the end-of-text token the highest id."""
    bpe = HFTokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), *one_space(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=['<pad>', '<|startoftext|>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(['<|endoftext|>'])
    bpe.post_processor = around(bpe)
    return Tokenizer(bpe, context)


def one_space() -> list:
    """Space of any kind and length counts as one, around the text as none."""
    return [normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Strip()]


def read_tokenizer(file: str | os.PathLike, context: int, mode: str = 'eot', pool: str = 'argmax') -> Tokenizer:
    """tokenizer.json; a WordPiece vocab.txt (one entry a line, as BERT and ΔCLIP use; mode 'clips' unless the mode says otherwise); or
    CLIP's BPE as OpenAI published it, bpe_simple_vocab_16e6.txt.gz, or as vocab.json beside merges.txt."""
    file = Path(file)
    try:
        if file.name.endswith('.txt.gz'):
            merges = [tuple(line.split()) for line in gzip.decompress(file.read_bytes()).decode('utf-8').split('\n')[1:49152 - 256 - 2 + 1]]
            letters = sorted(pre_tokenizers.ByteLevel.alphabet())
            words = [*letters, *(letter + '</w>' for letter in letters), *map(''.join, merges), '<|startoftext|>', '<|endoftext|>']
            return Tokenizer(clip_bpe({word: i for i, word in enumerate(words)}, merges), context, mode, pool)
        if file.name == 'vocab.json':
            merges = [tuple(line.split()) for line in file.with_name('merges.txt').read_text(encoding='utf-8').split('\n')[1:] if line.strip()]
            return Tokenizer(clip_bpe(json.loads(file.read_text(encoding='utf-8')), merges), context, mode, pool)
        if file.suffix == '.txt':
            vocab = {word: i for i, word in enumerate(file.read_text(encoding='utf-8').rstrip('\n').split('\n'))}
            wordpiece = HFTokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
            wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
            wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            wordpiece.decoder = decoders.WordPiece()
            if '[CLS]' in vocab and '[SEP]' in vocab:
                wordpiece.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[(t, vocab[t]) for t in ('[CLS]', '[SEP]')])
            return Tokenizer(wordpiece, context, 'clips' if mode == 'eot' else mode, pool)
        return Tokenizer(HFTokenizer.from_file(str(file)), context, mode, pool)
    except Exception as e:  # tokenizers raises bare Exception for everything, a missing file included
        raise SystemExit(f'error: --tokenizer {file}: {e}; expected a tokenizer.json or a WordPiece vocab.txt') from None


def clip_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> HFTokenizer:
    """OpenAI's byte-level BPE, in which a word ends in </w>."""
    bpe = HFTokenizer(models.BPE(vocab, merges, end_of_word_suffix='</w>', unk_token='<|endoftext|>'))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), *one_space(), normalizers.Lowercase()])
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), 'removed', invert=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(['<|startoftext|>', '<|endoftext|>'])
    bpe.post_processor = around(bpe)
    return bpe


def around(bpe: HFTokenizer):
    """Puts the start and the end around every text."""
    ends = ('<|startoftext|>', '<|endoftext|>')
    return processors.TemplateProcessing(single=f'{ends[0]} $A {ends[1]}', special_tokens=[(t, bpe.token_to_id(t)) for t in ends])


def tokenizer_of(place: Path, text_cfg: dict) -> Tokenizer:
    """The tokenizer of an open_clip or Hugging Face directory, as its text_cfg (complete) says: in the directory, else of the repository that
    text_cfg.hf_tokenizer_name names, else CLIP's BPE, which open_clip brings along and the hub has, too."""
    context, pool, mode = text_cfg['context_length'], text_cfg['pool_type'], tokenizer_mode(text_cfg)
    name = text_cfg['hf_tokenizer_name']
    sources = [lambda: place]
    if name and name != 'tokenizer.json':  # ours says that the file is in the directory
        sources.append(lambda: fetch(name, f'the tokenizer of {place} is that of {name}, which is not there'))
    elif not name:  # then open_clip takes CLIP's BPE, whatever lies in the directory
        found = importlib.util.find_spec('open_clip')
        sources += [lambda: Path(found.origin).parent] * bool(found)
        sources.append(lambda: fetch('openai/clip-vit-base-patch32', f"the tokenizer of {place} is CLIP's BPE, which is not there (and open_clip, which "
                                                                     f'has it, is not installed)'))
    for source in sources:
        folder = source()
        names = [Path(text_cfg['vocab_path']).name] if text_cfg['vocab_path'] else []
        for file in [folder / n for n in (*names, *TOKENIZER_FILES)]:
            if file.is_file() and (file.name != 'vocab.json' or file.with_name('merges.txt').is_file()):
                tokenizer = read_tokenizer(file, context, mode, pool)
                if name or text_cfg['vocab_path'] or tokenizer.vocab_size == CLIP_VOCABULARY:
                    return tokenizer
    raise SystemExit(f'error: {place} has no tokenizer of its own: none of {", ".join(TOKENIZER_FILES)}' + f" with CLIP's {CLIP_VOCABULARY} entries" * (not name))


TOKENIZER_FILES, CLIP_VOCABULARY = ('tokenizer.json', 'vocab.json', 'vocab.txt', 'bpe_simple_vocab_16e6.txt.gz'), 49408


def tokenizer_mode(text_cfg: dict) -> str:
    """The layout that open_clip's text_cfg stands for.   official: CLIP_benchmark/clip_benchmark/open_clip/factory.py (vocab_path)"""
    more = dict(text_cfg['tokenizer_kwargs'] or {})
    strip = more.pop('strip_sep_token', False)
    if more or text_cfg['tokenizer_mode'] not in (None, 'clips'):
        raise SystemExit(f'error: text_cfg: tokenizer_mode {text_cfg["tokenizer_mode"]!r}, tokenizer_kwargs {more}; supported: clips, strip_sep_token')
    return 'clips' if text_cfg['tokenizer_mode'] or text_cfg['vocab_path'] else 'strip_sep_token' if strip else 'eot'


def tokenizer_from_text(text: str, text_cfg: dict) -> Tokenizer:
    """The content of a tokenizer.json → Tokenizer.   text_cfg: open_clip's, complete"""
    return Tokenizer(HFTokenizer.from_str(text), text_cfg['context_length'], tokenizer_mode(text_cfg), text_cfg['pool_type'])


# -------------------------------------------------------------------------------------------------------------- the hub
WEIGHTS = (('adapter_model.*', 'non_lora_trainables.bin'), ('open_clip_model.safetensors',), ('open_clip_pytorch_model.safetensors',), ('open_clip_pytorch_model.bin',),
           ('model.safetensors', 'model-*.safetensors'), ('pytorch_model*.bin',))  # the first of these that a repository has is fetched


def locate(name: str | os.PathLike, what: str = '') -> Path:
    """A file or directory as it is; else a repository of Hugging Face's hub by its id, fetched.   what: the flag, for the error"""
    if Path(name).exists():
        return Path(name)
    repository, name, what = is_repository(name), str(name).removeprefix('hf-hub:'), f'{what} ' * bool(what)
    if not repository:
        raise SystemExit(f"error: {what}{name}: no such file or directory, and no repository id of the hub such as 'openai/clip-vit-large-patch14'")
    return fetch(name, f'{what}{name}: no such file or directory', WEIGHTS)


def is_repository(name: str | os.PathLike) -> bool:
    """Whether it can only be a repository id, such as openai/clip-vit-large-patch14 or hf-hub:org/name."""
    place, name = Path(name), str(name)
    return bool(re.fullmatch(r'(hf-hub:)?[\w-][\w.-]*/[\w.-]+', name)) and not name.startswith('runs/') and not place.exists() and not place.parent.is_dir()


@functools.cache  # a process asks the hub once
def fetch(name: str, what: str, weights: tuple[tuple[str, ...], ...] = ()) -> Path:
    """A repository of Hugging Face's hub → the folder it was fetched into (~/.cache/huggingface): its small files and the first group of
    weights that it has. What is there already is not fetched again; HF_HUB_OFFLINE=1 keeps it from asking."""
    wanted = ['*.json', '*.jinja', '*.txt', 'tokenizer.model']
    try:
        from huggingface_hub import HfApi, snapshot_download
        try:
            files = HfApi().list_repo_files(name)
        except Exception as e:  # the hub's or its transport's, of many kinds: what was fetched before will do
            try:
                return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
            except Exception:
                raise e from None  # says more than that nothing was fetched before
        wanted += next((group for group in weights if any(fnmatch.filter(files, pattern) for pattern in group)), ())
        return Path(snapshot_download(name, allow_patterns=wanted))
    except ImportError:
        raise SystemExit(f'error: {what}; to fetch it from the hub: pip install huggingface_hub') from None
    except Exception as e:  # the hub's, its transport's and the system's
        raise SystemExit(f'error: {what}, and fetching {name} from the hub failed: {type(e).__name__}: {str(e)[:300]}') from None


# ------------------------------------------------------------------------------------------- tokenizers of language models
class LLMTokenizer:
    """Text → token ids, for a language model. <image> and <pad> are added where it has none.

    bos: id that starts every text, or None;  eos: id that ends an answer;  chat_template: its own (Jinja), or None.
    """

    def __init__(self, backend: HFTokenizer, bos: str | None, eos: str | None, pad: str | None = None,
                 chat_template: str | None = None, where: str = ''):
        self.backend, self.chat_template = backend, chat_template
        self.backend.no_padding(), self.backend.no_truncation()
        if eos is None or backend.token_to_id(eos) is None:
            raise SystemExit(f'error: {where}: the tokenizer has no end-of-text token (eos_token is {eos!r}), so no answer could end; '
                             f'name one in tokenizer_config.json')
        if bos is not None and backend.token_to_id(bos) is None:
            raise SystemExit(f'error: {where}: bos_token {bos!r} of tokenizer_config.json is not in the tokenizer')
        new = [t for t in (IMAGE, pad or '<pad>') if backend.token_to_id(t) is None]
        self.backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])
        self.bos_token, self.eos_token, self.pad_token = bos, eos, pad or '<pad>'
        self.bos, self.eos, self.pad, self.image = (None if t is None else backend.token_to_id(t) for t in (bos, eos, self.pad_token, IMAGE))
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
            parts = lambda text: [{'type': 'image'}] * (IMAGE in text) + [{'type': 'text', 'text': text.replace(f'{IMAGE}\n', '').replace(IMAGE, '')}]
            messages = [{**m, 'content': parts(m['content'])} for m in messages]
        return self.fill_template(messages, add_generation_prompt)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Templates of models that see take a list of images and texts, and show nothing of a mere text."""
        probe = 'Is it?'
        if probe in self.fill_template([{'role': 'user', 'content': probe}], False):
            return False
        if probe in self.fill_template([{'role': 'user', 'content': [{'type': 'text', 'text': probe}]}], False):
            return True
        raise SystemExit('error: --prompt chat: the chat template of the LLM does not show what the user says; use --prompt v1')

    def fill_template(self, messages: list[dict], add_generation_prompt: bool) -> str:
        import jinja2

        def refuse(message: str):
            raise jinja2.TemplateError(message)
        try:
            return compiled(self.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt,
                                                       bos_token=self.bos_token or '', eos_token=self.eos_token, raise_exception=refuse)
        except (jinja2.TemplateError, TypeError) as e:
            raise SystemExit(f'error: --prompt chat: the chat template of the LLM: {type(e).__name__}: {e}; use --prompt v1') from None

    def files(self, max_length: int, template: str | None = None) -> dict[str, str]:
        """File name → content, such that transformers' AutoTokenizer reads the same tokenizer.   template: instead of its own"""
        template = template or self.chat_template
        config = {**TOKENIZER_CONFIG, 'model_max_length': max_length,
                  'bos_token': self.bos_token, 'eos_token': self.eos_token, 'pad_token': self.pad_token, 'image_token': IMAGE}
        files = {'tokenizer.json': self.backend.to_str(pretty=True)}
        if template:
            files['chat_template.jinja'] = config['chat_template'] = template
        return {**files, 'tokenizer_config.json': json.dumps({k: v for k, v in config.items() if v is not None}, indent=2)}


@functools.lru_cache(4)
def compiled(template: str):
    """In Jinja's sandbox, since the template comes with the weights; the two settings are those of transformers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    # transformers' own tag around what an assistant says, by which it finds the answers; it renders to what is inside
    template = re.sub(r'\{%(-?)\s*(end)?generation\s*(-?)%\}', lambda m: f'{{%{m[1]} {"endif" if m[2] else "if true"} {m[3]}%}}', template)
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)


# What a language model without a template of its own is spoken to in, for the tiny one: v1 without the system sentence.
SHORT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} ASSISTANT:{% else %}"
                  " {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")
# Before a template that knows mere text: lets it be given a list of images and texts, as transformers gives what a model that sees is asked.
TAKES_PARTS = """{%- set ns = namespace(messages=[], text='') -%}
{%- for m in messages -%}
{%- if m['content'] is string -%}{%- set ns.text = m['content'] -%}
{%- else -%}
{%- set ns.text = '' -%}
{%- for part in m['content'] if part['type'] == 'image' -%}{%- set ns.text = ns.text + '<image>\n' -%}{%- endfor -%}
{%- for part in m['content'] if part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}{%- endfor -%}
{%- endif -%}
{%- set ns.messages = ns.messages + [{'role': m['role'], 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""


def train_llm_tokenizer(texts: list[str], vocab_size: int) -> LLMTokenizer:
    """A byte-level BPE for the tiny language model."""
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=['<s>', '</s>', '<pad>', IMAGE],
                                                       show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return LLMTokenizer(bpe, '<s>', '</s>', '<pad>', SHORT_TEMPLATE)


def read_llm_tokenizer(path: Path) -> LLMTokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.json, or sentencepiece's tokenizer.model."""
    config = {}
    for name in ('config.json', 'special_tokens_map.json', 'tokenizer_config.json'):  # the last one counts
        if (path / name).is_file():
            try:
                config |= {k: v for k, v in json.loads((path / name).read_text(encoding='utf-8')).items() if v is not None}
            except ValueError as e:
                raise SystemExit(f'error: cannot read {path / name}: {e}') from None
    if (path / 'tokenizer.json').is_file():
        try:
            backend = HFTokenizer.from_file(str(path / 'tokenizer.json'))
        except Exception as e:  # tokenizers raises nothing more specific
            raise SystemExit(f'error: cannot read {path / "tokenizer.json"}: {e}') from None
    elif (path / 'tokenizer.model').is_file():
        backend = from_sentencepiece(path / 'tokenizer.model')
    else:
        raise SystemExit(f'error: {path} has neither tokenizer.json nor tokenizer.model')

    def token(name: str) -> str | None:
        value = config.get(f'{name}_token')
        if value is None and isinstance(number := config.get(f'{name}_token_id'), int):
            value = backend.id_to_token(number)
        return value['content'] if isinstance(value, dict) else value
    template = config.get('chat_template')
    if (path / 'chat_template.jinja').is_file():
        template = (path / 'chat_template.jinja').read_text(encoding='utf-8')
    elif template is None and (path / 'chat_template.json').is_file():
        template = read_json(path / 'chat_template.json', str(path), dict).get('chat_template')
    if isinstance(template, list):  # several, by name
        template = next((t['template'] for t in template if t['name'] == 'default'), None)
    return LLMTokenizer(backend, token('bos'), token('eos'), token('pad'), template, str(path))


def from_sentencepiece(file: Path) -> HFTokenizer:
    """sentencepiece's BPE (Llama, Vicuna) as a tokenizer of the tokenizers library, which also knows special tokens and offsets."""
    import sentencepiece
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as e:
        raise SystemExit(f'error: cannot read {file}: {e}') from None
    n = pieces.get_piece_size()
    vocab = {pieces.id_to_piece(i): i for i in range(n)}
    normal = [i for i in range(n) if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i) or pieces.is_unused(i))]
    ordinary = {pieces.id_to_piece(i) for i in normal}
    merges = []  # a piece's score says when it is made, from any two pieces that make it up
    for i in normal:
        piece = pieces.id_to_piece(i)
        parts = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in ordinary and piece[k:] in ordinary]
        merges += [(-pieces.get_score(i), vocab[a], vocab[b], a, b) for a, b in parts]
    merges = [(a, b) for *_, a, b in sorted(merges)]
    unknown = pieces.id_to_piece(pieces.unk_id())
    backend = HFTokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    backend.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    control = [pieces.id_to_piece(i) for i in range(n) if pieces.is_control(i) or pieces.is_unknown(i)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return backend


def from_gguf(fields: dict, where: str) -> LLMTokenizer:
    """The tokenizer in a GGUF file.   fields: tokenizer.ggml.* without that prefix, and chat_template"""
    tokens, kinds = fields['tokens'], fields.get('token_type') or [1] * len(fields['tokens'])
    regex = {'smollm': None, 'default': None, 'gpt-2': None,
             'llama-bpe': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
             'qwen2': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
    kind = fields.get('pre', 'default')
    if fields.get('model') != 'gpt2' or kind not in regex:
        raise SystemExit(f'error: {where}: the tokenizer is {fields.get("model")} / {kind}; supported in GGUF files: gpt2 with '
                         f'{", ".join(regex)}; use a directory with a tokenizer.json instead')
    backend = HFTokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(' ', 1)) for m in fields['merges']]))
    split = [pre_tokenizers.Split(Regex(regex[kind]), 'isolated')] if regex[kind] else \
        [pre_tokenizers.Digits(individual_digits=True)] if kind == 'smollm' else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex[kind] is None)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k == 3])  # 3: control
    named = {name: tokens[fields[f'{name}_token_id']] if f'{name}_token_id' in fields else None for name in ('bos', 'eos', 'padding')}
    return LLMTokenizer(backend, named['bos'], named['eos'], named['padding'], fields.get('chat_template'), where)


if __name__ == '__main__':
    for split in ('train', 'val', 'test'):
        print(load_pairs('easyvqa', split).note)
