"""Whether the weights fit into the memory of one device, said before they are loaded."""

from __future__ import annotations

import torch

from ..checkpoints import memory
from ..checkpoints.files import ModelLoadError
from ..quantization import settings_of
from .dtypes import HEADROOM
from .plan import Plan


class NotEnoughMemoryError(ModelLoadError):
    """The weights would not fit into the memory that is available."""


def check_memory(plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
    """Raises NotEnoughMemoryError, which says how much is missing and what to do about it."""
    weights, config, quantization = plan.weights, plan.config, plan.quantization

    def quantized_size(bits: int) -> int:
        copies = 1 if config.tie_word_embeddings else 2
        outside = min(weights.elements, copies * config.vocab_size * config.hidden_size)  # embeddings and head
        return (weights.elements - outside) * bits // 8 + outside * dtype.itemsize

    size = quantized_size(quantization.bits) if quantization else weights.size(dtype.itemsize)
    needed, room = int(size * HEADROOM), memory.available(device)
    if room is None or needed <= room:
        return
    ways = ["close other programs"]
    if dtype.itemsize > 2:
        ways.append(f"load with dtype='bfloat16' ({memory.readable(int(weights.size(2) * HEADROOM))})")
    if quantization is None and settings_of(config) is None:
        ways.append(f"load with quantize=4 ({memory.readable(int(quantized_size(4) * HEADROOM))})")
    if device.type != "cpu":
        ways.append("use device='cpu'")
    raise NotEnoughMemoryError(
        f"loading {plan.folder} in {str(dtype).removeprefix('torch.')} on {device} needs about "
        f"{memory.readable(needed)}, and {memory.readable(room)} are available: {', or '.join(ways)}; "
        "check_memory=False tries all the same"
    )
