"""/v1/responses with OpenAI's own client: whole and streamed, continued, with tools and formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from chatglm.conversation import tool_call_message
from live_server import CONTEXT, NAME, Live, Parrot, serve
from scripted import SECONDS, Hold

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": name,
        "description": "a tool",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    for name in ("weather", "get_time")
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engine = Parrot(3, max_batch=4)
    with serve(engine) as live:
        yield live
    engine.close()


def call_text(name: str, **parameters: Any) -> str:
    return f"{name}\n{tool_call_message(name, parameters)['content']}"


def ask(live: Live, content: Any, **fields: Any) -> Any:
    return live.client.responses.create(model=NAME, input=content, **fields)


def prompt_of(live: Live, messages: list[Any]) -> int:
    """The number of tokens of the prompt that a chat completion makes of these messages."""
    return int(live.chat(messages, max_tokens=1).usage.prompt_tokens)


# ---------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_answer_is_that_of_a_chat_completion(version: int) -> None:
    engine = Parrot(version)
    with serve(engine) as live:
        chat = live.chat("你好", temperature=0, max_tokens=12)
        answer = ask(live, "你好", temperature=0, max_output_tokens=12)
        assert answer.output_text == chat.choices[0].message.content
        assert (answer.object, answer.model, answer.status) == ("response", NAME, "incomplete")
        assert answer.incomplete_details.reason == "max_output_tokens"
        usage = answer.usage
        assert (usage.input_tokens, usage.output_tokens) == (chat.usage.prompt_tokens, 12)
        assert usage.total_tokens == usage.input_tokens + 12 and usage.output_tokens_details.reasoning_tokens == 0
        stopped = ask(live, live.engine.say("好"))
        assert (stopped.status, stopped.output_text, stopped.incomplete_details) == ("completed", "好", None)
        (item,) = stopped.output
        assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    engine.close()


def test_instructions_are_a_system_message(live: Live) -> None:
    system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
    assert ask(live, "x", instructions="be brief", max_output_tokens=1).usage.input_tokens == prompt_of(live, system)
    joined = [{"role": "system", "content": "be brief\nin rhymes"}, {"role": "user", "content": "x"}]
    given = [{"role": "developer", "content": "in rhymes"}, {"role": "user", "content": "x"}]
    answer = ask(live, given, instructions="be brief", max_output_tokens=1)
    assert answer.usage.input_tokens == prompt_of(live, joined) and answer.instructions == "be brief"


def test_items_of_all_kinds_are_read(live: Live) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather", "arguments": '{"city": "x"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    assert ask(live, items, max_output_tokens=1).usage.input_tokens == prompt_of(live, messages)


# ---------------------------------------------------------------------------------------------------- streams


def put_together(events: list[Any]) -> list[tuple[str, str]]:
    """The output as a client builds it from the events: (kind, text or arguments) of each item."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    items: list[Any] = []
    closed: list[int] = []
    for event in events:
        if event.type == "response.output_item.added":
            assert event.output_index == len(items) and len(closed) == len(items)
            items.append([event.item.type, "", event.item.id])
        elif event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
            assert event.output_index == len(items) - 1 and event.item_id == items[-1][2]
            items[-1][1] += event.delta
        elif event.type in ("response.output_text.done", "response.function_call_arguments.done"):
            assert items[-1][1] == (event.text if event.type == "response.output_text.done" else event.arguments)
        elif event.type == "response.output_item.done":
            closed.append(event.output_index)
    assert closed == list(range(len(items)))
    return [(kind, text) for kind, text, _ in items]


def output_of(response: Any) -> list[tuple[str, str]]:
    return [(item.type, item.content[0].text if item.type == "message" else item.arguments) for item in response.output]


@pytest.mark.parametrize(
    "text",
    [
        "好 one, two",
        call_text("weather", city="北京", days=3),
        "\nlet me see<|assistant|>" + call_text("weather", city="x") + "<|assistant|>" + call_text("get_time"),
        call_text("weather", city="x") + "<|assistant|>\nso much for that",
        "",
    ],
    ids=["text", "call", "text and calls", "call and text", "nothing"],
)
def test_the_stream_is_the_whole_answer(live: Live, text: str) -> None:
    question = live.engine.say(text)
    whole = ask(live, question, tools=TOOLS)
    events = list(ask(live, question, tools=TOOLS, stream=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[-1].type == "response.completed"
    assert put_together(events) == output_of(whole) == output_of(events[-1].response)
    assert events[-1].response.id == events[0].response.id != whole.id
    assert events[-1].response.usage == whole.usage or events[-1].response.usage.input_tokens_details.cached_tokens > 0


def test_the_stream_helper_of_the_client(live: Live) -> None:
    question = live.engine.say("one two three")
    with live.client.responses.stream(model=NAME, input=question) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "one two three"


def test_events_have_their_names_on_the_wire(live: Live) -> None:
    body = {"input": live.engine.say("a b"), "stream": True}
    with live.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    names, data = lines[::2], lines[1::2]
    assert len(names) == len(data) and names[-1] == "event: response.completed"
    for name, event in zip(names, data, strict=True):
        assert name == f"event: {json.loads(event.removeprefix('data: '))['type']}"


def test_a_stream_that_fails_says_so(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatglm.generation import NonFiniteLogitsError

    def fail(*args: Any) -> Any:
        raise NonFiniteLogitsError("the model gave NaN")

    question, hold = live.engine.hold()
    hold.go_on.set()
    monkeypatch.setattr(type(hold), "__call__", fail)
    events = list(ask(live, question, stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2].message == events[-1].response.error.message == "the model gave NaN"
    with pytest.raises(openai.InternalServerError, match="the model gave NaN"):
        ask(live, question)
    with pytest.raises(openai.NotFoundError):
        live.client.responses.retrieve(events[-1].response.id)


def test_closing_the_stream_frees_the_engine() -> None:
    with serve(Parrot(3, max_batch=1)) as live:
        hold = Hold(after=8)
        stream = ask(live, live.engine.say("x " * 900, hold), stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        stream.close()
        assert live.http.get("/health").status_code == 200  # so the server knows it
        hold.go_on.set()
        assert live.engine.ended["cancelled"].wait(SECONDS)
        assert ask(live, "x", max_output_tokens=2, temperature=0).status == "incomplete"


def test_logprobs(live: Live) -> None:
    question = live.engine.say("a b 😀")
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = ask(live, question, **fields).output[0].content[0]
    said = b"".join(bytes(token.bytes) for token in whole.logprobs)
    assert said.decode().strip() == whole.text == "a b 😀"
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in whole.logprobs)
    events = list(ask(live, question, stream=True, **fields))
    final = events[-1].response.output[0].content[0].logprobs
    assert [token.token for token in final] == [token.token for token in whole.logprobs]
    deltas = [token.token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert deltas == [token.token for token in final][: len(deltas)] and len(deltas) >= 3
    assert ask(live, question).output[0].content[0].logprobs == []


# ---------------------------------------------------------------------------------------------------- kept responses


def test_a_response_is_continued(live: Live) -> None:
    first = ask(live, live.engine.say("one"), instructions="only once")
    second = ask(live, "and then?", previous_response_id=first.id, max_output_tokens=1)
    asked: list[Any] = [
        {"role": "user", "content": first_question(live)},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "and then?"},
    ]
    assert second.usage.input_tokens == prompt_of(live, asked)  # the instructions are not carried over
    assert second.previous_response_id == first.id
    third = ask(live, "x", previous_response_id=second.id, max_output_tokens=1)
    assert third.usage.input_tokens > second.usage.input_tokens
    streamed = list(ask(live, live.engine.say("two"), previous_response_id=first.id, stream=True))[-1].response
    assert ask(live, "x", previous_response_id=streamed.id, max_output_tokens=1).usage.input_tokens > 0


def first_question(live: Live) -> str:
    """The question of the last answer that the test has prepared."""
    return f"say {len(live.engine.answers) - 1} please"


def test_responses_are_read_and_deleted(live: Live) -> None:
    made = ask(live, live.engine.say("好"), metadata={"a": "b"})
    found = live.client.responses.retrieve(made.id)
    assert found.output_text == "好" and found.metadata == {"a": "b"} and found == made
    live.client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        live.client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        live.client.responses.delete(made.id)
    with pytest.raises(openai.BadRequestError, match="there is no response") as error:
        ask(live, "x", previous_response_id=made.id)
    assert error.value.code == "previous_response_not_found"


def test_what_must_not_be_stored_is_not(live: Live) -> None:
    made = ask(live, "x", store=False, max_output_tokens=1)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        live.client.responses.retrieve(made.id)


# ---------------------------------------------------------------------------------------------------- tools, formats


def test_a_tool_is_called_and_its_result_answered(live: Live) -> None:
    items: list[Any] = [{"role": "user", "content": live.engine.say(call_text("weather", city="北京"))}]
    first = ask(live, items, tools=TOOLS)
    (call,) = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "北京"})
    assert call.call_id.startswith("call_") and call.id.startswith("fc_")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": live.engine.say("晴")}
    answer = ask(live, [*items, *first.output, result], tools=TOOLS)
    assert answer.output_text == "晴"
    again = ask(live, [result], tools=TOOLS, previous_response_id=first.id)
    assert again.output_text == "晴" and again.usage.input_tokens == answer.usage.input_tokens


def test_tool_choice(live: Live) -> None:
    listed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    for choice in ({"type": "function", "name": "get_time"}, listed):
        answer = ask(live, "x", tools=TOOLS, tool_choice=choice, max_output_tokens=40, extra_body={"seed": 1})
        assert answer.output[0].name == "get_time"
    question = live.engine.say(call_text("weather", city="x"))
    assert [item.type for item in ask(live, question, tools=TOOLS, tool_choice="none").output] == ["message"]


class Person(BaseModel):
    name: str
    age: int


def test_a_format_is_parsed(live: Live) -> None:
    pytest.importorskip("llguidance")
    # The model knows nothing; `logit_bias` ends the name soon.
    quote = live.engine.tokenizer.convert_tokens_to_ids('"')
    found = live.client.responses.parse(
        model=NAME, input="x", text_format=Person, temperature=0, extra_body={"logit_bias": {str(quote): 40}}
    )
    assert found.output_parsed is None or isinstance(found.output_parsed, Person)
    assert found.output_text.lstrip().startswith("{")
    loose = ask(live, "x", text={"format": {"type": "json_object"}}, max_output_tokens=8)
    assert loose.output_text.startswith("{") and loose.text.format.type == "json_object"


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"extra_body": {"colour": 1}}, "colour"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "only functions that the client runs"),
        ({"tools": [{"type": "function"}]}, "name"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "not among the tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": 5}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "type"),
        ({"text": {"verbosity": "high"}}, "verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["x"]}, "include"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items of the type 'item_reference'"),
        ({"input": [{"role": "king", "content": "x"}]}, r"input\[0\]: role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "reads text only"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "y"}]}, "arguments"),
        ({"input": "很长 " * CONTEXT}, "tokens and the limit"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "continue_final_message"),
    ],
)
def test_what_cannot_be_served_is_a_bad_request(live: Live, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as error:
        live.client.responses.create(**({"model": NAME, "input": "x"} | fields))
    assert error.value.type == "invalid_request_error" and error.value.param != "messages"


def test_what_asks_for_nothing_is_accepted(live: Live) -> None:
    nothing: dict[str, Any] = {
        "background": False, "conversation": None, "include": ["reasoning.encrypted_content"], "max_tool_calls": 3,
        "prompt": None, "prompt_cache_key": "k", "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled", "safety_identifier": "u", "service_tier": "auto",
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "user": "u", "tool_choice": "auto", "tools": [],
    }  # fmt: skip
    body = {"input": "x", "temperature": 0, "max_output_tokens": 3}
    wanted = live.http.post("/v1/responses", json=body).json()["output"][0]["content"]
    answer = live.http.post("/v1/responses", json=body | nothing)
    assert answer.status_code == 200 and answer.json()["output"][0]["content"] == wanted, answer.text
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        live.client.responses.create(model="gpt-9", input="x")


def test_a_list_of_the_wrong_things_ends_at_the_first(live: Live) -> None:
    response = live.http.post("/v1/responses", json={"input": [1] * 100_000})
    assert response.status_code == 400 and len(response.text) < 1000
    many = live.http.post("/v1/responses", json={"input": [{"role": "user", "content": "x"}] * 3000})
    assert many.status_code == 400 and "2048" in many.json()["error"]["message"]


def test_each_key_reads_only_its_own() -> None:
    with serve(Parrot(3), api_keys={"anna": "first", "bert": "second"}) as live:
        anna, bert = (live.client.with_options(api_key=key) for key in ("first", "second"))
        made = anna.responses.create(model=NAME, input="x", max_output_tokens=1)
        assert anna.responses.retrieve(made.id).id == made.id
        with pytest.raises(openai.NotFoundError):
            bert.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            bert.responses.delete(made.id)
        with pytest.raises(openai.BadRequestError, match="there is no response"):
            bert.responses.create(model=NAME, input="x", previous_response_id=made.id)
