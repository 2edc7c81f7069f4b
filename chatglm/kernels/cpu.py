"""The CPU backend: builds `cpu.c` with the system's C compiler at first use, keeps the library, calls it with ctypes.

The library is kept in the folder that CHATGLM_CACHE names (else `chatglm` in the user's cache folder) under a name made
of all that decides what it holds (source, compiler, flags and CPU) and of what it holds, so that a damaged one is known
before it is opened. It appears there in one step, so that processes and threads that start together do no harm to each
other. CC chooses the compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .cache_files import cache_folder, digest, read_whole
from .errors import KernelUnavailable

SOURCE = Path(__file__).with_name("cpu.c")
SUFFIX = ".dll" if os.name == "nt" else ".so"
#: The families of kernels in cpu.c, by the numbers they have there.
VARIANTS = ("plain", "avx2", "avx512")

_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
#: The numbers that types have in cpu.c.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PRECISIONS = {"exact": 0, "default": 1, "int8": 2}
#: Rows from which expanding the weights for torch's product is faster than our own. Never for integers in AVX-512.
_LIBRARY_ROWS = {"plain": 16, "avx2": 32, "avx512": 64}
#: Weights that are expanded at a time for that.
_BLOCK = 1 << 22
#: Rows up to which our product with half-precision weights is faster than torch's.
_DENSE_ROWS = {
    "plain": {torch.bfloat16: 2, torch.float16: 8},
    "avx2": {torch.bfloat16: 2, torch.float16: 8},
    "avx512": {torch.bfloat16: 16, torch.float16: 64},
}

_lock = threading.Lock()


class Matrix(ctypes.Structure):
    """A quantised matrix with its bias; the layout of `Matrix` in cpu.c."""

    _fields_ = [
        ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("columns", ctypes.c_int64), ("outputs", ctypes.c_int64),
        ("bits", ctypes.c_int), ("precision", ctypes.c_int), ("scale_type", ctypes.c_int), ("bias_type", ctypes.c_int),
    ]  # fmt: skip

    @classmethod
    def of(
        cls, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int, precision: str
    ) -> Matrix:
        """Of contiguous tensors, which have to live as long as this is used; see `Backend.linear`."""
        outputs, stored = weight.shape
        return cls(
            weight.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr(), stored * 8 // bits, outputs,
            bits, _PRECISIONS[precision], DTYPES[scale.dtype], 0 if bias is None else DTYPES[bias.dtype],
        )  # fmt: skip


class Block(ctypes.Structure):
    """A decoder block with its prefix and its place in the cache; layout and meaning are those of `Block` in cpu.c."""

    _fields_ = [
        ("norm_weight", ctypes.c_void_p * 2), ("norm_bias", ctypes.c_void_p * 2),
        ("prefix_keys", ctypes.c_void_p), ("prefix_values", ctypes.c_void_p),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("cache_row", ctypes.c_int64), ("cache_step", ctypes.c_int64),
        ("fused", Matrix), ("dense", Matrix), ("up", Matrix), ("down", Matrix),
        *((name, ctypes.c_int64) for name in (
            "hidden", "heads", "kv_heads", "head_dim", "query_step", "key_start", "value_start", "key_step", "distance",
        )),
        *((name, ctypes.c_float) for name in ("eps", "residual_scale", "scaling")),
        *((name, ctypes.c_int) for name in ("norm_type", "cache_type", "rms", "gated", "residual_normed")),
    ]  # fmt: skip

    MAX_HEAD = 256


class Tokens(ctypes.Structure):
    """A token of each row that go through blocks, with their rotations; layout and meaning are as in cpu.c."""

    _fields_ = [
        ("x", ctypes.c_void_p), ("cos", ctypes.c_void_p * 2), ("sin", ctypes.c_void_p * 2), ("y", ctypes.c_void_p),
        ("past", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("rows", "prefix", "turns", "angles", "angle_row", "angle_step")),
        ("type", ctypes.c_int), ("angle_type", ctypes.c_int),
    ]  # fmt: skip


class Attention(ctypes.Structure):
    """The layout and the meaning of `Attention` in cpu.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "y")),
        *((name, ctypes.c_int64) for name in (
            "heads", "kv_heads", "head_dim", "tokens", "keys", "key_step", "value_step", "mask_step",
        )),
        ("type", ctypes.c_int), ("scaling", ctypes.c_float),
    ]  # fmt: skip

    MULTIPLE = 32  # of which head_dim has to be one


@dataclass(frozen=True)
class Backend:
    """The kernels of one library. All tensors are contiguous and on the CPU."""

    library: ctypes.CDLL
    path: Path
    compiler: str
    variant: str

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, precision: str = "default"
    ) -> torch.Tensor:
        """`x @ (q * scale).T`.

        Args:
            x: (rows, in) in float32, float16 or bfloat16
            weight: int8 (out, in * bits / 8)
            scale: (out,) in one of the same types
            bits: 4 or 8
            precision: "exact", "default" or "int8", see cpu.c

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
                VARIANTS.index(self.variant), torch.get_num_threads(), _PRECISIONS[precision], bits,
                x.data_ptr(), DTYPES[x.dtype], weight.data_ptr(), scale.data_ptr(), DTYPES[scale.dtype],
                y.data_ptr(), rows, columns, outputs,
            )
        )  # fmt: skip
        return y

    def _library_linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, y: torch.Tensor
    ) -> torch.Tensor:
        """Blocks of weights as float32, multiplied by torch."""
        x = x.float()
        step = max(1, _BLOCK // x.shape[1])
        for start in range(0, weight.shape[0], step):
            block = slice(start, start + step)
            y[:, block] = x @ self.dequantize(weight[block], scale[block], bits, torch.float32).T
        return y

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrix `q * scale` (out, in), rounded once to `dtype` (float32, float16 or bfloat16)."""
        outputs, columns = weight.shape[0], weight.shape[1] * 8 // bits
        y = torch.empty((outputs, columns), dtype=dtype)
        self._check(
            self.library.chatglm_dequantize(
                VARIANTS.index(self.variant), torch.get_num_threads(), bits, weight.data_ptr(), scale.data_ptr(),
                DTYPES[scale.dtype], y.data_ptr(), DTYPES[dtype], columns, outputs,
            )
        )  # fmt: skip
        return y

    def dense_rows(self, dtype: torch.dtype) -> int:
        """Rows up to which `dense` is faster than torch with weights of this type."""
        return _DENSE_ROWS[self.variant][dtype]

    def dense(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T` with fp32 sums, for the output head.

        Args:
            x: (rows, in) in float32, float16 or bfloat16; a few rows are fast
            weight: (out, in) in float16 or bfloat16

        Returns:
            (rows, out) in x's type
        """
        rows, columns = x.shape
        y = x.new_empty((rows, weight.shape[0]))
        if not y.numel():
            return y
        self._check(
            self.library.chatglm_dense(
                VARIANTS.index(self.variant), torch.get_num_threads(), x.data_ptr(), DTYPES[x.dtype],
                weight.data_ptr(), DTYPES[weight.dtype], y.data_ptr(), rows, columns, weight.shape[0],
            )
        )  # fmt: skip
        return y

    @property
    def block_rows(self) -> int:
        """Rows that `run_blocks` is for: `linear` leaves more to torch."""
        return _LIBRARY_ROWS[self.variant] - 1

    def run_blocks(self, tokens: Tokens, blocks: ctypes.Array[Block]) -> None:
        """Fills the tokens' `y` with what the blocks make of their `x`; their keys and values go into the cache."""
        variant, threads = VARIANTS.index(self.variant), torch.get_num_threads()
        self._check(self.library.chatglm_blocks(variant, threads, ctypes.byref(tokens), blocks, len(blocks)))

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Attention of one sequence in fp32, causal if there is no mask.

        Args:
            query: (heads, tokens, head_dim), contiguous, head_dim a multiple of Attention.MULTIPLE
            key, value: (kv_heads, keys, head_dim), each head contiguous, the tokens the last ones
            mask: (tokens, keys), added to the scores, each row contiguous

        Returns:
            (tokens, heads, head_dim), all in one of DTYPES
        """
        heads, tokens, size = query.shape
        y = query.new_empty((tokens, heads, size))
        job = Attention(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr(), y.data_ptr(),
            heads, key.shape[0], size, tokens, key.shape[1], key.stride(0), value.stride(0),
            0 if mask is None else mask.stride(0), DTYPES[query.dtype], scaling,
        )  # fmt: skip
        variant, threads = VARIANTS.index(self.variant), torch.get_num_threads()
        self._check(self.library.chatglm_attention(variant, threads, ctypes.byref(job)))
        return y

    def read(self, data: torch.Tensor) -> int:
        """Reads a contiguous tensor as fast as this machine can, for benchmarks: a sum that means nothing."""
        size = data.numel() * data.element_size()
        threads = torch.get_num_threads()
        return int(self.library.chatglm_read(VARIANTS.index(self.variant), threads, data.data_ptr(), size))

    def multiply(self, count: int) -> int:
        """`count` instructions of 64 integer products in each thread, for benchmarks: a sum; 0 without AVX-512."""
        return int(self.library.chatglm_multiply(VARIANTS.index(self.variant), torch.get_num_threads(), count))

    def describe(self) -> dict[str, str]:
        """What a user may want to know of this backend, in words."""
        return {
            "kernels": self.variant,
            "compiler": self.compiler,
            "library": str(self.path),
            "threads": str(torch.get_num_threads()),
        }

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise MemoryError("no memory left for the activations of a quantised product")


def load(variant: str | None = None) -> Backend:
    """The kernels for this CPU; builds them if need be.

    Args:
        variant: one of VARIANTS instead of the best; so does the environment variable CHATGLM_CPU_KERNELS.

    Raises:
        KernelUnavailable: no compiler, no OpenMP, or no folder to keep the library in; the message says what to do.
        ValueError: a variant that does not exist or that this CPU does not have.
    """
    return _load(variant or os.environ.get("CHATGLM_CPU_KERNELS") or None)


@functools.lru_cache
def _load(variant: str | None) -> Backend:
    with _lock:
        library, path, compiler = _library()
    best = int(library.chatglm_best())
    if variant is None:
        variant = VARIANTS[best]
    if variant not in VARIANTS[: best + 1]:
        raise ValueError(f"CPU kernels {variant!r}: this machine has {', '.join(VARIANTS[: best + 1])}")
    return Backend(library, path, compiler, variant)


@functools.lru_cache
def _library() -> tuple[ctypes.CDLL, Path, str]:
    if sys.byteorder != "little":
        raise KernelUnavailable("our kernels are for little-endian CPUs")
    source = SOURCE.read_bytes()
    command, version = find_compiler()
    folder = cache_folder()
    failures = []
    for flags in _openmp_flags():
        key = hashlib.sha256(repr((source, command, version, _FLAGS, flags, cpu_name())).encode()).hexdigest()[:24]
        for path in sorted(folder.glob(f"cpu-{key}-*{SUFFIX}")):
            if read_whole(path) is not None:  # opening one that is cut off would end the process
                with contextlib.suppress(OSError):
                    return _open(path), path, version
        try:
            path = build([*command, *_FLAGS, *flags], folder, f"cpu-{key}")
            return _open(path), path, version
        except (subprocess.SubprocessError, OSError) as error:
            if isinstance(error, OSError) and error.filename:  # not what the loader of libraries says
                raise KernelUnavailable(
                    f"no library can be written to {folder} ({error.strerror}); "
                    "set CHATGLM_CACHE to a folder that can be written to"
                ) from error
            failures.append(getattr(error, "stderr", None) or str(error))
    raise KernelUnavailable(
        f"{command[0]} did not build the CPU kernels; they need GCC, or Clang with OpenMP ("
        "Debian/Ubuntu: apt install gcc; macOS: brew install libomp; CC names the compiler). "
        f"It said: {failures[0].strip()[-400:]}"
    )


def build(command: Sequence[str], folder: Path, stem: str) -> Path:
    """Compiles SOURCE to `<stem>-<digest>.so` in `folder`, which appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=SUFFIX)
    os.close(handle)
    try:
        subprocess.run(
            [*command, "-o", name, str(SOURCE), "-lm"], check=True, capture_output=True, text=True, timeout=300
        )
        path = folder / f"{stem}-{digest(Path(name).read_bytes())}{SUFFIX}"
        os.replace(name, path)
        return path
    finally:
        Path(name).unlink(missing_ok=True)


def find_compiler() -> tuple[list[str], str]:
    """The command of the C compiler and the first line of what it says of itself."""
    chosen = os.environ.get("CC")
    candidates = [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        try:
            result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
        except (subprocess.SubprocessError, OSError):
            continue
        return command, (result.stdout.splitlines() or ["unknown"])[0]
    where = f"CC={chosen} is none" if chosen else "there is no cc, gcc or clang"
    raise KernelUnavailable(
        f"the CPU kernels need a C compiler and {where} (Debian/Ubuntu: apt install gcc; Fedora: dnf install gcc; "
        "macOS: xcode-select --install and brew install libomp; Windows: MinGW-w64 with gcc on the PATH)"
    )


@functools.lru_cache
def cpu_name() -> str:
    """What tells CPUs apart for which the compiler may build different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *found])


def _openmp_flags() -> list[list[str]]:
    """Ways to ask for OpenMP; the first that builds is taken."""
    native = [] if platform.machine().lower() in ("x86_64", "amd64") else ["-mcpu=native"]
    ways = [[*native, "-fopenmp"], ["-fopenmp"]] if native else [["-fopenmp"]]
    if sys.platform == "darwin":  # Apple's clang has OpenMP without its library, which torch brings along
        lib = Path(torch.__file__).parent / "lib"
        ways.append(["-Xclang", "-fopenmp", f"-L{lib}", f"-Wl,-rpath,{lib}", "-lomp"])
    return ways


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    library.chatglm_linear.argtypes = [
        number, number, number, number, pointer, number, pointer, pointer, number, pointer, size, size, size,
    ]  # fmt: skip
    library.chatglm_dequantize.argtypes = [
        number, number, number, pointer, pointer, number, pointer, number, size, size,
    ]  # fmt: skip
    library.chatglm_dense.argtypes = [
        number, number, pointer, number, pointer, number, pointer, size, size, size,
    ]  # fmt: skip
    library.chatglm_blocks.argtypes = [number, number, ctypes.POINTER(Tokens), ctypes.POINTER(Block), size]
    library.chatglm_attention.argtypes = [number, number, ctypes.POINTER(Attention)]
    library.chatglm_read.argtypes = [number, number, pointer, size]
    library.chatglm_read.restype = ctypes.c_uint64
    library.chatglm_multiply.argtypes = [number, number, size]
    library.chatglm_multiply.restype = ctypes.c_uint64
    return library
