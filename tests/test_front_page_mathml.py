"""Formulas as MathML (`web_demo.py --mathml`): mathematics and nothing else; what mdtex2html lacks stays for KaTeX."""

from __future__ import annotations

import re

import pytest

from chatglm.front.page import display
from chatglm.front.page.mathml import mathml


@pytest.fixture
def with_mathml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_mathml", None)  # restored afterwards
    display.use_mathml()


@pytest.mark.parametrize(
    ("text", "block"),
    [("$x^2$", False), (r"\(x^2\)", False), ("$$x^2$$", True), ("$$\n  x^2\n$$", True), (r"\[x^2\]", True)],
)
def test_formulas_become_mathml(text: str, block: bool, with_mathml: None) -> None:
    style = "block" if block else "inline"
    expected = f'<math display="{style}"><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>'
    assert display.answer_markdown(text) == expected
    assert display.answer_markdown(f"前{text}后") == f"前{expected}后"


def test_an_environment_stays_for_katex(with_mathml: None) -> None:
    shown = display.answer_markdown(r"\begin{align} a &= b \end{align}")
    assert "<math" not in shown and display.FORMULA in shown


def test_questions_stay_as_they_were_typed(with_mathml: None) -> None:
    assert display.raw(display.question_markdown("$x^2$")) == "$x^2$"


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
    shown = mathml(tex, False) or ""
    assert not re.search(r"<(script|img)|href|onerror=|style=|class=|url\(|javascript:", shown)


@pytest.mark.parametrize("tex", ["{" * 5000 + "}" * 5000, r"\frac{", r"\begin{matrix}", "\\", "^", "&"])
def test_what_cannot_be_converted_is_no_formula(tex: str) -> None:
    shown = mathml(tex, True)
    assert shown is None or shown.startswith("<math")
