"""LoRA adapters: creates them, attaches them from files, and merges them into the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import kernels
from ..checkpoints.adapters import LORA_CONFIG, Lora, describe, import_peft
from ..checkpoints.files import ModelLoadError
from ..network.slots import AdapterSlots
from ..quantization.layers import QuantizedLayer
from ..quantization.scheme import quantize_weight
from .saved_layers import check_saved_layers, is_tied, merge_saved, widen
from .switching import check_name, remove_adapter

#: How PEFT's names of tensors start in a file.
FRONT = "base_model.model."
TIED = "LoRA on embeddings that are tied to the output head cannot be merged: use it as it is"


def add_lora(model: PreTrainedModel, config: Any, name: str = "default") -> None:
    """Adds fresh float32 LoRA weights to train, makes them current and freezes all else.

    Args:
        config: a `peft.LoraConfig`. Its `target_modules` are `query_key_value`, `dense`, `dense_h_to_4h` and
            `dense_4h_to_h`, or some of them; the first is PEFT's default. Its `modules_to_save` are layers that are
            trained as a whole, such as `output_layer`; only those that are not quantised.
        name: the adapter's name, used to switch to it.

    Raises:
        ModelLoadError: PEFT is not installed.
        ValueError: the name is taken, or `target_modules` names a layer that this model does not have; see also
            `check_saved_layers`.
    """
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (list, tuple, set)):  # PEFT accepts a list if any of its names exists
        layers = {path.rsplit(".", 1)[-1] for path, part in model.named_modules() if isinstance(part, nn.Linear)}
        known = {path for path, _ in model.named_modules()}
        wrong = [name for name in targets if not any(path == name or path.endswith(f".{name}") for path in known)]
        if wrong:
            known_layers = ", ".join(sorted(layers))
            raise ValueError(f"no layer is called {', '.join(sorted(wrong))}: this model has {known_layers}")
    check_saved_layers(model, config, to_train=True)
    _inject(model, config, check_name(model, name))


def attach_lora(model: PreTrainedModel, lora: Lora, name: str) -> None:
    """Attaches a LoRA adapter that was read from its files. Raises ModelLoadError if it does not fit."""
    peft = import_peft()
    _check_lora(model, lora)
    try:
        config = peft.PeftConfig.from_pretrained(str(lora.path))
        config.inference_mode = False
    except (ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(f"{lora.path / LORA_CONFIG} is not a LoRA configuration ({error})") from error
    slots: AdapterSlots = model.adapter_slots
    before = slots.current
    try:
        check_saved_layers(model, config, to_train=False)
        made = _inject(model, config, name)
        missing, unexpected = set_tensors(model, lora.tensors, name)
        if unexpected or any(key in made for key in missing):
            raise ModelLoadError(_other_model(model, lora, [*(key for key in missing if key in made), *unexpected]))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ModelLoadError) as error:
        if name in slots.loras:
            remove_adapter(model, name)
            slots.use(before)
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"the LoRA adapter {lora.path} does not fit this model: {error}") from error


def set_tensors(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], name: str
) -> tuple[list[str], list[str]]:
    """Loads the tensors of an adapter, under PEFT's names, into the adapter `name` of the model.

    Returns:
        The keys that were missing, which include all of the base's, and those that have no place in the model.

    Raises:
        KeyError: a layer of `modules_to_save` is missing.
        RuntimeError: a tensor has another shape.
    """
    plain = {key.removeprefix(FRONT): value for key, value in tensors.items()}
    result = import_peft().set_peft_model_state_dict(model, plain, adapter_name=name)
    return list(result.missing_keys), list(result.unexpected_keys)


def requantization_error(model: PreTrainedModel, name: str | None = None) -> float:
    """How much of a LoRA adapter `merge_lora(requantize=True)` would lose: the norm of what rounding adds to the
    weights that the adapter changes, divided by the norm of what the adapter adds to them. 0: nothing is lost."""
    slots: AdapterSlots = model.adapter_slots
    name = slots.current if name is None else name
    if name not in slots.loras:
        raise ValueError(f"there is no LoRA adapter {name!r}: this model has {', '.join(slots.loras) or 'none'}")
    lost = added = 0.0
    for layer in slots.lora_layers:
        base = layer.get_base_layer()
        if isinstance(base, QuantizedLayer):
            merged = _merged(layer, name)
            q, scale = quantize_weight(merged, base.bits)
            rounded = kernels.dequantize(q, scale, base.bits, torch.float32)
            lost += float((rounded - merged).square().sum())
            added += float((merged - base.dequantize()).square().sum())
    return (lost / added) ** 0.5 if added else 0.0


def _merged(layer: Any, name: str) -> torch.Tensor:
    """The float32 weights of a quantised layer with its LoRA."""
    merged: torch.Tensor = layer.get_base_layer().dequantize() + layer.get_delta_weight(name).detach().float()
    return merged


def _inject(model: PreTrainedModel, config: Any, name: str) -> set[str]:
    """Wraps the layers, and returns the names of their new parameters."""
    peft = import_peft()
    slots: AdapterSlots = model.adapter_slots
    before = slots.current
    slots.use(None)  # PEFT freezes everything but its own: a parked prefix is out of its reach
    known = set(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are intended
        try:
            # Not transformers' add_adapter: it demands a release of PEFT that may not exist yet.
            peft.inject_adapter_in_model(config, model, name)
        except BaseException:
            slots.loras.pop(name, None)
            slots.loras_changed()
            slots.use(before)
            raise
    slots.loras_changed()
    saved = f".modules_to_save.{name}."
    made = {key: value for key, value in model.named_parameters()
            if key not in known and (".lora_" in key or saved in key)}  # fmt: skip
    for key, parameter in made.items():
        parameter.data = parameter.data.float()
        if saved in key:
            parameter.requires_grad_(True)  # PEFT leaves them frozen in an adapter after the first
    for layer in (*slots.lora_layers, *slots.saved_layers):
        layer.train(model.training)
    for layer in slots.saved_layers:
        widen(layer)
    slots.use(name)
    return set(made)


def _check_lora(model: PreTrainedModel, lora: Lora) -> None:
    """Raises ModelLoadError unless every tensor has its layer; called before the model is changed."""
    modules = dict(model.named_modules())
    saved = tuple(f".{name}" for name in lora.config.get("modules_to_save") or ())
    for key, tensor in lora.tensors.items():
        path, found, kind = key.removeprefix(FRONT).partition(".lora_")
        if not found and f".{path.rpartition('.')[0]}".endswith(saved):
            continue  # see check_saved_layers, and the check of shapes by load_state_dict
        layer = modules.get(path)
        layer = getattr(layer, "base_layer", layer)
        if not found or layer is None:
            raise ModelLoadError(_other_model(model, lora, [key]))
        if isinstance(layer, nn.Linear):
            size = {"A.weight": tensor.shape[-1:], "B.weight": tensor.shape[:1]}.get(kind)
            wanted = layer.in_features if kind == "A.weight" else layer.out_features
            if size is not None and size[0] != wanted:
                raise ModelLoadError(_other_model(model, lora, [key]))


def _other_model(model: PreTrainedModel, lora: Lora, keys: list[str]) -> str:
    places = [re.search(r"\.(encoder\.)?layers\.(\d+)\.", key) for key in lora.tensors]
    layers = [int(place[2]) + 1 for place in places if place]
    older = any(place and not place[1] for place in places)
    kind = ("ChatGLM of generation " + ("1" if older else "2 or 3")) if layers else "another architecture"
    widths = [tensor.shape[-1] for key, tensor in lora.tensors.items() if "query_key_value.lora_A" in key]
    size = f", {max(layers)} layers" + (f" of width {widths[0]}" if widths else "") if layers else ""
    base = lora.config.get("base_model_name_or_path")
    return (
        f"the LoRA adapter {lora.path} is for another model: it was made for {kind}{size}{f' ({base})' if base else ''}"
        f", this one is {describe(model.config.to_dict())} and has no place for {keys[0]}"
    )


def merge_lora(model: PreTrainedModel, name: str | None = None, *, requantize: bool = False) -> PreTrainedModel:
    """Adds a LoRA adapter (by default the current one) to the weights; the model then no longer needs PEFT.

    Half-precision weights are summed in float32 and rounded once.

    Args:
        requantize: round the sum again where a layer is quantised; `requantization_error` says beforehand how much of
            the adapter is lost.

    Returns:
        The model itself, as if loaded from a checkpoint of the merged weights.

    Raises:
        ValueError: there is no such LoRA adapter, or others are loaded as well (the weights that they were trained on
            would be gone), or a layer is tied to another, or quantised without `requantize`.
    """
    slots: AdapterSlots = model.adapter_slots
    name = slots.current if name is None else name
    loras = slots.loras
    if name not in loras:
        raise ValueError(f"there is no LoRA adapter {name!r} to merge: this model has {', '.join(loras) or 'none'}")
    others = [other for other in loras if other != name]
    if others:
        raise ValueError(f"this model has other LoRA adapters ({', '.join(others)}): load it with {name!r} alone")
    layers = [layer for layer in slots.lora_layers if not layer.merged]
    counts: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        counts[id(weight)] = counts.get(id(weight), 0) + 1
    for layer in layers:
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point() and not requantize:
            raise ValueError(
                "LoRA is not merged into quantised weights unasked, as rounding them again loses a part of it. Merge "
                "into the full-precision checkpoint, and quantise the result; or use requantize=True, see "
                "requantization_error"
            )
        if counts[id(weight)] > 1:
            raise ValueError(TIED)
    saved = [layer for layer in slots.saved_layers if name in layer.modules_to_save]
    if any(is_tied(model, layer.original_module) for layer in saved):
        raise ValueError(TIED)
    slots.use(name)
    for layer in saved:
        merge_saved(layer, name)
    for layer in layers:
        if isinstance(layer.get_base_layer(), QuantizedLayer):
            layer.get_base_layer().set_weight(_merged(layer, name))
            continue
        parameters = list(layer.get_base_layer().parameters(recurse=False))
        kinds = [parameter.dtype for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        layer.merge(adapter_names=[name])
        for parameter, kind in zip(parameters, kinds, strict=True):
            parameter.data = parameter.data.to(kind)
    slots.unwrap_loras()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model
