"""The base class of our KV caches: what one-call decoding on a CPU needs from a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel


def reusable_tokens(model: PreTrainedModel, held: list[int], ids: list[int]) -> int:
    """How many of the tokens `held`, whose keys and values are in a cache, hold for the sequence `ids` too; never its
    last one, because its logits are needed."""
    common = min(len(held), len(ids))
    if held[:common] != ids[:common]:
        common = next(i for i in range(common) if held[i] != ids[i])
    return min(int(model.reusable_prefix(ids, common)), len(ids) - 1)


@dataclass(frozen=True)
class TokenRoom:
    """Where one-call decoding writes the next tokens of each sequence; the cache is as before until `commit`."""

    #: What each new token comes after, without the tokens of `shared`. Of several new tokens of one row, the later
    #: ones count the earlier ones.
    lengths: Sequence[int]
    #: Keys and values of each layer, (rows, heads, more than the longest length, head_dim); or rows of int8, see
    #: `int8`.
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    lines: Sequence[int]  # of each sequence, its row in `layers`; several may be tokens of one row
    commit: Callable[[], None]  # makes the written tokens a part of the cache
    #: Of each sequence: keys and values (heads, tokens, head_dim) of each layer in front of those in `layers`, or
    #: nothing. Empty: of no sequence.
    shared: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]] = ()


class ChatGLMCache(Cache):
    """A KV cache of transformers that also tells one-call decoding its mask and where the next token goes."""

    #: The `attention_mask` of the next forward: (sequences, tokens), 0 only after the end of a shorter sequence; None
    #: if all sequences have the same length. One-call decoding knows the lengths and needs no such mask.
    mask: torch.Tensor | None = None
    #: What it holds, see `int8`.
    kv_cache_dtype: str = "auto"

    @property
    def holds_bytes(self) -> bool:
        """Whether it holds int8; a P-tuning prefix in front of it is then rounded likewise."""
        return self.kv_cache_dtype == "int8"

    def room_for_tokens(self, tokens: int = 1) -> TokenRoom | None:
        """Room for `tokens` more of each sequence; None if the cache cannot take them at this point."""
        raise NotImplementedError
