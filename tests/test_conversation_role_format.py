"""Prompts and answers of role messages (ChatGLM3-6B): goldens, tools in the system message, what is no tool name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from chatglm.conversation import (
    encode_conversation,
    fit_conversation,
    has_tools,
    parse_response,
    stop_token_ids,
    validate_history,
)
from conftest import needs_shared
from conversations import TOOLS, tiny
from tokenizer_goldens import deviation, golden, tokenizer


@needs_shared
def test_prompts_of_roles() -> None:
    ours, data = tokenizer("v3"), golden("chat")["v3"]
    for case in data["build_chat_input"]:
        arguments = case["case"]
        before = copy.deepcopy(arguments)
        if "error" in case["result"]:
            assert deviation("wrong_names_are_value_errors")
            with pytest.raises(ValueError, match="unknown role"):
                ours.build_chat_input(**arguments)
            continue
        found = {name: value.tolist() for name, value in ours.build_chat_input(**arguments).items()}
        assert found == case["result"]["ok"]
        ids = found["input_ids"][0]
        assert fit_conversation(ours, arguments["query"], arguments["history"], len(ids), arguments["role"])[0] == ids
        assert arguments == before
    for case in data["build_single_message"]:
        assert ours.build_single_message(*case["args"]) == case["ids"]


@needs_shared
def test_histories_and_stop_tokens_of_roles() -> None:
    *cases, wrong = golden("chat")["v3"]["chat"]
    assert wrong["case"]["role"] == "tool" and wrong["result"]["error"] == "AssertionError"  # as above
    for case in cases:
        query, history, role = (case["case"][key] for key in ("query", "history", "role"))
        expected = case["result"]["ok"]
        if expected["caller_history_after"] is not None:
            assert deviation("arguments_are_left_alone")
            assert expected["caller_history_after"] == [*history, {"role": role, "content": query}]
        assert stop_token_ids(tokenizer("v3")) == expected["generate_kwargs"]["eos_token_id"]
        response = parse_response(3, f"\n {expected['response']}", has_tools(history))
        assert response.content == expected["response"]
        before = validate_history(3, history)
        assert [*before, {"role": role, "content": query}, *response.messages] == expected["new_history"]


@needs_shared
def test_answers_of_roles() -> None:
    kept = 0
    for case in golden("chat")["v3"]["process_response"]:
        content, history = case["result"]["ok"]
        assert not case["caller_history_mutated"]
        response = parse_response(3, case["inp"], has_tools(case["history"]))
        if content == {"name": "interpreter", "parameters": None}:
            assert deviation("interpreter_code_is_kept")
            content, kept = {**content, "content": "```python\nprint(1)\n```"}, kept + 1
        assert response.content == content
        assert [*case["history"], *response.messages] == history
    assert kept == 1


@pytest.mark.parametrize(("tools", "text"), [([], "\n[]"), ({}, "\n{}"), ((), "\n[]"), (None, "")])
def test_an_empty_list_of_tools_is_written(tools: Any, text: str) -> None:
    """The original asks whether the key is there, for the prompt and for the answer."""
    ours, history = tiny(3), [{"role": "system", "content": "s", "tools": tools}]
    assert tools is not None or deviation("none_is_not_written")
    messages = [*history, {"role": "user", "content": "q"}]
    written = [{"role": "system", "content": f"s{text}"}]
    expected = encode_conversation(ours, "q", written)
    assert expected[2 : -len(encode_conversation(ours, "q")) + 2] == ours.build_single_message("system", "", f"s{text}")
    assert encode_conversation(ours, "q", history) == ours.build_chat_input("q", history)["input_ids"][0].tolist()
    assert encode_conversation(ours, "q", history) == expected
    assert fit_conversation(ours, "q", history, len(expected)) == (expected, history)
    assert ours.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    assert has_tools(history) == (tools is not None)
    call = parse_response(3, "get_weather\n```python\ntool_call(city='x')\n```", has_tools(history)).content
    assert isinstance(call, dict) and ("parameters" in call) == (tools is not None)


def test_tools_of_a_message_that_is_no_system_message() -> None:
    assert deviation("tools_belong_to_a_system_message")
    for role in ("user", "assistant", "observation"):
        with pytest.raises(ValueError, match=rf"history\[0\] has tools and the role '{role}'"):
            encode_conversation(tiny(3), "q", [{"role": role, "content": "c", "tools": TOOLS}])
        plain = encode_conversation(tiny(3), "q", [{"role": role, "content": "c"}])
        assert encode_conversation(tiny(3), "q", [{"role": role, "content": "c", "tools": []}]) == plain


def test_metadata_that_is_none() -> None:
    assert deviation("none_is_not_written")
    with_none, without = ({"role": "assistant", "content": "c"} | extra for extra in ({"metadata": None}, {}))
    assert encode_conversation(tiny(3), "q", [with_none]) == encode_conversation(tiny(3), "q", [without])


def test_wrapped_tools_are_unwrapped() -> None:
    assert deviation("wrapped_tools_are_unwrapped")
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    prompts = [
        encode_conversation(tiny(3), "q", [{"role": "system", "content": "s", "tools": tools}])
        for tools in (TOOLS, wrapped)
    ]
    assert prompts[0] == prompts[1]
    assert json.dumps(TOOLS, indent=4, ensure_ascii=False) in tiny(3).decode(prompts[0])


@pytest.mark.parametrize(
    "text", ["你好", "Sure, here it is:\n```python\nprint(1)\n```", "Hello\nworld", "1.\n```\n2\n```", "get_weather"]
)
def test_a_first_line_that_is_no_tool_name(text: str) -> None:
    assert deviation("a_first_line_that_is_no_name_is_text")
    for with_tools in (True, False):
        response = parse_response(3, text, with_tools)
        assert response.content == text
        assert response.messages == [{"role": "assistant", "metadata": "", "content": text}]
