"""The history of a conversation, checked: pairs for generations 1 and 2, role dicts for 3."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "observation")

Pair = tuple[str, str]
Message = dict[str, Any]


def validate_history(version: int, history: Sequence[Any] | None) -> list[Any]:
    """A fresh copy of a history, checked: `(question, answer)` tuples for 1 and 2, role dicts for 3.

    Raises:
        TypeError: the history or one of its items has the wrong type.
        ValueError: a pair has not two items, a role is unknown or a key is missing.
    """
    if history is None:
        return []
    if isinstance(history, (str, bytes)) or not isinstance(history, Sequence):
        raise TypeError(f"history must be a list, not {type(history).__name__}")
    check = check_message if version == 3 else _check_pair
    return [check(item, f"history[{index}]") for index, item in enumerate(history)]


def _check_pair(item: Any, where: str) -> Pair:
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


def check_message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        is_pair = isinstance(item, (tuple, list))
        hint = "; (question, answer) pairs are for ChatGLM-6B and ChatGLM2-6B" if is_pair else ""
        raise TypeError(
            f"{where} must be a dict like {{'role': 'user', 'content': '…'}}, not {type(item).__name__}{hint}"
        )
    if "role" not in item or "content" not in item:
        raise ValueError(f"{where} needs the keys 'role' and 'content', but has {sorted(map(str, item))}")
    check_role(item["role"])
    check_text(item["content"], f"the content of {where}")
    check_text(item.get("metadata") or "", f"the metadata of {where}")
    tools = item.get("tools")
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, (Sequence, Mapping))):
        raise TypeError(f"the tools of {where} must be a list of tool descriptions, not {type(tools).__name__}")
    if tools and item["role"] != "system":
        raise ValueError(f"{where} has tools and the role {item['role']!r}: tools belong to a system message")
    return {key: value if isinstance(value, str) else copy.deepcopy(value) for key, value in item.items()}


def check_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, not {type(text).__name__}")
    return text


def check_role(role: Any) -> str:
    """The role itself; ValueError for one that ChatGLM3 does not know."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}: use one of {', '.join(ROLES)}")
    return role


def check_query(version: int, query: Any, role: str) -> str:
    if version == 3:
        check_role(role)
    elif role != "user":
        raise ValueError(f"role={role!r}: roles other than 'user' are for ChatGLM3-6B only")
    return check_text(query, "the query")


def has_tools(history: Sequence[Any] | None) -> bool:
    """Whether a role history starts with a system message that carries tools, be it an empty list of them."""
    first = history[0] if history else None
    return isinstance(first, Mapping) and first.get("role") == "system" and first.get("tools") is not None
