"""Adapters by name: switches between them, checks their names, and removes them."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.adapters import NAME, import_peft
from ..network.slots import AdapterSlots


def use_adapter(model: PreTrainedModel, name: str | None) -> None:
    """Makes an adapter the current one until further notice; None stands for the base model alone. See `model.adapter`.

    Parameters stay trainable or frozen as they are. Raises ValueError if there is no adapter of this name.
    """
    model.adapter_slots.use(name)


def remove_adapter(model: PreTrainedModel, name: str) -> None:
    """Removes an adapter; if it was current, the base model is used. Raises ValueError if there is no such adapter."""
    slots: AdapterSlots = model.adapter_slots
    slots.check_known(name)
    if slots.current == name:
        slots.use(None)
    if not slots.remove_prefix(name):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            import_peft().functional.delete_adapter(model, name, prefix="lora_")
        slots.loras.pop(name)
        slots.loras_changed()


def stamp(model: Any) -> object:
    """`AdapterSlots.stamp` of a model: changes with what no parameter shows."""
    return AdapterSlots(model).stamp


def check_name(model: PreTrainedModel, name: str) -> str:
    """The name, if a new adapter can have it; else raises ValueError."""
    if not NAME.fullmatch(name) or "lora_" in name:
        raise ValueError(f"an adapter cannot be called {name!r}: use letters, digits, - and _ (and not 'lora_')")
    if name in model.adapter_slots.names:
        raise ValueError(f"this model has an adapter {name!r} already: give this one another name")
    return name


def free_name(model: PreTrainedModel, name: str) -> str:
    """The name, with a number if it is taken."""
    names, name = model.adapter_slots.names, name.replace("lora_", "lora-")
    return next(one for one in (name, *(f"{name}-{i}" for i in range(2, len(names) + 3))) if one not in names)
