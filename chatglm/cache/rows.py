"""The KV cache of many sequences: one row each, all with the same capacity, in two tensors per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import ChatGLMCache, TokenRoom

#: Rows grow by this many tokens at a time, so that they rarely grow.
ROW_STEP = 128


class RowCache(ChatGLMCache):
    """Keys and values of `rows` sequences, each (rows, heads, capacity, head_dim); row i holds its tokens from 0 on.

    A forward runs on one row (`select_row`, any number of tokens) or on adjacent rows (`select_rows`, one token each,
    at positions that may differ). Values after the tokens of a row are finite, and `mask` hides them.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows = 0
        self.capacity = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._row: int | None = None
        self._first = 0
        self._past = 0
        self._lengths: Sequence[int] = ()
        self._lines = self._places = torch.zeros(0, dtype=torch.long)
        self.mask = None

    @property
    def size(self) -> int:
        """Bytes of all keys and values."""
        return sum(part.nbytes for part in (*self._keys, *self._values))

    def select_row(self, row: int, start: int) -> None:
        """The next forward writes to `row` from token `start` on."""
        self._row, self._first, self._past, self._lengths, self.mask = row, row, start, (start,), None

    def select_rows(self, first: int, lengths: Sequence[int], device: torch.device) -> None:
        """The next forward writes one token to each row from `first` on, after the `lengths` tokens that it holds."""
        self._row, self._first, self._past, self._lengths = None, first, max(lengths), lengths
        self._places = torch.tensor(lengths, device=device)
        self._lines = torch.arange(first, first + len(lengths), device=device)
        self.mask = None
        if min(lengths) != max(lengths):
            self.mask = (torch.arange(self._past + 1, device=device) <= self._places.unsqueeze(-1)).long()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self._keys) <= layer_idx:
            for parts, states in ((self._keys, key_states), (self._values, value_states)):
                # Zeros: masked values have weight 0, and 0 times NaN would be NaN.
                parts.append(states.new_zeros(self.rows, states.shape[1], self.capacity, states.shape[3]))
        seen = []
        for parts, states in ((self._keys, key_states), (self._values, value_states)):
            held = parts[layer_idx]
            end = self._past + states.shape[2]
            if self._row is not None:
                held[self._row, :, self._past : end] = states[0]
                seen.append(held[self._row : self._row + 1, :, :end])
            else:
                held[self._lines.to(held.device), :, self._places.to(held.device)] = states[:, :, 0]
                seen.append(held[self._first : self._first + len(states), :, :end])
        return seen[0], seen[1]

    def room_for_tokens(self, tokens: int = 1) -> TokenRoom:
        """Room in the selected rows. Whoever selects rows counts their tokens, so there is nothing to commit."""
        place = slice(self._first, self._first + len(self._lengths))
        held = [(keys[place], values[place]) for keys, values in zip(self._keys, self._values, strict=True)]
        return TokenRoom(self._lengths, held, commit=lambda: None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._past + query_length, 0

    def resize(self, rows: int, capacity: int) -> None:
        """Changes the size and keeps the first rows and tokens, as many as fit."""
        kept, length = min(rows, self.rows), min(capacity, self.capacity)
        for parts in (self._keys, self._values):
            for layer, old in enumerate(parts):  # one layer after the other: never twice the memory
                new = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
                new[:kept, :, :length] = old[:kept, :, :length]
                parts[layer] = new
        self.rows, self.capacity = rows, capacity

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first tokens of one row to another."""
        for held in (*self._keys, *self._values):
            held[target, :, :length] = held[source, :, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchanges the first tokens of two rows."""
        for held in (*self._keys, *self._values):
            kept = held[first, :, :length].clone()
            held[first, :, :length] = held[second, :, :length]
            held[second, :, :length] = kept

    def clear(self, row: int) -> None:
        """Fills a row that may hold NaN with zeros."""
        for held in (*self._keys, *self._values):
            held[row].zero_()
