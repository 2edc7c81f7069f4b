"""The speed of memory and of arithmetic, with which benchmarks compare the kernels. No model needs this."""

from __future__ import annotations

import torch

from .backend import CPUBackend
from .library import VARIANTS


def read(backend: CPUBackend, data: torch.Tensor) -> int:
    """Reads a contiguous tensor as fast as this machine can; returns a meaningless sum."""
    size = data.numel() * data.element_size()
    variant, threads = VARIANTS.index(backend.variant), torch.get_num_threads()
    return int(backend.library.chatglm_read(variant, threads, data.data_ptr(), size))


def multiply(backend: CPUBackend, count: int) -> int:
    """Runs `count` instructions of 64 integer products in each thread; returns a sum, 0 without AVX-512."""
    variant, threads = VARIANTS.index(backend.variant), torch.get_num_threads()
    return int(backend.library.chatglm_multiply(variant, threads, count))
