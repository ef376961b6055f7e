"""eval.py on LLaVA directories: the attack on answers, its commands; what changes no result."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, execute, torchrun
from PIL import Image

import attacks
import data
import eval as evaluation

CPU = torch.device('cpu')


def run(*words):
    args = evaluation.parse([*map(str, words), '--quiet'])
    return evaluation.main(args)


def sensitive(place, batch_size=12):
    """A model whose answers hang on the image: the untrained one hardly hears its projector."""
    model = evaluation.Answerer(str(place), CPU, 4, batch_size)
    for layer in model.model.llm.model.layers:
        layer.self_attn.o_proj.weight.data *= 100
    model.model.projector.linear_2.weight.data *= 20
    return model


def asked_of(model, n=12, rounds=None):
    """Questions whose right answer is, by definition, what the model says of the clean image."""
    found = evaluation.vqa_set('easyvqa', 'val')[:n]
    x = torch.stack([model.pixels(q.image) for q in found])
    for q, said in zip(found, model.answer(x, [q.text for q in found])):
        q.rounds = rounds or [('away', said), ('again', ''), ('towards', 'maybe')]
        q.score = lambda text, said=said: float(text == said)
    return x, found


def worst(model, x, asked, eps, **how):
    """(answers, scores, images)"""
    found = evaluation.Answers(model, asked, **how).worst(x, asked, eps)
    return [a.text for a in found], [a.score for a in found], torch.stack([a.image for a in found])


def test_the_attack_on_answers(whole):
    """Breaks a model without robustness; it reports what the images do; they stay in ball and box."""
    model = sensitive(whole, 5)
    x, asked = asked_of(model)
    eps = 64 / 255
    texts, scores, images = worst(model, x, asked, eps, iterations=30)
    assert model.answer(images, [q.text for q in asked]) == texts
    assert scores == [q.score(t) for q, t in zip(asked, texts)] and sum(scores) <= 8
    attacks.check(x, images, eps)
    assert [float(t == s) for t, s in zip(texts, model.answer(x, [q.text for q in asked]))] == scores
    # looking after each round only finds no more
    late = worst(model, x, asked, eps, iterations=30, early=False)[1]
    assert sum(late) >= sum(scores)


def test_batch_size_and_company_change_nothing(whole):
    model = sensitive(whole)
    x, asked = asked_of(model)
    texts, scores, images = worst(model, x, asked, 4 / 255, iterations=10)
    model.batch_size = 5
    texts2, scores2, images2 = worst(model, x, asked, 4 / 255, iterations=10)
    alone = [worst(model, x[i : i + 1], asked[i : i + 1], 4 / 255, iterations=10) for i in range(4)]
    assert texts == texts2 and scores == scores2 and 0 < sum(scores) < 12
    assert [t for t, _, _ in alone] == [[t] for t in texts[:4]]
    assert (images - images2).abs().mean() < 1e-4  # a sign may flip where a gradient is 0 up to rounding


def test_samples_leave_when_they_are_broken(whole, monkeypatch):
    model = evaluation.Answerer(str(whole), CPU, 4, 12)
    x, asked = asked_of(model, rounds=[('away', 'yes')] * 3)
    spent, logits = [], model.model.logits
    model.model.logits = lambda z, batch: spent.append(len(z)) or logits(z, batch)
    wrong = [replace(q, score=lambda text: 0.0) for q in asked]  # wrong from the start: nothing is spent
    assert worst(model, x, wrong, 8 / 255)[1] == [0.0] * 12 and spent == []
    right = [replace(q, score=lambda text: 1.0) for q in asked]  # never wrong: the whole budget
    assert worst(model, x, right, 8 / 255, iterations=4)[1] == [1.0] * 12 and sum(spent) == 12 * 3 * 5


def test_what_is_watched(whole):
    """Behind a text that the model would not have said, nothing is known of what it says."""
    model = evaluation.Answerer(str(whole), CPU, 4, 12)

    def watched(said, goal):
        sample = data.Sample(None, *model.ids('what?', goal), 0)
        mine = [token for token, label in zip(*model.ids('what?', said)) if label]
        return model.watched('what?', said, sample), mine, sum(sample.labels)

    found, mine, n = watched('a red circle', 'a red circle')
    assert found == mine and len(mine) == n > 2
    found, mine, n = watched('a red circle', 'a blue box')
    shared = next(k for k, token in enumerate(found) if token < 0)
    assert found[:shared] == mine[:shared] and 1 < shared < n and set(found[shared:]) == {-1}
    found, mine, n = watched('a red', 'a red circle')  # it ends where the goal goes on
    assert found[: len(mine)] == mine and set(found[len(mine) :]) == {-1} and mine[-1] == model.tokenizer.eos


def test_again_goes_on_from_the_first_of_equals_and_own_answers_are_left_too(whole, monkeypatch):
    """`again` drives the first reference's image on; what it says is a round of its own."""
    model = evaluation.Answerer(str(whole), CPU, 4, 12)
    x, asked = asked_of(model, 1)
    said, goals = model.answer(x, [asked[0].text])[0], []
    monkeypatch.setattr(
        attacks,
        'apgd',
        lambda loss, x, eps, start, *a, **k: goals.append(start.clone())
        or attacks.Found(
            (start + 0.01).clamp(0, 1),
            torch.tensor([False]),
            torch.tensor([1]),
            torch.tensor([len(goals) * 1.0]),
        ),
    )
    rounds = [('away', 'red'), ('away', 'blue'), ('away', None), ('again', ''), ('towards', 'maybe')]
    worst(model, x, [replace(asked[0], rounds=rounds, score=lambda text: 1.0)], 0.1)
    assert len(goals) == 5 and torch.equal(goals[3], (x + 0.01).clamp(0, 1)) and torch.equal(goals[4], x)
    goals.clear()
    worst(model, x, [replace(asked[0], rounds=[('away', said), *rounds[2:]], score=lambda text: 1.0)], 0.1)
    assert len(goals) == 3


def test_a_round_that_helps_the_model_is_not_kept(whole, monkeypatch):
    """An attack may raise a score, a caption's CIDEr, say: the worst image stays what it was."""
    model = evaluation.Answerer(str(whole), CPU, 4, 12)
    x, asked = asked_of(model, 1)
    monkeypatch.setattr(
        attacks,
        'apgd',
        lambda loss, x, eps, start, *a, **k: attacks.Found(
            (start + 0.01).clamp(0, 1), torch.tensor([False]), torch.tensor([1]), torch.tensor([1.0])
        ),
    )
    scores = iter([0.5, 0.8, 0.6, 0.5, 0.5])
    asked[0] = replace(
        asked[0],
        rounds=[('away', 'red'), ('away', 'blue'), ('again', ''), ('towards', 'maybe')],
        score=lambda text: next(scores),
    )
    _, found, images = worst(model, x, asked, 0.1, early=False)
    # `again` is the first that does no harm: from the clean image
    assert found == [0.5] and torch.equal(images, (x + 0.01).clamp(0, 1))


def test_a_sure_answer_still_has_a_gradient(whole):
    """Where float32's softmax is exactly 1."""
    model = evaluation.Answerer(str(whole), CPU, 4, 12)
    x, asked = asked_of(model, 4)
    model.model.llm.lm_head.weight = torch.nn.Parameter(
        model.model.llm.lm_head.weight * 3000, requires_grad=False
    )
    says = model.answer(x, [q.text for q in asked])
    for q, said in zip(asked, says):
        q.rounds, q.score = [('away', said)], lambda text, said=said: float(text == said)
    _, _, images = worst(model, x, asked, 8 / 255, iterations=2, early=False)
    moved = [not torch.equal(a, b) for a, b in zip(images, x)]
    assert all(moved)


def test_towards(whole):
    """A sentence that a model without robustness can be made to say; success is what is in the answer."""
    model = evaluation.Answerer(str(whole), CPU, 1, 12)
    x, asked = asked_of(model)
    goal = next(
        t
        for t in (model.tokenizer.decode([i]) for i in range(260, 300))
        if t.strip() and t not in model.answer(x, [q.text for q in asked])
    )
    asked = [
        replace(q, rounds=[('towards', goal)], score=lambda text: float(goal not in text)) for q in asked
    ]
    samples = [data.Sample(None, *model.ids(q.text, goal), 0) for q in asked]
    batch = data.collate(samples, model.tokenizer.pad)
    before = model.model(x, batch)
    _, _, images = worst(model, x, asked, 64 / 255, iterations=30)
    after = model.model(images, batch)
    assert ((after < before) | torch.tensor([torch.equal(a, b) for a, b in zip(images, x)])).all()


@pytest.mark.parametrize('n', [20, 0])
def test_yes_and_no_are_drawn_in_pairs(whole, tmp_path, n):
    """An answer that is always the same is right in half of a sample as it is in half of the set."""
    command = ['pope', whole, '--split', 'val', '--n', n, '--attack', 'none']
    assert run(*command, '--json', tmp_path / 'a.json') == 0
    asked = {q.name: q for q in evaluation.pope_set('easyvqa', 'val')}
    answers = json.loads((tmp_path / 'a.json').read_text())['outcomes'][0]['answers']
    assert len(answers) == (n or len(asked))
    drawn = Counter((asked[name].text, asked[name].answers[0]) for name in answers)
    assert all(drawn[text, 'yes'] == drawn[text, 'no'] for text, _ in drawn)


def test_vqa_command(whole, tmp_path, capsys):
    common = [whole, '--split', 'val', '--n', 6, '--eps', 16, '--iterations', 5]
    assert run('vqa', *common, '--json', tmp_path / 'a.json') == 0
    table = capsys.readouterr().out
    assert '| what ' in table and 'yes/no, balanced' in table and '| all ' in table
    assert run('vqa', *common, '--batch_size', 3, '--json', tmp_path / 'b.json') == 0
    execute(torchrun(2, ROOT / 'eval.py', 'vqa', *map(str, common), '--json', str(tmp_path / 'c.json')))
    a, b, c = (json.loads((tmp_path / f'{name}.json').read_text()) for name in 'abc')
    assert a['rows'] == b['rows'] == c['rows'] and a['outcomes'] == b['outcomes'] == c['outcomes']
    assert len(a['rows']) == 6
    assert [r['subset'] for r in a['rows'][::2]] == ['what', 'yes/no, balanced', 'all']
    truth = {q.name: q for q in evaluation.vqa_set('easyvqa', 'val')}
    for row, outcome in zip(a['rows'], a['outcomes']):
        assert row['n'] == len(outcome['answers']) == 6
        assert row['iterations' if row['eps'] else 'n'] == (5 if row['eps'] else 6)
        scores = [
            evaluation.vqa_accuracy(text, truth[name].answers) for name, text in outcome['answers'].items()
        ]
        assert np.mean(scores) == pytest.approx(row['value'])
        assert (row['subset'], row['eps']) == (outcome['subset'], outcome['eps'])
    assert all(
        clean['value'] >= attacked['value'] for clean, attacked in zip(a['rows'][::2], a['rows'][1::2])
    )


def test_a_language_model_alone_is_the_row_without_an_image(parts, capsys):
    assert run('vqa', parts['llm'], '--split', 'val', '--n', 5, '--questions', 'what') == 0
    head, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert head.rstrip(' |').endswith('ε = 0') and '| what ' in row  # there is no ε to speak of


def test_pope_command(whole, tmp_path, capsys):
    assert (
        run(
            'pope',
            whole,
            '--split',
            'val',
            '--n',
            6,
            '--eps',
            16,
            '--iterations',
            3,
            '--json',
            tmp_path / 'a.json',
        )
        == 0
    )
    found = json.loads((tmp_path / 'a.json').read_text())
    labels = {q.name: q.answers[0] for q in evaluation.pope_set('easyvqa', 'val')}
    for outcome in found['outcomes']:
        of = outcome['answers']
        expected = evaluation.pope_scores(list(of.values()), [labels[n] for n in of])
        assert {
            r['measure']: r['value'] for r in found['rows'] if r['eps'] == outcome['eps']
        } == pytest.approx(expected)
    assert {r['measure'] for r in found['rows'] if r['stderr'] is not None} == {'accuracy'}


def test_caption_command(whole, parts, tmp_path, capsys):
    common = ['caption', whole, '--split', 'val', '--n', 4, '--eps', 16, '--iterations', 2]
    assert run(*common, '--json', tmp_path / 'a.json') == 0
    assert 'a reference of the image' in capsys.readouterr().out
    found = json.loads((tmp_path / 'a.json').read_text())
    value = {(r['model'], r['eps'], r['measure']): r['value'] for r in found['rows']}
    assert value[str(whole), 16, 'CIDEr'] <= value[str(whole), 0, 'CIDEr']
    own, others = 'a reference of the image', 'a reference of another image'
    assert value[own, 0, 'both'] == 1 and value[others, 0, 'CIDEr'] < value[own, 0, 'CIDEr']
    assert (
        run(
            *common,
            '--targeted',
            'a red circle',
            'stocks',
            '--grid',
            tmp_path / 'g.png',
            '--json',
            tmp_path / 'b.json',
        )
        == 0
    )
    found = json.loads((tmp_path / 'b.json').read_text())
    assert {r['sentence'] for r in found['rows']} == {'a red circle', 'stocks'}
    for row, outcome in zip(found['rows'], found['outcomes']):
        said = outcome['captions'].values()
        assert row['value'] == np.mean([row['sentence'] in text.lower() for text in said])
        assert len(said) == row['n'] == 4
    assert Image.open(tmp_path / 'g.png').width > 600
    capsys.readouterr()
    assert (
        run(
            'caption',
            parts['llm'],
            whole,
            *common[2:],
            '--targeted',
            'a red circle',
            '--grid',
            tmp_path / 'g.png',
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-2].rstrip(' |').endswith('–')


def test_sqa_command(whole, tmp_path, capsys):
    (tmp_path / 'images' / 'test' / '3').mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'images' / 'test' / '3' / 'image.png')
    problem = {'question': 'Which?', 'choices': ['x', 'y'], 'answer': 1, 'hint': '', 'image': 'image.png'}
    (tmp_path / 'problems.json').write_text(json.dumps({'3': problem}))
    (tmp_path / 'pid_splits.json').write_text(json.dumps({'test': ['3']}))
    assert run('sqa', whole, '--data', tmp_path, '--eps', 8, '--iterations', 2) == 0
    assert 'ScienceQA' in capsys.readouterr().out


@pytest.mark.parametrize(
    'words, message',
    [
        (['vqa', '{run}', '--eps', '0.03'], 'did you mean 7.65'),
        (['vqa', '{run}', '--questions', 'why'], 'must be among what'),
        (['vqa', '{clip}'], 'is no LLaVA'),
        (['pope', '{run}', '--data', 'nowhere'], '--data nowhere'),
        (['caption', '{run}', '--targeted', 'a', '--grid', 'nowhere/x.png'], 'no folder nowhere'),
        (['sqa', '{run}'], '--data'),
        (['vqa', '{run}', '--iterations', '0'], '--iterations 0'),
    ],
)
def test_bad_commands(whole, parts, words, message, capsys):
    with pytest.raises(SystemExit) as e:
        run(*[w.format(run=whole, clip=parts['init']) for w in words])
    assert message in str(e.value) + capsys.readouterr().err
