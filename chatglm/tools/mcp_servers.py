"""Tools of MCP servers (Model Context Protocol), as one source of tools: `--mcp CONFIG.json`. Needs the library `mcp`.

The file has the form that other programs use: {"mcpServers": {"NAME": {"command", "args", "env", "cwd"} or {"url"}}}.
Two keys are ours: "tools", the list of the tools that may be used, and "confirm": false, to run calls without asking.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .running import TRUNCATED
from .tool import MOST_DESCRIPTION, Tool, ToolError

_KEYS = {"command", "args", "env", "cwd", "url", "type", "tools", "confirm", "disabled"}
CONNECT_SECONDS = 30.0
CALL_SECONDS = 60.0


def read_config(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Returns the servers of a configuration file by name. Raises OSError, or ValueError if it is not of that form."""
    file = Path(path).expanduser()
    try:
        servers = json.loads(file.read_text(encoding="utf-8"))["mcpServers"]
        found = {str(name): dict(server) for name, server in servers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{file} is not of the form {{"mcpServers": {{"NAME": {{…}}}}}} ({error})') from error
    for name, server in found.items():
        _check_server(f"{file}: the server {name!r}", server)
    return {name: server for name, server in found.items() if not server.get("disabled")}


def _check_server(where: str, server: Mapping[str, Any]) -> None:
    if unknown := sorted(set(server) - _KEYS):
        raise ValueError(f"{where} has the unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    if ("command" in server) == ("url" in server):
        raise ValueError(f'{where} needs either "command" or "url"')
    texts = [server.get(key, "") for key in ("command", "url", "type", "cwd")]
    lists = [server.get(key, []) for key in ("args", "tools")]
    env, flags = server.get("env", {}), [server.get(key, False) for key in ("confirm", "disabled")]
    if not (
        all(isinstance(one, str) for one in texts)
        and all(isinstance(many, list) and all(isinstance(one, str) for one in many) for many in lists)
        and isinstance(env, dict) and all(isinstance(one, str) for one in env.values())
        and all(isinstance(one, bool) for one in flags)
    ):  # fmt: skip
        raise ValueError(
            f"{where}: command, url, type and cwd are texts, args and tools lists of texts, env texts by name, and "
            "confirm and disabled true or false"
        )


class MCPServers(contextlib.ExitStack):
    """Connections to MCP servers; `tools` are theirs, by name. Leaving the context ends them.

    Raises:
        ImportError: the library is missing.
        OSError, ValueError: the configuration is wrong, a server cannot be reached, or a tool cannot be offered.
    """

    def __init__(self, servers: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        try:
            from anyio.from_thread import start_blocking_portal
            from mcp import Client, StdioServerParameters
        except ImportError as error:
            raise ImportError(f"MCP servers need the library mcp ({error}): pip install mcp") from error
        self.tools: dict[str, Tool] = {}
        try:
            self._portal = self.enter_context(start_blocking_portal())
            for name, server in servers.items():
                kept = {key: server[key] for key in ("command", "args", "env", "cwd") if key in server}
                target: Any = server["url"] if "url" in server else StdioServerParameters(**kept)
                client = self._connect(name, Client(target, read_timeout_seconds=CONNECT_SECONDS))
                self._add(name, server, client)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *details: Any) -> None:
        super().__exit__(None, None, None)  # what happened in the context is no concern of the connections

    def _connect(self, name: str, client: Any) -> Any:
        try:
            return self.enter_context(self._portal.wrap_async_context_manager(client))
        except Exception as error:  # a library's, or a group of them
            raise ValueError(f"the MCP server {name!r} cannot be reached: {_first(error)}") from error

    def _add(self, name: str, server: Mapping[str, Any], client: Any) -> None:
        listed: list[Any] = []
        cursor = None
        try:
            for _ in range(100):  # pages
                page = self._portal.call(functools.partial(client.list_tools, cursor=cursor))
                listed += page.tools
                cursor = page.next_cursor
                if not cursor:
                    break
        except Exception as error:
            raise ValueError(f"the MCP server {name!r} does not list its tools: {_first(error)}") from error
        wanted = server.get("tools")
        if wanted is not None and (missing := sorted(set(wanted) - {one.name for one in listed})):
            raise ValueError(f"the MCP server {name!r} has no tools called {', '.join(missing)}")
        for one in listed:
            if wanted is not None and one.name not in wanted:
                continue
            if one.name in self.tools:
                raise ValueError(f'two MCP servers have a tool called {one.name!r}: choose with "tools" in the file')
            try:
                self.tools[one.name] = self._tool(one, client, bool(server.get("confirm", True)))
            except ValueError as error:
                raise ValueError(f'the MCP server {name!r}: {error}; choose others with "tools" in the file') from error

    def _tool(self, listed: Any, client: Any, confirm: bool) -> Tool:
        description = listed.description or ""
        if len(description) > MOST_DESCRIPTION:
            description = description[: MOST_DESCRIPTION - len(TRUNCATED)] + TRUNCATED

        def run(**arguments: Any) -> str:
            result = self._portal.call(client.call_tool, listed.name, arguments, CALL_SECONDS)
            text = "\n".join(getattr(part, "text", None) or f"[{part.type}]" for part in result.content)
            if result.is_error:
                raise ToolError(text)
            return text

        return Tool(
            listed.name, description, listed.input_schema, run, confirm, CALL_SECONDS, checker(listed.input_schema)
        )


def checker(schema: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns the check of arguments against a JSON schema. It fetches nothing that the schema refers to."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"its schema is not valid: {error.message}") from error
    validator = Draft202012Validator(schema, registry=Registry())

    def check(arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            wrong = [f"{'.'.join(map(str, error.absolute_path)) or 'arguments'}: {error.message}"
                     for error in validator.iter_errors(dict(arguments))]  # fmt: skip
        except Exception as error:  # a reference to somewhere else
            raise ToolError(f"the tool's schema cannot be used ({type(error).__name__})") from error
        if wrong:
            raise ToolError("; ".join(wrong))
        return dict(arguments)

    return check


def _first(error: BaseException) -> str:
    """The message of an error, or of the first one in a group."""
    while inner := getattr(error, "exceptions", None):
        error = inner[0]
    return " ".join(f"{type(error).__name__}: {error}".split())
