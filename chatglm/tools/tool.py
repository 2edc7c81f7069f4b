"""`Tool`, and `@tool`, which makes one of a function."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from .signature import Signature

#: What both ChatGLM3 and GLM-4 read as a name; nothing in it can end the line that it is written on.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,63}")
#: Names that a model was trained to follow by something else than arguments.
RESERVED = ("interpreter", "python", "simple_browser", "cogview")
#: Characters of a description and of a schema as JSON: they are part of every prompt.
MOST_DESCRIPTION, MOST_SCHEMA = 1024, 8192
#: Arguments as the model gave them -> as the function takes them; raises ToolError.
Check = Callable[[Mapping[str, Any]], dict[str, Any]]


class ToolError(Exception):
    """Why a call gave no result, in words for the model: wrong arguments, or a message that a tool raises itself."""


@dataclass(frozen=True)
class Tool:
    """A tool as a model knows it, and what runs it.

    Args:
        parameters: JSON schema of the arguments, an object.
        run: is called with the checked arguments by name; None: somebody enters the result by hand.
        confirm: ask the user before each call.
        seconds: longest time of a call.
        check: turns the model's arguments into those of `run`.
        params: the parameters in the form of ChatGLM3's demos, for `describe(dialect="params")`.

    Raises:
        ValueError: the name or the schema cannot be written into a prompt.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., Any] | None = None
    confirm: bool = False
    seconds: float = 30.0
    check: Check = dict
    params: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            rule = "letters, digits, _ - and ., at most 64, beginning with a letter or _"
            raise ValueError(f"a tool cannot be called {self.name!r}: a name has {rule}")
        if self.name in RESERVED:
            raise ValueError(f"a tool cannot be called {self.name!r}: the models know something else by that name")
        if not isinstance(self.description, str) or len(self.description) > MOST_DESCRIPTION:
            raise ValueError(f"the description of {self.name} must be text of at most {MOST_DESCRIPTION} characters")
        try:
            written = json.dumps(self.parameters, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the parameters of {self.name} cannot be written as JSON: {error}") from error
        if not isinstance(self.parameters, Mapping) or len(written) > MOST_SCHEMA:
            raise ValueError(f"the parameters of {self.name} must be a JSON schema of at most {MOST_SCHEMA} characters")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function itself, as if it were not decorated."""
        if self.run is None:
            raise TypeError(f"{self.name} has no function: its results are entered by hand")
        return self.run(*args, **kwargs)

    def describe(self, dialect: str = "schema") -> dict[str, Any]:
        """Returns the tool as the model reads it.

        Args:
            dialect: "schema" (name, description, parameters as JSON schema) or "params", the list of parameters that
                ChatGLM3's demos showed to the model.
        """
        if dialect == "schema":
            return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        if dialect == "params":
            return {"name": self.name, "description": self.description, "params": [dict(one) for one in self.params]}
        raise ValueError(f"unknown dialect {dialect!r}: schema or params")


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *, name: str | None = None, description: str | None = None, confirm: bool = False, seconds: float = 30.0
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    confirm: bool = False,
    seconds: float = 30.0,
) -> Any:
    """Makes a tool of a function, by its signature and docstring.

    A parameter is `city: str`, described under `Args:` in the docstring, or ChatGLM3's
    `city: Annotated[str, "The name of the city", True]`, whose last item says whether it is required.

    Args:
        name, description: instead of the function's.
        confirm, seconds: see `Tool`.

    Raises:
        TypeError: a parameter has no annotation or an unsuitable one, or is not a named one.
        ImportError: pydantic, which checks the arguments, is not installed.
    """

    def made(run: Callable[..., Any]) -> Tool:
        signature = Signature(run)

        def check(arguments: Mapping[str, Any]) -> dict[str, Any]:
            try:
                return signature.check(arguments)
            except ValueError as error:
                raise ToolError(str(error)) from error

        return Tool(
            name or run.__name__,
            signature.description if description is None else description,
            signature.schema, run, confirm, seconds, check, signature.params,
        )  # fmt: skip

    return made if function is None else made(function)


def check_tools(tools: Iterable[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """Returns the tools by name; functions become tools. Raises ValueError if two have the same name."""
    found: dict[str, Tool] = {}
    for given in tools:
        one = given if isinstance(given, Tool) else tool(given)
        if one.name in found:
            raise ValueError(f"two tools are called {one.name!r}")
        found[one.name] = one
    return found
