"""The base class of our KV caches: what one-call decoding on a CPU needs from a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from transformers import Cache

#: The length of each sequence, and for each layer its keys and values, each (sequences, heads, tokens, head_dim) with
#: room for one more token.
TokenRoom: TypeAlias = tuple[Sequence[int], list[tuple[torch.Tensor, torch.Tensor]]]


class ChatGLMCache(Cache):
    """A KV cache of transformers that also has the two attributes that one-call decoding reads."""

    #: The `attention_mask` of the next forward: (sequences, tokens), 0 only after the end of a shorter sequence; None
    #: if all sequences have the same length. One-call decoding knows the lengths and needs no such mask.
    mask: torch.Tensor | None = None

    #: Where one-call decoding writes the next token of each sequence. None: the cache consists of layers that one-call
    #: decoding extends itself, as it does with transformers' `DynamicCache`.
    room_for_tokens: Callable[[], TokenRoom] | None = None
