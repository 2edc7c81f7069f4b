"""What a visitor's browser says of its visitor: the language, and settings, which anyone may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ...language import browser_language
from ..abilities import parse_tools
from ..messages import PAGE


def language_of(request: gr.Request) -> str:
    """The language of the visitor's browser."""
    return browser_language(request.headers.get("accept-language", ""))


def read_tools(text: str, language: str) -> Any:
    """Parses the tools that a visitor wrote, None without any. Raises ValueError; the session checks the rest."""
    try:
        return parse_tools(text, PAGE["tools"][language]) if text.strip() else None
    except ValueError as error:
        raise ValueError(PAGE["tools_json"][language].format(reason=error)) from error


def valid_settings(knobs: Mapping[str, Any], given: Any) -> dict[Any, Any]:
    """Returns knob -> value for those of the settings given by name that the knobs can have; the others stay as set."""
    values: dict[Any, Any] = {}
    for name, knob in knobs.items():
        value = given.get(name) if isinstance(given, Mapping) else None
        if isinstance(knob, gr.Slider):
            valid = isinstance(value, (int, float)) and knob.minimum <= value <= knob.maximum
        elif isinstance(knob, (gr.Dropdown, gr.Radio)):
            valid = value in [choice for _, choice in knob.choices]
        elif isinstance(knob, gr.Checkbox):
            valid = isinstance(value, bool)
        else:
            valid = isinstance(value, str)
        if valid:
            values[knob] = value
    return values
