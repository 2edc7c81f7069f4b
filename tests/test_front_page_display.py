"""The content of the chat box: formulas as MathML, code untouched, nothing that a browser would run or fetch."""

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
        r"$\text{<img src=x>}$",
    ],
)
def test_markup_is_shown_not_run(text: str) -> None:
    for shown in (display.question_markdown(text), display.answer_markdown(text)):
        assert not re.search(r"<(?!/?m)[A-Za-z/!?]|!\[|&[a-z]", shown)
        assert display.raw(shown) == text  # visible as written


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("$x^2$", False),
        ("$ x^2 $", False),
        (r"\(x^2\)", False),
        ("$$x^2$$", True),
        ("$$\n  x^2\n$$", True),
        (r"\[x^2\]", True),
        ("\\[\nx^2\n\n\\]", True),
    ],
)
def test_formulas_become_mathml(text: str, block: bool) -> None:
    style = "block" if block else "inline"
    expected = f'<math display="{style}"><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>'
    assert display.answer_markdown(text) == expected
    assert display.answer_markdown(f"前{text}后") == f"前{expected}后"


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
    ],
)
def test_what_is_no_formula_stays(text: str) -> None:
    assert display.answer_markdown(text) == text


def test_formulas_appear_when_they_are_whole() -> None:
    answer = "So $$\\frac{1}{2}$$ and \\(a_1\\), $b$ too."
    for end in range(len(answer)):
        shown = display.answer_markdown(answer[:end])
        assert (
            shown.count("<math")
            == shown.count("</math>")
            == sum(end >= answer.index(closing) + len(closing) for closing in ("{2}$$", "\\)", "$b$"))
        )
        assert "⚠" not in shown and "&#9888;" not in shown  # mdtex2html's own mark of an unfinished formula
    assert display.answer_markdown(answer).count("<math") == 3


def test_inside_a_formula_markdown_finds_nothing() -> None:
    shown = display.answer_markdown(r"$a*b*c_{d} \text{[y](z) ![i](http://e/x)} \# \& < d$")
    assert "</math>" in shown
    assert not re.search(r"[*_`\[\]!#]", re.sub(r"&#\d+;", "", shown))


@pytest.mark.parametrize(
    "tex",
    [
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(http://elsewhere)}{x}",
        r"\class{pwned}{x}",
        r"\text{<script>alert(1)</script>}",
        r"\text{<img src='x' onerror='alert(1)'></img>}",
        r"\color{red;background:url(//e)}{x}",
    ],
)
def test_formulas_bring_nothing_but_mathematics(tex: str) -> None:
    shown = display.mathml(tex, False) or ""
    assert not re.search(r"<(script|img)|href|onerror=|style=|class=|url\(|javascript:", shown)


@pytest.mark.parametrize("tex", ["{" * 5000 + "}" * 5000, r"\frac{", r"\begin{matrix}", "\\", "^", "&"])
def test_what_cannot_be_converted_is_no_formula(tex: str) -> None:
    shown = display.mathml(tex, True)
    assert shown is None or shown.startswith("<math")


@pytest.mark.parametrize(
    "text",
    ["$" * 100_000, "$a " * 30_000, "`a``" * 30_000, r"\(" * 50_000, "```\n" * 30_000, "> " * 50_000, "<b" * 50_000],
)
def test_hostile_texts_take_no_long_time(text: str) -> None:
    begin = time.process_time()
    display.answer_markdown(text)
    assert time.process_time() - begin < 3


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
    assert [message["role"] for message in shown] == ["user", "assistant", "user", "assistant"]
    assert shown[1]["metadata"] == {"title": f"⚙ get_<{display.MARK}b>", "status": "done"}
    assert "metadata" not in shown[3]
    assert display.texts(chat_format(3), roles) == [message["content"] for message in roles]
