"""Stage 2 beside transformers, PEFT and open_clip: our runs open there, LLaVAs and the authors' layout of
adapters open here."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import flags
from PIL import Image
from test_dropin import architecture, hugging_face, opened_as_the_card_says, published
from test_llava import SMALL, language_model, llava, saved, tokenizer

import clip_adv
import data
import eval as evaluation
import llava_adv

QUESTIONS = ['what color is the shape?', 'is there a circle?', 'what shape is it?']


def train(**settings):
    llava_adv.main(*data.parse(llava_adv.Config, '', flags(**settings)))


def evaluate(*words):
    return evaluation.main(evaluation.parse([*map(str, words), '--quiet']))


def image(size=(41, 30), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def theirs_of(place):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), AutoProcessor.from_pretrained(place)


def asked(question, picture, processor):
    """The question about the picture, as transformers puts it."""
    parts = [{'type': 'image', 'image': picture}, {'type': 'text', 'text': question}]
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
    return processor.apply_chat_template([{'role': 'user', 'content': parts}], **how)


def same_weights(a, b):
    return all(torch.equal(w, b.state_dict()[n]) for n, w in a.state_dict().items())


def same_answers(ours, tok, theirs, processor, style):
    """Logits of the whole prompt and the greedy text, from image and chat template on → the answers"""
    prompt, picture = data.Prompt(tok, style, ours.image_tokens, 512), image()
    x = ours.fit(picture)[None].float() / 255
    said = []
    for question in QUESTIONS:
        ids, _ = prompt.encode([(f'{data.IMAGE}\n{question}', None)])
        inputs = asked(question, picture, processor)
        assert inputs['input_ids'][0].tolist() == ids
        z = ours.llm(ours.embed(x, torch.tensor([ids])))
        # what its tensor processor rounds is not the model
        exact = dict(inputs, pixel_values=(x - ours.visual.mean) / ours.visual.std)
        out = theirs(**exact).logits
        difference = (ours.llm.lm_head(z)[..., : out.shape[-1]] - out).abs().max()
        assert difference <= 1e-4 * out.abs().max().clamp(min=1)
        made = theirs.generate(**exact, max_new_tokens=12)[0, len(ids) :].tolist()
        (mine,) = llava_adv.generate(ours, x, [ids], 12, tok.ends)
        cut = next((i for i, t in enumerate(made) if t in tok.ends), len(made))
        assert made[:cut] == mine
        said.append(tuple(mine))
    return said


# --------------------------------------------------------------------------- what we write, in transformers
@pytest.mark.parametrize('kind, style', [('gqa', 'v1'), ('tied', 'v1'), ('qwen2', 'chat'), ('tied', 'chat')])
def test_a_run_opens_in_transformers(tmp_path, kind, style):
    model, tok = llava(tmp_path, kind)
    model.style = style
    out = tmp_path / 'run'
    out.mkdir()
    llava_adv.save_llava(model, tok, out, 512)
    config = json.loads((out / 'config.json').read_text())
    tied = kind == 'tied'
    assert config['tie_word_embeddings'] is config['text_config']['tie_word_embeddings'] is tied
    assert config['vision_feature_layer'] == -2 and config['vision_feature_select_strategy'] == 'default'
    theirs, processor = theirs_of(out)
    assert len(set(same_answers(model, tok, theirs, processor, style))) > 1  # the question matters
    theirs.save_pretrained(tmp_path / 'again')  # the names are those that transformers writes
    found = [data.read_weights(place, data.HF_FILES) for place in (out, tmp_path / 'again')]
    names = [{n: tuple(w.shape) for n, w in weights.items()} for weights in found]
    assert names[0] == names[1]
    said = [{'role': 'user', 'content': 'what?'}, {'role': 'assistant', 'content': 'red'}]
    text = processor.apply_chat_template(said)  # plain text is taken, too
    assert text == ''.join(part for part, _ in data.Prompt(tok, style, 1, 512).text([('what?', 'red')]))


def test_a_trained_run_opens_in_transformers(whole):
    ours, tok = llava_adv.load_llava(str(whole))
    same_answers(ours, tok, *theirs_of(whole), ours.style)


def test_pixels_of_transformers(whole):
    """Padded with the mean colour: equal to its PIL processor; its tensor processor rounds the colour and the
    resize differently."""
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    ours, _ = llava_adv.load_llava(str(whole))
    largest = 0.0
    for size in [(64, 64), (41, 30), (31, 100), (17, 16), (201, 77), (16, 16)]:
        expected = ours.fit(image(size)).float()
        for kind in (LlavaImageProcessorPil, LlavaImageProcessor):
            seen = kind.from_pretrained(whole)(image(size), return_tensors='pt')['pixel_values'][0]
            seen = torch.as_tensor(np.asarray(seen)) * ours.visual.std + ours.visual.mean
            difference = (seen * 255 - expected).abs().max().item()
            assert difference < 1e-3 or kind is LlavaImageProcessor, (size, difference)
            largest = max(largest, difference)
    assert largest < 1.001


def test_a_tower_that_transformers_cannot_express(tmp_path, capsys):
    """ΔCLIP's: saving says so and what works; transformers refuses it rather than fill in what it lacks; here
    it opens whole."""
    from transformers import LlavaForConditionalGeneration

    model, tok = llava(tmp_path, no_ln_pre=True, pool_type='avg', final_ln_after_pool=True)
    out = tmp_path / 'run'
    out.mkdir()
    llava_adv.save_llava(model, tok, out, 512)
    said = re.sub(r'\s+', ' ', capsys.readouterr().out)
    reason = 'the image tower has no LayerNorm before its blocks'
    assert f'cannot express this image tower ({reason})' in said and 'eval.py, --init and --chat do' in said
    with pytest.raises(Exception, match='open_clip_vit'):
        LlavaForConditionalGeneration.from_pretrained(out)
    again, _ = llava_adv.load_llava(str(out))
    assert same_weights(model, again) and again.clip_cfg == model.clip_cfg and again.fit == model.fit
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[tok.image] * model.image_tokens, 6]])
    assert torch.equal(again.embed(x, ids), model.embed(x, ids))


# ----------------------------------------------------------------------------------- what they write, here
HUB_TEMPLATE = """{% for message in messages %}{% if message['role'] != 'system' %}\
{{ message['role'].upper() + ': '}}{% endif %}{# images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}\
{% endfor %}{% else %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def hub_llava(place, **how):
    """As llava-hf/llava-1.5-7b-hf is published: random weights, <image> and <pad> as the last tokens, its own
    template without an end behind answers."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tok = tokenizer()
    for name, text in tok.files(512, HUB_TEMPLATE).items():
        (place / name).write_text(text)
    vision = dict(hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=2)
    vision |= dict(image_size=16, patch_size=4, projection_dim=24)
    towers = dict(text_config=LlamaConfig(**dict(SMALL, vocab_size=384, rms_norm_eps=1e-5)))
    towers |= dict(vision_config=CLIPVisionConfig(**vision))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = LlavaConfig(**towers, image_token_index=tok.image, image_seq_length=16)
        model = LlavaForConditionalGeneration(config)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(place, **how)
    images = CLIPImageProcessor(size={'shortest_edge': 16}, crop_size={'height': 16, 'width': 16})
    features = dict(patch_size=4, vision_feature_select_strategy='default', num_additional_image_tokens=1)
    words = AutoTokenizer.from_pretrained(place)
    LlavaProcessor(images, words, **features, chat_template=HUB_TEMPLATE).save_pretrained(place)
    return model.eval()


def test_a_llava_of_the_hub(tmp_path, parts, capsys):
    """Sharded, as transformers writes it today: the same logits and text; evaluated as it is; and trained on
    from."""
    from transformers import AutoProcessor

    theirs = hub_llava(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
    ours, tok = llava_adv.load_llava(str(tmp_path))
    assert not ours.pad and ours.clip_cfg.quick_gelu and ours.preprocess.interpolation == 'bicubic'
    prompt, picture = data.Prompt(tok, 'chat', ours.image_tokens, 512), image((40, 40))
    ids, _ = prompt.encode([(f'{data.IMAGE}\n{QUESTIONS[0]}', None)])
    inputs = asked(QUESTIONS[0], picture, AutoProcessor.from_pretrained(tmp_path))
    assert inputs['input_ids'][0].tolist() == ids
    x = ours.fit(picture)[None].float() / 255
    inputs = dict(inputs, pixel_values=(x - ours.visual.mean) / ours.visual.std)
    out = theirs(**inputs).logits
    mine = ours.llm.lm_head(ours.llm(ours.embed(x, torch.tensor([ids]))))
    assert (mine - out).abs().max() <= 1e-4 * out.abs().max()
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=tok.eos, pad_token_id=tok.pad)
    made = theirs.generate(**inputs, **how)[0, len(ids) :].tolist()
    cut = made.index(tok.eos) if tok.eos in made else len(made)
    assert llava_adv.generate(ours, x, [ids], 12, {tok.eos})[0] == made[:cut]

    # nothing was learned, so nothing may have changed
    settings = {k: v for k, v in parts.items() if k != 'llm'} | dict(steps_a=0, steps_b=1, eps=4)
    train(**settings | dict(init=tmp_path, out=tmp_path / 'run', lr=0, lr_projector=0, lr_tower=0))
    assert same_weights(ours, llava_adv.load_llava(str(tmp_path / 'run'))[0])
    said = re.sub(r'\s+', ' ', capsys.readouterr().out)
    ends = "does not put its end-of-text token '</s>' behind an answer"
    assert ends in said and '(--prompt v1)' in said
    evaluate('vqa', tmp_path, '--n', 2, '--questions', 'what', '--iterations', 2)
    said = re.sub(r'\s+', ' ', capsys.readouterr().out)
    assert ends in said and '(--prompt v1)' in said and str(tmp_path) in said
    assert not (tmp_path / 'eval').exists()  # into what is not a run nothing is written


@pytest.mark.parametrize('older', ['4.0', '4.52', 'bin'])
def test_older_names(tmp_path, older):
    """The hub's names before transformers 5, and those in memory of 4.52."""
    from safetensors.torch import load_file, save_file

    hub_llava(tmp_path)
    ours, _ = llava_adv.load_llava(str(tmp_path))
    weights, named = load_file(tmp_path / 'model.safetensors'), {}
    for name, w in weights.items():
        name = name.replace('vision_tower.', 'vision_tower.vision_model.')
        if older == '4.52':
            name = re.sub('^language_model.model.', 'language_model.', name)
            name = re.sub('^language_model.lm_head', 'lm_head', name)
            name = name if name.startswith('lm_head') else f'model.{name}'
        named[name] = w
    if older == '4.52':
        assert {'lm_head.weight', 'model.language_model.embed_tokens.weight'} <= set(named)
        assert 'model.vision_tower.vision_model.pre_layrnorm.bias' in named
    else:
        named['vision_tower.vision_model.embeddings.position_ids'] = torch.arange(17)[None]
        named['language_model.model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(6)
    (tmp_path / 'model.safetensors').unlink()
    if older == 'bin':
        torch.save(named, tmp_path / 'pytorch_model.bin')
    else:
        save_file(named, tmp_path / 'model.safetensors')
    assert same_weights(ours, llava_adv.load_llava(str(tmp_path))[0])


def without(part):
    return lambda weights: {n: w for n, w in weights.items() if part not in n}


def put(name, change=lambda w: torch.zeros(3)):
    return lambda weights: weights | {name: change(weights.get(name))}


HEAD, EMBEDDING = 'language_model.lm_head.weight', 'language_model.model.embed_tokens.weight'
Q_PROJ, LINEAR = 'vision_tower.encoder.layers.0.self_attn.q_proj.weight', 'multi_modal_projector.linear_1'
OLD_NAMES = """lm_head.weight model.language_model.layers.0.mlp.up_proj.weight
model.multi_modal_projector.linear_1.weight model.vision_tower.post_layernorm.bias
vision_tower.vision_model.post_layernorm.bias""".split()


@pytest.mark.parametrize(
    'change, message',
    [
        (without(Q_PROJ), rf'{Q_PROJ}: missing, \(32, 32\) expected'),
        (put('vision_tower.more'), r'vision_tower.more: surplus, \(3,\)'),
        (without(f'{LINEAR}.bias'), rf'{LINEAR}.bias: missing, \(48,\) expected'),
        (
            put(HEAD, lambda w: w[:7].clone()),
            rf'{HEAD}: torch.float32 \(7, 48\), floating point \(384, 48\) exp',
        ),
        (without('model.layers.1.mlp.up_proj'), 'language_model.model.layers.1.mlp.up_proj.weight: missing'),
        (put('language_model.model.more'), 'language_model.model.more: surplus'),
        *((put(name), 'surplus, it is there twice') for name in OLD_NAMES),  # under today's name as well
        *(
            (put(n, lambda w: w.to(torch.int8)), rf'{n}: torch.int8 \(.*\), floating point \(.*\) expected')
            for n in (
                'language_model.model.norm.weight',
                f'{LINEAR}.weight',
                'vision_tower.pre_layrnorm.weight',
            )
        ),
    ],
)
def test_weights_of_a_llava_that_do_not_fit(tmp_path, change, message):
    """Listed by the names in the file."""
    from safetensors.torch import load_file, save_file

    hub_llava(tmp_path)
    save_file(change(load_file(tmp_path / 'model.safetensors')), tmp_path / 'model.safetensors')
    where = '' if 'twice' in message else rf'error: {tmp_path} is of another architecture:\n(  .*\n)*  '
    with pytest.raises(SystemExit, match=where + message):
        llava_adv.load_llava(str(tmp_path))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(tie_word_embeddings=True), f'{HEAD} is not the embedding'),  # the file has a head of its own
        (dict(vision_feature_layer=-1), 'vision_feature_layer is -1; supported: -2'),
        (dict(vision_feature_select_strategy='full'), "vision_feature_select_strategy is 'full'"),
        (dict(projector_hidden_act='relu'), "projector_hidden_act is 'relu'; supported: 'gelu'"),
        (
            dict(vision_config={'model_type': 'siglip_vision_model'}),
            "model_type is 'siglip_vision_model'; supported: 'clip",
        ),
        (dict(image_token_index=5), f'{data.IMAGE} is token .*, and 5 here'),
        (dict(text_config=None), 'no text_config'),
        (dict(vision_config=None), 'no text_config or no vision_config; expected the format of transformers'),
        (
            ('text_config', dict(vocab_size=None)),
            rf'{EMBEDDING}: .*\(384, 48\), floating point \(32000, 48\) exp',
        ),
        (('text_config', dict(hidden_act='gelu')), "text_config.hidden_act is 'gelu'; supported: .*'silu'"),
        (('text_config', dict(vocab_size='1')), "text_config.vocab_size is '1'; supported: int"),
        (('vision_config', dict(image_size=[16, 16])), r'image_size is \[16, 16\]; supported: int'),
        (
            ('vision_config', dict(hidden_act='relu')),
            "vision_config: hidden_act is 'relu'; supported: quick_gelu",
        ),
        (('vision_config', dict(patch_size=3)), '16 / 3'),
    ],
)
def test_settings_of_a_llava_that_cannot_be_obeyed(tmp_path, change, message):
    hub_llava(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    if isinstance(change, tuple):
        config[change[0]] |= change[1]
    else:
        config |= change
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=message):
        llava_adv.load_llava(str(tmp_path))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ('llava', 'adapters')]
ODD = [None, '128', [], [32, 32], {'a': 1}, -1, 0, 2.5, True, 10**9, 10**400, '\0', [[1]]]


def with_an_odd_value(config, depth, odd):
    """Copies of it, in each of which one value is another; of all odd ones every third in turn."""
    for number, (key, value) in enumerate(config.items()):
        for one in odd[number % 3 :: 3]:
            yield config | {key: one}
        for change in with_an_odd_value(value, depth - 1, odd) if depth and isinstance(value, dict) else ():
            yield config | {key: change}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('kind', ['llm', 'clip', *SLOW])
def test_odd_values_are_obeyed_or_refused(tmp_path, kind):
    """In every key of every JSON file of a directory; refused in one line, and never by a traceback."""
    place = tmp_path / kind
    place.mkdir()
    if kind == 'clip':
        hugging_face(place)
    elif kind == 'llava':
        hub_llava(place)
    else:
        saved(language_model('llama3'), place)
    if kind == 'adapters':
        place = tmp_path / 'delta2'
        released(place, tmp_path / kind)
    load = {'llm': lambda p: llava_adv.load_llm(str(p), torch.float32), 'clip': clip_adv.from_hf_directory}
    refused = 0
    for file in sorted(set(place.glob('*.json')) - {place / 'tokenizer.json'}):
        before = file.read_text()
        odd = with_an_odd_value(json.loads(before), 1, ODD)
        for text in ['[' * 100_000, '{', '[]', 'x', *map(json.dumps, odd)]:
            file.write_text(text)
            try:
                load.get(kind, lambda p: llava_adv.load_llava(str(p)))(place)
            except SystemExit as e:
                refused += 1
                assert re.fullmatch(r'error: .*|error: .* is of another architecture:\n(?s:.*)', str(e))
        file.write_text(before)
    assert refused > 50


def test_a_clip_of_hugging_face_as_image_tower(tmp_path, parts):
    """--init of stage 2: its activation, its LayerNorms' ε, its mean and std are kept, and the run opens in
    transformers."""
    (tmp_path / 'hf').mkdir()
    hugging_face(tmp_path / 'hf')
    train(**{**parts, 'init': tmp_path / 'hf', 'steps_a': 1, 'steps_b': 1, 'out': tmp_path / 'run'})
    ours, tok = llava_adv.load_llava(str(tmp_path / 'run'))
    assert ours.clip_cfg.quick_gelu and ours.visual.ln_pre.eps == 1e-3
    assert ours.preprocess.mean[0] == pytest.approx(0.48145466)
    same_answers(ours, tok, *theirs_of(tmp_path / 'run'), ours.style)


def test_an_image_tower_of_open_clip(tmp_path, parts, monkeypatch):
    """Its tokenizer is not looked for, as stage 2 has no use for it; the run does not need what it began
    with; and its card promises nothing of transformers, which has no such tower."""
    import huggingface_hub

    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    cfg = architecture('ViT-H-14-CLIPA-336')
    cfg['vision_cfg'].update(layers=2, image_size=28)
    place, out = published(tmp_path / 'published', cfg), tmp_path / 'run'
    cfg['text_cfg']['hf_tokenizer_name'] = 'nobody/nothing'
    config = json.loads((place / 'open_clip_config.json').read_text())
    (place / 'open_clip_config.json').write_text(json.dumps(config | {'model_cfg': cfg}))
    for file in [*place.glob('tokenizer*'), *place.glob('*.txt')]:
        file.unlink()
    train(**{**parts, 'init': place, 'out': out, 'steps_a': 2, 'steps_b': 0, 'save_every': 1})
    expected = data.read_weights(place, data.OPEN_CLIP_FILES)
    ours, _ = llava_adv.load_llava(str(out))
    tower = {f'visual.{name}': w for name, w in ours.visual.state_dict().items()}
    # sub-stage A leaves the tower as it is
    assert all(torch.equal(w, expected[name]) for name, w in tower.items()) and len(tower) > 20
    assert opened_as_the_card_says(out) == ['python llava_adv.py --init run --chat IMAGE']
    assert huggingface_hub.ModelCard.load(out / 'README.md').data.library_name != 'transformers'
    place.rename(tmp_path / 'moved')
    (out / 'train_state.pt').unlink()  # so that it goes on from the one before
    train(out=out, resume=True)
    assert same_weights(ours, llava_adv.load_llava(str(out))[0])


# ---------------------------------------------------------------------------------------- the authors' layout
def released(place, base, bare=True):
    """A directory as the authors publish Δ²LLaVA: PEFT's adapters, the rest in non_lora_trainables.bin, the
    tower in open_clip's names.

    → (the LLM of transformers with the adapters merged by PEFT, open_clip's tower, projector)
    """
    import open_clip
    import peft
    import transformers

    place.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        llm = transformers.LlamaForCausalLM.from_pretrained(base)
        targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
        lora = dict(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets, bias='none')
        wrapped = peft.get_peft_model(llm, peft.LoraConfig(**lora, task_type='CAUSAL_LM'))
        for name, p in wrapped.named_parameters():
            if 'lora_B' in name:
                p.data = 0.1 * torch.randn_like(p)
        wrapped.save_pretrained(place)
        cfg = architecture('ViT-L-14-CLIPA' if bare else 'ViT-L-14')
        cfg['vision_cfg'].update(layers=3, image_size=28, patch_size=7)
        visual = open_clip.model.CLIP(**cfg).visual
        projector = torch.nn.Sequential(torch.nn.Linear(128, 48), torch.nn.GELU(), torch.nn.Linear(48, 48))
        for p in [*visual.parameters(), *projector.parameters()]:
            p.data += 0.05 * torch.randn_like(p)
    rest = {f'base_model.model.model.mm_projector.{n}': w for n, w in projector.state_dict().items()}
    tower = 'base_model.model.model.vision_tower.vision_tower'
    rest |= {f'{tower}.{n}': w for n, w in visual.state_dict().items()}
    torch.save({n: w.bfloat16() for n, w in rest.items()}, place / 'non_lora_trainables.bin')
    for module in (visual, projector):
        module.load_state_dict({n: w.bfloat16().float() for n, w in module.state_dict().items()})
    config = dict(model_type='llava_llama', architectures=['LlavaLlamaForCausalLM'], mm_hidden_size=128)
    config |= dict(mm_vision_tower='open_clip:ViT-H-14', mm_projector_type='mlp2x_gelu')
    config |= dict(mm_vision_select_layer=-2, mm_vision_select_feature='patch', mm_patch_merge_type='flat')
    config |= dict(mm_use_im_start_end=False, image_aspect_ratio='pad')
    (place / 'config.json').write_text(json.dumps(config))
    return wrapped.merge_and_unload().eval(), visual.eval(), projector


@pytest.fixture
def base(tmp_path):
    """The language model that adapters are of."""
    (tmp_path / 'base').mkdir()
    return saved(language_model('llama'), tmp_path / 'base')


@pytest.mark.filterwarnings('ignore::FutureWarning')  # between PEFT and transformers
@pytest.mark.parametrize('bare', [True, False])
def test_the_released_layout(tmp_path, base, bare, capsys):
    """Logits equal those of the libraries' parts put together; evaluated; saved, it opens again."""
    llm, visual, projector = released(tmp_path / 'delta2', base, bare)
    ours, tok = llava_adv.load_llava(str(tmp_path / 'delta2'))
    said = capsys.readouterr().out
    assert f'its language model is {base}, as adapter_config.json says' in said
    for taken in ('width=128', 'layers=3', 'head_width=64', 'patch_size=7', f'no_ln_pre={bare}'):
        assert taken in said, taken
    assert ours.style == 'v1' and ours.pad and ours.preprocess.interpolation == 'bilinear'
    assert ours.visual.size == 28 and not ours.clip_cfg.quick_gelu
    prompt = data.Prompt(tok, 'v1', ours.image_tokens, 512)
    ids, _ = prompt.encode([(f'{data.IMAGE}\n{QUESTIONS[0]}', None)])
    x = ours.fit(image())[None].float() / 255

    def embed(part):
        return llm.get_input_embeddings()(torch.tensor([part]))

    with torch.no_grad():
        how = dict(indices=[1], output_fmt='NLC', normalize_intermediates=False)
        seen = visual.forward_intermediates((x - ours.visual.mean) / ours.visual.std, **how)
        features, at = projector(seen['image_intermediates'][0]), ids.index(tok.image)
        whole = torch.cat([embed(ids[:at]), features, embed(ids[at + ours.image_tokens :])], 1)
        expected = llm(inputs_embeds=whole).logits
        found = ours.llm.lm_head(ours.llm(ours.embed(x, torch.tensor([ids]))))[..., : expected.shape[-1]]
    assert features.shape[1] == ours.image_tokens == 16
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    out = tmp_path / 'out'
    out.mkdir()
    llava_adv.save_llava(ours, tok, out, 512)
    again, _ = llava_adv.load_llava(str(out))
    assert same_weights(ours, again) and again.style == 'v1' and again.fit == ours.fit
    if not bare:
        theirs_of(out)  # with a LayerNorm before the blocks transformers opens it, too
    evaluate('pope', tmp_path / 'delta2', '--n', 2, '--iterations', 2)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_settings_of_the_released_layout_that_cannot_be_obeyed(tmp_path, base, capsys):
    place, nowhere = tmp_path / 'delta2', str(tmp_path / 'nowhere' / 'llm')
    released(place, base)
    for name, change, message in [
        (
            'adapter_config',
            dict(r=8),
            r'q_proj.lora_A.weight: .*\(4, 48\), floating point \(8, 48\) expected',
        ),
        ('adapter_config', dict(use_dora=True), 'use_dora is True'),
        ('adapter_config', dict(init_lora_weights='pissa'), "init_lora_weights is 'pissa'"),
        ('adapter_config', dict(r=None), r'adapter_config.json: r is None; supported: int'),
        ('adapter_config', dict(target_modules=['q_proj']), 'k_proj.lora_A.weight: surplus'),
        ('adapter_config', dict(base_model_name_or_path=nowhere), f'{nowhere}: no such file or directory'),
        (
            'config',
            dict(mm_projector_type='linear'),
            "mm_projector_type is 'linear'; supported: 'mlp2x_gelu'",
        ),
        ('config', dict(mm_vision_select_layer=-1), 'mm_vision_select_layer is -1; supported: -2'),
    ]:
        capsys.readouterr()
        file = place / f'{name}.json'
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(SystemExit, match=message):
            llava_adv.load_llava(str(place))
        if 'nowhere' in message:  # where another place can be named
            assert f'its language model is {nowhere}, as adapter_config.json says' in capsys.readouterr().out
        file.write_text(before)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_weights_of_the_released_layout_that_do_not_fit(tmp_path, base):
    place = tmp_path / 'delta2'
    released(place, base)
    rest = torch.load(place / 'non_lora_trainables.bin', weights_only=True)
    bias = 'base_model.model.model.mm_projector.2.bias'
    norm = 'vision_tower.transformer.resblocks.1.ln_1.weight'
    norm = f'base_model.model.model.vision_tower.{norm}'
    for change, message in [
        (put('base_model.model.model.embed_tokens.weight'), 'embed_tokens.weight: surplus'),
        (without(bias), '2.bias: missing'),
        (put(bias, lambda w: w.to(torch.int8)), '2.bias: torch.int8 .*, floating point .* expected'),
        (
            put(norm, lambda w: w.to(torch.int8)),
            'resblocks.1.ln_1.weight: torch.int8 .*, floating point .* exp',
        ),
        (without(norm), 'transformer.resblocks.1.ln_1.weight: missing'),
        (without('vision_tower'), "no image tower in open_clip's names"),
    ]:
        torch.save(change(rest), place / 'non_lora_trainables.bin')
        with pytest.raises(SystemExit, match=message):
            llava_adv.load_llava(str(place))


# -------------------------------------------------------------------------------------- one stage, the other
def test_a_clip_is_no_llava_and_a_llava_no_clip(parts, whole):
    with pytest.raises(SystemExit, match='is no LLaVA directory, which is a CLIP'):
        evaluate('vqa', parts['init'], '--n', 2)
    with pytest.raises(SystemExit, match="is no CLIP: .*config.json says 'llava'"):
        evaluate('zeroshot', whole, '--n', 2)


def test_neither_stage_goes_on_with_the_others_run(parts, whole, tmp_path):
    """Nor with a model of its own that has no checkpoint any more: it would be lost. Nothing is touched."""
    for script, own, other in ((clip_adv, parts['init'], whole), (llava_adv, whole, parts['init'])):
        bare = tmp_path / script.__name__
        shutil.copytree(own, bare, ignore=shutil.ignore_patterns('*train_state.pt'))
        for place, how, message in (
            (other, {}, 'holds a run: continue it with --resume, or give another --out'),
            (other, dict(resume=True), 'is not of this stage'),
            (bare, dict(resume=True), 'no train_state.pt'),
        ):
            out = shutil.copytree(place, tmp_path / 'out')
            before = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
            with pytest.raises(SystemExit, match=message):
                script.main(*data.parse(script.Config, '', flags(out=out, **how)))
            assert {f: f.read_bytes() for f in out.rglob('*') if f.is_file()} == before
            shutil.rmtree(out)


def test_the_card_of_a_llava(whole, tmp_path, parts):
    """Header, limits, how to open it; written once: what is written into it afterwards stays."""
    import huggingface_hub
    import transformers

    out = shutil.copytree(whole, tmp_path / 'run')
    file, last = out / 'README.md', out / 'model.safetensors'
    card, header = file.read_text(), huggingface_hub.ModelCard.load(file).data
    assert header.library_name == 'transformers' and header.pipeline_tag == 'image-text-to-text'
    assert header.tags == ['llava', 'adversarial-robustness']
    for said in (
        f'from `{parts["init"]}`',
        'ε 12/255, α 9/255 × 2 steps',
        'ε = 12/255',
        'stage 2',
        data.commit(),
    ):
        assert said in card, said
    kinds = [transformers.LlavaForConditionalGeneration, 'python llava_adv.py --init run --chat IMAGE']
    assert opened_as_the_card_says(out) == kinds
    mine = card.replace('robustness\n', 'robustness\nlicense: mit\n', 1).encode() + b'by hand\r\n'
    file.write_bytes(mine)
    (out / 'train_state.pt').unlink()  # so that updates are left
    before = last.stat().st_mtime_ns
    train(out=out, resume=True)
    assert file.read_bytes() == mine and last.stat().st_mtime_ns > before
