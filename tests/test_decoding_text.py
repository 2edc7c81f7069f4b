"""The text of an answer while its tokens come: incremental decoding, stop strings, stop tokens."""

from __future__ import annotations

import random

import pytest

from chatglm.decoding.options import GenerationOptions
from chatglm.decoding.text import AnswerText, IncrementalDecoder

TEXTS = [
    "plain text with several words, nothing more",
    "混合 text 与中文，还有 emoji 😀👨‍👩‍👧 和 \t tabs\n\nnew lines   blanks",
    "e\u0301 combining, \u200d joiners, 𠮷 outside of the BMP" * 5,
    "literal \ufffd character \ufffd\ufffd in the middle",
]


def byte_decode(ids: list[int]) -> str:
    """A vocabulary of bytes; id 256 is the word ' word' and id 257 a replacement character that is meant."""
    parts = b"".join({256: b" word", 257: "\ufffd".encode()}.get(i, bytes([i]) if i < 256 else b"") for i in ids)
    return parts.decode("utf-8", errors="replace")


@pytest.mark.parametrize("window", [IncrementalDecoder.WINDOW, 20, 17])
@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_by_whole_characters_to_the_whole_text(
    text: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IncrementalDecoder, "WINDOW", window)
    ids = list(text.encode()) + [256] * 3
    decoder = IncrementalDecoder(byte_decode)
    shown = ""
    for token in ids:
        now = decoder.push(token)
        assert now.startswith(shown)
        assert text.startswith(now) or now.startswith(text)
        shown = now
    assert decoder.flush() == byte_decode(ids)


def test_random_bytes_decode_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IncrementalDecoder, "WINDOW", 24)
    for seed in range(200):
        rng = random.Random(seed)
        ids = [rng.choice([rng.randrange(256), 256, 257, ord("a")]) for _ in range(120)]
        decoder = IncrementalDecoder(byte_decode)
        shown = ""
        for token in ids:
            now = decoder.push(token)
            assert now.startswith(shown)
            shown = now
        assert decoder.flush() == byte_decode(ids)


@pytest.mark.parametrize(
    ("said", "shown"),
    [("text </en", "text "), ("text #", "text "), ("text", "text"), ("a < b", "a < b"), ("<", "")],
)
def test_a_started_stop_string_is_held_back(said: str, shown: str) -> None:
    answer = AnswerText(GenerationOptions(stop_strings=["</end>", "##"]), byte_decode)
    texts = [answer.push(token, None) for token in said.encode()]
    assert texts[-1] == (shown, None)
    assert answer.push(None, "length") == (said, "length")  # nothing came that would complete it


@pytest.mark.parametrize("stops", [["STOP", "##"], "STOP"])
def test_a_stop_string_ends_the_answer_before_it(stops: str | list[str]) -> None:
    answer = AnswerText(GenerationOptions(stop_strings=stops), byte_decode)
    steps = [answer.push(token, None) for token in b"one STtwo STOP"]
    assert steps[-1] == ("one STtwo ", "stop")
    assert all("one STtwo ".startswith(text) and reason is None for text, reason in steps[:-1])


def test_a_stop_token_is_counted_and_not_shown() -> None:
    answer = AnswerText(GenerationOptions(eos_token_id=[256]), byte_decode)
    assert answer.push(ord("a"), None) == ("a", None)
    assert answer.push(256, "stop") == ("a", "stop")
    assert answer.tokens == 2
