"""Tools that a model may call: what they are, how a call runs, and the loop of answers, calls and observations.

`@tool` makes a tool of a function, `run_conversation` lets a model use it. `builtin.py` has tools that are safe to
offer to anyone, `module.py` reads those of a user's file, `mcp_servers.py` those of MCP servers. What a model writes
only ever chooses among registered functions and their checked arguments.
"""

from __future__ import annotations

from .builtin import BUILT_IN, calculate, convert_units, get_date, random_number
from .loop import Done, run_conversation, tool_loop
from .module import load_tools
from .running import Call, Observation, Runner, ToolRunner, run_call
from .sources import Text
from .tool import Tool, ToolError, check_tools, tool

__all__ = [
    "BUILT_IN",
    "Call",
    "Done",
    "Observation",
    "Runner",
    "Text",
    "Tool",
    "ToolError",
    "ToolRunner",
    "calculate",
    "check_tools",
    "convert_units",
    "get_date",
    "load_tools",
    "random_number",
    "run_call",
    "run_conversation",
    "tool",
    "tool_loop",
]
