"""The HTTP API over real connections: OpenAI's own client, the original contract, clients that misbehave."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import api
from chatglm.conversation import tool_call_message
from live_server import CONTEXT, NAME, Live, Parrot, serve
from ports import free_port
from scripted import SECONDS, Hold
from tiny_chat import pair
from tiny_folders import make_folder

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = (1, 2, 3)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "a tool",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "get_time")
]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[int, Live]]:
    """A server for each generation, started when it is first used."""
    running: dict[int, Any] = {}

    class Servers(dict[int, Live]):
        def __missing__(self, version: int) -> Live:
            running[version] = serve(Parrot(version, max_batch=8, max_queue=64))
            self[version] = running[version].__enter__()
            return self[version]

    yield Servers()
    for server in running.values():
        server.__exit__(None, None, None)


@pytest.fixture
def live(servers: dict[int, Live]) -> Live:
    return servers[3]


def call_text(name: str, **parameters: Any) -> str:
    return f"{name}\n{tool_call_message(name, parameters)['content']}"


def whole(stream: Any) -> tuple[str, str | None, list[Any]]:
    """Text, finish reason and tool calls, put together from the chunks."""
    text, reason = "", None
    calls: list[dict[str, str]] = []
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.index == len(calls):
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments or ""
    return text, reason, calls


# ---------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("version", VERSIONS)
def test_an_answer_is_that_of_chat(servers: dict[int, Live], version: int) -> None:
    model, tokenizer = pair(version)
    model.clear_chat_cache()
    wanted = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=12)[0]
    answer = servers[version].chat("你好", temperature=0, max_tokens=12)
    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", NAME, 1)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    parts = [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}]
    again = servers[version].chat(parts, temperature=0, max_completion_tokens=12)
    assert again.choices[0].message.content == wanted


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "text",
    ["好", "Yes", "1+1=2", "I get_ it, get_weather", "a 😀👨‍👩‍👧 b", "你好 , 世界,", "x\n\n```\ny\n```", "[训],"],
)
def test_streamed_text_is_the_whole_text(servers: dict[int, Live], version: int, text: str) -> None:
    live = servers[version]
    question = live.engine.say(text)
    answer = live.chat(question).choices[0]
    assert answer.message.content and answer.finish_reason == "stop" and not answer.message.tool_calls
    assert whole(live.chat(question, stream=True)) == (answer.message.content, "stop", [])
    if version == 3:
        with_tools = live.chat(question, tools=TOOLS)
        assert with_tools.choices[0].message.content == answer.message.content  # also where it looks like a call
        assert whole(live.chat(question, tools=TOOLS, stream=True)) == (answer.message.content, "stop", [])


def test_a_stream_has_role_reason_usage_and_an_end(live: Live) -> None:
    question = live.engine.say("one two three")
    chunks = list(live.chat(question, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    body = {"messages": [{"role": "user", "content": question}], "stream": True}
    with live.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_several_choices_seeds_and_stops(live: Live) -> None:
    def texts(**options: Any) -> list[str]:
        answer = live.chat("x", temperature=2, top_p=1, max_tokens=12, extra_body={"top_k": 0}, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert answer.usage.completion_tokens <= 12 * len(answer.choices)
        return [choice.message.content for choice in answer.choices]

    first = texts(seed=5, n=2)
    assert first == texts(seed=5, n=2) and first[0] != first[1]
    assert texts(seed=6) == first[1:]
    assert texts(seed=-1) == texts(seed=-1)
    assert texts(seed=7) != first[:1]
    chunks = list(live.chat("x", temperature=2, top_p=1, max_tokens=12, seed=5, n=2, stream=True))
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    question = live.engine.say("one two STOP three")
    answer = live.chat(question, stop=["STOP", "never"]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("one two", "stop")
    assert whole(live.chat(question, stop="STOP", stream=True))[:2] == ("one two", "stop")


def test_logprobs(live: Live) -> None:
    question = live.engine.say("a 😀 b")
    answer = live.chat(question, logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    said = b"".join(bytes(token.bytes) for token in tokens)
    assert said.decode().strip() == "a 😀 b"
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens)
    chunks = list(live.chat(question, logprobs=True, stream=True))
    streamed = [t for c in chunks for choice in c.choices if choice.logprobs for t in choice.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert all(token.top_logprobs == [] for token in streamed)


# ---------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("name", ["weather", "get_time"])
def test_a_tool_is_called_and_its_result_answered(live: Live, name: str) -> None:
    arguments = {"city": "北京, (a) '", "days": [1, 2.5, None, True], "more": {"深": "x"}}
    messages: list[Any] = [{"role": "user", "content": live.engine.say(call_text(name, **arguments))}]
    answer = live.chat(messages, tools=TOOLS).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name == name and call.id.startswith("call_")
    assert json.loads(call.function.arguments) == arguments
    text, reason, calls = whole(live.chat(messages, tools=TOOLS, stream=True))
    assert (text, reason) == ("", "tool_calls")
    assert [(one["name"], one["arguments"]) for one in calls] == [(name, call.function.arguments)]
    messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": live.engine.say("晴")}]
    assert live.chat(messages, tools=TOOLS).choices[0].message.content == "晴"


def test_arguments_come_one_by_one(live: Live) -> None:
    question = live.engine.say(call_text("weather", city="北京", days=3))
    pieces = [
        call.function.arguments
        for chunk in live.chat(question, tools=TOOLS, stream=True)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]
    assert "".join(pieces) == '{"city": "北京", "days": 3}'
    assert len(pieces) >= 3


def test_text_and_a_call_in_one_answer(live: Live) -> None:
    question = live.engine.say("\nlet me see<|assistant|>" + call_text("weather", city="x"))
    answer = live.chat(question, tools=TOOLS).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("let me see", "tool_calls")
    text, reason, calls = whole(live.chat(question, tools=TOOLS, stream=True))
    assert (text, reason, [call["name"] for call in calls]) == ("let me see", "tool_calls", ["weather"])
    two = live.engine.say(call_text("weather", city="x") + "<|assistant|>" + call_text("get_time"))
    assert len(live.chat(two, tools=TOOLS).choices[0].message.tool_calls) == 2
    assert len(live.chat(two, tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_a_call_that_cannot_be_read_comes_as_it_is(live: Live) -> None:
    question = live.engine.say("weather\n ```python\ntool_call(__import__('os').getpid())\n```")
    answer = live.chat(question, tools=TOOLS).choices[0]
    assert "__import__" in answer.message.tool_calls[0].function.arguments
    _, reason, calls = whole(live.chat(question, tools=TOOLS, stream=True))
    assert reason == "tool_calls" and calls[0]["arguments"] == answer.message.tool_calls[0].function.arguments


def test_tool_choice(live: Live) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    for choice, names in (("required", {"weather", "get_time"}), (named, {"get_time"})):
        answer = live.chat("x", tools=TOOLS, tool_choice=choice, max_tokens=40, seed=1)
        assert answer.choices[0].message.tool_calls[0].function.name in names
    question = live.engine.say(call_text("weather", city="x"))
    answer = live.chat(question, tools=TOOLS, tool_choice="none").choices[0]
    assert not answer.message.tool_calls and "tool_call" in answer.message.content
    for choice in ("required", {"type": "function", "function": {"name": "other"}}):
        with pytest.raises(openai.BadRequestError, match="not among the tools"):
            live.chat("x", tools=TOOLS if choice != "required" else [], tool_choice=choice)


def test_functions_of_the_older_format(live: Live) -> None:
    functions = [tool["function"] for tool in TOOLS]
    messages: list[Any] = [{"role": "user", "content": live.engine.say(call_text("weather", city="x"))}]
    answer = live.chat(messages, functions=functions).choices[0]
    assert answer.finish_reason == "function_call"
    assert answer.message.function_call.name == "weather"
    chunks = list(live.chat(messages, functions=functions, stream=True))
    deltas = [choice.delta.function_call for chunk in chunks for choice in chunk.choices]
    said = "".join(delta.arguments for delta in deltas if delta)
    assert said == answer.message.function_call.arguments == '{"city": "x"}'
    messages += [answer.message, {"role": "function", "name": "weather", "content": live.engine.say("晴")}]
    assert live.chat(messages, functions=functions).choices[0].message.content == "晴"


@pytest.mark.parametrize("version", (1, 2))
def test_models_without_tools_say_so(servers: dict[int, Live], version: int) -> None:
    with pytest.raises(openai.BadRequestError, match="not trained to call tools"):
        servers[version].chat("x", tools=TOOLS)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_body": {"colour": 1}}, "colour"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"n": 0}, "n:"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"stop": ""}, "empty"),
    ],
)
def test_what_cannot_be_served_is_a_bad_request(live: Live, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        live.chat("x", **options)
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize("version", VERSIONS)
def test_errors_of_conversations(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    with pytest.raises(openai.BadRequestError, match="tokens and the limit") as error:
        live.chat("很长 " * CONTEXT)
    assert error.value.code == "context_length_exceeded"
    for messages in (
        [],
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "king", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ):
        with pytest.raises(openai.BadRequestError):
            live.chat(messages)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'") as missing:
        live.client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"


def test_errors_of_http(live: Live) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/", 405)):
        response = live.http.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for path in ("/v1/chat/completions", "/"):
        for body in (b"{", b"\xff\xfe", b"[" * 20000, b'{"messages": "x"}', b"null", b'{"prompt": "\\ud800"}'):
            headers = {"content-type": "application/json"}
            response = live.http.post(path, content=body, headers=headers)
            assert response.status_code in (400, 422), body[:20]
            assert "Traceback" not in response.text and response.json()["error"]["message"]


def test_a_full_queue_is_a_rate_limit() -> None:
    with serve(Parrot(3, max_batch=1, max_queue=1)) as live:
        question, hold = live.engine.hold()
        results: list[Any] = []

        def ask(text: str) -> None:
            results.append(live.chat(text, max_tokens=1))

        threads = [threading.Thread(target=ask, args=(question,)), threading.Thread(target=ask, args=("x",))]
        threads[0].start()
        assert hold.begun.wait(SECONDS)
        threads[1].start()
        while live.engine.waiting < 1:
            assert live.http.get("/health").status_code == 200  # the event loop is free while the model works
        for options in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError, match="already waiting") as error:
                live.chat("y", **options)
            assert int(error.value.response.headers["retry-after"]) >= 1
        hold.go_on.set()
        for thread in threads:
            thread.join(SECONDS)
        assert len(results) == 2


def test_nan_is_an_error_in_a_stream_and_outside(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatglm.generation import NonFiniteLogitsError

    def fail(*args: Any) -> Any:
        raise NonFiniteLogitsError("the model gave NaN")

    question, hold = live.engine.hold()
    hold.go_on.set()
    monkeypatch.setattr(type(hold), "__call__", fail)
    with pytest.raises(openai.InternalServerError, match="the model gave NaN"):
        live.chat(question)
    with pytest.raises(openai.APIError, match="the model gave NaN"):
        list(live.chat(question, stream=True))
    monkeypatch.undo()
    assert live.chat("x", max_tokens=2, temperature=0).choices[0].finish_reason == "length"


def test_our_own_faults_do_not_show(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(live.engine, "submit_all", fail)
    response = live.http.post("/", json={"prompt": "x"})
    assert response.status_code == 500
    assert "secret" not in response.text and "Traceback" not in response.text
    with pytest.raises(openai.InternalServerError, match="its log says why"):
        live.chat("x")


# ---------------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_frees_the_engine(streaming: bool) -> None:
    with serve(Parrot(3, max_batch=1)) as live:
        question, hold = live.engine.hold()
        body = {"messages": [{"role": "user", "content": question}], "stream": streaming, "max_tokens": 900}
        text = json.dumps(body)
        connection = live.socket()
        request = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{request}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        assert hold.begun.wait(SECONDS)
        connection.close()
        # When a later request is answered, the disconnect has reached the server; the model is free at the next token.
        assert live.http.get("/health").status_code == 200
        hold.go_on.set()
        assert live.engine.ended["cancelled"].wait(SECONDS)
        assert live.chat("x", max_tokens=2, temperature=0).choices[0].finish_reason == "length"


@pytest.mark.parametrize("version", VERSIONS)
def test_closing_the_stream_of_the_client_frees_the_engine(version: int) -> None:
    with serve(Parrot(version, max_batch=1)) as live:
        hold = Hold(after=8)
        stream = live.chat(live.engine.say("x " * 900, hold), stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        assert live.http.get("/health").status_code == 200  # as above
        hold.go_on.set()
        assert live.engine.ended["cancelled"].wait(SECONDS)
        assert live.chat("x", max_tokens=2, temperature=0).choices[0].finish_reason == "length"


def test_clients_that_dawdle_do_not_stop_the_others(live: Live) -> None:
    half = live.socket()
    half.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    silent = live.socket()
    idle = live.socket()
    text = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 100})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    idle.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())  # and never read
    huge = live.socket()
    huge.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n\r\n")
    assert huge.recv(4096).startswith(b"HTTP/1.1 413")
    chunked = live.socket()
    chunked.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    block = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    try:
        for _ in range(100):
            chunked.sendall(block)
    except OSError:
        pass  # refused before it was all sent
    assert live.chat("x", max_tokens=2, temperature=0).choices[0].finish_reason == "length"
    for connection in (half, silent, idle, huge, chunked):
        connection.close()


def test_an_answer_that_takes_too_long_ends_with_an_error() -> None:
    with serve(Parrot(3), timeout=0.2) as live:
        question, hold = live.engine.hold()
        release = threading.Timer(1.0, hold.go_on.set)
        release.start()
        with pytest.raises(openai.APIError, match=r"longer than 0\.2 s"):
            list(live.chat(question, stream=True, max_tokens=200))
        release.join()


def test_many_clients_are_answered_or_refused() -> None:
    with serve(Parrot(3, max_batch=4, max_queue=16)) as live:

        async def ask(client: httpx.AsyncClient, number: int) -> int:
            body = {"prompt": f"q{number}", "max_length": 40, "temperature": 0}
            response = await client.post("/", json=body)
            assert response.status_code == 429 or len(response.json()["history"]) == 1
            return response.status_code

        async def all_of_them() -> list[int]:
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=live.url, timeout=SECONDS, limits=limits, trust_env=False) as client:
                return await asyncio.gather(*(ask(client, number) for number in range(100)))

        statuses = asyncio.run(all_of_them())
        assert set(statuses) <= {200, 429} and statuses.count(200) >= 20
        assert (live.engine.running, live.engine.waiting) == (0, 0)


# ---------------------------------------------------------------------------------------------------- the original


@pytest.mark.parametrize("version", VERSIONS)
def test_the_original_contract(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    question = live.engine.say("答案")
    body = {"prompt": question, "history": [], "max_length": 200, "top_p": 0.7, "temperature": 0.95, "other": 1}
    answer = live.http.post("/", json=body).json()
    assert set(answer) == {"response", "history", "status", "time"}
    assert (answer["response"], answer["status"]) == ("答案", 200)
    assert answer["history"] == [[question, "答案"]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", answer["time"])
    again = live.http.post("/", json={"prompt": live.engine.say("ja"), "history": answer["history"]}).json()
    assert [pair[1] for pair in again["history"]] == ["答案", "ja"]


@pytest.mark.parametrize("version", VERSIONS)
def test_zeros_of_the_original_contract_are_honoured(servers: dict[int, Live], version: int) -> None:
    model, tokenizer = pair(version)
    model.clear_chat_cache()
    wanted = model.chat(tokenizer, "x", do_sample=False, max_length=60)[0]
    for zero in ({"temperature": 0}, {"top_p": 0}):
        answer = servers[version].http.post("/", json={"prompt": "x", "max_length": 60} | zero).json()
        assert answer["response"] == wanted
    response = servers[version].http.post("/", json={"prompt": "x", "max_length": 0})
    assert response.status_code == 400 and "max_length" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"prompt": "x", "history": "y"}, "history: Input should be a valid list"),
        ({"prompt": "x", "temperature": "warm"}, "temperature: Input should be a valid number"),
        ({"prompt": "x", "top_p": 2}, "top_p: Input should be less than or equal to 1"),
    ],
)
def test_wrong_types_are_422_with_a_reason(live: Live, body: Any, reason: str) -> None:
    for path in ("/", "/stream"):
        response = live.http.post(path, json=body)
        assert response.status_code == 422 and reason in response.json()["error"]["message"]


@pytest.mark.parametrize("version", VERSIONS)
def test_histories_as_front_ends_make_them(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    question = live.engine.say("ja")
    given = [[None, "Hello!"], [], ["a", "b"], [question, None]]
    for path in ("/", "/stream"):
        response = live.http.post(path, json={"prompt": question, "history": given})
        body = response.json() if path == "/" else json.loads(response.text.strip().splitlines()[-1][6:])
        assert response.status_code == 200 and body["history"] == [["", "Hello!"], ["a", "b"], [question, "ja"]]


def test_wrong_histories_have_a_reason(servers: dict[int, Live]) -> None:
    for version in VERSIONS:
        for history in ([["a"]], [["a", 5]], ["a"], [5], [{"role": "user"}]):
            response = servers[version].http.post("/", json={"prompt": "x", "history": history})
            assert response.status_code == 400 and "history" in response.json()["error"]["message"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_original_contract_as_a_stream(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    question = live.engine.say("一 two , 三")
    body = {"prompt": question, "history": []}
    with live.http.stream("POST", "/stream", json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line]
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["response"]
    assert events[-1]["history"] == [[question, events[-1]["response"]]] and events[-1]["status"] == 200


def test_role_histories_for_generation_3(live: Live) -> None:
    history = [{"role": "system", "content": "s", "tools": [TOOLS[0]["function"]]}]
    question = live.engine.say(call_text("weather", city="x"))
    answer = live.http.post("/", json={"prompt": question, "history": history}).json()
    assert answer["response"] == {"name": "weather", "parameters": {"city": "x"}}
    assert [message["role"] for message in answer["history"]] == ["system", "user", "assistant"]


# ---------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("version", VERSIONS)
def test_completions(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    complete = live.client.completions.create
    answer = complete(model=NAME, prompt="你好", temperature=0, max_tokens=5)
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    text = answer.choices[0].text
    streamed = complete(model=NAME, prompt="你好", temperature=0, max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    ids = pair(version)[1]("你好")["input_ids"]
    several = complete(model=NAME, prompt=[ids, ids], temperature=0, max_tokens=5, n=2, logprobs=2)
    assert [choice.text for choice in several.choices] == [text] * 4
    assert several.usage is not None and several.usage.prompt_tokens == 2 * len(ids)
    logprobs = several.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None and logprobs.tokens is not None
    assert len(logprobs.tokens) == 5 and all(len(top) >= 1 for top in logprobs.top_logprobs)
    assert complete(model=NAME, prompt="你好", temperature=0, max_tokens=5, echo=True).choices[0].text == "你好" + text
    for wrong in ({"prompt": []}, {"prompt": [10**8]}, {"prompt": "x", "suffix": "y"}, {"prompt": [[]]}):
        with pytest.raises(openai.BadRequestError):
            complete(model=NAME, **wrong)  # type: ignore[call-overload]


@pytest.mark.parametrize("version", VERSIONS)
def test_embeddings(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    answer = live.client.embeddings.create(model=NAME, input=["你好", "hello", "你好"])  # the client asks for base64
    vectors = [item.embedding for item in answer.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1.0, abs=1e-3)
    body = {"input": "你好", "encoding_format": "float"}
    plain = live.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert plain == pytest.approx(vectors[0], abs=1e-6)
    encoded = live.http.post("/v1/embeddings", json={"input": "你好", "encoding_format": "base64"}).json()
    raw = base64.b64decode(encoded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(plain, abs=1e-6)
    for wrong in ("", "长 " * CONTEXT, [10**8]):
        response = live.http.post("/v1/embeddings", json={"input": wrong})
        assert response.status_code == 400 or (wrong == "" and response.status_code == 200)


def test_models(live: Live) -> None:
    assert [model.id for model in live.client.models.list()] == [NAME]
    assert live.client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError):
        live.client.models.retrieve("zai-org/other")


def test_health_and_metrics(live: Live) -> None:
    live.chat("x", max_tokens=2)
    assert live.http.get("/health").json() == {"status": "ok"}
    text = live.http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = f'{{model_name="{NAME}"}}'
    assert float(values[f"vllm:generation_tokens_total{label}"]) >= 2
    assert float(values[f"vllm:time_to_first_token_seconds_count{label}"]) >= 1
    assert float(values['chatglm_http_responses_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert f"chatglm_cache_bytes{label}" in values and f"vllm:num_requests_waiting{label}" in values


def test_health_while_loading_and_after_a_failure() -> None:
    loaded = threading.Event()

    def load() -> Any:
        assert loaded.wait(SECONDS)
        raise OSError("no such model")

    failures: list[BaseException] = []
    failed = threading.Event()

    def note(error: BaseException) -> None:
        failures.append(error)
        failed.set()

    with serve(None, load, on_failure=note) as live:
        assert (live.http.get("/health").status_code, live.http.get("/health").json()) == (503, {"status": "loading"})
        response = live.http.post("/", json={"prompt": "x"})
        assert response.status_code == 503 and "loading" in response.json()["error"]["message"]
        loaded.set()
        assert failed.wait(SECONDS)
        assert live.http.get("/health").json() == {"status": "failed"}
        assert str(failures[0]) == "no such model"


def test_the_key_is_asked_for_everywhere_but_health() -> None:
    with serve(Parrot(3), api_key="schluessel") as live:
        assert live.chat("x", max_tokens=1, temperature=0).choices[0].finish_reason == "length"
        assert httpx.get(f"{live.url}/health", trust_env=False).status_code == 200
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nowhere"):
            response = httpx.get(f"{live.url}{path}", trust_env=False)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        for given in ("Bearer", "Bearer x", "Basic schluessel", "schluessel", "Bearer schlüssel"):
            headers = {"Authorization": given.encode()}
            assert httpx.post(f"{live.url}/", json={}, headers=headers, trust_env=False).status_code == 401
        client = live.client.with_options(api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_other_origins_only_where_named(live: Live) -> None:
    headers = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in live.http.options("/", headers=headers).headers
    assert "access-control-allow-origin" not in live.http.get("/health", headers=headers).headers
    # What a page may send without asking is no JSON, and JSON is all we take.
    plain = {"Content-Type": "text/plain", "Origin": "http://page.example"}
    assert live.http.post("/", content=b'{"prompt": "x"}', headers=plain).status_code == 422
    with serve(Parrot(3), cors_origins=["http://page.example"], api_key="k") as open_one:
        allowed = httpx.options(f"{open_one.url}/", headers=headers, trust_env=False).headers
        assert allowed["access-control-allow-origin"] == "http://page.example"
        other = headers | {"Origin": "http://other.example"}
        assert "access-control-allow-origin" not in httpx.options(open_one.url, headers=other, trust_env=False).headers


def test_requests_have_ids_and_the_log_has_no_texts(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="chatglm.serving"):
        response = live.http.post("/", json={"prompt": "a secret"}, headers={"X-Request-Id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        odd = live.http.get("/health", headers={"X-Request-Id": "a b\tc"})
        assert re.fullmatch(r"[0-9a-f]{32}", odd.headers["x-request-id"])
        live.http.get("/health")
    entries = [json.loads(record.getMessage()) for record in caplog.records if record.name == "chatglm.serving"]
    assert entries[0]["request"] == "mine-1" and entries[0]["status"] == 200 and entries[0]["seconds"] >= 0
    assert "secret" not in caplog.text


def test_nothing_a_client_sends_is_a_server_error(live: Live) -> None:
    rng = random.Random(0)
    values: list[Any] = [
        None, True, 0, -1, 1, 10**30, 0.5, 1e-308, float("inf"), "", "x", "\ud800", [], [[]], {}, "get_", [{}],
        ["x", "y"],
        [{"role": "user", "content": "x"}], [{"role": "tool"}], [{"role": "assistant", "tool_calls": [{}]}],
        {"type": "function", "function": {"name": "x"}}, [{"type": "function", "function": {"name": "x"}}], "auto",
        "none", "required", [0], [[1, 2]], {"a": 1}, NAME,
    ]  # fmt: skip
    keys = {
        "/v1/chat/completions": "model messages temperature top_p top_k min_p repetition_penalty stop seed n stream"
        " tools tool_choice logprobs top_logprobs response_format functions function_call stream_options user store"
        " continue_final_message add_generation_prompt prompt_logprobs logit_bias",
        "/v1/completions": "model prompt temperature top_p stop seed n stream echo logprobs suffix best_of logit_bias"
        " prompt_logprobs max_tokens",
        "/v1/responses": "model input instructions previous_response_id temperature top_p seed stop stream tools"
        " tool_choice text reasoning include top_logprobs store metadata logit_bias",
        "/tokenize": "model prompt messages tools add_special_tokens return_token_strs continue_final_message",
        "/detokenize": "model tokens",
        "/v1/embeddings": "model input encoding_format dimensions",
        "/": "prompt history max_length top_p temperature",
        "/stream": "prompt history max_length top_p temperature",
    }
    needed = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
    for number in range(500):
        path = rng.choice(list(keys))
        names = keys[path].split()
        body = {name: needed[name] for name in names if name in needed and rng.random() < 0.9}
        short = {"max_tokens": 3} if "completions" in path else {"max_output_tokens": 3} if "responses" in path else {}
        body |= short if path.startswith("/v1") or "token" in path else {"max_length": 60}
        body |= {name: rng.choice(values) for name in rng.sample(names, min(rng.randrange(4), len(names)))}
        response = live.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code < 500, (number, path, body, response.text)
        assert '"server_error"' not in response.text, (number, path, body, response.text)


def test_nests_and_arguments_that_are_no_objects_are_bad_requests(servers: dict[int, Live]) -> None:
    def calls(arguments: str) -> dict[str, Any]:
        call = {"function": {"name": "weather", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]}

    def nest(depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = {"a": value}
        return value

    system = {"role": "system", "content": "x", "tools": [nest(500)]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": nest(500)}}
    for version in VERSIONS:
        bodies = [calls(text) for text in ('""', "[]", '["a"]', "1", "null", '{"a": ' + "[" * 10**5)]
        bodies.append({"messages": [{"role": "user", "content": "x"}], "tools": [tool]})
        for body in bodies:
            response = servers[version].http.post("/v1/chat/completions", json=body | {"max_tokens": 1})
            assert response.status_code == 400, (str(body)[:200], response.text[:200])
        assert servers[version].http.post("/", json={"prompt": "x", "history": [system]}).status_code == 422


# ---------------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny", 3)


def start(*arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """api.py in a process of its own, and its address."""
    port = free_port()
    command = [sys.executable, "api.py", "--port", str(port), "--device", "cpu", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return process, f"http://127.0.0.1:{port}"


async def until_healthy(client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.ConnectError:
            await asyncio.sleep(0.05)  # it does not listen yet: there is nothing else to wait for
    raise AssertionError(f"api.py ended with {process.returncode}")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM is a signal of Unix")
def test_sigterm_during_ten_streams_ends_each_of_them_well(folder: Path) -> None:
    process, url = start("--model", str(folder), "--grace", "1")

    async def stream(client: httpx.AsyncClient, begun: asyncio.Event) -> list[str]:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 8000, "temperature": 2}
        lines = []
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                lines += [line] if line else []
                if len(lines) > 2:
                    begun.set()
        return lines

    async def all_of_them() -> list[list[str]]:
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client:
            await until_healthy(client, process)
            begun = [asyncio.Event() for _ in range(10)]
            streams = [asyncio.ensure_future(stream(client, event)) for event in begun]
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), SECONDS)
            process.send_signal(signal.SIGTERM)
            return await asyncio.wait_for(asyncio.gather(*streams), SECONDS)

    try:
        for lines in asyncio.run(all_of_them()):
            assert lines[-1] == "data: [DONE]"
            last = json.loads(lines[-2].removeprefix("data: "))
            if "error" in last:
                assert "shutting down" in last["error"]["message"]
            else:
                assert last["choices"][0]["finish_reason"]
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def test_a_model_that_is_not_there_ends_the_program(tmp_path: Path) -> None:
    command = [sys.executable, "api.py", "--port", "0", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert "none" in done.stderr and "Traceback" not in done.stderr


def test_a_name_for_two_things_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--adapter", "a=/x", "--name", "a"], ["--adapter", "a=/x", "--adapter", "a=/y"]):
        assert api.main(["--port", "0", *arguments]) == 1
        assert "called 'a'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_a_crowd_is_answered_or_refused_and_memory_is_flat_over_2000_requests(version: str) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--size", "tiny", "--generation", version, "--tokens", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    crowd = re.search(r"200 clients, queue of 64: (\d+) answered, (\d+) refused", done.stdout)
    assert crowd and int(crowd[1]) >= 64 and int(crowd[1]) + int(crowd[2]) == 200, done.stdout
    memory = re.search(r"after 200 requests: (\d+) MiB, after 2000: (\d+) MiB", done.stdout)
    assert memory and int(memory[2]) - int(memory[1]) < 30, done.stdout


@pytest.mark.parametrize("version", ["1", "3"])
def test_the_benchmark_runs(version: str) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--size", "tiny", "--generation", version]
    command += ["--clients", "4", "--tokens", "6", "--crowd", "20", "--requests", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert "4 of 4 answers equal" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
