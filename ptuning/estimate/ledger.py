"""Records every allocation of a rehearsed step."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatglm.kernels.reference import SLICE


class Ledger(TorchDispatchMode):
    """Follows every tensor from allocation to release, and keeps the sizes of all parts at the peak."""

    def __init__(self, vocab_size: int, shares: dict[str, float]) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._shares = shares  # the fraction of a part that one device holds
        self._entries: dict[int, tuple[str, int]] = {}
        self._live: Counter[str] = Counter()
        self._tag: str | None = "weights"
        self.peak = 0.0
        self.at_peak: dict[str, float] = {}

    def tag_as(self, tag: str) -> None:
        """Sets the part that new tensors belong to, except those that a backward pass makes."""
        self._tag = tag

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # the model reads positions and checks, but these tensors hold no values
        out = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        for tensor in made:
            self._enter(tensor)
        self.touch("buffers", _inside(func, args))
        return out

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return
        tag = self._tag or "weights"
        if tag == "activations":
            if tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size:
                tag = "logits"
            elif not torch.is_grad_enabled():  # backward, except where a checkpointed block is computed again
                tag = "buffers"
        self._entries[key] = (tag, storage.nbytes())
        weakref.finalize(storage, self._leave, key)
        self._live[tag] += storage.nbytes()
        self._look()

    def _leave(self, key: int) -> None:
        tag, size = self._entries.pop(key)
        self._live[tag] -= size

    def move(self, tensor: torch.Tensor, tag: str) -> None:
        """Moves a tensor to another part."""
        key = tensor.untyped_storage()._cdata
        if key in self._entries:
            old, size = self._entries[key]
            self._entries[key] = (tag, size)
            self._live[old] -= size
            self._live[tag] += size

    def watch_gradients(self, parameters: list[nn.Parameter]) -> list[Any]:
        def arrived(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.move(parameter.grad, "gradients")

        return [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]

    def touch(self, tag: str, size: int) -> None:
        """Counts memory that is allocated and freed at once."""
        if size:
            self._live[tag] += size
            self._look()
            self._live[tag] -= size

    def _look(self) -> None:
        total = sum(size * self._shares.get(tag, 1.0) for tag, size in self._live.items())
        if total > self.peak:
            self.peak = total
            self.at_peak = {tag: size * self._shares.get(tag, 1.0) for tag, size in self._live.items()}


def _inside(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator allocates internally: the blocks of a quantised matrix that a product dequantises."""
    if func is torch.ops.chatglm.quantized_linear.default:
        x, weight = args[0], args[1]
        numbers = min(SLICE, weight.shape[0] * x.shape[-1])
        return int(numbers * max(4, x.element_size()))
    return 0
