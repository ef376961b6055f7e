"""Stage 2: the language model, LLaVA and their files beside transformers', prompts, and bad input."""

import itertools
import json
import math
import random
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import environment
from PIL import Image

import clip_adv
import data
import llava_adv

LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
LLAMA3 |= {'original_max_position_embeddings': 32, 'rope_theta': 500000.0}
SMALL = dict(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=4, max_position_embeddings=256)
SMALL |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
KINDS = {
    'llama': {},
    'gqa': dict(num_key_value_heads=2),
    'tied': dict(tie_word_embeddings=True, num_key_value_heads=1),
    'llama3': dict(rope_parameters=LLAMA3),
    'linear': dict(rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 10000.0}),
    'wide heads': dict(head_dim=16),
    'biases': dict(attention_bias=True, mlp_bias=True),
    'qwen2': dict(num_key_value_heads=2),
}


def tokenizer() -> data.LLMTokenizer:
    return data.train_llm_tokenizer(['what color is the circle?', 'a red circle', 'USER: ASSISTANT:'], 300)


def language_model(kind: str):
    """A language model of transformers with random weights (biases and norms, too)."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == 'qwen2':
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL | KINDS[kind]))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | KINDS[kind]))
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    return model.eval()


def saved(model, place, **how):
    model.save_pretrained(place, **how)
    for name, text in tokenizer().files(256).items():
        (place / name).write_text(text)
    return place


def ids(n=2, length=40):
    return torch.randint(5, 300, (n, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------- beside transformers
@pytest.mark.parametrize('kind', KINDS)
def test_llama_equals_transformers(tmp_path, kind):
    """Logits and the gradient with respect to the embeddings, of every position and of the last ones only."""
    theirs = language_model(kind)
    ours, _ = llava_adv.load_llm(str(saved(theirs, tmp_path)), torch.float32)
    x = theirs.get_input_embeddings()(ids()).detach().requires_grad_()
    z = ours.model.embed_tokens(ids()).detach().requires_grad_()
    a, b = theirs(inputs_embeds=x).logits, ours.lm_head(ours(z))
    assert (a - b[..., :320]).abs().max() <= 1e-4 * a.abs().max()
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    (g,) = torch.autograd.grad((a * weights).sum(), x)
    (h,) = torch.autograd.grad((b[..., :320] * weights).sum(), z)
    assert (g - h).abs().max() <= 1e-4 * g.abs().max()
    late = ours.lm_head(ours(z, start=33))
    assert late.shape[1] == 7 and torch.allclose(late, b[:, 33:], atol=1e-5)


@pytest.mark.parametrize('kind', ['gqa', 'llama3', 'qwen2'])
def test_generation_equals_transformers(tmp_path, kind):
    """Token by token with a cache; prompts of different lengths in one batch give what each gives alone."""
    theirs = language_model(kind)
    ours, tok = llava_adv.load_llm(str(saved(theirs, tmp_path)), torch.float32)
    model = connected(ours, tok.image)
    prompts = [row[:n].tolist() for row, n in zip(ids(3), (40, 13, 27), strict=True)]
    together = llava_adv.generate(model, torch.empty(0, 3, 1, 1), prompts, 12, {1})
    for prompt, answer in zip(prompts, together, strict=True):
        how = dict(attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12)
        expected = theirs.generate(torch.tensor([prompt]), do_sample=False, **how)[0, len(prompt) :].tolist()
        assert answer == expected[: expected.index(1)] if 1 in expected else answer == expected
        assert llava_adv.generate(model, torch.empty(0, 3, 1, 1), [prompt], 12, {1}) == [answer]


def tower(**vision):
    """(image tower, clip_cfg, preprocess)"""
    vision = dict(image_size=16, patch_size=4, width=32, layers=3, head_width=16, **vision)
    text = dict(width=16, heads=2, layers=1, vocab_size=50, context_length=8)
    model_cfg = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    config = {'model_cfg': model_cfg, 'preprocess_cfg': clip_adv.IMAGENET}
    with clip_adv.seeded(3):
        model = clip_adv.CLIP(*clip_adv.from_open_clip(config, 'a test'))
    return model.visual, model.cfg, model.preprocess


def connected(llm, image_id):
    visual = tower()
    with clip_adv.seeded(0):
        return llava_adv.LLaVA(*visual, llm, image_id)


def llava(place, kind='gqa', **vision):
    """A LLaVA of ours on a language model of transformers."""
    llm, tok = llava_adv.load_llm(str(saved(language_model(kind), place)), torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        visual, clip_cfg, preprocess = tower(**vision)
        for p in visual.parameters():
            p.data += 0.05 * torch.randn(p.shape)
        model = llava_adv.LLaVA(visual, clip_cfg, preprocess, llm, tok.image)
    return model.eval(), tok


def samples(model, tok):
    """With an image and without, with different lengths and numbers of supervised tokens."""
    prompt = data.Prompt(tok, 'v1', model.image_tokens, 512)
    two = [('<image>\nwhat color is the circle?', 'red'), ('is it?', 'a red circle, yes')]
    chats = [data.Chat('an image', two, ''), data.Chat(None, [('what is red?', 'circle')], '')]
    chats += [data.Chat('an image', [('<image>\nwhat?', 'no')], '')]
    g = torch.Generator().manual_seed(5)
    images = [torch.randint(256, (3, 16, 16), generator=g).byte() if c.image else None for c in chats]
    return [data.Sample(images[i], *prompt(c), i) for i, c in enumerate(chats)]


@pytest.mark.parametrize('kind', ['gqa', 'tied', 'qwen2'])
def test_llava_equals_transformers(tmp_path, kind):
    """What is exported opens in transformers with no key too many or too few; loss, and its gradient in the
    pixels, are equal. The loss of ours comes from the supervised positions alone."""
    from transformers import LlavaForConditionalGeneration

    model, tok = llava(tmp_path, kind)
    out = tmp_path / 'out'
    out.mkdir()
    llava_adv.save_llava(model, tok, out, 512)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    batch = data.collate(samples(model, tok), tok.pad)
    x = (batch.images.float() / 255).requires_grad_()
    labels = torch.full_like(batch.ids, -100)
    labels[batch.rows, batch.columns + 1] = batch.targets
    inputs = dict(input_ids=batch.ids, attention_mask=(batch.ids != tok.pad).long(), labels=labels)
    loss = theirs.eval()(pixel_values=(x - model.visual.mean) / model.visual.std, **inputs).loss
    ours = model(x, batch).sum() / len(batch.targets)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    a, b = torch.autograd.grad(loss, x)[0], torch.autograd.grad(ours, x)[0]
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    again, tok2 = llava_adv.load_llava(str(out))
    assert torch.equal(again(x, batch), model(x, batch)) and tok2.backend.to_str() == tok.backend.to_str()
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in model.state_dict().items())


def test_adapters_are_merged_when_saved(tmp_path):
    model, tok = llava(tmp_path)
    cfg = llava_adv.Config(lora_r=4, lora_alpha=8.0)
    llava_adv.trainable(model, cfg, 'B')
    batch = data.collate(samples(model, tok), tok.pad)
    x = batch.images.float() / 255
    before = model(x, batch)
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            p.data = 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(6))
    changed = model(x, batch)
    assert (changed - before).abs().min() > 1e-2
    llava_adv.save_llava(model, tok, tmp_path, 512)
    again, _ = llava_adv.load_llava(str(tmp_path))
    assert torch.allclose(again(x, batch), changed, rtol=1e-4)


def test_what_is_trained(tmp_path):
    """A: the projector. B: adapters on every linear layer of the LLM but its head, the projector, and the
    tower without its last block."""
    model, _ = llava(tmp_path)
    llava_adv.trainable(model, llava_adv.Config(), 'A')

    def trained():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    assert trained() == {n for n, _ in model.named_parameters() if n.startswith('projector.')}
    groups = llava_adv.trainable(model, llava_adv.Config(lora_r=2, lr=1, lr_projector=2, lr_tower=3), 'B')
    assert [g['peak'] for g in groups] == [1, 2, 3]
    names = trained()
    assert sum('lora_' in n for n in names) == 3 * 7 * 2
    llm = [n for n in names if n.startswith('llm.')]
    assert not any(part in n for n in llm for part in ('lm_head', 'embed_tokens', 'norm'))
    visual = {n for n, _ in model.named_parameters() if n.startswith('visual.')}
    assert 'visual.conv1.weight' in names
    assert visual - names == {n for n in visual if 'resblocks.2' in n or 'ln_post' in n} != set()


def test_the_last_block_is_not_run(tmp_path):
    model, tok = llava(tmp_path)
    batch = data.collate(samples(model, tok), tok.pad)
    before = model(batch.images.float() / 255, batch)
    for p in [*model.visual.transformer.resblocks[-1].parameters(), *model.visual.ln_post.parameters()]:
        p.data.fill_(float('nan'))
    assert torch.equal(model(batch.images.float() / 255, batch), before)


def test_dropout_belongs_to_the_sample():
    """Same mask alone and in a batch, for a part of the tokens and for all; the share is p; layers and
    samples differ."""
    keys = torch.tensor([3, -7, 2**31 - 5], dtype=torch.int32)
    x = torch.ones(3, 50, 64)
    whole = llava_adv.drop(x, keys, 0, 0.3)
    assert torch.equal(whole[1:2], llava_adv.drop(x[1:2], keys[1:2], 0, 0.3))
    assert torch.equal(whole[:, 20:], llava_adv.drop(x[:, 20:], keys, 20, 0.3))
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    kept = whole != 0
    for share in (kept.float().mean(), *kept.float().mean((1, 2))):
        assert share == pytest.approx(0.7, abs=0.03)
    for a, b in (
        (kept[0], kept[1]),
        (kept[0, :-1], kept[0, 1:]),
        (kept[0, :, :-1], kept[0, :, 1:]),
        (kept, llava_adv.drop(x, keys + 12345, 0, 0.3) != 0),
    ):
        assert (a == b).float().mean() == pytest.approx(0.58, abs=0.03)  # .7² + .3²: independent


def test_checkpointing_changes_nothing(tmp_path):
    model, tok = llava(tmp_path)
    llava_adv.trainable(model, llava_adv.Config(lora_r=2), 'B')
    batch = data.collate(samples(model, tok), tok.pad)
    gradients = []
    for on in (False, True):
        model.llm.checkpointing = on
        model.zero_grad()
        model(batch.images.float() / 255, batch, batch.keys).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ----------------------------------------------------------------------------------- files of language models
@pytest.mark.parametrize('how', ['sharded', 'bin', 'sharded bin'])
def test_every_kind_of_weights(tmp_path, how):
    theirs = language_model('gqa')
    place = saved(theirs, tmp_path, **(dict(max_shard_size='40KB') if how == 'sharded' else {}))
    if how != 'sharded':
        weights = theirs.state_dict()
        (place / 'model.safetensors').unlink()
        names = sorted(weights)
        if how == 'bin':
            torch.save(weights, place / 'pytorch_model.bin')
        else:
            parts = {'pytorch_model-1.bin': names[:10], 'pytorch_model-2.bin': names[10:]}
            for file, part in parts.items():
                torch.save({n: weights[n] for n in part}, place / file)
            index = {'weight_map': {n: file for file, part in parts.items() for n in part}}
            (place / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    else:
        assert len(list(place.glob('model-*.safetensors'))) > 2
    ours, _ = llava_adv.load_llm(str(place), torch.float32)
    assert torch.allclose(theirs(ids()).logits, ours.lm_head(ours(ours.model.embed_tokens(ids()))), atol=1e-4)


def test_loading_needs_no_second_copy(tmp_path):
    """Peak anonymous memory above the start: at most 1.2 × the parameters in the target dtype, here half of
    the stored one."""
    from safetensors.torch import save_file

    sizes = dict(vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=16)
    config = dict(SMALL, model_type='llama') | sizes
    with torch.device('meta'):
        shapes = {n: p.shape for n, p in llava_adv.Llama(config).named_parameters()}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    names = sorted(shapes)
    index = {}
    for number in range(4):
        part = {n: torch.zeros(shapes[n]) for n in names[number::4]}
        save_file(part, tmp_path / f'model-{number}.safetensors')
        index |= {n: f'model-{number}.safetensors' for n in part}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    for name, text in tokenizer().files(256).items():
        (tmp_path / name).write_text(text)
    code = f'''
import threading, time, torch, llava_adv
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
peak, stop, start = 0, False, anonymous()
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(.002)
t = threading.Thread(target=watch); t.start()
llm, _ = llava_adv.load_llm({str(tmp_path)!r}, torch.bfloat16)
stop = True; t.join()
assert all(p.dtype == torch.bfloat16 for p in llm.parameters())
print((peak - start) / (2 * {parameters}))
'''
    done = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.2, done.stdout


def test_weights_that_do_not_fit(tmp_path):
    place = saved(language_model('gqa'), tmp_path)
    config = json.loads((place / 'config.json').read_text())
    for change, message in [
        (dict(num_hidden_layers=4), r'model.layers.3.mlp.down_proj.weight: missing, \(48, 80\) expected'),
        (dict(num_hidden_layers=2), r'model.layers.2.input_layernorm.weight: surplus, \(48,\)'),
        (
            dict(intermediate_size=64),
            r'gate_proj.weight: torch.float32 \(80, 48\), floating point \(64, 48\) ex',
        ),
        (dict(model_type='gemma'), "model_type is 'gemma'; supported: .*'llama', 'qwen2'"),
        (dict(hidden_act='gelu'), 'hidden_act'),
        (dict(rope_parameters={'rope_type': 'yarn', 'factor': 2}), 'rope scaling.*yarn'),
        (dict(num_key_value_heads=3), '3 key heads'),
        (dict(hidden_size='128'), "config.json.hidden_size is '128'; supported: int, 1 … a million"),
        (dict(num_attention_heads=0), 'num_attention_heads is 0; supported: int'),
        (dict(num_hidden_layers=10**9), 'num_hidden_layers is 1000000000; supported: int, 1 … 1000'),
        (dict(rms_norm_eps=10**400), 'rms_norm_eps is 10{70,}; supported: float'),
        (dict(rope_parameters=['linear']), 'config.json: rope scaling: ValueError'),
        (dict(rope_parameters={'rope_type': 'linear', 'factor': '2'}), 'rope scaling: TypeError'),
        (dict(rope_parameters={'rope_type': 'linear', 'factor': 0}), "'factor': 0.* do not fit"),
        (dict(eos_token_id=['</s>']), 'tokens and chat_template of tokenizer_config.json: TypeError'),
    ]:
        (place / 'config.json').write_text(json.dumps(config | change))
        with pytest.raises(SystemExit, match=message):
            llava_adv.load_llm(str(place), torch.float32)
    (place / 'config.json').write_text(json.dumps(config))
    (place / 'model.safetensors').write_bytes(b'torn')
    with pytest.raises(SystemExit, match='cannot read .*model.safetensors'):
        llava_adv.load_llm(str(place), torch.float32)
    (place / 'model.safetensors').unlink()
    with pytest.raises(SystemExit, match='has no weights'):
        llava_adv.load_llm(str(place), torch.float32)
    with pytest.raises(SystemExit, match='no such file or directory, and no repository id'):
        llava_adv.load_llm(str(place / 'nowhere'), torch.float32)


def test_tokenizers_without_special_tokens(tmp_path):
    place = saved(language_model('gqa'), tmp_path)
    files = [place / name for name in ('config.json', 'tokenizer_config.json')]
    config, settings = (json.loads(file.read_text()) for file in files)

    def less(file, content, *names):
        file.write_text(json.dumps({k: v for k, v in content.items() if k not in names}))

    less(files[0], config, 'bos_token_id', 'eos_token_id', 'pad_token_id')
    less(files[1], settings, 'bos_token', 'pad_token')
    tok = data.read_llm_tokenizer(place)  # no start: none is written; no padding: it gets one
    assert tok.bos is None and tok.pad is not None
    assert data.Prompt(tok, 'v1', 4, 99).text([('a', None)])[0][0].startswith('A chat')
    less(files[1], settings, 'eos_token')
    with pytest.raises(SystemExit, match='eos_token None is not in the tokenizer; see tokenizer_config.json'):
        data.read_llm_tokenizer(place)
    for number in (-1, None, 10**9):  # −1: none, in configurations of the first Llamas
        files[0].write_text(json.dumps(dict(pad_token_id=number)))
        files[1].write_text(json.dumps({k: v for k, v in settings.items() if k != 'pad_token'}))
        assert data.read_llm_tokenizer(place).pad_token == '<pad>'
    files[1].write_text(json.dumps(settings | {'bos_token': '<nothing>'}))
    with pytest.raises(SystemExit, match="bos_token '<nothing>'"):
        data.read_llm_tokenizer(place)
    (place / 'tokenizer.json').unlink()
    with pytest.raises(SystemExit, match='neither tokenizer.json nor tokenizer.model'):
        data.read_llm_tokenizer(place)


BEGIN, COLOURS = ('what color is', 'is there a', 'USER: a'), ('red', 'blue', 'green', 'yellow')
WORDS = [f'{a} {b} {c}' for a in BEGIN for b in COLOURS for c in ('circle', 'triangle?', 'shape.')]


def sentencepiece_model(place, **how):
    """A tokenizer.model as Llama's: bytes, digits one by one, and runs of up to 16 spaces that all have one
    score. They are written behind the others: field 1 of the model, with the piece and its score in it."""
    import sentencepiece

    (place / 'text').write_text('\n'.join(WORDS * 20))
    llama = dict(model_type='bpe', byte_fallback=True, split_digits=True, normalization_rule_name='identity')
    llama |= dict(vocab_size=340, remove_extra_whitespaces=False, minloglevel=2) | how
    places = dict(input=str(place / 'text'), model_prefix=str(place / 'tokenizer'))
    sentencepiece.SentencePieceTrainer.train(**places, **llama)
    with open(place / 'tokenizer.model', 'ab') as file:
        for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11):  # in the order of Mistral's
            piece = '▁'.encode() * length
            piece = b'\n' + bytes([len(piece)]) + piece + b'\x15' + struct.pack('<f', -1e9)
            file.write(b'\n' + bytes([len(piece)]) + piece)
    return sentencepiece.SentencePieceProcessor(model_file=str(place / 'tokenizer.model'))


def read_with(place, **settings):
    settings = {'bos_token': '<s>', 'eos_token': {'content': '</s>'}} | settings
    (place / 'tokenizer_config.json').write_text(json.dumps(settings))
    return data.read_llm_tokenizer(place)


def odd_texts(n):
    parts = [
        'what color',
        'triangle?',
        'USER: a',
        '1234',
        '\n',
        '\t',
        'üñ☃',
        'e\u0301',
        '😀',
        '\xa0',
        '<s',
        '▁',
        'x',
    ]
    g = random.Random(0)
    parts += [' ' * length for length in range(1, 90, 3)]
    return [''.join(g.choice(parts) for _ in range(g.randint(1, 12))) for _ in range(n)]


def test_sentencepiece(tmp_path):
    """A Llama tokenizer.model reads as sentencepiece does, with special tokens cut out of the text first."""
    sp = sentencepiece_model(tmp_path)
    tok = read_with(tmp_path)
    for text in ['what color is the circle?', 'a  blue\nüñ☃ 123', 'triangle', 'red red', *odd_texts(300)]:
        found, spans = tok.encode(text)
        assert found == sp.encode(text) and spans[-1][1] == len(text)
        assert tok.decode(found) == sp.decode(found).strip()
    assert all(tok.encode('a' + ' ' * n)[0] == sp.encode('a' + ' ' * n) for n in range(200))
    found, _ = tok.encode('<s>what color</s>')
    assert found == [1, *sp.encode('what color'), 2]
    assert tok.image == 354 and tok.pad == 355 and tok.encode('<image>')[0] == [354]


@pytest.mark.parametrize('start', [True, False])
@pytest.mark.parametrize('legacy', [True, False, None])
def test_what_follows_a_special_token(tmp_path, legacy, start):
    """legacy, or nothing said of it: a space is put before it, as transformers 4 does; not legacy: none, and
    without add_prefix_space none before the text either. Equal to LlamaTokenizer of transformers 5, which is
    never legacy, and, by sentencepiece, to that of 4, but for a text that begins with a space: that puts a
    second one there."""
    from transformers import AddedToken, LlamaTokenizer

    sp = sentencepiece_model(tmp_path)
    ends = dict(content='<end>', lstrip=True, rstrip=True, special=True)
    added = {
        '354': ends,
        '355': dict(content='<|x|>', normalized=True),
        '2': dict(content='</s>', rstrip=True),
    }
    said = {} if legacy is None else dict(legacy=legacy)
    tok = read_with(tmp_path, add_prefix_space=start, added_tokens_decoder=added, **said)
    model = json.loads(tok.backend.to_str())['model']
    how = dict(legacy=bool(legacy), add_prefix_space=start, merges=[tuple(m) for m in model['merges']])
    theirs = LlamaTokenizer(vocab=model['vocab'], **how)
    for token in added.values():
        theirs.add_tokens([AddedToken(**token | dict(normalized=False))])
    special, texts = ['</s>', '<s>', '<end>', '  <end> ', '<|x|>', ''], odd_texts(900)
    for i in range(0, 900, 3):
        before, *after = texts[i : i + 3]
        text = before.lstrip() + special[i % 5] + after[0] + special[i % 6] + after[1]
        found = tok.encode(text)[0]
        if not (legacy is not False and start):
            assert found == theirs.encode(text, add_special_tokens=False), text
        parts = re.split(r'(</s>\s*|<s>|\s*<end>\s*|<\|x\|>)', text)
        expected = []
        for number, part in enumerate(parts):
            if number % 2:
                expected.append(tok.backend.token_to_id(part.strip()))
            elif part and start and (legacy is not False or number == 0):
                expected += sp.encode(part)
            elif part:  # behind a piece that joins with nothing
                expected += sp.encode('?' + part)[len(sp.encode('?')) :]
        assert found == expected or text.startswith('▁'), text


def test_tokenizer_models_that_are_not_like_llamas(tmp_path):
    """Would be cut otherwise than by sentencepiece: refused; so are added tokens that cannot have their ids,
    and files that are no tokenizers."""
    for how in (
        dict(model_type='unigram', vocab_size=285),
        dict(normalization_rule_name='nmt_nfkc'),
        dict(remove_extra_whitespaces=True),
        dict(add_dummy_prefix=False),
        dict(user_defined_symbols=['colour']),
    ):
        sentencepiece_model(tmp_path, **how)
        with pytest.raises(SystemExit, match="tokenizer.model: no BPE with Llama's settings"):
            read_with(tmp_path)
    sentencepiece_model(tmp_path)
    for added, message in (
        ({'356': dict(content='<x>')}, 'added_tokens_decoder has the id 356; ids must follow'),
        ({'354': dict(lstrip=True)}, "tokenizer_config.json: KeyError: 'content'; expected"),
        ([5], 'tokens and chat_template of tokenizer_config.json: AttributeError'),
    ):
        with pytest.raises(SystemExit, match=message):
            read_with(tmp_path, added_tokens_decoder=added)
    whole = json.loads(tokenizer().files(99)['tokenizer.json'])
    whole['model']['continuing_subword_prefix'] = '../..'
    for text in ('{', '[]', '[' * 100_000, '{}', json.dumps(whole)):  # the last makes the library panic
        (tmp_path / 'tokenizer.json').write_text(text)
        with pytest.raises(
            SystemExit, match='error: cannot read the tokenizer .*tokenizer.json: .*; expected'
        ):
            read_with(tmp_path)


# ---------------------------------------------------------------------------------------------------- prompts
def test_prompts_and_what_is_supervised():
    tok = tokenizer()
    chat = data.Chat('x', [('<image>\nwhat color?', 'red'), ('sure?', 'yes')], '')

    def read(style):
        out, labels = data.Prompt(tok, style, 3, 999)(chat)
        predicted = [token for token, label in zip(out, labels, strict=True) if label]
        return tuple(tok.backend.decode(tokens, skip_special_tokens=False) for tokens in (out, predicted))

    turns = 'USER: <image><image><image>\nwhat color? ASSISTANT: red</s>USER: sure? ASSISTANT: yes</s>'
    assert read('v1') == (f'<s>{data.V1_SYSTEM} {turns}', ' red</s> yes</s>')
    assert read('plain') == ('<s><image><image><image>red\n', 'red\n')
    assert read('chat') == (f'<s>{turns}', ' red</s> yes</s>')
    tok.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert read('chat')[1] == 'red</s>yes</s>'
    tok.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(SystemExit, match='template of the LLM ends in TemplateError: no; use --prompt v1'):
        read('chat')
    tok.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(SystemExit, match="does not put its end-of-text token '</s>' behind an answer"):
        read('chat')
    tok.chat_template = None
    with pytest.raises(SystemExit, match='--prompt v1'):
        data.Prompt(tok, 'chat', 3, 99)


LOOP, END = '{% for i in range(100000) %}', '{% endfor %}'


@pytest.mark.parametrize(
    'template, message',
    [
        (LOOP * 3 + END * 3, 'five million steps or characters'),  # writes nothing
        (f'{LOOP}{LOOP[:-2]} if false %}}{END}{END}', 'five million steps'),
        (
            '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
            'five',
        ),
        (LOOP * 2 + 'x' * 1000 + END * 2, 'five million steps or characters'),
        ('{{ 1 }} ' * 500_000, 'five million steps'),
        ('{{ 1 // 0 }}', 'ZeroDivisionError: integer division'),
        ('{{' + '(' * 100_000, 'RecursionError'),
        (5, 'TypeError'),
    ],
)
def test_templates_that_do_not_end(template, message):
    """Or end in an error: refused where they were asked for, else questions are put as Vicuna's."""
    tok = tokenizer()
    tok.chat_template = template
    traced = sys.gettrace()
    with pytest.raises(SystemExit, match=f'error: --prompt chat: .* ends in .*{message}.*; use --prompt v1'):
        data.Prompt(tok, 'chat', 1, 99).text([('what?', 'red')])
    assert sys.gettrace() is traced
    assert 'five' in message or data.prompt_style('', tok) == 'v1'


def test_chat_templates_of_models_that_see():
    """They take a list of images and texts; what a template shows of neither is an error, no empty prompt."""
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    text = data.Prompt(tok, 'chat', 1, 99).text([('<image>\nwhat color?', 'red'), ('sure?', None)])
    expected = 'user: <image>\nwhat color?</s>assistant: red</s>user: sure?</s>assistant: '
    assert ''.join(t for t, _ in text) == expected and ('red</s>', True) in text
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(SystemExit, match='does not show what the user says'):
        data.Prompt(tok, 'chat', 1, 99).text([('what?', 'red')])


def test_a_prompt_to_continue_begins_like_the_training_text():
    """Generation starts from exactly the tokens that training predicted the answer from."""
    tok = tokenizer()
    for style in ('plain', 'v1', 'chat'):
        prompt = data.Prompt(tok, style, 5, 999)
        whole, labels = prompt.encode([('<image>\nwhat color?', 'red')])
        assert prompt.encode([('<image>\nwhat color?', None)])[0] == whole[: labels.index(True)]


def test_samples_that_nothing_can_be_learned_from():
    prompt = data.Prompt(tokenizer(), 'chat', 64, 70)
    limit = r'\d+ tokens; --max_length is 70'
    long = data.Chat('x', [('<image>\n' + 'what color is the circle? ' * 9, 'red')], '')
    with pytest.raises(data.BadSample, match='no answer to predict is left.*' + limit):
        prompt(long)
    late = data.Chat('x', [('what color?', 'red'), ('<image>\nand here?', 'red')], '')
    with pytest.raises(data.BadSample, match='its image is cut off.*' + limit):
        prompt(late)
    with pytest.raises(data.BadSample, match='no image, which sub-stage A needs'):
        data.Prompt(tokenizer(), 'plain', 64, 99)(data.Chat(None, [('hello', 'hi')], ''))


def said(*texts, roles=('human', 'gpt'), **row):
    """An entry of a file in LLaVA's format."""
    turns = [{'from': roles[n % len(roles)], 'value': text} for n, text in enumerate(texts)]
    return row | {'conversations': turns}


def loaded(tmp_path, *rows, **how):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'a.png')
    (tmp_path / 'x.json').write_text(json.dumps(rows))
    return data.load_chats(str(tmp_path / 'x.json'), **dict(image_root=str(tmp_path)) | how)


QUESTIONS = ['<image>\nwhat color?', 'what color?\n<image>', 'in <image> what?', '<image>what? ', '<image>']
QUESTIONS += ['<image> <image>\n\n what?\n']
ANSWERS = ['a red circle', 'red ', 'red\n', '  red', ' \n is it red? \n', 'a  b', 'é☃ ']


@pytest.mark.parametrize('image', [{'image': 'a.png'}, {'image': ['a.png']}, {}])
def test_conversations_are_read_as_the_official_code_reads_them(tmp_path, image):
    """<image> first in its turn, which is stripped; nothing else is; for the projector the question goes."""
    tok = tokenizer()
    for question, answer in itertools.product(QUESTIONS if image else [' what? ', 'is it\n'], ANSWERS):
        row = said(question, answer, ' sure? ', f'{answer}x', **image)
        (chat,) = loaded(tmp_path, row).chats
        for turn in row['conversations'] if image else ():  # as in its preprocess_multimodal
            if '<image>' in turn['value']:
                turn['value'] = ('<image>\n' + turn['value'].replace('<image>', '').strip()).strip()
        q1, a1, q2, a2 = (turn['value'] for turn in row['conversations'])
        whole = f'<s>{data.V1_SYSTEM} USER: {q1} ASSISTANT: {a1}</s>USER: {q2} ASSISTANT: {a2}</s>'
        expected = {'v1': (whole, f' {a1}</s> {a2}</s>'), 'plain': (f'<s><image>{a1}\n', f'{a1}\n')}
        for style, (text, answers) in expected.items() if image else [('v1', expected['v1'])]:
            ids, labels = data.Prompt(tok, style, 3, 999)(chat)
            assert ids == tok.encode(text.replace('<image>', '<image>' * 3))[0]
            predicted = [token for token, label in zip(ids, labels, strict=True) if label]
            assert tok.backend.decode(predicted, skip_special_tokens=False) == answers


@pytest.mark.parametrize(
    'row, turns',
    [
        (said('<image>\na', 'b', '<image>\nc', 'd', image='a.png'), [('<image>\na', 'b'), ('c', 'd')]),
        (said('a', 'b', 'c <image>', 'd', image='a.png'), [('a', 'b'), ('<image>\nc', 'd')]),
        (said('a', 'b', image='a.png'), [('<image>\na', 'b')]),
        (said('x', 'a', 'b', roles=('gpt', 'human')), [('a', 'b')]),
        (said('a', 'b', 'c'), [('a', 'b')]),
        (said('a', 'b', image='.\\a.png'), [('<image>\na', 'b')]),
    ],
)
def test_other_ways_to_write_a_conversation(tmp_path, row, turns):
    """One image in two questions; in a later one; in none; an answer first; a question last."""
    assert [chat.turns for chat in loaded(tmp_path, row).chats] == [turns]


FORMAT = "not in LLaVA's format"


@pytest.mark.parametrize(
    'kind, row',
    [
        ('the turns are not human, gpt', said('x', 'a', 'b', roles=('system', 'human', 'gpt'))),
        ('the turns are not human, gpt', said('a', 'b', roles=('human', 'human'))),
        ('no answer, or an empty text', said('a')),
        ('no answer, or an empty text', said('a', ' \n')),
        ('no answer, or an empty text', said('', 'b')),
        ('no answer, or an empty text', said()),
        ('no such image file', said('<image>', 'b', image='b.png')),
        ('no such image file', said('<image>', 'b', image='b' * 300)),
        ('its image leads out of --image_root', said('<image>', 'b', image='..\\x\\a.png')),
        ('its image leads out of --image_root', said('<image>', 'b', image='/a.png')),
        ('the word <image> where no image is shown', said('what is <image>?', 'b')),
        ('the word <image> where no image is shown', said('a', '<image>')),
        ('the word <image> where no image is shown', said('a', 'an <image>', image='a.png')),
        (FORMAT, said('half \ud83d', 'b')),
        (FORMAT, said('a', 'b', image=['a.png', 'a.png'])),
        (FORMAT, said('a', None)),
        (FORMAT, {'messages': [{'role': 'user', 'content': 'a'}]}),
        (FORMAT, 'a word'),
    ],
)
def test_bad_samples_are_left_out_by_kind(tmp_path, kind, row):
    chats = loaded(tmp_path, said('a', 'b', id=7), row)
    ((name, (found, more)),) = chats.bad.items()
    assert len(chats) == 1 and name.endswith('x.json, entry 1') and found.startswith(kind), chats.bad
    more.encode()  # can be printed
    assert '(id 7)' in chats.chats[0].name


def test_images_without_image_root(tmp_path, monkeypatch):
    """Names are absolute, or begin where the user is."""
    monkeypatch.chdir(tmp_path)
    rows = [said('a', 'b', image=image) for image in ('a.png', str(tmp_path / 'a.png'))]
    assert len(loaded(tmp_path, *rows, image_root='')) == 2


@pytest.mark.parametrize('text', ['{', '{}', '[]', '"a"', None])
def test_files_that_are_no_conversations(tmp_path, text):
    if text:
        (tmp_path / 'x.json').write_text(text)
    message = 'no conversation in it' if text == '[]' else "'easyvqa', or a JSON file.*expected a JSON list"
    with pytest.raises(SystemExit, match=message):
        data.load_chats(str(tmp_path / 'x.json'))


def test_easyvqa_conversations():
    train, val = (data.load_chats('easyvqa', split) for split in ('train', 'val'))
    images, val_images = ({chat.image for chat in chats.chats} for chats in (train, val))
    assert not images & val_images and val_images == set(data.load_pairs('easyvqa', 'val').files)
    turns = [turn for chat in train.chats + val.chats for turn in chat.turns]
    asked = [(q.replace('<image>\n', ''), a) for q, a in turns if q.split('\n')[-1] != data.CAPTION_QUESTION]
    yes_no = [(q, a) for q, a in asked if a in ('yes', 'no')]
    # all the "what" questions; of the others, per text, as many with yes as with no
    assert len(asked) - len(yes_no) == 10168 and len(yes_no) > 9000
    for question in {q for q, _ in yes_no[:50]}:
        assert yes_no.count((question, 'yes')) == yes_no.count((question, 'no'))
    assert all(q.count('<image>') == (n == 0) for chat in train.chats for n, (q, _) in enumerate(chat.turns))
    for sentence in data.describe('red', 'circle'):
        assert len(sentence.split()) >= 6 and 'red' in sentence.split() and 'circle' in sentence.split()
    assert all(len(chat.turns) == 1 for chat in data.load_chats('easyvqa', 'train', turns=1).chats)


def test_pad_to_square():
    image = Image.fromarray(np.full((10, 20, 3), 200, np.uint8))
    square = np.asarray(data.pad_to_square(image, [0.5, 0.25, 0.0]))
    assert square.shape == (20, 20, 3) and (square[5:15] == 200).all()
    assert (square[0, 0] == [127, 63, 0]).all() and (square[-1, -1] == [127, 63, 0]).all()
