"""What a model may do beside answering: the arguments of the front doors for tools and code, and what they open."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversation.formats import ChatFormat
from .arguments import LibraryError, importing_libraries, require

if TYPE_CHECKING:
    from ..interpreter import Isolation
    from ..tools import Tool, ToolRunner


@dataclass
class Abilities:
    """What was asked for.

    Args:
        written: descriptions of tools that nothing runs here: somebody enters their results.
        tools: tools that run here, by name.
        isolation: how code runs; None: it does not.
    """

    written: Any = None
    tools: dict[str, Tool] = field(default_factory=dict)
    isolation: Isolation | None = None

    def described(self) -> Any:
        """All tools as the model reads them; None without any."""
        if not self.tools:
            return self.written
        listed = list(self.written.values()) if isinstance(self.written, Mapping) else list(self.written or [])
        return [*listed, *(one.describe() for one in self.tools.values())]

    def runner(self) -> ToolRunner:
        from ..tools import ToolRunner

        return ToolRunner(self.tools, names_of_tools(self.written))


def add_ability_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --tools and the others, which `open_abilities` reads."""
    group = parser.add_argument_group("tools and code")
    group.add_argument(
        "--tools", metavar="FILE", help="JSON or YAML list of tools whose results you enter (ChatGLM3, GLM-4)"
    )
    group.add_argument(
        "--tools-module", metavar="FILE.py", action="append",
        help="Python file of tools to run; may be given several times",
    )
    group.add_argument("--mcp", metavar="CONFIG.json", help="MCP servers whose tools to use, after a confirmation each")
    group.add_argument(
        "--interpreter", nargs="?", const="isolated", metavar="trusted",
        help="run the code that the model writes, in a sandbox; `trusted` runs it without one (ChatGLM3)",
    )  # fmt: skip


def open_abilities(args: argparse.Namespace, language: str, stack: contextlib.ExitStack) -> Abilities:
    """Opens what the arguments ask for; `stack` closes it.

    Raises OSError, ValueError, RuntimeError or LibraryError in words for the user.
    """
    found = Abilities(parse_tools(Path(args.tools).read_text(encoding="utf-8"), args.tools) if args.tools else None)
    if args.interpreter and (args.tools or args.tools_module or args.mcp):
        raise ValueError("--interpreter goes without tools: ChatGLM3 was trained for one or the other")
    if args.interpreter:
        require("interpreter", language)
        with importing_libraries(language):
            from ..interpreter import choose_isolation
        found.isolation = choose_isolation(args.interpreter)
    if args.tools_module or args.mcp:
        require("tools", language)
        with importing_libraries(language):
            from ..tools import load_tools
        for path in args.tools_module or []:
            _add(found.tools, load_tools(path), path)
    if args.mcp:
        require("mcp", language)
        from ..tools.mcp_servers import MCPServers, read_config

        try:
            servers = stack.enter_context(MCPServers(read_config(args.mcp)))
        except ImportError as error:
            raise LibraryError(str(error)) from error
        _add(found.tools, servers.tools, args.mcp)
    _add(dict.fromkeys(names_of_tools(found.written)), found.tools, str(args.tools))
    return found


def check_abilities(abilities: Abilities, chat_format: ChatFormat) -> None:
    """Raises ValueError if the model knows nothing of them."""
    if abilities.isolation is not None and "interpreter" not in getattr(chat_format, "raw_tools", ()):
        raise ValueError(f"--interpreter is for ChatGLM3-6B: {chat_format.model_name} was not trained for it")


def parse_tools(text: str, where: str) -> Any:
    """Reads a list of tools in JSON or YAML. Raises ValueError, which names `where` it is from."""
    try:
        if text.lstrip()[:1] in ("[", "{"):
            return json.loads(text)
        import yaml

        found = yaml.safe_load(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is neither valid JSON nor YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, (list, dict)):
        raise ValueError(f"{where} holds no list of tools")
    try:
        return json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:  # a date, or a list within itself
        raise ValueError(f"{where} cannot be written as JSON ({error})") from error


def names_of_tools(written: Any) -> list[str]:
    """The names in descriptions of tools, whatever their form."""
    listed = [*written.values()] if isinstance(written, Mapping) else written or []
    found = []
    for one in listed if isinstance(listed, list) else []:
        inner = one.get("function", one) if isinstance(one, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            found.append(inner["name"])
    return found


def _add(tools: dict[str, Any], more: Mapping[str, Any], where: str) -> None:
    for name, one in more.items():
        if name in tools:
            raise ValueError(f"{where}: there is another tool called {name!r}")
        tools[name] = one
