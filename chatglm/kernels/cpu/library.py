"""The compiled library as Python sees it: mirrors of its structs, the types of its functions, and opening it.

`Matrix`, `Block`, `Tokens` and `Attention` must match layouts.h, which explains their fields: with a misplaced field
the kernels would read and write the wrong memory. Every library that is opened describes its own layouts, and any
difference is an error.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from ..errors import KernelMismatch
from . import compile as compiler
from .fetching import PLACES

#: The families of kernels; the index is the enum value in C.
VARIANTS = ("plain", "avx2", "avx512", "dotprod", "i8mm")
#: The enum values of dtypes and precisions in C.
TYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: The type of a cache of int8, see `cache.int8`, and the bytes of its scales.
SCALED_INT8, SCALE_BYTES = 3, 4
PRECISIONS = {"exact": 0, "default": 1, "int8": 2}
#: The largest head_dim of a Block, and the number that divides the head_dim of an Attention.
MAX_HEAD = 256
HEAD_MULTIPLE = 32
#: The number of bits that stands for weights that are not quantised.
DENSE_BITS = 16


class Matrix(ctypes.Structure):
    """A matrix with its bias: quantised, or of floats."""

    __slots__ = ()  # setting an unknown field is an error
    _fields_ = [
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
        ("columns", c_int64), ("outputs", c_int64),
        ("bits", c_int), ("precision", c_int), ("scale_type", c_int), ("bias_type", c_int),
    ]  # fmt: skip

    @classmethod
    def of(
        cls, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int, precision: str
    ) -> Matrix:
        """Made of contiguous tensors, which must live as long as this is used; see `CPUBackend.linear`."""
        outputs, stored = weight.shape
        return cls(
            weight=weight.data_ptr(),
            scale=scale.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            columns=stored * 8 // bits,
            outputs=outputs,
            bits=bits,
            precision=PRECISIONS[precision],
            scale_type=TYPE_CODES[scale.dtype],
            bias_type=0 if bias is None else TYPE_CODES[bias.dtype],
        )

    @classmethod
    def of_floats(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        """The same with weights (outputs, columns) that are not quantised; x is rounded to bfloat16 if they are."""
        return cls(
            weight=weight.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            columns=weight.shape[1],
            outputs=weight.shape[0],
            bits=DENSE_BITS,
            precision=PRECISIONS["default"],
            scale_type=TYPE_CODES[weight.dtype],
            bias_type=0 if bias is None else TYPE_CODES[bias.dtype],
        )


class Block(ctypes.Structure):
    """A decoder block with its prefix and its place in the cache."""

    __slots__ = ()
    _fields_ = [
        ("norm_weight", c_void_p * 2), ("norm_bias", c_void_p * 2),
        ("prefix_keys", POINTER(c_void_p)), ("prefix_values", POINTER(c_void_p)),
        ("keys", c_void_p), ("values", c_void_p),
        ("cache_row", c_int64), ("cache_step", c_int64),
        ("fused", Matrix), ("dense", Matrix), ("up", Matrix), ("down", Matrix),
        ("hidden", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64),
        ("query_step", c_int64), ("key_start", c_int64), ("value_start", c_int64), ("key_step", c_int64),
        ("distance", c_int64),
        ("eps", c_float), ("residual_scale", c_float), ("scaling", c_float),
        ("norm_type", c_int), ("prefix_type", c_int), ("cache_type", c_int),
        ("rms", c_int), ("gated", c_int), ("residual_normed", c_int),
    ]  # fmt: skip


class Tokens(ctypes.Structure):
    """One token of each row, to be run through blocks, with its rotary tables."""

    __slots__ = ()
    _fields_ = [
        ("x", c_void_p), ("cos", c_void_p * 2), ("sin", c_void_p * 2), ("y", c_void_p),
        ("lines", POINTER(c_int64)), ("past", POINTER(c_int64)), ("prefix", POINTER(c_int64)),
        ("rows", c_int64),
        ("turns", c_int64), ("angles", c_int64), ("angle_row", c_int64), ("angle_step", c_int64),
        ("type", c_int), ("angle_type", c_int),
    ]  # fmt: skip


class Attention(ctypes.Structure):
    """Attention of several tokens of one sequence."""

    __slots__ = ()
    _fields_ = [
        ("query", c_void_p), ("key", c_void_p), ("value", c_void_p), ("mask", c_void_p),
        ("y", c_void_p),
        ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("tokens", c_int64), ("keys", c_int64),
        ("key_step", c_int64), ("value_step", c_int64), ("mask_step", c_int64),
        ("type", c_int),
        ("scaling", c_float),
    ]  # fmt: skip


STRUCTS: tuple[type[ctypes.Structure], ...] = (Matrix, Block, Tokens, Attention)
NUMBERS: dict[str, int] = {
    **dict(zip(("PORTABLE", "PORTABLE_AVX2", "VNNI", "DOTPROD", "I8MM"), range(len(VARIANTS)), strict=True)),
    **dict(zip(("FLOAT32", "FLOAT16", "BFLOAT16"), TYPE_CODES.values(), strict=True)),
    **{name.upper(): number for name, number in PRECISIONS.items()},
    **{f"TO_{name}": number for number, name in enumerate(PLACES)},
    "SCALED_INT8": SCALED_INT8,
    "SCALE_BYTES": SCALE_BYTES,
    "MAX_HEAD": MAX_HEAD,
    "HEAD_MULTIPLE": HEAD_MULTIPLE,
    "DENSE_BITS": DENSE_BITS,
}


@functools.cache
def load_library() -> tuple[ctypes.CDLL, Path, str]:
    """The library, opened and checked; its path; its compiler.

    Raises:
        KernelUnavailable: it cannot be built here, see `compile.compiled`.
        KernelMismatch: its structs differ from those of this module.
    """
    return compiler.compiled(open_library)


def open_library(path: Path) -> ctypes.CDLL:
    """Opens a library and checks its structs against those of this module. Raises OSError and KernelMismatch."""
    library = ctypes.CDLL(str(path))
    check_layouts(library)
    number, pointer, size = c_int, c_void_p, c_int64
    library.chatglm_linear.argtypes = [
        number, number, number, number, pointer, number, pointer, pointer, number, pointer, size, size, size,
    ]  # fmt: skip
    library.chatglm_dequantize.argtypes = [
        number, number, number, pointer, pointer, number, pointer, number, size, size,
    ]  # fmt: skip
    library.chatglm_runs.argtypes = [number]
    library.chatglm_fetch.argtypes = [number]
    library.chatglm_fetch.restype = None
    library.chatglm_blocks.argtypes = [number, number, POINTER(Tokens), POINTER(Block), size]
    library.chatglm_attention.argtypes = [number, number, POINTER(Attention)]
    library.chatglm_read.argtypes = [number, number, pointer, size]
    library.chatglm_read.restype = ctypes.c_uint64
    library.chatglm_multiply.argtypes = [number, number, size]
    library.chatglm_multiply.restype = ctypes.c_uint64
    return library


# ---- the same layouts on both sides ----------------------------------------------------------------------------------

#: The kind of a struct, field or number; the offset of a field or the value of a number; and the size.
Layout = tuple[str, int, int]


class _Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("kind", ctypes.c_char_p), ("value", c_int64), ("size", c_int64)]


def check_layouts(library: ctypes.CDLL) -> None:
    """Raises KernelMismatch, with every difference, if the library's structs differ from those of this module."""
    theirs, ours = layouts_of(library), layouts_here()
    differences = [
        f"{name} is {_in_words(theirs.get(name))} in C and {_in_words(ours.get(name))} in Python"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise KernelMismatch(
            f"the C code and the Python code of the CPU kernels do not match: {'; '.join(differences)}. "
            "Reinstall the package; if you changed kernels/cpu/layouts.h or library.py, change the other too"
        )


def layouts_of(library: ctypes.CDLL) -> dict[str, Layout]:
    """The layouts that the library reports."""
    library.chatglm_layouts.restype = POINTER(_Entry)
    found, entries = {}, library.chatglm_layouts()
    index = 0
    while (entry := entries[index]).name:
        found[entry.name.decode()] = (entry.kind.decode(), entry.value, entry.size)
        index += 1
    return found


def layouts_here() -> dict[str, Layout]:
    """The layouts that this module assumes."""
    found: dict[str, Layout] = {name: ("number", value, 0) for name, value in NUMBERS.items()}
    for struct in STRUCTS:
        found[struct.__name__] = ("struct", 0, ctypes.sizeof(struct))
        for name, kind in _fields(struct).items():
            place = getattr(struct, name)
            found[f"{struct.__name__}.{name}"] = (_kind(kind), place.offset, place.size)
    return found


def _fields(struct: type[ctypes.Structure]) -> Mapping[str, Any]:
    return {field[0]: field[1] for field in struct._fields_}


def _kind(kind: Any) -> str:
    if issubclass(kind, ctypes.Array):
        return _kind(kind._type_)
    if issubclass(kind, ctypes.Structure):
        return "struct"
    return {c_float: "float", c_int: "int", c_int64: "int64"}.get(kind, "pointer")


def _in_words(layout: Layout | None) -> str:
    if layout is None:
        return "missing"
    kind, value, size = layout
    if kind == "number":
        return str(value)
    return f"{size} bytes" if kind == "struct" and not value else f"{kind} ({size} bytes at {value})"
