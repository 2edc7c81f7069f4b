"""ChatGLM2's and ChatGLM3's network as transformers' `GlmForCausalLM`, and back: config and names of tensors.

Both compute the same; only the names and the layout of the attention's projections differ. With float32 weights the
logits are equal to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from ..configuration_chatglm import CONFIGS, ChatGLM2Config
from ..configuration_visualglm import VisualGLMConfig

ROPE_BASE = 10000.0

#: Our names -> those of `GlmForCausalLM`, in a layer and outside of the layers.
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
OUTER_NAMES = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
#: Fields of our configs that must have these values, as `GlmForCausalLM` has nothing else.
ONLY = {
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "rope_precision": "float32",
}


def refuse_unfit(config: Any, quantized: bool = False) -> None:
    """Raises ValueError, with the reason, for a model that other engines cannot compute.

    Args:
        quantized: whether the target takes INT4 and INT8 weights.
    """
    if isinstance(config, VisualGLMConfig):
        raise ValueError(
            "VisualGLM-6B runs in no other engine: its image encoder exists only here; serve it with api.py"
        )
    if not isinstance(config, ChatGLM2Config):
        raise ValueError(
            "ChatGLM-6B runs in no other engine: its two-dimensional positions, the mask over its prompt and its "
            "scaled residuals exist only here; serve it with api.py"
        )
    if config.pre_seq_len is not None:
        raise ValueError(
            "a model with a P-tuning prefix runs in no other engine: they have no prefix in every layer; serve it "
            "with api.py, or tune with LoRA"
        )
    if config.quantization_bit and not quantized:
        raise ValueError(
            "other engines do not read INT4 or INT8 weights in this form: serve or export the full-precision "
            "checkpoint, or export with --to gguf"
        )
    for name, value in ONLY.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"a model with {name} = {getattr(config, name)!r} runs in no other engine: they have {value!r} only"
            )


def glm_config(config: ChatGLM2Config, stop_token_ids: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a `GlmForCausalLM`.

    Beside today's spellings it has those of older readers, which would take defaults without them: transformers 4,
    OpenVINO and older vLLM read `rope_theta` and others, llama.cpp's converter reads names of ChatGLM.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": ROPE_BASE * config.rope_ratio}
    scaling = None
    if config.stretches_positions and config.rope_ratio != 1:
        scaling = {"rope_type": "linear", "factor": float(config.rope_ratio)}
        rope = scaling | {"rope_theta": ROPE_BASE}
    kind = str(dtype).removeprefix("torch.")
    values = {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "attention_bias": config.add_qkv_bias,
        "attention_dropout": config.attention_dropout,
        "max_position_embeddings": config.seq_length,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.layernorm_epsilon,
        "use_cache": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": stop_token_ids,
        "rope_parameters": rope | {"partial_rotary_factor": 0.5},
        "dtype": kind,
        # Older spellings.
        "torch_dtype": kind,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": 0.5,
        "rope_ratio": config.rope_ratio,
        "layernorm_epsilon": config.layernorm_epsilon,
        "seq_length": config.seq_length,
        "padded_vocab_size": config.padded_vocab_size,
        # For the way back.
        "chatglm_version": config.chatglm_version,
    }
    if scaling is not None:
        values["rope_scaling"] = scaling | {"type": "linear"}
    return values


def config_from_glm(values: dict[str, Any]) -> ChatGLM2Config:
    """Our config of a `GlmForCausalLM`'s config.json.

    Raises:
        ValueError: it does not say which generation it comes from, or has something that our network lacks.
    """
    version = values.get("chatglm_version")
    if version not in CONFIGS or not issubclass(CONFIGS[version], ChatGLM2Config):
        raise ValueError(
            f"config.json has chatglm_version = {version!r}: add the generation that this model comes from (2, 3 or 4)"
        )
    rope = values.get("rope_parameters") or {
        "rope_theta": values.get("rope_theta", ROPE_BASE),
        "partial_rotary_factor": values.get("partial_rotary_factor", 0.5),
        **(values.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    wanted = "linear" if version == 2 and kind != "default" else "default"
    if kind != wanted or rope.get("partial_rotary_factor", 0.5) != 0.5 or values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json asks for positions or an activation that ChatGLM{version} does not have: {rope}")
    ratio = float(rope["factor"]) if kind == "linear" else float(rope["rope_theta"]) / ROPE_BASE
    heads, groups = values["num_attention_heads"], values.get("num_key_value_heads") or values["num_attention_heads"]
    return CONFIGS[version](
        chatglm_version=version,
        padded_vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
        ffn_hidden_size=values["intermediate_size"],
        seq_length=values["max_position_embeddings"],
        multi_query_attention=True,
        multi_query_group_num=groups,
        add_qkv_bias=values.get("attention_bias", False),
        layernorm_epsilon=values["rms_norm_eps"],
        attention_dropout=values.get("attention_dropout", 0.0),
        rope_ratio=int(ratio) if ratio.is_integer() else ratio,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        pad_token_id=values.get("pad_token_id"),
        architectures=["ChatGLMForConditionalGeneration"],
        dtype=values.get("dtype") or values.get("torch_dtype"),
    )


def to_glm(name: str, tensor: torch.Tensor, config: ChatGLM2Config) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `GlmForCausalLM` that one of ours becomes; none for rotary tables.

    Raises:
        ValueError: our network has no such tensor.
    """
    if name in OUTER_NAMES:
        yield OUTER_NAMES[name], tensor
    elif found := re.fullmatch(r"transformer\.encoder\.layers\.(\d+)\.(.+)", name):
        layer, part = f"model.layers.{found[1]}.", found[2]
        if projection := re.fullmatch(r"self_attention\.query_key_value\.(weight|bias)", part):
            for letter, rows in zip("qkv", _split(tensor, config), strict=True):
                yield f"{layer}self_attn.{letter}_proj.{projection[1]}", rows
        elif part in LAYER_NAMES:
            yield layer + LAYER_NAMES[part], tensor
        else:
            raise ValueError(f"{name} has no place in GlmForCausalLM")
    elif not name.endswith("inv_freq"):
        raise ValueError(f"{name} has no place in GlmForCausalLM")


def _split(tensor: torch.Tensor, config: ChatGLM2Config) -> tuple[torch.Tensor, ...]:
    """The rows of the queries, of the keys and of the values."""
    queries, keys = (count * config.kv_channels for count in (config.num_attention_heads, config.num_key_value_heads))
    return join_heads(tensor, config).split([queries, keys, keys])


def join_heads(tensor: torch.Tensor, config: ChatGLM2Config) -> torch.Tensor:
    """The rows of an attention projection with all queries first, then all keys, then all values.

    With multi-query attention they already are; without, each head has its queries, keys and values side by side.
    """
    if config.multi_query_attention:
        return tensor
    return tensor.unflatten(0, (config.num_attention_heads, 3, config.kv_channels)).transpose(0, 1).flatten(0, 2)


def sources_in_glm(config: ChatGLM2Config) -> Iterator[tuple[str, list[str]]]:
    """Our tensors, each with the tensors of `GlmForCausalLM` whose rows it joins."""
    for ours, theirs in OUTER_NAMES.items():
        if not (config.tie_word_embeddings and theirs == "lm_head.weight"):
            yield ours, [theirs]
    for layer in range(config.num_layers):
        ours, theirs = f"transformer.encoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ["weight", "bias"] if config.add_qkv_bias else ["weight"]:
            yield f"{ours}self_attention.query_key_value.{kind}", [f"{theirs}self_attn.{q}_proj.{kind}" for q in "qkv"]
        for mine, other in LAYER_NAMES.items():
            yield ours + mine, [theirs + other]


def glm_names(config: ChatGLM2Config) -> list[str]:
    """The names of all tensors of the `GlmForCausalLM` that a model of this config becomes."""
    return [name for _, names in sources_in_glm(config) for name in names]
