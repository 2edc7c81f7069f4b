"""Decoding with a quantised model on a CPU: one token through all blocks in one call of the kernels.

A token needs some fifty small operations a block besides the four products, and on a CPU they take a good part of the
time. What is not the plain case (several tokens, gradients, hooks, adapters, masks, another device) goes through the
modules as ever; the results are equal up to rounding, of which there is less here: all between the blocks is float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from . import kernels
from .cache import GrowingLayer
from .kernels.cpu import DTYPES, Block, Matrix, Token
from .quantization import QuantizedLinear


@dataclass(frozen=True)
class BlockLayout:
    """What the kernels have to know of a network's blocks.

    Args:
        heads, kv_heads, head_dim: of the attention.
        query_step, key_start, value_start, key_step: where the heads are in the result of the fused projection, in
            numbers: query head i at i * query_step, key head i at key_start + i * key_step, value heads alike.
        distance: how far apart the two dims are that a rotation turns.
        norm: the class of the norms, one with a weight only (RMSNorm) or nn.LayerNorm.
        gated: SwiGLU, else GELU.
        residual_normed: the residual stream goes on from the normalised input, else from the input;
        residual_scale: what it is multiplied with then.
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


class BlockRunner:
    """Runs the blocks of a network, each with `parts()`: its norms, its matrices, and what else a hook could be on."""

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self._plan: tuple[list[Any], ctypes.Array[Block] | None] = ([], None)

    def __reduce__(self) -> tuple[Any, ...]:  # addresses mean nothing in a copy
        return BlockRunner, (self._layout,)

    def __call__(
        self,
        blocks: Iterable[Any],
        hidden_states: torch.Tensor,
        rotary: Sequence[tuple[torch.Tensor, torch.Tensor]],
        cache: Cache | None,
    ) -> torch.Tensor | None:
        """What the blocks make of one token, which is in the cache then; None: it has to go through the modules.

        The caller has made sure that the token sees all that is cached and no prefix, and that attention is torch's.

        Args:
            hidden_states: (1, 1, hidden), else the result is None
            rotary: one or two tables of (cos, sin), each (1, 1, angles)
        """
        if (
            cache is None
            or type(hidden_states) is not torch.Tensor
            or hidden_states.numel() != hidden_states.shape[-1]
            or hidden_states.device.type != "cpu"
            or hidden_states.dtype not in DTYPES
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        run = getattr(kernels.backend_for(hidden_states.device), "run_blocks", None)
        plan = self._planned(blocks) if run is not None else None
        room = [] if plan is None else _room(cache, len(plan), rotary[0][0].dtype)
        if run is None or plan is None or not room:
            return None
        for block, (keys, values) in zip(plan, room, strict=True):
            block.past = keys.shape[2] - 1
            block.keys, block.values = keys.data_ptr(), values.data_ptr()
            block.cache_step, block.cache_type = keys.stride(1), DTYPES[keys.dtype]
        hidden_states = hidden_states.contiguous()
        result = torch.empty_like(hidden_states)
        token = Token(x=hidden_states.data_ptr(), y=result.data_ptr(), type=DTYPES[result.dtype], turns=len(rotary))
        for i, (cos, sin) in enumerate(rotary):
            token.cos[i], token.sin[i] = cos.data_ptr(), sin.data_ptr()
            token.angles, token.angle_step, token.angle_type = cos.shape[-1], cos.stride(-1), DTYPES[cos.dtype]
        run(token, plan)
        return result

    def _planned(self, blocks: Iterable[Any]) -> ctypes.Array[Block] | None:
        """The blocks as the kernels take them, but for the cache; None if a module is not what it was made as."""
        signature: list[Any] = []
        every = []
        for block in blocks:
            parts = (*block.parts(), block)
            every.append(parts)
            for module in parts:
                if module.training or module._forward_hooks or module._forward_pre_hooks:
                    return None
                if "forward" in module.__dict__:  # accelerate and others put theirs there
                    return None
                if type(module) is QuantizedLinear:
                    signature.append((module.bits, module.precision))
                for tensor in module._parameters.values():
                    if tensor is not None:
                        signature.append((tensor.data_ptr(), tensor.dtype))
        if signature != self._plan[0]:
            self._plan = (signature, self._make_plan(every))
        plan = self._plan[1]
        return None if plan is None else type(plan).from_buffer_copy(plan)

    def _make_plan(self, every: list[tuple[Any, ...]]) -> ctypes.Array[Block] | None:
        plan = (Block * len(every))()
        layout = self._layout
        for block, parts in zip(plan, every, strict=True):
            norms, matrices = parts[:2], parts[2:6]
            if not all(type(one) is layout.norm for one in norms):
                return None
            if not all(type(one) is QuantizedLinear for one in matrices) or layout.head_dim > Block.MAX_HEAD:
                return None
            tensors = [one for part in (*norms, *matrices) for one in part._parameters.values() if one is not None]
            if not all(one.device.type == "cpu" and one.is_contiguous() for one in tensors):
                return None
            if not all(one.dtype in DTYPES or one.dtype == torch.int8 for one in tensors):
                return None
            for name in ("heads", "kv_heads", "head_dim", "query_step", "key_start", "value_start", "key_step"):
                setattr(block, name, getattr(layout, name))
            block.distance, block.gated, block.rms = layout.distance, layout.gated, layout.norm is not nn.LayerNorm
            block.residual_normed, block.residual_scale = layout.residual_normed, layout.residual_scale
            block.scaling = layout.head_dim**-0.5
            for i, norm in enumerate(norms):
                block.norm_weight[i] = norm.weight.data_ptr()
                block.norm_bias[i] = norm.bias.data_ptr() if getattr(norm, "bias", None) is not None else None
            first = norms[0]
            block.hidden, block.norm_type, block.eps = first.weight.numel(), DTYPES[first.weight.dtype], first.eps
            block.fused, block.dense, block.up, block.down = (
                Matrix.of(one.weight, one.weight_scale, one.bias, one.bits, one.precision) for one in matrices
            )
        return plan


def _room(cache: Cache, count: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values of each layer, of one sequence, with room for a token at their end; else nothing.

    Returns:
        `count` pairs, each part (1, heads, past + 1, head_dim) with the tokens of a head next to each other
    """
    own = getattr(cache, "room_for_token", None)
    if own is None and (cache.offloading or not _are_plain(cache.layers)):
        return []
    held = own() if own is not None else [(layer.keys, layer.values) for layer in cache.layers]
    if len(held) != count:
        return []
    if not all(keys.shape[0] == 1 and keys.dtype == dtype and keys.device.type == "cpu" for keys, _ in held):
        return []
    return held if own is not None else [_extended(layer) for layer in cache.layers]


def _are_plain(layers: Sequence[Any]) -> bool:
    """Whether a token can be appended to these layers of a cache, which hold equally many."""
    if not layers or not all(type(layer) in (DynamicLayer, GrowingLayer) for layer in layers):
        return False
    length = layers[0].get_seq_length()
    return length > 0 and all(layer.get_seq_length() == length for layer in layers)


def _extended(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes keys and values one token longer, its numbers yet to come."""
    if isinstance(layer, GrowingLayer):
        layer.extend(1)
    else:
        layer.keys, layer.values = (F.pad(part, (0, 0, 0, 1)) for part in (layer.keys, layer.values))
    return layer.keys, layer.values
