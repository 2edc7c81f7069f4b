"""chat, stream_chat and stream_generate against the original code's answers, on tiny models of the full vocabulary."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import chatglm
from conftest import SHARED, needs_shared
from deviations import DEVIATIONS
from goldens import read_json, stream_model

pytestmark = needs_shared

FOLDERS = {"v1": "chatglm-6b", "v2": "chatglm2-6b", "v3": "chatglm3-6b"}
MODELS = {
    "v1": chatglm.ChatGLM1ForConditionalGeneration,
    "v2": chatglm.ChatGLM2ForConditionalGeneration,
    "v3": chatglm.ChatGLM3ForConditionalGeneration,
}
CASES = {version: {"chat": range(6), "stream_chat": range(14 if version == "v3" else 9)} for version in MODELS}
CASES["v1"]["stream_chat"] = range(6)

# (version, kind, index) -> the deviation that makes the answer another one.
DIFFERENT = {
    ("v1", "chat", 4): "a_prompt_without_room_is_an_error",
    ("v2", "chat", 4): "a_prompt_without_room_is_an_error",
    ("v2", "stream_chat", 2): "a_prompt_without_room_is_an_error",
    ("v3", "chat", 5): "a_prompt_without_room_is_an_error",
    ("v2", "stream_chat", 7): "a_cached_turn_equals_an_uncached_one",
    ("v2", "stream_chat", 8): "a_cached_turn_equals_an_uncached_one",
    ("v3", "stream_chat", 13): "a_cached_turn_equals_an_uncached_one",
    ("v1", "stream_chat", 0): "the_last_token_is_kept",
    ("v1", "stream_chat", 1): "the_last_token_is_kept",
    ("v1", "stream_chat", 2): "the_last_token_is_kept",
    ("v3", "chat", 0): "the_last_token_is_kept",
    ("v3", "chat", 3): "the_last_token_is_kept",
    ("v3", "stream_chat", 0): "the_last_token_is_kept",
    ("v3", "stream_chat", 1): "the_last_token_is_kept",
    ("v3", "stream_chat", 2): "the_last_token_is_kept",
    ("v3", "stream_chat", 8): "the_last_token_is_kept",
    ("v3", "stream_chat", 9): "a_message_boundary_is_a_line_break",
    ("v3", "stream_chat", 10): "a_streamed_call_is_text_until_it_is_whole",
    ("v3", "stream_chat", 11): "a_streamed_call_is_text_until_it_is_whole",
}


class Force(LogitsProcessor):
    """As when the goldens were made: token force[t] at step t, then the model's own scores."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.step = ids, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.step < len(self.ids):
            scores = torch.full_like(scores, -100.0)
            scores[:, self.ids[self.step]] = 100.0
        self.step += 1
        return scores


@cache
def load(version: str) -> tuple[Any, Any]:
    model = stream_model(int(version[1]), model_class=MODELS[version])
    return model, chatglm.ChatGLMTokenizer.from_pretrained(SHARED / "checkpoints" / FOLDERS[version])


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    given = {"do_sample": False, "answer_room": 1} | case["kwargs"]
    if case.get("force"):
        given["logits_processor"] = [Force(case["force"])]
    return given


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def texts(responses: list[Any]) -> list[Any]:
    """The distinct texts in order. `half_characters_are_held_back` and `blank_yields_are_left_out`."""
    distinct: list[Any] = []
    for response in responses:
        if response == "" or (isinstance(response, str) and response.endswith("\ufffd")):
            continue
        if not distinct or distinct[-1] != response:
            distinct.append(response)
    return distinct


def parameters(kind: str) -> list[Any]:
    return [(version, index) for version in MODELS for index in CASES[version][kind]]


@pytest.mark.parametrize(("version", "index"), parameters("chat"))
def test_chat(version: str, index: int) -> None:
    model, tokenizer = load(version)
    case = read_json(f"stream/{version}.json")["chat"][index]
    golden, deviation = case["result"]["ok"], DIFFERENT.get((version, "chat", index))
    assert deviation is None or deviation in DEVIATIONS
    history = plain(case["history"])
    if deviation == "a_prompt_without_room_is_an_error":
        with pytest.raises(ValueError, match=r"needs \d+ tokens, but only \d+"):
            model.chat(tokenizer, case["query"], history=history, **arguments(case))
        return
    response, new_history = model.chat(tokenizer, case["query"], history=history, **arguments(case))
    assert history == case["history"], "the caller's history was changed"
    if deviation == "the_last_token_is_kept":
        assert response.startswith(golden["response"]) and len(response) > len(golden["response"])
        return
    assert response == golden["response"]
    assert plain(new_history) == golden["new_history"]


@pytest.mark.parametrize(("version", "index"), parameters("stream_chat"))
def test_stream_chat(version: str, index: int) -> None:
    assert {"half_characters_are_held_back", "blank_yields_are_left_out"} <= set(DEVIATIONS)
    model, tokenizer = load(version)
    cases = read_json(f"stream/{version}.json")["stream_chat"]
    case, deviation = cases[index], DIFFERENT.get((version, "stream_chat", index))
    assert deviation is None or deviation in DEVIATIONS
    given = arguments(case)
    if deviation == "a_prompt_without_room_is_an_error":
        with pytest.raises(ValueError, match=r"needs \d+ tokens, but only \d+"):
            list(model.stream_chat(tokenizer, case["query"], history=case["history"], **given))
        return
    ours = list(model.stream_chat(tokenizer, case["query"], history=case["history"], **given))
    golden = [item[0] for item in case["yields"]]
    answers = texts([item[0] for item in ours])
    if deviation == "a_cached_turn_equals_an_uncached_one":
        without = {name: value for name, value in given.items() if name != "return_past_key_values"}
        again = list(model.stream_chat(tokenizer, case["query"], history=case["history"], **without))
        assert answers == texts([item[0] for item in again])
    elif deviation == "the_last_token_is_kept":
        assert answers[:-1] == texts(golden)
    elif deviation == "a_message_boundary_is_a_line_break":
        assert answers[-1] == texts(golden)[-1]
        assert answers[-2] == "first part\n \nsecond"
    elif deviation == "a_streamed_call_is_text_until_it_is_whole":
        assert all(isinstance(answer, str) for answer in answers[:-1]) and isinstance(answers[-1], dict)
        if case["error"] is None:
            assert answers[-1] == golden[-1]
        else:  # the original crashed in the middle of the call
            assert answers[: len(texts(golden))] == texts(golden)
    else:
        assert answers == texts(golden)
        if golden:
            assert plain(ours[-1][1]) == case["yields"][-1][1]


@pytest.mark.parametrize("version", MODELS)
def test_stream_generate(version: str) -> None:
    model, _ = load(version)
    golden = read_json(f"stream/{version}.json")["stream_generate_ids"]
    prompt = torch.tensor([golden[0][:-1]])
    ours = [item[0].tolist() for item in model.stream_generate(prompt, do_sample=False, max_length=len(golden[-1]))]
    assert ours == golden
    # v1: the step that reaches max_length was never yielded.
    assert "the_last_token_is_kept" in DEVIATIONS
