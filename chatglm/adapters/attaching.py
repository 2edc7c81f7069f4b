"""Attaches adapters to a model from their files."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from ..checkpoints.adapters import Adapter, Prefix, default_name, read_adapter
from .bases import check_generation
from .lora import attach_lora
from .prefixes import attach_prefix
from .switching import check_name, free_name


def load_adapter(model: PreTrainedModel, path: str | os.PathLike[str], name: str | None = None) -> str:
    """Attaches a prefix or LoRA adapter from its files to `model`, beside those it has, and makes it the current one.

    Everything but adapters is frozen, as for training them. Their weights stay in float32 beside a half-precision or
    quantised model.

    Args:
        path: see `read_adapter`.
        name: letters, digits, `-` and `_`; by default `default_name`, with a number if that is taken.

    Returns:
        The name.

    Raises:
        ModelLoadError: the files are missing or broken, or made for another model; or PEFT is not installed.
        ValueError: the name is taken or invalid.
    """
    return attach(model, read_adapter(path), name)


def attach(model: PreTrainedModel, adapter: Adapter, name: str | None = None) -> str:
    """`load_adapter` for an adapter that `read_adapter` has read."""
    name = free_name(model, default_name(adapter.path)) if name is None else check_name(model, name)
    check_generation(model, adapter)
    if isinstance(adapter, Prefix):
        attach_prefix(model, adapter, name)
    else:
        attach_lora(model, adapter, name)
    return name
