"""/tokenize and /detokenize: what the other routes read, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from live_server import CONTEXT, Live, Parrot, serve


@pytest.fixture(scope="module", params=[1, 2, 3])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    engine = Parrot(request.param)
    with serve(engine) as live:
        yield live
    engine.close()


@pytest.mark.parametrize("text", ["", "你好, world", "a\n\n  b 😀 [gMASK] <|user|>"])
def test_a_text_and_back(live: Live, text: str) -> None:
    plain = live.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == live.engine.tokenizer.encode_text(text)
    assert (plain["count"], plain["max_model_len"], plain["token_strs"]) == (len(plain["tokens"]), CONTEXT, None)
    assert live.http.post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": text}
    whole = live.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert whole["tokens"] == live.engine.tokenizer(text)["input_ids"]
    assert whole["token_strs"] == live.engine.tokenizer.convert_ids_to_tokens(whole["tokens"])


def test_messages_are_the_prompt_of_a_chat(live: Live) -> None:
    messages: list[Any] = [{"role": "user", "content": "你好"}]
    found = live.http.post("/tokenize", json={"messages": messages}).json()
    assert found["count"] == len(found["tokens"]) == live.chat(messages, max_tokens=1).usage.prompt_tokens
    open_one = live.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert open_one["count"] < found["count"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("tokenize", {}, "either prompt or messages"),
        ("tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "either prompt or messages"),
        ("tokenize", {"prompt": "x", "colour": 1}, "colour"),
        ("tokenize", {"prompt": "x", "add_generation_prompt": True}, "goes with messages"),
        ("tokenize", {"messages": [{"role": "king", "content": "x"}]}, "role"),
        ("tokenize", {"prompt": "x" * (2**20 + 1)}, "at most 1048576 characters"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [10**8]}, "token ids must be from 0"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [1] * (2**16 + 1)}, "at most 65536 items"),
    ],
)
def test_what_cannot_be_done_is_said(live: Live, path: str, body: dict[str, Any], reason: str) -> None:
    response = live.http.post(f"/{path}", json=body)
    assert response.status_code in (400, 422) and reason in response.json()["error"]["message"], response.text


def test_a_model_that_is_not_there(live: Live) -> None:
    assert live.http.post("/tokenize", json={"prompt": "x", "model": "gpt-9"}).status_code == 404
