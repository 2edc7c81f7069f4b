"""The engine for conversations: the answers of stream_steps, for many at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from chatglm.engine import Waiting
from chatglm.serving.chat_engine import ChatEngine
from scripted import Hold, Say
from tiny_chat import TOOLS_SYSTEM, pair

VERSIONS = (1, 2, 3)


def alone(model: Any, tokenizer: Any, question: str, history: Any = None, **settings: Any) -> list[Any]:
    model.clear_chat_cache()
    return said(model.stream_steps(tokenizer, question, history, **settings))


def said(steps: Any) -> list[Any]:
    """The fields of the steps, except times and cached tokens."""
    names = ("token_id", "text", "delta", "response", "history", "finish_reason", "prompt_tokens", "completion_tokens")
    return [tuple(getattr(step, name) for name in names) for step in steps]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_is_that_of_stream_steps(version: int) -> None:
    model, tokenizer = pair(version)
    settings: list[dict[str, Any]] = [
        {"do_sample": False, "max_new_tokens": 12},
        {"seed": 1, "temperature": 2.0, "max_new_tokens": 30},
        {"seed": 2, "temperature": 3.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 40},
    ]
    wanted = [alone(model, tokenizer, "你好", **one) for one in settings]
    with ChatEngine(model, tokenizer, max_batch=2) as engine:
        answers = [engine.chat("你好", **one) for one in settings]
        assert [said(answer) for answer in answers] == wanted
        history = wanted[0][-1][4]
        again = said(engine.chat("what?", history, **settings[0]))
    assert again == alone(model, tokenizer, "what?", history, **settings[0])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("text", ["好", "1+1=2", "😀 好", "get_weather", "你好 , 世界,", "[[训练时间]],对", "a\n\nb"])
def test_streamed_text_is_the_whole_text(version: int, text: str) -> None:
    model, tokenizer = pair(version)
    with ChatEngine(model, tokenizer) as engine:
        steps = list(engine.chat("x", logits_processor=[Say(tokenizer, text)], do_sample=False))
    assert "".join(step.delta for step in steps) == steps[-1].text != ""
    assert said(steps) == alone(model, tokenizer, "x", logits_processor=[Say(tokenizer, text)], do_sample=False)


@pytest.mark.parametrize("version", VERSIONS)
def test_stop_strings(version: int) -> None:
    model, tokenizer = pair(version)
    with ChatEngine(model, tokenizer) as engine:
        settings = {"logits_processor": [Say(tokenizer, "one STtwo STOP x")], "do_sample": False}
        *_, last = engine.chat("x", stop_strings=["STOP"], **settings)
    assert (last.text, last.finish_reason) == ("one STtwo", "stop")


def test_a_tool_call_is_a_dict() -> None:
    model, tokenizer = pair(3)
    call = "get_weather\n ```python\ntool_call(city='北京')\n```"
    with ChatEngine(model, tokenizer) as engine:
        *_, last = engine.chat("x", [TOOLS_SYSTEM], logits_processor=[Say(tokenizer, call)], do_sample=False)
        *_, told = engine.chat("晴", last.history, "observation", do_sample=False, max_new_tokens=2)
    assert last.response == {"name": "get_weather", "parameters": {"city": "北京"}}
    assert told.history[-2] == {"role": "observation", "content": "晴"}


def test_a_request_begins_at_once_and_closing_the_iterator_cancels_it() -> None:
    model, tokenizer = pair(3)
    with ChatEngine(model, tokenizer, max_batch=1) as engine:
        with pytest.raises(TypeError, match="unknown generation option"):
            engine.chat("x", nonsense=1)
        hold = Hold(after=3)
        answer = engine.chat("x", do_sample=False, min_new_tokens=200, logits_processor=[hold])
        later = engine.chat("x", do_sample=False, max_new_tokens=2)
        next(answer)
        answer.close()  # type: ignore[attr-defined]
        hold.go_on.set()
        assert list(later)[-1].finish_reason
    assert engine.statistics.finished["cancelled"] == 1


def test_a_queued_request_tells_its_place_and_can_be_ended_there() -> None:
    model, tokenizer = pair(3)
    with ChatEngine(model, tokenizer, max_batch=1) as engine:
        assert not any(isinstance(step, Waiting) for step in engine.chat_in_queue("x", max_new_tokens=2))
        first, second = Hold(after=3), Hold(after=20)
        running = engine.chat("x", do_sample=False, min_new_tokens=200, logits_processor=[first, second])
        next(running)
        cancel = threading.Event()
        two: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2}
        queued = [engine.chat_in_queue("x", cancel=cancel, **two), engine.chat_in_queue("x", **two)]
        assert [next(answer) for answer in queued] == [Waiting(0), Waiting(1)]
        cancel.set()
        first.go_on.set()
        assert [step.finish_reason for step in queued[0]] == ["cancelled"]
        assert next(queued[1]) == Waiting(0)
        running.close()  # type: ignore[attr-defined]
        second.go_on.set()
        assert list(queued[1])[-1].finish_reason == "length"
