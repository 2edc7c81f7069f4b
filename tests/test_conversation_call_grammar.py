"""Whatever the grammar of a call allows is read back, whole and streamed, as arguments that follow the schema."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch

from chatglm.conversation.call_grammar import call_grammar
from chatglm.conversation.formats import chat_format
from chatglm.serving.answers import AssistantMessage
from chatglm.serving.errors import ApiError
from chatglm.serving.grammar import Grammars
from tiny_chat import pair

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llguidance>=1.9'")
WORDS = ["北京", "it's", 'a "b"', "x\\y\n", "😀<|assistant|>", "", "```", "to-day"]
GRAMMARS = Grammars()


def compiled(schema: dict[str, Any], generation: int = 3) -> Any:
    return GRAMMARS.compile(pair(3)[1], schema, "tools.f", chat_format(generation).call_grammar)


# ---- schemas ---------------------------------------------------------------------------------------------------------


def any_schema(rng: random.Random, depth: int) -> Any:
    kinds = ["text", "sized", "integer", "number", "boolean", "null", "enum", "const", "several", "pattern", "date"]
    kind = rng.choice(kinds + (["array", "object", "any_of", "reference", "one_of", "free"] * 2 if depth else []))
    low = rng.randint(-20, 20)
    made: dict[str, Any] = {
        "text": {"type": "string", "description": "a text"},
        "sized": {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)},
        "integer": rng.choice([{}, {"minimum": low}, {"maximum": low}, {"exclusiveMinimum": low, "maximum": low + 9}])
        | {"type": "integer"},
        "number": rng.choice([{}, {"minimum": low}, {"exclusiveMaximum": low + 0.5}]) | {"type": "number"},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": rng.sample([*WORDS, None, True, 7, -2.5, ["a", {"b": None}]], 3)},
        "const": {"const": rng.choice(WORDS)},
        "several": {"type": ["string", "null", "integer"], "maxLength": 3, "maximum": low},
        "pattern": {"type": "string", "pattern": "^[a-z'\"\\\\]{1,4}$"},
        "date": {"type": "string", "format": "date"},
    }
    if kind in made:
        return made[kind]
    if kind == "array":
        least = rng.randint(0, 2)
        return {"type": "array", "items": any_schema(rng, depth - 1), "minItems": least, "maxItems": least + 2}
    if kind == "object":
        return object_schema(rng, depth - 1)
    if kind == "any_of":
        return {"anyOf": [any_schema(rng, depth - 1) for _ in range(3)]}
    if kind == "one_of":
        return {"oneOf": [made["text"], made["null"], object_schema(rng, depth - 1)]}
    return {"$ref": "#/$defs/node"} if kind == "reference" else {}


def object_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["city", "天数", "b", "c_2", *(["from", "to-day", "q\"'"] if rng.random() < 0.3 else [])], 3)
    further = rng.choice([{"additionalProperties": False}, {"additionalProperties": {"type": "boolean"}}, {}])
    properties = {name: any_schema(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": [n for n in names if rng.random() < 0.5]} | further


def whole_schema(rng: random.Random) -> dict[str, Any]:
    link = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    node = {"type": "object", "properties": {"next": link}, "required": ["next"], "additionalProperties": False}
    return object_schema(rng, 2) | {"$defs": {"node": node}}


def is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    types: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict}
    return value is None if kind == "null" else kind != "boolean" and isinstance(value, types[kind])


def follows(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Whether a value follows a schema of those above."""
    if "$ref" in schema:
        return follows(value, root["$defs"]["node"], root)
    if "anyOf" in schema or "oneOf" in schema:
        return any(follows(value, one, root) for one in schema.get("anyOf") or schema["oneOf"])
    if "enum" in schema or "const" in schema:
        return any(repr(value) == repr(one) for one in schema.get("enum", [schema.get("const")]))
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_of(value, kind) for kind in kinds):
        return False
    if isinstance(value, str):
        size, shape = len(value), schema.get("pattern") or schema.get("format")
        sized = schema.get("minLength", 0) <= size <= schema.get("maxLength", size)
        return sized and (shape is None or (size == 10 if shape == "date" else 1 <= size <= 4))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        above = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        return above and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
    if isinstance(value, list):
        sized = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return sized and all(follows(one, schema.get("items", {}), root) for one in value)
    if isinstance(value, dict):
        known, further = schema.get("properties", {}), schema.get("additionalProperties", {})
        inner = {name: known.get(name, further) for name in value}
        present = set(schema.get("required", [])) <= set(value)
        return present and all(one is not False and follows(value[name], one, root) for name, one in inner.items())
    return True


# ---- a model that babbles --------------------------------------------------------------------------------------------


def babble(grammar: Any, seed: int) -> str:
    """What a model that chooses at random, more and more what closes something, writes under a grammar."""
    tokenizer, noise = pair(3)[1], torch.Generator().manual_seed(seed)
    stops = set(tokenizer.chat_format.stop_token_ids(tokenizer))
    closing = torch.tensor([piece[:1] in (b"'", b'"', b")", b"]", b"}", b"N", b"") for piece in grammar.pieces])
    processor, ids = grammar.processor(0), torch.zeros(1, 0, dtype=torch.long)
    while True:
        scores = torch.rand(1, len(closing), generator=noise) + closing * ids.shape[1] / 100
        token = int(processor(ids, scores).argmax())
        if token in stops:
            return b"".join(grammar.pieces[index] for index in ids[0].tolist()).decode()
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert ids.shape[1] < 2000


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("generation", [3, 4])
def test_what_the_grammar_allows_is_read_back(seed: int, generation: int) -> None:
    schema, form = whole_schema(random.Random(seed)), chat_format(generation)
    grammar = compiled(schema, generation)
    for number in range(2):
        content = babble(grammar, 100 * seed + number)
        assert content.lstrip().startswith("```python\ntool_call(" if generation == 3 else "{")
        call = form.read_call("f", content)
        assert "error" not in call, content
        assert follows(call["parameters"], schema, schema), content
        if generation == 4:
            continue
        assert form.parse(f"f\n{content}", with_tools=True).content == call
        order = list(call["parameters"].items())
        message, streamed = AssistantMessage(pair(3)[1], ["f"]), ""
        for index in range(len(content)):
            so_far = list(form.arguments_so_far("f", content[:index]).items())
            assert repr(so_far) == repr(order[: len(so_far)]), content[:index]
            change = message.feed(("f\n" if index == 0 else "") + content[index], index == len(content) - 1)
            streamed += "".join(part for _, _, part, _ in change.calls)
        assert repr(json.loads(streamed)) == repr(call["parameters"]) and message.content == ""


# ---- the form --------------------------------------------------------------------------------------------------------


def allows(schema: dict[str, Any], arguments: str, lead: str = " ") -> bool:
    grammar, tokenizer = compiled({"additionalProperties": False} | schema | {"type": "object"}), pair(3)[1]
    text = f"{lead}```python\ntool_call({arguments})\n```"
    ids = GRAMMARS._prepared(tokenizer)(text.encode())
    matcher = grammar._matcher.deep_copy()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_the_form_that_the_model_learned() -> None:
    inner = {"type": "object", "properties": {"k": {"type": "boolean"}}, "additionalProperties": False}
    schema = {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "kinds": {"type": "array", "items": {"enum": ["a", 1]}},
            "more": inner,
        },
        "required": ["city"],
    }
    parameters: dict[str, Any] = {
        "city": "O'Hare \"x\"\n北京\u2028", "days": -3, "kinds": ["a", 1], "more": {"k": True},
    }  # fmt: skip
    for count in range(1, 5):
        some = dict(list(parameters.items())[:count])
        written = chat_format(3).tool_call_message("f", some)["content"]
        assert allows(schema, written[len("```python\ntool_call(") : -len(")\n```")])
    assert allows(schema, "city='北京',days=3", lead="") and allows(schema, "city=\"北京\", more={'k':False}")
    for wrong in ("", "days=3", "days=3, city='x'", "city='x', other=1", "city='x', more={'k': true}", "city='x' ",
                  "city=x", "'x'", "city='x', days=03", "city='x', days='3'", "city='x', kinds=['b']", "city='\n'",
                  "city='<|assistant|>'", "city=r'x'", "city='x', city='y'", "city='\\q'"):  # fmt: skip
        assert not allows(schema, wrong), wrong
    empty = {"properties": {"a": {"type": "string", "maxLength": 0}, "b": {"type": "array", "maxItems": 0}}}
    assert allows(empty, "a='', b=[]") and not allows(empty, "a='x'") and not allows(empty, "b=[1]")
    assert allows({}, "") and allows({"properties": {"a": {"const": None}}}, "")


def test_names_that_are_no_arguments_stand_in_a_dict() -> None:
    for name in ("from", "to-city", "ﬁ", ""):
        schema = {"properties": {name: {"type": "integer"}}, "required": [name]}
        assert allows(schema, f"**{{{name!r}: 3}}") and not allows(schema, f"{name}=3")
        message = chat_format(3).tool_call_message("f", {name: 3})["content"]
        assert chat_format(3).read_call("f", message)["parameters"] == {name: 3}
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}
    assert allows(schema, "a=1, **{'b': True, 'c': False}") and allows(schema, "**{'b': True}")
    assert not allows(schema, "**{'a': True}") and not allows(schema, "a=1, **{'b': 2}")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"required": ["x"]}, "'x' is required and not allowed"),
        ({"properties": {"a": {"enum": [1], "type": "string"}}}, "none of its values"),
        ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}}, "minLength"),
        ({"properties": {"a": {"type": "array", "minItems": 3, "maxItems": 2}}}, "minItems"),
        ({"properties": {"a": {"format": "nonsense"}}}, "Unknown format"),
        ({"properties": {"a": {"type": "nonsense"}}}, "Invalid type"),
        ({"properties": {"a": {"type": ["string", {}]}}}, "type must be"),
        ({"properties": {"a": {"enum": "a"}}}, "enum must be"),
        ({"properties": {"a": {"type": "string", "maxLength": True}}}, "maxLength"),
        ({"properties": {"a": {"type": "integer", "minimum": "x"}}}, "minimum"),
        ({"properties": {"a": 5}}, "object or boolean"),
        ({"properties": 5}, "must be an object"),
        ({"required": [{}]}, "required"),
        ({"properties": {f"p{index}": {} for index in range(401)}}, "more than 400 properties are optional"),
        ({"properties": {"a": {"anyOf": [{}] * 401}}}, "more than 400 schemas"),
        ({"properties": {"a": {"const": float("nan")}}}, "JSON"),
        ({"properties": {"a": {"const": "\ud800"}}}, "surrogates"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}, "nowhere"),
        ({"properties": {"a": {"const": "x" * 300_000}}}, "larger than"),
    ],
)
def test_schemas_that_cannot_be_followed(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as error:
        compiled({"type": "object", "additionalProperties": False} | schema)
    assert error.value.status == 400 and error.value.body["error"]["param"] == "tools"


def test_wide_schemas() -> None:
    many = {"enum": [f"name {index}" for index in range(3000)]}
    assert allows({"properties": {"a": many}}, "a='name 2999'") and not allows({"properties": {"a": many}}, "a='name'")
    wide: dict[str, Any] = {"properties": {f"p{index}": {"type": "integer"} for index in range(400)}}
    assert allows(wide, "") and allows(wide, "p0=1, p399=2") and not allows(wide, "p399=2, p0=1")


def test_deep_schemas() -> None:
    def nested(levels: int) -> dict[str, Any]:
        deep: dict[str, Any] = {"type": "null"}
        for _ in range(levels):
            deep = {"type": "array", "items": deep, "maxItems": 1}
        return {"type": "object", "properties": {"a": deep}}

    assert allows(nested(80), "a=" + "[" * 80 + "None" + "]" * 80)
    for levels in (100, 300):
        with pytest.raises(ValueError, match="nested too deeply"):
            call_grammar(nested(levels))
