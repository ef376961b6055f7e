"""Stage 1 beside the libraries: what we write opens in open_clip and transformers, what they write opens
here; values, gradients, pixels."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import sys
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, execute, flags
from PIL import Image

import clip_adv
import data
import eval as evaluation
import llava_adv

CAPTIONS = ['a red circle', ' a Teal  rectangle', 'something\nelse altogether, and much longer: ünï ☃ 12!']


@pytest.fixture
def run(parts, tmp_path):
    """A copy of a stage-1 run directory."""
    return Path(shutil.copytree(parts['init'], tmp_path / 'clip_adv'))


def train(**settings):
    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**settings)))


def opened(place):
    """open_clip's own loader on a directory."""
    with torch.random.fork_rng():  # it initialises from the global generator
        model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{place}')
    return model.eval(), preprocess, open_clip.get_tokenizer(f'local-dir:{place}')


def opened_as_the_card_says(place):
    """Kinds of the models that the calls in a run's card make, from the folder that the run is in."""
    import transformers

    said = re.search('To load it, from the folder that it is in: (.*)', (place / 'README.md').read_text())[1]
    kinds = []
    with contextlib.chdir(place.parent), torch.random.fork_rng():
        for call in re.findall('`(.*?)`', said):
            if '.from_pretrained(' in call or 'open_clip.' in call:
                model = eval(call, {'open_clip': open_clip, 'transformers': transformers})
                kinds.append(type(model[0] if isinstance(model, tuple) else model))
            else:
                kinds.append(call)
    return kinds


def gradient(embed, text, x):
    """Of the sum of cosines with the texts, each with another weight."""
    x = x.clone().requires_grad_()
    z = (F.normalize(embed(x), dim=-1) @ text.T * torch.arange(1, 1 + len(text))).sum()
    return torch.autograd.grad(z, x)[0]


def compare(place, ours, tokenizer, captions=CAPTIONS, tolerance=1e-5, same_ids=True):
    """Embeddings and input gradient are open_clip's."""
    theirs, _, ids = opened(place)
    x = torch.rand(2, 3, ours.visual.size, ours.visual.size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids(captions), tokenizer(captions)) or not same_ids

    def embed(z):
        return theirs.encode_image((z - ours.visual.mean) / ours.visual.std)

    with torch.no_grad():
        a, b = ours.encode_text(tokenizer(captions)), theirs.encode_text(ids(captions), normalize=True)
        assert (a - b).abs().max() <= tolerance and (a[0] - a[1]).abs().max() > 100 * tolerance
        assert (ours(x) - F.normalize(embed(x), dim=-1)).abs().max() <= tolerance
    g, h = gradient(ours, a, x), gradient(embed, a, x)
    assert (g - h).norm() <= tolerance * h.norm() and h.norm() > 0


# -------------------------------------------------------------- what we write, in other people's tools
def test_one_directory_serves_both_libraries(run):
    from transformers import AutoProcessor, CLIPModel, CLIPProcessor

    ours, tokenizer = clip_adv.load_clip(run)
    compare(run, ours, tokenizer)
    theirs, info = CLIPModel.from_pretrained(run, output_loading_info=True)
    assert not any(info.values()), info
    processor = CLIPProcessor.from_pretrained(run)
    assert isinstance(AutoProcessor.from_pretrained(run), CLIPProcessor)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for how in ({'padding': 'max_length'}, {'padding': True}):
        ids = processor(text=CAPTIONS, truncation=True, return_tensors='pt', **how)
        assert torch.equal(ids['input_ids'], tokenizer(CAPTIONS)[:, : ids['input_ids'].shape[1]])
        out = theirs(**ids, pixel_values=(x - ours.visual.mean) / ours.visual.std)
        text = ours.encode_text(tokenizer(CAPTIONS))
        assert (out.text_embeds - text).abs().max() <= 1e-5
        assert (out.image_embeds - ours(x)).abs().max() <= 1e-5
        expected = ours.logit_scale.exp() * ours(x) @ text.T
        assert (out.logits_per_image - expected).abs().max() <= 1e-5 * expected.abs().max()

    def embed(z):
        return theirs(**ids, pixel_values=(z - ours.visual.mean) / ours.visual.std).image_embeds

    g, h = gradient(ours, text.detach(), x), gradient(embed, text.detach(), x)
    assert (g - h).norm() <= 1e-5 * h.norm() > 0


SIZES = [(64, 64), (37, 53), (53, 37), (201, 77), (16, 16), (5, 9), (17, 16), (31, 100), (100, 31), (3, 200)]
SIZES += [(33, 65)]


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'LA', 'RGBA', 'CMYK', '1', 'I;16'])
def test_pixels_are_those_of_open_clip(run, tmp_path, mode):
    """To the bit for RGB and L, at odd sizes; of other modes after our conversion, as open_clip's loses
    alpha, or clips."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    ours, _ = clip_adv.load_clip(run)
    bicubic = dataclasses.replace(ours.preprocess, interpolation='bicubic')
    in_open_clip = PreprocessCfg(**{**dataclasses.asdict(bicubic), 'size': 16})
    ways = [(ours.preprocess, opened(run)[1]), (bicubic, image_transform_v2(in_open_clip, is_train=False))]
    g, file = np.random.default_rng(0), tmp_path / ('x.tif' if mode == 'CMYK' else 'x.png')
    for w, h in SIZES if mode in ('RGB', 'L') else SIZES[:3]:
        image = Image.fromarray(g.integers(0, 256, (h, w, 3), np.uint8)).convert(
            mode if mode != 'I;16' else 'RGB'
        )
        if mode == 'I;16':
            image = Image.fromarray(g.integers(0, 65536, (h, w)).astype(np.uint16))
        image.save(file)
        read = data.read_image(file)
        for how, preprocess in ways:
            theirs = preprocess(image if mode in ('RGB', 'L') else read)
            theirs = ((theirs * ours.visual.std + ours.visual.mean) * 255).round().byte()
            assert torch.equal(theirs, data.Fit(16, how.interpolation, how.resize_mode)(read)), (w, h, how)


def test_pixels_of_transformers(run):
    """Its PIL processor: equal; but where 3, 7, 11, … pixels are cut off in one direction, it cuts one less
    off before the middle than open_clip (and we) do. Its tensor processor rounds differently: by 1/255 at
    most."""
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ours, _ = clip_adv.load_clip(run)
    processors = [kind.from_pretrained(run) for kind in (CLIPImageProcessorPil, CLIPImageProcessor)]
    g, largest, shifted = np.random.default_rng(0), 0.0, 0
    for w, h in SIZES:
        image = Image.fromarray(g.integers(0, 256, (h, w, 3), np.uint8))
        seen = [torch.as_tensor(p(image, return_tensors='pt')['pixel_values'][0]) for p in processors]
        seen = [(x * ours.visual.std + ours.visual.mean) * 255 for x in seen]
        expected = data.Fit(16)(image).float()
        resized = data.TF.pil_to_tensor(data.TF.resize(image, [16]))
        extra = [side - 16 for side in resized.shape[1:]]
        if any(e % 4 == 3 for e in extra):
            top, left = (e // 2 for e in extra)
            expected, shifted = resized[:, top : top + 16, left : left + 16].float(), shifted + 1
        assert (seen[0] - expected).abs().max() < 1e-3, (w, h)
        largest = max(largest, (seen[1] - expected).abs().max().item())
    assert 0 < shifted < len(SIZES) / 2 and largest < 1.001


def test_a_tower_that_transformers_cannot_express(tmp_path, capsys):
    """ΔCLIP's: said at the end of the training, in the card, and by the absence of a config.json; open_clip
    opens it."""
    arch = json.loads((Path(open_clip.__file__).parent / 'model_configs' / 'ViT-L-14-CLIPA.json').read_text())
    arch['vision_cfg'].update(layers=2, width=64, image_size=28)
    arch['text_cfg'].update(layers=1, width=32, heads=2)
    (tmp_path / 'arch.json').write_text(json.dumps(arch))
    out = tmp_path / 'run'
    train(out=out, arch=tmp_path / 'arch.json', steps=1, batch_size=4, eps=0)
    said = re.sub(r'\s+', ' ', capsys.readouterr().out)
    reasons = (
        'the image tower has no LayerNorm before its blocks; its patches are averaged; '
        'the text tower has no causal mask; the text is pooled at the last token'
    )
    assert f'not in transformers, whose CLIPModel cannot be this model: {reasons})' in said
    assert opened_as_the_card_says(out) == [open_clip.model.CLIP]
    transformers_files = ('config.json', 'model.safetensors', 'preprocessor_config.json')
    assert not any((out / name).exists() for name in transformers_files)
    compare(out, *clip_adv.load_clip(out))
    with pytest.raises(OSError, match='no file named model.safetensors'):
        import transformers

        transformers.CLIPModel.from_pretrained(out, local_files_only=True)


# ------------------------------------------------------------------------------- what they write, here
WORDPIECE = (
    """[PAD] [bos] [eos] [UNK] [CLS] [SEP] [MASK] a red blue teal circle triangle rect ##angle something else
altogether , and much longer : un ##i 1 ##2 !""".split()
)
MODELS = ['ViT-B-32-quickgelu', 'ViT-L-14', 'ViT-H-14', 'ViT-L-14-CLIPA', 'ΔCLIP-H/14-336']
SLOW_MODELS = (
    """ViT-B-32 ViT-B-16 ViT-B-16-quickgelu ViT-L-14-quickgelu ViT-L-14-336 ViT-L-14-336-quickgelu ViT-g-14
ViT-bigG-14 ViT-L-14-CLIPA-336 ViT-H-14-CLIPA-336 ΔCLIP-L/14-224 ΔCLIP-L/14-336""".split()
)
OF_DELTA_CLIP = {
    'ΔCLIP-H/14-336': 'ViT-H-14-CLIPA-336',
    'ΔCLIP-L/14-224': 'ViT-L-14-CLIPA',
    'ΔCLIP-L/14-336': 'ViT-L-14-CLIPA-336',
}
OPENAI = dict(mean=[0.48145466, 0.4578275, 0.40821073], std=[0.26862954, 0.26130258, 0.27577711])


def architecture(name, small=True):
    """open_clip's own configuration; small: its depth, its heads' width, two heads."""
    file = f'{OF_DELTA_CLIP.get(name, name)}.json'
    cfg = json.loads((Path(open_clip.__file__).parent / 'model_configs' / file).read_text())
    if name.startswith('Δ'):  # its tokens are [bos] w… [eos] pad… [CLS]
        del cfg['text_cfg']['tokenizer_kwargs']
        cfg['text_cfg']['tokenizer_mode'] = 'clips'
    if small:
        cfg['vision_cfg']['width'] = 2 * cfg['vision_cfg'].get('head_width', 64)
        cfg['text_cfg'].update(width=32, heads=2)
    return cfg


def clips_tokenizer(place):
    """CLIP's BPE, from open_clip's package, as transformers writes it into a directory."""
    from transformers import CLIPTokenizer

    bpe = open_clip.tokenizer.SimpleTokenizer()
    words = [*list(bpe.encoder)[:-2], '<|startoftext|>', '<|endoftext|>']
    vocab = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocab, merges=list(bpe.bpe_ranks)).save_pretrained(place)


def published(place, cfg, kind='safetensors'):
    """A directory as open_clip publishes it, with random weights."""
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**{k: v for k, v in cfg.items() if k != 'custom_text'})
        for p in model.parameters():  # no weight may be at a value that hides it, such as a bias of zero
            p.data += 0.02 * torch.randn_like(p)
    place.mkdir()
    config = {'model_cfg': cfg, 'preprocess_cfg': OPENAI}
    (place / 'open_clip_config.json').write_text(json.dumps(config))
    if kind == 'safetensors':
        weights = {n: w.contiguous() for n, w in model.state_dict().items()}
        save_file(weights, place / 'open_clip_model.safetensors')
    else:
        torch.save(model.state_dict(), place / 'open_clip_pytorch_model.bin')
    if not cfg['text_cfg'].get('hf_tokenizer_name'):
        clips_tokenizer(place)
    else:
        from transformers import BertTokenizer

        (place / 'words.txt').write_text('\n'.join(WORDPIECE))
        BertTokenizer(vocab=str(place / 'words.txt'), bos_token='[bos]', eos_token='[eos]').save_pretrained(
            place
        )
        if not any((place / name).exists() for name in ('tokenizer.json', 'vocab.txt')):
            shutil.copy(place / 'words.txt', place / 'vocab.txt')
    return place


@pytest.mark.parametrize(
    'name', MODELS + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODELS]
)
def test_architectures_of_open_clip(tmp_path, name):
    kind = 'bin' if '16' in name or '336' in name else 'safetensors'
    place = published(tmp_path / 'published', architecture(name), kind)
    ours, tokenizer = clip_adv.load_clip(place)
    compare(place, ours, tokenizer)
    tokens = tokenizer(CAPTIONS)
    if name.startswith('Δ'):
        assert (tokens[:, -1] == 4).all() and (tokens[:, 0] == 1).all() and (tokens == 2).any(1).all()
    elif 'CLIPA' in name:
        assert (tokens[:, 0] == 4).all() and not (tokens == 5).any()
        assert ours.text_pool == 'last' and not ours.causal
    else:
        assert (tokens[:, 0] == 49406).all() and ours.causal
    assert isinstance(ours.visual.ln_pre, torch.nn.Identity) == ('CLIPA' in name or name.startswith('Δ'))


@pytest.mark.slow
def test_full_size(tmp_path, capsys):
    """ViT-L/14 as it is, 428 M parameters: prints the time to open it and the peak memory of doing that."""
    place = published(tmp_path / 'published', architecture('ViT-L-14', small=False))
    code = f"""import resource, time, clip_adv
started = time.time()
clip, _ = clip_adv.load_clip({str(place)!r})
print(sum(p.numel() for p in clip.parameters()), time.time() - started)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10)"""
    n, seconds, mib = map(float, execute([sys.executable, '-c', code]).split()[-3:])
    assert n == 427616513
    with capsys.disabled():
        print(f'\nViT-L/14: opened in {seconds:.1f} s, peak memory {mib:.0f} MiB', end='; ')
        print(f'the weights are {n * 4 / 2 ** 20:.0f} MiB')
    compare(place, *clip_adv.load_clip(place))


def test_a_run_from_foreign_weights_opens_everywhere(tmp_path):
    """--init with an open_clip directory and a larger size: the run is a directory of its own again,
    tokenizer included, and does not need what it began with."""
    from transformers import CLIPModel, CLIPProcessor

    cfg = architecture('ViT-B-32-quickgelu')
    cfg['vision_cfg'].update(layers=2, image_size=64)
    cfg['text_cfg'].update(layers=1)
    place, out = published(tmp_path / 'published', cfg), tmp_path / 'run'
    attack = dict(eps=4, eps_to=0, eps_from=0)
    train(init=place, out=out, size=96, steps=2, batch_size=4, lr=1e-9, save_every=1, **attack)
    ours, tokenizer = clip_adv.load_clip(out)
    assert ours.visual.size == 96 and ours.preprocess.interpolation == 'bicubic'
    # open_clip fills up with the end of the text there: behind the end it makes no difference
    compare(out, ours, tokenizer, same_ids=False)
    theirs, processor = CLIPModel.from_pretrained(out), CLIPProcessor.from_pretrained(out)
    ids = processor(text=CAPTIONS, padding=True, truncation=True, return_tensors='pt')
    embedded = theirs(**ids, pixel_values=torch.zeros(1, 3, 96, 96)).text_embeds
    assert (embedded - ours.encode_text(tokenizer(CAPTIONS))).abs().max() <= 1e-5
    place.rename(tmp_path / 'moved')
    (out / 'train_state.pt').unlink()  # so that it goes on from the one before
    train(out=out, resume=True)
    again, same = clip_adv.load_clip(out)
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in ours.state_dict().items())
    assert torch.equal(same(CAPTIONS), tokenizer(CAPTIONS))


def hugging_face(place, act='quick_gelu', eos=49407, **how):
    """A CLIP as transformers writes it, with CLIP's real tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tower = dict(hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=2)
    tower |= dict(hidden_act=act, projection_dim=24)
    text = dict(tower, hidden_size=32, max_position_embeddings=20, eos_token_id=eos)
    vision = dict(tower, num_attention_heads=4, image_size=32, patch_size=8, layer_norm_eps=1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(place, **how)
    processor = CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})
    processor.save_pretrained(place)
    clips_tokenizer(place)
    return model.eval()


SHARDS = dict(max_shard_size='60KB')


@pytest.mark.parametrize(
    'act, eos, how',
    [
        ('quick_gelu', 49407, {}),
        ('quick_gelu', 2, SHARDS),
        ('gelu', 49407, {}),
        ('gelu_pytorch_tanh', 49407, 'bin'),
    ],
)
def test_hugging_face_directories(tmp_path, act, eos, how):
    """As published: whole, sharded, .bin; both kinds of pooling."""
    from transformers import CLIPTokenizer

    theirs = hugging_face(tmp_path, act, eos, **({} if how == 'bin' else how))
    if how == 'bin':
        (tmp_path / 'model.safetensors').unlink()
        weights = theirs.state_dict()  # and what older versions saved beside them, as OpenAI's have it
        weights['text_model.embeddings.position_ids'] = torch.arange(20)[None]
        weights['vision_model.embeddings.position_ids'] = torch.arange(17)[None]
        weights['logit_scale'] = weights['logit_scale'].reshape(1)
        torch.save(weights, tmp_path / 'pytorch_model.bin')
    elif how:
        assert (tmp_path / 'model.safetensors.index.json').is_file()
    ours, tokenizer = clip_adv.load_clip(tmp_path)
    assert ours.preprocess.interpolation == 'bicubic' and ours.preprocess.mean[0] == pytest.approx(0.48145466)
    fill = dict(padding='max_length', max_length=20, truncation=True, return_tensors='pt')
    ids = CLIPTokenizer.from_pretrained(tmp_path)(CAPTIONS, **fill)['input_ids']
    mine = tokenizer(CAPTIONS)
    lengths = (mine == 49407).int().argmax(1) + 1
    assert all(torch.equal(a[:n], b[:n]) for a, b, n in zip(ids, mine, lengths, strict=True))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def embed(z):
        return theirs(input_ids=ids, pixel_values=(z - ours.visual.mean) / ours.visual.std)

    out, text = embed(x), ours.encode_text(mine)
    assert (out.text_embeds - text).abs().max() <= 1e-5 and (out.image_embeds - ours(x)).abs().max() <= 1e-5
    assert (text[0] - text[1]).abs().max() > 0.01
    g = gradient(ours, text.detach(), x)
    h = gradient(lambda z: embed(z).image_embeds, text.detach(), x)
    assert (g - h).norm() <= 1e-5 * h.norm() > 0
    # and from there it opens in open_clip, and in transformers again where that reads the same pooling
    (tmp_path / 'out').mkdir()
    clip_adv.save_clip(ours, tokenizer, tmp_path / 'out')
    compare(tmp_path / 'out', ours, tokenizer, same_ids=False)
    again = type(theirs).from_pretrained(tmp_path / 'out')
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in theirs.state_dict().items())


def test_what_does_not_fit_is_listed(tmp_path):
    """In the names of the file; nothing is skipped."""
    from safetensors.torch import load_file, save_file

    hugging_face(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    bad = dict(weights, more=torch.zeros(2), logit_scale=torch.zeros((), dtype=torch.int8))
    del bad['vision_model.encoder.layers.1.self_attn.k_proj.weight']
    bad['visual_projection.weight'] = torch.zeros(24, 63)
    save_file(bad, tmp_path / 'model.safetensors')
    with pytest.raises(SystemExit, match=f'error: {tmp_path} is of another architecture:\n') as e:
        clip_adv.load_clip(tmp_path)
    assert set(str(e.value).split('\n  ')[1:]) == {
        'vision_model.encoder.layers.1.self_attn.k_proj.weight: missing, (64, 64) expected',
        'more: surplus, (2,)',
        'visual_projection.weight: torch.float32 (24, 63), floating point (24, 64) expected',
        'logit_scale: torch.int8 (), floating point () expected',
    }


@pytest.mark.parametrize(
    'name, change, message',
    [
        (
            'config',
            dict(hidden_act='relu'),
            "vision_config: hidden_act is 'relu'; supported: quick_gelu, gelu",
        ),
        ('config', dict(num_attention_heads=3), '3 heads do not divide'),
        ('config', dict(patch_size=7), '32 / 7'),
        ('config', dict(image_size=[32, 32]), r'image_size is \[32, 32\]; supported: int'),
        ('config', dict(layer_norm_eps='a'), "eps.* 'a'"),
        (
            'preprocessor_config',
            dict(size={'shortest_edge': 40}),
            "size is .*40.*; supported: .*'shortest_edge': 32",
        ),
        ('preprocessor_config', dict(resample=0), 'resample is 0; supported: '),
        ('preprocessor_config', dict(do_normalize=False), 'do_normalize is False; supported: True'),
        ('preprocessor_config', dict(image_mean=None), 'mean is None'),
        ('preprocessor_config', dict(image_mean=0.5), 'mean is 0.5; supported: list'),
        ('preprocessor_config', dict(size=[32, 32]), r'config.json: size is \[32, 32\]; supported: .*32'),
        (
            'preprocessor_config',
            dict(size=None, crop_size=None),
            'config.json: size is None; supported: .*32',
        ),
        ('preprocessor_config', dict(resample='bicubic'), 'config.json: resample is bicubic; supported: 3'),
        ('preprocessor_config', dict(image_processor=None), 'config.json: image_processor: TypeError'),
        (
            'config',
            dict(hidden_act=['gelu']),
            r"vision_config: hidden_act is \['gelu'\]; supported: quick_gelu",
        ),
        ('config', dict(num_hidden_layers=10**9), 'layers is 1000000000; supported: int, 1 … 1000'),
        ('preprocessor_config', dict(image_std=[0.5]), 'three numbers'),
        ('preprocessor_config', dict(image_std=[0.5, 0.5, 0]), 'std'),
        ('preprocessor_config', dict(crop_size=24), 'crop_size is .*24'),
        ('preprocessor_config', dict(size=dict(height=32, width=32), crop_size=24), 'crop_size is .*24'),
    ],
)
def test_settings_of_hugging_face_that_cannot_be_obeyed(tmp_path, name, change, message):
    hugging_face(tmp_path)
    file = tmp_path / f'{name}.json'
    config = json.loads(file.read_text())
    (config['vision_config'] if name == 'config' else config).update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=message):
        clip_adv.load_clip(tmp_path)


def test_what_is_no_clip(tmp_path):
    """Another kind of model; a file of weights alone, of which nobody knows what it is."""
    place = published(tmp_path / 'published', architecture('ViT-B-32'))
    (place / 'open_clip_config.json').unlink()
    (place / 'config.json').write_text(json.dumps({'model_type': 'siglip'}))
    with pytest.raises(
        SystemExit, match="is no CLIP: no open_clip_config.json, and config.json says 'siglip'"
    ):
        clip_adv.load_clip(place)
    file, out = place / 'open_clip_model.safetensors', tmp_path / 'run'
    for settings, message in (
        (dict(init=file), f'{file} is no CLIP'),
        (dict(init=place, arch=place / 'config.json'), '--init brings its own model: leave --arch out'),
        (dict(arch='ViT-B-16'), '--arch: cannot read ViT-B-16'),  # of open_clip's; its file is what it takes
    ):
        with pytest.raises(SystemExit, match=message):
            train(out=out, **settings)
    assert not out.exists()


class Runs:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f'touch {self.file}',)


@pytest.mark.filterwarnings('ignore')  # torch warns of its own old formats
@pytest.mark.parametrize('place', ['open_clip', 'hugging_face'])
def test_nothing_in_a_file_of_weights_is_run(tmp_path, place):
    """Nor is a file opened that is a program or holds more than weights."""
    cfg, ran = architecture('ViT-B-32'), tmp_path / 'it_ran'
    cfg['vision_cfg'].update(layers=2, image_size=64)
    cfg['text_cfg'].update(layers=1, context_length=12)
    if place == 'open_clip':
        place, name = published(tmp_path / 'published', cfg), 'open_clip_pytorch_model.bin'
        (place / 'open_clip_model.safetensors').unlink()
    else:
        place, name = tmp_path / 'published', 'pytorch_model.bin'
        hugging_face(place)
        (place / 'model.safetensors').unlink()
    program = torch.jit.trace(lambda z: z + 1, torch.zeros(1))
    for write in (
        lambda file: torch.save({'a': Runs(ran)}, file),
        lambda file: torch.save({'a': Runs(ran)}, file, _use_new_zipfile_serialization=False),
        lambda file: file.write_bytes(pickle.dumps(Runs(ran))),
        lambda file: torch.jit.save(program, str(file)),
        lambda file: torch.save({'a': torch.zeros(1), 'epoch': 3}, file),
        lambda file: torch.save([torch.zeros(1)], file),
    ):
        write(place / name)
        with pytest.raises(SystemExit, match=f'cannot read {place / name}: ') as e:
            clip_adv.load_clip(place)
        assert not re.search(
            'trust|Re-running|False', str(e.value)
        )  # torch's advice how to open it all the same
    assert not ran.exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: who is at main, what files that has, and these."""

    repositories: dict[str, Path] = {}
    served: list[tuple[str, str]] = []  # (id, file) in the order of the downloads
    commit = '0' * 40

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        place, name, kind, file = self.find(path)
        if place is None:
            return self.answer(404, b'{}', {'X-Error-Code': 'RepoNotFound'})
        files = sorted(p for p in place.rglob('*') if p.is_file())
        names = [str(p.relative_to(place)) for p in files]
        if kind == 'revision':
            about = {'id': name, 'sha': self.commit, 'siblings': [{'rfilename': n} for n in names]}
            return self.answer(200, json.dumps(about).encode())
        if kind == 'tree':
            about = [
                dict(path=n, size=p.stat().st_size, oid=self.tag(p))
                for n, p in zip(names, files, strict=True)
            ]
            return self.answer(200, json.dumps([{'type': 'file', **one} for one in about]).encode())
        if not (place / file).is_file():
            return self.answer(404, b'', {'X-Error-Code': 'EntryNotFound'})
        if self.command == 'GET':
            self.served.append((name, file))
        about = {'ETag': f'"{self.tag(place / file)}"', 'X-Repo-Commit': self.commit}
        self.answer(200, (place / file).read_bytes(), about)

    do_HEAD = do_GET

    def find(self, path):
        for name, place in self.repositories.items():
            if found := re.fullmatch(rf'(?:/api/models)?/{name}/(revision|tree|resolve)/[^/]+/?(.*)', path):
                return place, name, *found.groups()
        return None, None, None, None

    def tag(self, file):
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def answer(self, status, body, headers=None):
        self.send_response(status)
        about = {'Content-Length': str(len(body)), 'Content-Type': 'application/json', **(headers or {})}
        for key, value in about.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_repositories_of_the_hub(tmp_path, whole, run):
    """By their ids, through huggingface_hub, from a hub of our own and then, without it, from its cache: each
    with the weights that are read and no others; one that is not there is an error that says so."""
    hugging_face(tmp_path / 'hf')
    for name in ('pytorch_model.bin', 'tf_model.h5'):
        (tmp_path / 'hf' / name).write_bytes(b'not to be fetched')
    (tmp_path / 'bare').mkdir()
    for file in (tmp_path / 'hf').glob('*.json'):
        shutil.copy(file, tmp_path / 'bare')
    Hub.repositories = {f'org/{name}': tmp_path / name for name in ('hf', 'bare')}
    Hub.repositories |= {'org/clip': run, 'org/llava': whole}
    Hub.served = []
    weights = {('org/hf', 'model.safetensors'), ('org/clip', 'open_clip_model.safetensors')}
    weights |= {('org/llava', 'model.safetensors')}
    for name, wanted, others in (
        ('adapters', 'adapter_model.bin non_lora_trainables.bin', 'optimizer.pt training_args.bin'),
        ('old', 'open_clip_pytorch_model.bin', 'pytorch_model.bin'),
        ('shards', 'model-1-of-2.safetensors model-2-of-2.safetensors', 'pytorch_model-1-of-1.bin'),
    ):
        Hub.repositories[f'org/{name}'] = tmp_path / name
        (tmp_path / name).mkdir()
        for file in f'{wanted} {others}'.split():
            (tmp_path / name / file).write_text(name + file)
        weights |= {(f'org/{name}', file) for file in wanted.split()}
    code = """import clip_adv, data, llava_adv
for name in 'adapters', 'old', 'shards':
    data.locate('org/' + name)
print(clip_adv.load_clip('org/hf')[0].visual.size, clip_adv.load_clip('hf-hub:org/clip')[0].visual.size)
print(llava_adv.is_llava('org/llava'), llava_adv.load_llava('org/llava')[0].image_tokens)
for wrong in 'org/bare', 'nobody/nothing':
    try: clip_adv.load_clip(wrong)
    except SystemExit as e: print(e)"""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = dict(HF_HOME=str(tmp_path / 'home'), HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}')
    settings |= dict(HF_HUB_DISABLE_XET='1', NO_PROXY='*', no_proxy='*')
    try:
        online = execute([sys.executable, '-c', code], **settings, HF_HUB_OFFLINE='0')
    finally:
        server.shutdown()
        server.server_close()
    assert {f for f in Hub.served if Path(f[1]).suffix not in ('.json', '.jinja', '.txt')} == weights
    assert len(Hub.served) == len(set(Hub.served))  # nothing twice
    offline = execute([sys.executable, '-c', code], **settings, HF_HUB_OFFLINE='1')
    for said in (online, offline):
        assert '32 16\nTrue 16\n' in said and 'Traceback' not in said, said
        assert re.search(r'error: .*bare.* has no weights: none of model.safetensors', said), said
        failed = 'no such file or directory, and fetching nobody/nothing from the hub failed'
        assert f'error: nobody/nothing: {failed}' in said, said
    for wrong in ('runs/nothing', str(tmp_path / 'a' / 'b'), 'nothing'):
        with pytest.raises(SystemExit, match='no such file or directory, and no repository id'):
            clip_adv.load_clip(wrong)


# -------------------------------------------------------------------- the card, and what others have
def test_the_card_of_a_run(tmp_path, capsys):
    """Header, limits, how to open it; written once: what is written into it afterwards stays."""
    import huggingface_hub
    import transformers

    small = dict(size=16, patch=4, width=32, layers=1, head_width=16, text_width=16, text_layers=1)
    out = tmp_path / 'my_run'
    train(**small, out=out, steps=2, save_every=1, batch_size=4, eps=8, eps_to=0, eps_from=0)
    file = out / 'README.md'
    card = file.read_text()
    header = huggingface_hub.ModelCard.load(file).data
    assert header.library_name == 'open_clip' and header.pipeline_tag == 'zero-shot-image-classification'
    assert header.tags == ['clip', 'adversarial-robustness']
    for said in (
        'images have a caption that follows',
        'ε 8/255, α 6/255 × 2 steps',
        'ε = 8/255',
        'at 16 px',
        data.commit(),
    ):
        assert said in card, said
    assert opened_as_the_card_says(out) == [open_clip.model.CLIP, transformers.CLIPModel]
    mine = card.replace('robustness\n', 'robustness\nlicense: mit\n', 1).encode() + b'by hand\r\n'
    file.write_bytes(mine)
    (out / 'train_state.pt').unlink()  # so that an update is left
    before = (out / 'open_clip_model.safetensors').stat().st_mtime_ns
    train(out=out, resume=True)
    assert file.read_bytes() == mine and (out / 'open_clip_model.safetensors').stat().st_mtime_ns > before


@pytest.mark.parametrize('how', [{}, dict(resume=True)])
def test_a_folder_with_somebody_elses_model_is_left_alone(tmp_path, how):
    """No flag touches it; sharded, too, and with a train_config.json of somebody else's training; nor is
    anything written into it when it is evaluated."""
    hugging_face(tmp_path, **SHARDS)
    (tmp_path / 'eval').mkdir()
    (tmp_path / 'eval' / 'mine.csv').write_text('')
    (tmp_path / 'README.md').write_text('# Somebody else')
    (tmp_path / 'train_config.json').write_text('{"lr": 1}')
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    for script in (clip_adv, llava_adv):
        with pytest.raises(SystemExit, match='is not empty and holds no run: give another --out'):
            script.main(*data.parse(script.Config, '', flags(out=tmp_path, **how)))
    words = ['zeroshot', str(tmp_path), '--n', '2', '--attack', 'none', '--quiet']
    assert evaluation.main(evaluation.parse(words)) == 0
    assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} == before


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(vision_cfg=dict(layers=[3, 4, 6, 3])),
            r'model_cfg.vision_cfg.layers is \[3, 4, 6, 3\]; supported: int',
        ),
        (dict(vision_cfg=dict(patch_size=None)), 'model_cfg.vision_cfg.patch_size is None; supported: int'),
        (
            dict(vision_cfg=dict(image_size=[224, 224])),
            r'model_cfg.vision_cfg.image_size is \[224, 224\]; supported: int',
        ),
        (
            dict(vision_cfg=dict(timm_model_name='x')),
            'model_cfg.vision_cfg: unknown key timm_model_name; supported: image_size',
        ),
        (dict(vision_cfg=dict(layers=True)), 'model_cfg.vision_cfg.layers is True'),
        (dict(vision_cfg=dict(mlp_ratio='4')), "model_cfg.vision_cfg.mlp_ratio is '4'; supported: float"),
        (dict(vision_cfg=dict(act_kwargs={'foo': 1})), r"model_cfg.vision_cfg.act_kwargs is \{'foo': 1\}"),
        (
            dict(vision_cfg=dict(pool_type='max')),
            "model_cfg.vision_cfg.pool_type is 'max'; supported: .*'tok', 'avg'",
        ),
        (dict(vision_cfg=None), 'model_cfg.vision_cfg is None; expected an object'),
        (
            dict(text_cfg=dict(act_kwargs={'approximate': 'foo'})),
            "model_cfg.text_cfg.act_kwargs is .*'foo'.*'none', 'tanh'",
        ),
        (
            dict(text_cfg=dict(norm_kwargs={'eps': 'a'})),
            r"model_cfg.text_cfg.norm_kwargs is \{'eps': 'a'\}; supported: ",
        ),
        (
            dict(text_cfg=dict(norm_kwargs={'eps': 1e-6, 'bias': False})),
            'model_cfg.text_cfg.norm_kwargs is .*bias',
        ),
        (dict(embed_dim=None), 'model_cfg.embed_dim is None'),
        (dict(embed_dim=-1), 'model_cfg.embed_dim is -1'),
        (dict(quick_gelu='no'), "model_cfg.quick_gelu is 'no'; supported: bool"),
        (dict(more=1), 'model_cfg: unknown key more'),
    ],
)
def test_configurations_that_cannot_be_obeyed(change, message):
    with pytest.raises(SystemExit, match=f'error: here: {message}'):
        clip_adv.from_open_clip({'model_cfg': change, 'preprocess_cfg': {}}, 'here')


@pytest.mark.parametrize(
    'how, message',
    [
        (dict(mean=None), 'preprocess_cfg.mean is None'),
        (dict(std=[0.1, 0.1]), 'three numbers'),
        (dict(std=[0.1, 0.1, 0]), 'std'),
        (dict(mean=[]), 'three numbers'),
        (dict(mean=[0.5] * 9, std=[0.5]), 'three numbers'),
        (
            dict(interpolation='nearest'),
            "preprocess_cfg.interpolation is 'nearest'; supported: .*'bilinear', 'bicubic'",
        ),
        (dict(fill_color=1), 'preprocess_cfg.fill_color is 1'),
    ],
)
def test_pixels_that_cannot_be_obeyed(how, message):
    with pytest.raises(SystemExit, match=f'error: here: .*{message}'):
        clip_adv.from_open_clip({'model_cfg': {}, 'preprocess_cfg': how}, 'here')


def test_a_file_comes_before_shards(tmp_path):
    """As in transformers, where a directory holds both; and an index that names nothing is an error."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel

    hugging_face(tmp_path)
    whole = load_file(tmp_path / 'model.safetensors')
    (tmp_path / 'model.safetensors').unlink()
    hugging_face(tmp_path, **SHARDS)
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())['weight_map']
    save_file({n: w + 1 for n, w in whole.items()}, tmp_path / 'model.safetensors')
    both, theirs = clip_adv.load_clip(tmp_path)[0].visual.proj, CLIPModel.from_pretrained(tmp_path)
    assert torch.equal(both.T, theirs.visual_projection.weight)
    assert torch.equal(both.T, whole['visual_projection.weight'] + 1)
    (tmp_path / 'model.safetensors').unlink()
    shard = tmp_path / next(file for file in index.values() if file != index['logit_scale'])
    save_file({**load_file(shard), 'logit_scale': torch.zeros(())}, shard)
    with pytest.raises(SystemExit, match='logit_scale: surplus, it is there twice'):
        clip_adv.load_clip(tmp_path)
    for content, message in (
        ([], 'expected a JSON '),
        ({'weight_map': None}, 'weight_map is .*; expected names of weights and their files'),
        ({}, 'expected names of weights and their files'),
    ):
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=message):
            clip_adv.load_clip(tmp_path)


# ------------------------------------------------------------------------------------------------ README
# torchvision's reading of files, in transformers, is deprecated
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_the_snippets_of_readme_run_as_they_stand(parts, whole, tmp_path, monkeypatch, capsys):
    """With the probabilities that our own model has, and the LLaVA's own words."""
    for place, name in ((parts['init'], 'clip_adv'), (whole, 'llava_adv')):
        shutil.copytree(place, tmp_path / 'runs' / name)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'cat.jpg', quality=95)
    monkeypatch.chdir(tmp_path)
    section = (ROOT / 'README.md').read_text().partition('\n## Use it elsewhere')[2].partition('\n## ')[0]
    seen = []
    for code in re.findall(r'```python\n(.*?)```', section, re.S):
        with torch.random.fork_rng():
            exec(code, {})
        seen.append(capsys.readouterr().out.strip())
    image, texts = data.read_image(tmp_path / 'cat.jpg'), ['a red circle', 'a blue circle']
    clip, tokenizer = clip_adv.load_clip('runs/clip_adv')
    x = data.Fit(16)(image)[None].float() / 255
    cosines = clip(x) @ clip.encode_text(tokenizer(texts)).T
    by_open_clip, by_transformers, by_llava = seen
    for said, rounding in ((by_open_clip, 1e-3), (by_transformers, 0.01)):
        probabilities = torch.tensor(json.loads(re.search(r'\[\[.*?\]\]', said)[0]))
        assert (probabilities - (clip.logit_scale.exp() * cosines).softmax(-1)).abs().max() <= rounding
    llava, tok = llava_adv.load_llava('runs/llava_adv')
    prompt = data.Prompt(tok, llava.style, llava.image_tokens, 512)
    ids, _ = prompt.encode([(f'{data.IMAGE}\nwhat color is the shape?', None)])
    answer = llava_adv.generate(llava, llava.fit(image)[None].float() / 255, [ids], 9, tok.ends)[0]
    assert by_llava == tok.decode(answer)
