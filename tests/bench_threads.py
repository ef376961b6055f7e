"""What waiting threads cost stage 1 on a machine that has other work: `python tests/bench_threads.py [TURNS]`

Attacked updates of clip_adv.py's defaults, alone and beside one and two busy processes. Settings of OpenMP
take turns; "as it is" is what data.py sets unless the user has set something.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SETTINGS = {
    'as it is': {},
    'libgomp default': {'GOMP_SPINCOUNT': '300000'},
    'PASSIVE': {'OMP_WAIT_POLICY': 'PASSIVE'},
    'one thread': {'OMP_NUM_THREADS': '1'},
}
FLAGS = '--steps 60 --log_every 20 --eps_from 0 --eps_to 0 --k_from 0'


def images_per_s(setting: dict) -> float:
    """Mean of the second and the third 20 updates."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / 'clip_adv.py'), *FLAGS.split(), '--out', f'{out}/run']
        subprocess.run(command, env={**os.environ, **setting}, check=True, capture_output=True)
        rows = [json.loads(line) for line in Path(out, 'run', 'log.jsonl').read_text().splitlines()]
    return (rows[1]['images_per_s'] + rows[2]['images_per_s']) / 2


def main():
    from data import commit

    print(f'$ python {shlex.join(sys.argv)}  # commit {commit()}', flush=True)
    found: dict[tuple, list[float]] = {}
    for _ in range(int(sys.argv[1]) if sys.argv[1:] else 3):
        for busy in (0, 1, 2):
            loops = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
            try:
                for name, setting in SETTINGS.items():
                    found.setdefault((name, busy), []).append(images_per_s(setting))
            finally:
                for loop in loops:
                    loop.kill()
    for (name, busy), values in sorted(found.items()):
        turns = ', '.join(f'{value:.0f}' for value in values)
        median = statistics.median(values)
        print(f'{name}, {busy} busy processes: {median:.0f} images/s, median of {turns}')


if __name__ == '__main__':
    main()
