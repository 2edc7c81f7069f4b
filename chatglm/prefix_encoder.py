"""P-tuning v2: a trained prefix of keys and values in front of every layer (https://arxiv.org/abs/2110.07602)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization

#: One layer's prefix: keys and values, each (batch, key/value heads, prefix, head_dim).
LayerPrefix = tuple[torch.Tensor, torch.Tensor]


class PrefixEmbedding(nn.Embedding):
    """Starts as torch has it, which is how the originals' training starts: their learning rates are for it."""

    def reset(self) -> None:
        """Fresh numbers, unless they were just loaded."""
        initialization.normal_(self.weight)


class PrefixLinear(nn.Linear):
    """As `PrefixEmbedding`."""

    def reset(self) -> None:
        """Fresh numbers, unless they were just loaded."""
        bound = self.in_features**-0.5
        initialization.uniform_(self.weight, -bound, bound)
        initialization.uniform_(self.bias, -bound, bound)


class PrefixEncoder(nn.Module):
    """Makes the keys and values of all layers from a table of `pre_seq_len` rows, or a table and a small MLP.

    Parameter names are those of the published prefix checkpoints (`embedding.weight`, `trans.0.*`, `trans.2.*`).
    The prefix carries no rotary position: the tokens after it start at position 0.

    Args:
        pre_seq_len: prefix positions.
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
        # A projection costs more than a decoding step of the network: without gradients its result is kept.
        self._kept: tuple[list[tuple[nn.Parameter, int, int]], torch.Tensor] | None = None
        #: Of the model that it was trained on, see `chatglm.adapters.fingerprint`.
        self.base_fingerprint: str | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": None}

    def _table(self) -> torch.Tensor:
        """(pre_seq_len, layers * 2 * heads * head_dim)"""
        weight = self.embedding.weight
        if self.trans is None:
            return weight
        keep = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not keep or any(parameter.is_inference() for parameter in self.parameters()):
            return self.trans(weight)
        # The address finds what assigning to .data changes without a new version.
        state = [(parameter, parameter._version, parameter.data_ptr()) for parameter in self.parameters()]
        if self._kept is not None and len(self._kept[0]) == len(state):
            same = all(old[0] is new[0] and old[1:] == new[1:] for old, new in zip(self._kept[0], state, strict=True))
            if same and self._kept[1].device == weight.device and self._kept[1].dtype == weight.dtype:
                return self._kept[1]
        finished: torch.Tensor = self.trans(weight)
        self._kept = (state, finished)
        return finished

    def forward(self, batch_size: int, dtype: torch.dtype) -> list[LayerPrefix]:
        """The prefix of every layer for `batch_size` sequences, in `dtype`."""
        table = self._table().to(dtype)
        table = table.view(1, self.pre_seq_len, self.num_layers * 2, self.num_heads, self.head_dim)
        table = self.dropout(table.expand(batch_size, -1, -1, -1, -1)).permute(2, 0, 3, 1, 4)
        return [(table[2 * layer], table[2 * layer + 1]) for layer in range(self.num_layers)]


def make_prefix_visible(attention_mask: torch.Tensor | None, pre_seq_len: int) -> torch.Tensor | None:
    """Put `pre_seq_len` visible columns in front of a mask as an attention function takes it.

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
