"""The three answers of the host, and how they are found in what a model wrote."""

from __future__ import annotations

import re

#: Yes, no, or of no importance for the solution.
VERDICTS = ("yes", "no", "irrelevant")
#: As a host says them; these are also the words that a model chooses between.
WORDS = {
    "zh": {"yes": "是", "no": "否", "irrelevant": "无关"},
    "en": {"yes": "Yes", "no": "No", "irrelevant": "Irrelevant"},
}

# Longer and negated forms stand before those that they contain.
_FORMS = [
    ("irrelevant", r"无关|不相关|没有?关系|不重要|不清楚|不知道|未知|irrelevant|unknown|"
                   r"not (?:relevant|important|known)|does(?:n't| not) matter|"
                   r"(?:cannot|can't) (?:say|tell)|not sure|no matter"),
    ("yes", r"不是不|不无|没错|不错"),
    ("no", r"不是|不对|不正确|并非|并不|没有|否|错|不|(?:not|in)\s?(?:correct|right|true|so)\b|\bincorrect|\bnot\b|"
           r"n't\b|\bno\b|\bnope|\bwrong|\bfalse"),
    ("yes", r"是|对|正确|确实|\byes\b|\byeah|\byep|\bcorrect|\bright\b|\btrue\b|\bindeed"),
]  # fmt: skip
_PATTERN = re.compile("|".join(f"(?P<f{index}>{forms})" for index, (_, forms) in enumerate(_FORMS)), re.IGNORECASE)


def read_verdict(text: str) -> str | None:
    """Returns the first verdict that a free answer of a model states, or None if there is none."""
    found = _PATTERN.search(text)
    if found is None or found.lastgroup is None:
        return None
    return _FORMS[int(found.lastgroup[1:])][0]
