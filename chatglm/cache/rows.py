"""The KV cache of many sequences: one row each, all with the same capacity, in two tensors per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .base import ChatGLMCache, TokenRoom
from .int8 import check_kv_cache_dtype, decode, encode, scales_of

#: Rows grow by at least this many tokens at a time, so that they rarely grow.
ROW_STEP = 16


class Beginning:
    """Keys and values of the first tokens of several rows, kept once; never changed.

    Args:
        layers: of each layer, (heads, tokens, head_dim), contiguous.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers
        self.tokens: int = layers[0][0].shape[1]
        self.size = sum(part.nbytes for layer in layers for part in layer)


class RowCache(ChatGLMCache):
    """Keys and values of `rows` sequences, each (rows, heads, capacity, head_dim); row i holds its tokens from 0 on.

    The first tokens of a row may be in a `Beginning` that it shares with others (see `share`); then the row itself
    holds those behind them, and `capacity` counts only these. Lengths and places in the arguments count all tokens.

    A forward runs on one row (`select_row`, any number of tokens) or on one token at each of several places
    (`select_places`), such as the ends of all rows. Values after the tokens of a row are finite, and `mask` hides them.

    Args:
        kv_cache_dtype: "auto" holds keys and values as they are, "int8" as bytes with scales (see `int8`).

    Raises:
        ValueError: another `kv_cache_dtype`.
    """

    is_compileable = False

    def __init__(self, kv_cache_dtype: str = "auto") -> None:
        super().__init__(layers=[])
        check_kv_cache_dtype(kv_cache_dtype)
        self.kv_cache_dtype = kv_cache_dtype
        self.rows = 0
        self.capacity = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        #: Of each row; change them by `share`, `copy` and `leave` only.
        self.beginnings: list[Beginning | None] = []
        self._single = False
        self._past = 0
        self._lines: Sequence[int] = ()  # the rows that were selected
        self._lengths: Sequence[int] = ()  # without the beginnings
        self._at = (torch.zeros(0, dtype=torch.long),) * 2  # both as tensors, made once for all layers
        self._joined: list[torch.Tensor] = []
        self.mask = None

    @property
    def size(self) -> int:
        """Bytes of all keys and values."""
        own = sum(part.nbytes for part in (*self._keys, *self._values))
        return own + sum(one.size for one in set(self.beginnings) if one is not None)

    def shared(self, row: int) -> int:
        """How many of the row's first tokens are in a beginning."""
        beginning = self.beginnings[row]
        return 0 if beginning is None else beginning.tokens

    def shared_by(self, rows: Iterable[int]) -> int:
        """Tokens of the beginnings of these rows, each beginning counted once."""
        return sum(one.tokens for one in {self.beginnings[row] for row in rows} if one is not None)

    def select_row(self, row: int, start: int) -> None:
        """The next forward writes to `row` from token `start` on."""
        self._single, self._past, self.mask, self._joined = True, start, None, []
        self._lines, self._lengths = (row,), (start - self.shared(row),)

    def select_places(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """The next forward writes one token to each of `rows`, after so many tokens of it. A row may be named several
        times, for tokens that follow each other."""
        self._single, self._past, self._joined, self.mask = False, max(lengths), [], None
        self._lines = rows
        self._lengths = [length - self.shared(row) for row, length in zip(rows, lengths, strict=True)]
        self._at = (torch.tensor(self._lines, device=device), torch.tensor(self._lengths, device=device))
        if min(lengths) != max(lengths):
            ends = torch.tensor(lengths, device=device).unsqueeze(-1)
            self.mask = (torch.arange(self._past + 1, device=device) <= ends).long()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = key_states.dtype
        if self.holds_bytes:
            key_states, value_states = encode(key_states), encode(value_states)
        while len(self._keys) <= layer_idx:
            for parts, states in ((self._keys, key_states), (self._values, value_states)):
                # Zeros: masked values have weight 0, and 0 times NaN would be NaN.
                parts.append(states.new_zeros(self.rows, states.shape[1], self.capacity, states.shape[3]))
        tokens = key_states.shape[2]
        for parts, states in ((self._keys, key_states), (self._values, value_states)):
            held = parts[layer_idx]
            if self._single:
                held[self._lines[0], :, self._lengths[0] : self._lengths[0] + tokens] = states[0]
            else:
                lines, places = self._at
                held[lines.to(held.device), :, places.to(held.device)] = states[:, :, 0]
        if any(self.beginnings[row] is not None for row in self._lines):
            keys, values = self._join(layer_idx, tokens)
        else:
            keys, values = (self._selected(part[layer_idx], tokens) for part in (self._keys, self._values))
        return (decode(keys, dtype), decode(values, dtype)) if self.holds_bytes else (keys, values)

    def _selected(self, held: torch.Tensor, tokens: int) -> torch.Tensor:
        """The selected rows of a layer's keys or values: a copy only where they are not next to each other."""
        first, end = self._lines[0], self._past + tokens
        if list(self._lines) == list(range(first, first + len(self._lines))):
            return held[first : first + len(self._lines), :, :end]
        return held[self._at[0].to(held.device), :, :end]

    def _join(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The selected rows with their beginnings in front, in tensors that the next layer overwrites."""
        held = (self._keys[layer], self._values[layer])
        shapes = [(len(self._lengths), part.shape[1], self._past + tokens, part.shape[3]) for part in held]
        kept = [(one.shape, one.device, one.dtype) for one in self._joined]
        if kept != [(shape, part.device, part.dtype) for shape, part in zip(shapes, held, strict=True)]:
            self._joined = [part.new_zeros(shape) for shape, part in zip(shapes, held, strict=True)]
        for i, (row, length) in enumerate(zip(self._lines, self._lengths, strict=True)):
            own = length + tokens
            beginning, start = self.beginnings[row], self.shared(row)
            for which, part in enumerate(held):
                if beginning is not None:
                    self._joined[which][i, :, :start] = beginning.layers[layer][which]
                self._joined[which][i, :, start : start + own] = part[row, :, :own]
        return self._joined[0], self._joined[1]

    def room_for_tokens(self, tokens: int = 1) -> TokenRoom:
        """Room in the selected rows. Whoever selects rows counts their tokens, so there is nothing to commit."""
        shared = [[] if one is None else one.layers for one in (self.beginnings[row] for row in self._lines)]
        held = list(zip(self._keys, self._values, strict=True))
        return TokenRoom(self._lengths, held, self._lines, lambda: None, shared if any(shared) else ())

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
        self.beginnings = self.beginnings[:kept] + [None] * (rows - kept)
        self.rows, self.capacity = rows, capacity

    def share(self, rows: Mapping[int, int], tokens: int) -> None:
        """Keeps the first `tokens` tokens of these rows, which are the same ones, once for all of them.

        Args:
            rows: row -> how many tokens it holds; there has to be room for those behind the shared ones.
        """
        first = next(iter(rows))
        beginning = Beginning([self._copy_of(first, layer, 0, tokens) for layer in range(len(self._keys))])
        for row, length in rows.items():
            self._write(row, row, tokens, length)
            self.beginnings[row] = beginning

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes the first tokens of one row those of another, which shares its beginning if that is no longer."""
        beginning = self.beginnings[source]
        if beginning is not None and beginning.tokens > length:
            beginning = None
        self._write(source, target, 0 if beginning is None else beginning.tokens, length)
        self.beginnings[target] = beginning

    def _write(self, source: int, target: int, start: int, end: int) -> None:
        """Copies tokens of a row to the front of a row."""
        for layer, held in enumerate(zip(self._keys, self._values, strict=True)):
            for part, copied in zip(held, self._copy_of(source, layer, start, end), strict=True):
                part[target, :, : end - start] = copied

    def _copy_of(self, row: int, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (heads, end - start, head_dim) of some tokens of a row."""
        beginning, shared = self.beginnings[row], self.shared(row)
        parts = []
        for which, held in enumerate((self._keys[layer], self._values[layer])):
            own = held[row, :, max(start - shared, 0) : max(end - shared, 0)]
            front = own[:, :0] if beginning is None else beginning.layers[layer][which][:, start:end]
            parts.append(torch.cat((front, own), dim=1))
        return parts[0], parts[1]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchanges two rows, of which neither holds more than `length` tokens behind its beginning."""
        for held in (*self._keys, *self._values):
            kept = held[first, :, :length].clone()
            held[first, :, :length] = held[second, :, :length]
            held[second, :, :length] = kept
        beginnings = self.beginnings
        beginnings[first], beginnings[second] = beginnings[second], beginnings[first]

    def leave(self, row: int) -> None:
        """Makes a row one without tokens in a beginning."""
        self.beginnings[row] = None

    def is_finite(self, row: int, length: int) -> bool:
        """Whether the first `length` tokens behind a row's beginning are without NaN and infinite numbers."""
        for held in (*self._keys, *self._values):
            part = held[row, :, :length]
            if not bool((scales_of(part) if self.holds_bytes else part).isfinite().all()):
                return False
        return True

    def clear(self, row: int) -> None:
        """Fills a row that may hold NaN with zeros."""
        self.leave(row)
        for held in (*self._keys, *self._values):
            held[row].zero_()
