"""The text of an answer as the user and the history get it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .history import Message, Pair
from .tool_calls import parse_call

#: What the answers of all generations say for the date their training data ends; the originals fill it in like this.
_TRAINING_DATE = ("[[训练时间]]", "2023年")
_HALF_TO_FULL = str.maketrans(",!:;?", "，！：；？")
_PUNCTUATION_BY_HAN = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
# What may still change at the end of an unfinished answer; generation 1's decoder makes "," of " ,", "n't" of " n't".
_PENDING_MARK = r"\[\[?(?:训(?:练(?:时(?:间\]?)?)?)?)?"
_PENDING = re.compile(rf"(?:[\s\ufffd]|{_PENDING_MARK})+$")
_PENDING_V1 = re.compile(rf"(?:\s'[vr]?|\sn'?|[\s\ufffd,!:;?]|{_PENDING_MARK})+$")
_NAME = re.compile(r"[^\W\d][\w.\-]{0,63}")


@dataclass
class Response:
    """An answer as the user gets it: `content`, and the `messages` to append to a role history."""

    content: str | dict[str, Any]
    messages: list[Message] = field(default_factory=list)


def clean_response(version: int, text: str) -> str:
    """An answer as the user sees it: outer blanks gone, the training date filled in, generation 1's punctuation.

    Generation 1's vocabulary knows half-width punctuation only: beside a Han character it becomes full-width again.
    """
    text = text.strip().replace(*_TRAINING_DATE)
    if version == 1:
        text = _PUNCTUATION_BY_HAN.sub(lambda found: found[0].translate(_HALF_TO_FULL), text)
    return text


def stable_response(version: int, text: str) -> str:
    """What may be shown of an unfinished answer: a part of the finished one, whatever follows.

    Held back are outer blanks, U+FFFD (which may be half of a character), the beginning of `[[训练时间]]`, and for
    generation 1 punctuation, which a Han character may follow, and blanks that its decoder may take away.
    """
    pending = _PENDING_V1 if version == 1 else _PENDING
    tail = pending.search(text, max(0, len(text) - 64))
    return clean_response(version, text[: tail.start()] if tail else text)


def parse_response(version: int, text: str, with_tools: bool = False) -> Response:
    """The text of an answer as content and history messages.

    Generation 3 may answer with several messages, each `metadata\\ncontent`; the last one is the content. One with
    metadata is a call: `{"name", "parameters"}` if the conversation has tools, else `{"name", "content"}` (the code
    interpreter). A call that cannot be read is `{"name", "parameters": None, "content": raw, "error": why}`; code for
    `interpreter` has no error. Nothing that the model writes is ever run.
    """
    if version != 3:
        content = clean_response(version, text)
        return Response(content, [{"role": "assistant", "content": content}])
    messages: list[Message] = []
    content_of_last: str | dict[str, Any] = ""
    for part in text.split("<|assistant|>"):
        metadata, content = _split_metadata(part)
        name = metadata.strip()
        if not name:
            content = content.strip()
            content_of_last = clean_response(version, content)
        elif with_tools:
            content_of_last = parse_call(name, content)
        else:
            content_of_last = {"name": name, "content": content}
        messages.append({"role": "assistant", "metadata": metadata, "content": content})
    return Response(content_of_last, messages)


def _split_metadata(part: str) -> Pair:
    """A message as (metadata, content); a first line that cannot be a tool's name belongs to the content."""
    return split_message(part, whole=True) or ("", part)


def split_message(part: str, whole: bool) -> Pair | None:
    """A message of generation 3 as (metadata, content); None while more of it has to come before that can be said."""
    metadata, newline, content = part.partition("\n")
    name, start = metadata.strip(), content.lstrip()
    if name and not _NAME.fullmatch(name):
        return "", part
    if not newline:
        return ("", part) if whole else None
    if name in ("", "interpreter"):
        return metadata, content
    calls = ("```", "tool_call(", f"{name}(", "{")
    if start.startswith(calls):
        return metadata, content
    return None if not whole and any(call.startswith(start) for call in calls) else ("", part)
