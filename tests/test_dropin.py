"""Stage 1 beside the libraries: what we write opens in open_clip and transformers, what they write opens here; values, gradients, pixels."""
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


def opened(place):
    """open_clip's own loader on a directory."""
    with torch.random.fork_rng():  # it initialises from the global generator
        model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{place}')
    return model.eval(), preprocess, open_clip.get_tokenizer(f'local-dir:{place}')


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
    embed = lambda z: theirs.encode_image((z - ours.visual.mean) / ours.visual.std)
    with torch.no_grad():
        a, b = ours.encode_text(tokenizer(captions)), theirs.encode_text(ids(captions), normalize=True)
        assert (a - b).abs().max() <= tolerance and (a[0] - a[1]).abs().max() > 100 * tolerance
        assert (ours(x) - F.normalize(embed(x), dim=-1)).abs().max() <= tolerance
    g, h = gradient(ours, a, x), gradient(embed, a, x)
    assert (g - h).norm() <= tolerance * h.norm() and h.norm() > 0


# ------------------------------------------------------------------------------------- what we write, in other people's tools
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
        assert torch.equal(ids['input_ids'], tokenizer(CAPTIONS)[:, :ids['input_ids'].shape[1]])
        out = theirs(**ids, pixel_values=(x - ours.visual.mean) / ours.visual.std)
        text = ours.encode_text(tokenizer(CAPTIONS))
        assert (out.text_embeds - text).abs().max() <= 1e-5 and (out.image_embeds - ours(x)).abs().max() <= 1e-5
        expected = ours.logit_scale.exp() * ours(x) @ text.T
        assert (out.logits_per_image - expected).abs().max() <= 1e-5 * expected.abs().max()
    embed = lambda z: theirs(**ids, pixel_values=(z - ours.visual.mean) / ours.visual.std).image_embeds
    g, h = gradient(ours, text.detach(), x), gradient(embed, text.detach(), x)
    assert (g - h).norm() <= 1e-5 * h.norm() > 0


SIZES = [(64, 64), (37, 53), (53, 37), (201, 77), (16, 16), (5, 9), (17, 16), (31, 100), (100, 31), (3, 200), (33, 65)]


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'LA', 'RGBA', 'CMYK', '1', 'I;16'])
def test_pixels_are_those_of_open_clip(run, tmp_path, mode):
    """To the bit for RGB and L, at odd sizes; of other modes, where open_clip's conversion loses alpha or clips, after ours."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    ours, _ = clip_adv.load_clip(run)
    bicubic = dict(ours.preprocess_cfg, interpolation='bicubic')
    ways = [(ours.preprocess_cfg, opened(run)[1]), (bicubic, image_transform_v2(PreprocessCfg(**{**bicubic, 'size': 16}), is_train=False))]
    g = np.random.default_rng(0)
    for w, h in SIZES if mode in ('RGB', 'L') else SIZES[:3]:
        image = Image.fromarray(g.integers(0, 256, (h, w, 3), np.uint8))
        image = Image.fromarray(g.integers(0, 65536, (h, w)).astype(np.uint16)) if mode == 'I;16' else image.convert(mode)
        image.save(tmp_path / ('x.tif' if mode == 'CMYK' else 'x.png'))
        read = data.read_image(tmp_path / ('x.tif' if mode == 'CMYK' else 'x.png'))
        for how, preprocess in ways:
            theirs = preprocess(image if mode in ('RGB', 'L') else read)
            pixels = data.fit(read, 16, how['interpolation'], how['resize_mode'])
            assert torch.equal(((theirs * ours.visual.std + ours.visual.mean) * 255).round().byte(), pixels), (w, h, how)


def test_pixels_of_transformers(run):
    """Its PIL processor: equal; but where 3, 7, 11, … pixels are cut off in one direction, it cuts one less off before the middle than open_clip
    (and we) do. Its tensor processor rounds differently: by 1/255 at most."""
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    ours, _ = clip_adv.load_clip(run)
    pil, tensor = CLIPImageProcessorPil.from_pretrained(run), CLIPImageProcessor.from_pretrained(run)
    g, largest, shifted = np.random.default_rng(0), 0., 0
    for w, h in SIZES:
        image = Image.fromarray(g.integers(0, 256, (h, w, 3), np.uint8))
        seen = [(torch.as_tensor(p(image, return_tensors='pt')['pixel_values'][0]) * ours.visual.std + ours.visual.mean) * 255 for p in (pil, tensor)]
        expected = data.fit(image, 16).float()
        resized = data.TF.pil_to_tensor(data.TF.resize(image, [16]))
        extra = [side - 16 for side in resized.shape[1:]]
        if any(e % 4 == 3 for e in extra):
            top, left = (e // 2 for e in extra)
            expected, shifted = resized[:, top:top + 16, left:left + 16].float(), shifted + 1
        assert (seen[0] - expected).abs().max() < 1e-3, (w, h)
        largest = max(largest, (seen[1] - expected).abs().max().item())
    assert 0 < shifted < len(SIZES) / 2 and largest < 1.001


def test_a_tower_that_transformers_cannot_express(tmp_path, capsys):
    """ΔCLIP's: said at the end of the training, in the card, and by the absence of a config.json; open_clip opens it."""
    arch = json.loads((Path(open_clip.__file__).parent / 'model_configs' / 'ViT-L-14-CLIPA.json').read_text())
    arch['vision_cfg'].update(layers=2, width=64, image_size=28)
    arch['text_cfg'].update(layers=1, width=32, heads=2)
    (tmp_path / 'arch.json').write_text(json.dumps(arch))
    out = tmp_path / 'run'
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(out=out, arch=tmp_path / 'arch.json', steps=1, batch_size=4, eps=0)))
    said = re.sub(r'\s+', ' ', capsys.readouterr().out)
    reasons = 'the image tower has no LayerNorm before its blocks; its patches are averaged; the text tower has no causal mask; the text is pooled at the last token'
    assert f'not in transformers, whose CLIPModel cannot be this model: {reasons})' in said
    assert f'transformers does not open it, since its CLIPModel cannot be this model: {reasons}' in (out / 'README.md').read_text()
    assert not any((out / name).exists() for name in ('config.json', 'model.safetensors', 'preprocessor_config.json'))
    compare(out, *clip_adv.load_clip(out))
    with pytest.raises(OSError, match='no file named model.safetensors'):
        import transformers
        transformers.CLIPModel.from_pretrained(out, local_files_only=True)


# ------------------------------------------------------------------------------------------------ what they write, here
WORDPIECE = ('[PAD] [bos] [eos] [UNK] [CLS] [SEP] [MASK] a red blue teal circle triangle rect ##angle something else altogether , and much longer : '
             'un ##i 1 ##2 !').split()
MODELS = ['ViT-B-32-quickgelu', 'ViT-L-14', 'ViT-H-14', 'ViT-L-14-CLIPA', 'ΔCLIP-H/14-336', *(pytest.param(name, marks=pytest.mark.slow) for name in (
    'ViT-B-32', 'ViT-B-16', 'ViT-B-16-quickgelu', 'ViT-L-14-quickgelu', 'ViT-L-14-336', 'ViT-L-14-336-quickgelu', 'ViT-g-14', 'ViT-bigG-14',
    'ViT-L-14-CLIPA-336', 'ViT-H-14-CLIPA-336', 'ΔCLIP-L/14-224', 'ΔCLIP-L/14-336'))]


def architecture(name, small=True):
    """open_clip's own configuration; small: its depth, its heads' width, two heads."""
    file = {'ΔCLIP-H/14-336': 'ViT-H-14-CLIPA-336', 'ΔCLIP-L/14-224': 'ViT-L-14-CLIPA', 'ΔCLIP-L/14-336': 'ViT-L-14-CLIPA-336'}.get(name, name)
    cfg = json.loads((Path(open_clip.__file__).parent / 'model_configs' / f'{file}.json').read_text())
    if name.startswith('Δ'):  # its tokens are [bos] w… [eos] pad… [CLS]
        del cfg['text_cfg']['tokenizer_kwargs']
        cfg['text_cfg']['tokenizer_mode'] = 'clips'
    if small:
        cfg['vision_cfg']['width'] = 2 * cfg['vision_cfg'].get('head_width', 64)
        cfg['text_cfg'].update(width=32, heads=2)
    return cfg


def published(place, cfg, kind='safetensors', preprocess=None):
    """A directory as open_clip publishes it, with random weights; the tokenizer in it only where open_clip does not bring it along."""
    from safetensors.torch import save_file
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**{k: v for k, v in cfg.items() if k != 'custom_text'})
        for p in model.parameters():  # no weight may be at a value that hides it, such as a bias of zero
            p.data += .02 * torch.randn_like(p)
    place.mkdir()
    (place / 'open_clip_config.json').write_text(json.dumps({'model_cfg': cfg, 'preprocess_cfg': preprocess or {
        'mean': [.48145466, .4578275, .40821073], 'std': [.26862954, .26130258, .27577711]}}))
    if kind == 'safetensors':
        save_file({n: w.contiguous() for n, w in model.state_dict().items()}, place / 'open_clip_model.safetensors')
    else:
        torch.save(model.state_dict(), place / 'open_clip_pytorch_model.bin')
    if cfg['text_cfg'].get('hf_tokenizer_name'):
        from transformers import BertTokenizer
        (place / 'words.txt').write_text('\n'.join(WORDPIECE))
        BertTokenizer(vocab=str(place / 'words.txt'), bos_token='[bos]', eos_token='[eos]').save_pretrained(place)
        if not any((place / name).exists() for name in ('tokenizer.json', 'vocab.txt')):
            shutil.copy(place / 'words.txt', place / 'vocab.txt')
    return place


@pytest.mark.parametrize('name', MODELS)
def test_architectures_of_open_clip(tmp_path, name):
    place = published(tmp_path / 'published', architecture(name), 'bin' if '16' in name or '336' in name else 'safetensors')
    ours, tokenizer = clip_adv.load_clip(place)
    compare(place, ours, tokenizer)
    tokens = tokenizer(CAPTIONS)
    if name.startswith('Δ'):
        assert (tokens[:, -1] == 4).all() and (tokens[:, 0] == 1).all() and (tokens == 2).any(1).all()
    elif 'CLIPA' in name:
        assert (tokens[:, 0] == 4).all() and not (tokens == 5).any() and ours.text_pool == 'last' and not ours.causal
    else:
        assert (tokens[:, 0] == 49406).all() and ours.causal
    assert isinstance(ours.visual.ln_pre, torch.nn.Identity) == ('CLIPA' in name or name.startswith('Δ'))


@pytest.mark.slow
def test_full_size(tmp_path, capsys):
    """ViT-L/14 as it is, 428 M parameters: prints the time to open it and the peak memory of doing that."""
    place = published(tmp_path / 'published', architecture('ViT-L-14', small=False))
    code = (f'import time, clip_adv\nstarted = time.time()\nclip, _ = clip_adv.load_clip({str(place)!r})\n'
            'print(sum(p.numel() for p in clip.parameters()), time.time() - started, clip_adv.peak_rss() / 2 ** 20)')
    n, seconds, mib = map(float, execute([sys.executable, '-c', code]).split()[-3:])
    assert n == 427616513
    with capsys.disabled():
        print(f'\nViT-L/14: opened in {seconds:.1f} s, peak memory {mib:.0f} MiB; the weights are {n * 4 / 2 ** 20:.0f} MiB')
    compare(place, *clip_adv.load_clip(place))


def test_a_run_from_foreign_weights_opens_everywhere(tmp_path):
    """--init with an open_clip directory and a larger size: the run is a directory of its own again, tokenizer included."""
    from transformers import CLIPModel, CLIPProcessor
    cfg = architecture('ViT-B-32-quickgelu')
    cfg['vision_cfg'].update(layers=2, image_size=64)
    cfg['text_cfg'].update(layers=1)
    place, out = published(tmp_path / 'published', cfg), tmp_path / 'run'
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(init=place, out=out, size=96, steps=1, batch_size=4, eps=4, eps_to=0, eps_from=0, lr=1e-9, warmup=1)))
    ours, tokenizer = clip_adv.load_clip(out)
    assert ours.visual.size == 96 and ours.preprocess_cfg['interpolation'] == 'bicubic'
    compare(out, ours, tokenizer, same_ids=False)  # open_clip fills up with the end of the text there: behind the end it makes no difference
    theirs, processor = CLIPModel.from_pretrained(out), CLIPProcessor.from_pretrained(out)
    embedded = theirs(**processor(text=CAPTIONS, padding=True, truncation=True, return_tensors='pt'),
                      pixel_values=torch.zeros(1, 3, 96, 96)).text_embeds
    assert (embedded - ours.encode_text(tokenizer(CAPTIONS))).abs().max() <= 1e-5
    assert f'It began as `{place}`' in (out / 'README.md').read_text()


def hugging_face(place, act='quick_gelu', eos=49407, **how):
    """A CLIP as transformers writes it, with CLIP's real tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    tower = dict(hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=2, hidden_act=act, projection_dim=24)
    config = CLIPConfig(text_config=dict(tower, hidden_size=32, max_position_embeddings=20, eos_token_id=eos), projection_dim=24,
                        vision_config=dict(tower, num_attention_heads=4, image_size=32, patch_size=8, layer_norm_eps=1e-3))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLIPModel(config)
        for p in model.parameters():
            p.data += .02 * torch.randn_like(p)
    model.save_pretrained(place, **how)
    CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32}).save_pretrained(place)
    bpe = data.read_tokenizer(Path(open_clip.__file__).parent / 'bpe_simple_vocab_16e6.txt.gz', 20)
    words = json.loads(bpe.backend.to_str())['model']
    (place / 'vocab.json').write_text(json.dumps(words['vocab']))
    (place / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in words['merges']))
    return model.eval()


@pytest.mark.parametrize('act, eos, how', [('quick_gelu', 49407, {}), ('quick_gelu', 2, dict(max_shard_size='60KB')), ('gelu', 49407, {}),
                                           ('gelu_pytorch_tanh', 49407, dict(bin=True))])
def test_hugging_face_directories(tmp_path, act, eos, how):
    """As published: whole, sharded, .bin; both kinds of pooling; the tokenizer as vocab.json and merges.txt."""
    from transformers import CLIPTokenizer
    as_bin = how.pop('bin', False) if how else False
    theirs = hugging_face(tmp_path, act, eos, **how)
    if as_bin:
        (tmp_path / 'model.safetensors').unlink()
        torch.save({**theirs.state_dict(), 'text_model.embeddings.position_ids': torch.arange(20)[None]}, tmp_path / 'pytorch_model.bin')
    elif how:
        assert (tmp_path / 'model.safetensors.index.json').is_file()
    ours, tokenizer = clip_adv.load_clip(tmp_path)
    assert ours.preprocess_cfg['interpolation'] == 'bicubic' and ours.preprocess_cfg['mean'][0] == pytest.approx(.48145466)
    ids = CLIPTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding='max_length', max_length=20, truncation=True, return_tensors='pt')['input_ids']
    mine = tokenizer(CAPTIONS)
    assert all(torch.equal(a[:n], b[:n]) for a, b in zip(ids, mine) for n in [int((b == 49407).int().argmax()) + 1])
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embed = lambda z: theirs(input_ids=ids, pixel_values=(z - ours.visual.mean) / ours.visual.std)
    out, text = embed(x), ours.encode_text(mine)
    assert (out.text_embeds - text).abs().max() <= 1e-5 and (out.image_embeds - ours(x)).abs().max() <= 1e-5 and (text[0] - text[1]).abs().max() > .01
    g, h = gradient(ours, text.detach(), x), gradient(lambda z: embed(z).image_embeds, text.detach(), x)
    assert (g - h).norm() <= 1e-5 * h.norm() > 0
    (tmp_path / 'out').mkdir()
    clip_adv.export(ours, tokenizer, tmp_path / 'out')  # and from there it opens in open_clip, and in transformers again where that reads the same pooling
    compare(tmp_path / 'out', ours, tokenizer, same_ids=False)
    again = type(theirs).from_pretrained(tmp_path / 'out')
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in theirs.state_dict().items())


def test_what_does_not_fit_is_listed(tmp_path):
    """In the names of the file; nothing is skipped."""
    from safetensors.torch import load_file, save_file
    hugging_face(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    bad = dict(weights, more=torch.zeros(2))
    del bad['vision_model.encoder.layers.1.self_attn.k_proj.weight']
    bad['visual_projection.weight'] = torch.zeros(24, 63)
    save_file(bad, tmp_path / 'model.safetensors')
    with pytest.raises(SystemExit) as e:
        clip_adv.load_clip(tmp_path)
    for line in (r'vision_model.encoder.layers.1.self_attn.k_proj.weight: missing, (64, 64) expected', 'more: surplus, (2,)',
                 'visual_projection.weight: (24, 63), (24, 64) expected'):
        assert line in str(e.value)
    save_file(weights, tmp_path / 'model.safetensors')
    config, how = (json.loads((tmp_path / name).read_text()) for name in ('config.json', 'preprocessor_config.json'))
    for name, change, message in [('config', dict(hidden_act='relu'), 'hidden_act .relu.'), ('config', dict(num_attention_heads=3), '3 heads do not divide'),
                                  ('preprocessor_config', dict(size={'shortest_edge': 40}), 'size is .*resize to 32'), ('preprocessor_config', dict(resample=0), 'resample is 0'),
                                  ('preprocessor_config', dict(do_normalize=False), 'do_normalize is False')]:
        (tmp_path / 'preprocessor_config.json').write_text(json.dumps(how | (change if name != 'config' else {})))
        (tmp_path / 'config.json').write_text(json.dumps(config | ({'vision_config': config['vision_config'] | change} if name == 'config' else {})))
        with pytest.raises(SystemExit, match=message):
            clip_adv.load_clip(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(dict(config, model_type='siglip')))
    with pytest.raises(SystemExit, match="is no CLIP: no open_clip_config.json, and config.json says 'siglip'"):
        clip_adv.load_clip(tmp_path)


class Runs:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f'touch {self.file}',)


@pytest.mark.filterwarnings('ignore')  # torch warns of its own old formats
def test_files_of_weights(tmp_path, parts):
    """.safetensors, .bin, a training checkpoint of open_clip; beside a configuration or with --arch; what would run code is refused."""
    cfg = architecture('ViT-B-32')
    cfg['vision_cfg'].update(layers=2, image_size=64)
    cfg['text_cfg'].update(layers=1, context_length=12)
    place, arch = published(tmp_path / 'published', cfg), tmp_path / 'arch.json'
    arch.write_text(json.dumps(cfg))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = clip_adv.load_clip(place)[0](x)
    weights = dict(clip_adv.stored(place / 'open_clip_model.safetensors', []))
    torch.save(weights, tmp_path / 'model.bin')
    torch.save(weights, tmp_path / 'old.bin', _use_new_zipfile_serialization=False)
    torch.save({'epoch': 3, 'name': 'run', 'state_dict': {f'module.{n}': w for n, w in weights.items()}, 'optimizer': {}}, tmp_path / 'epoch_3.pt')
    shutil.copy(place / 'open_clip_model.safetensors', tmp_path / 'm.safetensors')
    for file in ('model.bin', 'old.bin', 'epoch_3.pt', 'm.safetensors'):
        assert torch.equal(clip_adv.load_clip(tmp_path / file, arch=str(arch))[0](x), expected), file
    assert torch.equal(clip_adv.load_clip(place / 'open_clip_model.safetensors')[0](x), expected)
    with pytest.raises(SystemExit, match='no open_clip_config.json beside it.*--arch'):
        clip_adv.load_clip(tmp_path / 'model.bin')
    with pytest.raises(SystemExit, match='leave them out'):
        clip_adv.load_clip(place, arch=str(arch))
    with pytest.raises(SystemExit, match=r'of another architecture:\n  transformer.resblocks.1.ln_1.weight: missing, \(512,\) expected'):
        clip_adv.load_clip(tmp_path / 'model.bin', arch='ViT-B-16')  # a name: open_clip is installed
    torch.save({'a': Runs(tmp_path / 'it_ran')}, tmp_path / 'evil.pt')
    (tmp_path / 'evil.bin').write_bytes(pickle.dumps(Runs(tmp_path / 'it_ran')))
    with pytest.raises(SystemExit, match=r'cannot read .*train_state.pt.*holds more than weights .*; of a run give the directory'):
        clip_adv.load_clip(parts['init'] / 'train_state.pt')
    torch.jit.save(torch.jit.trace(lambda z: z + 1, torch.zeros(1)), str(tmp_path / 'program.pt'))
    for file, message in (('evil.pt', 'cannot read .*evil.pt'), ('evil.bin', 'cannot read .*evil.bin'), ('program.pt', 'a program .TorchScript.*openai/clip-vit')):
        with pytest.raises(SystemExit, match=message):
            clip_adv.load_clip(tmp_path / file, arch=str(arch))
    assert not (tmp_path / 'it_ran').exists()
    with pytest.raises(SystemExit):
        evaluation.parse(['zeroshot', str(place), '--arch', str(arch)])
    out = tmp_path / 'run'  # and through both command lines
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(init=tmp_path / 'epoch_3.pt', arch=arch, out=out, steps=1, batch_size=4, eps=0)))
    assert clip_adv.load_clip(out)[0].visual.size == 64
    (tmp_path / 'epoch_3.pt').rename(tmp_path / 'moved.pt')  # a run does not need what it began with
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(out=out, resume=True)))
    (tmp_path / 'moved.pt').rename(tmp_path / 'epoch_3.pt')
    evaluation.main(evaluation.parse(['zeroshot', str(tmp_path / 'epoch_3.pt'), str(out), '--arch', str(arch), '--n', '2', '--eps', '--quiet']))


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: who is at main, what files that has, and these."""
    repositories, served = {}, []  # {id: folder};  (id, file) in the order of the downloads
    commit = '0' * 40

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        place, name, kind, file = self.find(path)
        if place is None:
            return self.answer(404, b'{}', {'X-Error-Code': 'RepoNotFound'})
        files = sorted(p for p in place.rglob('*') if p.is_file())
        if kind == 'revision':
            return self.answer(200, json.dumps({'id': name, 'sha': self.commit, 'siblings': [{'rfilename': str(p.relative_to(place))} for p in files]}).encode())
        if kind == 'tree':
            return self.answer(200, json.dumps([{'type': 'file', 'path': str(p.relative_to(place)), 'size': p.stat().st_size, 'oid': self.tag(p)}
                                                for p in files]).encode())
        if not (place / file).is_file():
            return self.answer(404, b'', {'X-Error-Code': 'EntryNotFound'})
        if self.command == 'GET':
            self.served.append((name, file))
        self.answer(200, (place / file).read_bytes(), {'ETag': f'"{self.tag(place / file)}"', 'X-Repo-Commit': self.commit})

    do_HEAD = do_GET

    def find(self, path):
        for name, place in self.repositories.items():
            if found := re.fullmatch(rf'(?:/api/models)?/{name}/(revision|tree|resolve)/[^/]+/?(.*)', path):
                return place, name, *found.groups()
        return None, None, None, None

    def tag(self, file):
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def answer(self, status, body, headers={}):
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), 'Content-Type': 'application/json', **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_repositories_of_the_hub(tmp_path, whole, run):
    """By their ids, through huggingface_hub, from a hub of our own and then, without it, from its cache: each with the weights that are
    read and no others; one that is not there is an error that says so."""
    hugging_face(tmp_path / 'hf')
    for name in ('pytorch_model.bin', 'tf_model.h5'):
        (tmp_path / 'hf' / name).write_bytes(b'not to be fetched')
    shutil.copytree(tmp_path / 'hf', tmp_path / 'bare', ignore=lambda place, names: [n for n in names if not n.endswith('.json')])
    Hub.repositories, Hub.served = {'org/clip-hf': tmp_path / 'hf', 'org/clip': run, 'org/llava': whole, 'org/bare': tmp_path / 'bare'}, []
    weights = {('org/clip-hf', 'model.safetensors'), ('org/clip', 'open_clip_model.safetensors'), ('org/llava', 'model.safetensors')}
    for name, wanted, others in (('org/adapters', ['adapter_model.bin', 'non_lora_trainables.bin'], ['optimizer.pt', 'training_args.bin']),
                                 ('org/old', ['open_clip_pytorch_model.bin'], ['pytorch_model.bin']),
                                 ('org/shards', ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'], ['pytorch_model-00001-of-00001.bin'])):
        Hub.repositories[name] = tmp_path / name
        (tmp_path / name).mkdir(parents=True)
        for file in wanted + others:
            (tmp_path / name / file).write_text(name + file)
        weights |= {(name, file) for file in wanted}
    code = ('import clip_adv, data, llava_adv\nfor name in "adapters", "old", "shards": data.locate("org/" + name)\n'
            'print(clip_adv.load_clip("org/clip-hf")[0].visual.size, clip_adv.load_clip("hf-hub:org/clip")[0].visual.size, '
            'llava_adv.is_llava("org/llava"), llava_adv.load_llava("org/llava")[0].image_tokens)\n'
            'for wrong in ("org/bare", "nobody/nothing"):\n  try: clip_adv.load_clip(wrong)\n  except SystemExit as e: print(e)')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = dict(HF_HOME=str(tmp_path / 'home'), HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HUB_DISABLE_XET='1', NO_PROXY='*', no_proxy='*')
    try:
        online = execute([sys.executable, '-c', code], **settings, HF_HUB_OFFLINE='0')
    finally:
        server.shutdown(), server.server_close()
    assert {f for f in Hub.served if Path(f[1]).suffix not in ('.json', '.jinja', '.txt')} == weights
    assert len(Hub.served) == len(set(Hub.served))  # nothing twice
    offline = execute([sys.executable, '-c', code], **settings, HF_HUB_OFFLINE='1')
    for said in (online, offline):
        assert '32 16 True 16\n' in said and 'Traceback' not in said, said
        assert re.search(r'error: .*bare.* has no weights: none of model.safetensors', said), said
        assert 'error: nobody/nothing: no such file or directory, and fetching nobody/nothing from the hub failed' in said, said
    for wrong in ('runs/nothing', str(tmp_path / 'a' / 'b'), 'nothing'):
        with pytest.raises(SystemExit, match='no such file or directory, and no repository id'):
            clip_adv.load_clip(wrong)


# ---------------------------------------------------------------------------------------------------------- model cards
def evaluate(*words):
    return evaluation.main(evaluation.parse([*map(str, words), '--quiet']))


def block(card, name):
    begin, end = clip_adv.marks(name)
    return card.partition(begin)[2].partition(end)[0]


def test_the_card_of_a_run(run, capsys):
    """Header, data, attack, limits; what was not measured says so; an evaluation changes the results and nothing else."""
    card = (run / 'README.md').read_text()
    import huggingface_hub
    header = huggingface_hub.ModelCard.load(run / 'README.md').data
    assert header.library_name == 'open_clip' and header.pipeline_tag == 'zero-shot-image-classification' and 'adversarial-robustness' in header.tags
    for said in ('captions', 'ε 8/255, α 6/255 × 2 steps', 'after update 1 of 1', 'local-dir:clip_adv', 'CLIPModel.from_pretrained', 'ε = 8/255', '16 × 16 pixels'):
        assert said.replace('clip_adv', 'clip') in block(card, 'training') or said in block(card, 'training'), said
    assert block(card, 'results').count('| not measured | not measured |') == 4
    mine = card.replace('adversarial-robustness\n', 'adversarial-robustness\nlicense: mit\n') + '\nWritten by hand.\n'
    (run / 'README.md').write_text(mine)
    evaluate('zeroshot', run, '--n', 5, '--eps', 4, '--attack', 'pgd', '--split', 'val')
    after = (run / 'README.md').read_text()
    assert after.replace(block(after, 'results'), '') == mine.replace(block(mine, 'results'), '')
    row = next(line for line in block(after, 'results').splitlines() if line.startswith('| zero-shot'))
    file, = (run / 'eval').iterdir()
    measured = json.loads(file.read_text())
    assert f'easyvqa val, 24 classes, n = 5 | pgd | {100 * measured["results"][0]["clean_acc"]:.1f} | ε = 4: {100 * measured["results"][0]["adv_acc"]["4"]:.1f} ' in row
    assert f'(eval/{file.name})' in row and measured['commit'] in row and block(after, 'results').count('| not measured | not measured |') == 3
    for words in (['zeroshot', run, '--n', 5, '--eps', 4, '--attack', 'pgd', '--split', 'val'], ['zeroshot', run, '--n', 5, '--attack', 'none'],
                  ['retrieval', run, '--n', 5, '--eps', 4, '--attack', 'apgd'], ['typographic', run, '--n', 3, '--font', 0, 20],
                  ['audit', run, '--n', 3, '--queries', 2]):
        evaluate(*words)
    capsys.readouterr()
    assert len(list((run / 'eval').iterdir())) == 5  # the same measurement again is one file
    lines = block((run / 'README.md').read_text(), 'results').splitlines()
    assert sum(line.startswith('| zero-shot') for line in lines) == 2 and not any(line.count('not measured') == 2 for line in lines)
    assert any('20 %: ' in line for line in lines) and any('checks PASS' in line for line in lines)


def test_results_belong_to_the_weights(run, tmp_path, capsys):
    """Of two runs each gets its own; what was measured on other weights is not shown as if it were theirs; a broken file is named."""
    other = Path(shutil.copytree(run, tmp_path / 'other'))
    evaluate('zeroshot', run, other, '--n', 4, '--attack', 'none')
    for place in (run, other):
        file, = (place / 'eval').iterdir()
        report = json.loads(file.read_text())
        assert [r['dir'] for r in report['results']] == [str(place)] and report['weights'] == clip_adv.digest(place / 'open_clip_model.safetensors')
    model, tokenizer = clip_adv.load_clip(run)
    model.visual.proj.data[0] += 1
    clip_adv.export(model, tokenizer, run)
    (run / 'eval' / 'torn.json').write_text('{')
    (run / 'eval' / 'foreign.json').write_text('[]')
    found = clip_adv.results(run)
    assert found.count('| not measured | not measured |') == 4 and file.name in found.split('other weights')[1] and 'torn.json' in found and 'foreign.json' in found
    evaluate('zeroshot', run, '--n', 4, '--attack', 'none')
    assert clip_adv.results(run).count('| not measured | not measured |') == 3
    shutil.rmtree(run / 'eval')
    (run / 'eval').write_text('in the way')  # it cannot be written: said, and the rest goes on
    assert evaluate('zeroshot', run, '--n', 4, '--attack', 'none', '--json', tmp_path / 'out.json') == 0
    assert 'warning: not kept in' in capsys.readouterr().err and (tmp_path / 'out.json').is_file()


def test_what_training_does_to_a_card(parts, tmp_path, capsys):
    """--overwrite clears the old run's card and results with the first checkpoint; a foreign README stays; --resume keeps what was added."""
    small = dict(size=16, patch=4, width=32, layers=1, head_width=16, text_width=16, text_layers=1, batch_size=4, eps=0, save_every=1)
    train = lambda **more: clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(**{**small, **more}, out=tmp_path / 'run')))
    train(steps=1)
    card = tmp_path / 'run' / 'README.md'
    card.write_text(card.read_text() + '\nWritten by hand.\n')
    evaluate('zeroshot', tmp_path / 'run', '--n', 2, '--attack', 'none')
    assert 'eval/zeroshot' in card.read_text() and 'Trained without an attack' in card.read_text()
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(out=tmp_path / 'run', resume=True)))
    assert 'eval/zeroshot' in card.read_text() and 'Written by hand.' in card.read_text()
    train(steps=2, seed=1, overwrite=True)
    assert 'eval/' not in card.read_text() and 'Written by hand.' not in card.read_text() and 'after update 2 of 2' in card.read_text()
    assert not [f for f in (tmp_path / 'run').iterdir() if f.name.startswith('replaced_') or f.name == 'eval']
    card.write_text('# Somebody else')
    train(steps=1, overwrite=True)
    assert card.read_text() == '# Somebody else' and 'is not a card of a run' in capsys.readouterr().out
    other = tmp_path / 'other'
    (other / 'eval').mkdir(parents=True)  # what eval.py did not write stays, as does a link
    (other / 'eval' / 'mine.json').write_text('{}')
    (other / 'README.md').symlink_to(tmp_path / 'card.md')
    for how in (dict(), dict(overwrite=True)):
        clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(**small, steps=1, out=other, **how)))
        assert (other / 'eval' / 'mine.json').exists()
        evaluate('zeroshot', other, '--n', 2, '--attack', 'none')
        assert (other / 'README.md').is_symlink() == (not how)
    (other / 'README.md').unlink()
    (other / 'README.md').mkdir()
    (other / 'chat_template.json').write_text('{}')  # transformers would take it for the run's
    for how in (dict(overwrite=True), dict(resume=True)):
        with pytest.raises(SystemExit, match=r'of no run \(chat_template.json\)'):
            clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(out=other, **how)))
    (other / 'chat_template.json').unlink()
    clip_adv.main(*clip_adv.parse(clip_adv.Config, '', flags(**small, steps=1, out=other, overwrite=True)))
    assert 'is not a card of a run' in capsys.readouterr().out


@pytest.mark.parametrize('how', [dict(), dict(resume=True), dict(overwrite=True)])
def test_a_folder_with_somebody_elses_model_is_left_alone(tmp_path, how):
    """No flag touches it; sharded, too, and with a train_config.json of somebody else's training, and when it is evaluated."""
    hugging_face(tmp_path, max_shard_size='60KB')
    (tmp_path / 'eval').mkdir()
    (tmp_path / 'eval' / 'mine.csv').write_text('')
    (tmp_path / 'train_config.json').write_text('{"lr": 1}')
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    for script in (clip_adv, llava_adv):
        with pytest.raises(SystemExit, match=r'holds files that are of no run \(.*config.json.*model.safetensors.index.json'):
            script.main(*clip_adv.parse(script.Config, '', flags(out=tmp_path, **how)))
    evaluate('zeroshot', tmp_path, '--n', 2, '--attack', 'none')
    assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} == before


def test_cards_and_results_that_others_touched(run, tmp_path, capsys):
    """Line ends stay; what is not UTF-8, or has lost its marks, is left and said; an incomplete result is named; audits of other transfers are others."""
    card = run / 'README.md'
    card.write_bytes(card.read_bytes() + b'by hand\r\n')
    evaluate('zeroshot', run, '--n', 3, '--attack', 'none')
    assert card.read_bytes().endswith(b'by hand\r\n')
    file, = (run / 'eval').iterdir()
    (run / 'eval' / 'half.json').write_text(json.dumps({**json.loads(file.read_text()), 'card': [{'measure': 'zero-shot accuracy'}]}))
    assert 'half.json' in clip_adv.results(run).split('other weights')[1]
    for content in (b'caf\xe9\r\n' + card.read_bytes(), b'no marks'):
        card.write_bytes(content)
        evaluate('zeroshot', run, '--n', 3, '--attack', 'none')
        assert card.read_bytes() == content and 'it is left as it is' in capsys.readouterr().err
    other = shutil.copytree(run, tmp_path / 'other')
    for words in ([run], [run, other], [run, f'{run}/', '--transfer_from', f'{run}/.']):  # the last: nothing is transferred from a model to itself
        evaluate('audit', *words, '--n', 3, '--queries', 2)
    assert len(list((run / 'eval').glob('audit*'))) == 2 and capsys.readouterr().out.count('no other run was given') == 2


@pytest.mark.parametrize('change, message', [
    (dict(vision_cfg=dict(layers=[3, 4, 6, 3], patch_size=None)), r'vision_cfg.patch_size is None'), (dict(vision_cfg=dict(image_size=[224, 224])), 'vision_cfg.image_size is'),
    (dict(vision_cfg=None), 'vision_cfg is None'), (dict(embed_dim=None), 'model_cfg.embed_dim is None'), (dict(quick_gelu='no'), "quick_gelu is 'no'; supported: true, false"),
    (dict(vision_cfg=dict(mlp_ratio='4')), "vision_cfg.mlp_ratio is '4'; supported: a positive number"), (dict(vision_cfg=dict(layers=True)), 'layers is True'),
    (dict(text_cfg=dict(act_kwargs={'approximate': 'foo'})), "act_kwargs.approximate is 'foo'; supported: none, tanh"),
    (dict(text_cfg=dict(norm_kwargs={'eps': 'a'})), "text_cfg.norm_kwargs.eps is 'a'"), (dict(vision_cfg=dict(act_kwargs={'foo': 1})), 'vision_cfg.act_kwargs: unknown key foo'), (dict(text_cfg=dict(norm_kwargs={'eps': 1e-6, 'bias': False})), 'text_cfg.norm_kwargs: unknown key bias')])
def test_configurations_that_cannot_be_obeyed(change, message):
    with pytest.raises(SystemExit, match=message):
        clip_adv.complete(change, {})


@pytest.mark.parametrize('how, message', [(dict(mean=None), 'preprocess_cfg.mean is None'), (dict(std=[.1, .1]), 'three numbers'), (dict(std=[.1, .1, 0]), 'three numbers')])
def test_normalisation_that_cannot_be_obeyed(how, message):
    with pytest.raises(SystemExit, match=message):
        clip_adv.complete({}, how)


def test_a_file_comes_before_shards(tmp_path):
    """As in transformers, where a directory holds both; and an index that names nothing is an error."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel
    hugging_face(tmp_path)
    whole = load_file(tmp_path / 'model.safetensors')
    (tmp_path / 'model.safetensors').unlink()
    hugging_face(tmp_path, max_shard_size='60KB')
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())['weight_map']
    save_file({n: w + 1 for n, w in whole.items()}, tmp_path / 'model.safetensors')
    both = clip_adv.load_clip(tmp_path)[0].visual.proj
    assert torch.equal(both.T, CLIPModel.from_pretrained(tmp_path).visual_projection.weight) and torch.equal(both.T, whole['visual_projection.weight'] + 1)
    (tmp_path / 'model.safetensors').unlink()
    shard = tmp_path / next(file for file in index.values() if file != index['logit_scale'])
    save_file({**load_file(shard), 'logit_scale': torch.zeros(())}, shard)
    with pytest.raises(SystemExit, match='logit_scale: surplus, .*it is there twice'):
        clip_adv.load_clip(tmp_path)
    for content in ([], {'weight_map': None}, {}):
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(content))
        with pytest.raises(SystemExit, match='expected a JSON object|expected names of weights and their files'):
            clip_adv.load_clip(tmp_path)


# --------------------------------------------------------------------------------------------------------------- README
def snippets(text):
    return re.findall(r'```python\n(.*?)```', text, re.S)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of torchvision's reading of files, in transformers
def test_the_snippets_of_readme_and_cards_run_as_they_stand(parts, whole, tmp_path, monkeypatch, capsys):
    (tmp_path / 'runs').mkdir()
    shutil.copytree(parts['init'], tmp_path / 'runs' / 'clip_adv')
    shutil.copytree(whole, tmp_path / 'runs' / 'llava_adv')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)).save(tmp_path / 'cat.jpg')
    section = (ROOT / 'README.md').read_text().partition('## Use it elsewhere')[2].partition('\n## ')[0]
    found = snippets(section)
    assert len(found) == 3
    assert [f.strip() for f in found] == [code.replace('RUN', f'runs/{run}') for code, run in (
        (clip_adv.OPEN_CLIP_SNIPPET, 'clip_adv'), (clip_adv.CLIP_SNIPPET, 'clip_adv'), (llava_adv.LLAVA_SNIPPET, 'llava_adv'))]
    seen = []
    for here, codes in ((tmp_path, found), (parts['init'].parent, snippets((parts['init'] / 'README.md').read_text())),
                        (whole.parent, snippets((whole / 'README.md').read_text()))):
        monkeypatch.chdir(here)
        if here != tmp_path:
            shutil.copy(tmp_path / 'cat.jpg', here)
        for code in codes:
            with torch.random.fork_rng():
                exec(code, {})
            seen.append(capsys.readouterr().out.strip())
    assert len(seen) == 6 and seen[:3] == seen[3:], seen
    probabilities = [torch.tensor(json.loads(re.search(r'\[\[.*?\]\]', s)[0])) for s in seen[:2]]
    assert all(p.shape == (1, 2) and p.sum().item() == pytest.approx(1, abs=1e-3) for p in probabilities)
