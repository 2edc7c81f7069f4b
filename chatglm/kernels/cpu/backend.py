"""The CPU kernels, called with tensors: products, whole decoder blocks and attention."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import huge_pages
from .fetching import PLACES, chosen_place
from .library import DENSE_BITS, PRECISIONS, TYPE_CODES, VARIANTS, Attention, Block, Tokens, load_library

#: From this many rows on, expanding the weights for torch's product is faster than ours (never with AVX-512 integers).
_LIBRARY_ROWS = {"plain": 16, "avx2": 32, "avx512": 64, "dotprod": 16, "i8mm": 16}
#: Weights that are expanded at a time for that.
_SLICE = 1 << 22
#: Rows up to which our product with weights that are not quantised is faster than torch's.
_DENSE_ROWS = {
    variant: {torch.float32: 4, torch.bfloat16: 4, torch.float16: 64}
    if variant == "avx512"
    else {torch.float32: 1, torch.bfloat16: 2, torch.float16: 8}
    for variant in VARIANTS
}
#: The same for tokens of answers, and pieces of prompts that a server reads together with them. Other prompts keep
#: torch's numbers: exported models are promised to give the same ones to the last bit.
_ANSWER_ROWS = _DENSE_ROWS | {"avx512": _DENSE_ROWS["avx512"] | {torch.float32: 16, torch.bfloat16: 16}}

#: Weights of the product that chooses where to prefetch to: more than the caches of most CPUs hold.
_PREFETCH_BYTES = 1 << 27

_lock = threading.Lock()


@dataclass(frozen=True)
class CPUBackend:
    """The kernels of one library. All tensors are contiguous and on the CPU."""

    library: ctypes.CDLL
    path: Path
    compiler: str
    variant: str
    prefetch: str

    @property
    def _isa(self) -> int:
        return VARIANTS.index(self.variant)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, precision: str = "default"
    ) -> torch.Tensor:
        """`x @ (q * scale).T`.

        Args:
            x: (rows, in) in float32, float16 or bfloat16
            weight: int8 (out, in * bits / 8)
            scale: (out,) in one of the same types
            bits: 4 or 8
            precision: "exact", "default" or "int8", see kernels.c

        Returns:
            (rows, out) in x's type
        """
        rows, columns = x.shape
        outputs = weight.shape[0]
        y = x.new_empty((rows, outputs))
        if not y.numel():
            return y
        if not columns:
            return y.zero_()
        if rows >= _LIBRARY_ROWS[self.variant] and (precision == "exact" or self.variant != "avx512"):
            return self._library_linear(x, weight, scale, bits, y)
        self._check(
            self.library.chatglm_linear(
                self._isa, torch.get_num_threads(), PRECISIONS[precision], bits,
                x.data_ptr(), TYPE_CODES[x.dtype], weight.data_ptr(), scale.data_ptr(), TYPE_CODES[scale.dtype],
                y.data_ptr(), rows, columns, outputs,
            )
        )  # fmt: skip
        return y

    def _library_linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, y: torch.Tensor
    ) -> torch.Tensor:
        """Slices of the weights as float32, multiplied by torch."""
        x = x.float()
        step = max(1, _SLICE // x.shape[1])
        for start in range(0, weight.shape[0], step):
            part = slice(start, start + step)
            y[:, part] = x @ self.dequantize(weight[part], scale[part], bits, torch.float32).T
        return y

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrix `q * scale` (out, in), rounded once to `dtype` (float32, float16 or bfloat16)."""
        outputs, columns = weight.shape[0], weight.shape[1] * 8 // bits
        y = torch.empty((outputs, columns), dtype=dtype)
        self._check(
            self.library.chatglm_dequantize(
                self._isa, torch.get_num_threads(), bits, weight.data_ptr(), scale.data_ptr(),
                TYPE_CODES[scale.dtype], y.data_ptr(), TYPE_CODES[dtype], columns, outputs,
            )
        )  # fmt: skip
        return y

    def dense_rows(self, dtype: torch.dtype, answers: bool = False) -> int:
        """Rows up to which `dense` is used with weights of this type, because it is faster than torch.

        Args:
            answers: whether the rows are tokens that follow what a KV cache holds.
        """
        return (_ANSWER_ROWS if answers else _DENSE_ROWS)[self.variant][dtype]

    def dense(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T` with fp32 sums.

        Args:
            x: (rows, in) in float32, float16 or bfloat16; a few rows are fast
            weight: (out, in) in one of the same types

        Returns:
            (rows, out) in x's type
        """
        rows, columns = x.shape
        y = x.new_empty((rows, weight.shape[0]))
        if not y.numel():
            return y
        if not columns:
            return y.zero_()
        precision = PRECISIONS["default" if x.dtype == weight.dtype else "exact"]  # no x is rounded
        self._check(
            self.library.chatglm_linear(
                self._isa, torch.get_num_threads(), precision, DENSE_BITS,
                x.data_ptr(), TYPE_CODES[x.dtype], weight.data_ptr(), None, TYPE_CODES[weight.dtype],
                y.data_ptr(), rows, columns, weight.shape[0],
            )
        )  # fmt: skip
        return y

    @property
    def block_rows(self) -> int:
        """The most rows for `run_blocks` with quantised blocks: with more, `linear` leaves the product to torch."""
        return _LIBRARY_ROWS[self.variant] - 1

    def run_blocks(self, tokens: Tokens, blocks: ctypes.Array[Block]) -> None:
        """Runs the tokens' `x` through the blocks into their `y`, and writes their keys and values into the cache."""
        threads = torch.get_num_threads()
        self._check(self.library.chatglm_blocks(self._isa, threads, ctypes.byref(tokens), blocks, len(blocks)))

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Attention of one sequence in fp32, causal if there is no mask.

        Args:
            query: (heads, tokens, head_dim), contiguous, head_dim a multiple of HEAD_MULTIPLE
            key, value: (kv_heads, keys, head_dim), each head contiguous; the tokens are the last keys
            mask: (tokens, keys), added to the scores, each row contiguous

        Returns:
            (tokens, heads, head_dim), all in one of TYPE_CODES
        """
        heads, tokens, size = query.shape
        y = query.new_empty((tokens, heads, size))
        job = Attention(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            y=y.data_ptr(),
            heads=heads,
            kv_heads=key.shape[0],
            head_dim=size,
            tokens=tokens,
            keys=key.shape[1],
            key_step=key.stride(0),
            value_step=value.stride(0),
            mask_step=0 if mask is None else mask.stride(0),
            type=TYPE_CODES[query.dtype],
            scaling=scaling,
        )
        self._check(self.library.chatglm_attention(self._isa, torch.get_num_threads(), ctypes.byref(job)))
        return y

    def describe(self) -> dict[str, str]:
        """Facts about this backend for users."""
        return {
            "kernels": self.variant,
            "compiler": self.compiler,
            "library": str(self.path),
            "prefetch": self.prefetch,
            "threads": str(torch.get_num_threads()),
        }

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise MemoryError("no memory left for the activations of a quantised product")


def load(variant: str | None = None) -> CPUBackend:
    """The kernels for this CPU; builds them if necessary.

    Args:
        variant: one of VARIANTS; by default the one that the environment variable CHATGLM_CPU_KERNELS names, else the
            best.

    Raises:
        KernelUnavailable: no compiler, no OpenMP, or no folder to keep the library in; the message says what to do.
        KernelMismatch: the C code and the Python code are of different versions.
        ValueError: a variant that does not exist or that this CPU does not have; no place to prefetch to.
    """
    return load_variant(variant or os.environ.get("CHATGLM_CPU_KERNELS") or None)


@functools.cache
def load_variant(variant: str | None) -> CPUBackend:
    """As `load`, but ignores the environment; None is the best one."""
    with _lock:
        library, path, compiler = load_library()
        prefetch = set_prefetch(library, path)
    variants = variants_of(library)
    if variant is None:
        variant = variants[-1]
    if variant not in variants:
        raise ValueError(f"CPU kernels {variant!r}: this machine has {', '.join(variants)}")
    return CPUBackend(library, path, compiler, variant, prefetch)


def variants_of(library: ctypes.CDLL) -> list[str]:
    """Those of VARIANTS that this machine runs, the fastest last."""
    return [variant for isa, variant in enumerate(VARIANTS) if library.chatglm_runs(isa)]


@functools.cache
def set_prefetch(library: ctypes.CDLL, path: Path) -> str:
    """Tells the library where to prefetch weights to, and returns that in words."""
    best = variants_of(library)[-1]
    if best not in ("avx2", "avx512"):
        return "none"
    weight = huge_pages.empty((_PREFETCH_BYTES // 2048, 2048)).fill_(1)
    scale, x = torch.ones(len(weight)), torch.ones(1, 4096)
    backend = CPUBackend(library, path, "", best, "")

    def product(place: str) -> None:
        library.chatglm_fetch(PLACES.index(place))
        backend.linear(x, weight, scale, 4)

    place, how = chosen_place(path, product)
    library.chatglm_fetch(PLACES.index(place))
    return f"to the {place} cache ({how})"
