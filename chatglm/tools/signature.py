"""Reads a function's signature and docstring: the JSON schema of its arguments, and a check of given ones."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields?|Examples?):\s*$", re.MULTILINE)
_GOOGLE = re.compile(r"^ {2,8}(\w+)(?: *\([^)\n]*\))?:[ \t]*(.*(?:\n {6,}\S.*)*)", re.MULTILINE)
_SPHINX = re.compile(r"^:param (?:[^:\n]* )?(\w+):[ \t]*(.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Signature:
    """The arguments of a function.

    `description` is the docstring without its sections; `schema` the JSON schema of the arguments; `params` the same in
    the form of ChatGLM3's demos. Raises TypeError as `tool`, ImportError without pydantic.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{function.__name__} is a coroutine function: a tool is called in a thread of its own")
        self.description, described = _read_docstring(function.__doc__ or "")
        self.params: list[dict[str, Any]] = []
        hints = typing.get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        self._names: list[str] = []
        self._blank: dict[str, Any] = {}  # arguments that may be left out, but not of the function
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind not in _NAMED:
                raise TypeError(f"the parameter {name!r} of {function.__name__} must be one that is passed by name")
            if name not in hints:
                raise TypeError(f"the parameter {name!r} of {function.__name__} needs an annotation of its type")
            kind, description, required = _read_annotation(name, hints[name])
            has_default = parameter.default is not inspect.Parameter.empty
            if required is None:
                required = not has_default
            description = described.get(name, "") if description is None else description
            default = parameter.default if has_default else None
            if not (required or has_default):
                self._blank[name] = None
            fields[f"argument_{len(fields)}"] = _field(name, kind, description, ... if required else default)
            self._names.append(name)
            shown = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            self.params.append({"name": name, "description": description, "type": shown, "required": required})
        self._model = _pydantic().create_model(
            "Arguments", __config__={"extra": "forbid", "coerce_numbers_to_str": True}, **fields
        )
        self.schema = _schema_of(self._model)

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments as the types of the signature. Raises ValueError that says what is wrong with each."""
        try:
            checked = self._model.model_validate(dict(arguments))
        except _pydantic().ValidationError as error:
            raise ValueError("; ".join(map(_reason, error.errors()))) from error
        places = {f"argument_{index}": name for index, name in enumerate(self._names)}
        return self._blank | {places[field]: getattr(checked, field) for field in checked.model_fields_set}


def _pydantic() -> Any:
    try:
        import pydantic
    except ImportError as error:
        raise ImportError("tools need pydantic: pip install pydantic") from error
    return pydantic


def _field(name: str, kind: Any, description: str, default: Any) -> Any:
    """A field of pydantic, under an alias: the model has attributes of its own, such as `json`."""
    extra = {"description": description} if description else {}
    return kind, _pydantic().Field(default, alias=name, **extra)


def _read_annotation(name: str, annotation: Any) -> tuple[Any, str | None, bool | None]:
    """Returns (type, description, required) of a parameter; None where the annotation does not say."""
    if typing.get_origin(annotation) is not Annotated:
        return annotation, None, None
    kind, *said = typing.get_args(annotation)
    if not any(isinstance(one, (str, bool)) for one in said):
        return annotation, None, None  # pydantic's own: Annotated[int, Field(ge=1)]
    if not isinstance(said[0], str):
        raise TypeError(f"the parameter {name!r}: its description must be a string, not {said[0]!r}")
    if len(said) > 1 and not isinstance(said[1], bool):
        raise TypeError(f"the parameter {name!r}: whether it is required must be True or False, not {said[1]!r}")
    return kind, said[0], said[1] if len(said) > 1 else None


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Returns the description and those of the parameters, from a docstring in Google's or Sphinx' form."""
    text = inspect.cleandoc(text)
    found = {name: " ".join(said.split()) for name, said in _SPHINX.findall(text)}
    text = re.sub(r"^:\w.*(?:\n[ \t]+\S.*)*", "", text, flags=re.MULTILINE)
    description, *sections = _SECTION.split(text)
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Arguments", "Parameters"):
            found |= {name: " ".join(said.split()) for name, said in _GOOGLE.findall(body)}
    return description.strip(), found


def _schema_of(model: Any) -> dict[str, Any]:
    """The JSON schema of a model of pydantic, as short as a prompt wants it."""
    from pydantic.json_schema import GenerateJsonSchema

    class Untitled(GenerateJsonSchema):
        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    made = model.model_json_schema(schema_generator=Untitled)
    properties = {name: _typed(one) for name, one in made.get("properties", {}).items()}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    for key in ("required", "$defs"):
        if key in made:
            schema[key] = made[key]
    return schema


def _typed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one parameter with its type first, as in OpenAI's examples, on which the models were trained."""
    first = {key: schema[key] for key in ("type", "description") if key in schema}
    return first | {key: value for key, value in schema.items() if key not in first and value is not None}


def _reason(error: Mapping[str, Any]) -> str:
    place = ".".join(map(str, error["loc"])) or "arguments"
    said = {"missing": "it is required", "extra_forbidden": "there is no such argument"}
    return f"{place}: {said.get(error['type'], error['msg'])}"
