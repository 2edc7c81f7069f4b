"""Creates, reads, saves and merges P-tuning prefixes and LoRA adapters. A model can hold several, and uses one.

The slots of the network (`chatglm.network.slots`) hold them. LoRA needs PEFT; nothing else here does.
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
