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
    """Returns a new list of `check(item, where)` for each item, without those for which it is None.

    Raises TypeError if `history` is not a list.
    """
    if history is None:
        return []
    if not _is_list(history):
        raise TypeError(f"history must be a list, not {type(history).__name__}")
    checked = [check(item, f"history[{index}]") for index, item in enumerate(history)]
    return [item for item in checked if item is not None]


def pairs_before(history: Any, query: str) -> Any:
    """Returns a history of pairs without the round of `query` that a front end has noted: (query, None) at the end."""
    last = history[-1] if _is_list(history) and history else None
    if isinstance(last, (tuple, list)) and len(last) == 2 and last[0] == query and last[1] is None:
        return history[:-1]
    return history


def messages_before(history: Any, query: str) -> Any:
    """Returns a history of role messages without the turn of `query` that a front end has noted.

    That is an assistant's message with the content None at the end, and the user's message before it, if that is
    `query`.
    """
    last = history[-1] if _is_list(history) and history else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or last.get("content", "") is not None:
        return history
    if _without_blanks(last).get("metadata"):
        return history  # a call of a tool
    before = history[:-1]
    asked = before[-1] if before else None
    noted = isinstance(asked, Mapping) and asked.get("role") == "user" and asked.get("content") == query
    return before[:-1] if noted else before


def _is_list(history: Any) -> bool:
    return isinstance(history, Sequence) and not isinstance(history, (str, bytes))


def check_pair(item: Any, where: str) -> Pair | None:
    """Returns a copy of a (question, answer) pair, or None for an empty round (`[]`, or None twice).

    None is an empty text: a greeting has no question, an interrupted round no answer. (The originals wrote "None".)

    Raises:
        TypeError, ValueError: the pair is malformed.
    """
    if isinstance(item, Mapping):
        raise TypeError(
            f"{where} is a dict; this model takes (question, answer) pairs. "
            "For role dicts use tokenizer.apply_chat_template"
        )
    if not isinstance(item, (tuple, list)):
        raise TypeError(f"{where} must be a (question, answer) pair, not {type(item).__name__}")
    if not item:
        return None
    if len(item) != 2:
        raise ValueError(f"{where} must be a (question, answer) pair, but has {len(item)} items")
    if item[0] is None and item[1] is None:
        return None
    question, answer = ("" if text is None else text for text in item)
    return check_text(question, f"the question of {where}"), check_text(answer, f"the answer of {where}")


def check_message(item: Any, where: str, roles: Sequence[str] = ROLES) -> Message:
    """Returns a copy of a role message. Raises TypeError or ValueError if it is malformed.

    An answer's content may be None, which is an empty text; so may be the values of metadata that is a dict, as in
    Gradio's messages.
    """
    if isinstance(item, Mapping):
        item = _without_blanks(item)
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


def _without_blanks(item: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(item)
    if kept.get("role") == "assistant" and kept.get("content", "") is None:
        kept["content"] = ""
    metadata = kept.get("metadata")
    if isinstance(metadata, Mapping) and all(value is None for value in metadata.values()):
        del kept["metadata"]
    return kept


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
