"""Rotary position tables (https://arxiv.org/abs/2104.09864), computed once and looked up by position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

#: (positions, dtype of the arithmetic, device) -> angles, (positions, rotated dims / 2)
AngleFunction = Callable[[int, torch.dtype, torch.device], torch.Tensor]


class RotaryTable(nn.Module):
    """cos and sin of every position up to `length`; grows when a later position is needed.

    Args:
        angles: computes the angles of the first n positions.
        length: number of positions to compute at the start.
        precision: "float32" computes in float32 and casts only what a forward reads; "original" computes in the
            requested dtype, as the first public code did (its fp16 and bf16 tables are coarse).
    """

    table: torch.Tensor

    def __init__(self, angles: AngleFunction, length: int, precision: str = "float32") -> None:
        super().__init__()
        self._angles = angles
        self._original = precision == "original"
        self._dtype = torch.float32
        self.register_buffer("table", self._compute(length, torch.empty(0).device), persistent=False)

    def _compute(self, length: int, device: torch.device) -> torch.Tensor:
        with torch.no_grad():
            angles = self._angles(length, self._dtype, device)
            return torch.stack((angles.cos(), angles.sin()), dim=-1).float()  # (length, rotated dims / 2, 2)

    def reset(self) -> None:
        """Recomputes the table on its device, after it was created on the meta device."""
        self.table = self._compute(len(self.table), self.table.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryTable:
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32:  # model.half() must not round the table
            self.reset()
        return self

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for `position_ids` (batch, tokens), each (batch, tokens, rotated dims / 2) in `dtype`."""
        if not torch.compiler.is_compiling():
            if self._original and dtype != self._dtype:
                self._dtype = dtype
                self.reset()
            if not (position_ids.is_cuda and torch.cuda.is_current_stream_capturing()) and position_ids.numel():
                longest = int(position_ids.max()) + 1
                if longest > len(self.table):
                    self.table = self._compute(1 << (longest - 1).bit_length(), self.table.device)
        cos, sin = self.table[position_ids.to(self.table.device)].to(dtype).unbind(-1)
        return cos, sin
