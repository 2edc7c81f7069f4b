"""What fine-tuning leaves behind, on top of a model: P-tuning prefixes and LoRA adapters, several at once, one in use.

A prefix is found at `model.transformer.prefix_encoder` while it is in use, and is out of the model's way (no parameter
of it, not in its state dict) while it is not. LoRA is PEFT's, which is needed for it and for nothing else here.
"""

from __future__ import annotations

from ..checkpoints.adapters import Lora, Prefix, read_adapter
from .attaching import load_adapter
from .bases import fingerprint
from .lora import add_lora, merge_lora
from .prefixes import add_prefix
from .saving import save_adapter, save_prefix
from .switching import remove_adapter, use_adapter

__all__ = [
    "Lora",
    "Prefix",
    "add_lora",
    "add_prefix",
    "fingerprint",
    "load_adapter",
    "merge_lora",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "save_prefix",
    "use_adapter",
]
