"""The backend for NVIDIA GPUs, sm_75 (Turing) and later: launches the kernels of kernels.cu.

Up to 32 rows are multiplied with the packed weights directly; for more, the weights are expanded and cuBLAS multiplies.
The fused kernels add in float32 and round once, so every precision that a caller can ask for is the same here.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from ..cache_files import cache_folder
from ..errors import KernelUnavailable
from .compile import Compiler, choose_target, compile_cached, find_compiler
from .driver import Driver, Function, cpm_kernels_functions, driver_functions

SOURCE = Path(__file__).with_name("kernels.cu")

#: Rows up to which the fused kernels are used.
FUSED_ROWS = 32
#: Weights that are expanded at once for a product with more rows: 256 MB in half precision.
SLICE = 1 << 27

# As in kernels.cu:
THREADS = 256
_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_SCALE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
TENSOR_CORE_ROWS = {8: 16, 16: 32, 32: 32}  # rows of x in a kernel's name -> columns of y that a block computes
_FLOAT_ROWS = (1, 2, 4, 8)
FLOAT_OUT = 32  # columns of y that a block computes: 8 warps, 4 columns each
_ALIGNMENT = 16
_COLUMNS = 32  # the fused kernels need a multiple of this many columns


@dataclass(frozen=True)
class Device:
    """The kernels, loaded on one GPU."""

    architecture: int
    target: str
    launcher: str
    context: ctypes.c_void_p
    functions: dict[str, Function]


class CUDABackend:
    """INT4 and INT8 products on every GPU that torch sees; each gets its kernels when its first tensor arrives.

    Args:
        driver: launches the kernels.
        compiler: compiles them.
        capability: device index -> compute capability.
        stream: device index -> handle of the current stream.
    """

    def __init__(
        self,
        driver: Driver,
        compiler: Compiler,
        capability: Callable[[int], tuple[int, int]] = torch.cuda.get_device_capability,
        stream: Callable[[int], int] = lambda index: torch.cuda.current_stream(index).cuda_stream,
    ) -> None:
        self._driver = driver
        self._compiler = compiler
        self._capability = capability
        self._stream = stream
        self._devices: dict[int, Device] = {}
        self._lock = threading.Lock()

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, precision: str = "default"
    ) -> torch.Tensor:
        """`x @ (q * scale).T`.

        Args:
            x: (rows, in), contiguous; float16, bfloat16 or float32
            weight: int8 (out, in * bits / 8), contiguous
            scale: (out,), any of those three dtypes
            bits: 4 or 8
            precision: has no effect here.

        Returns:
            (rows, out) in x's dtype

        Raises:
            KernelUnavailable: the kernels cannot be compiled or loaded for x's device.
        """
        device = self.prepare(x.get_device())
        rows, columns = x.shape
        if rows > FUSED_ROWS or columns % _COLUMNS or weight.data_ptr() % _ALIGNMENT:
            return self._expand_and_multiply(x, weight, scale, bits)
        dtype = x.dtype
        if dtype == torch.bfloat16 and device.architecture < 80:
            x = x.float()  # Turing's tensor cores do not support bfloat16
        if x.data_ptr() % _ALIGNMENT:
            x = x.clone()
        out = weight.shape[0]
        y = x.new_empty((rows, out))
        if not y.numel():
            return y.to(dtype)
        if x.dtype == torch.float32:
            count = next((n for n in _FLOAT_ROWS if n >= rows), _FLOAT_ROWS[-1])
            grid = (_ceil_div(out, FLOAT_OUT), _ceil_div(rows, count), 1)
        else:
            count = next(n for n in TENSOR_CORE_ROWS if n >= rows)
            grid = (_ceil_div(out, TENSOR_CORE_ROWS[count]), 1, 1)
        tensors = (y, x, weight, scale)
        self._launch(f"rows_int{bits}_{_DTYPES[x.dtype]}_{count}", grid, tensors, (rows, out, columns))
        return y.to(dtype)

    def _expand_and_multiply(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int
    ) -> torch.Tensor:
        step = max(1, SLICE // max(1, x.shape[1]))
        if len(weight) <= step:
            return F.linear(x, self.dequantize(weight, scale, bits, x.dtype))
        parts = zip(weight.split(step), scale.split(step), strict=True)
        return torch.cat([F.linear(x, self.dequantize(w, s, bits, x.dtype)) for w, s in parts], dim=1)

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
        """`q * scale`, rounded once.

        Args:
            weight: int8 (out, in * bits / 8), contiguous
            scale: (out,)
            bits: 4 or 8
            dtype: float16, bfloat16 or float32

        Returns:
            (out, in) in `dtype`

        Raises:
            KernelUnavailable: the kernels cannot be compiled or loaded for the weight's device.
        """
        self.prepare(weight.get_device())
        rows, columns = weight.shape[0], weight.shape[1] * 8 // bits
        y = weight.new_empty((rows, columns), dtype=dtype)
        if y.numel():
            aligned = columns % _COLUMNS == 0 and weight.data_ptr() % _ALIGNMENT == 0
            name = f"dequantize_int{bits}_{_DTYPES[dtype]}"
            self._launch(name, (rows, 1, 1), (y, weight, scale), (columns, int(aligned)))
        return y

    def describe(self) -> dict[str, str]:
        """How the kernels were compiled and loaded and when they run, for users."""
        texts = {"compiler": self._compiler.name, "cache": str(cache_folder())}
        for index, device in sorted(self._devices.items()):
            texts[f"cuda:{index}"] = f"{device.target}, launched through {device.launcher}"
        texts["INT4"] = texts["INT8"] = f"fused kernel up to {FUSED_ROWS} rows, then expansion and cuBLAS"
        return texts

    def prepare(self, index: int) -> Device:
        """Compiles and loads the kernels for a GPU, once. Raises KernelUnavailable."""
        device = self._devices.get(index)
        if device is None:
            with self._lock:
                device = self._devices.get(index)
                if device is None:
                    device = self._devices[index] = self._load(index)
        return device

    def _load(self, index: int) -> Device:
        major, minor = self._capability(index)
        architecture = 10 * major + minor
        if architecture < 75:
            raise KernelUnavailable(f"our CUDA kernels need sm_75 (Turing) or later, this GPU is sm_{architecture}")
        target = choose_target(architecture, self._compiler.architectures())
        code = compile_cached(self._compiler, SOURCE.read_text(encoding="utf-8"), target)
        names = kernel_names(architecture)
        try:
            context = self._driver.primary_context(index)
            try:
                launcher = "cpm_kernels"
                functions = self._driver.load(context, cpm_kernels_functions, code, names)
            except Exception:  # it fails in many ways if something is missing, and the driver alone can do the same
                launcher = "the CUDA driver"
                functions = self._driver.load(context, driver_functions, code, names)
        except RuntimeError as error:
            raise KernelUnavailable(f"the kernels compiled for {target} could not be loaded: {error}") from error
        return Device(architecture, target, launcher, context, functions)

    def _launch(
        self, name: str, grid: tuple[int, int, int], tensors: tuple[torch.Tensor, ...], numbers: tuple[int, ...]
    ) -> None:
        """Queues a kernel on the current stream of the tensors' device; the last of the tensors is the scale."""
        index = tensors[0].get_device()
        device = self._devices[index]
        params = [
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            ctypes.c_uint(_SCALE_KINDS[tensors[-1].dtype]),
            *map(ctypes.c_uint, numbers),
        ]
        stream = self._stream(index)
        self._driver.push(device.context)  # another device, or none in a new thread, may be the current one
        try:
            device.functions[name](grid, (THREADS, 1, 1), 0, stream, params)
        finally:
            self._driver.pop()


def kernel_names(architecture: int) -> list[str]:
    """All kernels of kernels.cu that exist for an architecture."""
    tensor_core = ("f16", "bf16") if architecture >= 80 else ("f16",)
    return [
        name
        for bits in (4, 8)
        for name in (
            *(f"dequantize_int{bits}_{dtype}" for dtype in _DTYPES.values()),
            *(f"rows_int{bits}_{dtype}_{count}" for dtype in tensor_core for count in TENSOR_CORE_ROWS),
            *(f"rows_int{bits}_f32_{count}" for count in _FLOAT_ROWS),
        )
    ]


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)


_loading = threading.Lock()


def load() -> CUDABackend:
    """The backend, its kernels compiled and loaded for the current device; always the same object.

    Raises:
        KernelUnavailable: torch, the machine or its compilers do not support it.
    """
    with _loading:
        return load_once()


@functools.cache
def load_once() -> CUDABackend:
    """As `load`, which is what callers use: this one does not wait for another thread that loads."""
    if torch.version.hip:
        raise KernelUnavailable("our GPU kernels are for NVIDIA GPUs, this torch is for AMD's")
    if torch.version.cuda is None:
        raise KernelUnavailable("this torch is built without CUDA (see https://pytorch.org for a build with CUDA)")
    if not torch.cuda.is_available():
        raise KernelUnavailable("torch finds no NVIDIA GPU (`nvidia-smi` shows whether the driver does)")
    backend = CUDABackend(Driver.open(), find_compiler())
    backend.prepare(torch.cuda.current_device())
    return backend
