"""Arguments of forced and of strict tools follow their schemas, from a model that babbles."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import chatglm
from chatglm.loading import DEMO
from chatglm.serving.chat_engine import ChatEngine
from chatglm.serving.tool_grammar import schema_of
from live_server import Live, Parrot, serve
from test_api import whole

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="needs llguidance: pip install 'llguidance>=1.9'"
)
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["北京", 'Köln "😀"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days", "exact"],
}
COLOUR = {"type": "object", "properties": {"colour": {"enum": ["red", None]}}, "required": ["colour"]}


def tools(**more: Any) -> list[Any]:
    schemas = {"weather": CITY, "paint": COLOUR}
    return [
        {"type": "function", "function": {"name": name, "parameters": schema} | more}
        for name, schema in schemas.items()
    ]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engine = Parrot(3)
    with serve(engine) as live:
        yield live
    engine.close()


@needs_library
@pytest.mark.parametrize("strict", [False, True])
def test_the_demo_writes_the_call_that_it_learned(strict: bool) -> None:
    model, tokenizer = chatglm.load(str(DEMO), device="cpu", dtype="float32")
    (weather,) = json.loads((DEMO.parent / "tools.json").read_text(encoding="utf-8"))
    offered = [{"type": "function", "function": weather | {"strict": strict}}]
    named = {"type": "function", "function": {"name": weather["name"]}}
    choices: list[Any] = ["auto"] if strict else ["required", named]
    with ChatEngine(model, tokenizer) as engine, serve(engine) as live:
        for question, city in (("北京天气怎么样？", "北京"), ("What is the weather in Paris?", "Paris")):
            for choice in choices:
                options: dict[str, Any] = {"tools": offered, "tool_choice": choice, "temperature": 0}
                (call,) = live.chat(question, **options).choices[0].message.tool_calls
                assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": city}
                text, reason, calls = whole(live.chat(question, stream=True, **options))
                assert (text, reason, calls[0]["arguments"]) == ("", "tool_calls", call.function.arguments)


def check(name: str, arguments: str) -> None:
    values = json.loads(arguments)
    if name == "paint":
        assert set(values) == {"colour"} and values["colour"] in ("red", None)
    else:
        assert name == "weather" and set(values) == {"city", "days", "exact"}
        assert values["city"] in CITY["properties"]["city"]["enum"]  # type: ignore[index]
        assert 1 <= values["days"] <= 9 and isinstance(values["exact"], bool)


NAMED = {"type": "function", "function": {"name": "paint"}}


@needs_library
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_follows_the_schema(live: Live, choice: Any) -> None:
    options: dict[str, Any] = {"tools": tools(), "tool_choice": choice, "temperature": 1.5, "max_tokens": 400}
    for seed in range(4):
        answer = live.chat("x", seed=10 * seed, n=2, **options)
        for one in answer.choices:
            assert one.finish_reason == "tool_calls" and one.message.content is None
            (call,) = one.message.tool_calls
            check(call.function.name, call.function.arguments)
            assert choice == "required" or call.function.name == "paint"
        text, reason, calls = whole(live.chat("x", seed=10 * seed, stream=True, **options))
        first = answer.choices[0].message.tool_calls[0].function
        assert (text, reason) == ("", "tool_calls")
        assert [(call["name"], call["arguments"]) for call in calls] == [(first.name, first.arguments)]


@needs_library
def test_the_older_form_does_too(live: Live) -> None:
    functions = [tool["function"] for tool in tools()]
    options: Any = {"function_call": {"name": "weather"}, "temperature": 1.5, "max_tokens": 400, "seed": 1}
    answer = live.chat("x", functions=functions, **options)
    call = answer.choices[0].message.function_call
    check(call.name, call.arguments)
    own = {"name": "count", "description": "x", "params": [{"name": "n", "type": "int", "required": True}]}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": {"count": own}, "tool_choice": "required"}
    made = live.http.post("/v1/chat/completions", json=body | {"max_tokens": 400}).json()["choices"][0]
    if made["finish_reason"] == "tool_calls":  # an integer may be long
        values = json.loads(made["message"]["tool_calls"][0]["function"]["arguments"])
        assert list(values) == ["n"] and isinstance(values["n"], int)


@needs_library
def test_a_strict_tool_that_the_model_chooses_follows_the_schema(live: Live) -> None:
    said = live.engine.say("weather\n" + json.dumps({"city": "Paris", "days": 100}))
    loose = live.chat(said, tools=tools()).choices[0].message.tool_calls[0].function
    assert json.loads(loose.arguments) == {"city": "Paris", "days": 100}
    # The model begins the call by itself and then babbles.
    begins = live.engine.say("weather\n")
    say = live.engine.answers.index("weather\n")

    class Begin:
        """Says the beginning, then leaves the choice to the model."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            before = self.inner.prompt_tokens
            said = 0 if before is None else input_ids.shape[1] - before
            return self.inner(input_ids, scores) if said < len(self.inner.ids) - 1 else scores

    submit_all = live.engine.submit_all

    def begin(requests: Any, *rest: Any) -> Any:
        from scripted import Say

        for _, options in requests:
            options.logits_processor.insert(0, Begin(Say(live.engine.tokenizer, live.engine.answers[say])))
        return type(live.engine).__mro__[1].submit_all(live.engine, requests, *rest)

    live.engine.submit_all = begin
    try:
        for seed in range(3):
            options: dict[str, Any] = {"temperature": 1.5, "max_tokens": 400, "seed": seed}
            message = live.chat(begins, tools=tools(strict=True), **options).choices[0].message
            (call,) = message.tool_calls
            check("weather", call.function.arguments)
    finally:
        live.engine.submit_all = submit_all
    text = live.engine.say("weather is fine\nreally")
    assert live.chat(text, tools=tools(strict=True)).choices[0].message.content == "weather is fine\nreally"


@needs_library
@pytest.mark.parametrize("schema", [{"type": "array"}, {"type": "object", "properties": {"a": {"format": "nonsense"}}}])
def test_a_schema_that_cannot_be_followed_is_refused(live: Live, schema: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError) as error:
        live.chat("x", tools=[tool])
    assert error.value.param == "tools"
    many = {"type": "function", "function": {"name": "f", "parameters": CITY | {"description": "x" * 200_000}}}
    with pytest.raises(openai.BadRequestError, match="large"):
        live.chat("x", tools=[many], tool_choice="required")


def test_without_the_library_forced_and_strict_tools_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with serve(Parrot(3)) as live:
        for options in ({"tool_choice": "required", "tools": tools()}, {"tools": tools(strict=True)}):
            with pytest.raises(openai.BadRequestError, match="pip install") as error:
                live.chat("x", **options)
            assert error.value.param == "tools.weather"
        assert live.chat("x", tools=tools(), max_tokens=2, temperature=0).choices[0].finish_reason == "length"


def test_schemas_of_arguments() -> None:
    assert schema_of({"name": "f"}) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert schema_of({"name": "f", "parameters": {"additionalProperties": True}})["additionalProperties"] is True
    own = [{"name": "a", "type": "str", "required": True}, {"name": "b", "type": "?"}]
    made = schema_of({"name": "f", "params": own})
    assert made["properties"] == {"a": {"type": "string"}, "b": {}} and made["required"] == ["a"]
