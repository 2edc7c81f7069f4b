"""Checks whether the weights fit into the memory of one device before they are loaded."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoints import memory
from ..checkpoints.files import ModelLoadError, Weights
from ..quantization import settings_of
from .dtypes import HEADROOM
from .plan import Plan


class NotEnoughMemoryError(ModelLoadError):
    """The weights would not fit into the memory that is available."""


def memory_needed(weights: Weights, config: Any, dtype: torch.dtype, bits: int | None = None) -> int:
    """Bytes that loading takes with the floating-point weights in `dtype`, or quantised to `bits` while loading."""
    if bits is None:
        return int(weights.size(dtype.itemsize) * HEADROOM)
    copies = 1 if config.tie_word_embeddings else 2
    outside = min(weights.elements, copies * config.vocab_size * config.hidden_size)  # embeddings and head
    return int(((weights.elements - outside) * bits // 8 + outside * dtype.itemsize) * HEADROOM)


def check_memory(plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
    """Raises NotEnoughMemoryError if the weights do not fit; it gives the sizes and says what to do."""
    weights, config, quantization = plan.weights, plan.config, plan.quantization
    needed = memory_needed(weights, config, dtype, quantization.bits if quantization else None)
    room = memory.available(device)
    if room is None or needed <= room:
        return
    ways = ["close other programs"]
    if dtype.itemsize > 2:
        less = memory_needed(weights, config, torch.bfloat16)
        ways.append(f"load with dtype='bfloat16' ({memory.readable(less)})")
    if quantization is None and settings_of(config) is None:
        ways.append(f"load with quantize=4 ({memory.readable(memory_needed(weights, config, dtype, 4))})")
    if device.type != "cpu":
        ways.append("use device='cpu'")
    raise NotEnoughMemoryError(
        f"loading {plan.folder} in {str(dtype).removeprefix('torch.')} on {device} needs about "
        f"{memory.readable(needed)}, and {memory.readable(room)} are available: {', or '.join(ways)}; "
        "check_memory=False tries anyway"
    )
