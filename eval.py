"""Evaluation: one sub-command per question. Every command prints a table; --json FILE keeps what it measured.

    python eval.py zeroshot runs/clip runs/clip_adv --eps 2 4 8 16

zeroshot: which of the class captions is nearest to the image, and does that survive an attack? Robust accuracy counts a
sample as broken when any restart of PGD changes its prediction (the worst case per sample).
"""
import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import attacks
import clip_adv
import data

PGD_STEPS, RESTARTS = 50, 2


def zeroshot(args: argparse.Namespace) -> None:
    started = time.time()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    clip_adv.keep_freed_memory()
    everything = data.load_pairs(args.data, args.split)
    # easy-VQA's classes are all its colours and shapes, of any other set the captions that it has
    classes = [f'a {c} {s}' for c in data.COLOURS for s in data.SHAPES] if args.data == 'easyvqa' else sorted(set(everything.captions))
    if not 2 <= len(classes) <= 10_000:
        raise SystemExit(f'error: --data {args.data}: {len(classes)} different captions; zero-shot classification needs '
                         f'between 2 and 10000 classes, and images that share them')
    results = []
    for path in args.dirs:
        model, tokenizer = clip_adv.load_clip(path)
        model.to(device).requires_grad_(False)
        pairs = subset(everything, path, args.subset)
        n = min(args.n, len(pairs)) if args.n else len(pairs)
        if args.n > len(pairs):
            print(f'note: --n {args.n}: --split {args.split} has {len(pairs)} images; all of them are used', file=sys.stderr)
        # The sample depends on the seed alone, not on batch size, and a larger --n only adds to it.
        rows = torch.randperm(len(pairs), generator=data.generator(args.seed, 'sample', 0))[:n].tolist()
        with torch.no_grad():
            text = torch.cat([model.encode_text(tokenizer(part).to(device)) for part in chunks(classes, 256)])
        counts = {eps: 0 for eps in [0., *args.eps]}
        bar = tqdm(total=n * len(counts), desc=Path(path).name, unit='image', disable=args.quiet)
        for part in chunks(rows, args.batch_size):
            images = [data.fit(data.read_image(pairs.files[i]), model.visual.size, model.preprocess_cfg['interpolation'],
                               model.preprocess_cfg['resize_mode']) for i in part]
            x = torch.stack(images).to(device).float() / 255
            y = torch.tensor([classes.index(pairs.captions[i]) for i in part], device=device)
            with torch.no_grad():
                correct = (logits(model, text, x).argmax(1) == y).nonzero()[:, 0]
            counts[0.] += len(correct)
            bar.update(len(part))
            for eps in args.eps:  # an image that is wrong unperturbed stays wrong, and needs no attack
                counts[eps] += len(survivors(model, text, x, y, correct, [part[i] for i in correct.tolist()],
                                             eps / 255, args.seed))
                bar.update(len(part))
        bar.close()
        results.append({'dir': str(path), 'n': n, 'classes': len(classes), 'clean_acc': counts[0.] / n,
                        'adv_acc': {f'{eps:g}': counts[eps] / n for eps in args.eps}})
    attack = f'PGD-{PGD_STEPS}, {RESTARTS} restarts, worst case per image, l∞, ε in 1/255'
    print(f'zero-shot accuracy in %, {len(classes)} classes, {args.data} {args.split}'
          f'{"" if args.subset == "all" else " (" + args.subset + " captions)"}, n = {results[0]["n"]}; {attack}')
    table(['model', 'clean', *(f'ε = {eps:g}' for eps in args.eps)],
          [[r['dir'], *(f'{100 * v:.1f}' for v in [r['clean_acc'], *r['adv_acc'].values()])] for r in results])
    if args.plot:
        plot(Path(args.plot), results, f'{args.data} {args.split}, n = {results[0]["n"]}, PGD-{PGD_STEPS} × {RESTARTS}')
    if args.json:
        report = {'command': shlex.join(['python', 'eval.py', *sys.argv[1:]]), 'commit': clip_adv.commit(),
                  'versions': clip_adv.versions(), 'seed': args.seed, 'n': results[0]['n'], 'seconds': time.time() - started,
                  'data': args.data, 'split': args.split, 'subset': args.subset, 'attack': attack,
                  'results': results}
        clip_adv.write(Path(args.json), lambda file: file.write_text(json.dumps(report, indent=2), encoding='utf-8'))


def plot(file: Path, results: list[dict], title: str) -> None:
    """Accuracy against ε, a line for each model; the format is the file's ending (png, pdf, svg)."""
    import matplotlib
    matplotlib.use('Agg')  # draws into files, needs no screen
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.add_subplot()
    for r in results:
        points = sorted({0.: r['clean_acc'], **{float(eps): acc for eps, acc in r['adv_acc'].items()}}.items())
        axes.plot([eps for eps, _ in points], [100 * acc for _, acc in points], 'o-', label=Path(r['dir']).name)
    axes.axhline(100 / results[0]['classes'], color='gray', linestyle=':', label='chance')
    axes.set(xlabel='ε in 1/255 (l∞)', ylabel='zero-shot accuracy in %', ylim=(0, 102), title=title)
    axes.legend()
    axes.grid(alpha=.3)
    # the name of the file beside has no ending that matplotlib knows, so the format is told
    clip_adv.write(file, lambda beside: figure.savefig(beside, dpi=150, format=file.suffix[1:]))


def logits(model: clip_adv.CLIP, text: Tensor, x: Tensor) -> Tensor:
    """100·cos, the authors' fixed scale.   x: [B, 3, S, S] in [0, 1], text: [C, D] unit vectors → [B, C]"""
    return 100 * model(x) @ text.T


def survivors(model: clip_adv.CLIP, text: Tensor, x: Tensor, y: Tensor, standing: Tensor, names: list[int], eps: float,
              seed: int) -> Tensor:
    """Those of x[standing] whose prediction withstands every restart of PGD, as positions in x.

    eps: in [0, 1] units.  names: for each standing image a number of its own, which its random starts are drawn from.
    """
    for restart in range(RESTARTS):
        if not len(standing):
            break
        clean, label = x[standing], y[standing]
        rival = torch.ones(len(label), len(text), dtype=torch.bool, device=x.device).scatter_(1, label[:, None], False)

        def margin_loss(images: Tensor) -> Tensor:
            """Σ log Σ_{j≠y} exp z_j − z_y: cross-entropy = softplus of that, so every sample's gradient has the same
            sign; but at 100·cos the cross-entropy of a confident model, and its gradient, underflow to exactly 0."""
            z = logits(model, text, images)
            return (z.masked_fill(~rival, float('-inf')).logsumexp(1) - z.gather(1, label[:, None])[:, 0]).sum()

        noise = [data.generator(seed, f'restart {restart}', name) for name in names]
        start = attacks.random_start(clean, eps, noise)
        x_adv = attacks.pgd(margin_loss, clean, eps, eps / 10, PGD_STEPS, start)
        attacks.check(clean, x_adv, eps)
        with torch.no_grad():
            stands = logits(model, text, x_adv).argmax(1) == label
        standing, names = standing[stands], [name for name, s in zip(names, stands.tolist()) if s]
    return standing


def subset(pairs: data.Pairs, path: str, which: str) -> data.Pairs:
    """The images whose caption the run never saw ('held-out'), the others ('seen'), or all."""
    if which == 'all':
        return pairs
    config = clip_adv.read_json(Path(path) / 'train_config.json', f'--subset {which}: {path}')
    held = data.held_out(config['config']['holdout'])
    if not held:
        raise SystemExit(f'error: --subset {which}: {path} was trained without --holdout')
    rows = [i for i, c in enumerate(pairs.captions) if (data.pair_name(c) in held) == (which == 'held-out')]
    return pairs.keep(rows, f'; {len(rows)} with a {which} caption')


def chunks(items: list, size: int):
    return (items[i:i + size] for i in range(0, len(items), size))


def table(header: list[str], rows: list[list[str]]) -> None:
    """A table that reads well on a terminal and is Markdown, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda row: '| ' + ' | '.join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths))) + ' |'
    print('\n'.join([line(header), '|' + '|'.join('-' * (w + 1) + ('-' if i == 0 else ':') for i, w in enumerate(widths)) + '|',
                     *map(line, rows)]), flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)
    z = commands.add_parser('zeroshot', help='zero-shot classification, clean and under attack', allow_abbrev=False,
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    z.add_argument('dirs', nargs='+', metavar='DIR', help='run directories of clip_adv.py')
    z.add_argument('--data', default='easyvqa', help="'easyvqa', or a folder with metadata.jsonl whose captions are classes")
    z.add_argument('--split', default='test', choices=['test', 'val', 'train'], help='choose on val, report on test')
    z.add_argument('--subset', default='all', choices=['all', 'held-out', 'seen'], help="captions that the run's --holdout left out, or kept")
    z.add_argument('--eps', type=float, nargs='*', default=[2., 4., 8., 16.], help='radii in 1/255')
    z.add_argument('--n', type=int, default=0, help='images, drawn by --seed; 0: all')
    z.add_argument('--seed', type=int, default=0, help='of the sample and the random starts')
    z.add_argument('--batch_size', type=int, default=128, help='images at a time; changes speed and memory only')
    z.add_argument('--json', default='', metavar='FILE', help='write what was measured')
    z.add_argument('--plot', default='', metavar='FILE', help='draw accuracy against ε (png, pdf or svg)')
    z.add_argument('--quiet', action='store_true', help='no progress bar')
    z.set_defaults(run=zeroshot)
    args = parser.parse_args(argv)
    args.eps = list({f'{eps:g}': eps for eps in args.eps}.values())  # each once
    for eps in args.eps:
        if not 0 < eps <= 255:
            parser.error(f'--eps {eps:g}: must be above 0 and at most 255 (it is in 1/255; the clean accuracy is always shown)')
        if eps < 0.25:
            parser.error(f'--eps {eps:g}: it is in 1/255; did you mean {eps * 255:.3g}?')
    if args.n < 0 or args.batch_size < 1:
        parser.error(f'--n {args.n} --batch_size {args.batch_size}: must be at least 0 and 1')
    for flag, file in (('--json', args.json), ('--plot', args.plot)):
        if file and not os.path.isdir(os.path.dirname(file) or '.'):  # now, and not after an hour of attacks
            parser.error(f'{flag} {file}: no folder {os.path.dirname(file)}')
    if args.plot and Path(args.plot).suffix not in ('.png', '.pdf', '.svg'):
        parser.error(f'--plot {args.plot}: must end in .png, .pdf or .svg')
    return args


if __name__ == '__main__':
    arguments = parse()
    arguments.run(arguments)
