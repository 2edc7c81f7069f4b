"""Products with INT4 and INT8 weights: custom torch operators, and the choice of the backend that computes them.

The best backend that works is chosen once per device: our C code on the CPU, our CUDA code on NVIDIA GPUs, plain torch
everywhere else and wherever those cannot be used (one `KernelWarning` then says why). The environment variable
CHATGLM_KERNELS=torch selects plain torch. The operators work under autograd (gradient of the input and the bias; the
weights are frozen), torch.compile, torch.export and activation checkpointing.

A backend module has `load()`, which raises `KernelUnavailable` or returns an object with `linear(x, weight, scale,
bits, precision)`, `dequantize(weight, scale, bits, dtype)` and `describe()`; on the CPU also `dense(x, weight)`,
`dense_rows(dtype, answers)` and the methods that `chatglm.cpu_path` uses. They get contiguous tensors of one device,
rows >= 1, x in float16, bfloat16 or float32, scales in float16 or float32.

Precisions: "exact" is float32 arithmetic, and is used whenever a gradient is needed; "default" may round the
activations to about 14 bits (relative error 1e-4); "int8", the fastest, to 8 bits per group of 128 columns.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from . import reference
from .errors import KernelUnavailable, KernelWarning

__all__ = [
    "PRECISIONS",
    "Backend",
    "KernelUnavailable",
    "KernelWarning",
    "backend_for",
    "check_operands",
    "choose_again",
    "dense_linear",
    "dequantize",
    "linear",
    "ready_backend_for",
]

PRECISIONS = ("exact", "default", "int8")

_MODULES = {"cpu": "cpu", "cuda": "cuda"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Backend(Protocol):
    """What a backend module's `load()` returns."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, precision: str
    ) -> torch.Tensor: ...

    def dequantize(
        self, weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype
    ) -> torch.Tensor: ...

    def describe(self) -> dict[str, str]: ...


#: Kernels that were compiled before are there sooner than this.
LOADING_SECONDS = 2.0

_backends: dict[torch.device, Backend | None] = {}
_loaders: dict[torch.device, threading.Thread] = {}
_lock = threading.Lock()


def backend_for(device: torch.device) -> Backend | None:
    """Our kernels for `device`, or None for plain torch. Chosen once; one warning says why plain torch is used."""
    if device not in _backends:
        with _lock:
            if device not in _backends:
                _backends[device] = _find(device)
    return _backends[device]


def ready_backend_for(device: torch.device) -> Backend | None:
    """As `backend_for`, but None while a compiler builds the kernels: for what plain torch can do meanwhile."""
    if device not in _backends:
        loader = _loaders.get(device)
        if loader is None:
            loader = _loaders[device] = threading.Thread(target=backend_for, args=(device,), daemon=True)
            loader.start()
            loader.join(LOADING_SECONDS)
        if loader.is_alive():
            return None
    return backend_for(device)


def choose_again() -> None:
    """Forgets the choices, so that the next product chooses anew: after a change of CHATGLM_KERNELS, for example."""
    with _lock:
        _backends.clear()
        _loaders.clear()


def _find(device: torch.device) -> Backend | None:
    name = _MODULES.get(device.type)
    if name is None or os.environ.get("CHATGLM_KERNELS") == "torch":
        return None
    try:
        return load_backend(name)
    except KernelUnavailable as reason:
        _warn(device, reason)
        return None


def load_backend(name: str) -> Backend:
    """The backend `cpu` or `cuda`, whatever CHATGLM_KERNELS says. Raises KernelUnavailable."""
    try:
        return importlib.import_module(f".{name}", __name__).load()
    except ImportError as error:
        raise KernelUnavailable(f"{error}") from error


def _give_up(device: torch.device, reason: KernelUnavailable) -> None:
    """Changes to plain torch: a backend that loaded may still fail at its first product on this device."""
    with _lock:
        if _backends.get(device) is not None:
            _backends[device] = None
            _warn(device, reason)


def _warn(device: torch.device, reason: KernelUnavailable) -> None:
    warnings.warn(
        f"models run on plain torch on {device}, which is slow, above all if they are quantised: {reason}. "
        "`python -m chatglm.kernels` shows the details.",
        KernelWarning,
        stacklevel=2,
    )


# ---- the product with quantised weights ------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    precision: str = "default",
) -> torch.Tensor:
    """`x @ (q * scale).T + bias` in x's dtype (autocast's inside autocast).

    Args:
        x: (..., in)
        weight: int8 (out, in * bits / 8)
        weight_scale: (out,)
        bias: (out,) or None
        bits: 4 or 8
        precision: one of PRECISIONS; "exact" is used whenever a gradient is needed.

    Returns:
        (..., out)

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and x.requires_grad:
        precision = "exact"
    return _linear(x, weight, weight_scale, bias, bits, precision)


@torch.library.custom_op("chatglm::quantized_linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    precision: str,
) -> torch.Tensor:
    check_operands(x, weight, weight_scale, bits)
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == 0:
        return x.new_zeros(shape) if bias is None else bias.to(x.dtype).expand(shape).clone()
    rows = x.reshape(-1, x.shape[-1])
    out = None
    backend = backend_for(x.device) if x.dtype in _DTYPES else None
    if backend is not None:
        try:
            out = backend.linear(rows.contiguous(), weight.contiguous(), _scale(weight_scale), bits, precision)
        except KernelUnavailable as reason:
            _give_up(x.device, reason)
    if out is None:
        out = reference.linear(rows, weight, weight_scale, bits)
    if bias is not None:
        out += bias
    return out.view(shape)


def check_operands(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> None:
    """Raises ValueError unless the shapes and devices of `linear`'s operands fit together."""
    if weight.shape[1] * 8 != x.shape[-1] * bits:
        raise ValueError(
            f"the input has {x.shape[-1]} columns and the INT{bits} weights {weight.shape[1] * 8 // bits}: "
            "they do not match"
        )
    if not x.device == weight.device == weight_scale.device:
        raise ValueError(
            f"the input is on {x.device}, the weights on {weight.device} and their scales on {weight_scale.device}: "
            "move them to one device with .to(device)"
        )


def _scale(weight_scale: torch.Tensor) -> torch.Tensor:
    known = weight_scale.dtype in (torch.float16, torch.float32)
    return (weight_scale if known else weight_scale.float()).contiguous()


@_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    precision: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, weight_scale, bias, ctx.bits, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, weight_scale)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(weight, weight_scale, ctx.bits, grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


_linear.register_autograd(_linear_backward, setup_context=_linear_context)


# ---- the matrix itself -----------------------------------------------------------------------------------------------


def dequantize(weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The float matrix (out, in) of int8 weights (out, in * bits / 8) and scales (out,)."""
    return _dequantize(weight, weight_scale, bits, dtype)


@torch.library.custom_op("chatglm::dequantize", mutates_args=())
def _dequantize(weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    backend = backend_for(weight.device) if dtype in _DTYPES and weight.numel() else None
    if backend is not None:
        try:
            return backend.dequantize(weight.contiguous(), _scale(weight_scale), bits, dtype)
        except KernelUnavailable as reason:
            _give_up(weight.device, reason)
    return reference.dequantize(weight, weight_scale, bits, dtype)


@_dequantize.register_fake
def _(weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    return weight.new_empty((weight.shape[0], weight.shape[1] * 8 // bits), dtype=dtype)


# ---- the product with weights that are not quantised, for the output head --------------------------------------------


def dense_linear(x: torch.Tensor, weight: torch.Tensor, answers: bool = False) -> torch.Tensor:
    """`x @ weight.T`, through our CPU kernel for the few rows of a decoding step.

    Args:
        x: (..., in)
        weight: (out, in), of x's dtype
        answers: see `CPUBackend.dense_rows`

    Returns:
        (..., out)
    """
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or x.dtype != weight.dtype:
        return F.linear(x, weight)
    if torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight)
    return _dense_linear(x, weight, answers)


@torch.library.custom_op("chatglm::dense_linear", mutates_args=())
def _dense_linear(x: torch.Tensor, weight: torch.Tensor, answers: bool = False) -> torch.Tensor:
    backend: Any = ready_backend_for(x.device)
    if backend is None or not 0 < x.numel() <= backend.dense_rows(weight.dtype, answers) * x.shape[-1]:
        return F.linear(x, weight)
    out = backend.dense(x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous())
    return out.view(*x.shape[:-1], weight.shape[0])


@_dense_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, answers: bool = False) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dense_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _dense_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_dense_linear.register_autograd(_dense_backward, setup_context=_dense_context)
