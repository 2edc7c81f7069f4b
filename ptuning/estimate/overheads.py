"""Memory beyond the tensors of the model and its step: the optimizer, other devices, libraries, the file."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from chatglm import quantization
from chatglm.loading import DTYPES

from .ledger import Ledger
from .settings import EIGHT_BIT, Settings, kept_dtype

#: Memory of main.py besides the tensors. CPU, measured: Python, torch, transformers, peft and datasets (470 MiB), and
#: what Trainer and accelerate add when they start. GPU, an assumption: the CUDA context and the libraries' kernels.
LIBRARIES = {"cpu": 530 * 2**20, "cuda": 600 * 2**20}
#: jieba, rouge-chinese and nltk, if answers are scored (measured; jieba loads its dictionary after training).
METRICS = {"cpu": 66 * 2**20, "cuda": 0}
#: Added in the first steps: 28 MiB of code that is loaded on demand, and freed memory that the C library keeps, as it
#: returns only the end of its heap to the system (30 to 90 MiB together in the runs measured).
RUNNING = {"cpu": 70 * 2**20, "cuda": 0}


def shares(settings: Settings) -> dict[str, float]:
    """The fraction of each part that one device holds under DeepSpeed's ZeRO."""
    part = 1 / settings.world_size
    shares = {}
    if settings.zero_stage >= 1:
        shares["optimizer"] = 0.0 if settings.offload else part
    if settings.zero_stage >= 2:
        shares["gradients"] = part
    if settings.zero_stage >= 3:
        shares["weights"] = shares["trainable"] = part
    return shares


def optimizer_states(trained: list[nn.Parameter], settings: Settings, ledger: Ledger) -> list[torch.Tensor]:
    """Tensors of the size of the states that the optimizer keeps from its first step on."""
    ledger.tag_as("optimizer")
    sizes = [int(_state_bytes(parameter, settings)) for parameter in trained]
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def _state_bytes(parameter: nn.Parameter, settings: Settings) -> float:
    kept = settings.zero_stage > 0 and parameter.element_size() < 4
    width = 4 if settings.zero_stage else parameter.element_size()  # DeepSpeed steps in float32
    master = 4 * parameter.numel() * kept
    if settings.optimizer in EIGHT_BIT:
        return master + 2.03 * parameter.numel()  # a byte for each of two moments, and a scale for each block of them
    if settings.optimizer == "adafactor":  # sums over rows and over columns instead of the second moment
        rows = parameter.numel() // parameter.shape[-1] if parameter.dim() > 1 else 0
        return master + 4.0 * (rows + parameter.shape[-1])
    if settings.optimizer == "sgd":
        return master
    return master + 2 * width * parameter.numel()


def step_copies(trained: list[nn.Parameter], settings: Settings) -> int:
    """Bytes that an optimizer step allocates: an unfused one copies all weights at once on a GPU, else one by one."""
    if settings.optimizer in ("adamw_torch_fused", "sgd", *EIGHT_BIT) or settings.zero_stage or not trained:
        return 0
    sizes = [4 * parameter.numel() for parameter in trained]
    if settings.device == "cuda" and settings.optimizer == "adamw_torch":
        return sum(sizes)
    return 2 * max(sizes)


def communication(trained: list[nn.Parameter], parameters: list[nn.Parameter], settings: Settings) -> int:
    """Bytes of the buckets that carry gradients and weights between devices: DDP's copies, or DeepSpeed's buckets
    with the sizes of our configs."""
    if settings.world_size == 1:
        return 0
    numbers = sum(parameter.numel() for parameter in trained)
    if settings.zero_stage == 0:
        return sum(parameter.numel() * parameter.element_size() for parameter in trained)
    bucket = min(numbers, 500_000_000) * settings.dtype.itemsize
    if settings.zero_stage < 3:
        return 2 * bucket
    gathered = min(sum(parameter.numel() for parameter in parameters), 1_000_000_000) * settings.dtype.itemsize
    return bucket + gathered


def file_pages(config: Any, parameters: int, quantized: int, settings: Settings) -> tuple[int, int]:
    """Bytes of the file's pages in memory, while loading and while training.

    Weights that stay unchanged are pages of the file themselves; converted ones are copies beside them.
    """
    stored = getattr(config, "dtype", None)
    stored = DTYPES.get(stored) if isinstance(stored, str) else stored
    if settings.device != "cpu" or stored is None or quantization.settings_of(config) is not None:
        return 0, 0
    if stored == kept_dtype(settings):
        # Without quantisation nothing is copied; with it, what is not quantised keeps the whole file open.
        return quantized * stored.itemsize, quantized * stored.itemsize
    return parameters * stored.itemsize, 0
