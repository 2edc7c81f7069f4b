"""Tools as ChatGLM3's own clients send them reach the prompt as the original wrote them there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from chatglm.serving.openai.chat_body import ChatBody
from tiny_chat import pair

PARAMS = [{"name": "city_name", "description": "the city", "type": "str", "required": True}]
OWN = {"name": "get_weather", "description": "Weather of a city", "params": PARAMS}
BARE = {"name": "get_time", "description": "Time", "parameters": {"type": "object", "properties": {}}}


def body_of(**fields: Any) -> ChatBody:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "hello"}]} | fields)
    body.check()
    return body


@pytest.mark.parametrize("field", ["tools", "functions"])
@pytest.mark.parametrize("given", [{"get_weather": OWN}, {"get_weather": OWN, "get_time": BARE}, [OWN], [BARE, OWN]])
def test_the_prompt_has_them_in_the_form_that_the_client_chose(field: str, given: Any) -> None:
    body = body_of(**{field: given})
    _, tokenizer = pair(3)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    ids = tokenizer.chat_format.encode_chat(tokenizer, messages, body.described())
    system = {"role": "system", "content": tokenizer.chat_format.tools_system_prompt, "tools": given}
    assert ids == tokenizer.chat_format.encode_chat(tokenizer, [system, *messages])
    assert json.dumps(body.described()) == json.dumps(given)
    assert {function.name for function in body.offered()} <= {"get_weather", "get_time"}


@pytest.mark.parametrize("given", [[{"type": "function", "function": BARE}], [{"type": "function", **BARE}], [BARE]])
def test_with_and_without_the_wrapper_they_are_the_same(given: Any) -> None:
    assert body_of(tools=given).described() == [BARE]


def test_a_name_may_stand_in_the_key_alone() -> None:
    nameless = {key: value for key, value in OWN.items() if key != "name"}
    assert body_of(tools={"get_weather": nameless}).described() == {"get_weather": OWN}
    assert body_of(tools={}).described() is body_of(tools=None).described() is None
    assert body_of(tools={"get_weather": OWN}, tool_choice="none").described() is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"get_weather": BARE}, "'get_weather' is not"),
        ({"type": "function", "function": OWN}, "'type' is not"),
        ({"get_weather": "Weather of a city"}, "'get_weather' is not"),
        ([OWN | {"colour": 1}], "colour"),
        ([{"type": "code_interpreter", "name": "x"}], "type"),
        ("get_weather", "tools"),
    ],
)
def test_what_is_no_tool_is_refused(given: Any, match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        body_of(tools=given)
