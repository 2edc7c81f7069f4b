"""Reads the tools of a file that the user names: `--tools-module FILE.py`."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from .tool import Tool, check_tools


def load_tools(path: str | os.PathLike[str]) -> dict[str, Tool]:
    """Runs a Python file and returns its tools by name: the global names that hold a `Tool`, and those in `TOOLS`.

    The file is the user's own, and runs with the user's rights.

    Raises:
        OSError: the file cannot be read.
        ValueError: it fails, or holds no tool, or two of the same name.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        found = runpy.run_path(str(file), run_name=file.stem)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} failed: {type(error).__name__}: {error}") from error
    listed = found.get("TOOLS", [])
    if isinstance(listed, Tool) or not all(isinstance(one, Tool) or callable(one) for one in listed):
        raise ValueError(f"TOOLS of {file} must be a list of tools or functions")
    given = [one for one in found.values() if isinstance(one, Tool)]
    try:
        tools = check_tools([*{id(one): one for one in [*given, *listed]}.values()])
    except TypeError as error:
        raise ValueError(f"{file}: {error}") from error
    if not tools:
        raise ValueError(f"{file} holds no tool: write @tool (from chatglm.tools import tool) above a function")
    return tools
