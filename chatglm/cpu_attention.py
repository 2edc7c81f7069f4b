"""Attention of a prompt on a CPU, through our kernels: torch's own takes more than twice as long there."""

from __future__ import annotations

import torch

from . import kernels
from .kernels.cpu import DTYPES, Attention


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    causal: bool,
) -> torch.Tensor | None:
    """Attention in fp32 of several tokens of one sequence; None where it is left to torch.

    Args:
        query: (1, heads, tokens, head_dim)
        key, value: (1, kv_heads, keys, head_dim)
        mask: (1, 1, tokens, keys), boolean (True = visible) or additive
        causal: whether the tokens, which are the last ones, see what came before if there is no mask; else all.

    Returns:
        (1, tokens, heads * head_dim)
    """
    batch, heads, tokens, size = query.shape
    if (
        batch != 1
        or tokens == 1
        or query.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(query) is not torch.Tensor
        or query.dtype not in DTYPES
        or not query.dtype == key.dtype == value.dtype
        or size % Attention.MULTIPLE
        or (mask is None and not causal)
        or (mask is not None and mask.shape != (1, 1, tokens, key.shape[2]))
    ):
        return None
    run = getattr(kernels.backend_for(query.device), "attention", None)
    if run is None:
        return None
    if mask is not None:
        mask = mask[0, 0]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        mask = mask.to(query.dtype).contiguous()
    key, value = (part[0] if part[0, 0].is_contiguous() else part[0].contiguous() for part in (key, value))
    context: torch.Tensor = run(query[0].contiguous(), key, value, mask, scaling)
    return context.view(1, tokens, heads * size)
