"""Prompts and answers of questions and answers (ChatGLM-6B, ChatGLM2-6B) against the goldens."""

from __future__ import annotations

import copy

import pytest

from chatglm.conversation import clean_response, encode_conversation, fit_conversation, parse_response, stop_token_ids
from conftest import needs_shared
from tokenizer_goldens import deviation, golden, tokenizer


@needs_shared
@pytest.mark.parametrize("name", ["v1", "v1_0", "v2"])
def test_prompts_of_pairs(name: str) -> None:
    ours, data = tokenizer(name), golden("chat")[name]
    for case in data["chat"]:
        query, history, (expected,) = case["query"], case["history"], case["captured"]["input_ids"]
        before = copy.deepcopy(history)
        assert not case["caller_history_mutated"] and ours.decode(expected) == case["prompt_decoded"]
        assert encode_conversation(ours, query, history) == expected
        assert fit_conversation(ours, query, history, len(expected)) == (expected, [tuple(pair) for pair in history])
        assert history == before
        inputs = {key: value.tolist() for key, value in ours.build_chat_input(query, history).items()}
        assert inputs == {key: case["captured"][key] for key in ours.model_input_names if key in case["captured"]}
        *answer_ids, stop = case["fake_generated_ids"]
        assert [stop] == stop_token_ids(ours)
        response = parse_response(ours.chatglm_version, ours.decode(answer_ids)).content
        if name == "v1_0":
            assert deviation("the_old_vocabulary_works_like_the_new") and ours.decode(answer_ids) == case["response"]
            assert golden("chat")["v1_0"]["process_response"] == "no such method in v1.0 revision"
            (new,) = {other["response"] for other in golden("chat")["v1"]["chat"]}
            assert response == new  # the same ids, 20,000 lower
            assert case["new_history"] == [*map(list, history), [query, case["response"]]]
        else:
            assert response == case["response"]
            assert [*map(list, history), [query, response]] == case["new_history"]
    for case in data.get("build_prompt", []):
        history = [pair for chat in data["chat"] if len(chat["history"]) == case["n"] for pair in chat["history"]]
        assert ours.build_prompt(data["chat"][0]["query"], history) == case["prompt"]


@needs_shared
def test_the_next_round_of_generation_2_is_a_suffix() -> None:
    """What the original sends with a cache is the end of the whole prompt."""
    ours, data = tokenizer("v2"), golden("chat")["v2"]
    for case, chat in zip(data["build_stream_inputs"], data["chat"], strict=True):
        (ids,) = case["inputs"]["input_ids"]
        assert case["n"] == len(chat["history"])
        assert encode_conversation(ours, chat["query"], chat["history"])[-len(ids) :] == ids
        assert ours.chat_format.encode_next_round(ours, chat["query"], chat["history"]) == ids
        assert case["inputs"]["attention_mask"] == [[1] * len(ids)]
        assert case["inputs"]["position_ids"] == [[*range(len(ids))]]


@needs_shared
@pytest.mark.parametrize("version", [1, 2])
def test_cleaned_answers(version: int) -> None:
    for case in golden("chat")[f"v{version}"]["process_response"]:
        assert clean_response(version, case["inp"]) == case["out"]


def test_plain_answers_of_pairs() -> None:
    response = parse_response(1, " 你好,世界! ")
    assert response.content == "你好，世界！"
    assert response.messages == [{"role": "assistant", "content": "你好，世界！"}]
    assert parse_response(2, "你好,世界!\n").content == "你好,世界!"
