"""Exports a checkpoint as a GGUF file for llama.cpp, ollama and others, written tensor by tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..chat import model_class
from ..checkpoints.adapters import Adapter
from ..checkpoints.atomic import whole_file
from ..checkpoints.files import check_folder, find_weights, refuse_missing
from ..loading.reading import read_config, read_tokenizer
from .folders import Progress, lora_deltas, stop_ids, template_for_others
from .gguf_blocks import BLOCK, blocks_of_quantized
from .gguf_vocabulary import add_vocabulary
from .glm_network import ROPE_BASE, join_heads, refuse_unfit
from .source import LoraDeltas, Tensors, renamer

NEEDS_GGUF = "GGUF files need the gguf package: pip install gguf"

_OUTER = {
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",  # with the gate in its first half, as ours
    "mlp.dense_4h_to_h": "ffn_down",
}


def export_gguf(
    folder: Path,
    out: Path,
    kind: str | None = None,
    adapter: Adapter | None = None,
    chatglm_version: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the model of a ChatGLM2 or ChatGLM3 folder as a GGUF file.

    A folder with INT4 or INT8 weights keeps their values exactly (Q4_0, Q8_0).

    Args:
        kind: one of GGUF_TYPES for the matrices; by default that of the folder's files.
        adapter: a LoRA adapter to merge.
        chatglm_version: the generation, if the folder does not tell it.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: the model, its vocabulary or the adapter has no place there; the message says why.
        ModelLoadError: files of the folder are missing or broken.
        OSError: `out` cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(NEEDS_GGUF) from error
    check_folder(folder)
    config: Any = read_config(folder, chatglm_version)
    refuse_unfit(config, quantized=True)
    deltas = lora_deltas(adapter)
    bits = config.quantization_bit
    if bits and (deltas is not None or kind is not None):
        raise ValueError(
            f"{folder} is quantised: its values are written as they are, so leave out --type and --adapter, or export "
            "the full-precision checkpoint"
        )
    tensors = Tensors(folder, renamer(model_class(config).other_names))
    if deltas is not None:
        deltas.refuse_unknown(tensors)
    tokenizer = read_tokenizer(folder, chatglm_version)
    default = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(find_weights(folder).dtype, "f16")
    plan = dict(_plan(tensors, config))
    refuse_missing(folder, set(_expected(config)) - set(plan.values()), ())
    with whole_file(out) as aside:
        writer = gguf.GGUFWriter(aside, "chatglm")
        stored = {0: kind or default, 4: "q4_0", 8: "q8_0"}[bits]
        _add_settings(writer, config, tokenizer.chat_format.model_name, stored)
        stops, template = stop_ids(config, tokenizer), template_for_others(config, tokenizer)
        add_vocabulary(writer, tokenizer, config.padded_vocab_size, stops, template)
        types = {name: _type(tensors, name, config, kind or default) for name in plan}
        for name, new in plan.items():
            shape = _shape(tensors[name], name, config)
            numbers = np.dtype({"F32": np.float32, "F16": np.float16}.get(types[name].name, np.uint8))
            if numbers == np.uint8:
                shape = gguf.quant_shape_to_byte_shape(shape, types[name])
            writer.add_tensor_info(new, shape, numbers, math.prod(shape) * numbers.itemsize, raw_dtype=types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, name in enumerate(plan, 1):
            writer.write_tensor_data(_data(tensors, name, config, deltas, types[name]))
            if progress is not None:
                progress(name, number, len(plan))
        writer.close()


def _plan(tensors: Tensors, config: Any) -> Iterator[tuple[str, str]]:
    """The names of the tensors to write, ours and GGUF's."""
    for name in tensors:
        if name.endswith((".weight_scale", "inv_freq")):
            continue
        module, _, part = name.rpartition(".")
        if module in _OUTER:
            if not (config.tie_word_embeddings and module.endswith("output_layer")):
                yield name, f"{_OUTER[module]}.{part}"
        elif (found := re.fullmatch(r"transformer\.encoder\.layers\.(\d+)\.(.+)", module)) and found[2] in _LAYER:
            yield name, f"blk.{found[1]}.{_LAYER[found[2]]}.{part}"
        else:
            raise ValueError(f"{name} has no place in a GGUF file of this architecture")


def _expected(config: Any) -> Iterator[str]:
    """GGUF's names of all tensors of a model of this config."""
    for module, name in _OUTER.items():
        if not (config.tie_word_embeddings and module.endswith("output_layer")):
            yield f"{name}.weight"
    for layer in range(config.num_layers):
        yield from (f"blk.{layer}.{name}.weight" for name in _LAYER.values())
        if config.add_qkv_bias:
            yield f"blk.{layer}.attn_qkv.bias"


def _type(tensors: Tensors, name: str, config: Any, kind: str) -> Any:
    """GGUF's type for a tensor. Raises ValueError if its columns do not fit into blocks."""
    from gguf import GGMLQuantizationType

    tensor = tensors[name]
    if f"{name}_scale" in tensors:
        bits = 8 * tensor.shape[1] // _columns(name, config)
        return {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}[bits]
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    if kind.startswith("q") and tensor.shape[1] % BLOCK:
        raise ValueError(f"{name} has {tensor.shape[1]} columns, no multiple of {BLOCK}: use --type f16, bf16 or f32")
    return GGMLQuantizationType[kind.upper()]


def _shape(tensor: torch.Tensor, name: str, config: Any) -> tuple[int, ...]:
    """The shape before packing."""
    return tuple(tensor.shape) if tensor.is_floating_point() else (tensor.shape[0], _columns(name, config))


def _data(tensors: Tensors, name: str, config: Any, deltas: LoraDeltas | None, kind: Any) -> np.ndarray:
    """The values of a tensor as a GGUF file of this type holds them."""
    from gguf import GGMLQuantizationType, quantize

    tensor, joined = tensors[name], name.rsplit(".", 1)[0].endswith("query_key_value")
    if not tensor.is_floating_point():
        bits = 4 if kind == GGMLQuantizationType.Q4_0 else 8
        packed = torch.from_numpy(blocks_of_quantized(tensor, tensors[f"{name}_scale"], bits))
        return (join_heads(packed, config) if joined else packed).numpy()
    if deltas is not None:
        tensor = deltas.add_to(name, tensor)
    if joined:
        tensor = join_heads(tensor, config)
    if kind == GGMLQuantizationType.F32:
        return tensor.float().numpy()
    if kind == GGMLQuantizationType.F16:
        half = tensor.half()
        if not torch.isfinite(half).all():
            raise ValueError(f"{name} has values beyond float16: use --type bf16 or f32")
        return half.numpy()
    values: np.ndarray = quantize(tensor.float().numpy(), kind)
    return values


def _columns(name: str, config: Any) -> int:
    """The columns of a matrix before it was packed."""
    if name.endswith("self_attention.dense.weight"):
        return int(config.num_attention_heads * config.kv_channels)
    return int(config.ffn_hidden_size if name.endswith("dense_4h_to_h.weight") else config.hidden_size)


def _add_settings(writer: Any, config: Any, model: str, kind: str) -> None:
    from gguf import LlamaFileType, RopeScalingType

    name = {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")
    writer.add_name(model)
    writer.add_file_type(LlamaFileType[name])
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    if config.stretches_positions:
        writer.add_rope_freq_base(ROPE_BASE)
        if config.rope_ratio != 1:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(config.rope_ratio))
    else:
        writer.add_rope_freq_base(ROPE_BASE * config.rope_ratio)
