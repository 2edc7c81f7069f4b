"""Segments: the pieces of a prompt, each a text that is encoded on its own or the name of a control token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

#: (text, False) or (name of a control token, True).
Segment = tuple[str, bool]


class ChatTokenizer(Protocol):
    """What the chat formats need from a tokenizer."""

    chatglm_version: int

    def encode_text(self, text: str) -> list[int]: ...

    def get_command(self, token: str) -> int: ...


def tokens(*names: str) -> tuple[Segment, ...]:
    """Control tokens as segments."""
    return tuple((name, True) for name in names)


def encode_segments(tokenizer: ChatTokenizer, segments: Iterable[Segment]) -> list[int]:
    """Returns the ids of the segments. Users' input is always in the texts, so it never becomes a control token."""
    ids: list[int] = []
    for text, is_token in segments:
        ids += [tokenizer.get_command(text)] if is_token else tokenizer.encode_text(text)
    return ids


def render_segments(segments: Iterable[Segment], joint: str) -> str:
    """Returns the segments as one text, with control tokens spelt out and `joint` between two texts."""
    text, after_text = "", False
    for part, is_token in segments:
        text += ("</s>" if part == "<eos>" else part) if is_token else joint * (after_text and part != "") + part
        after_text = not is_token
    return text
