"""The CPU backend: C code (`kernels.c` and its headers), compiled at first use (`compile.py`), opened with ctypes
(`library.py`) and called with tensors (`backend.py`). `probes.py` is for benchmarks."""

from .backend import CPUBackend, load
from .library import HEAD_MULTIPLE, MAX_HEAD, SCALED_INT8, TYPE_CODES, VARIANTS, Attention, Block, Matrix, Tokens

__all__ = [
    "HEAD_MULTIPLE",
    "MAX_HEAD",
    "SCALED_INT8",
    "TYPE_CODES",
    "VARIANTS",
    "Attention",
    "Block",
    "CPUBackend",
    "Matrix",
    "Tokens",
    "load",
]
