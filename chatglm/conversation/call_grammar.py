"""The arguments of ChatGLM3's calls as a grammar: `tool_call(key=value, …)` whose values follow a JSON schema.

Values are Python literals, as the model learned to write them. What has no such form here (patterns and formats of
strings, `allOf`, …) is JSON that the library derives from its schema; Python reads that too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .tool_calls import is_argument_name


class CallGrammar(NamedTuple):
    """The content of a message that calls a tool.

    Args:
        rules: Lark, in llguidance's dialect; the rule `value` is the content.
        schemas: JSON schemas, of which the rules refer to each as `@name`.
        json_options: how JSON of these schemas is written (llguidance's `x-guidance`); None leaves it to the caller.
    """

    rules: str
    schemas: dict[str, Any]
    json_options: dict[str, Any] | None = None


#: JSON that Python reads as the same value: a pair of `\u` escapes of surrogates would be two characters. Without
#: freely placed whitespace, the library can choose between JSON and the rules of this module.
JSON_OPTIONS = {
    "whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "json_allowed_escapes": 'nrbtf\\"',
}  # fmt: skip
#: What says nothing about values.
ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "$defs", "definitions",
}  # fmt: skip
#: The keywords that apply to each type; a value of another type is not affected by them.
KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"},
    "object": {
        "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
        "propertyNames",
    },
}  # fmt: skip
TYPES_OF_VALUES = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
    "object": dict,
}  # fmt: skip
#: Keywords whose values map names, not keywords, to schemas.
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
#: A number without other limits stays below this: Python reads no integer of more than 4300 digits.
LARGEST = 10**15
#: Levels of lists and dicts where any value may stand, and those of a schema; Python reads fewer than 200.
ANY_DEPTH, MOST_LEVELS = 6, 90
#: Values or members of which any may come next: the library has a limit of 2000 items, and these take four.
MOST_CHOICES = 400

_DEEP = "the schema is nested too deeply"
_ESCAPED = r"\\(?:[\\'\"nrt]|x[0-9a-fA-F]{2}|u(?:[0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}))"
#: In a string, `<|` needs an escape: the text of a control token would end the message.
_TERMINALS = rf"""
SEP: /, ?/
COLON: /: ?/
ESCAPED: /{_ESCAPED}/
PLAIN_1: /[^'\\<|\x00-\x1f\x7f]/ | ESCAPED
PLAIN_2: /[^"\\<|\x00-\x1f\x7f]/ | ESCAPED
STRING: "'" ("|" | PLAIN_1 | /<+/ PLAIN_1)* /<*'/ | "\"" ("|" | PLAIN_2 | /<+/ PLAIN_2)* /<*"/
KEY: /'[^'\\<|\x00-\x1f\x7f]*'/
INTEGER: /-?(?:0|[1-9][0-9]{{0,14}})/
NUMBER: /-?(?:0|[1-9][0-9]{{0,14}})(?:\.[0-9]{{1,17}})?(?:[eE][+-]?[0-9]{{1,2}})?/
any_0: STRING | NUMBER | "True" | "False" | "None"
"""


def call_grammar(schema: Mapping[str, Any]) -> CallGrammar:
    """Returns the grammar of a call in ChatGLM3's form, with arguments that follow the schema of an object.

    Raises ValueError for a schema that it cannot follow.
    """
    try:
        # NaN and halves of surrogate pairs, which are no JSON, raise ValueError.
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
        return _Rules(schema).grammar()
    except RecursionError:
        raise ValueError(_DEEP) from None


class _Rules:
    """The rules for the schemas within one schema, and the JSON schemas that are left to the library."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._rules: list[str] = []
        self._schemas: dict[str, Any] = {}
        self._names: dict[str, str] = {}  # of references and of JSON schemas -> of rules
        self._wanted: list[tuple[str, Any]] = []  # schemas that references lead to, whose rules are still missing
        self._whole: Any = None

    def grammar(self) -> CallGrammar:
        arguments = self._arguments(self._root)
        while self._wanted:
            name, schema = self._wanted.pop()
            self._rules.append(f"{name}: {self._value(schema, 0)}")
        head = f'value: "```python\\ntool_call(" {arguments} ")\\n```"'
        levels = [
            f'any_{level}: any_{level - 1} | "[" (any_{level - 1} (SEP any_{level - 1})*)? "]" '
            f'| "{{" (STRING COLON any_{level - 1} (SEP STRING COLON any_{level - 1})*)? "}}"'
            for level in range(1, ANY_DEPTH + 1)
        ]
        rules = "\n".join([head, *self._rules, *levels]) + _TERMINALS
        return CallGrammar(rules, self._schemas, JSON_OPTIONS)

    # ---- the pieces of rules -----------------------------------------------------------------------------------------

    def _rule(self, body: str) -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _arguments(self, schema: Mapping[str, Any]) -> str:
        """`key=value` for every property; a dict after `**` where that does not work, as `tool_call_message` does."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        simple = set(schema) <= ANNOTATIONS | {"type"} | KEYWORDS["object"]
        simple = simple and isinstance(properties, Mapping) and isinstance(required, list)
        simple = simple and all(isinstance(name, str) and is_argument_name(name) for name in [*properties, *required])
        parts = self._members(schema, 0) if simple else None
        if parts is None:
            return f'"**" {self._value(schema, 0)}'
        members, more = parts
        if more is not None:
            more = f'"**{{" {more} (SEP {more})* "}}"'
        return self._list([(f"{_lark(f'{name}=')} {value}", must) for name, value, must in members], more, "?")

    def _list(self, members: Sequence[tuple[str, bool]], more: str | None, times: str = "*") -> str:
        """The members in their order, those that need not be there optional, then `more` if it is not None."""
        if sum(not must for _, must in members) > MOST_CHOICES:
            raise ValueError(f"more than {MOST_CHOICES} properties are optional")
        tail = f"(SEP {more}){times}" if more is not None else ""
        first = [] if more is None else [f"{more} {tail}" if times == "*" else more]
        empty = True
        for member, must in reversed(members):
            first = [f"{member} {tail}", *([] if must else first)]
            tail = self._rule(f"SEP {member} {tail}" if must else f"(SEP {member})? {tail}")
            empty = empty and not must
        return f"({' | '.join(first)}){'?' if empty else ''}" if first else ""

    def _members(self, schema: Mapping[str, Any], level: int) -> tuple[list[tuple[str, str, bool]], str | None] | None:
        """The properties as (name, rule of the value, whether required), and the rule of further ones.

        None if the library must see to it.
        """
        properties, required = schema.get("properties", {}), schema.get("required", [])
        further = schema.get("additionalProperties", True)
        simple = isinstance(properties, Mapping) and isinstance(required, list)
        simple = simple and all(isinstance(name, str) for name in required)
        if not simple or set(schema) & {"patternProperties", "minProperties", "maxProperties", "propertyNames"}:
            return None
        properties = {**properties, **{name: further for name in required if name not in properties}}
        members = []
        for name, one in properties.items():
            if one is False and name in required:
                raise ValueError(f"nothing follows this schema: {name!r} is required and not allowed")
            if one is not False:
                members.append((name, self._value(one, level + 1), name in required))
        if further is False:
            return members, None
        # Keys are written without escapes, so that none is a property in another spelling.
        listed = " | ".join(_lark(f"'{name}'") for name in properties)
        key = f"KEY_{len(self._rules)}"
        self._rules.append(f"{key}: KEY & ~({listed})" if listed else f"{key}: KEY")
        return members, f"{key} COLON {self._value(further, level + 1)}"

    # ---- values ------------------------------------------------------------------------------------------------------

    def _value(self, schema: Any, level: int) -> str:
        """The rule, or the body of one, for values of a schema."""
        if schema is True or (isinstance(schema, Mapping) and set(schema) <= ANNOTATIONS):
            return f"any_{ANY_DEPTH}"
        if level > MOST_LEVELS:
            raise ValueError(_DEEP)
        if not isinstance(schema, Mapping):
            return self._json(schema)
        keys = set(schema) - ANNOTATIONS
        if keys == {"$ref"}:
            return self._reference(schema["$ref"])
        if (keys <= {"type", "enum"} and "enum" in keys) or (keys <= {"type", "const"} and "const" in keys):
            return self._literals(schema)
        branches = self._branches(schema, keys)
        if branches is not None and len(branches) > MOST_CHOICES:
            raise ValueError(f"a value may follow any of more than {MOST_CHOICES} schemas")
        if branches is not None:
            return self._rule(" | ".join(self._value(one, level + 1) for one in branches))
        kind = schema.get("type")
        if not isinstance(kind, str) or kind not in KEYWORDS or not keys <= {"type"}.union(*KEYWORDS.values()):
            return self._json(schema)
        own = {key: schema[key] for key in keys & (KEYWORDS[kind] | {"type"})}
        return self._of_type(kind, own, level)

    def _of_type(self, kind: str, schema: Mapping[str, Any], level: int) -> str:
        if kind == "boolean":
            return '("True" | "False")'
        if kind == "null":
            return '"None"'
        if kind in ("integer", "number"):
            return self._number(kind, schema)
        if kind == "string":
            return self._text(schema)
        if kind == "array":
            return self._array(schema, level)
        parts = self._members(schema, level)
        if parts is None:
            return self._json(schema)
        members = [(f"{_literal(name)} COLON {value}", must) for name, value, must in parts[0]]
        return self._rule(f'"{{" {self._list(members, parts[1])} "}}"')

    def _branches(self, schema: Mapping[str, Any], keys: set[str]) -> list[Any] | None:
        """The schemas of which a value must follow one; None if there is no such choice."""
        kind = schema.get("type")
        if isinstance(kind, list) and kind and "enum" not in keys and "const" not in keys:
            return [{**schema, "type": one} for one in kind]
        if keys == {"anyOf"} and isinstance(schema["anyOf"], list) and schema["anyOf"]:
            return [one for one in schema["anyOf"] if one is not False] or None
        if keys == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1:
            return schema["allOf"]
        if keys == {"oneOf"} and isinstance(schema["oneOf"], list):
            kinds = [one.get("type") if isinstance(one, Mapping) else None for one in schema["oneOf"]]
            apart = all(isinstance(one, str) for one in kinds) and len(set(kinds)) == len(kinds)
            return schema["oneOf"] if kinds and apart and not {"integer", "number"} <= set(kinds) else None
        return None

    def _reference(self, reference: Any) -> str:
        """The rule for what a reference leads to; further references on the way are followed."""
        passed: list[Any] = []
        while reference not in passed:
            if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
                return self._json({"$ref": reference})
            if reference in self._names:
                return self._names[reference]
            target: Any = self._root
            for part in reference.split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, Mapping) or part not in target:
                    return self._json({"$ref": reference})
                target = target[part]
            if not isinstance(target, Mapping) or set(target) - ANNOTATIONS != {"$ref"}:
                self._names[reference] = f"ref_{len(self._names)}"
                self._wanted.append((self._names[reference], target))
                return self._names[reference]
            passed.append(reference)
            reference = target["$ref"]
        raise ValueError(f"nothing follows this schema: {reference} leads back to itself")

    def _literals(self, schema: Mapping[str, Any]) -> str:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        kinds = schema.get("type", list(KEYWORDS))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        known = isinstance(kinds, list) and all(isinstance(kind, str) and kind in KEYWORDS for kind in kinds)
        if not isinstance(values, list) or not known:
            return self._json(schema)
        fitting = [_literal(value) for value in values if any(_is(value, kind) for kind in kinds)]
        if not fitting:
            raise ValueError("nothing follows this schema: none of its values has its type")
        name = f"ONE_OF_{len(self._rules)}"  # a terminal: the library limits how many rules may begin at one place
        self._rules.append(f"{name}: {' | '.join(fitting)}")
        return name

    def _number(self, kind: str, schema: Mapping[str, Any]) -> str:
        if set(schema) == {"type"}:
            return kind.upper()
        bounded, bounds = dict(schema), [value for key, value in schema.items() if key != "type"]
        if all(isinstance(bound, (int, float)) and abs(bound) < LARGEST for bound in bounds):
            if not {"minimum", "exclusiveMinimum"} & set(schema):
                bounded["minimum"] = -LARGEST
            if not {"maximum", "exclusiveMaximum"} & set(schema):
                bounded["maximum"] = LARGEST
        return self._json(bounded)

    def _text(self, schema: Mapping[str, Any]) -> str:
        if set(schema) == {"type"}:
            return "STRING"
        if not set(schema) <= {"type", "minLength", "maxLength"}:
            return self._json(schema)
        times = _times(schema, "minLength", "maxLength")
        if times is None:
            return self._json(schema)
        if times[1] == 0:
            return """("''" | "\\"\\"")"""
        name, size = f"STRING_{len(self._rules)}", f"{{{times[0]},{'' if times[1] is None else times[1]}}}"
        one, two = (f"(PLAIN_{kind} | /[<|]/){size}" for kind in (1, 2))
        self._rules.append(f"""{name}: ("'" {one} "'" | "\\"" {two} "\\"") & STRING""")
        return name

    def _array(self, schema: Mapping[str, Any], level: int) -> str:
        sizes, items = _times(schema, "minItems", "maxItems"), schema.get("items", True)
        if sizes is None or not set(schema) <= {"type", "items", "minItems", "maxItems"} or isinstance(items, list):
            return self._json(schema)
        least, most = sizes
        if most == 0 or (items is False and least == 0):
            return '"[]"'
        item = self._rule(self._value(items, level + 1))
        times = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        rest = "" if most == 1 else f"(SEP {item}){times}"
        return self._rule(f'"[" ({item} {rest}){"" if least else "?"} "]"')

    # ---- what is left to the library ---------------------------------------------------------------------------------

    def _json(self, schema: Any) -> str:
        """The name of JSON that follows the schema; references within it still lead to the whole schema."""
        text = json.dumps(schema, allow_nan=False)
        if text not in self._names:
            if '"$ref"' in text:
                if self._whole is None:
                    outer = {key: value for key, value in self._root.items() if key not in ("$id", "$schema")}
                    self._whole = _moved(outer)
                schema = {"$ref": "#/$defs/part", "$defs": {"part": _moved(schema), "whole": self._whole}}
            name = f"json_{len(self._schemas)}"
            self._schemas[name] = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
            self._names[text] = f"@{name}"
        return self._names[text]


def _moved(schema: Any) -> Any:
    """A copy of a schema whose references find the whole schema under `#/$defs/whole`."""
    if isinstance(schema, list):
        return [_moved(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if isinstance(schema.get("$id"), str):
        raise ValueError("a schema with an $id of its own within the schema cannot be followed")
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            copy[key] = f"#/$defs/whole{value[1:]}"
        elif key in NAMED and isinstance(value, Mapping):
            copy[key] = {name: _moved(one) for name, one in value.items()}
        else:
            copy[key] = value if key in ("enum", "const", "default", "examples") else _moved(value)
    return copy


def _times(schema: Mapping[str, Any], least: str, most: str) -> tuple[int, int | None] | None:
    """The two limits of a size, None for no upper one; None if they are no sizes. Raises ValueError if none is left."""
    low, high = schema.get(least, 0), schema.get(most)
    if type(low) is not int or low < 0 or not (high is None or (type(high) is int and high >= 0)):
        return None
    if high is not None and high < low:
        raise ValueError(f"nothing follows this schema: its {least} is larger than its {most}")
    return low, high


def _is(value: Any, kind: str) -> bool:
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()
    known: Any = TYPES_OF_VALUES[kind]
    return whole or (isinstance(value, known) and (kind == "boolean" or not isinstance(value, bool)))


def _literal(value: Any) -> str:
    """A value as Python writes it, quoted for a rule."""
    return _lark(repr(value).replace("<|", r"<\x7c"))


def _lark(text: str) -> str:
    """A text, quoted for a rule."""
    return json.dumps(text)
