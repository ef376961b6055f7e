import io
import json
import re
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import data


# ------------------------------------------------------------------------------------------------ captions of easy-VQA
def test_counts_and_split():
    train, val, test = (data.load_pairs('easyvqa', s) for s in ('train', 'val', 'test'))
    assert (len(train), len(val), len(test)) == (3221, 357, 888)
    assert not set(train.files) & set(val.files)
    assert '3578 of 4000' in train.note and '888 of 1000' in test.note
    assert len(set(train.captions)) == len(set(test.captions)) == 24


def test_colours_agree_with_the_pixels():
    """Every caption's colour is the one that the image's most frequent saturated or dark pixel has."""
    rgb = dict(black=(0, 0, 0), blue=(0, 0, 255), brown=(165, 42, 42), gray=(128, 128, 128), green=(0, 255, 0),
               red=(255, 0, 0), teal=(0, 128, 128), yellow=(255, 255, 0))
    table = np.array([rgb[c] for c in data.COLOURS])
    pairs = data.load_pairs('easyvqa', 'test')
    for file, caption in zip(pairs.files, pairs.captions):
        pixels = np.asarray(data.read_image(file)).reshape(-1, 3).astype(int)
        distance = np.abs(pixels[:, None] - table[None]).max(-1)       # backgrounds are all nearly white
        count = (distance < 12).sum(0)
        assert data.COLOURS[count.argmax()] == caption.split()[1] and count.max() >= 8, (file, caption, count)


def test_how_facts_follow(monkeypatch):
    import easy_vqa
    rows = [('what color is the circle?', 'red', 1),                                            # answer and premise
            ('is there not a triangle?', 'no', 2), ('what color is the shape?', 'teal', 2),     # negation
            ('is a circle present?', 'no', 3), ('is no rectangle present?', 'yes', 3), ('is there a blue shape?', 'yes', 3),
            ('is there a circle?', 'yes', 4), ('is there a red shape?', 'no', 4)]                # seven colours are left
    monkeypatch.setattr(easy_vqa, 'get_train_questions', lambda: tuple(zip(*rows)))
    assert data.easyvqa_facts('train') == ({1: ('red', 'circle'), 2: ('teal', 'triangle'), 3: ('blue', 'triangle')}, 4)
    rows.append(('is there a triangle?', 'yes', 1))
    with pytest.raises(ValueError, match='image 1 contradict'):
        data.easyvqa_facts('train')


def test_easyvqa_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'easy_vqa', None)
    with pytest.raises(SystemExit, match='pip install easy-vqa'):
        data.load_pairs('easyvqa', 'train')


def test_holdout():
    pairs = data.load_pairs('easyvqa', 'train', 'red circle, a Blue  triangle')
    assert len(set(pairs.captions)) == 22 and not {'a red circle', 'a blue triangle'} & set(pairs.captions)
    with pytest.raises(SystemExit, match='--holdout pink circle'):
        data.load_pairs('easyvqa', 'train', 'pink circle')


# -------------------------------------------------------------------------------------------------------------- folder
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
    whole = [list(data.batches(pairs, tokenizer, 16, dict(interpolation='bilinear', resize_mode='shortest'), batch_size=4,
                               first_step=0, last_step=3, seed=0, workers=w)) for w in (0, 2)]
    for (images, tokens), (images2, tokens2) in zip(*whole):  # decoding in other processes changes nothing
        assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8 and tokens.shape == (4, 8)
        assert torch.equal(images, images2) and torch.equal(tokens, tokens2)


@pytest.mark.parametrize('line, message', [
    ('{"file_name": "0.png"}', "line 7: KeyError: 'text'"), ('{"file_name": "0.png", "text": " "}', 'line 7: the text is empty'),
    ('{"file_name": "none.png", "text": "a"}', 'line 7: no file .*none.png'), ('{"file', 'line 7: JSONDecodeError'), ('3', 'line 7')])
def test_folder_names_the_bad_line(photos, line, message):
    with open(photos / 'metadata.jsonl', 'a') as file:
        file.write('\n' + line)
    with pytest.raises(SystemExit, match=message):
        data.load_pairs(str(photos))


def test_folder_with_unusual_captions(photos):
    import pickle
    (photos / 'metadata.jsonl').write_text(json.dumps({'file_name': '0.png', 'text': 'a\u2028b\x85c'}, ensure_ascii=False) + '\n', encoding='utf-8')
    pairs = data.load_pairs(str(photos))
    assert pairs.captions == ['a\u2028b\x85c']
    pickle.dumps(data.PairDataset(pairs, data.train_tokenizer(['a'], 8, 400), 16, {}, 0))  # what spawned workers are sent
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
    with pytest.raises(SystemExit, match='cannot read .*val'):
        data.load_pairs(str(tmp_path), 'val')


# -------------------------------------------------------------------------------------------------------------- pixels
def test_modes_become_rgb():
    pixel = lambda image: data.to_rgb(image).getpixel((0, 0))
    assert pixel(Image.new('RGBA', (2, 2), (255, 0, 0, 0))) == (255, 255, 255)           # alpha on white
    assert pixel(Image.new('RGBA', (2, 2), (255, 0, 0, 255))) == (255, 0, 0)
    assert pixel(Image.new('LA', (2, 2), (0, 0))) == (255, 255, 255)
    assert pixel(Image.new('L', (2, 2), 7)) == (7, 7, 7)
    assert pixel(Image.new('CMYK', (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    assert pixel(Image.new('1', (2, 2), 1)) == (255, 255, 255)
    assert pixel(Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16))) == (100, 100, 100)  # 16 bits scaled
    assert pixel(Image.fromarray(np.full((2, 2), .5, dtype=np.float32))) == (128, 128, 128)
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
        assert data.fit(image, 24, 'bicubic', mode).shape == (3, 24, 24)
    assert data.fit(image, 24, 'bilinear', 'longest')[:, :4].sum() == 0                  # 16 rows of image, 8 of padding
    with pytest.raises(ValueError, match='resize_mode'):
        data.fit(image, 24, 'bilinear', 'stretch')


def test_augmentation_moves_and_mirrors():
    image = torch.arange(3 * 32 * 32).remainder(251).byte().reshape(3, 32, 32)
    seen = set()
    for i in range(300):
        moved = data.shift_and_flip(image, data.generator(0, 'augment', i))
        assert moved.shape == image.shape
        for flip in (0, 1):
            padded = TF.pad(image.flip(-1) if flip else image, [2] * 4, padding_mode='edge')
            seen |= {(flip, y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y:y + 32, x:x + 32], moved)}
    assert len(seen) == 50  # 2 × 5 × 5, and each of them comes up
    crops = {data.random_crop(Image.new('RGB', (100, 80)), data.generator(0, 'augment', i)).size for i in range(50)}
    assert all(94 <= w <= 100 and 75 <= h <= 80 for w, h in crops) and len(crops) > 3


# --------------------------------------------------------------------------------------------------------------- order
def test_order_is_the_same_for_any_number_of_ranks_and_after_a_resume():
    n, batch, steps = 23, 6, 20
    whole = list(data.Order(n, batch, 0, steps, seed=3, rank=0, world=1))
    for world in (2, 3):
        parts = [list(data.Order(n, batch, 0, steps, seed=3, rank=r, world=world)) for r in range(world)]
        assert [sum(p, []) for p in zip(*parts)] == whole
    assert list(data.Order(n, batch, 7, steps, seed=3, rank=0, world=1)) == whole[7:]
    assert list(data.Order(n, batch, 0, steps, seed=4, rank=0, world=1)) != whole
    stream = sum(whole, [])
    assert [number for _, number in stream] == list(range(batch * steps))
    for epoch in range(len(stream) // n):  # each image once in each epoch, though batches straddle the epochs
        assert sorted(row for row, _ in stream[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_batches_do_not_depend_on_ranks():
    pairs = data.load_pairs('easyvqa', 'val')
    tokenizer = data.train_tokenizer(pairs.captions, 8, 400)
    make = lambda **kw: list(data.batches(pairs, tokenizer, 16, dict(interpolation='bilinear', resize_mode='shortest'),
                                          batch_size=8, last_step=4, seed=0, **kw))
    whole, late = make(first_step=0), make(first_step=2)
    halves = [make(first_step=0, rank=r, world=2) for r in (0, 1)]
    for step in range(4):
        for part in (0, 1):
            assert torch.equal(torch.cat([h[step][part] for h in halves]), whole[step][part])
            assert step < 2 or torch.equal(late[step - 2][part], whole[step][part])


# ---------------------------------------------------------------------------------------------------------- tokenizers
def test_trained_tokenizer():
    captions = ['a red circle', 'a blue triangle', 'a teal rectangle']
    tokenizer = data.train_tokenizer(captions, 6, 400)
    ids = tokenizer(['a red circle', 'A  RED circle ', 'red'])
    assert ids.shape == (3, 6) and ids.dtype == torch.int64 and torch.equal(ids[0], ids[1])
    assert ids[0].tolist()[0] == tokenizer.bos == 1 and ids[0, 4] == tokenizer.eos == tokenizer.vocab_size - 1 == ids.max()
    assert ids[0, 5] == tokenizer.pad == 0 and ids[2].tolist().count(0) == 3
    assert tokenizer.backend.decode(ids[0].tolist()).strip() == 'a red circle'
    long = tokenizer(['a red circle a blue triangle é 漢'])[0]
    assert long[-1] == tokenizer.eos and len(long) == 6  # cut, but the end of the text is still there
    assert tokenizer.too_long(captions) == 0 and tokenizer.too_long(['a red circle a blue']) == 1


def test_wordpiece_as_delta_clip(tmp_path):
    words = ['[PAD]', '[unused0]', '[unused1]', '[UNK]', 'a', 'red', 'circ', '##le', '[CLS]']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    tokenizer = data.read_tokenizer(tmp_path / 'vocab.txt', 9)
    # [bos] a red circ ##le [eos] [PAD] [PAD] [CLS]
    assert tokenizer(['A Red circle'])[0].tolist() == [1, 4, 5, 6, 7, 2, 0, 0, 8]
    assert tokenizer(['a red circle ' * 9])[0].tolist() == [1, 4, 5, 6, 7, 4, 5, 2, 8]
    (tmp_path / 'vocab.txt').write_text('a\nb')
    with pytest.raises(SystemExit, match='PAD'):
        data.read_tokenizer(tmp_path / 'vocab.txt', 9)


def test_tokenizer_that_cannot_serve(tmp_path):
    with pytest.raises(SystemExit, match='nothing.json'):
        data.read_tokenizer(tmp_path / 'nothing.json', 8)
    tokenizer = data.train_tokenizer(['a'], 8, 400)
    tokenizer.backend.post_processor = None  # no start and no end around a text
    tokenizer.backend.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(SystemExit, match='start and an end'):
        data.read_tokenizer(tmp_path / 'tokenizer.json', 8)


def test_generators_differ_by_each_argument():
    draw = lambda *a: torch.rand(2, generator=data.generator(*a)).tolist()
    assert draw(0, 'a', 0) == draw(0, 'a', 0)
    assert len({tuple(draw(*a)) for a in [(0, 'a', 0), (1, 'a', 0), (0, 'b', 0), (0, 'a', 1), (0, 'a', 11), (1, 'a', 1)]}) == 6


# -------------------------------------------------------------------------------------- class sets, for zero-shot evaluation
def picture(mode='RGB', size=(20, 16), colour=(255, 0, 0)):
    image = Image.new('RGB', size, colour)
    if mode == 'I;16':
        return Image.fromarray(np.full(size[::-1], 65535 * 3 // 5, dtype=np.uint16))
    return image.convert(mode)


def encoded(image, kind='PNG'):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def benchmark(tmp_path):
    """CLIP_benchmark's layout, 12 shards of one image each, so that 10.tar must come after 9.tar."""
    for i in range(12):
        tar(tmp_path / 'test' / f'{i}.tar', {f's{i:07d}.png': encoded(picture(colour=(20 * i, 0, 0))), f's{i:07d}.cls': b'%d' % (i % 3)})
    (tmp_path / 'test' / 'nshards.txt').write_text('12\n')
    (tmp_path / 'classnames.txt').write_text('cat\ndog\nhot dog\n')
    (tmp_path / 'zeroshot_classification_templates.txt').write_text('a photo of a {c}.\na {c}\n')
    return tmp_path


def test_shards_of_clip_benchmark(benchmark):
    images = data.class_set(str(benchmark))
    assert images.n == 12 and images.classes == ['cat', 'dog', 'hot dog'] and images.prompts('dog') == ['a photo of a dog.', 'a dog']
    for i in (11, 0, 10):  # any order
        image, label = images.item(i)
        assert image.getpixel((0, 0)) == (20 * i, 0, 0) and label == i % 3


def test_webdataset_reads_the_same(benchmark):
    """The library that wrote this convention down sees the same samples."""
    webdataset = pytest.importorskip('webdataset')
    theirs = list(webdataset.WebDataset([str(benchmark / 'test' / f'{i}.tar') for i in range(12)], shardshuffle=False).decode('pil').to_tuple('png', 'cls'))
    images = data.class_set(str(benchmark))
    for i, (image, label) in enumerate(theirs):
        assert images.item(i)[1] == label and (np.asarray(images.item(i)[0]) == np.asarray(image.convert('RGB'))).all()


@pytest.mark.parametrize('spoil, message', [
    (lambda d: (d / 'classnames.txt').unlink(), 'no class names.*--classnames'),
    (lambda d: (d / 'classnames.txt').write_text('cat\ndog\n'), 'label 2; there are 2'),
    (lambda d: (d / 'classnames.txt').write_text('cat\ndog\ndog\n'), "'dog' is there twice"),
    (lambda d: (d / 'classnames.txt').write_text('cat\n\ndog\n'), 'an empty line, 2'),
    (lambda d: (d / 'classnames.txt').write_text(''), 'is empty'),
    (lambda d: (d / 'zeroshot_classification_templates.txt').write_text('a photo of a {}.'), r'has no \{c\}'),
    (lambda d: (d / 'test' / '3.tar').unlink(), 'says 12 shards; there are 11'),
    (lambda d: (d / 'test' / '3.tar').write_bytes(b'x' * 2000), '3.tar'),
    (lambda d: (d / 'test' / '3.tar').write_bytes((d / 'test' / '3.tar').read_bytes()[:600]), '3.tar'),
    (lambda d: tar(d / 'test' / '3.tar', {'a.png': encoded(picture()), 'a.txt': b''}), '3.tar: the sample a has png, txt, but no cls'),
    (lambda d: tar(d / 'test' / '3.tar', {'a.cls': b'0'}), 'no jpg or png'),
    (lambda d: tar(d / 'test' / '3.tar', {'a.png': encoded(picture()), 'a.cls': b'cat'}), "'cat'.*is no class number"),
    (lambda d: tar(d / 'test' / '3.tar', {'a.png': encoded(picture()), 'a.cls': b'-1'}), 'label -1')])
def test_spoilt_shards(benchmark, spoil, message):
    spoil(benchmark)
    with pytest.raises(SystemExit, match=message):
        images = data.class_set(str(benchmark))
        for i in range(images.n):
            images.item(i)


def test_an_image_in_a_shard_that_does_not_decode_is_named(benchmark):
    tar(benchmark / 'test' / '3.tar', {'bad.jpg': b'no image', 'bad.cls': b'0'})
    with pytest.raises(ValueError, match=r'3\.tar/bad\.jpg'):
        data.class_set(str(benchmark)).item(3)


@pytest.mark.parametrize('mode, kind, expected', [
    ('P', 'PNG', (255, 0, 0)), ('RGBA', 'PNG', (255, 0, 0)), ('L', 'PNG', (76, 76, 76)), ('CMYK', 'TIFF', (255, 0, 0)),
    ('I;16', 'PNG', (153, 153, 153)), ('LA', 'PNG', (76, 76, 76)), ('1', 'PNG', None)])
def test_other_modes_in_shards(benchmark, mode, kind, expected):
    tar(benchmark / 'test' / '3.tar', {'x.png': encoded(picture(mode), kind), 'x.cls': b'0'})
    image = data.class_set(str(benchmark)).item(3)[0]
    assert image.mode == 'RGB' and (expected is None or max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), expected)) <= 2)


def test_own_class_names_and_templates(benchmark, tmp_path):
    (tmp_path / 'names.txt').write_text('x\ny\nz\n')
    (tmp_path / 't.txt').write_text('{c}!\n')
    images = data.class_set(str(benchmark), classnames=str(tmp_path / 'names.txt'), templates=str(tmp_path / 't.txt'))
    assert images.classes == ['x', 'y', 'z'] and images.prompts('x') == ['x!']
    assert len(data.class_set(str(benchmark), templates='imagenet').templates) == 80
    with pytest.raises(SystemExit, match='--templates'):
        data.class_set(str(benchmark), templates=str(tmp_path / 'no.txt'))


def test_templates_are_those_of_openai():
    from open_clip import OPENAI_IMAGENET_TEMPLATES
    theirs = {t('{c}') for t in OPENAI_IMAGENET_TEMPLATES}
    assert set(data.TEMPLATES['imagenet']) == theirs and len(data.TEMPLATES['imagenet']) == 80
    assert len(set(data.TEMPLATES['cifar'])) == 18 and set(data.TEMPLATES['DTD']) == {
        f'a photo of {a} {{c}} {n}.' for a in ('a', 'the') for n in ('texture', 'pattern', 'thing', 'object')}
    assert all(t.count('{c}') == 1 for templates in data.TEMPLATES.values() for t in templates)


def test_a_folder_for_each_class(tmp_path):
    for i, name in enumerate(['n01', 'n02']):
        for split, count in (('test', 2 + i), ('train', 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for j in range(count):
                picture(colour=(0, 100 * i, 0)).save(tmp_path / split / name / f'{j}.png')
    with pytest.raises(SystemExit, match='no class names'):
        data.class_set(str(tmp_path))
    (tmp_path / 'classnames.txt').write_text('tench\ngoldfish\n')
    images = data.class_set(str(tmp_path))
    assert images.n == 5 and [images.item(i)[1] for i in range(5)] == [0, 0, 1, 1, 1] and images.item(4)[0].getpixel((0, 0)) == (0, 100, 0)
    assert len(images.templates) == 80 and data.class_set(str(tmp_path), 'train').n == 2
    (tmp_path / 'classnames.txt').write_text('tench\n')
    with pytest.raises(SystemExit, match='1 lines; .* has 2 folders'):
        data.class_set(str(tmp_path))


def test_torchvision_by_name(tmp_path):
    """EuroSAT's files, as torchvision lays them out."""
    for name in ('AnnualCrop', 'River'):
        (tmp_path / 'eurosat' / '2750' / name).mkdir(parents=True)
        picture('L').save(tmp_path / 'eurosat' / '2750' / name / f'{name}_1.jpg')
    images = data.class_set('EuroSAT', root=str(tmp_path))
    assert images.classes == ['annual crop', 'river'] and images.n == 2 and images.item(1)[1] == 1 and images.item(1)[0].mode == 'RGB'
    assert images.prompts('river')[1] == 'a centered satellite photo of a river.' and 'all of it' in images.note
    (tmp_path / 'eurosat' / '2750' / 'River' / 'River_1.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match="image 1 of torchvision's EuroSAT"):
        data.class_set('EuroSAT', root=str(tmp_path)).item(1)


@pytest.mark.parametrize('name, message', [
    ('CIFAR10', r'--download fetches it'), ('cifar10', 'upper and lower case'), ('FakeData', 'no class names for it'), ('STL10', '--split dev'),
    ('ImageNet', 'ILSVRC2012')])
def test_torchvision_that_cannot(tmp_path, name, message):
    with pytest.raises(SystemExit, match=message):
        data.class_set(name, 'dev' if name == 'STL10' else 'val' if name == 'ImageNet' else 'test', root=str(tmp_path))


def test_easyvqa_and_captions_as_classes(photos):
    images = data.class_set('easyvqa', 'test')
    assert images.n == 888 and len(images.classes) == 24 and images.prompts('red circle') == ['a red circle']
    pairs = data.load_pairs('easyvqa', 'test')
    assert all(f'a {images.classes[images.item(i)[1]]}' == pairs.captions[i] for i in range(20))
    folder = data.class_set(str(photos), 'train')
    assert folder.n == 6 and folder.templates == ['{c}'] and folder.classes[folder.item(2)[1]] == data.load_pairs(str(photos)).captions[2]


def test_captions_of_an_image_stay_together(tmp_path):
    tar(tmp_path / 'test' / '0.tar', {'a.jpg': encoded(picture(), 'JPEG'), 'a.txt': 'one\ntwo \n\n'.encode(), 'b.jpg': encoded(picture(), 'JPEG'), 'b.txt': b'three'})
    images = data.caption_set(str(tmp_path))
    assert images.captions == [['one', 'two'], ['three']] and images.image(1).size == (20, 16)
    tar(tmp_path / 'test' / '1.tar', {'c.jpg': b'', 'c.txt': b' \n'})
    with pytest.raises(SystemExit, match=re.escape('c.txt holds no caption')):
        data.caption_set(str(tmp_path))
