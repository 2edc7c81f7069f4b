"""The layer that stands for a matrix of which every process holds some rows."""

from __future__ import annotations

import torch
from torch import nn

from .group import Group


class ShardedLinear(nn.Module):
    """A linear layer of the first process, whose rows all processes share. It computes and does not train.

    Args:
        own: the layer with the rows of this process, in its final dtype.
        index: of the matrix, as the other processes count them.
        in_features, out_features, bias: of the whole matrix; each process adds its part of the bias.
    """

    def __init__(
        self, own: nn.Module, group: Group, index: int, in_features: int, out_features: int, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self._own = (own,)  # no submodule: to others, this layer has the parameters of a whole one, or none
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias
        self._group, self._index = group, index

    @property
    def own(self) -> nn.Module:
        return self._own[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError("a model with tensor parallelism does not train: load it in one process")
        rows = input.reshape(-1, self.in_features)
        product = self._group.multiply(self._index, rows, self.own, self.out_features)
        return product.view(*input.shape[:-1], self.out_features)
