"""Pairs the results of tools with their calls by `tool_call_id`, as OpenAI's API does."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ApiError
from .chat_body import Message


def in_call_order(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with the results of each message's calls in the order of the calls.

    The model sees results without ids, so the order is all it can go by. ChatGLM3's own roles `function` and
    `observation` have no ids: one such result may answer the only call before it.

    Raises:
        ApiError: (400) a result has no id or one that no call has, a call has two results or none, or ids are equal.
    """
    ordered: list[Message] = []
    place = 0
    while place < len(messages):
        message, where = messages[place], f"messages[{place}]"
        place += 1
        ordered.append(message)
        if message.role == "tool":
            raise _wrong(f"{where} is the result of a tool, but no message with tool_calls is before it")
        if message.role != "assistant" or not message.tool_calls:
            continue
        first = place
        while place < len(messages) and messages[place].role in ("tool", "function", "observation"):
            place += 1
        ordered += _sorted(message, where, messages[first:place], first)
    return ordered


def _sorted(message: Message, where: str, results: Sequence[Message], first: int) -> list[Message]:
    """Returns the results of one message's calls; `first` is the place of the first in the conversation."""
    calls = [call.id for call in message.tool_calls or []]
    only = results[0] if len(calls) == len(results) == 1 else None
    if only is not None and only.tool_call_id is None and (calls[0] is None or only.role != "tool"):
        return [only]
    if None in calls:
        raise _wrong(f"{where}: every one of several tool calls needs an id")
    if len(set(calls)) < len(calls):
        raise _wrong(f"{where}: two tool calls have the same id")
    found: dict[str | None, Message] = {}
    for number, result in enumerate(results, first):
        given = result.tool_call_id
        if given is None:
            raise _wrong(f"messages[{number}] needs the tool_call_id of the call that it answers")
        if given not in calls:
            raise _wrong(f"messages[{number}]: no call of {where} has the tool_call_id {given!r}")
        if given in found:
            raise _wrong(f"messages[{number}]: the call {given!r} has a result already")
        found[given] = result
    missing = [call for call in calls if call not in found]
    if missing:
        raise _wrong(f"{where}: the call {missing[0]!r} has no result; one must follow for each call")
    return [found[call] for call in calls]


def _wrong(reason: str) -> ApiError:
    return ApiError(400, reason, param="messages", code="invalid_tool_messages")
