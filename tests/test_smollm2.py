"""A real language model, SmolLM2-135M, as pip delivers it and tests/smollm2.py writes it (slow)."""

import json
import sys
from types import SimpleNamespace

import pytest
import smollm2
import torch
from conftest import ROOT, execute, flags

import data
import llava_adv

pytestmark = pytest.mark.slow
QUESTION = 'What is the capital of France?'


@pytest.fixture(scope='module')
def gguf_file():
    try:
        return smollm2.find()
    except SystemExit as e:
        pytest.skip(str(e))


@pytest.fixture(scope='module')
def directory(gguf_file, tmp_path_factory):
    """As a user makes it."""
    place = tmp_path_factory.mktemp('smollm2') / 'SmolLM2'
    execute([sys.executable, str(ROOT / 'tests' / 'smollm2.py'), str(place)])
    return place


def test_logits_tokens_and_text_equal_transformers(gguf_file, directory):
    """What we read from the directory beside what transformers reads from it, and from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, tokenizer = llava_adv.load_llm(str(directory), torch.float32)
    for place, how in ((directory, {}), (gguf_file.parent, {'gguf_file': gguf_file.name})):
        theirs = AutoModelForCausalLM.from_pretrained(place, **how).eval()
        their_tokenizer = AutoTokenizer.from_pretrained(place, **how)
        for text in (
            'Hello world, in 1984?  Two  spaces\n\nnaïve ☃',
            f'<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n',
        ):
            ids, _ = tokenizer.encode(text)
            assert ids == their_tokenizer(text, add_special_tokens=False).input_ids
            with torch.no_grad():
                a = theirs(torch.tensor([ids])).logits
                b = ours.lm_head(ours(ours.model.embed_tokens(torch.tensor([ids]))))
            assert (a - b[..., : a.shape[-1]]).abs().max() <= 1e-3
        messages = [{'role': 'user', 'content': QUESTION}]
        assert tokenizer.render(messages, True) == their_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def test_it_answers(directory):
    llm, tokenizer = llava_adv.load_llm(str(directory), torch.float32)
    ids, _ = data.Prompt(tokenizer, 'chat', 0, 999).encode([(QUESTION, None)])
    without_images = SimpleNamespace(llm=llm, embed=lambda images, ids: llm.model.embed_tokens(ids))
    (answer,) = llava_adv.generate(without_images, torch.empty(0, 3, 1, 1), [ids], 20, {tokenizer.eos})
    assert tokenizer.decode(answer) == 'The capital of France is Paris.'


def test_nothing_else_is_read(tmp_path):
    gguf = pytest.importorskip('gguf')
    writer = gguf.GGUFWriter(str(tmp_path / 'other.gguf'), 'gemma')
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SystemExit, match="other.gguf: .*'gemma', None, None.*nothing but SmolLM2 is read"):
        smollm2.main(tmp_path / 'out', tmp_path / 'other.gguf')
    assert not (tmp_path / 'out').exists()


def test_a_few_steps_of_both_sub_stages(directory, parts, tmp_path):
    """On 2 cores; the loss falls; the directory opens in transformers."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    out = tmp_path / 'run'
    for name in ('data_a', 'data'):  # two samples, so that all updates see the same, and their losses compare
        (tmp_path / f'{name}.json').write_text(json.dumps(json.loads(parts[name].read_text())[:2]))
    settings = parts | dict(
        llm=directory,
        data_a=tmp_path / 'data_a.json',
        data=tmp_path / 'data.json',
        steps_a=3,
        steps_b=4,
        batch_a=2,
        batch_size=2,
        lora_r=8,
        k=1,
        turns=1,
    )
    execute([sys.executable, str(ROOT / 'llava_adv.py'), *flags(**settings, out=out)], OMP_NUM_THREADS='2')
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [r['stage'] for r in rows] == ['A'] * 3 + ['B'] * 4
    assert rows[2]['loss_adv'] < rows[0]['loss_adv'] and rows[6]['loss_adv'] < 0.9 * rows[3]['loss_adv']
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ours, tokenizer = llava_adv.load_llava(str(out))
    prompt = data.Prompt(tokenizer, 'chat', ours.image_tokens, 999)
    ids = torch.tensor([prompt.encode([('<image>\nwhat?', None)])[0]])
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = model.eval()(input_ids=ids, pixel_values=(x - ours.visual.mean) / ours.visual.std).logits
        b = ours.llm.lm_head(ours.llm(ours.embed(x, ids)))
    assert (a - b).abs().max() <= 1e-3
    processor = AutoProcessor.from_pretrained(out)
    text = processor.apply_chat_template(
        [{'role': 'user', 'content': '<image>\nwhat?'}], add_generation_prompt=True, tokenize=False
    )
    shown = data.Prompt(tokenizer, 'chat', 1, 999).text([('<image>\nwhat?', None)])
    assert text == ''.join(part for part, _ in shown)
