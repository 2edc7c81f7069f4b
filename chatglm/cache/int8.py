"""KV caches of scaled bytes: a key or a value of a head becomes bytes with one scale, half of what bfloat16 takes.

A row of such a cache is int8, (..., head_dim + SCALE_BYTES): the bytes of a key or value, then those of its float32
scale. So one tensor holds both, and whatever cuts, copies or reorders a cache does so with this one. The scale is
absmax / 127, as in https://arxiv.org/abs/2208.07339, section 2.1.
"""

from __future__ import annotations

import torch

from .growing import GrowingLayer

#: What `kv_cache_dtype` of a model may be; "auto" is the type of its activations.
KV_CACHE_DTYPES = ("auto", "int8")
#: Bytes of a scale, a float32.
SCALE_BYTES = 4
_LEVELS = 127


def check_kv_cache_dtype(name: object) -> None:
    """Raises ValueError for any value that is not in KV_CACHE_DTYPES."""
    if name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype {name!r}: use {' or '.join(map(repr, KV_CACHE_DTYPES))}")


def encode(states: torch.Tensor) -> torch.Tensor:
    """Keys or values (..., head_dim), of any floating type, as rows of an int8 cache (..., head_dim + SCALE_BYTES).

    Raises:
        ValueError: they are not on the CPU, need gradients, or head_dim is not a multiple of 4.
    """
    size = states.shape[-1]
    if states.device.type != "cpu":
        raise ValueError('kv_cache_dtype="int8" is for models on the CPU: set kv_cache_dtype to "auto"')
    if size % SCALE_BYTES:
        raise ValueError(f'kv_cache_dtype="int8" needs heads of a multiple of 4 dims, not {size}: use "auto"')
    if torch.is_grad_enabled() and states.requires_grad:
        raise ValueError("an int8 KV cache has no gradients: use torch.no_grad()")
    states = states.float()
    largest = states.abs().amax(-1, keepdim=True)
    rows = torch.empty((*states.shape[:-1], size + SCALE_BYTES), dtype=torch.int8)
    usable = largest.isfinite() & (largest > 1e-33)
    inverse = torch.where(usable, _LEVELS / largest, 0.0)
    scale = torch.where(usable, largest / _LEVELS, largest * 0)  # NaN, if one of the numbers is NaN or infinite
    rows[..., :size] = (states * inverse).round().nan_to_num()
    rows[..., size:] = scale.view(torch.int8)
    return rows


def decode(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rows of an int8 cache stand for, (..., head_dim) in `dtype`."""
    size = rows.shape[-1] - SCALE_BYTES
    states = torch.empty((*rows.shape[:-1], size), dtype=dtype)
    return torch.mul(rows[..., :size], scales_of(rows), out=states)


def scales_of(rows: torch.Tensor) -> torch.Tensor:
    """The scales of rows of an int8 cache, (..., 1): NaN where what was encoded had NaN or infinite numbers."""
    return rows[..., -SCALE_BYTES:].view(torch.float32)


class Int8Layer(GrowingLayer):
    """A growing layer that holds rows of bytes; each token, the newest too, sees what they stand for."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(encode(key_states), encode(value_states), *args, **kwargs)
        return decode(keys, key_states.dtype), decode(values, value_states.dtype)
