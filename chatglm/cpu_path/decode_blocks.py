"""Decoding on a CPU: runs single tokens (the next of each sequence, and a piece of another's prompt beside them), or a
few of one sequence (guesses, short pieces of a prompt), through all blocks in one kernel call.

Besides its four products, a block needs about fifty small operations per token, which take a good part of the time on a
CPU. Everything but the plain case (many tokens, gradients, hooks, LoRA, masks, another device) goes through the
modules. The results are equal up to rounding: this path rounds less, as it keeps float32 between and inside the blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from .. import kernels
from ..cache import ChatGLMCache, TokenRoom
from ..cache.int8 import encode
from ..kernels.cpu import SCALED_INT8, TYPE_CODES, Tokens
from .block_plan import BlockLayout, BlockPlanner

#: Keys and values of each layer.
Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
#: Tokens of one sequence up to which one call is used: each of them reads the cache on its own.
FEW_TOKENS = 16


class BlockRunner:
    """Runs the blocks of a network: in one call of the kernels if possible, else one module after the other."""

    def __init__(self, layout: BlockLayout) -> None:
        self._planner = BlockPlanner(layout)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has other tensors: only the layout holds for it
        return BlockRunner, (self._planner.layout,)

    def __call__(
        self,
        blocks: Iterable[Any],
        hidden_states: torch.Tensor,
        prefix: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
        tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
        plain: bool,
        *,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs the tokens through the blocks and adds them to the cache.

        Args:
            blocks: modules with `parts()`, their `BlockParts`
            hidden_states: (batch, tokens, hidden)
            prefix: keys and values of every block's prefix, or None
            tables: one or two of (cos, sin), each (batch or 1, tokens, angles)
            plain: whether every token sees all earlier tokens of its sequence and no later one, and attention is
                torch's
            past_key_values, kwargs: for the modules

        Returns:
            (batch, tokens, hidden)
        """
        done = self._in_one_call(blocks, hidden_states, prefix, tables, past_key_values) if plain else None
        if done is not None:
            return done
        for block, (key, value) in zip(blocks, prefix, strict=True):
            hidden_states = block(hidden_states, key, value, past_key_values, **kwargs)
        return hidden_states

    def most_rows(self, blocks: Iterable[Any], device: torch.device) -> int:
        """The most tokens that one call runs; 0 if the modules have to run."""
        if device.type != "cpu":
            return 0
        backend: Any = kernels.ready_backend_for(device)
        if not hasattr(backend, "block_rows") or self._planner.plan(blocks) is None:
            return 0
        return self._most_of(backend)

    def _most_of(self, backend: Any) -> int:
        """The most rows of one call for the blocks that were planned last."""
        dense = [backend.dense_rows(dtype, answers=True) for dtype in self._planner.dense_types]
        return int(min(backend.block_rows, *dense)) if dense else int(backend.block_rows)

    def _in_one_call(
        self,
        blocks: Iterable[Any],
        hidden_states: torch.Tensor,
        prefix: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
        tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
        cache: Cache | None,
    ) -> torch.Tensor | None:
        """As `__call__`; None if the modules have to run instead."""
        if (
            cache is None
            or type(hidden_states) is not torch.Tensor
            or not _is_small(hidden_states)
            or hidden_states.device.type != "cpu"
            or hidden_states.dtype not in TYPE_CODES
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        sequences, count = hidden_states.shape[:2]
        rows, dtype = sequences * count, tables[0][0].dtype
        backend: Any = kernels.ready_backend_for(hidden_states.device)
        if not 0 < rows <= getattr(backend, "block_rows", 0):
            return None
        plan = self._planner.plan(blocks)
        if rows > self._most_of(backend):
            return None
        found = None if plan is None else _prefix_of(prefix, dtype)
        room = None if plan is None or found is None else _room(cache, sequences, count, len(plan), dtype)
        if plan is None or found is None or room is None:
            return None
        fronts = _fronts(found, room.shared, rows)
        for block, (keys, values) in zip(plan, room.layers, strict=True):
            block.keys, block.values, block.cache_type = keys.data_ptr(), values.data_ptr(), _type_of(keys)
            block.cache_row, block.cache_step = keys.stride(0), keys.stride(1)
        some = next((front for front in fronts if front), None)
        for layer, block in enumerate(plan):
            block.prefix_type = TYPE_CODES[dtype] if some is None else _type_of(some[layer][0])
            if some is not None:
                block.prefix_keys = _addresses(front[layer][0] if front else None for front in fronts)
                block.prefix_values = _addresses(front[layer][1] if front else None for front in fronts)
        hidden_states = hidden_states.contiguous()
        result = torch.empty_like(hidden_states)
        tokens = Tokens(x=hidden_states.data_ptr(), y=result.data_ptr(), type=TYPE_CODES[result.dtype], rows=rows)
        # Tokens of one sequence are rows with the same line of the cache, each with one more past token.
        past = room.lengths if count == 1 else range(room.lengths[0], room.lengths[0] + count)
        tokens.past = (ctypes.c_int64 * rows)(*past)
        tokens.lines = (ctypes.c_int64 * rows)(*room.lines if count == 1 else [room.lines[0]] * count)
        tokens.prefix = (ctypes.c_int64 * rows)(*(front[0][0].shape[1] if front else 0 for front in fronts))
        tokens.turns = len(tables)
        for i, (cos, sin) in enumerate(tables):
            tokens.cos[i], tokens.sin[i] = cos.data_ptr(), sin.data_ptr()
            tokens.angles, tokens.angle_type = cos.shape[-1], TYPE_CODES[cos.dtype]
            row_dim = 0 if count == 1 else 1
            tokens.angle_row, tokens.angle_step = cos.stride(row_dim) if cos.shape[row_dim] > 1 else 0, cos.stride(-1)
        backend.run_blocks(tokens, plan)
        room.commit()
        return result


def sees_all(given: torch.Tensor | None, mask: torch.Tensor | None, cache: Cache | None) -> bool:
    """Whether each token sees all cached tokens of its sequence.

    Args:
        given: the mask of the caller
        mask: the mask that was made from it; None: nothing is hidden
        cache: if it has a mask of its own, that hides only what lies beyond the end of a sequence
    """
    return mask is None or (given is not None and given is getattr(cache, "mask", None))


def _prefix_of(
    prefix: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Keys and values (heads, prefix, head_dim) of each layer, contiguous; empty without a prefix; None if unusable."""
    found = [(key[0], value[0]) for key, value in prefix if key is not None and value is not None]
    if not all(part.dtype == dtype and part.device.type == "cpu" for pair in found for part in pair):
        return None
    return [(key.contiguous(), value.contiguous()) for key, value in found]


def _fronts(prefix: Layers, shared: Sequence[Layers], rows: int) -> list[Layers]:
    """What each row sees before its place in the cache, the prefix first: keys and values (heads, tokens, head_dim) of
    each layer, or nothing."""
    first = next((layers for layers in shared if layers), None)
    if first is None:
        return [prefix] * rows
    if prefix:
        if first[0][0].dtype == torch.int8:
            prefix = [(encode(key), encode(value)) for key, value in prefix]
        joined = {id(layers): _joined(prefix, layers) for layers in shared}
        shared = [joined[id(layers)] for layers in shared]
    return [*shared] * (rows // len(shared))  # the tokens of one sequence are rows with the same front


def _joined(prefix: Layers, behind: Layers) -> Layers:
    if not behind:
        return prefix
    pairs = zip(prefix, behind, strict=True)
    return [(torch.cat((a[0], b[0]), dim=1), torch.cat((a[1], b[1]), dim=1)) for a, b in pairs]


def _addresses(parts: Iterable[torch.Tensor | None]) -> Any:
    """An array for the kernels with the address of each part, or NULL."""
    found = [None if part is None else part.data_ptr() for part in parts]
    return (ctypes.c_void_p * len(found))(*found)


def _type_of(held: torch.Tensor) -> int:
    """The code of what a cache holds."""
    return SCALED_INT8 if held.dtype == torch.int8 else TYPE_CODES[held.dtype]


def _is_small(hidden_states: torch.Tensor) -> bool:
    """Whether these are single tokens, each at a place of its own, or a few of one sequence."""
    sequences, count = hidden_states.shape[:2]
    return count == 1 or (sequences == 1 and count <= FEW_TOKENS)


def _room(cache: Cache, rows: int, tokens: int, count: int, dtype: torch.dtype) -> TokenRoom | None:
    """Room for `tokens` more in `count` layers of `rows` sequences, on the CPU, in `dtype` or int8; None if there is
    none."""

    def fits(held: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        types = (dtype, torch.int8)
        usable = (keys.dtype in types and keys.device.type == "cpu" for keys, _ in held)
        return len(held) == count and all(usable)

    if isinstance(cache, ChatGLMCache):
        room = cache.room_for_tokens(tokens)
        if room is None or (tokens > 1 and room.lengths[0] == 0 and not room.shared):
            return None  # a prompt begins: read as longer ones are
        return room if len(room.lengths) == rows and fits(room.layers) else None
    length = cache.get_seq_length()
    if cache.offloading or length == 0 or tokens > 1:
        return None
    if not all(type(layer) is DynamicLayer and layer.get_seq_length() == length for layer in cache.layers):
        return None
    held = [(layer.keys, layer.values) for layer in cache.layers]
    if any(len(keys) != rows for keys, _ in held) or not fits(held):
        return None
    for layer in cache.layers:  # one after the other: never twice the memory
        layer.keys, layer.values = (F.pad(part, (0, 0, 0, 1)) for part in (layer.keys, layer.values))
    held = [(layer.keys, layer.values) for layer in cache.layers]
    return TokenRoom([length] * rows, held, range(rows), commit=lambda: None)
