"""Reading from tar shards, in one process: `python tests/bench_data.py`

Images/s at three sizes, beside what a user would write: webdataset, decoded by PIL, torchvision's
RandomResizedCrop (90–100 % of the area, as here), captions by the same tokenizer. They take turns of 150
samples, of which the first 50 are not timed, as they fill buffers; a second is one of this process on the
CPU, of which other programs take none away. Then 12 million pairs, as 1,200 indexes of 10,000 samples: how
long a start takes (by the clock), what it holds in memory. Photos are made up here: noise of several scales,
about 500 × 400, quality 85.
"""

import contextlib
import io
import itertools
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data

SIZES, TURNS, SAMPLES, BATCH = (84, 112, 224), 7, 150, 50
SHARDS, EACH = 1200, 10_000


def photo(i: int, size=(500, 400), quality=85) -> bytes:
    """Noise of several scales, whose spectrum falls as that of photos; about as many bytes as these have."""
    rng = np.random.default_rng(i)
    w, h = int(size[0] * rng.uniform(0.9, 1.1)), int(size[1] * rng.uniform(0.9, 1.1))
    image = np.zeros((h, w, 3))
    for scale in (4, 8, 16, 32, 64, 128, 256):
        small = rng.normal(0, 60 / scale**0.5 * 2, (max(2, h * scale // 512), max(2, w * scale // 512), 3))
        small = small.mean(-1, keepdims=True) * 0.8 + small * 0.2
        parts = [Image.fromarray(small[..., c].astype(np.float32)).resize((w, h), 3) for c in range(3)]
        image += np.stack([np.asarray(part) for part in parts], -1)
    file = io.BytesIO()
    Image.fromarray((image + 120).clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=quality)
    return file.getvalue()


def write_shard(path: Path, photos: list[bytes], n: int) -> None:
    with tarfile.open(path, 'w') as archive:
        for i in range(n):
            parts = (('jpg', photos[i % len(photos)]), ('txt', f'a made up photo, number {i}'.encode()))
            for ending, content in parts:
                member = tarfile.TarInfo(f'{i:08}.{ending}')
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def ours(files: str, tokenizer, size: int):
    pairs = data.load_pairs(files)
    samples = data.PairDataset(pairs, tokenizer, data.Fit(size), 0)
    order = data.order(pairs.sizes, BATCH, range(SAMPLES // BATCH), 0, 0, 1)
    for batch in data.loader(samples, order):
        yield batch.images


def theirs(files: str, tokenizer, size: int):
    import webdataset
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(size, scale=(0.9, 1.0), antialias=True)
    how = transforms.Compose([lambda image: image.convert('RGB'), crop, transforms.PILToTensor()])
    stream = webdataset.WebDataset(data.shard_files(files), shardshuffle=100, seed=0).shuffle(100)
    stream = stream.decode('pil').to_tuple('jpg', 'txt')
    stream = stream.map_tuple(how, lambda text: tokenizer([text])[0]).batched(BATCH)
    for images, _ in itertools.islice(stream, SAMPLES // BATCH):  # and no batch more
        yield images


def images_per_s(read, *how) -> float:
    n, batches = 0, read(*how)
    next(batches)
    start = time.process_time()
    for images in batches:
        n += len(images)
    return n / (time.process_time() - start)


def spread(values, digits=0) -> str:
    values = sorted(values)
    return f'{statistics.median(values):.{digits}f} ({values[0]:.{digits}f} … {values[-1]:.{digits}f})'


def resident() -> int:
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def speed(folder: Path, photos: list[bytes]) -> None:
    for i in range(4):
        write_shard(folder / f'{i:05}.tar', photos, 500)
    files = f'{folder}/{{00000..00003}}.tar'
    start = time.perf_counter()
    data.load_pairs(files)
    built = 2000 / (time.perf_counter() - start)
    bytes_each = sum(f.stat().st_size for f in folder.glob('*.idx')) / 2000
    tokenizer = data.train_tokenizer(['a made up photo, number 0123456789'], 16, 400)
    mean = sum(map(len, photos)) / len(photos) / 1000
    print(f'{len(photos)} photos of about 500 × 400, {mean:.0f} kB each; one process, {BATCH} a batch')
    for size in SIZES:
        turns = [[images_per_s(f, files, tokenizer, size) for f in (ours, theirs)] for _ in range(TURNS)]
        ratio = spread([a / b for a, b in turns], 2)
        columns = [spread(column) for column in zip(*turns, strict=True)]
        print(f'{size} px: {columns[0]} images/s, webdataset {columns[1]}; ratio {ratio}', flush=True)
    print(f'index: {built:.0f} samples/s (2 members each), {bytes_each:.1f} bytes a sample with its header')


def start_of_many(folder: Path) -> None:
    """Shards that are holes, with indexes as they would be: what is read at the start is the same."""
    rows = np.array([(101 * i, 101) for i in range(EACH)], '<u4').tobytes()
    for i in range(SHARDS):
        shard = folder / f'{i:05}.tar'
        with open(shard, 'wb') as file:
            file.truncate(512 * 101 * EACH)
        stat = shard.stat()
        head = np.array([data.INDEX_MARK, stat.st_size, stat.st_mtime_ns, 2 * EACH], '<u8')
        Path(f'{shard}.idx').write_bytes(head.tobytes() + rows)
    shown = [sys.executable, __file__, str(folder)]
    for _ in range(3):
        print(subprocess.run(shown, capture_output=True, text=True, check=True).stdout, end='', flush=True)


def in_a_process(folder: str) -> None:
    list(data.order([9] * 40, 64, range(9), 0, 0, 1))  # code that is loaded when it is first used
    before, start = resident(), time.perf_counter()
    pairs = data.load_pairs(f'{folder}/{{00000..{SHARDS - 1:05}}}.tar')
    known = pairs.fingerprint()
    opened, held = time.perf_counter() - start, resident()
    order = data.order(pairs.sizes, 4096, range(10**6, 10**6 + 40), 0, 0, 1)  # resumed far into the run
    start = time.perf_counter()
    first = next(order)
    began = time.perf_counter() - start
    rows = [row for row, _ in first[::40]] + [row for batch in order for row, _ in batch[::40]]
    drawn = resident()
    for row in rows:
        with contextlib.suppress(data.BadSample):  # they are holes
            pairs.members(row)
    said = f'{len(pairs) / 1e6:.0f} M pairs in {len(pairs.files)} shards: opened in {opened:.2f} s'
    said += f', first batch of 4,096 drawn after {began:.2f} s; resident memory grew by'
    said += (
        f' {(held - before) / 2**20:.2f} MiB, with the order of a window by {(drawn - before) / 2**20:.2f}'
    )
    said += f' MiB, with {len(rows)} samples looked up by {(resident() - before) / 2**20:.2f} MiB'
    print(f'{said} ({known["samples"]})')


def draft(photos: list[bytes]) -> None:
    """What it costs in pixels, and gives in time, on large photos."""
    large = [photo(i, (1280, 960), 90) for i in range(12)]
    for size in SIZES:
        side, fit = data.PairDataset(data.Pairs([], [], 'crop', ''), None, data.Fit(size), 0).side, data.Fit(
            size
        )
        found, taken = [], []
        for content in large:
            images = []
            for how in (0, side):
                start = time.process_time()
                images.append(fit(data.read_image(io.BytesIO(content), '', how)).float())
                taken.append(time.process_time() - start)
            found.append((images[0] - images[1]).abs())
        whole, small = (1000 * statistics.median(taken[i::2]) for i in (0, 1))
        found = torch.stack(found)
        said = f'draft, 1280 × 960 to {size} px: {whole:.1f} → {small:.1f} ms; pixels differ by'
        print(f'{said} {found.mean():.2f}/255 in the mean, {found.max():.0f}/255 at most', flush=True)


def main():
    print(f'$ python {shlex.join(sys.argv)}  # commit {data.commit()}', flush=True)
    torch.set_num_threads(1)
    photos = [photo(i) for i in range(40)]
    with tempfile.TemporaryDirectory() as folder:
        speed(Path(folder), photos)
    draft(photos)
    with tempfile.TemporaryDirectory() as folder:
        start_of_many(Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f'peak of this process: {peak:.0f} MiB; torch {torch.__version__}, pillow {Image.__version__}')


if __name__ == '__main__':
    in_a_process(sys.argv[1]) if sys.argv[1:] else main()
