"""The sets that only eval.py reads: class sets in every layout, their templates, captions of an image."""

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
import torchvision
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


def test_shards_for_training_are_classified_by_their_captions(benchmark):
    """.txt in place of .cls, the longest class name in it; other images and classes as they are."""
    text = {'a.png': encoded(picture()), 'a.txt': b'a photo of a Hot Dog.'}
    tar(benchmark / 'val' / '0.tar', text)
    assert evaluation.class_set(str(benchmark), 'val').item(0)[1] == 2


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
        (lambda d: (d / 'classnames.txt').write_text(''), '1 class names for it; 2 at least'),
        (
            lambda d: (d / 'classnames.txt').write_bytes(b'caf\xe9\ndog\n'),
            'classnames.txt: UnicodeDecodeError',
        ),
        (lambda d: (d / 'test' / 'nshards.txt').write_bytes(b'\xe9'), 'nshards.txt: UnicodeDecodeError'),
        (
            lambda d: (d / 'zeroshot_classification_templates.txt').write_text('a photo of a {}.'),
            r'has no \{c\}',
        ),
        (lambda d: (d / 'test' / '3.tar').unlink(), 'says 12 shards; there are 11'),
        (lambda d: (d / 'test' / '3.tar').write_bytes(b'x' * 2000), '3.tar'),
        (lambda d: (d / 'test' / '3.tar').write_bytes((d / 'test' / '3.tar').read_bytes()[:600]), '3.tar'),
        (
            lambda d: tar(d / 'test' / '3.tar', {'a.png': encoded(picture()), 'a.txt': b''}),
            '3.tar/a: has png, txt, but no cls',
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
    with pytest.raises((SystemExit, data.BadSample), match=message):
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
    (tmp_path / 'ten.txt').write_text('tench\n' * 10)
    for names, message in (
        ('', '1 lines; .* has 2 classes'),
        (str(tmp_path / 'ten.txt'), '10 lines; .* 2 classes'),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluation.class_set(str(tmp_path), classnames=names)
    with pytest.raises(SystemExit, match='--split val: .* has train, test'):
        evaluation.class_set(str(tmp_path), 'val', classnames=str(tmp_path / 'ten.txt'))
    (tmp_path / 'flat.txt').write_text('a\nb\n')  # a class may be called train
    (tmp_path / 'test' / 'n01').rename(tmp_path / 'test' / 'train')
    flat = evaluation.class_set(str(tmp_path / 'test'), classnames=str(tmp_path / 'flat.txt'))
    assert flat.n == 5 and flat.split == ''


def test_folders_in_the_order_of_their_numbers_and_which_files_count(tmp_path):
    for i in range(12):  # ImageNetV2's folders
        (tmp_path / 'test' / str(i)).mkdir(parents=True)
        picture(colour=(20 * i, 0, 0)).save(tmp_path / 'test' / str(i) / 'x.png')
    for hidden in ('.ipynb_checkpoints/x.png', '0/.ipynb_checkpoints/x.png', '0/._x.png'):
        (tmp_path / 'test' / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / 'test' / hidden).write_bytes(b'')
    for ending in ('gif', 'bmp', 'TIF', 'jfif', 'jpeg', 'webp'):
        kind = {'TIF': 'TIFF', 'jfif': 'JPEG'}.get(ending, ending)
        picture().save(tmp_path / 'test' / '3' / f'y.{ending}', kind)
    (tmp_path / 'test' / '3' / 'notes.txt').write_text('')
    (tmp_path / 'classnames.txt').write_text(''.join(f'name {i}\n' for i in range(12)))
    images = evaluation.class_set(str(tmp_path))
    found = [images.item(i) for i in range(images.n)]
    assert [label for _, label in found] == [0, 1, 2, *[3] * 7, *range(4, 12)]
    assert all(x.getpixel((0, 0))[0] == 20 * y for x, y in found if y != 3)
    assert 'without 1 files that are no images' in images.note


def test_folders_with_names_are_those_of_torchvision(tmp_path):
    for name in ('b', 'a10', 'a9', 'B', 'a/deep'):
        (tmp_path / name).mkdir(parents=True)
        for file in ('2.png', '10.PNG', '1.jpg'):
            picture().save(tmp_path / name / file)
    theirs = torchvision.datasets.ImageFolder(tmp_path)
    (tmp_path / 'classnames.txt').write_text('\n'.join(theirs.classes))
    images = evaluation.class_set(str(tmp_path))
    assert [images.item(i)[1] for i in range(images.n)] == theirs.targets


def digest(texts):
    return hashlib.blake2b('\n'.join(texts).encode(), digest_size=6).hexdigest()


def made_up(monkeypatch, name, **members):
    """A set of torchvision, without its files: an image of class 0."""
    members |= {'__init__': lambda self, root: None, '__len__': lambda self: 1}
    members['__getitem__'] = lambda self, i: (picture(), 0)
    monkeypatch.setattr(torchvision.datasets, name, type(name, (), members))


CALTECH = """Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular
    bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier
    cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly
    electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone
    grand_piano hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp
    laptop llama lobster lotus mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda
    pigeon pizza platypus pyramid revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy
    soccer_ball stapler starfish stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch
    water_lilly wheelchair wild_cat windsor_chair wrench yin_yang"""


@pytest.mark.parametrize(
    'name, templates, names, members',  # digests of what clip-benchmark 1.6.2 has in datasets/en_*.json
    [
        (
            'Caltech101',
            '1272c3f44599',
            '018496f506a5',
            {'categories': CALTECH.split()},
        ),  # less its background
        ('Country211', 'bedc0776a4ae', '406d3e51c10a', {'classes': [f'{i}' for i in range(211)]}),
        ('EuroSAT', '2dc79808e13a', '4698bc3a1fc1', {'classes': ['AnnualCrop'] * 10}),
        ('Flowers102', '1df8ec7f9af2', 'cbc9028bce33', {'classes': torchvision.datasets.Flowers102.classes}),
        ('GTSRB', 'ddeac1760669', '0eeb7465fb99', {}),
        ('MNIST', '49520e5db901', '027f80482612', {'classes': torchvision.datasets.MNIST.classes}),
        ('PCAM', '557b15ddb361', '0514136325f7', {}),
        ('SVHN', 'e9fc3549afa6', 'f66fc1a2da59', {}),
        # theirs are in the order of folders, torchvision's in that of Kaggle's numbers
        (
            'FER2013',
            'abfb3a9a9223',
            digest('angry disgusted fearful happy sad surprised neutral'.split()),
            {},
        ),
        # those that it takes from torchvision: with spaces for _ (and /), but for CIFAR-100
        ('CIFAR10', '0f7f884d2807', digest(['airplane', 'car']), {'classes': ['airplane', 'car']}),
        (
            'CIFAR100',
            '0f7f884d2807',
            digest(['apple', 'aquarium_fish']),
            {'classes': ['apple', 'aquarium_fish']},
        ),
        ('DTD', '0ab6dd885be0', digest(['banded', 'polka-dotted']), {'classes': ['banded', 'polka-dotted']}),
        ('FGVCAircraft', '5be5a58f343d', digest(['F/A-18', 'A340-200']), {'classes': ['F/A-18', 'A340-200']}),
        ('Food101', 'b02fdcfeb902', digest(['apple pie', 'waffles']), {'classes': ['apple_pie', 'waffles']}),
        ('OxfordIIITPet', '2453983e3ef2', digest(['Pug', 'Shiba Inu']), {'classes': ['Pug', 'Shiba Inu']}),
        (
            'RenderedSST2',
            '109cf7a31bef',
            digest(['negative', 'positive']),
            {'classes': ['negative', 'positive']},
        ),
        ('STL10', '22e2f655e0db', digest(['airplane', 'bird']), {'classes': ['airplane', 'bird']}),
        ('SUN397', '22e2f655e0db', digest(['abbey', 'apse indoor']), {'classes': ['abbey', 'apse/indoor']}),
        ('StanfordCars', '492631ee2544', digest(['Ram C/V 2012', 'x']), {'classes': ['Ram C/V 2012', 'x']}),
    ],
)
def test_names_and_templates_are_those_of_clip_benchmark(monkeypatch, name, templates, names, members):
    made_up(monkeypatch, name, **members)
    images = evaluation.class_set(name)
    assert (digest(sorted(images.templates)), digest(images.classes)) == (templates, names)
    assert "class names: CLIP_benchmark; templates: CLIP_benchmark's for " in images.note
    assert repr(images.templates[0].replace('{c}', images.classes[0])) in images.note


def test_names_of_other_sets_are_those_of_torchvision(monkeypatch):
    made_up(
        monkeypatch, 'ImageNet', classes=[('great white shark', 'white shark'), ('crane',), ('crane', 'x')]
    )
    images = evaluation.class_set('ImageNet')
    assert images.classes == ['great white shark', 'crane', 'crane']
    assert (
        "names: torchvision; templates: CLIP_benchmark's for imagenet, as 'a bad photo of a great"
        in images.note
    )
    assert "equal names, of which the first wins: ['crane']" in images.note
    assert digest(sorted(images.templates)) == 'b34b3b0094e1'
    made_up(monkeypatch, 'Country211', classes=['AD', 'AE'])
    with pytest.raises(SystemExit, match='2 classes in --root x, of 211'):
        evaluation.class_set('Country211', root='x')


def test_torchvision_by_name(tmp_path):
    """EuroSAT's files, as torchvision lays them out."""
    crops = 'AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop'
    for name in f'{crops} Residential River SeaLake'.split():
        (tmp_path / 'eurosat' / '2750' / name).mkdir(parents=True)
        picture('L').save(tmp_path / 'eurosat' / '2750' / name / f'{name}_1.jpg')
    images = evaluation.class_set('EuroSAT', root=str(tmp_path))
    assert images.classes[0] == 'annual crop land' and images.n == 10 and images.item(8)[1] == 8
    assert images.item(1)[0].mode == 'RGB' and images.split == ''  # it is not divided
    (tmp_path / 'eurosat' / '2750' / 'River' / 'River_1.jpg').write_bytes(b'no image')
    with pytest.raises(SystemExit, match="image 8 of torchvision's EuroSAT"):
        evaluation.class_set('EuroSAT', root=str(tmp_path)).item(8)


@pytest.mark.parametrize('name', ['CIFAR10', 'MNIST'])
def test_splits_that_torchvision_does_not_have(name):
    with pytest.raises(SystemExit, match=f'--split val: {name} has train and test'):
        evaluation.class_set(name, 'val')


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


def test_names_for_captions_are_as_many(tmp_path):
    (tmp_path / 'names.txt').write_text('a\nb\n')
    with pytest.raises(SystemExit, match='names.txt has 2 lines; easyvqa .* has 24 classes'):
        evaluation.class_set('easyvqa', classnames=str(tmp_path / 'names.txt'))
    for read in (evaluation.class_set, evaluation.vqa_set, evaluation.pope_set, evaluation.reference_set):
        with pytest.raises(SystemExit, match='--split foo: easyvqa has train, val and test'):
            read('easyvqa', 'foo')


def test_equal_and_empty_names(benchmark):
    """ImageNet's published list has two of them twice, CLEVR's has an empty one."""
    (benchmark / 'classnames.txt').write_text('missile\n\nmissile\n\n')
    images = evaluation.class_set(str(benchmark))
    assert images.classes == ['missile', '', 'missile'] and images.item(2)[1] == 2
    assert "of which the first wins: ['missile', '']" in images.note
    z = torch.tensor([[5.0, 1.0, 5.0]] * 2)  # equal texts have equal logits: as argmax has it
    assert evaluation.ranks(lambda x, rows: z[rows], torch.zeros(2, 1), torch.tensor([0, 2]), 8) == [0, 1]


def test_a_byte_order_mark_is_no_part_of_a_name(benchmark):
    for file in ('classnames.txt', 'zeroshot_classification_templates.txt', 'test/nshards.txt'):
        (benchmark / file).write_bytes(b'\xef\xbb\xbf' + (benchmark / file).read_bytes())
    images = evaluation.class_set(str(benchmark))
    assert images.classes[0] == 'cat' and images.templates[0] == 'a photo of a {c}.'


def test_tars_of_other_systems(tmp_path):
    """macOS' ._NAME are skipped, endings in capitals are read, as webdataset does."""
    webdataset = pytest.importorskip('webdataset')
    files = {
        f's{i}.{ending}': content
        for i in range(2)
        for ending, content in (('JPG', encoded(picture(), 'JPEG')), ('Cls', b'%d' % i))
    }
    resource = {f'._{name}': b'\0\5\26\7' for name in files}
    tar(tmp_path / 'test' / '0.tar', {'README': b'', **resource, **files})
    (tmp_path / 'classnames.txt').write_text('a\nb\n')
    images = evaluation.class_set(str(tmp_path))
    theirs = webdataset.WebDataset([str(tmp_path / 'test' / '0.tar')], shardshuffle=False).decode('pil')
    labels = [label for _, label in theirs.to_tuple('jpg', 'cls')]
    assert [images.item(i)[1] for i in range(images.n)] == labels == [0, 1]


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
    n, captions, image = evaluation.caption_set(str(tmp_path))
    assert list(map(captions, range(n))) == [['one', 'two'], ['three']] and image(1).size == (20, 16)
    tar(tmp_path / 'test' / '1.tar', {'c.jpg': b'', 'c.txt': b' \n'})
    with pytest.raises(data.BadSample, match=re.escape('c.txt holds no caption')):
        evaluation.caption_set(str(tmp_path))[1](2)
    tar(tmp_path / 'test' / '1.tar', {'c.jpg': b'', 'c.txt': 'café'.encode('latin-1')})
    with pytest.raises(data.BadSample, match=r'1\.tar/c\.txt: UnicodeDecodeError'):
        evaluation.caption_set(str(tmp_path))[1](2)
    with pytest.raises(SystemExit, match='--split val: .* has test'):
        evaluation.caption_set(str(tmp_path), 'val')
