"""Holds the arguments of tool calls to their schemas: of calls that the client forces, and of tools with `strict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessor

from .errors import ApiError
from .grammar import MOST_CHARACTERS, Grammar, Grammars

#: Tokens that the first line of a message may have: longer ones are no name of a tool.
LONGEST_NAME = 128


#: Types in ChatGLM3's own descriptions -> those of JSON schemas.
TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean", "list": "array", "array": "array", "dict": "object", "object": "object",
}  # fmt: skip


def schema_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema of a function's arguments: an object without other keys, unless the schema allows them.

    Raises ApiError (400) if its `parameters` are no object.
    """
    schema = {"type": "object", "properties": {}, "additionalProperties": False} | (function.get("parameters") or {})
    if schema["type"] != "object":
        raise ApiError(400, f"the parameters of {function['name']} must be of the type object", param="tools")
    own = [param for param in function.get("params") or [] if isinstance(param.get("name"), str)]
    if own and not schema["properties"]:
        kinds = {param["name"]: TYPES.get(str(param.get("type", "")).lower()) for param in own}
        schema["properties"] = {name: {} if kind is None else {"type": kind} for name, kind in kinds.items()}
        schema["required"] = [param["name"] for param in own if param.get("required")]
    return schema


def compile_arguments(grammars: Grammars, tokenizer: Any, schemas: Mapping[str, dict[str, Any]]) -> dict[str, Grammar]:
    """Compiles the grammar of each tool's arguments, in the form in which the model learned to write them.

    Raises ApiError (400) for schemas that it cannot follow.
    """
    if sum(len(str(schema)) for schema in schemas.values()) > 2 * MOST_CHARACTERS:
        raise ApiError(400, "tools: the schemas are too large to be followed", param="tools")
    form = tokenizer.chat_format.call_grammar
    return {name: grammars.compile(tokenizer, schema, f"tools.{name}", form) for name, schema in schemas.items()}


class FollowCalls(LogitsProcessor):
    """Leaves an answer free until it has begun a call of one of these tools; then its arguments follow the grammar.

    Args:
        grammars: by name of the tool.
        prompt_tokens: number of tokens before the answer.
        next_message: the token that begins another message of the same answer.
    """

    def __init__(self, grammars: Mapping[str, Grammar], prompt_tokens: int, next_message: int) -> None:
        self._grammars, self._next_message = grammars, next_message
        self._pieces = next(iter(grammars.values())).pieces
        self._start = self._read = prompt_tokens
        self._following: LogitsProcessor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in input_ids[0, self._read :].tolist():
            self._read += 1
            self._see(token, input_ids)
        return scores if self._following is None else self._following(input_ids, scores)

    def _see(self, token: int, input_ids: torch.Tensor) -> None:
        if self._following is not None:
            return
        if token == self._next_message:
            self._start = self._read
        elif self._pieces[token] == b"\n" and self._read - self._start <= LONGEST_NAME:
            line = b"".join(self._pieces[index] for index in input_ids[0, self._start : self._read].tolist())
            grammar = self._grammars.get(line.decode(errors="replace").strip())
            if grammar is not None and line.count(b"\n") == 1:
                self._following = grammar.processor(self._read)
