"""Stage 2 beside transformers, PEFT and open_clip: our runs open there, LLaVAs and the authors' layout of adapters open here."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import flags
from PIL import Image
from test_dropin import architecture, hugging_face, published, snippets
from test_llava import SMALL, llava, saved, tokenizer

import clip_adv
import data
import eval as evaluation
import llava_adv

QUESTIONS = ['what color is the shape?', 'is there a circle?', 'what shape is it?']


def image(size=(41, 30), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def theirs_of(place):
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    model, info = LlavaForConditionalGeneration.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), AutoProcessor.from_pretrained(place)


def same_answers(ours, tok, theirs, processor, style):
    """Logits of the whole prompt and the greedy text, from the image and the chat template on. → the answers"""
    prompt, picture = llava_adv.Prompt(tok, style, ours.image_tokens, 512), image()
    x = llava_adv.fit(ours)(picture)[None].float() / 255
    said = []
    for question in QUESTIONS:
        ids, _ = prompt.encode([(f'{data.IMAGE}\n{question}', None)])
        chat = [{'role': 'user', 'content': [{'type': 'image', 'image': picture}, {'type': 'text', 'text': question}]}]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
        assert inputs['input_ids'][0].tolist() == ids
        z = llava_adv.Llama.forward(ours.llm, ours.embed(x, torch.tensor([ids])))
        exact = dict(inputs, pixel_values=(x - ours.visual.mean) / ours.visual.std)  # what its tensor processor rounds is not the model
        out = theirs(**exact).logits
        assert (ours.llm.lm_head(z)[..., :out.shape[-1]] - out).abs().max() <= 1e-4 * out.abs().max().clamp(min=1)
        made = theirs.generate(**exact, max_new_tokens=12)[0, len(ids):].tolist()
        mine, = llava_adv.generate(ours, x, [ids], 12, ours.ends)
        cut = next((i for i, t in enumerate(made) if t in ours.ends), len(made))
        assert made[:cut] == mine
        said.append(tuple(mine))
    return said


# ----------------------------------------------------------------------------------------- what we write, in transformers
@pytest.mark.parametrize('kind, style', [('gqa', 'v1'), ('tied', 'v1'), ('qwen2', 'chat'), ('tied', 'chat')])
def test_a_run_opens_in_transformers(tmp_path, kind, style):
    model, tok = llava(tmp_path, kind)
    model.style, model.ends = style, {tok.eos}
    out = tmp_path / 'run'
    out.mkdir()
    llava_adv.export(model, tok, out, 512)
    config = json.loads((out / 'config.json').read_text())
    assert config['tie_word_embeddings'] is config['text_config']['tie_word_embeddings'] is (kind == 'tied')
    assert config['vision_feature_layer'] == -2 and config['vision_feature_select_strategy'] == 'default'
    theirs, processor = theirs_of(out)
    assert len(set(same_answers(model, tok, theirs, processor, style))) > 1  # the question matters
    theirs.save_pretrained(tmp_path / 'again')  # the names are those that transformers writes
    names = [{n: tuple(w.shape) for n, w in clip_adv.stored(place, clip_adv.HF_FILES)} for place in (out, tmp_path / 'again')]
    assert names[0] == names[1]
    text = processor.apply_chat_template([{'role': 'user', 'content': 'what?'}, {'role': 'assistant', 'content': 'red'}])  # plain text is taken, too
    assert text == ''.join(part for part, _ in llava_adv.Prompt(tok, style, 1, 512).text([('what?', 'red')]))


def test_a_trained_run_opens_in_transformers(whole):
    ours, tok = llava_adv.load_llava(str(whole))
    same_answers(ours, tok, *theirs_of(whole), ours.style)


def test_pixels_of_transformers(whole):
    """Padded with the mean colour: equal to its PIL processor; its tensor processor rounds the colour and the resize differently."""
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    ours, _ = llava_adv.load_llava(str(whole))
    largest = 0.
    for size in [(64, 64), (41, 30), (31, 100), (17, 16), (201, 77), (16, 16)]:
        expected = llava_adv.fit(ours)(image(size)).float()
        for kind in (LlavaImageProcessorPil, LlavaImageProcessor):
            seen = torch.as_tensor(np.asarray(kind.from_pretrained(whole)(image(size), return_tensors='pt')['pixel_values'][0]))
            difference = ((seen * ours.visual.std + ours.visual.mean) * 255 - expected).abs().max().item()
            assert difference < 1e-3 or kind is LlavaImageProcessor, (size, difference)
            largest = max(largest, difference)
    assert largest < 1.001


def test_a_tower_that_transformers_cannot_express(tmp_path, capsys):
    """ΔCLIP's: saving says so and what works; transformers refuses it rather than fill in what it lacks; here it opens whole."""
    from transformers import LlavaForConditionalGeneration
    model, tok = llava(tmp_path, no_ln_pre=True, pool_type='avg', final_ln_after_pool=True)
    out = tmp_path / 'run'
    out.mkdir()
    llava_adv.export(model, tok, out, 512)
    said = re.sub(r'\s+', ' ', capsys.readouterr().out)
    assert 'cannot express this image tower (the image tower has no LayerNorm before its blocks)' in said and 'eval.py, --init and --chat do' in said
    with pytest.raises(Exception, match='open_clip_vit'):
        LlavaForConditionalGeneration.from_pretrained(out)
    again, _ = llava_adv.load_llava(str(out))
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in model.state_dict().items()) and again.tower['preprocess_cfg'] == model.tower['preprocess_cfg']


# ------------------------------------------------------------------------------------------------- what they write, here
HUB_TEMPLATE = ("{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
                "{# images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
                "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
                "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
                "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


def hub_llava(place, **how):
    """As llava-hf/llava-1.5-7b-hf is published: random weights, <image> and <pad> as the last tokens, its own template without an end behind answers."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    tok = tokenizer()
    for name, text in tok.files(512, HUB_TEMPLATE).items():
        (place / name).write_text(text)
    config = LlavaConfig(text_config=LlamaConfig(**dict(SMALL, vocab_size=384, rms_norm_eps=1e-5)), image_token_index=tok.image, image_seq_length=16,
                         vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=2, image_size=16,
                                                        patch_size=4, projection_dim=24))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = LlavaForConditionalGeneration(config)
        for p in model.parameters():
            p.data += .1 * torch.randn_like(p)
    model.save_pretrained(place, **how)
    LlavaProcessor(CLIPImageProcessor(size={'shortest_edge': 16}, crop_size={'height': 16, 'width': 16}), AutoTokenizer.from_pretrained(place), patch_size=4,
                   vision_feature_select_strategy='default', num_additional_image_tokens=1, chat_template=HUB_TEMPLATE).save_pretrained(place)
    return model.eval()


def test_a_llava_of_the_hub(tmp_path, parts, capsys):
    """Sharded, as transformers writes it today: the same logits and text; evaluated as it is; and trained on from."""
    theirs = hub_llava(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
    ours, tok = llava_adv.load_llava(str(tmp_path))
    assert ours.tower['geometry'] == 'crop' and ours.tower['quick_gelu'] and ours.tower['preprocess_cfg']['interpolation'] == 'bicubic'
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained(tmp_path)
    prompt, picture = llava_adv.Prompt(tok, 'chat', ours.image_tokens, 512), image((40, 40))
    chat = [{'role': 'user', 'content': [{'type': 'image', 'image': picture}, {'type': 'text', 'text': QUESTIONS[0]}]}]
    ids, _ = prompt.encode([(f'{data.IMAGE}\n{QUESTIONS[0]}', None)])
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
    assert inputs['input_ids'][0].tolist() == ids
    x = llava_adv.fit(ours)(picture)[None].float() / 255
    inputs = dict(inputs, pixel_values=(x - ours.visual.mean) / ours.visual.std)
    out = theirs(**inputs).logits
    assert (ours.llm.lm_head(ours.llm(ours.embed(x, torch.tensor([ids])))) - out).abs().max() <= 1e-4 * out.abs().max()
    made = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=tok.eos, pad_token_id=tok.pad)[0, len(ids):].tolist()
    assert llava_adv.generate(ours, x, [ids], 12, {tok.eos})[0] == (made[:made.index(tok.eos)] if tok.eos in made else made)
    evaluation.main(evaluation.parse(['vqa', str(tmp_path), '--n', '2', '--questions', 'what', '--iterations', '2', '--quiet']))
    said = re.sub(r'\s+', ' ', capsys.readouterr().out)
    assert "does not put its end-of-text token '</s>' behind an answer" in said and '(--prompt v1)' in said and str(tmp_path) in said
    assert not (tmp_path / 'eval').exists()  # into what is not a run nothing is written
    llava_adv.main(*clip_adv.parse(llava_adv.Config, '', flags(**{k: v for k, v in parts.items() if k != 'llm'} | dict(
        init=tmp_path, out=tmp_path / 'run', steps_a=0, steps_b=1, lr=0, lr_projector=0, lr_tower=0, eps=4))))
    again, _ = llava_adv.load_llava(str(tmp_path / 'run'))  # nothing was learned, so nothing may have changed
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in ours.state_dict().items())


@pytest.mark.parametrize('older', ['4.0', '4.52', 'bin'])
def test_older_names(tmp_path, older):
    """The hub's names before transformers 5, and those in memory of 4.52."""
    from safetensors.torch import load_file, save_file
    hub_llava(tmp_path)
    ours, _ = llava_adv.load_llava(str(tmp_path))
    weights = load_file(tmp_path / 'model.safetensors')
    vision = lambda n: n.replace('vision_tower.', 'vision_tower.vision_model.')
    if older == '4.52':
        named = {('' if n.startswith('language_model.lm_head') else 'model.') + vision(n).replace('language_model.model.', 'language_model.').replace('language_model.lm_head', 'lm_head'): w
                 for n, w in weights.items()}
        assert {'lm_head.weight', 'model.language_model.embed_tokens.weight', 'model.vision_tower.vision_model.pre_layrnorm.bias'} <= set(named)
    else:
        named = {vision(n): w for n, w in weights.items()}
        named['vision_tower.vision_model.embeddings.position_ids'] = torch.arange(17)[None]
    (tmp_path / 'model.safetensors').unlink()
    torch.save(named, tmp_path / 'pytorch_model.bin') if older == 'bin' else save_file(named, tmp_path / 'model.safetensors')
    again, _ = llava_adv.load_llava(str(tmp_path))
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in ours.state_dict().items())


def test_a_llava_that_does_not_fit(tmp_path):
    """Listed by the names in the file."""
    from safetensors.torch import load_file, save_file
    hub_llava(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    whole = dict(weights)
    del weights['vision_tower.encoder.layers.0.self_attn.q_proj.weight']
    weights['vision_tower.more'] = torch.zeros(3)
    save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(SystemExit, match=r'(?s)image tower of .*\n  vision_tower.encoder.layers.0.self_attn.q_proj.weight: missing, \(32, 32\) expected.*\n  vision_tower.more: surplus'):
        llava_adv.load_llava(str(tmp_path))
    save_file({n: w for n, w in whole.items() if n != 'multi_modal_projector.linear_1.bias'}, tmp_path / 'model.safetensors')
    with pytest.raises(SystemExit, match=r'projector of .*\n  multi_modal_projector.linear_1.bias: missing, \(48,\) expected'):
        llava_adv.load_llava(str(tmp_path))
    for change, message in [(lambda w: w | {'language_model.lm_head.weight': w['language_model.lm_head.weight'][:7].clone()}, r'lm_head.weight: \(7, 48\), \(384, 48\) expected'),
                            (lambda w: {n: t for n, t in w.items() if 'layers.1.mlp.up_proj' not in n or 'vision' in n}, 'model.layers.1.mlp.up_proj.weight: missing'),
                            (lambda w: w | {'language_model.model.more': torch.zeros(2)}, 'model.more: surplus'),
                            *((lambda w, n=n: w | {n: torch.zeros(3)}, 'surplus, .*there twice') for n in (  # other names of weights that are there
                                'lm_head.weight', 'model.language_model.layers.0.mlp.up_proj.weight', 'model.multi_modal_projector.linear_1.weight',
                                'model.vision_tower.post_layernorm.bias', 'vision_tower.vision_model.post_layernorm.bias')),
                            *((lambda w, n=n: w | {n: w[n].to(torch.int8)}, f'{n.removeprefix("language_model.")}: torch.int8') for n in (
                                'language_model.model.norm.weight', 'multi_modal_projector.linear_1.weight', 'vision_tower.pre_layrnorm.weight'))]:
        save_file(change(dict(whole)), tmp_path / 'model.safetensors')
        with pytest.raises(SystemExit, match=message):
            llava_adv.load_llava(str(tmp_path))
    save_file(whole, tmp_path / 'model.safetensors')
    tied = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(dict(tied, tie_word_embeddings=True)))  # but the file has a head of its own
    with pytest.raises(SystemExit, match='lm_head.weight: surplus, since tie_word_embeddings is true'):
        llava_adv.load_llava(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps(tied))
    config = json.loads((tmp_path / 'config.json').read_text())
    for change, message in [(dict(vision_feature_layer=-1), 'vision_feature_layer -1'), (dict(vision_feature_select_strategy='full'), 'select_strategy full'),
                            (dict(vision_config={'model_type': 'siglip_vision_model'}), 'siglip_vision_model'), (dict(image_token_index=5), '<image> is token'),
                            (dict(text_config=None), 'no text_config'), (dict(text_config=config['text_config'] | {'vocab_size': None}), 'vocab_size is None'),
                            (dict(vision_config=config['vision_config'] | {'image_size': [16, 16]}), r'image_size is \[16, 16\]; supported: a whole number')]:
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        with pytest.raises(SystemExit, match=message):
            llava_adv.load_llava(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llava', 'mm_vision_tower': 'x'}))
    with pytest.raises(SystemExit, match='no text_config, vision_config; expected the format of transformers'):
        llava_adv.load_llava(str(tmp_path))


def test_a_clip_of_hugging_face_as_image_tower(tmp_path, parts):
    """--init of stage 2: its activation, its LayerNorms' ε, its mean and std are kept, and the run opens in transformers."""
    (tmp_path / 'hf').mkdir()
    hugging_face(tmp_path / 'hf')
    llava_adv.main(*clip_adv.parse(llava_adv.Config, '', flags(**{**parts, 'init': tmp_path / 'hf', 'steps_a': 1, 'steps_b': 1, 'out': tmp_path / 'run'})))
    ours, tok = llava_adv.load_llava(str(tmp_path / 'run'))
    assert ours.tower['quick_gelu'] and ours.visual.ln_pre.eps == 1e-3 and ours.tower['preprocess_cfg']['mean'][0] == pytest.approx(.48145466)
    same_answers(ours, tok, *theirs_of(tmp_path / 'run'), ours.style)


# -------------------------------------------------------------------------------------------------- the authors' layout
def released(place, base, bare=True):
    """A directory as the authors publish Δ²LLaVA: PEFT's adapters, the rest in non_lora_trainables.bin, the tower in open_clip's names.
    → (the LLM of transformers with the adapters merged by PEFT, open_clip's tower, projector)"""
    import open_clip
    import peft
    import transformers
    place.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        llm = transformers.LlamaForCausalLM.from_pretrained(base)
        targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
        wrapped = peft.get_peft_model(llm, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=.05, target_modules=targets, bias='none', task_type='CAUSAL_LM'))
        for name, p in wrapped.named_parameters():
            if 'lora_B' in name:
                p.data = .1 * torch.randn_like(p)
        wrapped.save_pretrained(place)
        cfg = architecture('ViT-L-14-CLIPA' if bare else 'ViT-L-14')
        cfg['vision_cfg'].update(layers=3, image_size=28, patch_size=7)
        visual = open_clip.model.CLIP(**cfg).visual
        projector = torch.nn.Sequential(torch.nn.Linear(128, 48), torch.nn.GELU(), torch.nn.Linear(48, 48))
        for p in [*visual.parameters(), *projector.parameters()]:
            p.data += .05 * torch.randn_like(p)
    rest = {f'base_model.model.model.mm_projector.{n}': w for n, w in projector.state_dict().items()}
    rest |= {f'base_model.model.model.vision_tower.vision_tower.{n}': w for n, w in visual.state_dict().items()}
    torch.save({n: w.bfloat16() for n, w in rest.items()}, place / 'non_lora_trainables.bin')
    for module in (visual, projector):
        module.load_state_dict({n: w.bfloat16().float() for n, w in module.state_dict().items()})
    (place / 'config.json').write_text(json.dumps(dict(
        model_type='llava_llama', architectures=['LlavaLlamaForCausalLM'], mm_vision_tower='open_clip:ViT-H-14', mm_projector_type='mlp2x_gelu', mm_hidden_size=128,
        mm_vision_select_layer=-2, mm_vision_select_feature='patch', mm_patch_merge_type='flat', mm_use_im_start_end=False, image_aspect_ratio='pad')))
    return wrapped.merge_and_unload().eval(), visual.eval(), projector


@pytest.fixture
def base(tmp_path):
    """The language model that adapters are of."""
    from test_llava import language_model
    (tmp_path / 'base').mkdir()
    return saved(language_model('llama'), tmp_path / 'base')


@pytest.mark.filterwarnings('ignore::FutureWarning')  # between PEFT and transformers
@pytest.mark.parametrize('bare', [True, False])
def test_the_released_layout(tmp_path, base, bare, capsys):
    """Logits equal those of the libraries' parts put together; evaluated, asked and trained on from; saved, it opens again."""
    llm, visual, projector = released(tmp_path / 'delta2', base, bare)
    ours, tok = llava_adv.load_llava(str(tmp_path / 'delta2'))
    assert f'128 wide, heads of 64, 3 blocks, {"no " * bare}ln_pre, GELU' in capsys.readouterr().out
    assert ours.style == 'v1' and ours.tower['geometry'] == 'pad' and ours.tower['preprocess_cfg']['interpolation'] == 'bilinear' and ours.visual.size == 28
    ids, _ = llava_adv.Prompt(tok, 'v1', ours.image_tokens, 512).encode([(f'{data.IMAGE}\n{QUESTIONS[0]}', None)])
    x = llava_adv.fit(ours)(image())[None].float() / 255
    with torch.no_grad():
        features = projector(visual.forward_intermediates((x - ours.visual.mean) / ours.visual.std, indices=[1], output_fmt='NLC', normalize_intermediates=False)['image_intermediates'][0])
        at = ids.index(tok.image)
        embed = lambda part: llm.get_input_embeddings()(torch.tensor([part]))
        expected = llm(inputs_embeds=torch.cat([embed(ids[:at]), features, embed(ids[at + ours.image_tokens:])], 1)).logits
        found = ours.llm.lm_head(ours.llm(ours.embed(x, torch.tensor([ids]))))[..., :expected.shape[-1]]
    assert features.shape[1] == ours.image_tokens == 16 and (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    evaluation.main(evaluation.parse(['pope', str(tmp_path / 'delta2'), '--n', '2', '--iterations', '2', '--quiet']))
    out = tmp_path / 'out'
    out.mkdir()
    llava_adv.export(ours, tok, out, 512)
    again, _ = llava_adv.load_llava(str(out))
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in ours.state_dict().items()) and again.style == 'v1'
    if not bare:
        theirs_of(out)  # with a LayerNorm before the blocks transformers opens it, too


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_the_released_layout_does_not_fit(tmp_path, base):
    place = tmp_path / 'delta2'
    released(place, base)
    lora, config = (json.loads((place / name).read_text()) for name in ('adapter_config.json', 'config.json'))
    for name, content, message in [('adapter_config', dict(lora, r=8), r'q_proj.lora_A.weight: \(4, 48\), \(8, 48\) expected'), ('adapter_config', dict(lora, use_dora=True), 'use_dora is True'),
                                   ('adapter_config', dict(lora, init_lora_weights='pissa'), "init_lora_weights is 'pissa'"), ('adapter_config', dict(lora, r=None), 'r is None'),
                                   ('adapter_config', dict(lora, target_modules=['q_proj']), 'k_proj.lora_A.weight: surplus'),
                                   ('adapter_config', dict(lora, base_model_name_or_path=str(tmp_path / 'nowhere' / 'llm')), 'no such file or directory(?s:.)*base_model_name_or_path'),
                                   ('config', dict(config, mm_projector_type='linear'), "mm_projector_type is 'linear'; supported: 'mlp2x_gelu'"),
                                   ('config', dict(config, mm_vision_select_layer=-1), 'mm_vision_select_layer is -1')]:
        (place / f'{name}.json').write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=message):
            llava_adv.load_llava(str(place))
        (place / 'adapter_config.json').write_text(json.dumps(lora))
        (place / 'config.json').write_text(json.dumps(config))
    rest = torch.load(place / 'non_lora_trainables.bin', weights_only=True)
    for change, message in [(lambda w: w | {'base_model.model.model.embed_tokens.weight': torch.zeros(2, 2)}, 'embed_tokens.weight: surplus'),
                            (lambda w: {n: t for n, t in w.items() if 'mm_projector.2.bias' not in n}, '2.bias: missing'),
                            *((lambda w, part=part: {n: t.to(torch.int8) if part in n else t for n, t in w.items()}, 'torch.int8, numbers with a fraction expected')
                              for part in ('mm_projector.2.bias', 'resblocks.1.ln_1')),
                            (lambda w: {n: t for n, t in w.items() if 'resblocks.1.ln_1' not in n}, 'transformer.resblocks.1.ln_1.weight: missing'),
                            (lambda w: {n: t for n, t in w.items() if 'vision_tower' not in n}, "no image tower in open_clip's names")]:
        torch.save(change(rest), place / 'non_lora_trainables.bin')
        with pytest.raises(SystemExit, match=message):
            llava_adv.load_llava(str(place))


def test_a_clip_is_no_llava_and_a_llava_no_clip(parts, whole):
    with pytest.raises(SystemExit, match='is no LLaVA directory .*, which is a CLIP'):
        evaluation.main(evaluation.parse(['vqa', str(parts['init']), '--n', '2', '--quiet']))
    with pytest.raises(SystemExit, match="is no CLIP: .*config.json says 'llava'"):
        evaluation.main(evaluation.parse(['zeroshot', str(whole), '--n', '2', '--quiet']))


def test_the_card_of_a_llava(whole, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(whole, run)
    card = (run / 'README.md').read_text()
    import huggingface_hub
    header = huggingface_hub.ModelCard.load(run / 'README.md').data
    assert header.library_name == 'transformers' and header.pipeline_tag == 'image-text-to-text' and len(snippets(card)) == 1
    assert card.count('| not measured | not measured |') == 5 and 'ε 12/255, α 9/255 × 2 steps' in card and 'after update 6 of 6' in card
    for words in (['vqa', '--questions', 'what'], ['pope'], ['caption'], ['caption', '--targeted', 'a | b', '--eps', '4', '8']):
        evaluation.main(evaluation.parse([words[0], str(run), '--n', '2', '--iterations', '1', '--quiet', *words[1:]]))
    after = (run / 'README.md').read_text()
    assert after.count('| not measured | not measured |') == 1 and 'easyvqa test, what, n = 2 | ensemble, 1 iterations |' in after
    assert '“a / b”' in after and re.search(r'forced sentences, success .*ε = 4: [\d.]+, ε = 8: [\d.]+', after)
    assert after.partition('## Results')[0] == card.partition('## Results')[0] and len(list((run / 'eval').iterdir())) == 4


def test_a_file_of_weights_as_the_tower(parts, tmp_path, monkeypatch):
    """Only with --arch is it known what it is; its tokenizer is not looked for, as stage 2 has no use for it."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    cfg = architecture('ViT-H-14-CLIPA-336')
    cfg['vision_cfg'].update(layers=2, image_size=28)
    place, arch, out = published(tmp_path / 'published', cfg), tmp_path / 'arch.json', tmp_path / 'run'
    cfg['text_cfg']['hf_tokenizer_name'] = 'nobody/nothing'
    arch.write_text(json.dumps(cfg))
    file = (place / 'open_clip_model.safetensors').rename(tmp_path / 'tower.safetensors')
    train = lambda **more: llava_adv.main(*clip_adv.parse(llava_adv.Config, '', flags(**{**parts, 'init': file, 'out': out, 'steps_a': 1, 'steps_b': 0, **more})))
    with pytest.raises(SystemExit, match='tower.safetensors: no open_clip_config.json beside it.*--arch FILE.json'):
        train()
    train(arch=arch)
    expected = dict(clip_adv.stored(file, []))['visual.conv1.weight']
    assert torch.equal(llava_adv.load_llava(str(out))[0].visual.conv1.weight, expected)  # sub-stage A leaves the tower as it is
    file.unlink()
    train(resume=True, arch=arch)
    with pytest.raises(SystemExit, match='--arch .* says it of itself'):
        train(init=parts['init'], arch=arch, out=tmp_path / 'other')
    parts = {name: value for name, value in parts.items() if name != 'llm'}
    with pytest.raises(SystemExit, match='--arch .*: --init .* is a LLaVA'):
        train(init=out, arch=arch, out=tmp_path / 'other')


def test_one_stage_over_the_other(parts, whole, tmp_path):
    """--overwrite leaves none of the other's files under the new run's: another library would open what was there before."""
    out, small = tmp_path / 'run', dict(size=16, patch=4, width=32, layers=2, head_width=16, text_width=16, text_layers=1, batch_size=4, steps=1, eps=0)
    shutil.copytree(whole, out)
    with pytest.raises(SystemExit, match='holds a run: .*--overwrite'):
        clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(out=out, **small)))
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(out=out, **small, overwrite=True)))
    assert {f.name for f in out.iterdir()} == {f.name for f in parts['init'].iterdir()} and 'stage 1' in (out / 'README.md').read_text()
    clip_adv.load_clip(out)
    evaluation.main(evaluation.parse(['zeroshot', str(out), '--n', '2', '--attack', 'none', '--quiet']))
    settings = {**parts, 'steps_a': 1, 'steps_b': 0}
    for script in (clip_adv, llava_adv):  # neither continues the other's
        place = {clip_adv: whole, llava_adv: out}[script]
        with pytest.raises(SystemExit, match='is not of this stage'):
            script.main(*clip_adv.parse(script.Config, '', flags(out=place, resume=True)))
        bare = shutil.copytree(place, tmp_path / f'bare{script.__name__}', ignore=shutil.ignore_patterns('*train_state.pt'))
        with pytest.raises(SystemExit, match='holds a model .* but no train_state.pt to continue from'):
            script.main(*clip_adv.parse(script.Config, '', flags(out=bare, resume=True)))
    llava_adv.main(*clip_adv.parse(llava_adv.Config, '', flags(out=out, **settings, overwrite=True)))
    assert {f.name for f in out.iterdir()} == {f.name for f in whole.iterdir()} - {'previous_train_state.pt'} and 'stage 2' in (out / 'README.md').read_text()
    theirs_of(out), llava_adv.load_llava(str(out))
