"""`StartTokenTokenizer`: what the tokenizers of ChatGLM2 and its successors share beside their vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.utils import PaddingStrategy

from ..conversation import encode_message
from .base import ChatGLMTokenizer


class StartTokenTokenizer(ChatGLMTokenizer):
    """A single text becomes `[gMASK] sop text`, a pair `[gMASK] sop text answer end`; with a mask of 0 and 1, and
    positions that count from the first token that is not padding."""

    #: The control tokens in front of a text, and the one that ends an answer.
    start_tokens: ClassVar[tuple[str, ...]] = ("[gMASK]", "sop")
    answer_end: ClassVar[str] = "<eos>"

    def __init__(
        self, control: Sequence[str], typed: Sequence[str], encode_special_tokens: bool = False, **kwargs: Any
    ) -> None:
        """
        Args:
            control: the control tokens; they become special tokens.
            typed: those of them that become control tokens when they are spelt out in a text, if such tokens do.
            encode_special_tokens: see the property.
        """
        kwargs["extra_special_tokens"] = list(dict.fromkeys([*control, *(kwargs.get("extra_special_tokens") or [])]))
        if encode_special_tokens:
            kwargs["split_special_tokens"] = False
        super().__init__(**kwargs)
        self._typed_control_tokens = typed

    @property
    def encode_special_tokens(self) -> bool:
        """Whether role tokens spelt out in a text become control tokens (never in the messages of a chat)."""
        return not self.split_special_tokens

    @encode_special_tokens.setter
    def encode_special_tokens(self, value: bool) -> None:
        self.split_special_tokens = not value

    def get_prefix_tokens(self) -> list[int]:
        """The ids of `start_tokens`."""
        return [self.get_command(token) for token in self.start_tokens]

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """The ids of one message of a chat: `<|role|>`, `metadata` and a line break, the message.

        Raises:
            ValueError: the role is unknown, or the tokenizer is of generation 2, which has no roles.
        """
        return encode_message(self, role, metadata, message)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop text`, for a pair `[gMASK] sop text answer end`."""
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.get_command(self.answer_end)]

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        positions = encoded_inputs.get("position_ids") or list(range(len(encoded_inputs["input_ids"])))
        encoded = super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, padding_side, return_attention_mask
        )
        padding = [0] * (len(encoded["input_ids"]) - len(positions))
        on_left = (padding_side or self.padding_side) == "left"
        encoded["position_ids"] = padding + positions if on_left else positions + padding
        return encoded
