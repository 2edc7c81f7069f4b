"""Renders a conversation for gradio's chat box: Markdown whose HTML is inert, with formulas for KaTeX.

Only the displayed text goes through here; the model gets the raw text of the history. In the browser, `behaviour.js`
takes the marks out again, so that nobody selects or copies them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import Any

from ...conversation.formats import ChatFormat
from ..messages import PAGE, TERMINAL

#: Inserted after the first character of markup: invisible, and makes it plain text in both Markdown and HTML.
MARK = "\u2060"
#: A private character, part of the delimiters that gradio looks for: only what is found to be a formula here is one.
FORMULA = "\ue0f0"
LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": f"{FORMULA}[", "right": f"]{FORMULA}", "display": True},
    {"left": f"{FORMULA}(", "right": f"){FORMULA}", "display": False},
]

# Tags but no addresses in angle brackets, entities, images, which would be fetched, and delimiters of ours.
_MARKUP = re.compile(
    rf"<(?=[A-Za-z/!?])(?!(?:https?://|mailto:)[^\s<>]+>|[\w.+-]{{1,64}}@[\w.-]{{1,255}}>)"
    rf"|&(?=[A-Za-z#])|!(?=\[)|{FORMULA}(?=[\[(])"
)
_MARKED = re.compile(rf"(?<=[<&!{FORMULA}]){MARK}")
_RENDERED = re.compile(rf"{FORMULA}([\[(])(.*?)([\])]){FORMULA}", re.DOTALL)

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
    | (?P<environment> \\begin\{(?P<name>(?:equation|align|alignat|gather)\*?)\}
                       (?:(?!\\begin\{(?P=name)\})[\s\S]){1,4000}? \\end\{(?P=name)\} )
    """,
    re.MULTILINE | re.VERBOSE,
)
_PNG = re.compile(r"iVBORw0KGgo[A-Za-z0-9+/]*={0,2}")
_MERMAID = re.compile(r"(?<=[`~])[ \t]*mermaid\b")
#: What KaTeX takes in display mode only.
_DISPLAY_ONLY = re.compile(r"\\begin\{(?:equation|align|alignat|gather|CD)\*?\}|\\tag\b")


#: Makes MathML of a formula, or None where it cannot; without it, the browser renders every formula. See `use_mathml`.
_mathml: Callable[[str, bool], str | None] | None = None


def use_mathml() -> None:
    """From now on, formulas become MathML on the server where mdtex2html knows them."""
    global _mathml
    from .mathml import mathml

    _mathml = mathml


def inert(text: str) -> str:
    """Returns text whose HTML tags, entities and images are shown literally; `raw` undoes it."""
    return _MARKUP.sub(lambda match: match[0] + MARK, text)


def raw(text: str) -> str:
    """Undoes `inert`, and the delimiters of formulas, in text that the visitor edited or copied in the chat box."""

    def formula(match: re.Match[str]) -> str:
        return f"\\{match[1]}{html.unescape(match[2])}\\{match[3]}"

    return _MARKED.sub("", _RENDERED.sub(formula, text))


def question_markdown(text: str) -> str:
    """Formats a question for the chat box. Its formulas stay as typed: the visitor may edit it there."""
    return _markdown(text, lambda match: inert(match[0]))


def answer_markdown(text: str, growing: bool = False) -> str:
    """Formats an answer for the chat box: complete formulas are rendered.

    Diagrams of a `growing` answer are shown as code, else each refresh would draw them anew.
    """
    return _markdown(text, _formula, growing)


def _markdown(text: str, formula: Callable[[re.Match[str]], str], growing: bool = False) -> str:
    shown, end = [], 0
    for match in _PARTS.finditer(text):
        shown.append(inert(text[end : match.start()]))
        shown.append(_code(match, growing) if match["code"] else formula(match))
        end = match.end()
    return "".join([*shown, inert(text[end:])])


def _code(match: re.Match[str], growing: bool) -> str:
    code = match["code"]
    first, newline, rest = code.partition("\n")
    if match["fence"] is None or not _MERMAID.search(first):
        return code
    # Gradio puts the source of a diagram into the page as HTML, and takes no other info string than this word alone.
    return (_MERMAID.sub("mermaid code", first) if growing else first) + newline + inert(rest)


def question(text: str) -> dict[str, Any]:
    """A question as a message of gradio."""
    return {"role": "user", "content": question_markdown(text)}


def answer(text: str, metadata: str = "", growing: bool = False) -> dict[str, Any]:
    """An answer as a message of gradio; with metadata (the tool that it calls), a collapsed one."""
    message: dict[str, Any] = {"role": "assistant", "content": answer_markdown(text, growing)}
    if metadata.strip():
        message["metadata"] = {"title": f"⚙ {inert(metadata.strip())}", "status": "done"}
    return message


def observation(text: str) -> dict[str, Any]:
    """The result of a call as a message of gradio, a collapsed one."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    inner = text.removeprefix("```result\n").removesuffix("\n```") if text.startswith("```result\n") else text
    content = f"{fence}text\n{inner}\n{fence}"
    return {"role": "assistant", "content": content, "metadata": {"title": "↩", "status": "done"}}


def picture(base64: str) -> dict[str, Any]:
    """A picture as a message of gradio. Raises ValueError for what is no PNG in Base64."""
    if not _PNG.fullmatch(base64):
        raise ValueError("this is no picture")
    return {"role": "assistant", "content": f"![](data:image/png;base64,{base64})"}


def messages(chat_format: ChatFormat, history: Sequence[Any]) -> list[dict[str, Any]]:
    """A history without its system message as gradio's messages, in the order of `texts`."""
    return [
        answer(message["content"], message.get("metadata") or "")
        if message["role"] == "assistant"
        else (observation if message["role"] == "observation" else question)(message["content"])
        for message in chat_format.as_messages(history)
    ]


def texts(chat_format: ChatFormat, history: Sequence[Any]) -> list[str]:
    """The raw text of each of the `messages`."""
    return [message["content"] for message in chat_format.as_messages(history)]


def _formula(match: re.Match[str]) -> str:
    tex = match["bracket"] or match["paren"] or match["dollars"] or match["dollar"] or match["environment"]
    if not tex.strip() or not _balanced(tex):
        return inert(match[0])
    inline = match["paren"] is not None or match["dollar"] is not None
    converted = _mathml(tex, not inline) if _mathml is not None and match["environment"] is None else None
    if converted is not None:
        return converted
    delimiters = LATEX_DELIMITERS[1 if inline and not _DISPLAY_ONLY.search(tex) else 0]
    return f"{delimiters['left']}{html.escape(tex.replace(FORMULA, ''), quote=False)}{delimiters['right']}"


def _balanced(tex: str) -> bool:
    """Whether every brace is closed: KaTeX looks for the end of a formula outside of braces only."""
    depth = 0
    for brace in re.findall(r"\\[\s\S]|[{}]", tex):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def waiting(before: int, language: str) -> str:
    """Returns the line under a question that is in the queue, with `before` others before it."""
    return PAGE["waiting" if before else "next"][language].format(before=before)


def speed(step: Any, language: str) -> str:
    """Returns the line under an answer: how many tokens, how fast, and why it ended unless the model ended it."""
    note = TERMINAL[step.finish_reason][language] if step.finish_reason != "stop" else ""
    rate = step.completion_tokens / max(step.seconds, 1e-9)
    return TERMINAL["speed"][language].format(tokens=step.completion_tokens, rate=rate, note=note)


def title(chat_format: ChatFormat, history: list[Any]) -> str:
    """Returns the beginning of the first question."""
    first = " ".join(next(iter(texts(chat_format, history)), "").split())
    return first if len(first) <= 40 else first[:39] + "…"
