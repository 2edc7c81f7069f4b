"""response_format: answers of models that babble are JSON, and JSON of the schema, in every generation."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel, Field

from chatglm.conversation import stop_token_ids
from chatglm.serving.chat_engine import ChatEngine
from chatglm.serving.errors import ApiError
from chatglm.serving.grammar import MOST_CHARACTERS, Grammars
from live_server import CONTEXT, NAME, Live, serve
from test_api import TOOLS, whole
from tiny_chat import pair

VERSIONS = (1, 2, 3)
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="needs llguidance: pip install 'llguidance>=1.9'"
)
#: What generation 1's decoder and chat's clean-up would turn into something else.
ODD = "a<n>b<|tab|>c<|blank_3|>d <|assistant|>[[训练时间]] 你,好: 😀 ' n't \u2581"


class Address(BaseModel):
    city: Literal["北京", "Köln 😀"]
    number: Annotated[int, Field(ge=-9, le=99)] | None


class Person(BaseModel):
    """Nothing in it is long, so that models with random weights finish it."""

    name: Annotated[str, Field(max_length=8)]
    married: bool
    address: Annotated[list[Address], Field(max_length=2)]


def wanted(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 12},
        "number": {"type": "integer", "minimum": -5, "maximum": 55},
        "kind": {"enum": ["ä", "b", None, 7]},
        "more": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "deep": {"$ref": "#/$defs/node"},
    },
    "required": ["text", "kind", "more"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }
    },
}


def check(value: Any) -> None:
    """Checks `SCHEMA` by hand."""
    assert set(value) - {"number", "deep"} == {"text", "kind", "more"}
    assert isinstance(value["text"], str) and len(value["text"]) <= 12
    assert value["kind"] in ("ä", "b", None, 7)
    assert 1 <= len(value["more"]) <= 3 and all(isinstance(one, bool) for one in value["more"])
    assert "number" not in value or (isinstance(value["number"], int) and -5 <= value["number"] <= 55)
    node = value.get("deep")
    while node is not None:
        assert list(node) == ["next"]
        node = node["next"]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[int, Live]]:
    running: dict[int, Any] = {}

    class Servers(dict[int, Live]):
        def __missing__(self, version: int) -> Live:
            model, tokenizer = copy.deepcopy(pair(version))
            model.config.max_position_embeddings = CONTEXT
            running[version] = serve(ChatEngine(model, tokenizer, max_batch=8, max_queue=64))
            self[version] = running[version].__enter__()
            return self[version]

    yield Servers()
    for server in running.values():
        server.__exit__(None, None, None)


def sampled(seed: int) -> dict[str, Any]:
    return {"temperature": 1.5, "top_p": 1, "seed": seed, "max_tokens": 600, "extra_body": {"top_k": 0}}


@needs_library
@pytest.mark.parametrize("version", VERSIONS)
def test_answers_of_models_that_babble_follow_the_schema(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    finished = 0
    with ThreadPoolExecutor(8) as pool:
        asks = [pool.submit(live.chat, "x", response_format=wanted(SCHEMA), n=2, **sampled(2 * i)) for i in range(9)]
        for ask in asks:
            for choice in ask.result().choices:
                if choice.finish_reason == "stop":
                    check(json.loads(choice.message.content))
                    finished += 1
                else:
                    assert choice.finish_reason == "length"
    assert finished >= 15


@needs_library
def test_answers_that_make_room_for_others_go_on_where_they_were(servers: dict[int, Live]) -> None:
    model, tokenizer = copy.deepcopy(pair(3))
    options: dict[str, Any] = {"response_format": wanted(SCHEMA), "temperature": 0, "max_tokens": 100}
    alone = [servers[3].chat(text, **options).choices[0].message.content for text in "abcd"]
    with serve(ChatEngine(model, tokenizer, max_batch=4, cache_tokens=256)) as live, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(live.chat, text, **options) for text in "abcd"]
        assert [answer.result().choices[0].message.content for answer in answers] == alone
        assert live.engine.statistics.preempted


@needs_library
@pytest.mark.parametrize("version", VERSIONS)
def test_the_openai_client_parses_a_model_of_pydantic(servers: dict[int, Live], version: int) -> None:
    messages: Any = [{"role": "user", "content": "who?"}]
    completions = servers[version].client.chat.completions
    options = sampled(3) | {"model": NAME, "messages": messages}
    person = completions.parse(response_format=Person, **options).choices[0].message.parsed
    assert isinstance(person, Person) and len(person.address) <= 2
    with completions.stream(response_format=Person, **options) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == person


@needs_library
@pytest.mark.parametrize("version", VERSIONS)
def test_the_text_is_that_of_the_schema_to_the_byte(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    for text in (ODD, "\t\n\x00\x7f\\", "<n>" * 20):
        answer = live.chat("x", response_format=wanted({"const": {text: [text]}}), temperature=0)
        assert json.loads(answer.choices[0].message.content) == {text: [text]}
        assert answer.choices[0].finish_reason == "stop"


@needs_library
@pytest.mark.parametrize("version", VERSIONS)
def test_any_object_streamed_cut_and_with_logprobs(servers: dict[int, Live], version: int) -> None:
    live = servers[version]
    options = sampled(11) | {"response_format": {"type": "json_object"}, "max_tokens": 60}
    answer = live.chat("x", logprobs=True, **options).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert whole(live.chat("x", stream=True, **options))[:2] == (answer.message.content, answer.finish_reason)
    said = b"".join(bytes(token.bytes) for token in answer.logprobs.content).decode(errors="replace")
    assert version == 1 or said.strip().startswith(answer.message.content.rstrip("\ufffd "))
    cut = live.chat("x", **options | {"max_tokens": len(answer.logprobs.content) - 1}).choices[0]
    assert cut.finish_reason == "length" and answer.message.content.startswith(cut.message.content.rstrip("\ufffd"))
    greedy = live.chat("x", response_format=wanted(SCHEMA), temperature=0, max_tokens=300).choices[0]
    assert greedy.finish_reason == "length" or check(json.loads(greedy.message.content)) is None
    stopped = live.chat("x", stop='"kind', **options | {"response_format": wanted(SCHEMA), "max_tokens": 600})
    assert stopped.choices[0].finish_reason == "stop" and '"text"' in stopped.choices[0].message.content
    assert "kind" not in stopped.choices[0].message.content


@needs_library
@pytest.mark.parametrize("version", VERSIONS)
def test_only_what_goes_on_may_be_chosen(version: int) -> None:
    _, tokenizer = pair(version)
    pieces = tokenizer.token_pieces()
    grammar = Grammars().compile(tokenizer, {"type": "string"})
    follow = grammar.processor(1)
    scores = torch.zeros(1, len(pieces) + 7)  # the heads of models are padded

    def allowed(*said: int) -> set[int]:
        return set(follow(torch.tensor([[0, *said]]), scores)[0].isfinite().nonzero().flatten().tolist())

    assert {pieces[index].lstrip(b" ")[:1] for index in allowed()} == {b'"', b""}
    quote, ends = pieces.index(b'"'), set(stop_token_ids(tokenizer))
    emoji = [pieces.index(bytes([byte])) for byte in "😀".encode()]
    inside = allowed(quote)
    assert not inside & ends and all(pieces[index] for index in inside)
    assert {pieces[index][0] for index in allowed(quote, emoji[0])} <= set(range(0x90, 0xC0))
    assert allowed(quote, *emoji) == inside
    assert allowed(quote, *emoji, quote) == ends
    assert not any(pieces[index] for index in tokenizer.all_special_ids)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_bytes_of_tokens_are_what_decoding_shows(version: int) -> None:
    _, tokenizer = pair(version)
    before = tokenizer.encode_text('a"')
    shown = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    for index, piece in enumerate(tokenizer.token_pieces()):
        if len(piece) > 1 or (piece and piece[0] < 128):
            text = tokenizer.decode([*before, index], clean_up_tokenization_spaces=False)
            assert text.encode() == shown.encode() + piece, index


def chain(length: int, depth: int = 1) -> dict[str, Any]:
    """References to references, each inside so many lists: what a compiler follows by recursion."""

    def link(target: str) -> dict[str, Any]:
        schema: dict[str, Any] = {"$ref": f"#/$defs/{target}"}
        for _ in range(depth):
            schema = {"allOf": [schema]}
        return schema

    links = {f"a{i}": link(f"a{i + 1}") for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "null"}}}


@needs_library
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, "Invalid type"),
        ({"not": {"type": "string"}}, "Unimplemented"),
        ({"properties": {"a": {"not": {}, "x-guidance": {"lenient": True}}}}, "Unimplemented"),
        ({"if": {}, "then": {}, "x-guidance": {"lenient": True}}, "Unimplemented"),
        ({"type": "string", "pattern": "(?!a)b"}, "look-around"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"type": "string", "maxLength": 10**30}, "maxLength"),
        ({"type": "integer", "minimum": 10**400}, "out of range"),
        ({"allOf": [{"$ref": "#"}]}, "nothing follows"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"type": "string", "format": "zip"}, "format"),
        ({"enum": []}, "."),
        ({"type": "integer", "multipleOf": 999999937}, "fuel"),
        ({"allOf": [{"oneOf": [{"properties": {f"{i}": {"const": j}}} for j in range(8)]} for i in range(40)]}, "too"),
        ({"description": "x" * MOST_CHARACTERS}, "characters"),
        (chain(1500), "references"),
        ({"type": "integer", "multipleOf": 99991, "minimum": 3, "maximum": 10**15}, "too many"),  # shows when it runs
    ],
)
def test_schemas_that_cannot_be_served_are_bad_requests(
    servers: dict[int, Live], schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        servers[3].chat("x", response_format=wanted(schema))
    assert error.value.type == "invalid_request_error" and error.value.param == "response_format"


@needs_library
def test_a_schema_at_the_limits_does_no_harm(servers: dict[int, Live]) -> None:
    for schema in (chain(250), chain(100, 43)):
        assert len(json.dumps(schema)) <= MOST_CHARACTERS
        assert servers[3].chat("x", response_format=wanted(schema)).choices[0].message.content == "null"


@pytest.mark.parametrize(
    "wrong",
    [{"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, {"type": "xml"}],
)
def test_what_is_no_response_format(servers: dict[int, Live], wrong: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format"):
        servers[3].chat("x", response_format=wrong)
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        servers[3].chat("x", response_format={"type": "json_object"}, tools=TOOLS)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars()
    grammars.prepare(pair(3)[1])
    with pytest.raises(ApiError, match='pip install "llguidance>=1') as error:
        grammars.compile(pair(3)[1], {"type": "object"})
    assert error.value.status == 400
