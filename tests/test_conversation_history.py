"""Histories are copied, and errors name what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from chatglm.conversation import encode_conversation, fit_conversation, validate_history
from conversations import TOOLS, tiny
from deviations import DEVIATIONS


def test_a_history_is_copied() -> None:
    pairs = [["q", "a"]]
    assert validate_history(1, pairs) == validate_history(2, pairs) == [("q", "a")] and pairs == [["q", "a"]]
    system = {"role": "system", "content": "s", "tools": TOOLS}
    copied = validate_history(3, [system])
    copied[0]["tools"][0]["name"] = "other"
    assert TOOLS[0]["name"] == "get_weather"
    assert validate_history(3, None) == validate_history(1, ()) == []


@pytest.mark.parametrize(
    ("version", "history", "error", "match"),
    [
        (1, "text", TypeError, "history must be a list, not str"),
        (2, {"role": "user"}, TypeError, "history must be a list, not dict"),
        (3, 7, TypeError, "history must be a list, not int"),
        (1, [("q",)], ValueError, r"history\[0\] must be a \(question, answer\) pair, but has 1 items"),
        (1, [("q", "a"), ("q", 5)], TypeError, r"the answer of history\[1\] must be a string, not int"),
        (2, [("q", "a", None)], ValueError, "has 3 items"),
        (2, ["qa"], TypeError, r"history\[0\] must be a \(question, answer\) pair, not str"),
        (2, [{"role": "user", "content": "q"}], TypeError, "For role dicts use tokenizer.apply_chat_template"),
        (3, [("q", "a")], TypeError, "pairs are for ChatGLM-6B, ChatGLM2-6B and VisualGLM-6B"),
        (3, [{"role": "user"}], ValueError, "needs the keys 'role' and 'content'"),
        (3, [{"role": "tool", "content": ""}], ValueError, "unknown role 'tool': use one of system, user"),
        (3, [{"role": [], "content": ""}], ValueError, "unknown role"),
        (3, [{"role": "user", "content": None}], TypeError, r"the content of history\[0\] must be a string"),
        (3, [{"role": "assistant", "content": "", "metadata": 3}], TypeError, "the metadata of"),
        (3, [{"role": "system", "content": "", "tools": "get_weather"}], TypeError, "must be a list of tool"),
    ],
)
def test_a_history_of_the_wrong_shape(version: int, history: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        validate_history(version, history)
    with pytest.raises(error, match=match):
        encode_conversation(tiny(version), "q", history)
    with pytest.raises(error, match=match):
        fit_conversation(tiny(version), "q", history, 1000)


def test_queries_and_roles() -> None:
    for version in (1, 2, 3):
        with pytest.raises(TypeError, match="the query must be a string, not NoneType"):
            encode_conversation(tiny(version), None)  # type: ignore[arg-type]
        assert encode_conversation(tiny(version), "")
    for version in (1, 2):
        with pytest.raises(ValueError, match="for ChatGLM3-6B and GLM-4-9B only"):
            encode_conversation(tiny(version), "q", role="system")
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        encode_conversation(tiny(3), "q", role="tool")
    system = [{"role": "system", "content": "", "tools": [{"name": object()}]}]
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        encode_conversation(tiny(3), "q", system)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("history", "meant"),
    [
        ([(None, "Hello!"), ["a", "b"]], [("", "Hello!"), ("a", "b")]),  # a greeting before the first question
        ([["", "Hello!"]], [("", "Hello!")]),
        ([[], ("a", "b"), [None, None]], [("a", "b")]),  # rounds in which nothing was said
        ((("a", "b"), ["c", "d"]), [("a", "b"), ("c", "d")]),
        ([["a", "b"], ["q", None]], [("a", "b")]),  # "q" is being asked
        ([["a", None], ["c", "d"]], [("a", ""), ("c", "d")]),  # the answer to "a" was interrupted
        ([["a", None]], [("a", "")]),
        ([["q", "b"]], [("q", "b")]),  # asked once more
        ([["q", ""]], [("q", "")]),  # an answer, if an empty one, as in the originals
        ([[]], []),
    ],
)
def test_histories_of_pairs_as_front_ends_make_them(version: int, history: Any, meant: Any) -> None:
    assert DEVIATIONS["none_is_no_text"]
    before = copy.deepcopy(history)
    assert encode_conversation(tiny(version), "q", history) == encode_conversation(tiny(version), "q", meant)
    assert fit_conversation(tiny(version), "q", history, 1000)[1] == meant
    assert tiny(version).chat_format.validate(history, "q") == meant and history == before


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ASKED = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("history", "meant"),
    [
        ([ASSISTANT, USER], [ASSISTANT, USER]),  # a greeting before the first question
        ([USER, ASSISTANT, ASKED, {"role": "assistant", "content": None}], [USER, ASSISTANT]),
        ([USER, {"role": "assistant", "content": None}], [USER]),  # "a" has no answer
        (
            [USER, {"role": "assistant", "content": None, "metadata": "tool"}, USER],
            [USER, {"role": "assistant", "content": "", "metadata": "tool"}, USER],
        ),
        ([USER, {**ASSISTANT, "metadata": {"title": None}, "options": None}], [USER, {**ASSISTANT, "options": None}]),
        ([USER, ASSISTANT, ASKED], [USER, ASSISTANT, ASKED]),  # asked twice, as in the original
        (({"role": "assistant", "content": None},), []),
    ],
)
def test_role_histories_as_front_ends_make_them(history: Any, meant: Any) -> None:
    before = copy.deepcopy(history)
    assert encode_conversation(tiny(3), "q", history) == encode_conversation(tiny(3), "q", meant)
    assert fit_conversation(tiny(3), "q", history, 1000)[1] == meant
    assert tiny(3).chat_format.validate(history, "q") == meant and history == before
