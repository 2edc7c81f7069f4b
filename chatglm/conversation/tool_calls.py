"""Writes and parses tool calls of generation 3; never runs what a model writes."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from .history import Message

# The closing fence is on a line of its own: the arguments of a call may contain backticks.
_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:\n```|```\s*\Z|\Z)", re.DOTALL)
_RAW_STRING = re.compile(r"""\b[brf]*r[brf]*['"]""", re.IGNORECASE)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def is_argument_name(key: str) -> bool:
    """Whether `key=value` is an argument of this name; Python itself normalises names."""
    return key.isidentifier() and not iskeyword(key) and unicodedata.normalize("NFKC", key) == key


def tool_call_message(name: str, parameters: Mapping[str, Any]) -> Message:
    """The assistant message that calls a tool in generation 3; `parse_response` reads it back."""
    if all(map(is_argument_name, parameters)):
        arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    else:
        arguments = f"**{dict(parameters)!r}"
    return {"role": "assistant", "metadata": name, "content": f"```python\ntool_call({arguments})\n```"}


def parse_call(name: str, content: str) -> dict[str, Any]:
    fence = _FENCE.search(content)
    code = (fence[1] if fence else content).strip()
    try:
        return {"name": name, "parameters": _parse_arguments(code, name)}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        call: dict[str, Any] = {"name": name, "parameters": None, "content": content}
        if name != "interpreter":
            call["error"] = f"the tool call cannot be read: {str(error) or type(error).__name__}"
        return call


def _parse_arguments(code: str, name: str) -> dict[str, Any]:
    """Parses `tool_call(key=literal, …)` or a JSON object into a dict, without running anything."""
    if code[:1] == "{":
        value = json.loads(code)
        return value["arguments"] if set(value) == {"name", "arguments"} and value["name"] == name else value
    if not _RAW_STRING.search(code):  # a lone backslash, as in "C:\\dir", must not cause a warning
        code = _ESCAPE.sub(lambda pair: pair[0] if pair[1] in "\n\\'\"abfnrtvxuUN01234567" else "\\" + pair[0], code)
    call = ast.parse(code, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in ("tool_call", name):
        raise ValueError("it is not of the form tool_call(key=value, …)")
    if call.args:
        raise ValueError("every argument needs a name")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        value = ast.literal_eval(_JsonNames().visit(keyword.value))
        given = {keyword.arg: value} if keyword.arg is not None else value  # `**{…}`
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given) or set(given) & set(arguments):
            raise ValueError("an argument is given twice, or without a name")
        arguments |= given
    return arguments


def arguments_so_far(name: str, content: str) -> dict[str, Any]:
    """Returns the arguments of an unfinished `tool_call(…)` that are already final, in their order."""
    code = content.lstrip()
    if code.startswith("```"):
        code = code.partition("\n")[2].lstrip()
    head, bracket, _ = code.partition("(")
    if not bracket or head.strip() not in ("tool_call", name):
        return {}
    depth, quote, end, place = 0, "", 0, len(head)
    while place < len(code):
        here = code[place]
        if quote:
            if here == "\\":
                place += 1
            elif code.startswith(quote, place):
                place += len(quote) - 1
                quote = ""
        elif here in "'\"":
            quote = here * 3 if code.startswith(here * 3, place) else here
            place += len(quote) - 1
        elif here in "([{":
            depth += 1
        elif here in ")]}":
            depth -= 1
        if depth == 0 or (here == "," and depth == 1 and not quote):
            end = place
        if depth == 0:
            break
        place += 1
    try:
        return _parse_arguments(code[:end] + ")", name) if end else {}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return {}


class _JsonNames(ast.NodeTransformer):
    """Models mix up Python and JSON: `true`, `false` and `null` count as `True`, `False` and `None`."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        names = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(names[node.id]), node) if node.id in names else node
