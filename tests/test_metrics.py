"""Metrics of answers and captions, by hand and beside pycocoevalcap; the published files that they need."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation


# ----------------------------------------------------------------------------------------------- VQA accuracy
@pytest.mark.parametrize(
    'text, normal',
    [
        ('Red.', 'red'),
        ('the  Red\nBall', 'red ball'),
        ('two dogs', '2 dogs'),
        ('None', '0'),
        ('1,000', '1000'),
        ('2.5', '2.5'),
        ('5 p.m.', '5 pm'),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ('couldntve', 'couldntve'),  # the table has what lacks one apostrophe
        ("y'alld've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ('shes', 'shes'),
        ("somebody'd", 'somebodyd'),  # its slip
        ('yes' + '.' * 40, 'yes' + '.' * 8),  # re.UNICODE, 32, stands where re.sub takes a count
        ('its', 'its'),
        ('yes/no', 'yes no'),
        ('yes / no', 'yes no'),
        ('t-shirt', 't shirt'),
        ('black-and-white ', 'black and white'),
        ('A', ''),
        ('what?', 'what'),
        ('"hi"', 'hi'),
    ],
)
def test_normalise_answer(text, normal):
    assert evaluation.normalise_answer(text) == normal


def test_vqa_accuracy():
    def ten(n):
        return ['red'] * n + ['blue'] * (10 - n)

    # one of n annotators who said so is left out n times, one of the others 10 − n times
    assert [evaluation.vqa_accuracy('Red', ten(n)) for n in (0, 1, 2, 3, 4, 10)] == pytest.approx(
        [0, 0.3, 0.6, 0.9, 1, 1]
    )
    assert evaluation.vqa_accuracy('green', ten(3)) == 0
    assert evaluation.vqa_accuracy('two', ['2']) == 1 and evaluation.vqa_accuracy('two', ['3']) == 0


# ------------------------------------------------------------------------------------------------------ CIDEr
def test_cider_equals_pycocoevalcap():
    """On the same tokens: random captions of few words, so that n-grams repeat."""
    from pycocoevalcap.cider.cider import Cider

    g = random.Random(0)
    words = 'a the red blue circle dog on grass there is'.split()

    def say():
        return ' '.join(g.choices(words, k=g.randint(1, 12)))

    references = [[say() for _ in range(g.randint(1, 5))] for _ in range(40)]
    captions = [say() if g.random() < 0.7 else of[0] for of in references]
    ours = evaluation.Cider(references, str.split)
    scores = [ours.score(i, c) for i, c in enumerate(captions)]
    mean, each = Cider().compute_score(
        {i: of for i, of in enumerate(references)}, {i: [c] for i, c in enumerate(captions)}
    )
    assert scores == pytest.approx(list(each), abs=1e-6) and sum(scores) / 40 == pytest.approx(mean, abs=1e-6)
    assert max(scores) > 1


def test_cider_by_hand():
    """No word in common: an n-gram is in one of two images, it weighs log 2; a perfect caption scores 10."""
    cider = evaluation.Cider([['a b c d'], ['e f g h']], str.split)
    assert cider.score(0, 'a b c d') == pytest.approx(10) and cider.score(0, 'e f g h') == 0
    assert cider.score(0, '') == 0
    assert cider.score(0, 'a "b" c dOutput: e') == pytest.approx(10)  # cut as RobustVLM does
    # 1-grams: 3 of 3 in 4: 3/√(3·4); 2-grams: 2/√(2·3), 3-grams 1/√2; one bigram shorter: e^(−1/72)
    assert cider.score(0, 'a b c') == pytest.approx(
        10 / 4 * (3 / 12**0.5 + 2 / 6**0.5 + 1 / 2**0.5) * 2.718281828 ** (-1 / 72), rel=1e-6
    )


# lines, and what COCO's tokenizer, Java's stanford-corenlp 3.4.1, made of each
TOKENS = """\
A dog, isn't it? "Well-known"; the dog's 3.5 bones...
  a dog is n't it well-known the dog 's 3.5 bones
A man can't, won't and cannot say what they're gonna do; I'll bet you've gotta go.
  a man ca n't wo n't and can not say what they 're gon na do i 'll bet you 've got ta go
It is five o'clock, ma'am, said O'Brien; rock 'n' roll of the '90s and 1990's with 'em, y'all.
  it is five o'clock ma'am said o'brien rock 'n' roll of the '90s and 1990 's with 'em y' all
'Twas a 'stop' sign and ‘another’ “one” that isn’t the girl’s, or James'.
  't was a stop sign and another one that is n't the girl 's or james
IT'S a MEN'S room that THEY'RE CLOSING. They should've, she'd say.
  it 's a men 's room that they 're closing they should 've she 'd say
3/4 of a pizza, 1/2 an apple and ½ a pear, 1 1/2 cups, 1½ cups and 2-1/2 inches on 9/11/2001
  3/4 of a pizza 1/2 an apple and 1/2 a pear 1 1/2 cups 1 1/2 cups and 2-1/2 inches on 9/11/2001
The clock reads 12:45, or 5:30pm, or 10 a.m., or 8 P.M.
  the clock reads 12:45 or 5:30 pm or 10 a.m. or 8 p.m.
It is 1,000 people at 3.5% and .5 of -5 degrees (+5).
  it is 1,000 people at 3.5 % and .5 of -5 degrees -lrb- +5 -rrb-
A red,blue and green kite,flying over 3,4,5 men.
  a red blue and green kite flying over 3,4,5 men
The 5th 1990s 30-foot 3-D t-shirt, a two-year-old's.
  the 5th 1990s 30-foot 3-d t-shirt a two-year-old 's
A black-and-white x-ray. A mid-air trick - a jump -- high---up—there.
  a black-and-white x-ray a mid-air trick a jump high up there
100% of $5 for #1 at 7-Eleven & black & white AT&T, at&t R&B
  100 % of $ 5 for # 1 at 7-eleven & black & white at&t at & t r&b
US$1,000 cost €5 or £6 or 7¢ # 5 @ home
  us$ 1,000 cost $ 5 or # 6 or 7 cents # 5 @ home
A man on St. Mary st. and 5th Ave. near Main Rd.
  a man on st. mary st. and 5th ave. near main rd.
Mr. and Mrs. Smith, Dr. Who Jr., Sgt. Pepper vs. the U.S. Army.
  mr. and mrs. smith dr. who jr. sgt. pepper vs. the u.s. army
Bananas, apples, etc. in a U.S.A. shop of Apple Inc.
  bananas apples etc. in a u.s.a. shop of apple inc.
A t.v. and a T.V. in L.A. near Washington D.C., etc.
  a t.v. and a t.v. in l.a. near washington d.c. etc.
Bus no. 5 and No.3, say no. This is fig. 3 of art.
  bus no. 5 and no. 3 say no this is fig. 3 of art
The wash. Near Wash. and miss. or Miss. in the dept. store on Mon. at noon.
  the wash near wash. and miss or miss. in the dept. store on mon. at noon
6 ft. tall, 20 sq. ft. and 3 lbs. in 5 min. by approx. ten.
  6 ft. tall 20 sq. ft. and 3 lbs in 5 min by approx ten
A sign with a K.
  a sign with a k
A person with an I. A plan b. or two, letter A. The end.
  a person with an i a plan b. or two letter a the end
Fire and/or water, black/white, his/her w/o a TV/VCR w/ 24/7
  fire and/or water black/white his/her w/o a tv/vcr w / 24/7
A boy(s) (or so) [sic] {x} sits.
  a boy -lrb- s -rrb- -lrb- or so -rrb- -lsb- sic -rsb- -lcb- x -rcb- sits
Wait...what? No way!! Is it?! Oh .. well . . . then ....
  wait what no way !! is it ?! oh well then
A toilet,wash basin.The end!now of it
  a toilet wash basin.the end!now of it
See www.google.com or http://www.flickr.com/photos/a-b. Mail me@home.com, @me #tag
  see www.google.com or http://www.flickr.com/photos/a-b mail me@home.com, @me #tag
a = b + c * ~ *** this __ is << one >> @@ of ## ----- those --
  a = b + c * ~ *** this __ is << one >> @@ of ## ----- those
A C++ mp3 v2.0 4x4 1080p <unk> under_score,e.g. a word
  a c++ mp3 v2 .0 4x4 1080p <unk> under_score e.g. a word
The café's naïve owner's père-lachaise 20°C
  the café 's naïve owner 's père-lachaise 20 ° c
Toys "R" Us and McDonald's are 5'8" tall
  toys r us and mcdonald 's are 5 8 tall
A non-U.S. street sign (5th/6th Ave.) at 22 3/4 st.
  a non-u.s. street sign -lrb- 5th/6th ave. -rrb- at 22 3/4 st.
"""
LINES = dict(zip(TOKENS.splitlines()[::2], map(str.split, TOKENS.splitlines()[1::2])))


@pytest.mark.parametrize('line', LINES)
def test_tokenise_caption(line):
    assert evaluation.tokenise_caption(line) == LINES[line]
    assert evaluation.tokenise_caption(f' {line}\n') == LINES[line]


@pytest.mark.skipif(not shutil.which('java'), reason='COCO\'s tokenizer is a Java program')
def test_tokenise_caption_equals_pycocoevalcap():
    """Words and marks of the lines above, mixed: in every place, beside each other."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    g, words = random.Random(0), sorted({word for line in LINES for word in line.split()})
    # of these it hangs on the next caption whether the period is kept
    words = [word for word in words if not re.search(r'(?<![\w.])(\w|no|fig|art)\.\W*$', word)]
    images = [[' '.join(g.sample(words, g.randint(1, 12))) for _ in range(4)] for _ in range(600)]
    given = {i: [{'caption': text} for text in [*LINES] * (i == 0) + of] for i, of in enumerate(images)}
    found = {i: [' '.join(text.split()) for text in of] for i, of in PTBTokenizer().tokenize(given).items()}
    ours = {i: [' '.join(evaluation.tokenise_caption(c['caption'])) for c in of] for i, of in given.items()}
    wrong = [(given[i][k], a, b) for i in given for k, (a, b) in enumerate(zip(found[i], ours[i])) if a != b]
    assert not wrong, wrong
    references, captions = {i: of[1:] for i, of in found.items()}, {i: of[:1] for i, of in found.items()}
    mean, _ = Cider().compute_score(references, captions)
    cider = evaluation.Cider([[c['caption'] for c in given[i][1:]] for i in given])
    assert np.mean([cider.score(i, given[i][0]['caption']) for i in given]) == pytest.approx(mean, abs=1e-5)


# ------------------------------------------------------------------------------------------------ POPE, facts
@pytest.mark.parametrize(
    'text, letter',
    [
        ('B', 'B'),
        ('B. mammal', 'B'),
        ('The answer is B.', 'B'),
        ('Well. The answer is B, the bird', 'B'),
        ('The answer is Bob.', 'B'),  # the published pattern's point is any character
        *((text, '') for text in ('(B)', 'B.', 'b', 'F', 'B) mammal', 'Because', 'A cat', '')),
        *((text, '') for text in ('The answer is B', 'The answer is A. The answer is B.')),
    ],
)
def test_option_letter(text, letter):
    assert [of for of in 'ABCDEF' if evaluation.letter_accuracy(text, [of])] == [*letter]


@pytest.mark.parametrize(
    'text, score',
    [
        ('yes, it is', 1),
        ('Yes', 1),
        ('yes. Question: is it? Short answer: no', 1),
        ('yes\tAnswer: no', 1),
        ('yes,it is', 0),  # is cut at a comma with a space alone
        ('yes it is', 0),
        (', yes', 0),
        ('', 0),
    ],
)
def test_an_answer_is_cut_as_robustvlm_does(text, score):
    assert evaluation.vqa_accuracy(text, ['yes'] * 10) == score
    assert evaluation.vqa_accuracy('yes', ['yes, it is'] * 10) == 0  # references are not cut


def test_vqa_accuracy_of_few_references():
    assert evaluation.vqa_accuracy('Red.', ['red', 'red']) == 1
    assert evaluation.vqa_accuracy('red', ['red'] * 3) == 1
    assert evaluation.vqa_accuracy('red', ['red', 'blue']) == 0.5
    assert evaluation.vqa_accuracy('red', ['red'] + ['blue'] * 9) == pytest.approx(0.3)


def test_pope_scores():
    answers = ['Yes, there is.', 'No.', 'there is not. yes', 'yes', 'I cannot say', 'no']
    labels = ['yes', 'yes', 'no', 'no', 'no', 'no']
    found = evaluation.pope_scores(answers, labels)  # said: yes no no yes yes no → tp 1, fp 2, tn 2, fn 1
    assert found == pytest.approx(
        {'accuracy': 0.5, 'precision': 1 / 3, 'recall': 0.5, 'f1': 0.4, 'yes_rate': 0.5}
    )
    told = {
        answer: evaluation.pope_scores([answer], ['no'])['accuracy']
        for answer in ('Yes\nno', 'yes ,no', 'NO')
    }
    assert told == {'Yes\nno': 0, 'yes ,no': 1, 'NO': 0}  # words are what is between spaces
    assert evaluation.pope_scores(['no'], ['no']) == {
        'accuracy': 1,
        'precision': 0,
        'recall': 0,
        'f1': 0,
        'yes_rate': 0,
    }


def test_names_facts():
    assert evaluation.names_facts('a red circle.', 'red', 'circle') == (True, True)
    assert evaluation.names_facts('a red or blue circle', 'red', 'circle') == (False, True)
    assert evaluation.names_facts('a triangle', 'red', 'circle') == (False, False)


# ------------------------------------------------------------------------------------------------------ files
def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


ASKED = '{}\nAnswer the question using a single word or phrase.'


def test_vqa_files(tmp_path):
    picture(tmp_path / 'COCO_val2014_000000000042.jpg')
    picture(tmp_path / 'abc.jpg')
    asked = {
        'data_subtype': 'val2014',
        'questions': [{'image_id': 42, 'question': 'what?', 'question_id': 7}],
    }
    (tmp_path / 'q.json').write_text(json.dumps(asked))
    (tmp_path / 'a.json').write_text(
        json.dumps({'annotations': [{'question_id': 7, 'answers': [{'answer': 'red'}] * 10}]})
    )
    found = evaluation.vqa_set(str(tmp_path / 'q.json'), 'val', str(tmp_path / 'a.json'), str(tmp_path))
    assert found == [
        evaluation.Question(
            tmp_path / 'COCO_val2014_000000000042.jpg',
            ASKED.format('what?'),
            ['red'] * 10,
            '7',
            ('maybe', 'Word'),
        )
    ]
    (tmp_path / 't.json').write_text(
        json.dumps(
            {'data': [{'image_id': 'abc', 'question': 'which?', 'question_id': 1, 'answers': ['a', 'b']}]}
        )
    )
    found = evaluation.vqa_set(str(tmp_path / 't.json'), 'val', '', str(tmp_path))
    assert found == [
        evaluation.Question(tmp_path / 'abc.jpg', ASKED.format('which?'), ['a', 'b'], '1', ('maybe', 'Word'))
    ]
    for file, answers, root, message in [
        ('q.json', '', tmp_path, '--annotations FILE'),
        ('q.json', 'a.json', tmp_path / 'x', 'no image .*--image_root'),
        ('a.json', '', tmp_path, 'neither VQAv2'),
        ('nowhere', '', tmp_path, 'cannot read'),
    ]:
        with pytest.raises(SystemExit, match=message):
            evaluation.vqa_set(
                str(tmp_path / file), 'val', str(tmp_path / answers) if answers else '', str(root)
            )
    # without data_subtype it is the folder's name that counts; names of images are TextVQA's and VizWiz'
    picture(tmp_path / 'val2014' / 'COCO_val2014_000000000042.jpg')
    for image, file in ((42, 'COCO_val2014_000000000042.jpg'), ('003a', '003a.jpg'), ('b.png', 'b.png')):
        picture(tmp_path / 'val2014' / file)
        rows = [{'image_id': image, 'question': 'what?', 'question_id': 7}]
        (tmp_path / 'b.json').write_text(json.dumps({'questions': rows}))
        files = [str(tmp_path / name) for name in ('a.json', 'val2014')]
        assert (
            evaluation.vqa_set(str(tmp_path / 'b.json'), '', *files)[0].image == tmp_path / 'val2014' / file
        )
    (tmp_path / 'b.json').write_text(json.dumps({'questions': [rows[0] | {'image_id': '../abc.jpg'}]}))
    with pytest.raises(SystemExit, match='b.json: ValueError: .*leads out of the folder'):
        evaluation.vqa_set(str(tmp_path / 'b.json'), '', *files)
    (tmp_path / 'a.json').write_text('{}')
    with pytest.raises(SystemExit, match="--annotations .*a.json: KeyError: 'annotations'"):
        evaluation.vqa_set(str(tmp_path / 'q.json'), 'val', str(tmp_path / 'a.json'), str(tmp_path))
    (tmp_path / 'a.json').write_text(json.dumps({'annotations': []}))
    with pytest.raises(SystemExit, match='--annotations.*: question 7, .* has no answers'):
        evaluation.vqa_set(str(tmp_path / 'q.json'), 'val', str(tmp_path / 'a.json'), str(tmp_path))


def test_easyvqa_questions():
    found = evaluation.vqa_set('easyvqa', 'test')
    assert len(found) == 9673 and sum(q.answers[0] not in ('yes', 'no') for q in found) == 2537
    even = [found[i] for i in data.balanced([(q.text, *q.answers) for q in found])]
    assert 2400 < len(even) < 2600
    for text in {q.text for q in even}:
        answers = [q.answers[0] for q in even if q.text == text]
        assert answers.count('yes') == answers.count('no') > 0
    assert [q.name for q in even] == [q.name for q in evaluation.pope_set('easyvqa', 'test')]
    val = {q.image for q in evaluation.vqa_set('easyvqa', 'val')}
    assert val and not val & {q.image for q in evaluation.vqa_set('easyvqa', 'train')}


def test_caption_files(tmp_path):
    for name in ('x/1.jpg', '2.jpg'):
        picture(tmp_path / name)
    karpathy = {
        'images': [
            {
                'filepath': 'x',
                'filename': '1.jpg',
                'split': 'test',
                'sentences': [{'raw': 'A dog.'}, {'raw': 'dog'}],
            },
            {'filename': '2.jpg', 'split': 'restval', 'sentences': [{'raw': 'A cat.'}]},
        ]
    }
    (tmp_path / 'k.json').write_text(json.dumps(karpathy))

    def load(file, split):
        return evaluation.reference_set(str(tmp_path / file), split, str(tmp_path))[0]

    def of(found):
        return [(q.answers, q.image) for q in found]

    assert of(load('k.json', 'test')) == [(['A dog.', 'dog'], tmp_path / 'x' / '1.jpg')]
    assert of(load('k.json', 'train')) == [(['A cat.'], tmp_path / '2.jpg')]
    coco = {
        'images': [{'id': 5, 'file_name': '2.jpg'}],
        'annotations': [{'image_id': 5, 'caption': 'a'}, {'image_id': 5, 'caption': 'b'}],
    }
    (tmp_path / 'c.json').write_text(json.dumps(coco))
    assert of(load('c.json', 'val')) == [(['a', 'b'], tmp_path / '2.jpg')]
    for text, message in (
        ('{"images": [{}]}', 'KeyError'),
        ('[]', 'expected a JSON object|TypeError'),
        ('{', 'cannot read'),
        (json.dumps(karpathy).replace('x', 'y'), 'no image'),
        (json.dumps(karpathy).replace('"x"', '".."'), 'leads out of the folder'),
        (
            json.dumps({'images': karpathy['images'][:1]}).replace(
                '[{"raw": "A dog."}, {"raw": "dog"}]', '[]'
            ),
            'no answers',
        ),
        (json.dumps({'images': []}), 'no image of --split test; it has none'),
        (json.dumps({'images': [], 'annotations': []}), 'no image of --split'),
    ):
        (tmp_path / 'bad.json').write_text(text)
        with pytest.raises(SystemExit, match=message):
            load('bad.json', 'test')
    with pytest.raises(SystemExit, match='no image of --split val; it has restval, test'):
        load('k.json', 'val')
    # COCO's file names no split, so no row does
    splits = [
        evaluation.reference_set(str(tmp_path / f), 'test', str(tmp_path))[1] for f in ('k.json', 'c.json')
    ]
    assert splits == ['test', '']


def test_pope_files(tmp_path):
    picture(tmp_path / '1.jpg')
    row = {'question_id': 1, 'image': '1.jpg', 'text': 'Is there a dog in the image?', 'label': 'yes'}

    def load(rows):
        return (tmp_path / 'p.json').write_text('\n'.join(map(json.dumps, rows))) and evaluation.pope_set(
            str(tmp_path / 'p.json'), 'test', str(tmp_path)
        )

    assert load([row, row | {'label': 'no'}])[1] == evaluation.Question(
        tmp_path / '1.jpg', ASKED.format(row['text']), ['no'], '1', ('yes',)
    )
    for bad, message in (
        (row | {'label': 'maybe'}, "'maybe'; must be yes or no"),
        (row | {'image': '2.jpg'}, 'no image'),
        (row | {'image': '../1.jpg'}, 'leads out of the folder'),
        ({}, 'KeyError'),
    ):
        with pytest.raises(SystemExit, match=message):
            load([bad])


def test_pope_as_llava_has_it(tmp_path):
    """Its file has numbers of its own, "imange" put right, the words for a short answer, and no labels."""
    picture(tmp_path / '1.jpg')
    asked = [('random', 'a dog', 'yes'), ('popular', 'a cat', 'no'), ('random', 'an oven', 'no')]
    rows = [
        {'question_id': 20000000 + i, 'image': '1.jpg', 'category': kind}
        | {'text': ASKED.format(f'Is there {what} in the image?')}
        for i, (kind, what, _) in enumerate(asked)
    ]

    def write(file, rows):
        (tmp_path / file).write_text('\n'.join(map(json.dumps, rows)))

    for kind in ('random', 'popular'):
        own = [(what, label) for k, what, label in asked if k == kind]
        texts = [{'text': f'Is there {what} in the imange?', 'label': label} for what, label in own]
        write(
            f'coco_pope_{kind}.json', [{'question_id': i, 'image': '1.jpg'} | t for i, t in enumerate(texts)]
        )
    write('llava_pope_test.jsonl', rows)
    found = evaluation.pope_set(str(tmp_path / 'llava_pope_test.jsonl'), '', str(tmp_path))
    assert [q.answers for q in found] == [['yes'], ['no'], ['no']]
    assert [(q.text, q.name) for q in found] == [(row['text'], str(row['question_id'])) for row in rows]
    for bad, message in (
        ([rows[2]], 'question 20000002 is not the same as in .*coco_pope_random.json'),
        ([*rows, rows[1]], 'pop from empty list'),
        ([rows[0] | {'category': 'odd'}], 'cannot read .*coco_pope_odd.json'),
    ):
        write('llava_pope_test.jsonl', bad)
        with pytest.raises(SystemExit, match=message):
            evaluation.pope_set(str(tmp_path / 'llava_pope_test.jsonl'), '', str(tmp_path))


@pytest.mark.parametrize('command', ['vqa', 'pope'])
def test_a_file_of_questions_has_no_split(tmp_path, monkeypatch, command):
    """--split names nothing in it, so no row may say that it was measured on 'test'."""
    picture(tmp_path / 'a.jpg')
    q = {
        'question_id': 1,
        'image': 'a.jpg',
        'image_id': 'a',
        'text': 'Is it?',
        'question': 'Is it?',
        'label': 'yes',
    }
    text = json.dumps({'data': [q | {'answers': ['yes']}]} if command == 'vqa' else q)
    (tmp_path / 'q.json').write_text(text)
    given = [command, 'DIR', '--data', str(tmp_path / 'q.json'), '--image_root', str(tmp_path)]
    monkeypatch.setattr(evaluation, 'ask', lambda *a, **how: ({0.0: {0: ('yes', 1.0)}}, {}))
    report = evaluation.parse(given).run(evaluation.parse(given))
    assert {r['split'] for r in report.rows} == {''} and 'split –' in report.title


def test_scienceqa(tmp_path):
    picture(tmp_path / 'images' / 'test' / '3' / 'image.png')
    problem = {
        'question': 'Which?',
        'choices': ['x', 'y'],
        'answer': 1,
        'hint': 'Look.',
        'image': 'image.png',
    }
    (tmp_path / 'problems.json').write_text(json.dumps({'3': problem, '4': problem | {'image': None}}))
    (tmp_path / 'pid_splits.json').write_text(json.dumps({'test': ['3', '4'], 'minitest': ['3']}))
    (found,) = evaluation.sqa_set(str(tmp_path), 'test')
    assert (
        found.towards == ('A',)
        and found.answers == ['B']
        and found.text
        == (
            "Context: Look.\nQuestion: Which?\nOptions: (A) x (B) y\n"
            "Answer with the option's letter from the given choices directly."
        )
    )
    with pytest.raises(SystemExit, match='--split val: .*has test'):
        evaluation.sqa_set(str(tmp_path), 'val')
    for change, message in (
        (
            {'split': 'test', 'choices': ['x ', 'y  ']},
            '',
        ),  # LLaVA's conversion strips, and minitest is in test
        ({'choices': []}, r'problem 3\)'),
        ({'answer': -1}, 'KeyError: -1'),
        ({'image': '../../../../x.png'}, 'leads out of the folder'),
    ):
        (tmp_path / 'problems.json').write_text(json.dumps({'3': problem | {'split': 'test'} | change}))
        if not message:
            assert "(A) x (B) y\nAnswer" in evaluation.sqa_set(str(tmp_path), 'minitest')[0].text
            continue
        with pytest.raises(SystemExit, match=message):
            evaluation.sqa_set(str(tmp_path), 'minitest')
