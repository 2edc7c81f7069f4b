"""Fields of other clients: accepted where they ask for nothing, else refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chatglm.serving.errors import validation_message
from live_server import NAME, Live, Parrot, serve


@pytest.fixture(scope="module", params=[1, 3])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    engine = Parrot(request.param)
    with serve(engine) as live:
        yield live
    engine.close()


def chat(live: Live, **fields: Any) -> Any:
    body = {"model": NAME, "max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": "hello"}]}
    return live.http.post("/v1/chat/completions", json=body | fields)


NOTHING = {
    "max_length": 512, "prediction": None, "verbosity": None, "web_search_options": None,
    "modalities": ["text"], "prompt_cache_key": "k", "safety_identifier": "u", "reasoning_effort": None,
    "best_of": 1, "use_beam_search": False, "ignore_eos": False, "stop_token_ids": [], "skip_special_tokens": True,
    "top_k": -1, "top_logprobs": 0, "num_beams": 1, "length_penalty": 1.0, "chat_template_kwargs": {},
    "colour": None, "logit_bias": {"5": 0}, "presence_penalty": 0, "frequency_penalty": 0.0,
    "stream_options": {"include_usage": False}, "min_tokens": 0, "thinking": {"type": "disabled"},
}  # fmt: skip


def test_fields_that_ask_for_nothing_change_nothing(live: Live) -> None:
    wanted = chat(live).json()["choices"]
    for name, value in NOTHING.items():
        answer = chat(live, **{name: value})
        assert answer.status_code == 200 and answer.json()["choices"] == wanted, (name, answer.text)
    assert chat(live, **NOTHING).json()["choices"] == wanted


def test_completions_take_them_too(live: Live) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "use_beam_search": False, "top_k": -1, "prompt_cache_key": "k"}
    assert live.http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_beam_search", True),
        ("ignore_eos", True),
        ("best_of", 3),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("num_beams", 4),
        ("stop_token_ids", [5]),
    ],
)
def test_fields_that_ask_for_something_are_refused_in_one_sentence(live: Live, name: str, value: Any) -> None:
    answer = chat(live, **{name: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert error["message"] == f"this server does not support {name} = {value!r}: leave the field out"


@pytest.mark.parametrize(
    "records",
    [
        {"id": "1"},
        {"reasoning_content": None},
        {"reasoning_content": "so", "timestamp": 1.5, "model": "other"},
        {"prefix": False, "files": [], "unheard_of": None},
    ],
)
def test_messages_may_hold_a_chat_programs_records(live: Live, records: dict[str, Any]) -> None:
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    wanted = chat(live, messages=messages).json()["choices"]
    answer = chat(live, messages=[message | records for message in messages])
    assert answer.status_code == 200 and answer.json()["choices"] == wanted, answer.text
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"} | records]}]
    assert chat(live, messages=parts).json()["choices"] == chat(live).json()["choices"]


def test_messages_may_not_ask_for_what_is_not_done(live: Live) -> None:
    for wrong in ({"prefix": True}, {"images": ["x"]}, {"colour": "red"}):
        answer = chat(live, messages=[{"role": "user", "content": "x"} | wrong])
        assert answer.status_code == 400 and next(iter(wrong)) in answer.json()["error"]["message"]


def test_the_originals_options_are_honoured(live: Live) -> None:
    greedy = chat(live).json()["choices"]
    assert chat(live, do_sample=False, temperature=1.0).json()["choices"] == greedy
    prompt = chat(live).json()["usage"]["prompt_tokens"]
    assert chat(live, max_length=prompt + 2).json()["usage"]["completion_tokens"] <= 2
    assert chat(live, presence_penalty=3).status_code == chat(live, frequency_penalty=-2.5).status_code == 400


@pytest.mark.parametrize(("path", "asked"), [("chat/completions", "messages"), ("completions", "prompt")])
def test_penalties_reach_the_answer(live: Live, monkeypatch: pytest.MonkeyPatch, path: str, asked: str) -> None:
    seen: list[Any] = []
    submit_all = live.engine.submit_all

    def spy(requests: Any, *rest: Any) -> Any:
        seen.extend(requests)
        return submit_all(requests, *rest)

    monkeypatch.setattr(live.engine, "submit_all", spy)
    body = {"max_tokens": 2, "n": 2, "presence_penalty": 1.1, "frequency_penalty": -0.5}
    body[asked] = [{"role": "user", "content": "hello"}] if asked == "messages" else "hello"
    assert live.http.post(f"/v1/{path}", json=body).status_code == 200
    assert len(seen) == 2
    for ids, options in seen:
        token = torch.tensor([[*ids, 7, 7]])
        scores = options.logits_processor[0](token, torch.zeros(1, max(max(ids), 7) + 1))
        assert scores[0, 7] == pytest.approx(-1.1 + 2 * 0.5) and scores.count_nonzero() == 1


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"max_tokens": True}, "max_tokens", "max_tokens is true"),
        ({"temperature": False}, "temperature", "temperature is false"),
        ({"stop": True}, "stop", "stop is true"),
        ({"min_tokens": 9}, "min_tokens", r"min_tokens \(9\) is more than max_tokens \(4\)"),
        ({"min_tokens": 9, "max_tokens": None, "max_completion_tokens": 8}, "min_tokens", r"max_tokens \(8\)"),
        ({"messages": [{"role": "user"}]}, "messages", "a message of the role user has no content"),
        ({"messages": [{"role": "system", "content": None}]}, "messages", "of the role system has no content"),
        ({"messages": []}, "messages", "^messages: List should have at least 1 item, not 0$"),
        ({"stop": 5}, "stop", "^stop: Input should be a valid string; stop: Input should be a valid list$"),
        ({"Foo-Bar": 5}, "Foo-Bar", "^Foo-Bar: Extra inputs are not permitted$"),
        ({"logit_bias": {"5": "x"}}, "logit_bias", r"^logit_bias\.5: Input should be a valid number"),
    ],
)
def test_what_asks_for_nonsense_is_refused(live: Live, fields: dict[str, Any], param: str, match: str) -> None:
    answer = chat(live, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and re.search(match, error["message"]), answer.text


def test_an_empty_body_is_called_so(live: Live) -> None:
    answer = live.http.post("/v1/chat/completions", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "the body is empty" in answer.json()["error"]["message"]
    whole = {"loc": (), "type": "model_type", "msg": "Input should be a valid dictionary"}  # as of no field
    assert validation_message([whole]) == ("Input should be a valid dictionary", None)


def test_numbers_that_clients_send_as_texts_are_taken(live: Live) -> None:
    assert chat(live, max_tokens="2", temperature="0").json()["usage"]["completion_tokens"] == 2
