"""Layers and functions that several networks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467, computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(hidden_states.dtype)


def make_norm(config: Any) -> nn.Module:
    """The kind of norm that a config of generation 2 or later asks for."""
    norm = RMSNorm if config.rmsnorm else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


class Embedding(nn.Module):
    """The embeddings one level deeper, as the checkpoints of generations 2 and later name them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)


def eager_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain torch, as transformers calls it; returns (batch, tokens, heads, head_dim) and the weights.

    Args:
        module: has `num_key_value_groups` (query heads per key/value head) and `training`.
        query: (batch, heads, tokens, head_dim)
        key, value: (batch, key/value heads, keys, head_dim)
        attention_mask: added to the scores.
    """
    groups = module.num_key_value_groups
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs in the first dims of each head.

    Args:
        states: (batch, heads, tokens, head_dim)
        cos, sin: (batch, 1, tokens, rotated dims / 2)
    """
    rotated_dims = 2 * cos.shape[-1]
    even, odd = states[..., 0:rotated_dims:2], states[..., 1:rotated_dims:2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, states[..., rotated_dims:]), dim=-1)
