"""The description of a decoder block: how a network describes its blocks, and its translation for the kernels."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from ..kernels.cpu import MAX_HEAD, TYPE_CODES, Block, Matrix
from ..quantization import QuantizedLinear


@dataclass(frozen=True)
class BlockLayout:
    """What all blocks of a network have in common, under the names of `kernels.cpu.Block`.

    Args:
        heads, kv_heads, head_dim: of the attention.
        query_step, key_start, value_start, key_step: where the heads are in the output of the fused projection, in
            elements: query head i at i * query_step, key head i at key_start + i * key_step, value head i at
            value_start + i * key_step.
        distance: between the two dims that are rotated as a pair.
        norm: the class of the norms: RMSNorm (which has only a weight) or nn.LayerNorm.
        gated: whether the MLP is SwiGLU; else GELU.
        residual_normed: whether the residual connection starts from the normalised input; else from the input.
        residual_scale: factor on the residual.
    """

    heads: int
    kv_heads: int
    head_dim: int
    query_step: int
    key_start: int
    value_start: int
    key_step: int
    distance: int
    norm: type[nn.Module]
    gated: bool
    residual_normed: bool = False
    residual_scale: float = 1.0


@dataclass  # not frozen: that takes three times as long to create, and every token needs one per block
class BlockParts:
    """The modules of one block by their roles.

    Args:
        input_norm, post_attention_norm: the norms before attention and before the MLP.
        fused: the projection to query, key and value; dense: the one after attention.
        up, down: the two projections of the MLP.
        attention, mlp: the modules that hold these; they have no parameters of their own, but may have hooks or a
            replaced forward.
    """

    input_norm: nn.Module
    post_attention_norm: nn.Module
    fused: nn.Module
    dense: nn.Module
    up: nn.Module
    down: nn.Module
    attention: nn.Module
    mlp: nn.Module

    @property
    def norms(self) -> tuple[Any, Any]:
        return self.input_norm, self.post_attention_norm

    @property
    def matrices(self) -> dict[str, Any]:
        """The projections by their names in `kernels.cpu.Block`."""
        return {"fused": self.fused, "dense": self.dense, "up": self.up, "down": self.down}


#: The fields that a layout and a `Block` share.
_COMMON = tuple(field.name for field in dataclasses.fields(BlockLayout) if field.name != "norm")


class BlockPlanner:
    """Turns the blocks of a network into `Block`s for the kernels; repeats the work only when they change."""

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self._signature: list[Any] = []
        self._plan: ctypes.Array[Block] | None = None
        self._dense_types: set[torch.dtype] = set()

    def plan(self, blocks: Iterable[Any]) -> ctypes.Array[Block] | None:
        """The blocks as the kernels take them, without prefix and cache; None if the modules have to run instead.

        Args:
            blocks: modules with `parts()`, their `BlockParts`
        """
        signature: list[Any] = [Block]  # another class after a notebook's %autoreload, which the kernels refuse
        every = []
        for block in blocks:
            parts = block.parts()
            every.append(parts)
            for module in (*vars(parts).values(), block):
                hooks = module._forward_hooks
                if module.training or module._forward_pre_hooks or (hooks and _are_needed(hooks)):
                    return None
                if "forward" in module.__dict__:  # accelerate and others put theirs there
                    return None
                if type(module) is QuantizedLinear:
                    signature.append((module.bits, module.precision))
                for tensor in module._parameters.values():
                    if tensor is not None:
                        signature.append((tensor.data_ptr(), tensor.dtype, type(tensor)))
        if signature != self._signature:
            self._signature, self._plan = signature, self._make(every)
        return None if self._plan is None else type(self._plan).from_buffer_copy(self._plan)

    @property
    def dense_types(self) -> set[torch.dtype]:
        """The types of the matrices of the last plan that are not quantised."""
        return self._dense_types

    def _make(self, every: list[BlockParts]) -> ctypes.Array[Block] | None:
        layout = self.layout
        if layout.head_dim > MAX_HEAD:
            return None
        plan = (Block * len(every))()
        matrices = [one for parts in every for one in parts.matrices.values()]
        self._dense_types = {one.weight.dtype for one in matrices if type(one) is nn.Linear}
        for block, parts in zip(plan, every, strict=True):
            if not _are_plain(parts, layout):
                return None
            for name in _COMMON:
                setattr(block, name, getattr(layout, name))
            block.rms = layout.norm is not nn.LayerNorm
            block.scaling = layout.head_dim**-0.5
            for i, norm in enumerate(parts.norms):
                block.norm_weight[i] = norm.weight.data_ptr()
                block.norm_bias[i] = norm.bias.data_ptr() if getattr(norm, "bias", None) is not None else None
            first = parts.norms[0]
            block.hidden, block.norm_type, block.eps = first.weight.numel(), TYPE_CODES[first.weight.dtype], first.eps
            for name, one in parts.matrices.items():
                setattr(block, name, _matrix(one))
        return plan


def _are_plain(parts: BlockParts, layout: BlockLayout) -> bool:
    """Whether the kernels support the modules: their classes are known, and their tensors are in CPU memory."""
    matrices = parts.matrices.values()
    if not all(type(one) is layout.norm for one in parts.norms):
        return False
    if not all(type(one) is QuantizedLinear or _is_of_floats(one) for one in matrices):
        return False
    tensors = [one for part in (*parts.norms, *matrices) for one in part._parameters.values() if one is not None]
    return all(
        one.device.type == "cpu" and one.is_contiguous() and (one.dtype in TYPE_CODES or one.dtype == torch.int8)
        for one in tensors
    )


def _is_of_floats(module: nn.Module) -> bool:
    """Whether this is a plain linear layer, whose weight is no other library's kind of tensor."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.dtype in TYPE_CODES


def _matrix(module: Any) -> Matrix:
    if type(module) is QuantizedLinear:
        return Matrix.of(module.weight, module.weight_scale, module.bias, module.bits, module.precision)
    return Matrix.of_floats(module.weight, module.bias)


def _are_needed(hooks: Mapping[int, Any]) -> bool:
    """Whether any of these hooks has to be called: those that transformers leaves behind record only on request."""
    plain = any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks.values())
    return plain or bool(output_capturing._active_collector.get())
