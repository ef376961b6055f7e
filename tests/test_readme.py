"""README: its tables are what lies in results/, its links lead to the lines that they name."""

import json
import re

import pytest
from conftest import ROOT


def rows(file):
    return json.loads((ROOT / 'results' / file).read_text())['rows']


def measured(file, measure, **where):
    """In %, by ε."""
    found = [r for r in rows(file) if r['measure'] == measure and where.items() <= r.items()]
    return [f'{100 * r["value"]:.1f}' for r in sorted(found, key=lambda r: r['eps'])]


def test_tables_are_what_was_measured():
    lines = [line for line in (ROOT / 'README.md').read_text().splitlines() if '](results/' in line]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    cells = {re.search(r'\]\(results/(\w+)\)', row[0])[1]: row[1:] for row in cells if len(row) > 5}
    for model in ('clip', 'clip_adv'):
        assert measured('zeroshot_test.json', 'accuracy', model=f'runs/{model}') == cells[model][1:-1]
    names = {'vanilla CLIP': 'vanilla', 'TeCoA': 'tecoa', 'FARE': 'fare', 'ΔCLIP': 'delta'}
    text = (ROOT / 'README.md').read_text()
    for line in re.search(r'left out: clean.*\n.*\n((?:\|.*\n)+)', text)[1].splitlines():
        name, *found = (cell.strip() for cell in line.strip('|').split('|'))
        seen, held = (
            measured(f'easyvqa/{names.get(name, "anchored")}.0{part}.json', 'accuracy')
            for part in ('', '.held-out')
        )
        assert found == [*seen, held[0], held[2], held[3]], name
    (figure,) = (r['figure'] for r in rows('models/defence.json') if r['check'].startswith('counterattack'))
    shares = re.findall(r'([\d.]+) %', figure)
    assert f'| {" | ".join(shares)} |' in text
    for model in ('llava_adv_llm', 'llava', 'llava_single', 'llava_tuned', 'llava_adv'):
        what, yes_no, cider, facts, forced = cells[model]
        own = {'model': rows(f'{model}/what.json')[0]['model']}
        assert ' → '.join(measured(f'{model}/what.json', 'accuracy', subset='what')) == what
        shares = zip(*(measured(f'{model}/pope.json', measure) for measure in ('accuracy', 'yes_rate')))
        assert ' → '.join(f'{accuracy} ({yes})' for accuracy, yes in shares) == yes_no
        assert ' → '.join(measured(f'{model}/caption.json', 'CIDEr', **own)) == cider
        assert ' → '.join(measured(f'{model}/caption.json', 'both', **own)) == facts
        found = measured(f'{model}/targeted.json', 'forced')[1:]
        assert ', '.join(f'{float(share):.0f}' for share in found) in (forced, '')


@pytest.mark.parametrize(
    'text, file, line',
    [
        ('attacks.py:pgd', 'attacks.py', 'def pgd('),
        ('clip_adv.py:main', 'clip_adv.py', 'def main('),
        ('Encode the captions', 'clip_adv.py', '# 1. Encode the text once'),
        ('gather', 'clip_adv.py', 'def gather('),
        ('Attack the images', 'clip_adv.py', '# 2. Attack the images'),
        ('InfoNCE', 'clip_adv.py', 'def info_nce('),
        ('Update the weights', 'clip_adv.py', '# 3. Update the weights'),
        ('The attack grows', 'clip_adv.py', 'def attack_at('),
        ('llava_adv.py:main', 'llava_adv.py', 'def main('),
        ('trains', 'llava_adv.py', 'def trainable('),
        ('Attack the images', 'llava_adv.py', '# 1. Attack the images'),
        ('tower', 'llava_adv.py', 'def embed('),
        ('Update the weights', 'llava_adv.py', '# 2. Update the weights'),
        ('`ensemble`', 'attacks.py', 'def ensemble('),
    ],
)
def test_links_lead_to_what_they_name(text, file, line):
    number = re.search(rf'\[{re.escape(text)}\]\({file}#L(\d+)\)', (ROOT / 'README.md').read_text())[1]
    assert line in (ROOT / file).read_text().splitlines()[int(number) - 1]
