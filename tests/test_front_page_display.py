"""The content of the chat box: formulas for KaTeX, code untouched, nothing that a browser would run or fetch."""

from __future__ import annotations

import re
import time

import pytest

from chatglm.conversation import chat_format
from chatglm.front.page import display

HARMLESS = [
    "你好，世界",
    "a < b && c > d",
    "<div>",
    "&lt; &amp; &#60;",
    "![x](y.png)",
    "`<b>` and ``a ` b``",
    "```html\n<b>\n\n</b>\n```\n<i>",
    "$x^2$ costs $5",
    "\\$5, \\\\(, C:\\new",
    "<|assistant|>",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_an_edited_question_is_the_text_that_was_typed(text: str) -> None:
    assert display.raw(display.question_markdown(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</p><svg/onload=alert(1)>",
        "<!-- x -->",
        "<?php ?>",
        "![x](http://elsewhere/x.png)",
        "![x][1]\n\n[1]: http://elsewhere/x.png",
        "&lt;b&gt;",
        "`open <b> tick",
        "$x <b> $5",
        "```mermaid\n<img src=x>\n```",
        r"$\text{<img src=x>}$",
    ],
)
def test_markup_is_shown_not_run(text: str) -> None:
    for shown in (display.question_markdown(text), display.answer_markdown(text)):
        assert not re.search(r"<[A-Za-z/!?]|!\[|&(?!lt;|gt;)[a-z]", shown)
        assert display.raw(shown) in (text, re.sub(r"\$(.+?)\$", r"\\(\1\\)", text))  # visible as written


def formula(tex: str, block: bool) -> str:
    """A formula as KaTeX gets it."""
    delimiters = display.LATEX_DELIMITERS[0 if block else 1]
    return f"{delimiters['left']}{tex}{delimiters['right']}"


@pytest.mark.parametrize(
    ("text", "tex", "block"),
    [
        ("$x^2$", "x^2", False),
        ("$ x^2 $", " x^2 ", False),
        (r"\(x^2\)", "x^2", False),
        ("$$x^2$$", "x^2", True),
        ("$$\n  x^2\n$$", "\n  x^2\n", True),
        (r"\[x^2\]", "x^2", True),
        ("\\[\nx^2\n\n\\]", "\nx^2\n\n", True),
        ("$a < b & c$", "a &lt; b &amp; c", False),
        (r"\begin{align}a &= b\end{align}", r"\begin{align}a &amp;= b\end{align}", True),
        (r"$\begin{gather*}a\end{gather*}$", r"\begin{gather*}a\end{gather*}", True),  # in display mode only
        (r"$\{a\}$", r"\{a\}", False),
    ],
)
def test_formulas_are_for_katex(text: str, tex: str, block: bool) -> None:
    expected = formula(tex, block)
    assert display.answer_markdown(text) == expected
    assert display.answer_markdown(f"前{text}后") == f"前{expected}后"
    assert display.question_markdown(text).replace(display.MARK, "") == text


def test_only_what_is_a_formula_has_its_delimiters() -> None:
    left, right = (str(display.LATEX_DELIMITERS[0][side]) for side in ("left", "right"))
    for text in (f"{left}x{right}", f"$a{left}b$", f"$a{right}b$"):
        shown = display.answer_markdown(text)
        assert left not in shown
        assert all(shown.count(str(one["left"])) <= 1 for one in display.LATEX_DELIMITERS)
    text = r"a <b> \(x < y\) \[\frac{1}{2}\]"
    assert display.raw(display.answer_markdown(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "It is $5, or $6 with milk",
        "between $5 and $10",
        "$5-$10",
        r"\$x^2\$",
        "a $ b $ c",
        "$",
        "$$",
        "$$$$",
        "`$x$`",
        "```\n$x$\n```",
        "~~~tex\n$$x$$\n~~~",
        "```\n$x$",
        "$x\n\ny$",
        r"$\frac{$",
        "$}x{$",
    ],
)
def test_what_is_no_formula_stays(text: str) -> None:
    assert display.answer_markdown(text) == text


def test_formulas_appear_when_they_are_whole() -> None:
    answer = "So $$\\frac{1}{2}$$ and \\(a_1\\), $b$ too."
    for end in range(len(answer) + 1):
        shown = display.answer_markdown(answer[:end])
        begun = sum(shown.count(str(one["left"])) for one in display.LATEX_DELIMITERS)
        ended = sum(shown.count(str(one["right"])) for one in display.LATEX_DELIMITERS)
        assert begun == ended == sum(end >= answer.index(last) + len(last) for last in ("{2}$$", "\\)", "$b$"))
    assert begun == 3


def test_diagrams_are_drawn_when_the_answer_is_whole() -> None:
    source = "```mermaid\ngraph TD\n  A --> B<br>\n```\n"
    marked = source.replace("<br>", f"<{display.MARK}br>")
    assert display.answer_markdown(source) == marked
    assert display.answer_markdown(source, growing=True) == marked.replace("mermaid", "mermaid code")
    assert display.raw(display.question_markdown(source)) == source
    for code in ("```python\nmermaid <b>\n```", "~~~ mermaids\n<b>\n~~~"):
        assert display.answer_markdown(code, growing=True) == code


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<https://a.test/?b=1&c=2>", f"<https://a.test/?b=1&{display.MARK}c=2>"),
        ("<mailto:a@b.test> <a@b.test>", "<mailto:a@b.test> <a@b.test>"),
        ("<https://a.test b>", f"<{display.MARK}https://a.test b>"),
        ("<javascript:alert(1)>", f"<{display.MARK}javascript:alert(1)>"),
    ],
)
def test_addresses_in_angle_brackets_stay_links(text: str, shown: str) -> None:
    assert display.answer_markdown(text) == shown
    assert display.raw(shown) == text


@pytest.mark.parametrize(
    "text",
    ["$" * 100_000, "$a " * 30_000, "`a``" * 30_000, r"\(" * 50_000, "```\n" * 30_000, "> " * 50_000, "<b" * 50_000,
     "<https://" * 20_000, "<" + "a" * 100_000 + "@", r"\begin{align}" * 10_000, "$" + "{" * 900 + "$"],
)
def test_hostile_texts_take_no_long_time(text: str) -> None:
    begin = time.thread_time()
    display.answer_markdown(text)
    assert time.thread_time() - begin < 3  # at most 0.03 on an idle machine


def test_messages_of_pairs_and_of_roles() -> None:
    history = [("$q$", "$a$")]
    assert display.messages(chat_format(2), history) == [display.question("$q$"), display.answer("$a$")]
    assert display.texts(chat_format(2), history) == ["$q$", "$a$"]
    roles = [
        {"role": "user", "content": "<q>"},
        {"role": "assistant", "metadata": "get_<b>", "content": "```python\ntool_call()\n```"},
        {"role": "observation", "content": "sunny"},
        {"role": "assistant", "metadata": "", "content": "It is sunny."},
    ]
    shown = display.messages(chat_format(3), roles)
    assert [message["role"] for message in shown] == ["user", "assistant", "assistant", "assistant"]
    title = {"title": "↩", "status": "done"}
    assert shown[2] == {"role": "assistant", "content": "```text\nsunny\n```", "metadata": title}
    assert shown[1]["metadata"] == {"title": f"⚙ get_<{display.MARK}b>", "status": "done"}
    assert "metadata" not in shown[3]
    assert display.texts(chat_format(3), roles) == [message["content"] for message in roles]
