"""Checks the body of a request before anything is made of it: UTF-8, JSON, not too many values, not too deep."""

from __future__ import annotations

import json
from typing import Any

#: Values in a body, and keys of one object: 4 MB can hold two million values, which take gigabytes when checked.
MOST_VALUES, MOST_KEYS = 2**17, 4096
#: Maximum nesting of lists and objects in a request: copying and printing them recurses on Python's stack.
MOST_NESTED = 100
#: Digits of a number: reading long ones takes time that grows with their square.
MOST_DIGITS = 4000


def check_json(body: bytes) -> None:
    """Raises ValueError, with a reason for the client, unless the body is JSON that the server is willing to read.

    The size is counted before anything is parsed; then the first error ends the work.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    if _values(body) > MOST_VALUES:
        raise ValueError(f"the body holds more than {MOST_VALUES} values: send fewer at once")
    try:
        values = json.loads(text, parse_int=_whole_number, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(f"more than {MOST_NESTED} lists and objects inside each other") from error
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    check_text(values)


def _values(body: bytes) -> int:
    """Counts the values in JSON from above without parsing it: none is without a comma or a bracket before it."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = plain.count(b'"')
    if quotes > 2 * MOST_VALUES:
        return quotes // 2
    outside = b"".join(plain.split(b'"')[::2])
    return 1 + sum(map(outside.count, (b",", b"[", b"{")))


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has more than {MOST_DIGITS} digits")
    return int(digits)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def check_text(values: Any) -> Any:
    """Returns `values`. Raises ValueError for what JSON allows: half surrogate pairs, deep nesting, very many keys."""
    pending = [(values, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError("a string holds half of a surrogate pair, which is not valid text") from error
        elif isinstance(value, (dict, list)):
            if depth == MOST_NESTED:
                raise ValueError(f"more than {MOST_NESTED} lists and objects inside each other")
            if isinstance(value, dict) and len(value) > MOST_KEYS:
                raise ValueError(f"an object has more than {MOST_KEYS} keys")
            inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            pending += [(part, depth + 1) for part in inside]
    return values
