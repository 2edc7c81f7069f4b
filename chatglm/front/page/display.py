"""Renders a conversation for gradio's chat box: Markdown whose HTML is inert and whose formulas are MathML.

Only the displayed text goes through here; the model gets the raw text of the history.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

from ...conversation.formats import ChatFormat
from ..messages import TERMINAL

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # mdtex2html 1.3 has invalid escapes in its strings, which Python 3.12 warns of
    import mdtex2html

#: Inserted after the first character of markup: invisible, and makes it plain text in both Markdown and HTML.
MARK = "\u2060"
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])|!(?=\[)")  # tags, entities, and images, which would be fetched
_MARKED = re.compile(rf"(?<=[<&!]){MARK}")

# Every alternative is bounded or stops at the next opener, so that no text takes more than linear time.
_PARTS = re.compile(
    r"""
    (?P<code> ^[ \t>]*(?P<fence>`{3,}|~{3,})[^\n`]*(?:\n|\Z)(?s:.*?)(?:^[ \t>]*(?P=fence)[`~]*[ \t]*$|\Z)
            | (?<![`\\])(?P<ticks>`+)(?!`)(?:(?!\n\n)[\s\S]){1,2000}?(?<!`)(?P=ticks)(?!`) )
    | \\\[ (?P<bracket> (?:(?!\\[\[\]])[\s\S]){1,4000}? ) \\\]
    | \\\( (?P<paren> (?:(?!\\[()]|\n\n)[\s\S]){1,4000}? ) \\\)
    | (?<![\\$]) \$\$ (?P<dollars> (?:\\[\s\S]|[^$\\]){1,4000}? ) \$\$
    | (?<![\\$]) \$ (?P<dollar> (?![\s$]) (?:\\.|[^$\\\n]){1,1000}? (?<!\s)
                              | [ ] (?=[^$\n]*[\\^_={}]) (?:\\.|[^$\\\n]){1,1000}? [ ] ) \$ (?!\d)
    """,
    re.MULTILINE | re.VERBOSE,
)

_TAGS = {
    "math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "ms", "mfrac", "msqrt", "mroot", "mstyle", "mpadded",
    "mphantom", "menclose", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts",
    "mprescripts", "none", "mtable", "mtr", "mtd", "mlabeledtr",
}  # fmt: skip
_ATTRIBUTES = {
    "accent", "accentunder", "columnalign", "columnlines", "columnspacing", "depth", "displaystyle", "fence", "form",
    "frame", "height", "largeop", "linethickness", "lspace", "mathbackground", "mathcolor", "mathsize", "mathvariant",
    "maxsize", "minsize", "movablelimits", "notation", "rowlines", "rowspacing", "rspace", "scriptlevel", "separator",
    "stretchy", "symmetric", "voffset", "width",
}  # fmt: skip


def inert(text: str) -> str:
    """Returns text whose HTML tags, entities and images are shown literally; `raw` undoes it."""
    return _MARKUP.sub(lambda match: match[0] + MARK, text)


def raw(text: str) -> str:
    """Undoes `inert` in text that the visitor edited or copied in the chat box."""
    return _MARKED.sub("", text)


def question_markdown(text: str) -> str:
    """Formats a question for the chat box. Its formulas stay as typed: the visitor may edit it there."""
    return _markdown(text, lambda match: inert(match[0]))


def answer_markdown(text: str) -> str:
    """Formats an answer, even an unfinished one, for the chat box: complete formulas become MathML."""
    return _markdown(text, _formula)


def _markdown(text: str, formula: Callable[[re.Match[str]], str]) -> str:
    shown, end = [], 0
    for match in _PARTS.finditer(text):
        shown.append(inert(text[end : match.start()]))
        shown.append(match[0] if match["code"] else formula(match))
        end = match.end()
    return "".join([*shown, inert(text[end:])])


def question(text: str) -> dict[str, Any]:
    """A question as a message of gradio."""
    return {"role": "user", "content": question_markdown(text)}


def answer(text: str, metadata: str = "") -> dict[str, Any]:
    """An answer as a message of gradio; with metadata (the tool that it calls), a collapsed one."""
    message: dict[str, Any] = {"role": "assistant", "content": answer_markdown(text)}
    if metadata.strip():
        message["metadata"] = {"title": f"⚙ {inert(metadata.strip())}", "status": "done"}
    return message


def messages(chat_format: ChatFormat, history: Sequence[Any]) -> list[dict[str, Any]]:
    """A history without its system message as gradio's messages, in the order of `texts`."""
    return [
        answer(message["content"], message.get("metadata") or "")
        if message["role"] == "assistant"
        else question(message["content"])
        for message in chat_format.as_messages(history)
    ]


def texts(chat_format: ChatFormat, history: Sequence[Any]) -> list[str]:
    """The raw text of each of the `messages`."""
    return [message["content"] for message in chat_format.as_messages(history)]


def _formula(match: re.Match[str]) -> str:
    tex = match["bracket"] or match["paren"] or match["dollars"] or match["dollar"]
    block = match["bracket"] is not None or match["dollars"] is not None
    return mathml(tex, block) or inert(match[0])


@lru_cache(maxsize=4096)  # while an answer streams, every refresh converts its formulas again
def mathml(tex: str, block: bool) -> str | None:
    """Converts a formula with mdtex2html to MathML that holds nothing but mathematics; None if it is not a formula."""
    try:
        html = mdtex2html.convert(f"$${' '.join(tex.split())}$$")
        found = re.search(r"<math.*</math>", html, re.DOTALL)
        tree = ElementTree.fromstring(found[0]) if found else None
        if tree is None:
            return None
        inside = "".join(_markup(child) for child in tree)
    except (ElementTree.ParseError, RecursionError, ValueError):
        return None
    return f'<math display="{"block" if block else "inline"}">{inside}</math>'


def _markup(element: ElementTree.Element) -> str:
    tag = element.tag.rpartition("}")[2]
    inside = _text(element.text) + "".join(_markup(child) for child in element)
    if tag not in _TAGS:  # mdtex2html passes on tags that are written in a formula
        return _text(f"<{tag}>") + inside + _text(f"</{tag}>") + _text(element.tail)
    given = (
        f' {name}="{value}"'
        for name, value in element.attrib.items()
        if name in _ATTRIBUTES and re.fullmatch(r"[\w.#%+ -]*", value)
    )
    return f"<{tag}{''.join(given)}>{inside}</{tag}>{_text(element.tail)}"


def _text(text: str | None) -> str:
    """Escapes everything but letters and digits, so that neither Markdown nor HTML finds markup in it."""
    return "".join(char if char.isalnum() else f"&#{ord(char)};" for char in text or "")


def speed(step: Any, language: str) -> str:
    """Returns the line under an answer: how many tokens, how fast, and why it ended unless the model ended it."""
    note = TERMINAL[step.finish_reason][language] if step.finish_reason != "stop" else ""
    rate = step.completion_tokens / max(step.seconds, 1e-9)
    return TERMINAL["speed"][language].format(tokens=step.completion_tokens, rate=rate, note=note)


def title(chat_format: ChatFormat, history: list[Any]) -> str:
    """Returns the beginning of the first question."""
    first = " ".join(next(iter(texts(chat_format, history)), "").split())
    return first if len(first) <= 40 else first[:39] + "…"
