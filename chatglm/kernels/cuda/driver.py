"""Loads machine code onto GPUs and launches it: through cpm_kernels if that works, else through the driver alone.

Both ways have the interface of cpm_kernels: a module made from code, and a function of a module, which is called with
grid, block, bytes of shared memory, stream and a list of ctypes values.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import KernelUnavailable

Size = tuple[int, int, int]
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Function(Protocol):
    """A kernel on one device, whose context is current when it is called."""

    def __call__(self, grid: Size, block: Size, shared_bytes: int, stream: int, params: Sequence[Any]) -> None: ...


#: (driver, machine code, names of kernels) -> the kernels, loaded into the current context
Loader = Callable[["Driver", bytes, Sequence[str]], "dict[str, Function]"]


class Driver:
    """The few functions of libcuda that launching needs.

    Args:
        library: libcuda, or anything with its interface.

    Raises:
        KernelUnavailable: the driver does not start.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        # Without these, ctypes would pass handles and sizes as 32-bit ints.
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        library.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
        library.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
        library.cuCtxPushCurrent_v2.argtypes = [pointer]
        library.cuCtxPopCurrent_v2.argtypes = [pointer]
        library.cuDevicePrimaryCtxRetain.argtypes = [pointer, ctypes.c_int]
        library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        try:
            self.call("cuInit", 0)
        except RuntimeError as error:
            raise KernelUnavailable(f"the CUDA driver does not start: {error}") from error

    @classmethod
    def open(cls) -> Driver:
        """The driver of this machine. Raises KernelUnavailable."""
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            return cls(ctypes.CDLL(name))
        except OSError as error:
            raise KernelUnavailable(f"the CUDA driver cannot be opened: {error}") from error

    def call(self, function: str, *arguments: object) -> None:
        """Calls a function of the driver. Raises RuntimeError with its error's text."""
        status = getattr(self._library, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'unknown error').decode()} (CUDA error {status})")

    def primary_context(self, device: int) -> ctypes.c_void_p:
        """The context that torch uses on device number `device`."""
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        return context

    def push(self, context: ctypes.c_void_p) -> None:
        """Makes `context` the current one of this thread, on top of any other."""
        self.call("cuCtxPushCurrent_v2", context)

    def pop(self) -> None:
        """Undoes the last `push`."""
        self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def current(self) -> int | None:
        """Address of this thread's current context."""
        context = ctypes.c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(context))
        return context.value

    def load(self, context: ctypes.c_void_p, loader: Loader, code: bytes, names: Sequence[str]) -> dict[str, Function]:
        """Loads the kernels `names` of `code` into a context; allowed while this thread captures a CUDA graph.

        All are loaded at once, so that none has to be loaded later.
        """
        mode = ctypes.c_int(_RELAXED)  # the mode in which loading, which allocates, does not break a capture
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            self.push(context)
            try:
                return loader(self, code, names)
            finally:
                self.pop()
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


class DriverModule:
    """Code loaded into the context that is current at its creation."""

    def __init__(self, driver: Driver, code: bytes) -> None:
        self.driver = driver
        self._module = ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(self._module), code)

    def get_module(self) -> ctypes.c_void_p:
        return self._module


class DriverFunction:
    """A kernel of a module."""

    def __init__(self, module: DriverModule, name: str) -> None:
        self._driver = module.driver
        self._function = ctypes.c_void_p()
        self._driver.call("cuModuleGetFunction", ctypes.byref(self._function), module.get_module(), name.encode())

    def __call__(self, grid: Size, block: Size, shared_bytes: int, stream: int, params: Sequence[Any]) -> None:
        addresses = (ctypes.c_void_p * len(params))(*map(ctypes.addressof, params))
        self._driver.call("cuLaunchKernel", self._function, *grid, *block, shared_bytes, stream, addresses, None)


def driver_functions(driver: Driver, code: bytes, names: Sequence[str]) -> dict[str, Function]:
    """A loader that needs nothing but the driver."""
    module = DriverModule(driver, code)
    return {name: DriverFunction(module, name) for name in names}


def cpm_kernels_functions(driver: Driver, code: bytes, names: Sequence[str]) -> dict[str, Function]:
    """A loader that goes through cpm_kernels, which is imported here and nowhere else.

    Raises:
        Exception: whatever it raises if it is not installed, needs a module that is gone (pkg_resources) or finds no
            CUDA: RuntimeError, ImportError, AttributeError and OSError have been seen. Also RuntimeError if its CUDA
            runtime uses another device than that of the current context.
    """
    context = driver.current()
    logger = logging.getLogger("cpm_kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every function that a newer CUDA no longer has
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pkg_resources says that it is deprecated
            base = importlib.import_module("cpm_kernels.kernels.base")
    finally:
        logger.setLevel(level)
    module = base.LazyKernelCModule(code)
    functions = {name: base.KernelFunction(module, name) for name in names}
    for function in functions.values():
        function._prepare_func()  # it would load on first use, perhaps in the middle of a CUDA graph
    if driver.current() != context:
        raise RuntimeError("cpm_kernels loaded the kernels onto another device")
    return functions
