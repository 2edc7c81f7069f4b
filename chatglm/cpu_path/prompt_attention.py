"""Attention of a prompt on a CPU, through our kernels: torch's own takes more than twice as long."""

from __future__ import annotations

from typing import Any

import torch

from .. import kernels
from ..kernels.cpu import HEAD_MULTIPLE, TYPE_CODES
from ..quantization import QuantizedLinear


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """`attention` for a prompt of a quantised network; None if it is left to torch.

    Args:
        module: the attention module, with `config`, `query_key_value` (the projection that made query, key and value),
            `is_causal` and `scaling`
        query, key, value, mask: see `attention`
    """
    if module.config._attn_implementation != "sdpa" or type(module.query_key_value) is not QuantizedLinear:
        return None
    return attention(query, key, value, mask, module.scaling, causal=module.is_causal)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    causal: bool,
) -> torch.Tensor | None:
    """Attention in fp32 of several tokens of one sequence; None if the kernels do not support the case.

    Args:
        query: (1, heads, tokens, head_dim)
        key, value: (1, kv_heads, keys, head_dim)
        mask: (1, 1, tokens, keys), boolean (True = visible) or additive
        causal: without a mask, whether each token sees only earlier keys (the tokens are the last ones) or all

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
        or query.dtype not in TYPE_CODES
        or not query.dtype == key.dtype == value.dtype
        or size % HEAD_MULTIPLE
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
