"""P-tuning v2: a trained prefix of keys and values in front of every layer (https://arxiv.org/abs/2110.07602)."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import nn
from transformers import initialization

from ..cache.int8 import decode, encode

#: One layer's prefix: keys and values, each (batch, key/value heads, prefix, head_dim).
LayerPrefix = tuple[torch.Tensor, torch.Tensor]


class PrefixEmbedding(nn.Embedding):
    """Initialised as in torch and the originals, whose learning rates are tuned for that."""

    def reset(self) -> None:
        """Draws fresh weights, unless they were just loaded."""
        initialization.normal_(self.weight)


class PrefixLinear(nn.Linear):
    """Initialised as in torch, like `PrefixEmbedding`."""

    def reset(self) -> None:
        """Draws fresh weights, unless they were just loaded."""
        bound = self.in_features**-0.5
        initialization.uniform_(self.weight, -bound, bound)
        initialization.uniform_(self.bias, -bound, bound)


class PrefixEncoder(nn.Module):
    """Makes the keys and values of all layers from a table of `pre_seq_len` rows, or a table and a small MLP.

    Parameter names are those of the published prefix checkpoints (`embedding.weight`, `trans.0.*`, `trans.2.*`).
    The prefix carries no rotary position: the tokens after it start at position 0.

    Args:
        pre_seq_len: number of prefix positions.
        num_layers, num_heads, head_dim: shape of the keys and values of the network.
        embedding_size: width of the table with projection (the key/value width itself without).
        projection_size: hidden width of the MLP, or None for no projection.
        dropout: applied to the finished prefix while training (0.1 in the originals).
    """

    def __init__(
        self,
        pre_seq_len: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        embedding_size: int,
        projection_size: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pre_seq_len, self.num_layers, self.num_heads, self.head_dim = pre_seq_len, num_layers, num_heads, head_dim
        kv_size = num_layers * 2 * num_heads * head_dim
        self.trans: nn.Sequential | None = None
        if projection_size is None:
            self.embedding = PrefixEmbedding(pre_seq_len, kv_size)
        else:
            self.embedding = PrefixEmbedding(pre_seq_len, embedding_size)
            self.trans = nn.Sequential(
                PrefixLinear(embedding_size, projection_size), nn.Tanh(), PrefixLinear(projection_size, kv_size)
            )
        self.dropout = nn.Dropout(dropout)
        # Casting or projecting the table takes as long as several layers: without gradients the result is kept.
        self._kept: tuple[list[tuple[nn.Parameter, torch.Tensor, int]], torch.Tensor, bool] | None = None
        #: Fingerprint of the model that the prefix was trained on, see `chatglm.adapters.fingerprint`.
        self.base_fingerprint: str | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": None}

    def train(self, mode: bool = True) -> PrefixEncoder:
        self._kept = None  # optimizers may write to .data, which changes no version counter
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PrefixEncoder:
        self._kept = None
        return super()._apply(fn, recurse)

    def _make(self, batch_size: int, dtype: torch.dtype, rounded: bool) -> torch.Tensor:
        """(layers * 2, batch, heads, prefix, head_dim)"""
        weight = self.embedding.weight
        table = (weight if self.trans is None else self.trans(weight)).to(dtype)
        table = table.view(1, self.pre_seq_len, self.num_layers * 2, self.num_heads, self.head_dim)
        prefix = self.dropout(table.expand(batch_size, -1, -1, -1, -1)).permute(2, 0, 3, 1, 4)
        return decode(encode(prefix), dtype) if rounded else prefix

    def _finished(self, dtype: torch.dtype, rounded: bool) -> torch.Tensor:
        """`_make` for one sequence, contiguous; the last result if nothing has changed since."""
        parameters = list(self.parameters())
        if any(type(one) is not nn.Parameter or one.is_inference() for one in parameters):
            return self._make(1, dtype, rounded)
        kept = self._kept
        # Assigning to .data changes the address, not the version counter. The old tensors are kept alive, so that
        # nothing else can take their address.
        if (
            kept is not None
            and (kept[1].dtype, kept[2]) == (dtype, rounded)
            and len(kept[0]) == len(parameters)
            and all(
                one is old and one._version == version and one.data_ptr() == numbers.data_ptr()
                for one, (old, numbers, version) in zip(parameters, kept[0], strict=True)
            )
        ):
            return kept[1]
        self._kept = None  # frees its memory for the new one
        state = [(one, one.detach(), one._version) for one in parameters]
        finished = self._make(1, dtype, rounded).contiguous()
        self._kept = (state, finished, rounded)
        return finished

    @overload
    def forward(self, batch_size: int, dtype: torch.dtype, rounded: bool = False) -> list[LayerPrefix]: ...

    @overload
    def forward(self, batch_size: torch.Tensor) -> torch.Tensor: ...

    def forward(
        self, batch_size: int | torch.Tensor, dtype: torch.dtype | None = None, rounded: bool = False
    ) -> list[LayerPrefix] | torch.Tensor:
        """The prefix of every layer for `batch_size` sequences, in `dtype`; do not write to it.

        `rounded`: to what an int8 KV cache would hold of it. In front of such a cache, some ways of computing round it
        and others do not; so all give the same numbers.

        Called as in the originals, with ids (..., prefix) of positions of the prefix alone, gives its rows
        (..., prefix, layers * 2 * heads * head_dim).
        """
        if isinstance(batch_size, torch.Tensor):
            rows = self.embedding(batch_size)
            return rows if self.trans is None else self.trans(rows)
        if dtype is None:
            raise TypeError("give the dtype of the prefix, or ids as a tensor")
        autocast = torch.is_autocast_enabled(self.embedding.weight.device.type)
        if self.training or autocast or torch.is_grad_enabled() or torch.compiler.is_compiling():
            prefix = self._make(batch_size, dtype, rounded)
        else:
            prefix = self._finished(dtype, rounded).expand(-1, batch_size, -1, -1, -1)
        parts = prefix.unbind()
        return list(zip(parts[::2], parts[1::2], strict=True))


def make_prefix_visible(attention_mask: torch.Tensor | None, pre_seq_len: int) -> torch.Tensor | None:
    """Puts `pre_seq_len` visible columns in front of an attention mask.

    Takes a (batch, keys) mask of ones and zeros, or a (batch, heads, queries, keys) mask, boolean (True = visible)
    or additive.
    """
    if attention_mask is None:
        return None
    shape = (*attention_mask.shape[:-1], pre_seq_len)
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        visible = attention_mask.new_zeros(shape)
    else:
        visible = attention_mask.new_ones(shape)
    return torch.cat((visible, attention_mask), dim=-1)
