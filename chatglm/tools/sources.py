"""Who answers: a model of ours, or any server behind the `openai` client. The loop treats both alike."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..conversation.formats import ChatFormat
from .running import Call
from .tool import Tool


@dataclass(frozen=True)
class Text:
    """The text of an answer so far, without its calls; `delta` is what is new. `step` is what it came with."""

    text: str
    delta: str
    step: Any = None


class Source(Protocol):
    """A conversation that is being continued."""

    #: The messages so far, in the form of the source.
    messages: list[Any]
    #: Why the last answer ended: "stop", "length", "cancelled" and others of the API.
    finish_reason: str

    def answer(self) -> Iterator[Any]:
        """Yields `Text`, and whatever else the source has to say, until the answer is complete."""
        ...

    def calls(self) -> list[Call]:
        """The calls of the last answer."""
        ...

    def observe(self, call: Call, content: str) -> None:
        """Adds the result of a call."""
        ...


#: (question, history, role) -> the steps of an answer, as `stream_steps` yields them, among others.
Ask = Callable[[str, list[Any], str], Iterator[Any]]


class OwnModel:
    """A conversation with a model of ours; `messages` is its history.

    Args:
        ask: answers a question.
        tools: what the model may call.
    """

    def __init__(
        self, ask: Ask, chat_format: ChatFormat, question: str, history: Sequence[Any], role: str, tools: Sequence[str]
    ) -> None:
        self._ask, self._format, self._names = ask, chat_format, list(tools)
        self._question: tuple[str, str] | None = (question, role)
        self._calls: list[Call] = []
        self.messages = list(history)
        self.finish_reason = ""

    def answer(self) -> Iterator[Any]:
        assert self._question is not None
        (question, role), shown, step = self._question, "", None
        for given in self._ask(question, self.messages, role):
            if not hasattr(given, "finish_reason"):  # a place in a queue
                yield given
                continue
            step = given
            if step.finish_reason is None:
                text = text_before_call(self._format, step.text, self._names)
                if text != shown and text.startswith(shown):
                    yield Text(text, text[len(shown) :], step)
                    shown = text
        if step is None:
            raise RuntimeError("the model gave no answer")
        self.finish_reason, self._question = step.finish_reason, None
        whole, self.messages, self._calls = step.text, list(step.history), []
        if isinstance(step.response, dict):
            whole = self._read_call(step)
        yield Text(whole, whole[len(shown) :] if whole.startswith(shown) else "", step)

    def _read_call(self, step: Any) -> str:
        """Takes the call at the end of an answer; returns the text before it."""
        given, known = step.response, len(self.messages) - 1
        call = Call(given["name"], given.get("parameters"), given.get("error", ""), given.get("content", ""))
        while known and self.messages[known - 1]["role"] == "assistant":
            known -= 1
        said = self.messages[known:]
        if call.name not in self._names and call.arguments is None:
            # An answer such as "Python" with a block of code on the next line only looks like a call.
            self.messages = [*self.messages[:known], {"role": "assistant", "metadata": "", "content": step.text}]
            return str(step.text)
        self._calls = [call]
        texts = [one["content"] for one in said if not (one.get("metadata") or "").strip()]
        return self._format.clean("\n".join(texts))

    def calls(self) -> list[Call]:
        return self._calls

    def observe(self, call: Call, content: str) -> None:
        self.settle()
        self._question = (content, "observation")

    def settle(self) -> None:
        """Puts an observation that nothing will answer into the history."""
        if self._question is not None:
            text, role = self._question
            self.messages, self._question = [*self.messages, {"role": role, "content": text}], None


class OpenAIServer:
    """A conversation with a server behind the `openai` client; `messages` has the form of its API."""

    def __init__(
        self,
        client: Any,
        messages: Sequence[Any],
        tools: Mapping[str, Tool],
        cancel: threading.Event | None,
        settings: dict[str, Any],
    ) -> None:
        self._client, self._cancel, self._settings = client, cancel, dict(settings)
        if "model" not in self._settings:
            self._settings["model"] = client.models.list().data[0].id
        if tools:
            self._settings["tools"] = [{"type": "function", "function": one.describe()} for one in tools.values()]
        self.messages = copy.deepcopy(list(messages))
        self.finish_reason = ""
        self._calls: list[Call] = []

    def answer(self) -> Iterator[Any]:
        text, calls = "", _GrowingCalls()
        self.finish_reason = ""
        stream = self._client.chat.completions.create(messages=self.messages, stream=True, **self._settings)
        with stream:
            for chunk in stream:
                if self._cancel is not None and self._cancel.is_set():
                    self.finish_reason = "cancelled"
                    break
                for choice in chunk.choices:
                    if choice.delta.content:
                        text += choice.delta.content
                        yield Text(text, choice.delta.content, chunk)
                    calls.add(choice.delta.tool_calls or [])
                    self.finish_reason = choice.finish_reason or self.finish_reason
        self._calls = [] if self.finish_reason == "cancelled" else calls.read()
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if self._calls:
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.content}}
                for one in self._calls
            ]
        self.messages.append(message if self._calls else message | {"content": text})

    def calls(self) -> list[Call]:
        return self._calls

    def observe(self, call: Call, content: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": call.id, "content": content})

    def settle(self) -> None:
        """Nothing is left open: observations are in the messages at once."""


class _GrowingCalls:
    """Puts the pieces of streamed calls together."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, str]] = {}

    def add(self, deltas: Sequence[Any]) -> None:
        for delta in deltas:
            parts = self._parts.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            parts["id"] = delta.id or parts["id"]
            if delta.function is not None:
                parts["name"] += delta.function.name or ""
                parts["arguments"] += delta.function.arguments or ""

    def read(self) -> list[Call]:
        return [self._call(self._parts[index]) for index in sorted(self._parts)]

    @staticmethod
    def _call(parts: Mapping[str, str]) -> Call:
        try:
            arguments = json.loads(parts["arguments"] or "{}")
            if not isinstance(arguments, dict):
                raise ValueError("they are no JSON object")
            return Call(parts["name"], arguments, "", parts["arguments"] or "{}", parts["id"])
        except (ValueError, RecursionError) as error:
            reason = f"the arguments cannot be read: {error}"
            return Call(parts["name"], None, reason, "{}", parts["id"])


def text_before_call(chat_format: ChatFormat, text: str, names: Sequence[str]) -> str:
    """Returns the part of an unfinished answer that is text for certain: up to what may become the call of a tool."""
    place = 0
    while place <= len(text):
        part = text[place:]
        first, newline, _ = part.partition("\n")
        name = first.strip()
        if name in names or (name and not newline and any(one.startswith(name) for one in names)):
            split = chat_format.split_message(part, False)
            if split is None or split[0].strip():
                return text[:place].rstrip()
        if not newline:
            break
        place += len(first) + 1
    return text
