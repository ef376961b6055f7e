"""`ensemble` beside AutoAttack's own code (pyautoattack), custom: APGD-CE × 5, then targeted APGD-DLR × 9.

    python tests/bench_autoattack.py agree RUN --n 500 --eps 4 8         # attacks the images of --report
    python tests/bench_autoattack.py work RUN --eps 8 --n 64 --turns 3   # both take turns: seconds, work

agree: which of the images in the report (`eval.py zeroshot … --json REPORT.json`, ensemble) does AutoAttack
leave standing? work: what does either spend? A sample-iteration is one image in one forward pass.
"""

import argparse
import json
import logging
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from pyautoattack import AutoAttack

sys.path.insert(0, str(Path(__file__).parent.parent))
import attacks
import clip_adv
import data

CLASSES = [f'a {colour} {shape}' for colour in data.COLOURS for shape in data.SHAPES]


def load(run: str, split: str, seed: int, n: int):
    """(logits function that counts its images, x, y): the first n images that eval.py would take."""
    model, tokenizer = clip_adv.load_clip(run)
    model.requires_grad_(False)
    with torch.no_grad():
        text = model.encode_text(tokenizer(CLASSES))
    pairs = data.load_pairs('easyvqa', split)
    rows = torch.randperm(len(pairs), generator=data.generator(seed, 'sample', 0))[:n].tolist()
    x = (
        torch.stack([data.Fit(model.visual.size)(data.read_image(pairs.files[i])) for i in rows]).float()
        / 255
    )
    y = torch.tensor([CLASSES.index(pairs.captions[i]) for i in rows])

    def logits(images, idx=None):
        logits.count += len(images)
        return 100 * model(images) @ text.T

    logits.count = 0
    return logits, x, y


def autoattack(logits, x, y, eps: float, batch_size: int) -> torch.Tensor:
    """Which images stand, by AutoAttack's own code. (It reseeds the global generator, which is put back.)"""
    with torch.random.fork_rng():
        attack = AutoAttack(
            logits, norm='Linf', eps=eps, version='custom', attacks=['apgd-ce', 'apgd-t'], seed=0
        )
        attack.verbose = False
        assert attack.apgd.n_restarts == 5 and attack.apgd_targeted.n_target_classes == 9
        assert attack.apgd.n_iter == 100
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=batch_size)
    attacks.check(x, x_adv, eps)
    with torch.no_grad():
        return torch.cat([logits(part).argmax(1) for part in x_adv.split(batch_size)]) == y


def ours(logits, x, y, eps: float, batch_size: int) -> torch.Tensor:
    def noise(restart, i):
        return data.generator(0, f'restart {restart}', i)

    return torch.cat(
        [
            ~attacks.ensemble(
                logits,
                x[part],
                y[part],
                eps,
                lambda restart, i, part=part: noise(restart, int(part[i])),
                batch_size=batch_size,
            ).done
            for part in torch.arange(len(x)).split(8 * batch_size)
        ]
    )  # as eval.py does


def agree(args):
    read_report(args.report, args.seed, args.split)  # now, and not after an hour
    found = []
    for run, eps in [(run, eps) for run in args.run for eps in args.eps]:
        logits, x, y = load(run, args.split, args.seed, args.n)
        start = time.time()
        stands = autoattack(logits, x, y, eps / 255, args.batch_size)
        found.append(
            {
                'dir': run,
                'eps': eps,
                'n': len(x),
                'acc': stands.float().mean().item(),
                'sample_iterations': logits.count,
                'seconds': time.time() - start,
                'survives': ''.join(map(str, stands.int().tolist())),
            }
        )
        share = f'{100 * found[-1]["acc"]:.1f} % of {len(x)}'
        print(f'AutoAttack: {run}, ε = {eps:g}: {share}, {found[-1]["seconds"]:.0f} s', flush=True)
        report = {
            'command': ' '.join(['python', *sys.argv]),
            'commit': data.commit(),
            'versions': data.versions(),
            'split': args.split,
            'seed': args.seed,
            'autoattack': found,
        }
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=2))
    compare(report, args.report)


def read_report(file, seed, split):
    report = json.loads(Path(file).read_text())
    found = {(r['data'], r['split'], r['attack']) for r in report['rows'] if r['eps']}
    if found != {('easyvqa', split, 'ensemble')} or report['seed'] != seed:
        raise SystemExit(
            f'error: --report {file}: must be of eval.py zeroshot --data easyvqa, ensemble, '
            f'--seed {seed} --split {split}'
        )
    return report


def compare(autoattack_report, report_file):
    """Ours beside AutoAttack's, image by image."""
    theirs = read_report(report_file, autoattack_report['seed'], autoattack_report['split'])
    for row in autoattack_report['autoattack']:
        name = Path(row['dir']).name
        ours = next(
            o['survives']
            for o in theirs['outcomes']
            if Path(o['model']).name == name and o['eps'] == row['eps']
        )
        both = list(zip(ours[: row['n']], row['survives'], strict=True))
        acc = [100 * sum(pair[side] == '1' for pair in both) / len(both) for side in (0, 1)]
        alone = f'ensemble alone {both.count(("0", "1"))}, by AutoAttack alone {both.count(("1", "0"))}'
        print(
            f'{row["dir"]}, ε = {row["eps"]:g}/255, n = {row["n"]}: ensemble {acc[0]:.1f} %, '
            f'AutoAttack {acc[1]:.1f} %, difference {acc[0] - acc[1]:+.1f}; broken by {alone}'
        )


def work(args):
    for run in args.run:
        for eps in args.eps:
            logits, x, y = load(run, args.split, args.seed, args.n)
            rows = []
            for _ in range(args.turns):
                measured = []
                for attack in (ours, autoattack):
                    logits.count, start = 0, time.perf_counter()
                    stands = attack(logits, x, y, eps / 255, args.batch_size)
                    measured.append((time.perf_counter() - start, logits.count, int(stands.sum())))
                rows.append(measured)
            seconds = sorted(theirs[0] / mine[0] for mine, theirs in rows)
            (_, count, standing), (_, their_count, their_standing) = rows[0]
            need = standing * 14 * 101  # 14 runs of 100 steps, each with a forward pass on its random start
            mine = statistics.median(m[0] for m, _ in rows)
            print(
                f'{run}, ε = {eps:g}/255, n = {args.n}, {standing} stand (AutoAttack: {their_standing}): '
                f'seconds AutoAttack / ours, median of {args.turns} turns: '
                f'{statistics.median(seconds):.2f} ({seconds[0]:.2f} … {seconds[-1]:.2f}), '
                f'{mine:.1f} s ours; work {their_count} / {count} = {their_count / count:.2f}; '
                f'ours / what the survivors need: {f"{count / need:.3f}" if need else "no survivor"}; '
                f'{torch.get_num_threads()} threads, torch {torch.__version__}',
                flush=True,
            )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('command', choices=['agree', 'work', 'compare'])
    parser.add_argument('run', nargs='+', help='run directories; compare: the JSON file that agree wrote')
    parser.add_argument(
        '--report',
        default='results/zeroshot_test.json',
        help='what eval.py zeroshot --json wrote, on the same images',
    )
    parser.add_argument('--eps', type=float, nargs='+', default=[4.0, 8.0])
    parser.add_argument('--n', type=int, default=500)
    parser.add_argument('--split', default='test', choices=['test', 'val'])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--batch_size', type=int, default=32, help='of both')
    parser.add_argument('--json', default='', help='agree: keep what AutoAttack found, image by image')
    arguments = parser.parse_args()
    print(f'$ python {shlex.join(sys.argv)}  # commit {data.commit()}', flush=True)
    logging.disable(logging.INFO)
    data.keep_freed_memory()
    if arguments.command == 'compare':
        compare(json.loads(Path(arguments.run[0]).read_text()), arguments.report)
    else:
        globals()[arguments.command](arguments)
