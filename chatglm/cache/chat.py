"""The KV cache that a chat keeps from one turn to the next."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache, PreTrainedModel

from .base import ChatGLMCache, TokenRoom, reusable_tokens
from .growing import GrowingLayer
from .int8 import Int8Layer, check_kv_cache_dtype


class ChatCache(ChatGLMCache, DynamicCache):
    """A KV cache that knows which tokens it holds, so that a later turn reuses the common prefix.

    Args:
        stamp: identifies the weights that computed the cache, see `chatglm.generation.weights_stamp`.
        kv_cache_dtype: "auto" holds keys and values as they are, "int8" as bytes with scales.

    Raises:
        ValueError: another `kv_cache_dtype`.
    """

    def __init__(self, stamp: object = None, kv_cache_dtype: str = "auto") -> None:
        super().__init__()
        check_kv_cache_dtype(kv_cache_dtype)
        self.kv_cache_dtype = kv_cache_dtype
        self.layer_class_to_replicate = Int8Layer if self.holds_bytes else GrowingLayer
        self.token_ids: list[int] = []
        self.stamp = stamp

    def keep_prefix_of(self, ids: Sequence[int], model: PreTrainedModel, stamp: object) -> int:
        """Drops all but the common prefix with `ids`; returns how many tokens are left.

        The last id is never part of the prefix, because its logits are needed.

        Args:
            stamp: of the current weights of `model`; a cache with another stamp is emptied.
        """
        # An interrupted forward leaves some layers longer than others.
        whole = all(layer.get_seq_length() == len(self.token_ids) for layer in self.layers)
        if not whole or self.stamp != stamp:
            self._empty(stamp)
            return 0
        common = reusable_tokens(model, self.token_ids, list(ids))
        if common == 0:
            self._empty(stamp)
        else:
            self.shorten(common)
        return common

    def shorten(self, tokens: int) -> None:
        """Drops all but the first tokens."""
        if tokens < len(self.token_ids):
            self.crop(tokens - len(self.token_ids))
            del self.token_ids[tokens:]

    def room_for_tokens(self, tokens: int = 1) -> TokenRoom | None:
        """As in the base class; None while the cache is empty or an interrupted forward left some layers longer."""
        length = self.get_seq_length()
        if length == 0 or any(layer.get_seq_length() != length for layer in self.layers):
            return None
        held = [layer.reserve(tokens) for layer in self.layers]

        def commit() -> None:
            for layer, (keys, values) in zip(self.layers, held, strict=True):
                layer.keys, layer.values = keys, values

        rows = len(held[0][0])
        return TokenRoom([length] * rows, held, range(rows), commit)

    def _empty(self, stamp: object) -> None:
        # New layers, because device or dtype may have changed.
        self.__init__(stamp, self.kv_cache_dtype)  # type: ignore[misc]
