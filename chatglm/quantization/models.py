"""Quantises whole models: replaces their matrices with quantised ones, and records the settings in their config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .layers import DenseHead, QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from .settings import EMBEDDINGS, HEADS, ChatGLMQuantizationConfig, settings_of

#: Arguments of the originals' `quantize` that have no effect here: name -> why.
IGNORED_ARGUMENTS = {
    "use_quantization_cache": "weights are never expanded in memory, so there is no buffer to share",
    "kernel_file": "kernels are built from our source for this machine, see `python -m chatglm.kernels`",
    "source_code": "as kernel_file",
    "compile_parallel_kernel": "the CPU kernel is parallel where the compiler supports it",
    "parallel_num": "the CPU kernel obeys torch.set_num_threads",
}


def quantize(
    model: PreTrainedModel,
    bits: int,
    *,
    quantize_embeddings: bool = False,
    quantize_head: int | None = None,
    precision: str = "default",
    empty_init: bool = False,
    device: torch.device | str | None = None,
    **ignored: Any,
) -> PreTrainedModel:
    """Replaces the matrices of `model` with quantised ones, one at a time; see `ChatGLMQuantizationConfig`.

    Args:
        bits: 4 or 8; 0 leaves the model as it is.
        quantize_embeddings, quantize_head, precision: see `ChatGLMQuantizationConfig`.
        empty_init: leave the quantised weights zero, to be loaded afterwards.
        device: where the quantised weights go; by default they stay where the weights were.
        ignored: arguments of the originals that have no effect here, see `IGNORED_ARGUMENTS`.

    Returns:
        The model itself. If it is quantised to the same bits already, only its `precision` changes.

    Raises:
        ValueError: other bits, or a model that is quantised to other bits already.
        TypeError: an argument is unknown both here and to the originals.
    """
    unknown = sorted(set(ignored) - set(IGNORED_ARGUMENTS))
    if unknown:
        raise TypeError(f"quantize() has no argument {', '.join(unknown)}")
    if isinstance(bits, bool) or bits not in (0, 4, 8):
        raise ValueError(f"bits is {bits!r}: use 4 or 8, or 0 for a model that stays as it is")
    if bits == 0:
        return model
    settings = ChatGLMQuantizationConfig(bits, quantize_embeddings, quantize_head, precision)
    present = settings_of(model.config)
    if present is not None:
        return _requantize(model, present, settings)
    apply(model, settings, empty=empty_init, device=device)
    return model


def _requantize(
    model: PreTrainedModel, present: ChatGLMQuantizationConfig, wanted: ChatGLMQuantizationConfig
) -> PreTrainedModel:
    if wanted.bits != present.bits:
        raise ValueError(
            f"this model is quantised to {present.bits} bits already, and rounding cannot be undone: load the "
            f"full-precision checkpoint for {wanted.bits} bits"
        )
    for name in ("quantize_embeddings", "quantize_head"):
        if getattr(wanted, name) and getattr(wanted, name) != getattr(present, name):
            raise ValueError(f"this model is quantised already, without {name}: load the full-precision checkpoint")
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.precision = wanted.precision
    present.precision = wanted.precision
    _record(model, present)
    return model


def apply(
    model: PreTrainedModel,
    settings: ChatGLMQuantizationConfig,
    *,
    empty: bool = False,
    device: torch.device | str | None = None,
) -> None:
    """Quantises the layers that `settings` ask for and that are still float, and records the settings in the config."""
    shared: dict[nn.Parameter, QuantizedLayer] = {}
    for parent, name, module, bits in layers_to_quantize(model, settings):
        if module.weight.is_meta and not empty:
            raise ValueError(
                f"the weights of {name} are not in memory (offloaded): quantise while loading, with quantization_config"
            )
        layer = empty_layer(module, bits, settings.precision, device)
        if not empty:
            tied = shared.get(module.weight) if settings.shares_embeddings else None
            if tied is not None:
                layer.share_weight(tied)
            else:
                try:
                    layer.set_weight(module.weight, device)
                except ValueError as error:
                    path = next(path for path, one in model.named_modules() if one is module)
                    raise ValueError(f"{path}.weight: {error}") from error
                if name in EMBEDDINGS or name in HEADS:
                    shared[module.weight] = layer
        setattr(parent, name, layer)
    for parent, name, head in list(_children(model)):
        if name in HEADS and type(head) is nn.Linear and head.bias is None:
            dense = DenseHead(head.in_features, head.out_features, bias=False, device="meta")
            dense.weight = head.weight
            setattr(parent, name, dense.train(head.training))
    _tie(model, settings)
    _record(model, settings)


def packed_weights(model: nn.Module) -> list[str]:
    """Names of the quantised weights; append `_scale` for the names of their scales."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
    return [f"{name}.weight" for name, module in layers if module.weight.dtype == torch.int8]


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in it, child) of all modules, without those inside of parts that stay float."""
    for name, child in model.named_children():
        if not getattr(child, "stays_float", False):
            yield model, name, child
            yield from _children(child)


def layers_to_quantize(
    model: nn.Module, settings: ChatGLMQuantizationConfig
) -> list[tuple[nn.Module, str, Any, int]]:
    """(parent, name in it, float layer, bits) of every layer that `settings` ask for and that is not quantised yet."""
    return [
        (parent, name, child, bits)
        for parent, name, child in _children(model)
        if not isinstance(child, QuantizedLayer) and (bits := settings.bits_of(name, child)) is not None
    ]


def empty_layer(module: nn.Module, bits: int, precision: str, device: torch.device | str | None = None) -> Any:
    """The quantised layer for the weights of a float one, still zero, on its device or `device`."""
    if isinstance(module, nn.Linear):
        return QuantizedLinear.like(module, bits, precision, device)
    assert isinstance(module, nn.Embedding)
    return QuantizedEmbedding.like(module, bits, device)


def _tie(model: PreTrainedModel, settings: ChatGLMQuantizationConfig) -> None:
    """Keeps embeddings and head tied, scales included, if they hold the same values; else both are saved."""
    if settings.head_bits is None and not settings.quantize_embeddings:
        return
    tied = dict(type(model)._tied_weights_keys or {})
    if not settings.shares_embeddings:
        tied = {}
    model._tied_weights_keys = tied | {f"{target}_scale": f"{source}_scale" for target, source in tied.items()}
    if hasattr(model, "all_tied_weights_keys"):  # not yet there during __init__
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _record(model: PreTrainedModel, settings: ChatGLMQuantizationConfig) -> None:
    """Writes our settings, and the keys that the original code reads, into the model's config."""
    model.config.quantization_config = settings
    model.config.quantization_bit = settings.bits
    if settings.quantize_embeddings:
        model.config.quantization_embeddings = True
