"""Converts chat messages, as OpenAI's clients and transformers pass them, to role messages or pairs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .history import Message, Pair, check_message, check_text

if TYPE_CHECKING:
    from .formats import ChatFormat


def normalize_messages(messages: Sequence[Any], tools: Any, chat_format: ChatFormat) -> list[Message]:
    """Converts clients' chat messages to role messages.

    Contents may be None or lists of text parts; the roles `tool` and `function` become `observation`, `developer`
    becomes `system`; an assistant's `tool_calls` become messages as `chat_format` writes them, with the tool's name as
    metadata; `tools` go into the system message, which is added if there is none.

    Raises:
        TypeError, ValueError: the messages are malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
    result: list[Message] = []
    for index, item in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(item, Mapping) or "role" not in item:
            raise TypeError(f"{where} must be a dict like {{'role': 'user', 'content': '…'}}")
        role = item["role"]
        role = "observation" if role in ("tool", "function") else "system" if role == "developer" else role
        content = _content_text(item.get("content"), where)
        calls = item.get("tool_calls") or ([{"function": item["function_call"]}] if item.get("function_call") else [])
        if content or not calls:
            kept = {key: item[key] for key in ("metadata", "tools") if item.get(key) is not None}
            result.append(check_message({"role": role, "content": content, **kept}, where))
        result += [_tool_call_message(call, where, chat_format) for call in calls]
    if tools:
        if not result or result[0]["role"] != "system":
            result.insert(0, {"role": "system", "content": chat_format.tools_system_prompt})
        result[0]["tools"] = copy.deepcopy(list(tools) if not isinstance(tools, Mapping) else dict(tools))
    return result


def _content_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(check_text(part["text"], f"a text part of {where}") for part in content)
    raise TypeError(f"the content of {where} must be a string or a list of text parts: the models read text only")


def _tool_call_message(call: Any, where: str, chat_format: ChatFormat) -> Message:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            raise TypeError(f"the arguments must be a JSON object, not {type(arguments).__name__}")
        return chat_format.tool_call_message(name, arguments)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"a tool call of {where} needs function.name and function.arguments (JSON): {error}"
        raise ValueError(reason) from error


def pairs_from_messages(messages: Sequence[Any], chat_format: ChatFormat) -> tuple[list[Pair], str | None]:
    """Converts chat messages for a model that takes pairs: (answered pairs, the open question or None).

    Such a model has no system message: its text goes before the first question, separated by a line break.

    Raises:
        ValueError: the messages are not user and assistant in turn, after at most one system message.
    """
    system, pairs, question = "", [], None
    for index, message in enumerate(normalize_messages(messages, None, chat_format)):
        role, content = message["role"], message["content"]
        if role == "system" and index == 0 and not message.get("tools"):
            system = f"{content}\n" if content else ""
        elif role == "user" and question is None:
            question, system = system + content, ""
        elif role == "assistant" and question is not None and not message.get("metadata"):
            pairs.append((question, content))
            question = None
        else:
            raise ValueError(
                f"messages[{index}] has the role {role!r}: this model takes user and assistant messages in turn, "
                "after at most one system message without tools"
            )
    if question is None and not pairs:
        raise ValueError("a conversation needs a user message")
    return pairs, question
