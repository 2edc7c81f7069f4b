"""Checks of the texts that tokenizers get."""

from __future__ import annotations


def clean_text(text: str) -> str:
    """The text without surrogates: pairs joined, lone ones replaced by U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
