"""Tar shards: their index, the order, what is bad in them, and what webdataset reads of the same files."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, execute, flags, torchrun
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import clip_adv
import data
import eval as evaluation

SCRIPT = ROOT / 'clip_adv.py'


def jpeg(i=0, size=(24, 20)) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, 2).save(file, 'JPEG')
    return file.getvalue()


def tar(path, files, **how):
    """files: {name: content} or [(name, content)]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', **how) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def good(n, first=0):
    return {
        f'{i:05}.{e}': c
        for i in range(first, first + n)
        for e, c in (('jpg', jpeg(i)), ('txt', f'photo {i}'.encode()))
    }


def shards(folder, sizes):
    first = np.cumsum([0, *sizes]).tolist()
    for i, n in enumerate(sizes):
        tar(folder / f'{i:02}.tar', good(n, first[i]))
    return f'{folder}/{{00..{len(sizes) - 1:02}}}.tar'


def keys(pairs):
    return [pairs.members(i)[0].rpartition('/')[2] for i in range(len(pairs))]


def dataset(pairs, seed=0):
    return data.PairDataset(pairs, data.train_tokenizer(['photo'], 8, 400), data.Fit(16), seed)


# -------------------------------------------------------------------------------------------------- the order
SIZES = [7, 1, 12, 3, 5, 9, 4, 6, 2, 8]


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(data, 'WINDOW', 3)


def stream(batch, steps, world, seed=0):
    """Whatever the ranks get, put together: [step][(row, number)]"""
    ranks = [list(data.order(SIZES, batch, steps, seed, r, world)) for r in range(world)]
    return [sum(parts, []) for parts in zip(*ranks, strict=True)]


def test_every_sample_once_in_each_epoch_on_any_number_of_ranks(narrow):
    n, steps = sum(SIZES), 40
    whole = stream(12, range(steps), 1)
    for world in (2, 3, 4):
        assert stream(12, range(steps), world) == whole
    flat = sum(whole, [])
    assert [number for _, number in flat] == list(range(12 * steps))
    epochs = [[row for row, _ in flat[e * n :][:n]] for e in range(12 * steps // n)]
    assert len(epochs) == 8 and all(sorted(rows) == list(range(n)) for rows in epochs)
    assert len(set(map(tuple, epochs))) == 8 and sum(stream(12, range(steps), 1, seed=1), []) != flat


def test_stopped_on_two_and_continued_on_one_and_three(narrow):
    whole = stream(12, range(40), 1)
    parts = [stream(12, range(first, end), w) for first, end, w in ((0, 7, 2), (7, 8, 1), (8, 40, 3))]
    assert sum(parts, []) == whole


def test_a_window_is_of_a_few_shards_and_mixes_them(narrow):
    ends, n = np.cumsum(SIZES), sum(SIZES)
    for epoch in range(5):
        rows = [row for (row, _), in data.order(SIZES, 1, range(epoch * n, (epoch + 1) * n), 3, 0, 1)]
        of = np.searchsorted(ends, rows, 'right')
        met = list(dict.fromkeys(of.tolist()))
        for window in range(0, 10, 3):
            before, those = (sum(SIZES[i] for i in met[a:b]) for a, b in ((0, window), (window, window + 3)))
            at = np.flatnonzero(np.isin(of, met[window : window + 3]))
            assert np.array_equal(at, np.arange(before, before + those))
        first = of[: sum(SIZES[i] for i in met[:3])].tolist()
        assert set(first) == set(met[:3]) and first != sorted(first, key=met.index)


def test_one_shard_has_the_order_that_a_list_has():
    """That of the logs that are kept: an epoch is torch.randperm of (seed, 'epoch', epoch)."""
    for sizes in (50, [50]):
        rows = [row for step in data.order(sizes, 10, range(12), 5, 0, 1) for row, _ in step]
        perms = [torch.randperm(50, generator=data.generator(5, 'epoch', e)).tolist() for e in range(3)]
        assert rows == sum(perms, [])[:120] and all(type(row) is int for row in rows)


# -------------------------------------------------------------------------------------------------- the index
def test_the_index(tmp_path, capfd):
    pattern = shards(tmp_path / 'd', [3, 1, 4])
    pairs = data.load_pairs(pattern)
    assert len(pairs) == 8 and pairs.sizes.tolist() == [3, 1, 4] and '8 pairs in 3 of 3 shards' in pairs.note
    assert keys(pairs) == [f'{i:05}' for i in range(8)]
    assert (tmp_path / 'd' / '02.tar.idx').stat().st_size == 32 + 4 * 8
    assert 'index' in capfd.readouterr().err
    before = (tmp_path / 'd' / '02.tar.idx').stat().st_mtime_ns
    again = data.load_pairs(f'{tmp_path}/d/*.tar')
    assert keys(again) == keys(pairs) and 'index' not in capfd.readouterr().err
    assert (tmp_path / 'd' / '02.tar.idx').stat().st_mtime_ns == before
    assert again.fingerprint() == pairs.fingerprint()
    tar(tmp_path / 'd' / '02.tar', good(4, 100))  # the same size, another time
    os.utime(tmp_path / 'd' / '02.tar', ns=(1, 1))
    changed = data.load_pairs(pattern)
    assert keys(changed) == [f'{i:05}' for i in (0, 1, 2, 3, 100, 101, 102, 103)]
    (tmp_path / 'd' / '01.tar.idx').write_bytes(b'torn')
    tar(tmp_path / 'd' / '02.tar', good(2))
    shorter = data.load_pairs(pattern)
    assert shorter.sizes.tolist() == [3, 1, 2] and shorter.fingerprint() != pairs.fingerprint()
    assert sorted(f.name for f in (tmp_path / 'd').iterdir() if f.suffix != '.tar') == [
        f'0{i}.tar.idx' for i in range(3)
    ]


def test_index_dir(tmp_path):
    """Of two folders whose shards have one name; nothing is written beside the shards."""
    for folder, first in (('a', 0), ('b', 50)):
        tar(tmp_path / folder / '0.tar', good(2, first))
    for _ in range(2):
        pairs = data.load_pairs(f'{tmp_path}/{{a,b}}/0.tar', index_dir=str(tmp_path / 'index' / 'here'))
        assert keys(pairs) == ['00000', '00001', '00050', '00051']
    assert [f.name for f in (tmp_path / 'a').iterdir()] == ['0.tar']
    assert len(list((tmp_path / 'index' / 'here').iterdir())) == 2


def test_where_no_index_can_be_written(tmp_path, monkeypatch):
    pattern = shards(tmp_path, [2, 3])
    monkeypatch.setattr(os, 'access', lambda *_: False)
    with pytest.raises(SystemExit, match='no index can be written there: give --index_dir'):
        data.load_pairs(pattern)
    assert not list(tmp_path.glob('*.idx'))
    found = evaluation.caption_set(pattern, index_dir=str(tmp_path / 'index'))
    assert found[0] == 5 and found[1](4) == ['photo 4']


def test_two_processes_index_at_once(tmp_path):
    pattern = shards(tmp_path, [40] * 6)
    runs = [
        multiprocessing.get_context('fork').Process(target=data.load_pairs, args=[pattern]) for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 3 and len(data.load_pairs(pattern)) == 240
    assert len(list(tmp_path.iterdir())) == 12  # and nothing half written is left


def test_patterns(tmp_path):
    assert data.shard_files('{8..10}.tar') == ['8.tar', '9.tar', '10.tar']
    assert data.shard_files('a/{008..010}.tar::b.tar') == ['a/008.tar', 'a/009.tar', 'a/010.tar', 'b.tar']
    assert data.shard_files('{a,b}{0..1}.tar') == ['a0.tar', 'a1.tar', 'b0.tar', 'b1.tar']
    assert data.shard_files('{a/{0..1},b}.tar') == ['a/0.tar', 'b.tar', 'a/1.tar']
    for i in (1, 9, 10):
        tar(tmp_path / f'{i}.tar', good(1))
    assert [Path(f).name for f in data.shard_files(f'{tmp_path}/*.tar')] == ['1.tar', '9.tar', '10.tar']
    for wrong, message in (
        ('*.tar', 'no such file'),
        ('{a..3}.tar', 'two numbers'),
        ('0.tar', '0.tar: .*No such'),
    ):
        with pytest.raises(SystemExit, match=message):
            data.load_pairs(f'{tmp_path}/x/{wrong}')
    with pytest.raises(SystemExit, match='--holdout a: not with shards'):
        data.load_pairs(f'{tmp_path}/1.tar', holdout='a')


# ------------------------------------------------------------------------------------------------ the content
def test_webdataset_reads_the_same(tmp_path):
    """Long names in both formats, folders with dots, endings of several parts, capitals, other members."""
    webdataset = pytest.importorskip('webdataset')
    long = 'x' * 120
    for i, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)):
        files = good(5, 10 * i)
        if form != tarfile.USTAR_FORMAT:
            files |= {f'd.{i}/{long}/é.JPG': jpeg(7), f'd.{i}/{long}/é.txt': b'long'}
        files |= {
            './v1.2/b.seg.png': b'x',
            './v1.2/b.jpeg': jpeg(8),
            './v1.2/b.txt': b'b',
            'README': b'r' * 700,
        }
        files |= {
            './v1.2/c.webp': jpeg(9),
            './v1.2/c.json': b'{"text": "c"}',
            f'z{i}.jpg': b'',
            f'z{i}.txt': b'z',
        }
        tar(tmp_path / f'{i}.tar', files, format=form)
    pairs = data.load_pairs(f'{tmp_path}/{{0..2}}.tar')
    theirs = webdataset.WebDataset([f'{tmp_path}/{i}.tar' for i in range(3)], shardshuffle=False)
    for i, sample in enumerate(theirs):
        name, found = pairs.members(i)
        assert name == f'{sample["__url__"]}/{sample["__key__"]}'
        assert found == {k: v for k, v in sample.items() if k[0] != '_'}
    assert i + 1 == len(pairs) == 5 * 3 + 2 + 3 * 3
    assert pairs.read(pairs.ends[0] - 2, 0, 0, 0)[1] == 'c'  # of the json


def test_weighted_captions(tmp_path):
    def sample(i, **texts):
        return {f'{i}.jpg': jpeg(), f'{i}.json': json.dumps(texts).encode()}

    tar(
        tmp_path / '0.tar',
        {**sample(0, alt='b'), '0.txt': b'a', **sample(1, alt=' '), '1.txt': b'a', **sample(2)},
    )
    pairs = data.load_pairs(f'{tmp_path}/0.tar', caption_key='txt:0.2,alt:0.6,none:0.2')
    sample = pairs.members(0)
    drawn = [pairs.caption(*sample, 3, number) for number in range(2000)]
    # 'none' is nowhere: the first of the others
    assert Counter(drawn)['b'] / 2000 == pytest.approx(0.6, abs=0.04) and set(drawn) == {'a', 'b'}
    assert drawn == [pairs.caption(*sample, 3, number) for number in range(2000)]
    assert drawn != [pairs.caption(*sample, 4, number) for number in range(2000)]
    assert {pairs.read(1, 0, 0, number)[1] for number in range(40)} == {
        'a'
    }  # an empty one is as good as none
    with pytest.raises(data.BadSample, match='no caption'):
        pairs.read(2, 0, 0, 0)
    assert data.load_pairs(f'{tmp_path}/0.tar', caption_key='alt').read(0, 0, 0, 0)[1] == 'b'
    for key in ('', 'a:0.5,b:x', 'a:0,b:1', 'a:-1,b:1', 'a:inf', 'a,,b'):
        with pytest.raises(SystemExit, match='--caption_key'):
            data.load_pairs(f'{tmp_path}/0.tar', caption_key=key)


def test_draft_changes_few_pixels(tmp_path):
    """A photo 8 times as large as needed is decoded at a quarter; nearly the same comes out."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 512), 3)
    photo.save(tmp_path / 'a.jpg', quality=90)
    (tmp_path / 'metadata.jsonl').write_text('{"file_name": "a.jpg", "text": "a"}')
    pairs = data.load_pairs(str(tmp_path))
    whole, small = (pairs.read(0, side, 0, 0)[0] for side in (0, dataset(pairs).side * 4))
    assert whole.size == (640, 512) and small.size == (320, 256)
    assert pairs.read(0, 257, 0, 0)[0].size == (640, 512)  # at least as long as asked for
    a, b = (data.Fit(64)(image).int() for image in (whole, small))
    assert (a - b).abs().float().mean() < 2 and not torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------- rubbish
APPLE = b'\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ' + bytes(140)


def rubbish(folder):
    """Two shards as they are found: between any two bad samples there is a good one."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(file, 'JPEG')
    bad = {
        'the image cannot be decoded': {'x0.jpg': file.getvalue()[:3000], 'x0.txt': b'cut'},
        'the caption is empty': {'x1.jpg': jpeg(), 'x1.txt': b' \r\n'},
        'the caption is not UTF-8': {'x2.jpg': jpeg(), 'x2.txt': 'un café'.encode('latin-1')},
        'no image': {'x3.heic': jpeg(), 'x3.txt': b'wrong ending'},
        'no caption': {'x4.jpg': jpeg(), 'x4.json': b'{"url": "u"}'},
    }
    files = {}
    for i, sample in enumerate(bad.values()):
        files |= good(1, i) | sample
    files |= {'x5.jpg': b'<html>404</html>', 'x5.txt': b'a page'} | good(1, 5)
    with tarfile.open(folder / '0.tar', 'w', format=tarfile.PAX_FORMAT) as archive:  # as macOS' bsdtar does
        for name, content in files.items():
            for prefix, part in (('._', APPLE), ('', content)):
                member = tarfile.TarInfo(prefix + name)
                member.size = len(part)
                member.pax_headers = {'LIBARCHIVE.xattr.com.apple.provenance': 'AQIAAA', 'mtime': '1.5'}
                archive.addfile(member, io.BytesIO(part))
    whole = Path(tar(folder / '1.tar', good(6, 10))).read_bytes()
    with tarfile.open(folder / '1.tar') as archive:
        last = archive.getmember('00015.jpg')
        middle = archive.getmember('00012.txt')
    cut = bytearray(whole[: last.offset_data + 100])  # a download that broke off
    cut[middle.offset : middle.offset + 100] = os.urandom(100)  # and a header that rotted
    (folder / '1.tar').write_bytes(cut)
    return [*bad, 'the image cannot be decoded', 'no caption', 'the shard is cut off or damaged here']


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize('rotten', ['00000.jpg', '00003.txt', '00008.jpg'])
def test_one_rotten_header_costs_one_sample(tmp_path, format, rotten):
    """Also behind one of PAX, as webdataset's writer puts before each member, for a time with a fraction."""
    with tarfile.open(tmp_path / '0.tar', 'w', format=format) as archive:
        for name, content in good(9).items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5 if format == tarfile.PAX_FORMAT else 1
            archive.addfile(member, io.BytesIO(content))
    content = bytearray((tmp_path / '0.tar').read_bytes())
    with tarfile.open(tmp_path / '0.tar') as archive:
        at = archive.getmember(rotten).offset_data - 512
    content[at : at + 100] = os.urandom(100)
    (tmp_path / '0.tar').write_bytes(content)
    pairs, read = data.load_pairs(f'{tmp_path}/0.tar'), []
    for row in range(len(pairs)):
        with contextlib.suppress(data.BadSample):
            read.append(pairs.read(row, 0, 0, 0)[1])
    assert read == [f'photo {i}' for i in range(9) if i != int(rotten[:5])]


def test_a_tar_that_ends_between_two_members_is_cut_off(tmp_path):
    whole = Path(tar(tmp_path / '0.tar', good(6))).read_bytes()
    with tarfile.open(tmp_path / '0.tar') as archive:
        ends = [archive.getmember(name).offset for name in ('00003.jpg', '00003.txt')]
    for end, samples in zip(ends, (3, 4)):
        (tmp_path / '0.tar').write_bytes(whole[:end])
        with pytest.raises(SystemExit, match=r'0\.tar: it is cut off'):
            data.load_pairs(f'{tmp_path}/0.tar')
        pairs = data.load_pairs(f'{tmp_path}/0.tar', max_bad=0.01)
        assert len(pairs) == samples and 'it is cut off' in pairs.note


def test_a_strip_is_a_bad_sample(tmp_path):
    """Resized to a short side of 336 px, an image of 60 × 1 would be one of 20,160."""
    files = {'a.jpg': jpeg(0, (50, 1)), 'a.txt': b'a', 'b.jpg': jpeg(0, (1, 51)), 'b.txt': b'b'}
    tar(tmp_path / '0.tar', files)
    pairs = data.load_pairs(f'{tmp_path}/0.tar')
    assert pairs.read(0, 0, 0, 0)[0].size == (50, 1)
    with pytest.raises(data.BadSample, match='the image is a strip.*b: 1 × 51 pixels'):
        pairs.read(1, 0, 0, 0)


def test_bad_samples_and_their_good_neighbours(tmp_path, capsys):
    kinds = rubbish(tmp_path)
    (tmp_path / '2.tar').write_bytes(os.urandom(5000))  # garbage, and one that is missing
    with pytest.raises(
        SystemExit,
        match=r'(?s)3 of 4 shards cannot be read as a whole .--max_bad 0.49.:\n.*3\.tar: .*No such file',
    ):
        data.load_pairs(f'{tmp_path}/{{0..3}}.tar', max_bad=0.49)
    with pytest.raises(SystemExit, match=r'1 of 1 shards cannot be read as a whole .--max_bad 1.:\n.*2\.tar'):
        data.load_pairs(f'{tmp_path}/2.tar', max_bad=1)
    pairs = data.load_pairs(f'{tmp_path}/{{0..3}}.tar', max_bad=0.5)
    assert '1.tar: it is cut off' in pairs.note and len(pairs.files) == 2
    found, read = [], []
    for row in range(len(pairs)):
        try:
            read.append(pairs.read(row, 0, 0, 0)[1])
        except data.BadSample as e:
            found.append(e.args[0])
            assert re.search(r'[01]\.tar/(x\d|0001[25])', e.args[1])
    assert found == kinds
    assert read == [f'photo {i}' for i in (*range(6), 10, 11, 13, 14)]  # every good one
    # in training another one stands in for a bad one: the same, whoever reads it and when
    samples = dataset(pairs)
    items = [samples[row, number] for number, row in enumerate(range(len(pairs)))]
    again = [samples[row, number] for number, row in enumerate(range(len(pairs)))]
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(items, again)
    )
    first = [bad[0][1] for *_, bad in items if bad]
    assert first == kinds and all(image.any() for image, *_ in items)
    with pytest.raises(SystemExit, match=r'1\.tar: it is cut off'):  # measuring is strict
        evaluation.tars_in(f'{tmp_path}/{{0..1}}.tar')
    with pytest.raises(data.BadSample, match=r'0\.tar/x1\.txt holds no caption'):
        list(map(evaluation.caption_set(f'{tmp_path}/0.tar')[1], range(9)))


def test_workers_report_and_change_nothing(tmp_path):
    rubbish(tmp_path)
    pairs = data.load_pairs(f'{tmp_path}/{{0..1}}.tar', max_bad=1)
    samples = dataset(pairs)
    one, two = (list(data.loader(samples, data.order(pairs.sizes, 6, range(5), 0, 0, 1), w)) for w in (0, 2))
    assert sum(len(batch.bad) for batch in one) > 5
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens) and a.bad == b.bad


def test_a_shard_that_cannot_be_read_any_more(tmp_path):
    """Gone, or shorter than it was: its samples keep their places, and the others theirs."""
    pattern = shards(tmp_path, [4, 4, 4])
    before = data.load_pairs(pattern)
    (tmp_path / '01.tar').unlink()
    after = data.load_pairs(pattern)
    assert after.fingerprint() == before.fingerprint() and len(after) == 12
    kinds = [dataset(after)[row, 0][2] for row in range(12)]
    assert [bool(k) for k in kinds] == [False] * 4 + [True] * 4 + [False] * 4
    assert all(k[0][1] == 'the shard cannot be read' and '01.tar' in k[0][2] for k in kinds[4:8])
    content = (tmp_path / '02.tar').read_bytes()
    opened = data.load_pairs(pattern)
    os.truncate(tmp_path / '02.tar', len(content) // 3)
    cut = [bool(dataset(opened)[row, 0][2]) for row in range(8, 12)]
    assert cut[-1] and not cut[0]


def train(**settings):
    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**{**TINY, **settings})))


def test_training_counts_bad_samples_and_stops_at_too_many(tmp_path, capsys):
    files = good(60)
    for i in range(0, 60, 6):
        files[f'{i:05}.txt'] = b''
    tar(tmp_path / '0.tar', files)
    train(data=f'{tmp_path}/0.tar', out=tmp_path / 'a', batch_size=60, steps=2, max_bad=0.01, eps=0)
    printed = capsys.readouterr()
    assert printed.err.count('the caption is empty: ') == 10 and re.search(
        r'0\.tar/000\d\d\.txt', printed.err
    )
    assert re.search(r'bad samples beside 120 good ones .*\d\d × the caption is empty', printed.out)
    with pytest.raises(
        SystemExit, match=r'more than --max_bad 0\.1: \d+ bad .* 1020 good.*after update 16 is kept'
    ):
        train(data=f'{tmp_path}/0.tar', out=tmp_path / 'b', batch_size=60, steps=30, max_bad=0.1, eps=0)
    with pytest.raises(
        SystemExit, match='no caption in any of 60 samples: .*00000: has jpg, txt, but no text alt'
    ):
        train(data=f'{tmp_path}/0.tar', out=tmp_path / 'c', caption_key='alt')
    for name in files:
        files[name] = b'x' if name.endswith('jpg') else files[name]
    tar(tmp_path / '1.tar', files)
    with pytest.raises(
        SystemExit, match='100 in a row: .* × the image cannot be decoded.*nothing was saved yet'
    ):
        train(data=f'{tmp_path}/1.tar', out=tmp_path / 'd', max_bad=1)


def test_a_shard_that_becomes_unreadable_halfway(tmp_path, monkeypatch, capsys):
    """Its bytes turn into others before update 4, which is the first to need it: the weights are those of a
    run in which they were so from the start."""
    monkeypatch.setattr(data, 'WINDOW', 1)
    pattern = shards(tmp_path, [24, 24])
    last = data.order([24, 24], 8, range(3, 6), 0, 0, 1)
    spoilt = tmp_path / f'0{next(last)[0][0] // 24}.tar'  # that of the second half of the epoch
    tokenizer = data.train_tokenizer([f'photo {i}' for i in range(48)], 8, 400)
    (tmp_path / 'tokenizer.json').write_text(tokenizer.files()['tokenizer.json'])
    settings = dict(data=pattern, tokenizer=tmp_path / 'tokenizer.json', batch_size=8, steps=6, max_bad=1)
    data.load_pairs(pattern)  # the indexes are made
    updates = []

    def spoil(*_):
        updates.append(None)
        if len(updates) == 3:
            stat = spoilt.stat()
            with open(spoilt, 'r+b') as file:
                file.write(b'\xff' * stat.st_size)
            os.utime(spoilt, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    hook = register_optimizer_step_pre_hook(spoil)
    try:
        train(**settings, out=tmp_path / 'halfway')
        of_bad = re.search(r'(\d+) × the shard is cut off or damaged', capsys.readouterr().out)
        assert int(of_bad[1]) >= 24  # and those of it that were drawn in their place
        train(**settings, out=tmp_path / 'always')
    finally:
        hook.remove()
    halfway, always = (weights(tmp_path / name) for name in ('halfway', 'always'))
    assert all(torch.equal(w, always[name]) for name, w in halfway.items())


def test_a_shard_that_was_missing_is_left_out_to_the_end(tmp_path, capsys):
    """Of a run that began without it; else it could not go on once it is back."""
    pattern, lost = shards(tmp_path / 'd', [8, 8, 8]), tmp_path / 'd' / '01.tar'
    lost.rename(tmp_path / 'away')
    settings = dict(data=pattern, batch_size=8, max_bad=0.5, index_dir=tmp_path / 'i', out=tmp_path / 'run')
    train(**settings, steps=2)
    (tmp_path / 'away').rename(lost)
    clip_adv.main(*data.parse(clip_adv.Config, '', ['--resume', '--out', str(tmp_path / 'run')]))
    said = capsys.readouterr().out
    assert '16 pairs in 2 of 3 shards' in said and 'continuing after update 2' in said


def test_a_row_of_bad_samples_goes_over_the_borders_of_batches(tmp_path):
    run = counting(tmp_path, max_bad=1.0)
    for first in (0, 40):
        run.count_bad([(i, 'bad', '') for i in range(first, first + 40)], 40)
    run.count_bad([(i, 'bad', '') for i in range(81, 120)], 40)  # 80 was good
    with pytest.raises(SystemExit, match='100 in a row'):
        run.count_bad([(i, 'bad', '') for i in range(120, 182)], 62)
    of_81 = (tmp_path / 'bad_samples.txt').read_text().splitlines()[80]
    assert of_81 == '81: bad: '


def counting(out, max_bad, pairs=0):
    """A Run as far as it counts."""
    run = data.Run.__new__(data.Run)
    run.cfg, run.rank, run.out, run.pairs = clip_adv.Config(max_bad=max_bad), 0, out, pairs
    run.bad, run.samples, run.row, run.saved_step = Counter(), 0, (-2, 0), 0
    return run


def test_a_lost_shard_counts_as_its_part_of_the_data(tmp_path):
    """And not as its part of the window that it is in, which is a 16th; of other bad samples there may be no
    more than --max_bad among those that were met."""
    lost = data.LOST_SHARD
    for kind, others, goes_on in ((lost, 0, True), ('bad', 0, False), (lost, 20, False)):
        run = counting(tmp_path, max_bad=0.01, pairs=200_000)
        stops = pytest.raises(SystemExit, match='more than --max_bad')
        with contextlib.nullcontext() if goes_on else stops:
            for first in range(0, 3200, 320):  # a shard of 200 in a window of 3,200
                found = [(i, kind, '') for i in range(first, first + 320, 16)]
                run.count_bad(found + [(first + i, 'bad', '') for i in range(1, 1 + others)], 300)
            assert run.bad.total() == 200
    run = counting(tmp_path, max_bad=0.01, pairs=19_000)  # more than 1 % of all
    with pytest.raises(SystemExit, match='191 × the shard cannot be read'):
        run.count_bad([(16 * i, lost, '') for i in range(191)], 3000)


# ------------------------------------------------------------------------------------------------- whole runs
def weights(out):
    return torch.load(out / 'train_state.pt', weights_only=True)['model']


@pytest.mark.slow
def test_runs_stopped_on_two_processes_and_continued_on_one_and_three(tmp_path):
    """From shards with bad samples: the weights as far as summation allows."""
    files = good(30) | {'00003.txt': b'', '00007.jpg': b'x'}
    tar(tmp_path / '0.tar', files), tar(tmp_path / '1.tar', good(20, 30))
    settings = dict(TINY, data=f'{tmp_path}/{{0..1}}.tar', batch_size=12, steps=8, save_every=4, max_bad=0.5)
    settings |= dict(workers=1)
    execute([sys.executable, str(SCRIPT), *flags(**settings, out=tmp_path / 'whole')])
    for file in tmp_path.glob('*.idx'):
        file.unlink()
    execute(torchrun(2, SCRIPT, *flags(**settings, out=tmp_path / 'two')))  # which make the indexes together
    assert len(list(tmp_path.glob('*.idx'))) == 2
    for n in (1, 3):
        out = tmp_path / f'then_{n}'
        shutil.copytree(tmp_path / 'two', out)
        os.replace(out / 'previous_train_state.pt', out / 'train_state.pt')
        command = torchrun(n, SCRIPT, '--resume', '--out', str(out))
        assert 'continuing after update 4' in execute(command)
        whole, then = weights(tmp_path / 'whole'), weights(out)
        square = sum(((w - then[k]) ** 2).sum() for k, w in whole.items())
        assert (square / sum((w**2).sum() for w in whole.values())).sqrt() < 1e-3


# -------------------------------------------------------------------------------------- python data.py shards
def write(*arguments):
    data.main(['shards', *map(str, arguments)])


def test_shards_of_a_folder(tmp_path):
    webdataset = pytest.importorskip('webdataset')
    (tmp_path / 'src').mkdir()
    for i in range(5):
        (tmp_path / 'src' / f'{i}.JPG').write_bytes(jpeg(i))
    Image.new('RGB', (8, 8), 'red').save(tmp_path / 'src' / '5.ppm')
    rows = [{'file_name': f'{i}.{"JPG" if i < 5 else "ppm"}', 'text': f'é {i}'} for i in range(6)]
    (tmp_path / 'src' / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    write(tmp_path / 'src', tmp_path / 'out', '--per_shard', 4)
    assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == ['00000.tar', '00001.tar']
    theirs = {
        sample['txt'].decode(): sample.get('jpg') or sample['png']
        for i in range(2)
        for sample in webdataset.WebDataset(f'{tmp_path}/out/0000{i}.tar', shardshuffle=False)
    }
    assert [theirs.pop(f'é {i}') for i in range(5)] == [jpeg(i) for i in range(5)]
    assert Image.open(io.BytesIO(theirs.pop('é 5'))).getpixel((0, 0)) == (255, 0, 0) and not theirs
    pairs = data.load_pairs(f'{tmp_path}/out/*.tar')
    assert sorted(pairs.texts(100)) == [f'é {i}' for i in range(6)]
    for src, out, message in (('src', 'out', 'out is not empty'), ('none', 'new', 'none: no such folder')):
        with pytest.raises(SystemExit, match=message):
            write(tmp_path / src, tmp_path / out)
    (tmp_path / 'src' / '5.ppm').write_bytes(b'no image')
    for _ in range(2):  # nothing that looks whole is left, and it can be repeated
        with pytest.raises(SystemExit, match=r'^error: cannot decode the image .*5\.ppm'):
            write(tmp_path / 'src', tmp_path / 'new', '--per_shard', 1)
        assert not (tmp_path / 'new').exists()


def test_shards_of_classes(tmp_path):
    """A folder for each class, and back: the zero-shot set is the same."""
    for i in range(6):
        folder = tmp_path / 'src' / 'train' / ('aquarium_fish', 'cat')[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{i}.jpg').write_bytes(jpeg(i))
    write(tmp_path / 'src', tmp_path / 'out' / 'train', '--per_shard', 4)
    images = evaluation.class_set(str(tmp_path / 'out'), 'train')
    same = evaluation.class_set(f'{tmp_path}/out/train/*.tar')
    assert images.n == same.n == 6 and images.classes == same.classes == ['aquarium fish', 'cat']
    labels = {images.item(i)[0].tobytes(): images.item(i)[1] for i in range(6)}
    assert labels == {data.read_image(io.BytesIO(jpeg(i))).tobytes(): i % 2 for i in range(6)}
    texts = set(data.load_pairs(f'{tmp_path}/out/train/*.tar').texts(9))
    assert texts == {'a photo of an aquarium fish', 'a photo of a cat'}


def test_shards_of_torchvision(tmp_path, monkeypatch):
    import torchvision

    class Made(torchvision.datasets.FakeData):
        classes = ['ant', 'bee']

        def __init__(self, root='', train=True):
            super().__init__(5 if train else 3, (3, 9, 9), 2)

    monkeypatch.setattr(torchvision.datasets, 'Made', Made, raising=False)
    write('Made', tmp_path / 'out', '--per_shard', 2)
    assert len(list((tmp_path / 'out').glob('*.tar'))) == 3
    images = evaluation.class_set(str(tmp_path / 'out' / '*.tar'))
    theirs = Made()
    expected = {theirs[i][0].tobytes(): int(theirs[i][1]) for i in range(5)}
    assert {images.item(i)[0].tobytes(): images.item(i)[1] for i in range(5)} == expected
