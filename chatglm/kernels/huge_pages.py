"""Memory for weights in 2 MB pages, where the system has them: CPUs read these 5 to 15 % faster than ordinary ones.

Weights that are mapped from a file do not need this: recent Linux keeps files in large pages by itself.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

PAGE = 1 << 21


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """`torch.empty(shape, dtype=dtype, device="cpu")`, in huge pages if it fills any and the system grants them.

    The memory is freed with the last tensor that uses it.
    """
    size = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if advice is None or size < PAGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skipped = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    with contextlib.suppress(OSError):  # a Linux kernel without them
        memory.madvise(advice, skipped, size // PAGE * PAGE)  # whole pages only: part of another would be wasted
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=skipped).view(shape)
