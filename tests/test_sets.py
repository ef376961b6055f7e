"""The sets that only eval.py reads: class sets in every layout, their templates, captions of an image."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation


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
        tar(
            tmp_path / 'test' / f'{i}.tar',
            {f's{i:07d}.png': encoded(picture(colour=(20 * i, 0, 0))), f's{i:07d}.cls': b'%d' % (i % 3)},
        )
    (tmp_path / 'test' / 'nshards.txt').write_text('12\n')
    (tmp_path / 'classnames.txt').write_text('cat\ndog\nhot dog\n')
    (tmp_path / 'zeroshot_classification_templates.txt').write_text('a photo of a {c}.\na {c}\n')
    return tmp_path


def test_shards_of_clip_benchmark(benchmark):
    images = evaluation.class_set(str(benchmark))
    assert images.n == 12 and images.classes == ['cat', 'dog', 'hot dog']
    assert images.templates == ['a photo of a {c}.', 'a {c}']
    for i in (11, 0, 10):  # any order
        image, label = images.item(i)
        assert image.getpixel((0, 0)) == (20 * i, 0, 0) and label == i % 3


def test_webdataset_reads_the_same(benchmark):
    """The library that wrote this convention down sees the same samples."""
    webdataset = pytest.importorskip('webdataset')
    theirs = list(
        webdataset.WebDataset([str(benchmark / 'test' / f'{i}.tar') for i in range(12)], shardshuffle=False)
        .decode('pil')
        .to_tuple('png', 'cls')
    )
    images = evaluation.class_set(str(benchmark))
    for i, (image, label) in enumerate(theirs):
        assert images.item(i)[1] == label
        assert (np.asarray(images.item(i)[0]) == np.asarray(image.convert('RGB'))).all()


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda d: (d / 'classnames.txt').unlink(), 'no class names.*--classnames'),
        (lambda d: (d / 'classnames.txt').write_text('cat\ndog\n'), 'label 2; there are 2'),
        (lambda d: (d / 'classnames.txt').write_text('cat\ndog\ndog\n'), "'dog' is there twice"),
        (lambda d: (d / 'classnames.txt').write_text('cat\n\ndog\n'), 'an empty line, 2'),
        (lambda d: (d / 'classnames.txt').write_text(''), 'is empty'),
        (
            lambda d: (d / 'zeroshot_classification_templates.txt').write_text('a photo of a {}.'),
            r'has no \{c\}',
        ),
        (lambda d: (d / 'test' / '3.tar').unlink(), 'says 12 shards; there are 11'),
        (lambda d: (d / 'test' / '3.tar').write_bytes(b'x' * 2000), '3.tar'),
        (lambda d: (d / 'test' / '3.tar').write_bytes((d / 'test' / '3.tar').read_bytes()[:600]), '3.tar'),
        (
            lambda d: tar(d / 'test' / '3.tar', {'a.png': encoded(picture()), 'a.txt': b''}),
            '3.tar: the sample a has png, txt, but no cls',
        ),
        (lambda d: tar(d / 'test' / '3.tar', {'a.cls': b'0'}), 'no jpg or png'),
        (
            lambda d: tar(d / 'test' / '3.tar', {'a.png': encoded(picture()), 'a.cls': b'cat'}),
            "'cat'.*is no class number",
        ),
        (lambda d: tar(d / 'test' / '3.tar', {'a.png': encoded(picture()), 'a.cls': b'-1'}), 'label -1'),
    ],
)
def test_spoilt_shards(benchmark, spoil, message):
    spoil(benchmark)
    with pytest.raises(SystemExit, match=message):
        images = evaluation.class_set(str(benchmark))
        for i in range(images.n):
            images.item(i)


def test_an_image_in_a_shard_that_does_not_decode_is_named(benchmark):
    tar(benchmark / 'test' / '3.tar', {'bad.jpg': b'no image', 'bad.cls': b'0'})
    with pytest.raises(ValueError, match=r'3\.tar/bad\.jpg'):
        evaluation.class_set(str(benchmark)).item(3)


@pytest.mark.parametrize(
    'mode, kind, expected',
    [
        ('P', 'PNG', (255, 0, 0)),
        ('RGBA', 'PNG', (255, 0, 0)),
        ('L', 'PNG', (76, 76, 76)),
        ('CMYK', 'TIFF', (255, 0, 0)),
        ('I;16', 'PNG', (153, 153, 153)),
        ('LA', 'PNG', (76, 76, 76)),
        ('1', 'PNG', None),
    ],
)
def test_other_modes_in_shards(benchmark, mode, kind, expected):
    tar(benchmark / 'test' / '3.tar', {'x.png': encoded(picture(mode), kind), 'x.cls': b'0'})
    image = evaluation.class_set(str(benchmark)).item(3)[0]
    assert image.mode == 'RGB'
    assert expected is None or max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), expected)) <= 2


def test_own_class_names_and_templates(benchmark, tmp_path):
    (tmp_path / 'names.txt').write_text('x\ny\nz\n')
    (tmp_path / 't.txt').write_text('{c}!\n')
    images = evaluation.class_set(
        str(benchmark), classnames=str(tmp_path / 'names.txt'), templates=str(tmp_path / 't.txt')
    )
    assert images.classes == ['x', 'y', 'z'] and images.templates == ['{c}!']
    assert len(evaluation.class_set(str(benchmark), templates='imagenet').templates) == 80
    with pytest.raises(SystemExit, match='--templates'):
        evaluation.class_set(str(benchmark), templates=str(tmp_path / 'no.txt'))


def test_templates_are_those_of_openai():
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    theirs = {t('{c}') for t in OPENAI_IMAGENET_TEMPLATES}
    assert set(evaluation.TEMPLATES['imagenet']) == theirs and len(evaluation.TEMPLATES['imagenet']) == 80
    assert len(set(evaluation.TEMPLATES['cifar'])) == 18 and set(evaluation.TEMPLATES['DTD']) == {
        f'a photo of {a} {{c}} {n}.' for a in ('a', 'the') for n in ('texture', 'pattern', 'thing', 'object')
    }
    assert all(t.count('{c}') == 1 for templates in evaluation.TEMPLATES.values() for t in templates)


def test_a_folder_for_each_class(tmp_path):
    for i, name in enumerate(['n01', 'n02']):
        for split, count in (('test', 2 + i), ('train', 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for j in range(count):
                picture(colour=(0, 100 * i, 0)).save(tmp_path / split / name / f'{j}.png')
    with pytest.raises(SystemExit, match='no class names'):
        evaluation.class_set(str(tmp_path))
    (tmp_path / 'classnames.txt').write_text('tench\ngoldfish\n')
    images = evaluation.class_set(str(tmp_path))
    assert images.n == 5 and [images.item(i)[1] for i in range(5)] == [0, 0, 1, 1, 1]
    assert images.item(4)[0].getpixel((0, 0)) == (0, 100, 0)
    assert len(images.templates) == 80 and evaluation.class_set(str(tmp_path), 'train').n == 2
    (tmp_path / 'classnames.txt').write_text('tench\n')
    with pytest.raises(SystemExit, match='1 lines; .* has 2 folders'):
        evaluation.class_set(str(tmp_path))


def test_torchvision_by_name(tmp_path):
    """EuroSAT's files, as torchvision lays them out."""
    for name in ('AnnualCrop', 'River'):
        (tmp_path / 'eurosat' / '2750' / name).mkdir(parents=True)
        picture('L').save(tmp_path / 'eurosat' / '2750' / name / f'{name}_1.jpg')
    images = evaluation.class_set('EuroSAT', root=str(tmp_path))
    assert images.classes == ['annual crop', 'river'] and images.n == 2 and images.item(1)[1] == 1
    assert images.item(1)[0].mode == 'RGB'
    assert images.templates[1] == 'a centered satellite photo of a {c}.' and 'all of it' in images.note
    (tmp_path / 'eurosat' / '2750' / 'River' / 'River_1.jpg').write_bytes(b'no image')
    with pytest.raises(SystemExit, match="image 1 of torchvision's EuroSAT"):
        evaluation.class_set('EuroSAT', root=str(tmp_path)).item(1)


@pytest.mark.parametrize(
    'name, message',
    [
        ('CIFAR10', r'--download fetches it'),
        ('cifar10', 'upper and lower case'),
        ('FakeData', 'no class names for it'),
        ('STL10', '--split dev'),
        ('ImageNet', 'ILSVRC2012'),
    ],
)
def test_torchvision_that_cannot(tmp_path, name, message):
    with pytest.raises(SystemExit, match=message):
        evaluation.class_set(
            name, 'dev' if name == 'STL10' else 'val' if name == 'ImageNet' else 'test', root=str(tmp_path)
        )


def test_easyvqa_and_captions_as_classes(tmp_path):
    rows = [{'file_name': f'{i}.png', 'text': f'photo number {i}'} for i in range(6)]
    for row in rows:
        picture().save(tmp_path / row['file_name'])
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    images = evaluation.class_set('easyvqa', 'test')
    assert images.n == 888 and len(images.classes) == 24 and images.templates == ['a {c}']
    pairs = data.load_pairs('easyvqa', 'test')
    assert all(f'a {images.classes[images.item(i)[1]]}' == pairs.captions[i] for i in range(20))
    folder = evaluation.class_set(str(tmp_path), 'train')
    assert folder.n == 6 and folder.templates == ['{c}']
    assert folder.classes[folder.item(2)[1]] == data.load_pairs(str(tmp_path)).captions[2]


def test_captions_of_an_image_stay_together(tmp_path):
    tar(
        tmp_path / 'test' / '0.tar',
        {
            'a.jpg': encoded(picture(), 'JPEG'),
            'a.txt': 'one\ntwo \n\n'.encode(),
            'b.jpg': encoded(picture(), 'JPEG'),
            'b.txt': b'three',
        },
    )
    captions, image = evaluation.caption_set(str(tmp_path))
    assert captions == [['one', 'two'], ['three']] and image(1).size == (20, 16)
    tar(tmp_path / 'test' / '1.tar', {'c.jpg': b'', 'c.txt': b' \n'})
    with pytest.raises(SystemExit, match=re.escape('c.txt holds no caption')):
        evaluation.caption_set(str(tmp_path))
