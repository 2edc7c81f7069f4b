"""Which adapters a model has, and which one it uses."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.adapters import NAME, import_peft
from ..prefix_encoder import PrefixEncoder


def adapter_names(model: PreTrainedModel) -> list[str]:
    """Prefixes, then LoRA adapters, each in the order they came."""
    return [*prefixes_of(model.base_model), *loras_of(model)]


def current_adapter(model: PreTrainedModel) -> str | None:
    """The name of the adapter in use; None for the base model."""
    encoder = model.base_model.prefix_encoder
    for name, one in prefixes_of(model.base_model).items():
        if one is encoder:
            return name
    for layer in lora_layers(model):
        return None if layer.disable_adapters or not layer.active_adapters else layer.active_adapters[0]
    return None


def use_adapter(model: PreTrainedModel, name: str | None) -> None:
    """Makes an adapter the current one until further notice; None: the base model alone. See `model.adapter`.

    What is trainable stays so. Raises ValueError where there is none of this name.
    """
    base = model.base_model
    if name is not None:
        check_known(model, name)
    encoder = prefixes_of(base).get(name) if name is not None else None
    if base.prefix_encoder is not encoder:
        base.prefix_encoder = encoder
        for config in (model.config, base.config):  # so that a checkpoint is saved as what it is
            config.pre_seq_len = encoder.pre_seq_len if encoder is not None else None
            config.prefix_projection = encoder is not None and encoder.trans is not None
    lora = name if encoder is None else None
    for layer in lora_layers(model):
        if lora is None and layer.disable_adapters:
            continue
        flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
        if lora is None:
            layer.enable_adapters(False)
        else:
            layer.set_adapter([lora])
            layer.enable_adapters(True)
        for parameter, flag in flags:  # PEFT freezes and unfreezes with it
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def using_adapter(model: PreTrainedModel, name: str | None) -> Iterator[PreTrainedModel]:
    """`use_adapter` for a `with` block; what was current before is so again after it."""
    before = current_adapter(model)
    use_adapter(model, name)
    try:
        yield model
    finally:
        use_adapter(model, before if before in adapter_names(model) else None)


def stamp(model: Any) -> object:
    """Changes with the state that no parameter shows: which LoRA is in use, adapters that came or went."""
    base = getattr(model, "base_model", model)
    state = tuple(
        (layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters) for layer in lora_layers(model)
    )
    return state, getattr(base, "_adapter_token", None)


def parked(base: nn.Module) -> list[PrefixEncoder]:
    """The prefixes of a base model that are not in use: they follow its casts and moves all the same."""
    prefixes: dict[str, PrefixEncoder] = base.__dict__.get("_adapter_prefixes", {})
    return [encoder for encoder in prefixes.values() if encoder is not base.prefix_encoder]


def prefixes_of(base: Any) -> dict[str, PrefixEncoder]:
    prefixes: dict[str, PrefixEncoder] = base.__dict__.setdefault("_adapter_prefixes", {})
    encoder = base.prefix_encoder
    if encoder is not None and all(one is not encoder for one in prefixes.values()):
        prefixes["default"] = encoder  # made by the constructor, for a config with pre_seq_len
    return prefixes


def note_change(base: Any) -> None:
    base.__dict__["_adapter_token"] = object()  # a new prefix may have the address of one that is gone


def loras_of(model: Any) -> dict[str, Any]:
    return getattr(model, "peft_config", {})


def lora_layers(model: Any) -> list[Any]:
    if not loras_of(model):
        return []
    layer_class = import_peft().tuners.tuners_utils.BaseTunerLayer
    return [module for module in model.modules() if isinstance(module, layer_class)]


def check_known(model: PreTrainedModel, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        raise ValueError(f"there is no adapter {name!r} in this model, only {', '.join(names) or 'the base model'}")


def check_name(model: PreTrainedModel, name: str) -> str:
    if not NAME.fullmatch(name) or "lora_" in name:
        raise ValueError(f"an adapter cannot be called {name!r}: use letters, digits, - and _ (and not 'lora_')")
    if name in adapter_names(model):
        raise ValueError(f"this model has an adapter {name!r} already: give this one another name")
    return name


def free_name(model: PreTrainedModel, name: str) -> str:
    names, name = adapter_names(model), name.replace("lora_", "lora-")
    return next(one for one in (name, *(f"{name}-{i}" for i in range(2, len(names) + 3))) if one not in names)


def remove_adapter(model: PreTrainedModel, name: str) -> None:
    """Forgets an adapter; where it was current, the base model is. Raises ValueError where there is no such adapter."""
    check_known(model, name)
    if current_adapter(model) == name:
        use_adapter(model, None)
    note_change(model.base_model)
    if prefixes_of(model.base_model).pop(name, None) is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            import_peft().functional.delete_adapter(model, name, prefix="lora_")
        loras_of(model).pop(name)
        if not loras_of(model):
            unwrap(model)


def unwrap(model: PreTrainedModel) -> None:
    """The layers that PEFT has wrapped, in their places again."""
    layer_class = import_peft().tuners.tuners_utils.BaseTunerLayer
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, layer_class):
                setattr(parent, child_name, child.get_base_layer())
    model.__dict__.pop("peft_config", None)
    model._hf_peft_config_loaded = False
