"""A response while its answer grows: its output items, and the events that tell a client of them."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ..answers import Call, Change
from ..errors import ApiError
from .responses_body import ResponsesBody

Event = dict[str, Any]


class ResponseOutput:
    """Builds a response step by step. `take` and `end` return the events of each step; whole responses ignore them.

    Args:
        model: the name to report.
    """

    def __init__(self, body: ResponsesBody, model: str) -> None:
        self.response = _head(body, model)
        self._items: list[dict[str, Any]] = self.response["output"]
        self._open: dict[str, Any] | None = None
        self._tokens: list[dict[str, Any]] = []  # log probabilities of text that is still held back
        self._events = 0

    def begin(self) -> list[Event]:
        return [self._event(f"response.{name}", response=self._snapshot()) for name in ("created", "in_progress")]

    def take(self, change: Change, tokens: Sequence[dict[str, Any]]) -> list[Event]:
        """Adds what a step of the answer brought; `tokens`: its log probabilities, as in a chat completion."""
        self._tokens += tokens
        events = self._add_text(change.content) if change.content else []
        for _, call, arguments, is_new in change.calls:
            if is_new:
                events += [*self._close(), *self._open_call(call)]
            if arguments:
                events += self._add_arguments(arguments)
        return events

    def end(self, reason: str, usage: dict[str, Any]) -> list[Event]:
        """Completes the response.

        Args:
            reason: why the answer ended, "stop" or "length".
            usage: as in a chat completion.
        """
        whole = reason != "length"
        events = [] if self._items else self._open_message()
        if self._open is not None and self._open["type"] == "message":
            self._open["content"][0]["logprobs"] += self._tokens
        events += self._close("completed" if whole else "incomplete")
        self.response |= {
            "status": "completed" if whole else "incomplete",
            "completed_at": int(time.time()) if whole else None,
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }
        return [*events, self._event(f"response.{self.response['status']}", response=self._snapshot())]

    def fail(self, error: ApiError) -> list[Event]:
        """Ends the response with an error."""
        details = error.body["error"]
        code = "server_error" if error.status != 429 else "rate_limit_exceeded"
        self.response |= {"status": "failed", "error": {"code": code, "message": details["message"]}}
        return [
            self._event("error", code=details["code"] or code, message=details["message"], param=details["param"]),
            self._event("response.failed", response=self._snapshot()),
        ]

    def message(self) -> dict[str, Any]:
        """Returns the output as a chat message."""
        texts = [item["content"][0]["text"] for item in self._items if item["type"] == "message"]
        calls = [
            {
                "id": item["call_id"],
                "type": "function",
                "function": {"name": item["name"], "arguments": item["arguments"]},
            }
            for item in self._items
            if item["type"] == "function_call"
        ]
        return {"role": "assistant", "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}

    # ---- items

    def _add_text(self, text: str) -> list[Event]:
        events = []
        if self._open is None or self._open["type"] != "message":
            if self._items:
                text = text.lstrip("\n")  # what separates it from the text before a call
            events = [*self._close(), *self._open_message()]
        assert self._open is not None
        part, tokens = self._open["content"][0], self._tokens
        part["text"] += text
        part["logprobs"] += tokens
        self._tokens = []
        return [*events, self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=tokens)]

    def _add_arguments(self, arguments: str) -> list[Event]:
        assert self._open is not None and self._open["type"] == "function_call"
        self._open["arguments"] += arguments
        return [self._item_event("response.function_call_arguments.delta", delta=arguments)]

    def _open_message(self) -> list[Event]:
        item: dict[str, Any] = {
            "type": "message",
            "id": _name("msg"),
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        added = self._add_item(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part]
        return [*added, self._item_event("response.content_part.added", content_index=0, part=copy.deepcopy(part))]

    def _open_call(self, call: Call) -> list[Event]:
        self._tokens = []  # log probabilities belong to text
        item = {"type": "function_call", "id": _name("fc"), "call_id": call.id, "name": call.name}
        return self._add_item(item | {"arguments": "", "status": "in_progress"})

    def _add_item(self, item: dict[str, Any]) -> list[Event]:
        self._open = item
        self._items.append(item)
        index = len(self._items) - 1
        return [self._event("response.output_item.added", output_index=index, item=copy.deepcopy(item))]

    def _close(self, status: str = "completed") -> list[Event]:
        item = self._open
        if item is None:
            return []
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            events = [
                self._item_event(
                    "response.output_text.done", content_index=0, text=part["text"], logprobs=list(part["logprobs"])
                ),
                self._item_event("response.content_part.done", content_index=0, part=copy.deepcopy(part)),
            ]
        else:
            names = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._item_event("response.function_call_arguments.done", **names)]
        self._open = None
        index = len(self._items) - 1
        return [
            *events, self._event("response.output_item.done", output_index=index, item=copy.deepcopy(item)),
        ]  # fmt: skip

    # ---- events

    def _snapshot(self) -> dict[str, Any]:
        return copy.deepcopy(self.response)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        """An event of the last item."""
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **fields}


def _name(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _head(body: ResponsesBody, model: str) -> dict[str, Any]:
    blank = {"description": None, "parameters": None, "strict": None}
    choice = body.tool_choice
    return {
        "id": _name("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model or model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
        "tools": [blank | tool for tool in body.tools or []],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
