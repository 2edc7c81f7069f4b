"""The floating-point dtype in which a model is loaded."""

from __future__ import annotations

import torch

from ..checkpoints import memory
from ..checkpoints.files import Weights

DTYPES = {
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
}  # fmt: skip
SMALL = 2**28  # parameters; below that (1 GiB in float32), a smaller dtype saves too little to matter
HEADROOM = 1.1  # factor on the weights: buffers while loading, activations, the KV cache of the first turns


def choose_dtype(dtype: str | torch.dtype, device: torch.device, weights: Weights) -> torch.dtype:
    """The torch dtype that `dtype` names; "auto" depends on the device and on the checkpoint, see `load`.

    Raises:
        ValueError: it is unknown, or cannot hold weights.
    """
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ValueError(f"dtype {dtype} cannot hold weights: use float16, bfloat16 or float32")
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"dtype {dtype!r} is unknown: use 'auto' or one of {', '.join(DTYPES)}")
    if device.type == "cuda" and weights.dtype == torch.bfloat16 and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    if device.type != "cpu":
        return torch.float16
    if weights.elements < SMALL:
        return torch.float32
    room = memory.available(device)
    too_large = room is not None and weights.size(4) * HEADROOM > room
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is Arm's name
    return torch.bfloat16 if fast or too_large else torch.float32
