"""Answers that the client has begun (vLLM's continue_final_message)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from chatglm.chat import ids_to_text
from chatglm.conversation.shown_answer import AnswerCleaner
from live_server import Live, Parrot, serve

BEGUN = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.fixture(scope="module", params=[1, 2, 3])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    engine = Parrot(request.param)
    with serve(engine) as live:
        yield live
    engine.close()


def messages(question: str, begun: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": begun}]


@pytest.mark.parametrize("begun", ["Hello", "Hello ", "", "你好,", "list:\n\n", "  The"])
@pytest.mark.parametrize("rest", ["world", "好 !"])
def test_the_answer_goes_on_where_the_client_stopped(live: Live, begun: str, rest: str) -> None:
    question = live.engine.say(rest)
    asked: list[Any] = messages(question, begun)
    answer = live.chat(asked, extra_body=BEGUN).choices[0]
    text = answer.message.content
    assert answer.finish_reason == "stop"
    chunks = live.chat(asked, stream=True, extra_body=BEGUN)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    # Together they are what the model would have said; the tokenizer puts a space before a text, and so before `rest`.
    tokenizer = live.engine.tokenizer
    cleaner = AnswerCleaner(tokenizer)
    said = ids_to_text(tokenizer)(tokenizer.encode_text(begun) + tokenizer.encode_text(rest))
    assert tokenizer.chat_format.clean(begun + text) == cleaner.text(cleaner.messages(said)) and text.strip()


def test_the_prompt_is_that_of_an_answer_that_has_begun(live: Live) -> None:
    tokenizer = live.engine.tokenizer
    chat_format = tokenizer.chat_format
    question = [{"role": "user", "content": "x"}]
    begun = chat_format.encode_answer(tokenizer, {"role": "assistant", "content": "Hello"})
    wanted = chat_format.encode_chat(tokenizer, question) + begun
    body = {"messages": messages("x", "Hello"), **BEGUN}
    assert live.http.post("/tokenize", json=body).json()["tokens"] == wanted
    usage = live.chat(messages("x", "Hello"), max_tokens=1, extra_body=BEGUN).usage  # type: ignore[arg-type]
    assert usage.prompt_tokens == len(wanted)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ({}, "continue_final_message = true continues it"),
        (BEGUN | {"response_format": {"type": "json_object"}}, "neither response_format"),
    ],
)
def test_what_cannot_be_continued_is_said(live: Live, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        live.chat(messages("x", "y"), extra_body=fields)  # type: ignore[arg-type]


def test_a_question_cannot_be_continued(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="a last message of the assistant's"):
        live.chat("x", extra_body=BEGUN)
