"""Runs one call of a tool: checked arguments, a limit of time and of length, errors as observations."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .tool import Tool, ToolError

#: Characters of an observation, as in ChatGLM3's page.
MOST_CHARACTERS = 1024
TRUNCATED = " [TRUNCATED]"
#: Calls that outlived their time limit and still run; a thread cannot be ended from outside.
MOST_RUNAWAYS = 16

_runaways: set[threading.Thread] = set()


@dataclass(frozen=True)
class Call:
    """A call that a model makes.

    Args:
        arguments: None if they cannot be read; `error` then says why.
        content: what the model wrote, where it wrote something else than arguments.
        id: of OpenAI's API, "" elsewhere.
    """

    name: str
    arguments: Mapping[str, Any] | None
    error: str = ""
    content: str = ""
    id: str = ""


@dataclass(frozen=True)
class Observation:
    """The result of a call, as the model gets it; `ok`: it is one, and not what went wrong."""

    name: str
    content: str
    ok: bool = True


def run_call(
    tools: Mapping[str, Tool],
    call: Call,
    *,
    most_characters: int = MOST_CHARACTERS,
    cancel: threading.Event | None = None,
) -> Observation:
    """Runs a call. Whatever goes wrong in it becomes an observation: type and message, no traceback and no path.

    Args:
        cancel: set it to stop waiting for the result.
    """
    tool = tools.get(call.name)
    if tool is None or tool.run is None:
        known = ", ".join(tools) or "none"
        return Observation(call.name, f"There is no tool {call.name!r}; the tools are: {known}.", ok=False)
    if call.arguments is None:
        return Observation(call.name, f"Error: {call.error or 'the arguments cannot be read'}", ok=False)
    try:
        arguments = tool.check(call.arguments)
    except ToolError as error:
        return Observation(call.name, cut(f"Error: wrong arguments: {error}", most_characters), ok=False)
    found: list[Observation] = []
    ended = threading.Event()

    def work() -> None:
        try:
            found.append(Observation(call.name, as_text(tool(**arguments))))
        except ToolError as error:
            found.append(Observation(call.name, f"Error: {error}", ok=False))
        except Exception as error:  # of the tool's own: the model, or the user, may find another way
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            found.append(Observation(call.name, f"Error: {reason}", ok=False))
        finally:
            ended.set()

    _runaways.difference_update([thread for thread in _runaways if not thread.is_alive()])
    if len(_runaways) >= MOST_RUNAWAYS:
        return Observation(call.name, "Error: too many earlier calls have not ended yet.", ok=False)
    thread = threading.Thread(target=work, name=f"tool {call.name}", daemon=True)
    thread.start()
    end = time.monotonic() + tool.seconds
    while not ended.wait(min(0.1, max(0.0, end - time.monotonic()))):
        if cancel is not None and cancel.is_set():
            _runaways.add(thread)
            return Observation(call.name, "Error: the call was interrupted by the user.", ok=False)
        if time.monotonic() >= end:
            _runaways.add(thread)
            return Observation(call.name, f"Error: the tool took more than {tool.seconds:g} seconds.", ok=False)
    result = found[0] if found else Observation(call.name, "Error: the tool ended its thread.", ok=False)
    return Observation(result.name, cut(result.content, most_characters), result.ok)


def as_text(value: Any) -> str:
    """A result as the model reads it: text as it is, everything else as JSON if it can be written so."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def cut(text: str, most: int) -> str:
    """Returns at most `most` characters, and says so if there were more."""
    return text if len(text) <= most else text[:most] + TRUNCATED


class Runner(Protocol):
    """What the loop needs to know of that which is called: tools, or the code interpreter."""

    #: Names that the model may call.
    names: list[str]

    def is_manual(self, call: Call) -> bool:
        """Whether somebody enters the result by hand."""
        ...

    def asks(self, call: Call) -> bool:
        """Whether the user is asked before it runs."""
        ...

    def run(self, call: Call, cancel: threading.Event | None) -> Observation: ...


class ToolRunner:
    """A `Runner` of tools.

    Args:
        manual: names of tools that are not in `tools`, whose results are entered by hand.
    """

    def __init__(
        self, tools: Mapping[str, Tool], manual: Collection[str] = (), most_characters: int = MOST_CHARACTERS
    ) -> None:
        self.tools, self._most = dict(tools), most_characters
        self._manual = {*manual, *(one.name for one in tools.values() if one.run is None)}
        self.names = [*tools, *(name for name in manual if name not in tools)]

    def is_manual(self, call: Call) -> bool:
        return call.name in self._manual

    def asks(self, call: Call) -> bool:
        return call.name in self.tools and self.tools[call.name].confirm

    def run(self, call: Call, cancel: threading.Event | None) -> Observation:
        return run_call(self.tools, call, most_characters=self._most, cancel=cancel)
