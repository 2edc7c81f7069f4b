"""Cleans the raw text of an answer for its reader; chat, page and API all use this cleaner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .formats import ChatFormat, Response


class AnswerCleaner:
    """Cleans an answer while it grows. `shown` is the part that is final; it only grows."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.chat_format: ChatFormat = tokenizer.chat_format
        self.shown = ""

    def messages(self, raw: str) -> list[str]:
        """Splits the answer so far into messages, without the spaces that generation 1's decoder leaves."""
        return self.chat_format.split_answer(self._without_blanks(raw))

    def text(self, messages: Sequence[str]) -> str:
        """Returns the messages as the reader sees them now; the end of an unfinished answer may change."""
        return self.chat_format.clean("\n".join(messages))

    def advance(self, messages: Sequence[str], whole: bool) -> str:
        """Extends `shown` and returns what is new; `whole`: the answer is complete."""
        joined = "\n".join(messages)
        shown = self.chat_format.clean(joined) if whole else self.chat_format.stable(joined)
        if not shown.startswith(self.shown):
            return ""
        delta = shown[len(self.shown) :]
        self.shown = shown
        return delta

    def parse(self, raw: str, with_tools: bool) -> Response:
        """Parses the finished answer; `with_tools`: the conversation has tools."""
        return self.chat_format.parse(self._without_blanks(raw), with_tools)

    def _without_blanks(self, raw: str) -> str:
        """`clean_up_tokenization` of v1.1 depends on what follows, so it must see the whole text."""
        return self._tokenizer.clean_up_tokenization(raw) if self._tokenizer.clean_up_tokenization_spaces else raw
