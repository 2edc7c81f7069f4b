"""Splits an answer, while it grows, into content and tool calls in the form of OpenAI's API."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor

from ..conversation.shown_answer import AnswerCleaner
from ..engine import EngineStep
from .service import dumps


@dataclass
class Call:
    """A tool call so far."""

    name: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")
    arguments: str = ""


@dataclass
class Change:
    """What one more step added. `calls`: (index, call, new part of its arguments, whether the call is new)."""

    content: str = ""
    calls: list[tuple[int, Call, str, bool]] = field(default_factory=list)


class AssistantMessage:
    """Splits the raw text of an answer into content and calls. Feeding it whole or in pieces gives the same result.

    Args:
        tools: names that may be called. A message that begins with another name is text: an answer such as "Python"
            with a code block on the next line looks the same as a call.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[str] = (), at_most_one_call: bool = False) -> None:
        self._cleaner = AnswerCleaner(tokenizer)
        self._format = self._cleaner.chat_format
        self._tools, self._at_most_one = list(tools), at_most_one_call
        self._raw = ""
        self.content = ""
        self.calls: list[Call] = []

    def take(self, step: EngineStep) -> Change:
        return self.feed(step.delta, step.finish_reason is not None)

    def feed(self, delta: str, whole: bool) -> Change:
        """Adds raw text; `whole`: the answer is complete."""
        self._raw += delta
        change, texts = Change(), self._cleaner.messages(self._raw)
        if self._tools:
            texts = self._sort(texts, whole, change)
        change.content = self._cleaner.advance(texts, whole)
        self.content = self._cleaner.shown
        return change

    def _sort(self, parts: list[str], whole: bool, change: Change) -> list[str]:
        """Moves the calls into `change` and returns the texts."""
        texts, calls = [], 0
        for number, part in enumerate(parts):
            ends = whole or number < len(parts) - 1
            name = part.partition("\n")[0].strip()
            could_be = name in self._tools or ("\n" not in part and any(one.startswith(name) for one in self._tools))
            message = self._format.split_message(part, ends) if could_be or not name else ("", part)
            if message is None:
                continue
            if not message[0].strip():
                texts.append(message[1])
                continue
            if calls == 0 or not self._at_most_one:
                self._update_call(calls, name, message[1], ends, change)
            calls += 1
        return texts

    def _update_call(self, index: int, name: str, content: str, ends: bool, change: Change) -> None:
        is_new = index == len(self.calls)
        if is_new:
            self.calls.append(Call(name))
        call = self.calls[index]
        if not ends:
            now = _json_object(self._format.arguments_so_far(name, content))
            now = "" if now in (None, "{}") else str(now)[:-1]
        else:
            parameters = self._format.read_call(name, content)["parameters"]
            whole = None if parameters is None else _json_object(parameters)
            # Arguments that cannot be parsed go to the client unchanged: OpenAI's need not be valid JSON either.
            now = whole if whole is not None else content.strip()
        if now.startswith(call.arguments) and (is_new or now != call.arguments):
            change.calls.append((index, call, now[len(call.arguments) :], is_new))
            call.arguments = now
        elif is_new:
            change.calls.append((index, call, "", True))


def _json_object(values: dict[str, Any]) -> str | None:
    """Returns JSON that further values only extend at its end; None for values that JSON cannot represent."""
    try:
        json.dumps(values, allow_nan=False)
        return "{" + ", ".join(f"{dumps(name)}: {dumps(value)}" for name, value in values.items()) + "}"
    except (TypeError, ValueError, RecursionError):
        return None


class StartWith(LogitsProcessor):
    """Forces an answer to begin with one of these token sequences; what follows is free."""

    def __init__(self, starts: Sequence[Sequence[int]], prompt_tokens: int) -> None:
        self._starts = [list(start) for start in starts]
        self._prompt_tokens = prompt_tokens
        self._longest = max(map(len, self._starts))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1] - self._prompt_tokens
        if length >= self._longest:
            return scores
        said = input_ids[0, self._prompt_tokens :].tolist()
        allowed = sorted({start[length] for start in self._starts if len(start) > length and start[:length] == said})
        if not allowed:
            return scores
        only = torch.full_like(scores, float("-inf"))
        only[:, allowed] = scores[:, allowed]
        return only
