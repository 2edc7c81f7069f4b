"""The part of an answer that may be shown while it grows."""

from __future__ import annotations

import re

import pytest

from chatglm.conversation import clean_response, stable_response
from chatglm.conversation.shown_answer import AnswerCleaner
from conftest import needs_shared
from conversations import tiny
from tokenizer_goldens import tokenizer


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (1, "你好,世界! It's 3:00, OK? 是的; 1,2,三 [[训练时间]] a.\n\n  end  "),
        (1, "他说:[[训练 好,\n好"),
        (2, "\n [[训练时间]] x [[训练 😀 [x] [[y]]  \n"),
        (3, "\n 你好，[[训练时间]]。\n```python\nx = [[1]]\n```\n"),
        (3, "get_weather\n```python\ntool_call(city='北京')\n```"),
        (3, "no line break"),
    ],
)
def test_what_may_be_shown_of_an_answer_only_grows(version: int, text: str) -> None:
    shown = ""
    for end in range(len(text) + 1):
        for tail in ("", "\ufffd", "\ufffd\ufffd"):
            stable = stable_response(version, text[:end] + tail)
            assert stable.startswith(shown)
            shown = stable
    final = clean_response(version, text)
    assert final.startswith(shown) and len(shown) >= len(final) - 12


@needs_shared
def test_what_may_be_shown_with_generation_1s_clean_up_of_blanks() -> None:
    ours, shown = tokenizer("v1"), ""
    ids = ours.encode_text("hello , world . what ' s up ? I do n't , we 've 你好 ! 是 's")
    for end in range(len(ids) + 1):
        stable = stable_response(1, ours.decode(ids[:end]))
        assert stable.startswith(shown)
        shown = stable
    assert clean_response(1, ours.decode(ids)).startswith(shown)


@pytest.mark.parametrize(
    ("version", "raw", "parts", "shown"),
    [
        (1, " 你好,世界! ", [" 你好,世界! "], "你好，世界！"),
        (2, " 你好,世界! <|assistant|>", [" 你好,世界! <|assistant|>"], "你好,世界! <|assistant|>"),
        (3, "\n 你好<|assistant|>\n 二\n", ["\n 你好", "\n 二\n"], "你好\n\n 二"),
        (3, "\n [[训练时间]]。", ["\n [[训练时间]]。"], "2023年。"),
    ],
)
def test_an_answer_is_the_same_at_once_and_piece_by_piece(version: int, raw: str, parts: list[str], shown: str) -> None:
    at_once = AnswerCleaner(tiny(version))
    assert at_once.messages(raw) == parts
    assert at_once.text(parts) == at_once.advance(parts, whole=True) == at_once.shown == shown
    growing = AnswerCleaner(tiny(version))
    tokens = re.findall(r"(?s)<\|assistant\|>|.", raw)
    so_far = ("".join(tokens[:end]) for end in range(len(tokens) + 1))
    deltas = [growing.advance(growing.messages(text), whole=False) for text in so_far]
    deltas.append(growing.advance(parts, whole=True))
    assert "".join(deltas) == growing.shown == shown


def test_the_finished_answer_is_parsed_without_the_blanks_of_the_decoder() -> None:
    assert AnswerCleaner(tiny(1)).parse("hello , I do n't", False).content == "hello, I don't"
    call = "get_weather\n```python\ntool_call(city='x')\n```"
    assert AnswerCleaner(tiny(3)).parse(call, True).content == {"name": "get_weather", "parameters": {"city": "x"}}
