"""Formulas as MathML, converted on the server by mdtex2html, as on the original's page: `web_demo.py --mathml`.

Screen readers read MathML, and a browser needs no script for it. KaTeX, which the page uses otherwise, knows more of
LaTeX: `aligned`, `\\boxed` and others.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from xml.etree import ElementTree

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # mdtex2html 1.3 has invalid escapes in its strings, which Python 3.12 warns of
    import mdtex2html

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
