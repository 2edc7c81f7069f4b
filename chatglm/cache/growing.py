"""A layer of a KV cache that grows in place."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values with spare room for new tokens, so that they are rarely copied."""

    #: The room grows by this many tokens.
    STEP = 256

    keys: torch.Tensor
    values: torch.Tensor
    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.keys.numel():
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        past = self.keys.shape[-2]
        self.extend(key_states.shape[-2])
        self.keys[:, :, past:], self.values[:, :, past:] = key_states, value_states
        return self.keys, self.values

    def extend(self, tokens: int) -> None:
        """Makes `keys` and `values` longer by `tokens`; the caller has to write them."""
        self.keys, self.values = self.reserve(tokens)

    def reserve(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with room for `tokens` more at their end; the layer itself is no longer than before."""
        past = self.keys.shape[-2]
        end = past + tokens
        if self._room is None or not self._fits(end):
            shape = (*self.keys.shape[:2], (end // self.STEP + 1) * self.STEP)
            room = (
                self.keys.new_empty((*shape, self.keys.shape[-1])),
                self.values.new_empty((*shape, self.values.shape[-1])),
            )
            room[0][:, :, :past], room[1][:, :, :past] = self.keys, self.values
            self._room = room
            self.keys, self.values = room[0][:, :, :past], room[1][:, :, :past]
        return self._room[0][:, :, :end], self._room[1][:, :, :end]

    def _fits(self, end: int) -> bool:
        """Whether `keys` and `values` still lie in the room (others may have replaced them) and it has `end` tokens."""
        assert self._room is not None
        usable = torch.is_inference_mode_enabled() or not self._room[0].is_inference()
        return usable and all(
            held.data_ptr() == room.data_ptr() and held.shape[:2] == room.shape[:2] and end <= room.shape[2]
            for held, room in zip((self.keys, self.values), self._room, strict=True)
        )

    def reset(self) -> None:
        self._room = None
        super().reset()
