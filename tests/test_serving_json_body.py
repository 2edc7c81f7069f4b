"""What a body may hold is counted before it is parsed, and the first fault ends the work."""

from __future__ import annotations

import json
import time

import pytest

from chatglm.serving.json_body import MOST_KEYS, MOST_NESTED, MOST_VALUES, check_json


def nested(depth: int) -> bytes:
    return b"[" * depth + b"1" + b"]" * depth


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "history": [["a", "b"]]}',
        b"\xef\xbb\xbf{}",
        b" 1 ",
        b'"[[[,,,{{{"',
        b'{"a": "\\\\", "b": "\\"[,"}',
        nested(MOST_NESTED),
        b"[" + b"1," * (MOST_VALUES - 3) + b"1]",
        json.dumps(["," * 10**6]).encode(),
        json.dumps(['\\"' * 10**5]).encode(),
    ],
)
def test_ordinary_bodies_pass(body: bytes) -> None:
    check_json(body)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"9" * 10_000, "more than 4000 digits"),
        (nested(MOST_NESTED + 1), "lists and objects inside each other"),
        (b"[" * 100_000, "lists and objects inside each other"),
        (b'"\\ud800"', "surrogate"),
        (json.dumps(dict.fromkeys(map(str, range(MOST_KEYS + 1)))).encode(), "keys"),
        (b"[" + b"1," * 2 * 10**6 + b"1]", "values"),
        (b"[" + b'"",' * 10**6 + b"1]", "values"),
        (b"[" + b"{}," * 10**6 + b"1]", "values"),
        (b"[" * 2 * 10**6, "values"),
    ],
)
def test_others_are_refused_quickly(body: bytes, reason: str) -> None:
    began = time.thread_time()
    with pytest.raises(ValueError, match=reason):
        check_json(body)
    assert time.thread_time() - began < 0.5  # at most 0.02 on an idle machine
