"""Runs a stage's main and keeps what the optimizer is given.

    one_step.py FILE.pt [stage=llava_adv] [kill=STEP:SIGNAL] [flags]

The hook runs before every update, so that tests see the gradients of the *whole* training step as it is:
order, augmentation, random start, K attack steps, gathering, DDP. `kill` sends this process a signal then.
"""

import importlib
import os
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import clip_adv
import data

target, *arguments = sys.argv[1:]
stage = importlib.import_module(arguments.pop(0)[6:]) if arguments[0].startswith('stage=') else clip_adv
kill_step, kill_signal = (
    map(int, arguments.pop(0)[5:].split(':')) if arguments[0].startswith('kill=') else (0, 0)
)
updates, seen, pgd = [], [], clip_adv.attacks.pgd


def keep_gradients(optimizer, *_):
    updates.append([p.grad.clone() for group in optimizer.param_groups for p in group['params']])
    if len(updates) == kill_step:
        os.kill(os.getpid(), kill_signal)


def keep_images(loss, x, eps, alpha, k, start):
    x_adv = pgd(loss, x, eps, alpha, k, start)
    seen.append((x, start, x_adv))
    return x_adv


register_optimizer_step_pre_hook(keep_gradients)
clip_adv.attacks.pgd = keep_images
stage.main(*data.parse(stage.Config, '', arguments))
rank = int(os.environ.get('RANK', 0))
compiled = torch._dynamo.utils.counters['stats'].get('unique_graphs', 0)
torch.save({'updates': updates, 'seen': seen, 'graphs': compiled}, f'{target}.{rank}')
