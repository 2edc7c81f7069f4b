"""The forms in which other programs keep their training data, recognised by their columns: ShareGPT and Alpaca.

Both are rewritten into the forms that `rows.py` reads: `conversations` with roles, or a question and an answer with a
history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

ALPACA, SHAREGPT, OPENAI, CHATGLM3, PAIRS = "Alpaca", "ShareGPT", "OpenAI messages", "conversations", "pairs"
#: The columns of Alpaca's form; the first and the third make it one.
ALPACA_COLUMNS = ("instruction", "input", "output", "history", "system")
#: ShareGPT's `from` -> role. `function_call` holds a call as JSON.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "function_call": "call",
    "observation": "observation", "tool": "observation", "function_response": "observation",
}  # fmt: skip


def form_of(record: Record) -> str:
    """The name of a record's form; PAIRS if it is none of the others."""
    for name, otherwise in (("conversations", CHATGLM3), ("messages", OPENAI)):
        value = record.get(name)
        if name in record:
            if isinstance(value, str) and '"from"' in value[:200]:  # of CSV
                return SHAREGPT
            first = value[0] if isinstance(value, Sequence) and not isinstance(value, str) and value else None
            return SHAREGPT if isinstance(first, Mapping) and "from" in first and "role" not in first else otherwise
    return ALPACA if "instruction" in record and "output" in record else PAIRS


def from_alpaca(record: Record) -> dict[str, Any]:
    """`prompt`, `response` and `history`. The question is the instruction, and below it the input, if there is one.

    Raises:
        TypeError: a column has the wrong type.
    """
    parts = []
    for name in ("instruction", "input", "output", "system"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name!r} must be text, not {type(value).__name__}")
        parts.append(value or "")
    instruction, extra, output, system = parts
    question = "\n".join(part for part in (instruction, extra) if part.strip())
    history = record.get("history")
    history = json.loads(history) if isinstance(history, str) and history.strip() else history or []
    if system.strip():
        history = [{"role": "system", "content": system}, *messages_of(history)]
    return {"prompt": question, "response": output, "history": history}


def messages_of(history: Sequence[Any]) -> list[dict[str, Any]]:
    """A history of [question, answer] pairs as messages."""
    pairs = [[one, other] for one, other in history]
    return [{"role": role, "content": said} for pair in pairs
            for role, said in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip


def from_sharegpt(record: Record) -> dict[str, Any]:
    """`conversations` with roles, and `tools`.

    Raises:
        TypeError, ValueError: a turn has no `from` and `value`, an unknown speaker, or a call that is not JSON.
    """
    name = "conversations" if "conversations" in record else "messages"
    turns = record[name]
    turns = json.loads(turns) if isinstance(turns, str) else turns
    messages: list[dict[str, Any]] = []
    system = record.get("system")
    if system:
        messages.append({"role": "system", "content": system})
    for index, turn in enumerate(turns):
        where = f"{name}[{index}]"
        if not isinstance(turn, Mapping) or "from" not in turn or not isinstance(turn.get("value"), str):
            raise TypeError(f"{where} must be an object with 'from' and a text under 'value'")
        role = SPEAKERS.get(turn["from"])
        if role is None:
            raise ValueError(f"{where} is from {turn['from']!r}: use one of {', '.join(SPEAKERS)}")
        if role == "system" and messages:
            raise ValueError(f"{where} is from 'system', and there is a system message already: keep one, at the start")
        loss = {key: turn[key] for key in ("loss", "weight") if key in turn}
        if role == "call":
            messages.append({"role": "assistant", "tool_calls": _calls(turn["value"], where), **loss})
        else:
            messages.append({"role": role, "content": turn["value"], **loss})
    tools = record.get("tools")
    return {"conversations": messages, **({"tools": tools} if tools else {})}


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    """ShareGPT's call of a tool, or a list of them, as OpenAI's `tool_calls`."""
    try:
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        return [{"function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} must hold a call as JSON with 'name' and 'arguments' ({error})") from error
