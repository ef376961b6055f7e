"""What eval.py keeps of a run: RUN/eval/*.json, and results in its card, read back by huggingface_hub."""

import concurrent.futures
import json
import shutil

import huggingface_hub
import pytest

import data
import eval as evaluation


def evaluate(*words):
    return evaluation.main(evaluation.parse([*map(str, words), '--quiet']))


def shown(run):
    """{(data, split, metric name): value} of the card's header."""
    found = huggingface_hub.ModelCard.load(run / 'README.md').data.eval_results or []
    assert len({(r.dataset_name, r.dataset_split, r.metric_name) for r in found}) == len(found)
    return {(r.dataset_name, r.dataset_split, r.metric_name): r.metric_value for r in found}


def kept(run):
    return [json.loads(file.read_text()) for file in sorted((run / 'eval').iterdir())]


@pytest.fixture
def run(parts, tmp_path):
    """A copy of a run of stage 1, with a card of known content."""
    run = shutil.copytree(parts['init'], tmp_path / 'run')
    shutil.rmtree(run / 'eval', ignore_errors=True)  # other tests evaluate it, too
    (run / 'README.md').write_bytes(b'---\nlicense: mit\ntags:\n- clip\n---\n# by hand\r\n\n---\nend')
    return run


ZEROSHOT = ['--split', 'val', '--n', 5, '--eps', 4, '--attack', 'pgd']


def test_results_are_in_the_header(run):
    """They are the rows; what else is in the card stays; the same measurement again is one file."""
    evaluate('zeroshot', run, *ZEROSHOT)
    card = huggingface_hub.ModelCard.load(run / 'README.md')
    assert (run / 'README.md').read_bytes().endswith(b'\n---\n# by hand\r\n\n---\nend')
    assert (card.data.license, card.data.tags, card.data.model_name) == ('mit', ['clip'], 'run')
    (report,) = kept(run)
    assert [r.metric_value for r in card.data.eval_results] == [r['value'] for r in report['rows']]
    result = next(r for r in card.data.eval_results if 'pgd' in r.metric_name)
    assert result.metric_name == 'accuracy, pgd ε = 4/255, subset all, classes 24'
    assert result.metric_type == 'accuracy'
    assert (result.task_type, result.dataset_name, result.dataset_type) == (
        'zero-shot-image-classification',
        'easyvqa',
        'easyvqa',
    )
    assert result.dataset_split == 'val' and {'n', 'stderr', 'eps', 'attack'} <= set(result.metric_args)
    evaluate('zeroshot', run, *ZEROSHOT, '--batch_size', 2, '--json', run.parent / 'x.json')
    assert len(kept(run)) == 1 and len(shown(run)) == 6
    for words in (
        ['zeroshot', '--n', 5, '--attack', 'none'],
        ['retrieval', '--n', 5, '--eps', 4, '--attack', 'apgd'],
        ['typographic', '--n', 3, '--font', 0, 20],
        ['audit', '--n', 3, '--queries', 2],
    ):
        evaluate(words[0], run, *words[1:])
    assert len(kept(run)) == 5 and sum(len(report['rows']) for report in kept(run)) == 6 + 3 + 12 + 4 + 12
    names = {name for *_, name in shown(run)}
    assert any('height 20' in name for name in names) and any('check deterministic' in name for name in names)
    assert len(shown(run)) == 6 + 3 + 12 + 4 + 11  # a check that was left out has no value


def test_results_of_other_weights_are_left_out(run, tmp_path, monkeypatch):
    """Of two runs each gets its own; what was measured after another update is not shown as theirs."""
    other = shutil.copytree(run, tmp_path / 'other')
    evaluate('zeroshot', run, other, '--n', 4, '--attack', 'none')
    for place in (run, other):
        (report,) = kept(place)
        assert {r['model'] for r in report['rows'] + report['outcomes']} == {str(place)}
        assert len(shown(place)) == 3
    (run / 'train_state.pt').unlink()  # as for publishing: the exported model is what was measured
    evaluate('zeroshot', run, '--n', 3, '--attack', 'none', '--split', 'val')
    about = data.settings_of(run)
    assert len(shown(run)) == 6 and {report['updates'] for report in kept(run)} == {about['updates']}
    monkeypatch.setattr(data, 'settings_of', lambda path: about | {'updates': 7})
    evaluate('retrieval', run, '--n', 4, '--attack', 'none')
    assert [report['updates'] for report in kept(run)][0] == 7 and len(kept(run)) == 3
    assert all('R@' in name for *_, name in shown(run))


def test_evaluations_that_end_at_once(run, capsys):
    """Each finds the card whole, and leaves it whole, with all results."""

    def end(seed):
        args = evaluation.parse(['zeroshot', str(run), '--seed', str(seed)])
        rows = [evaluation.row(evaluation.about(args, str(run), 0.0), f'measure {seed}', [True, False])]
        updates = data.settings_of(run)['updates']
        evaluation.keep({'rows': rows, 'outcomes': [], 'updates': updates}, run, args)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(end, range(24)))
    assert len(kept(run)) == len(shown(run)) == 24 and not capsys.readouterr().err


def test_audits_of_other_transfers_are_others(run, tmp_path):
    other = shutil.copytree(run, tmp_path / 'other')
    for words in ([run], [run, other], [run, f'{run}/', '--transfer_from', f'{run}/.']):
        evaluate('audit', *words, '--n', 3, '--queries', 2)
    assert len(kept(run)) == 2


@pytest.mark.parametrize(
    'content',
    [b'# somebody else', b'---\nnever closed', b'---\ntags: x\n---\ncaf\xe9', b'---\n- a list\n---\n'],
)
def test_a_file_that_is_no_card_stays(run, content, capsys):
    (run / 'README.md').write_bytes(content)
    assert evaluate('zeroshot', run, '--n', 3, '--attack', 'none') == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert (run / 'README.md').read_bytes() == content and len(said) == 1
    assert said[0].startswith(f'warning: not all kept in {run}')
    assert len(kept(run)) == 1


def test_what_cannot_be_written(run, tmp_path, capsys):
    """One line says so, and the measurement goes on to --json; without a card nothing is said."""
    (run / 'README.md').unlink()
    evaluate('zeroshot', run, '--n', 3, '--attack', 'none')
    assert len(kept(run)) == 1 and not (run / 'README.md').exists()
    assert 'warning' not in capsys.readouterr().err
    shutil.rmtree(run / 'eval')
    (run / 'eval').write_text('in the way')
    assert evaluate('zeroshot', run, '--n', 3, '--attack', 'none', '--json', tmp_path / 'out.json') == 0
    captured = capsys.readouterr()
    assert captured.err.count('warning: not all kept in') == 1 and '| accuracy' in captured.out
    assert (tmp_path / 'out.json').is_file()


def test_into_what_is_no_run_nothing_is_written(run):
    for file in ('train_config.json', 'train_state.pt', 'previous_train_state.pt'):
        (run / file).unlink(missing_ok=True)
    before = {file: file.read_bytes() for file in run.rglob('*') if file.is_file()}
    evaluate('zeroshot', run, '--n', 2, '--attack', 'none')
    assert {file: file.read_bytes() for file in run.rglob('*') if file.is_file()} == before
    assert not (run / 'eval').exists()


def test_the_card_of_a_llava(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / 'run')
    shutil.rmtree(run / 'eval', ignore_errors=True)  # other tests evaluate it, too
    for words in (
        ['vqa', '--questions', 'what'],
        ['pope'],
        ['caption'],
        ['caption', '--targeted', 'a: b', '--eps', 4, 8],
    ):
        evaluate(words[0], run, '--n', 2, '--iterations', 1, *words[1:])
    found = huggingface_hub.ModelCard.load(run / 'README.md').data.eval_results
    assert len(kept(run)) == 4 and len(shown(run)) == 2 + 10 + 8 + 3
    assert {r.task_type for r in found} == {'visual-question-answering', 'image-to-text'}
    assert 'forced, ensemble ε = 8/255, sentence a: b, iterations 1' in {r.metric_name for r in found}
