"""Results of parallel tool calls go with their calls, whatever their order."""

from __future__ import annotations

from typing import Any

import pytest

from chatglm.serving.errors import ApiError
from chatglm.serving.openai.chat_body import Message
from chatglm.serving.openai.tool_results import in_call_order
from live_server import Parrot, serve


def asked(*ids: str | None) -> dict[str, Any]:
    calls = [{"id": one, "function": {"name": "weather", "arguments": f'{{"n": {i}}}'}} for i, one in enumerate(ids)]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call: str | None, text: str = "", role: str = "tool") -> dict[str, Any]:
    return {"role": role, "content": text or f"result of {call}", **({} if call is None else {"tool_call_id": call})}


USER = {"role": "user", "content": "x"}


def ordered(*messages: dict[str, Any]) -> list[str | None]:
    made = [Message.model_validate(message) for message in (USER, *messages)]
    return [message.tool_call_id for message in in_call_order(made) if message.role != "user"]


@pytest.mark.parametrize("given", [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")])
def test_results_come_in_the_order_of_the_calls(given: tuple[str, ...]) -> None:
    assert ordered(asked("a", "b", "c"), *map(result, given)) == [None, "a", "b", "c"]
    assert ordered(asked("a"), result("a"), asked("a"), result("a")) == [None, "a", None, "a"]  # ids of one message


def test_ids_are_not_needed_where_nothing_can_be_mixed_up() -> None:
    assert ordered(asked(None), result(None)) == [None, None]
    assert ordered(asked("a"), result(None, role="observation")) == [None, None]
    call = {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}}
    assert ordered(call, result(None, role="function")) == [None, None]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([result("a")], r"messages\[1\] is the result of a tool, but no message with tool_calls"),
        ([asked("a"), result("b")], r"messages\[2\]: no call of messages\[1\] has the tool_call_id 'b'"),
        ([asked("a"), result(None)], r"messages\[2\] needs the tool_call_id"),
        ([asked("a", "b"), result("a"), result("a")], r"messages\[3\]: the call 'a' has a result already"),
        ([asked("a", "b"), result("a")], r"messages\[1\]: the call 'b' has no result"),
        ([asked("a"), USER], r"messages\[1\]: the call 'a' has no result"),
        ([asked("a"), result("a"), result("a")], "has a result already"),
        ([asked("a", "a"), result("a")], "two tool calls have the same id"),
        ([asked("a", None), result("a"), result(None)], "needs an id"),
        ([asked("a", "b"), result(None, role="observation"), result("b")], "needs the tool_call_id"),
        ([asked("a"), result("a"), USER, result("a")], r"messages\[4\] is the result of a tool"),
    ],
)
def test_what_cannot_be_paired_is_a_bad_request(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as error:
        ordered(*messages)
    assert error.value.status == 400 and error.value.body["error"]["param"] == "messages"


def test_the_model_sees_the_same_prompt_whatever_the_order() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with serve(Parrot(3)) as live:
        seen: list[list[int]] = []
        submit_all = live.engine.submit_all

        def spy(requests: Any, *rest: Any) -> Any:
            seen.extend(list(ids) for ids, _ in requests)
            return submit_all(requests, *rest)

        live.engine.submit_all = spy
        for given in (("a", "b"), ("b", "a")):
            messages = [USER, asked("a", "b"), *map(result, given)]
            body = {"messages": messages, "tools": tools, "max_tokens": 1}
            assert live.http.post("/v1/chat/completions", json=body).status_code == 200
        assert seen[0] == seen[1]
        for messages in ([USER, asked("a"), result("b")], [USER, asked("a", "b"), result("a")], [USER, result("a")]):
            answer = live.http.post("/v1/chat/completions", json={"messages": messages, "tools": tools})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
