"""Checks the two kinds of history item by item: (question, answer) pairs and role messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "observation")

Pair = tuple[str, str]
#: {"role", "content"}; answers also have "metadata" (the tool that they call), system messages "tools".
Message = dict[str, Any]


def check_items(history: Sequence[Any] | None, check: Callable[[Any, str], Any]) -> list[Any]:
    """Returns a new list of `check(item, where)` for each item. Raises TypeError if `history` is not a list."""
    if history is None:
        return []
    if isinstance(history, (str, bytes)) or not isinstance(history, Sequence):
        raise TypeError(f"history must be a list, not {type(history).__name__}")
    return [check(item, f"history[{index}]") for index, item in enumerate(history)]


def check_pair(item: Any, where: str) -> Pair:
    """Returns a copy of a (question, answer) pair. Raises TypeError or ValueError if it is malformed."""
    if isinstance(item, Mapping):
        raise TypeError(
            f"{where} is a dict; this model takes (question, answer) pairs. "
            "For role dicts use tokenizer.apply_chat_template"
        )
    if not isinstance(item, (tuple, list)):
        raise TypeError(f"{where} must be a (question, answer) pair, not {type(item).__name__}")
    if len(item) != 2:
        raise ValueError(f"{where} must be a (question, answer) pair, but has {len(item)} items")
    question, answer = item
    return check_text(question, f"the question of {where}"), check_text(answer, f"the answer of {where}")


def check_message(item: Any, where: str, roles: Sequence[str] = ROLES) -> Message:
    """Returns a copy of a role message. Raises TypeError or ValueError if it is malformed."""
    if not isinstance(item, Mapping):
        raise TypeError(f"{where} must be a dict like {{'role': 'user', 'content': '…'}}, not {type(item).__name__}")
    if "role" not in item or "content" not in item:
        raise ValueError(f"{where} needs the keys 'role' and 'content', but has {sorted(map(str, item))}")
    check_role(item["role"], roles)
    check_text(item["content"], f"the content of {where}")
    check_text(item.get("metadata") or "", f"the metadata of {where}")
    tools = item.get("tools")
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, (Sequence, Mapping))):
        raise TypeError(f"the tools of {where} must be a list of tool descriptions, not {type(tools).__name__}")
    if tools and item["role"] != "system":
        raise ValueError(f"{where} has tools and the role {item['role']!r}: tools belong to a system message")
    return {key: value if isinstance(value, str) else copy.deepcopy(value) for key, value in item.items()}


def messages_of_pairs(pairs: Iterable[Pair]) -> list[Message]:
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def check_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, not {type(text).__name__}")
    return text


def check_role(role: Any, roles: Sequence[str] = ROLES) -> str:
    if role not in roles:
        raise ValueError(f"unknown role {role!r}: use one of {', '.join(roles)}")
    return role


def has_tools(history: Sequence[Any] | None) -> bool:
    """Whether a role history starts with a system message that has tools, even an empty list of them."""
    first = history[0] if history else None
    return isinstance(first, Mapping) and first.get("role") == "system" and first.get("tools") is not None
