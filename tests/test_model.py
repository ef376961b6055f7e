"""The model against open_clip's, with copied random weights: values, input gradients, loss, files."""

import json
import weakref
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import TINY, flags
from open_clip.model import CLIP as OpenCLIP
from open_clip.model import resize_pos_embed
from torch.utils.flop_counter import FlopCounterMode

import attacks
import clip_adv
import data

VISION = dict(image_size=24, patch_size=4, width=32, layers=3, head_width=16)
TEXT = dict(context_length=9, vocab_size=50, width=24, heads=2, layers=2)
VARIANTS = {
    'vanilla': dict(embed_dim=20, vision_cfg=VISION, text_cfg=TEXT),
    'OpenAI': dict(embed_dim=20, quick_gelu=True, vision_cfg=VISION, text_cfg=TEXT),
    'ΔCLIP': dict(
        embed_dim=20,
        vision_cfg=dict(VISION, no_ln_pre=True, pool_type='avg', final_ln_after_pool=True, head_width=8),
        text_cfg=dict(TEXT, no_causal_mask=True, pool_type='last'),
    ),
    'other': dict(
        embed_dim=20,
        vision_cfg=dict(VISION, mlp_ratio=2, act_kwargs={'approximate': 'tanh'}, norm_kwargs={'eps': 1e-3}),
        text_cfg=dict(TEXT, pool_type='eos', eos_id=7, norm_kwargs={'eps': 1e-3}),
    ),
}


def both(model_cfg):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = OpenCLIP(**model_cfg).eval()
        for p in theirs.parameters():  # no weight may be at a value that hides it, such as a bias of zero
            p.data += 0.05 * torch.randn_like(p)
    ours = built(model_cfg)
    data.fill(ours, theirs.state_dict(), 'open_clip')
    return ours, theirs


def built(model_cfg):
    """A CLIP of ours with random weights."""
    config = {'model_cfg': model_cfg, 'preprocess_cfg': clip_adv.IMAGENET}
    with clip_adv.seeded(0):
        return clip_adv.CLIP(*clip_adv.from_open_clip(config, 'the test')).eval()


def batch(model_cfg, n=5):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, 24, 24, generator=g)
    tokens = torch.randint(1, 49, (n, 9), generator=g)
    tokens[:, 6] = 49  # the highest id, where argmax pools
    tokens[:, 3] = 7  # what the 'eos' variant pools at
    return x, tokens


@pytest.mark.parametrize('name', VARIANTS)
def test_towers_and_input_gradient_equal_open_clip(name):
    ours, theirs = both(VARIANTS[name])
    x, tokens = batch(VARIANTS[name])
    z = x.clone().requires_grad_()
    x.requires_grad_()
    mean, std = ours.visual.mean, ours.visual.std
    image, text = ours(x), ours.encode_text(tokens)
    image2, text2 = theirs.encode_image((z - mean) / std, normalize=True), theirs.encode_text(
        tokens, normalize=True
    )
    torch.testing.assert_close(image, image2, rtol=0, atol=1e-6)
    torch.testing.assert_close(text, text2, rtol=0, atol=1e-6)
    loss = clip_adv.info_nce(image, text, ours.logit_scale)
    loss2 = open_clip.ClipLoss()(image2, text2, theirs.logit_scale.exp())
    torch.testing.assert_close(loss, loss2, rtol=1e-6, atol=0)
    gradient, gradient2 = (
        torch.autograd.grad(loss, x, retain_graph=True)[0],
        torch.autograd.grad(loss2, z, retain_graph=True)[0],
    )
    assert (gradient - gradient2).norm() <= 1e-5 * gradient2.norm() and gradient2.norm() > 1e-3
    loss.backward()
    loss2.backward()
    for (n, p), (n2, p2) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters())):
        assert n == n2 and (p.grad - p2.grad).norm() <= 1e-5 * p2.grad.norm() + 1e-8, n


def test_position_embedding_is_resized_as_in_open_clip():
    ours, _ = both(VARIANTS['vanilla'])
    for size in (12, 32):
        larger = built(dict(VARIANTS['vanilla'], vision_cfg=dict(VISION, image_size=size)))
        weights = {k: v.clone() for k, v in ours.state_dict().items()}
        larger.visual.grid_size = (size // 4, size // 4)  # where open_clip's function looks
        resize_pos_embed(weights, larger)
        torch.testing.assert_close(
            clip_adv.resize_positions(ours.visual.positional_embedding, size // 4),
            weights['visual.positional_embedding'],
        )


def test_info_nce_by_hand():
    """Two pairs, scale 1: rows (1, 0) and (0, 1) of cosines give −log(e / (e + 1)) in both directions."""
    eye = torch.eye(2)
    expected = torch.log1p(torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(clip_adv.info_nce(eye, eye, torch.tensor(0.0)), expected)
    torch.testing.assert_close(clip_adv.info_nce(eye, eye.flip(0), torch.tensor(0.0)), expected + 1)


# ------------------------------------------------------------------------ a batch in parts; what a step costs
def adversarial_step(model, x, tokens, micro_batch):
    """(adversarial images, gradients by name), of the update on them"""
    model.zero_grad()
    text = model.encode_text(tokens, micro_batch)
    fixed, scale = text.detach(), model.logit_scale.detach()

    def loss_of(images):
        return clip_adv.info_nce(model(images, micro_batch), fixed, scale, micro_batch)

    with clip_adv.frozen(model.visual):
        x_adv = attacks.pgd(loss_of, x, 8 / 255, 6 / 255, 2)
    clip_adv.info_nce(model(x_adv, micro_batch), text, model.logit_scale, micro_batch).backward()
    return x_adv, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize('micro_batch', [1, 3, 4, 8])
def test_micro_batches_make_the_step_of_the_whole_batch(micro_batch):
    """The attacked images, and every gradient to 1e-5, that of the logit scale included.

    open_clip's --accum-freq K puts the loss of the whole batch behind each of its K parts. The towers get
    their gradient once, through the part that has one; the logit scale gets it K times: 2.0, 3.0 and 4.0
    times too large for K = 2, 3, 4. Its loop is written out below, and measured."""
    model = built(VARIANTS['vanilla'])
    x, tokens = batch(VARIANTS['vanilla'], n=8)
    whole, gradients = adversarial_step(model, x, tokens, 0)
    parts, gradients2 = adversarial_step(model, x, tokens, micro_batch)
    assert (whole - x).abs().max() > 7.9 / 255
    assert ((whole - parts).abs() > 1e-6).float().mean() < 1e-3  # a sign may flip where the gradient is 0
    for name, g in gradients.items():
        assert (g - gradients2[name]).norm() <= 1e-5 * g.norm(), name

    model.zero_grad()
    with torch.no_grad():
        image, text = model(whole), model.encode_text(tokens)
    of_parts = list(zip(*(v.split(micro_batch) for v in (whole, tokens, image, text))))
    for i, (images, captions, *_) in enumerate(of_parts):
        rows = [list(column) for column in list(zip(*of_parts))[2:]]
        rows[0][i], rows[1][i] = model(images), model.encode_text(captions)
        open_clip.ClipLoss()(*map(torch.cat, rows), model.logit_scale.exp()).backward()
    times = (model.logit_scale.grad / gradients['logit_scale']).item()
    assert times == pytest.approx(len(of_parts), rel=1e-4)
    of_tower = gradients['visual.proj']
    assert (model.visual.proj.grad - of_tower).norm() <= 1e-4 * of_tower.norm()


def test_micro_batches_hold_the_activations_of_one():
    """Of what a block computes, no more than one part's is alive at any time, in attack and update."""
    model, alive, most = built(VARIANTS['vanilla']), [], []
    x, tokens = batch(VARIANTS['vanilla'], n=8)

    def keep(module, args, output):
        alive.append((len(output), weakref.ref(output.untyped_storage())))
        most.append(sum(n for n, memory in alive if memory() is not None))

    layers = model.visual.transformer.resblocks[0].mlp.c_fc, model.transformer.resblocks[0].mlp.c_fc
    for layer in layers:
        layer.register_forward_hook(keep)
    adversarial_step(model, x, tokens, 2)
    # 4 parts, each twice: of the text, of 2 attack steps, of the update
    assert len(most) == 4 * 2 * 4 and max(most) == 2
    most.clear()
    adversarial_step(model, x, tokens, 0)
    assert len(most) == 4 and max(most) == 16  # of images and texts


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('layers, width, k', [(3, 64, 2), pytest.param(12, 384, 3, marks=pytest.mark.slow)])
def test_flops_of_an_adversarial_step(layers, width, k, compiled):
    """An attack step is a forward pass and the gradient of the pixels, two thirds of a clean step: what is
    beyond (2K + 3) / 3 clean steps is the gradient of the pixels in the update, of the first layer alone."""
    cfg = clip_adv.ClipCfg(clip_adv.VisionCfg(32, 4, width, layers, 32), embed_dim=64)
    with clip_adv.seeded(0):
        tower, x = clip_adv.ViT(cfg, clip_adv.Preprocess()), torch.rand(2, 3, 32, 32)
    if compiled:
        tower.compile(backend='aot_eager')  # the graphs of torch.compile, run op by op, so that they count

    def update(images):
        tower(images).square().sum().backward()

    def adversarial():
        with clip_adv.frozen(tower):
            images = attacks.pgd(lambda z: tower(z + 0).square().sum(), x, 8 / 255, 6 / 255, k)
        update(images)

    def flops(step):
        step()  # compiles
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()

    assert 0.95 <= flops(adversarial) / flops(lambda: update(x)) / ((2 * k + 3) / 3) <= 1.01


def test_frozen_restores():
    model, _ = both(VARIANTS['vanilla'])
    model.train()
    model.visual.proj.requires_grad_(False)
    with clip_adv.frozen(model.visual):
        assert not model.visual.training and not any(p.requires_grad for p in model.visual.parameters())
        assert model.text_projection.requires_grad
    assert (
        model.visual.training
        and not model.visual.proj.requires_grad
        and model.visual.conv1.weight.requires_grad
    )
    with pytest.raises(RuntimeError), clip_adv.frozen(model.visual):
        raise RuntimeError
    assert model.visual.training and model.visual.conv1.weight.requires_grad


# -------------------------------------------------------------------------------------------- run directories
@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'run'
    clip_adv.main(*data.parse(clip_adv.Config, '', flags(**TINY, out=out)))
    return out


def test_open_clip_opens_a_run(run):
    """open_clip's own loader, preprocessing and tokenizer on a run directory: equal pixels, token ids and
    embeddings."""
    with torch.random.fork_rng():  # open_clip initialises from the global generator
        theirs, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{run}')
    ids = open_clip.get_tokenizer(f'local-dir:{run}')
    ours, tokenizer = clip_adv.load_clip(run)
    theirs.eval()
    pairs = data.load_pairs('easyvqa', 'val')
    captions = ['a red circle', 'a Teal  rectangle', 'something else altogether, and much longer']
    assert torch.equal(ids(captions), tokenizer(captions))
    image = data.read_image(pairs.files[0])
    pixels = data.Fit(16)(image).float() / 255
    normalised = preprocess(image)
    torch.testing.assert_close((pixels - ours.visual.mean) / ours.visual.std, normalised, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixels[None]), theirs.encode_image(normalised[None], normalize=True), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            ours.encode_text(tokenizer(captions)),
            theirs.encode_text(ids(captions), normalize=True),
            rtol=0,
            atol=1e-6,
        )


def test_a_wordpiece_run_opens_in_open_clip(tmp_path):
    """ΔCLIP's tokenizer: open_clip reads what we export in its 'clips' mode, with [CLS] as the last token."""
    words = '[PAD] [unused0] [unused1] [UNK] [CLS] a red blue gray black brown green teal yellow circle'
    words += ' triangle rect ##angle'
    (tmp_path / 'vocab.txt').write_text('\n'.join(words.split()))
    out = tmp_path / 'run'
    clip_adv.main(
        *data.parse(
            clip_adv.Config, '', flags(**dict(TINY, steps=2), out=out, tokenizer=tmp_path / 'vocab.txt')
        )
    )
    ids = open_clip.get_tokenizer(f'local-dir:{out}')
    model, tokenizer = clip_adv.load_clip(out)
    captions = ['a red circle', 'A blue rectangle', 'a ' * 20]
    assert torch.equal(ids(captions), tokenizer(captions)) and (tokenizer(captions)[:, -1] == 4).all()
    assert model.text_pool == 'last' and not model.causal
    with torch.random.fork_rng():
        assert open_clip.create_model(f'local-dir:{out}').text_pool_type == 'last'


def test_what_a_run_directory_holds(run):
    assert {f.name for f in run.iterdir()} == {
        'train_config.json',
        'log.jsonl',
        'train_state.pt',
        'previous_train_state.pt',
        'open_clip_config.json',
        'open_clip_model.safetensors',
        'tokenizer.json',
        'tokenizer_config.json',
        'config.json',
        'model.safetensors',
        'preprocessor_config.json',
        'README.md',
        'lock',
    }
    rows = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in rows] == [2, 4, 6]
    assert {
        'step',
        'loss_adv',
        'loss_clean',
        'lr',
        'grad_norm',
        'attack_ms',
        'train_ms',
        'images_per_s',
        'peak_memory_mb',
    } <= set(rows[0])
    assert all(
        r['loss_adv'] >= r['loss_clean'] and r['k'] == 2 and r['eps'] == 8 and r['alpha'] == 6 for r in rows
    )
    config = json.loads((run / 'train_config.json').read_text())
    assert (
        config['config']['alpha'] == 6
        and config['versions']['torch'] == torch.__version__
        and config['commit']
    )


def test_larger_size_from_a_checkpoint(run, tmp_path):
    """--init RUN --size BIGGER: the weights as they are, the position embeddings interpolated."""
    model, _ = clip_adv.load_clip(run)
    larger, _ = clip_adv.load_clip(run, size=24)
    assert larger.visual.size == 24 and larger.cfg.vision_cfg.image_size == 24
    assert larger.visual.positional_embedding.shape == (37, 32)
    assert torch.equal(larger.visual.conv1.weight, model.visual.conv1.weight)
    out = tmp_path / 'larger'
    clip_adv.main(
        *data.parse(
            clip_adv.Config,
            '',
            flags(init=run, out=out, size=24, steps=1, batch_size=8, lr=1e-9, eps=8, eps_from=0, eps_to=0),
        )
    )
    trained, _ = clip_adv.load_clip(out)
    with torch.random.fork_rng():
        assert open_clip.create_model(f'local-dir:{out}').visual.image_size == (24, 24)
    for (name, p), (_, q) in zip(larger.state_dict().items(), trained.state_dict().items()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8, msg=name)  # lr 1e-9: this is where training began


def test_weights_of_another_shape_are_listed(run):
    model, _ = clip_adv.load_clip(run)
    weights = dict(model.state_dict())
    weights['surplus'] = weights.pop('logit_scale')
    weights['visual.proj'] = weights['visual.proj'].T[:7]
    before = model.visual.proj.clone()
    with pytest.raises(SystemExit) as e:
        data.fill(model, weights, 'file')
    for line in (
        'logit_scale: missing, () expected',
        'surplus: surplus, ()',
        'visual.proj: torch.float32 (7, 32), floating point (32, 16) expected',
    ):
        assert line in str(e.value)
    assert torch.equal(model.visual.proj, before)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda c: c['model_cfg']['vision_cfg'].update(timm_model_name='x'),
            'vision_cfg: unknown key timm_model_name',
        ),
        (lambda c: c['model_cfg'].update(custom_text=True), 'model_cfg: unknown key custom_text'),
        (lambda c: c['model_cfg']['vision_cfg'].update(pool_type='max'), "pool_type is 'max'"),
        (lambda c: c['preprocess_cfg'].update(interpolation='nearest'), "interpolation is 'nearest'"),
        (lambda c: c['model_cfg']['vision_cfg'].update(width=64), 'visual.conv1.weight: .*expected'),
        (lambda c: c.pop('preprocess_cfg'), 'preprocess_cfg is None'),
    ],
)
def test_a_configuration_that_cannot_be_obeyed(run, tmp_path, change, message):
    config = json.loads((run / 'open_clip_config.json').read_text())
    change(config)
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=message):
        clip_adv.load_clip(tmp_path)


def test_a_directory_that_is_no_run(tmp_path, run):
    with pytest.raises(SystemExit, match='is no CLIP: no open_clip_config.json'):
        clip_adv.load_clip(tmp_path)
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    (tmp_path / 'open_clip_config.json').write_bytes((run / 'open_clip_config.json').read_bytes())
    with pytest.raises(SystemExit, match='cannot read .*safetensors'):
        clip_adv.load_clip(tmp_path)


def test_the_papers_tower_from_open_clips_configuration(tmp_path):
    """--arch takes open_clip's own JSON, here ΔCLIP's family at small width: what it says is what is
    built."""
    file = Path(open_clip.__file__).parent / 'model_configs' / 'ViT-H-14-CLIPA-336.json'
    cfg = json.loads(file.read_text())
    cfg['vision_cfg'].update(layers=2, width=32, head_width=16)
    cfg['text_cfg'].update(layers=1, width=16, heads=2)
    (tmp_path / 'arch.json').write_text(json.dumps(cfg))
    clip_adv.main(
        *data.parse(
            clip_adv.Config,
            '',
            flags(
                out=tmp_path / 'run', arch=tmp_path / 'arch.json', size=28, steps=1, batch_size=4, context=16
            ),
        )
    )
    model, tokenizer = clip_adv.load_clip(tmp_path / 'run')
    assert (
        model.visual.patch == 14
        and model.visual.pool == 'avg'
        and model.visual.ln_after_pool
        and not model.causal
    )
    assert model.visual.size == 28 and tokenizer.context == 16  # of the flags
    arch = clip_adv.Config(arch=str(tmp_path / 'arch.json'))
    own, tokenizer2 = clip_adv.build(arch, {'arch'}, data.load_pairs('easyvqa', 'val'), None)
    assert own.visual.size == 336 and tokenizer2.context == 32  # of the file
    (tmp_path / 'vocab.txt').write_text('[PAD]\n[unused0]\n[unused1]\n[UNK]\n[CLS]\n[SEP]\na\nred')
    arch.tokenizer = str(tmp_path / 'vocab.txt')  # ΔCLIP's layout then, whatever CLIPA's file says
    own, wordpiece = clip_adv.build(arch, {'arch'}, data.load_pairs('easyvqa', 'val'), None)
    for tok, model_ in ((tokenizer, model), (wordpiece, own)):  # what is trained on is what is read back
        again = data.tokenizer_for(model_.cfg.text_cfg, tok.backend)
        assert torch.equal(again(['a red', 'red']), tok(['a red', 'red']))
    assert wordpiece(['a red'])[0, [0, 1, 2, 3, -1]].tolist() == [1, 6, 7, 2, 4]
    (tmp_path / 'arch.json').write_text('{"vision_cfg": {}}')
    with pytest.raises(SystemExit, match='--arch .*: no text_cfg'):
        clip_adv.build(arch, {'arch'}, data.load_pairs('easyvqa', 'val'), None)
    assert (
        isinstance(model.visual.ln_pre, torch.nn.Identity)
        and model.token_embedding.num_embeddings == tokenizer.vocab_size
    )
