"""The CPU backend: C code (`kernels.c` and its headers), compiled at first use (`compile.py`), opened with ctypes
(`library.py`) and called with tensors (`backend.py`). `probes.py` is for benchmarks."""

from .backend import Backend, load
from .library import DTYPES, HEAD_MULTIPLE, MAX_HEAD, VARIANTS, Attention, Block, Matrix, Tokens

__all__ = [
    "DTYPES",
    "HEAD_MULTIPLE",
    "MAX_HEAD",
    "VARIANTS",
    "Attention",
    "Backend",
    "Block",
    "Matrix",
    "Tokens",
    "load",
]
