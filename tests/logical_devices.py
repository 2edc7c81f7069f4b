"""Several GPUs on a machine without one: tensors that compute on the CPU and insist on their device like real ones.

Importing this gives torch an accelerator `logical` (permanently, so import it in a separate process). A tensor on
`logical:1` is a wrapper around a tensor in main memory; an operation on tensors of two devices fails as on real GPUs,
and so does one with main memory. Tests with it cover maps, hooks, masks, caches and results; speed, gradients and the
CUDA kernels need real GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "logical"
CPU = torch.device("cpu")
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class LogicalTensor(torch.Tensor):
    """A tensor that says it is on a GPU; `held` has the values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate recreates parameters by their class
            return torch.nn.Parameter(held, requires_grad=requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LogicalTensor({self.held!r}, device={self.device})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of a GPU to numpy")


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs one operation on the held tensors, after checking the devices."""
    inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    present = {one.device for one in inputs if one.device.type == KIND or one.dim()}
    asked = kwargs.get("device")
    if func not in MOVES and len(present) > 1:
        # As on real GPUs, indices may come from main memory.
        indices = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and inputs[0].is_cuda
        if not indices or len(present - {CPU}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {sorted(map(str, present))}")
    if asked is not None:
        target = torch.device(asked)
        target = torch.device(KIND, target.index or 0) if target.type == KIND else target
        kwargs = {**kwargs, "device": "cpu" if target.type == KIND else target}
    else:
        target = next((one.device for one in inputs if one.device.type == KIND), inputs[0].device if inputs else CPU)
    if func is torch.ops.aten.copy_.default:
        target = inputs[0].device
    known = {id(one.held): one for one in inputs if isinstance(one, LogicalTensor)}
    unwrap = lambda leaf: leaf.held if isinstance(leaf, LogicalTensor) else leaf  # noqa: E731
    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or target.type != KIND:
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else LogicalTensor(leaf, target)

    return tree_map(wrap, result)


class LogicalMode(TorchDispatchMode):
    """Catches the operations that make tensors: factories and moves from main memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def logical_gpus(monkeypatch: pytest.MonkeyPatch, free: list[int]) -> Iterator[None]:
    """One GPU for each entry of `free`, with that many free bytes."""
    with monkeypatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # dispatch modes belong to one thread
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: len(free))
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 1 << 40))
        with LogicalMode():
            yield


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    return LogicalTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), torch.device(device))


def copy_from(source: torch.Tensor, target: LogicalTensor, non_blocking: bool = False) -> torch.Tensor:
    target.held.copy_(source.held if isinstance(source, LogicalTensor) else source)
    return target


_setup_privateuseone_for_python_backend(KIND)
# torch.tensor(..., device=...) bypasses the mode.
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty_strided", empty_strided, "PrivateUse1")
_library.impl("_copy_from", copy_from, "PrivateUse1")
