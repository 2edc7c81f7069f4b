"""Helpers for the tests of conversations."""

from __future__ import annotations

from typing import Any

from tiny_chat import pair

TOOLS = [{"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}]


def tiny(version: int) -> Any:
    """A tokenizer with a small vocabulary."""
    return pair(version)[1]
