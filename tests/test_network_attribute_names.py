"""The names of the originals' classes that programs read, class by class; those that are gone are listed with what to
use instead."""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any

import pytest
import torch

import chatglm
from deviations import DEVIATIONS
from tiny_chat import pair
from tiny_networks import assert_same, every_model, text, tiny_model

MODEL = """
    config transformer dtype device max_sequence_length quantized generation_config forward generate
    prepare_inputs_for_generation chat stream_chat stream_generate process_response quantize get_input_embeddings
    set_input_embeddings get_output_embeddings set_output_embeddings get_masks get_position_ids base_model_prefix
    supports_gradient_checkpointing gradient_checkpointing_enable enable_input_require_grads _no_split_modules
    _update_model_kwargs_for_generation
    """
NETWORK = """
    config max_sequence_length hidden_size num_attention_heads num_layers vocab_size layernorm_epsilon params_dtype
    hidden_size_per_attention_head pre_seq_len prefix_projection prefix_tokens prefix_encoder get_prompt
    gradient_checkpointing get_input_embeddings set_input_embeddings get_masks get_position_ids forward
    """
CONFIG = """
    model_type hidden_size num_layers num_attention_heads vocab_size layernorm_epsilon use_cache pre_seq_len
    prefix_projection quantization_bit bos_token_id eos_token_id pad_token_id sep_token_id tie_word_embeddings
    auto_map architectures name_or_path num_hidden_layers max_position_embeddings intermediate_size
    num_key_value_heads head_dim
    """
TOKENIZER = """
    vocab_file vocab_size get_vocab vocab_files_names model_input_names padding_side tokenize encode decode
    batch_decode pad convert_tokens_to_ids convert_ids_to_tokens convert_tokens_to_string save_vocabulary
    build_inputs_with_special_tokens prepare_for_model batch_encode_plus encode_plus unk_token unk_token_id
    pad_token pad_token_id eos_token eos_token_id all_special_ids additional_special_tokens
    additional_special_tokens_ids add_special_tokens name_or_path init_kwargs
    """
NAMES_1 = {
    "model": f"{MODEL} lm_head position_encoding_2d",
    "model.config": f"{CONFIG} inner_hidden_size max_sequence_length position_encoding_2d mask_token_id gmask_token_id",
    "model.transformer": f"{NETWORK} inner_hidden_size position_encoding_2d word_embeddings layers final_layernorm",
    "model.transformer.layers.0": "input_layernorm attention post_attention_layernorm mlp",
    "model.transformer.layers.0.attention": "query_key_value dense",
    "model.transformer.layers.0.mlp": "dense_h_to_4h dense_4h_to_h",
    "tokenizer": f"""{TOKENIZER} sp_tokenizer do_lower_case remove_space gmask_token gmask_token_id end_token
        end_token_id mask_token mask_token_id bos_token bos_token_id preprocess_text""",
}
NAMES_2 = {
    "model": f"{MODEL} build_inputs build_stream_inputs",
    "model.config": f"""{CONFIG} padded_vocab_size kv_channels ffn_hidden_size seq_length multi_query_attention
        multi_query_group_num add_bias_linear add_qkv_bias rmsnorm post_layer_norm hidden_dropout attention_dropout
        classifier_dropout apply_residual_connection_post_layernorm fp32_residual_connection original_rope
        apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion""",
    "model.transformer": f"""{NETWORK} multi_query_group_num kv_channels seq_length embedding rotary_pos_emb encoder
        output_layer""",
    "model.transformer.embedding": "word_embeddings",
    "model.transformer.encoder": "layers final_layernorm",
    "model.transformer.encoder.layers.0": "input_layernorm self_attention post_attention_layernorm mlp",
    "model.transformer.encoder.layers.0.self_attention": "query_key_value dense",
    "model.transformer.encoder.layers.0.mlp": "dense_h_to_4h dense_4h_to_h",
    "tokenizer": f"""{TOKENIZER} name tokenizer special_tokens get_command get_prefix_tokens build_prompt
        build_chat_input""",
    "tokenizer.tokenizer": """sp_model n_words bos_id eos_id pad_id special_tokens index_special_tokens tokenize encode
        decode decode_tokens convert_token_to_id convert_id_to_token""",
}
NAMES_3 = NAMES_2 | {
    "model": MODEL,
    "tokenizer": f"{NAMES_2['tokenizer']} build_single_message encode_special_tokens",
}
NAMES = {1: NAMES_1, 2: NAMES_2, 3: NAMES_3}

#: Names of the originals that there are not, by the entry of the list of differences that says what to use.
GONE = {
    "blocks_are_their_weights": {
        1: {
            "model.transformer": "dropout",
            "model.transformer.layers.0": "layer_id",
            "model.transformer.layers.0.attention": "layer_id rotary_emb num_attention_heads_per_partition",
            "model.transformer.layers.0.mlp": "layer_id activation_func",
        },
        2: {
            "model.transformer": "dropout",
            "model.transformer.encoder": "_get_layer num_layers",
            "model.transformer.encoder.layers.0": "layer_number",
            "model.transformer.encoder.layers.0.self_attention": "layer_number core_attention projection_size",
            "model.transformer.encoder.layers.0.mlp": "activation_func add_bias",
        },
    },
    "caches_are_no_tuples": {1: {"model": "_reorder_cache"}, 2: {"model": "_reorder_cache"}},
}


def found(version: int, path: str) -> Any:
    """What a dotted path such as `model.transformer.layers.0` leads to."""
    model, tokenizer = pair(version)
    first, *rest = path.split(".")
    start: Any = {"model": model, "tokenizer": tokenizer}[first]
    return reduce(lambda one, name: one[int(name)] if name.isdigit() else getattr(one, name), rest, start)


@pytest.mark.parametrize(("version", "path"), [(version, path) for version in NAMES for path in NAMES[version]])
def test_names_of_the_originals(version: int, path: str) -> None:
    place = found(version, path)
    assert not [name for name in NAMES[version][path].split() if not hasattr(place, name)]


@pytest.mark.parametrize("version", NAMES)
@pytest.mark.parametrize("entry", GONE)
def test_names_that_are_gone_are_listed(version: int, entry: str) -> None:
    for path, names in GONE[entry][min(version, 2)].items():
        for name in names.split():
            assert not hasattr(found(version, path), name), f"{path}.{name} exists: move it to NAMES"
            assert name in DEVIATIONS[entry], name


@pytest.mark.parametrize("version", NAMES)
def test_values_are_those_of_the_config(version: int) -> None:
    model, config = pair(version)[0], pair(version)[0].config
    network = model.transformer
    for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "layernorm_epsilon"):
        assert getattr(network, name) == getattr(config, name)
    assert model.max_sequence_length == network.max_sequence_length == config.max_position_embeddings
    assert network.hidden_size_per_attention_head == config.hidden_size // config.num_attention_heads
    assert network.params_dtype is torch.float32 and config.sep_token_id is None
    assert network.pre_seq_len is network.prefix_tokens is None and network.prefix_projection is False
    if version == 1:
        assert model.position_encoding_2d is network.position_encoding_2d is True
        assert network.inner_hidden_size == config.inner_hidden_size
    else:
        assert not hasattr(model, "position_encoding_2d")
        assert (network.multi_query_group_num, network.kv_channels, network.seq_length) == (2, 8, config.seq_length)
    assert model.quantized is False
    quantised = copy.deepcopy(model).quantize(8)
    assert quantised.quantized is True


@every_model
@torch.no_grad()
def test_masks_and_positions_that_callers_make(version: int) -> None:
    model, ids = tiny_model(version), torch.cat((text(version, 9, 4), text(version, 9, 4, seed=5)))
    hidden, positions = model.get_masks(ids), model.get_position_ids(ids, device="cpu")
    assert hidden.shape == (2, 1, 13, 13) and hidden.dtype == torch.bool
    mask = hidden if version == 1 else ~hidden  # a bool mask is True = visible in transformers
    assert_same(model(ids, attention_mask=mask, position_ids=positions).logits, model(ids).logits)
    assert torch.equal(model.transformer.get_masks(ids), hidden)
    assert torch.equal(model.transformer.get_position_ids(ids), positions)


@torch.no_grad()
def test_masks_of_later_generations_with_a_cache_and_padding() -> None:
    model, ids = tiny_model(2), text(2, 9, 4)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    assert torch.equal(model.get_masks(ids[:, 5:], cache), model.get_masks(ids)[:, :, 5:])
    padding = torch.tensor([[0, 0, *[1] * 11]])
    hidden = model.get_masks(ids[:, 5:], cache, padding_mask=padding)
    assert hidden[0, 0, :, :2].all() and torch.equal(hidden[..., 2:], model.get_masks(ids)[:, :, 5:, 2:])


@pytest.mark.parametrize("two_kinds", [True, False])
def test_positions_of_generation_1_as_its_callers_ask_for_them(two_kinds: bool) -> None:
    model, ids = tiny_model(1, position_encoding_2d=two_kinds), text(1, 9, 4)
    own = model.get_position_ids(ids)
    assert torch.equal(model.get_position_ids(ids, [7], ids.device, [True]), own)
    assert torch.equal(model.get_position_ids(ids, device="cpu", mask_positions=[7], use_gmasks=[True]), own)
    assert torch.equal(model.get_position_ids(ids, torch.tensor([7])), own)
    with pytest.raises(ValueError, match=r"\[7\]"):
        model.get_position_ids(ids, mask_positions=[6])


@every_model
@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_get_prompt(version: int, projection: bool) -> None:
    """(2, prefix, batch, heads, head_dim) per layer, from the rows of the prefix encoder."""
    model = tiny_model(version, pre_seq_len=5, prefix_projection=projection)
    network = model.transformer
    layers, heads, size = network.num_layers, model.config.num_key_value_heads, model.config.head_dim
    rows = network.prefix_encoder(network.prefix_tokens).view(5, layers, 2, heads, size)
    prompt = network.get_prompt(3, "cpu", torch.float32)
    assert len(prompt) == layers
    for layer, part in enumerate(prompt):
        assert part.shape == (2, 5, 3, heads, size)
        for row in range(3):
            assert torch.equal(part[:, :, row], rows[:, layer].transpose(0, 1))
    assert network.get_prompt(1, None)[0].dtype == torch.half
    with pytest.raises(ValueError, match="no P-tuning prefix"):
        tiny_model(version).transformer.get_prompt(1)


@every_model
def test_the_class_of_any_generation(version: int, tmp_path: Any) -> None:
    model = tiny_model(version)
    assert isinstance(model, chatglm.ChatGLMForConditionalGeneration) is False  # a network without chat()
    chatty, _ = pair(version)
    assert isinstance(chatty, chatglm.ChatGLMForConditionalGeneration)
    made = chatglm.ChatGLMForConditionalGeneration(copy.deepcopy(chatty.config), empty_init=False)
    assert type(made) is type(chatty)
    chatty.save_pretrained(tmp_path)
    loaded = chatglm.ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded) is type(chatty)
    assert torch.equal(loaded.get_input_embeddings().weight, chatty.get_input_embeddings().weight)
    assert not isinstance(chatty, chatglm.ChatGLMForSequenceClassification)
    if version > 1:
        classifier = chatglm.ChatGLMForSequenceClassification(copy.deepcopy(chatty.config))
        assert isinstance(classifier, chatglm.ChatGLMForSequenceClassification)
        assert type(chatglm.ChatGLMForSequenceClassification.from_pretrained(tmp_path)) is type(classifier)
