"""What is read: pairs and their captions, pixels, order, tokenizers."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import clip_adv
import data


def batches(pairs, tokenizer, batch_size, steps, rank=0, world=1, workers=0):
    """All batches of a rank, as training reads them, at 16 px."""
    order = data.order(len(pairs), batch_size, steps, 0, rank, world)
    return list(data.loader(data.PairDataset(pairs, tokenizer, data.Fit(16), 0), order, workers))


# --------------------------------------------------------------------------------------- captions of easy-VQA
def test_counts_and_split():
    train, val, test = (data.load_pairs('easyvqa', s) for s in ('train', 'val', 'test'))
    assert (len(train), len(val), len(test)) == (3221, 357, 888)
    assert not set(train.files) & set(val.files)
    assert '3221 of 3643' in train.note and '357 of 357' in val.note and '888 of 1000' in test.note
    assert len(set(train.captions)) == len(set(test.captions)) == 24


def test_colours_agree_with_the_pixels():
    """Every caption's colour is the one that the image's most frequent saturated or dark pixel has."""
    rgb = dict(
        black=(0, 0, 0), blue=(0, 0, 255), brown=(165, 42, 42), gray=(128, 128, 128), green=(0, 255, 0)
    )
    rgb |= dict(red=(255, 0, 0), teal=(0, 128, 128), yellow=(255, 255, 0))
    table = np.array([rgb[c] for c in data.COLOURS])
    pairs = data.load_pairs('easyvqa', 'test')
    for file, caption in zip(pairs.files, pairs.captions, strict=True):
        pixels = np.asarray(data.read_image(file)).reshape(-1, 3).astype(int)
        distance = np.abs(pixels[:, None] - table[None]).max(-1)  # backgrounds are all nearly white
        count = (distance < 12).sum(0)
        assert data.COLOURS[count.argmax()] == caption.split()[1] and count.max() >= 8, (file, caption, count)


def test_how_facts_follow():
    rows = [
        ('what color is the circle?', 'red', 1),  # answer and premise
        ('is there not a triangle?', 'no', 2),  # negation
        ('what color is the shape?', 'teal', 2),
        ('is a circle present?', 'no', 3),  # elimination
        ('is no rectangle present?', 'yes', 3),
        ('is there a blue shape?', 'yes', 3),
        ('is there a circle?', 'yes', 4),  # seven colours are left
        ('is there a red shape?', 'no', 4),
    ]
    facts = {1: ('red', 'circle'), 2: ('teal', 'triangle'), 3: ('blue', 'triangle')}
    assert data.easyvqa_facts(rows) == facts
    rows.append(('is there a triangle?', 'yes', 1))
    with pytest.raises(ValueError, match='image 1 contradict'):
        data.easyvqa_facts(rows)


def test_easyvqa_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'easy_vqa', None)
    with pytest.raises(SystemExit, match='pip install easy-vqa'):
        data.load_pairs('easyvqa', 'train')


def test_holdout():
    pairs = data.load_pairs('easyvqa', 'train', 'red circle, a Blue  triangle')
    assert len(set(pairs.captions)) == 22 and not {'a red circle', 'a blue triangle'} & set(pairs.captions)
    with pytest.raises(SystemExit, match='--holdout pink circle'):
        data.load_pairs('easyvqa', 'train', 'pink circle')


# ----------------------------------------------------------------------------------------------------- folder
@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)).save(tmp_path / f'{i}.png')
        rows.append({'file_name': f'{i}.png', 'text': f'photo number {i}'})
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return tmp_path


def test_folder(photos):
    pairs = data.load_pairs(str(photos))
    assert len(pairs) == 6 and pairs.captions[2] == 'photo number 2'
    tokenizer = data.train_tokenizer(pairs.captions, 8, 400)
    whole = [batches(pairs, tokenizer, 4, range(3), workers=w) for w in (0, 2)]
    assert len(whole[0]) == 3  # and decoding in other processes changes nothing:
    for (images, tokens, _), (images2, tokens2, _) in zip(*whole, strict=True):
        assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8 and tokens.shape == (4, 8)
        assert torch.equal(images, images2) and torch.equal(tokens, tokens2)


@pytest.mark.parametrize(
    'line, message',
    [
        ('{"file_name": "0.png"}', "line 7: ValueError: its keys are file_name"),
        ('{"file_name": "0.png", "text": " "}', 'line 7: ValueError: the text is empty'),
        ('{"file_name": "none.png", "text": "a"}', 'line 7: ValueError: no file .*none.png'),
        ('{"file', 'line 7: JSONDecodeError'),
        ('3', 'line 7'),
    ],
)
def test_folder_names_the_bad_line(photos, line, message):
    with open(photos / 'metadata.jsonl', 'a') as file:
        file.write('\n' + line)
    with pytest.raises(SystemExit, match=message):
        data.load_pairs(str(photos))


def test_folder_with_unusual_captions(photos):
    import pickle

    row = json.dumps({'file_name': '0.png', 'text': 'a\u2028b\x85c'}, ensure_ascii=False)
    (photos / 'metadata.jsonl').write_text(row + '\n', encoding='utf-8')
    pairs = data.load_pairs(str(photos))
    assert pairs.captions == ['a\u2028b\x85c']
    dataset = data.PairDataset(pairs, data.train_tokenizer(['a'], 8, 400), data.Fit(16), 0)
    pickle.dumps(dataset)  # what spawned workers are sent
    (photos / 'metadata.jsonl').write_bytes(b'\xff')
    with pytest.raises(SystemExit, match='UTF-8'):
        data.load_pairs(str(photos))


def test_folder_that_is_none(tmp_path):
    with pytest.raises(SystemExit, match='no such folder'):
        data.load_pairs(str(tmp_path / 'nowhere'))
    with pytest.raises(SystemExit, match='metadata.jsonl'):
        data.load_pairs(str(tmp_path))
    (tmp_path / 'metadata.jsonl').write_text('')
    with pytest.raises(SystemExit, match='no image is left'):
        data.load_pairs(str(tmp_path))
    (tmp_path / 'train').mkdir()
    (tmp_path / 'metadata.jsonl').rename(tmp_path / 'train' / 'metadata.jsonl')
    with pytest.raises(SystemExit, match='--split val: .* has train'):
        data.load_pairs(str(tmp_path), 'val')


# ----------------------------------------------------------------------------------------------------- pixels
def test_modes_become_rgb():

    def pixel(image):
        return data.to_rgb(image).getpixel((0, 0))

    assert pixel(Image.new('RGBA', (2, 2), (255, 0, 0, 0))) == (255, 255, 255)  # alpha on white
    assert pixel(Image.new('RGBA', (2, 2), (255, 0, 0, 255))) == (255, 0, 0)
    assert pixel(Image.new('LA', (2, 2), (0, 0))) == (255, 255, 255)
    assert pixel(Image.new('L', (2, 2), 7)) == (7, 7, 7)
    assert pixel(Image.new('CMYK', (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    assert pixel(Image.new('1', (2, 2), 1)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16))
    assert pixel(deep) == (100, 100, 100)  # 16 bits scaled
    palette = Image.new('P', (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    assert pixel(palette) == (0, 255, 0)
    palette.info['transparency'] = 1
    assert pixel(palette) == (255, 255, 255)


@pytest.mark.parametrize('content', [b'', b'no image at all', None])
def test_an_image_that_does_not_decode_is_named(tmp_path, content):
    file = tmp_path / 'broken.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match='broken.png'):
        data.read_image(file)


def test_fit():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for mode in ('shortest', 'squash', 'longest'):
        assert data.Fit(24, 'bicubic', mode)(image).shape == (3, 24, 24)
    assert data.Fit(24, 'bilinear', 'longest')(image)[:, :4].sum() == 0  # 16 rows of image, 8 of padding


def test_augmentation_moves_and_mirrors():
    image = torch.arange(3 * 32 * 32).remainder(251).byte().reshape(3, 32, 32)
    seen = set()
    for i in range(300):
        moved = data.shift_and_flip(image, data.generator(0, 'augment', i))
        assert moved.shape == image.shape
        for flip in (0, 1):
            padded = TF.pad(image.flip(-1) if flip else image, [2] * 4, padding_mode='edge')
            places = [(y, x) for y in range(5) for x in range(5)]
            seen |= {(flip, y, x) for y, x in places if torch.equal(padded[:, y : y + 32, x : x + 32], moved)}
    assert len(seen) == 50  # 2 × 5 × 5, and each of them comes up
    photo = Image.new('RGB', (100, 80))
    crops = {data.random_crop(photo, data.generator(0, 'augment', i)).size for i in range(50)}
    assert all(94 <= w <= 100 and 75 <= h <= 80 for w, h in crops) and len(crops) > 3


# ------------------------------------------------------------------------------------------------------ order
def test_order_is_the_same_for_any_number_of_ranks_and_after_a_resume():
    n, batch, steps = 23, 6, 20
    whole = list(data.order(n, batch, range(steps), seed=3, rank=0, world=1))
    for world in (2, 3):
        parts = [list(data.order(n, batch, range(steps), seed=3, rank=r, world=world)) for r in range(world)]
        assert [sum(p, []) for p in zip(*parts, strict=True)] == whole
    assert list(data.order(n, batch, range(7, steps), seed=3, rank=0, world=1)) == whole[7:]
    assert list(data.order(n, batch, range(steps), seed=4, rank=0, world=1)) != whole
    stream = sum(whole, [])
    assert [number for _, number in stream] == list(range(batch * steps))
    for epoch in range(len(stream) // n):  # each image once in each epoch, though batches straddle the epochs
        assert sorted(row for row, _ in stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_do_not_depend_on_ranks():
    pairs = data.load_pairs('easyvqa', 'val')
    tokenizer = data.train_tokenizer(pairs.captions, 8, 400)
    whole, late = (batches(pairs, tokenizer, 8, range(first, 4)) for first in (0, 2))
    halves = [batches(pairs, tokenizer, 8, range(4), rank, 2) for rank in (0, 1)]
    for step in range(4):
        for part in (0, 1):
            assert torch.equal(torch.cat([h[step][part] for h in halves]), whole[step][part])
            assert step < 2 or torch.equal(late[step - 2][part], whole[step][part])


# ------------------------------------------------------------------------------------------------- tokenizers
def test_trained_tokenizer():
    captions = ['a red circle', 'a blue triangle', 'a teal rectangle']
    tokenizer = data.train_tokenizer(captions, 6, 400)
    ids = tokenizer(['a red circle', 'A  RED circle ', 'red'])
    assert ids.shape == (3, 6) and ids.dtype == torch.int64 and torch.equal(ids[0], ids[1])
    assert ids[0].tolist()[0] == tokenizer.bos == 1
    assert ids[0, 4] == tokenizer.eos == tokenizer.vocab_size - 1 == ids.max()
    assert ids[0, 5] == tokenizer.pad == 0 and ids[2].tolist().count(0) == 3
    assert tokenizer.backend.decode(ids[0].tolist()).strip() == 'a red circle'
    long = tokenizer(['a red circle a blue triangle é 漢'])[0]
    assert long[-1] == tokenizer.eos and len(long) == 6  # cut, but the end of the text is still there
    assert tokenizer.too_long(captions) == 0 and tokenizer.too_long(['a red circle a blue']) == 1


def test_wordpiece_as_delta_clip(tmp_path):
    words = ['[PAD]', '[unused0]', '[unused1]', '[UNK]', 'a', 'red', 'circ', '##le', '[CLS]']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    cfg = clip_adv.TextCfg(context_length=9, tokenizer_mode='clips', pool_type='last')
    tokenizer = data.tokenizer_for(cfg, data.read_tokenizer(tmp_path / 'vocab.txt'))
    # [bos] a red circ ##le [eos] [PAD] [PAD] [CLS]
    assert tokenizer(['A Red circle'])[0].tolist() == [1, 4, 5, 6, 7, 2, 0, 0, 8]
    assert tokenizer(['a red circle ' * 9])[0].tolist() == [1, 4, 5, 6, 7, 4, 5, 2, 8]
    (tmp_path / 'vocab.txt').write_text('a\nb')
    with pytest.raises(SystemExit, match='PAD'):
        data.tokenizer_for(cfg, data.read_tokenizer(tmp_path / 'vocab.txt'))


def test_tokenizer_that_cannot_serve(tmp_path):
    with pytest.raises(SystemExit, match='nothing.json'):
        data.read_tokenizer(tmp_path / 'nothing.json')
    tokenizer = data.train_tokenizer(['a'], 8, 400)
    tokenizer.backend.post_processor = None  # no start and no end around a text
    with pytest.raises(SystemExit, match='start and an end'):
        data.tokenizer_for(clip_adv.TextCfg(), tokenizer.backend)


def test_generators_differ_by_each_argument():

    def draw(*a):
        return tuple(torch.rand(2, generator=data.generator(*a)).tolist())

    assert draw(0, 'a', 0) == draw(0, 'a', 0)
    others = [(1, 'a', 0), (0, 'b', 0), (0, 'a', 1), (0, 'a', 11), (1, 'a', 1)]
    assert len({draw(*a) for a in [(0, 'a', 0), *others]}) == 6
