"""Checks of the texts and keywords that tokenizers get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def clean_text(text: str) -> str:
    """The text without surrogates: pairs joined, lone ones replaced by U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def refuse_unknown(function: str, given: Mapping[str, Any], *known: str) -> None:
    """Raises TypeError, as Python does, for a keyword of `given` that is not in `known`; transformers ignores those."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
