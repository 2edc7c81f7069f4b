"""A referee without a model: compares lines with the questions and key words of a puzzle."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise

from .puzzles import Key, Puzzle
from .referee import Judgement

#: From this similarity on, a line is taken for a known question.
SIMILAR = 0.3
#: From this one on, it is that question, also if the line holds the word of a key: "Are the guests blind?"
SAME = 0.6

_FILLERS_ZH = re.compile("是不是|[吗呢吧啊呀么了的是在会这那他她它们个请问]")
_FILLERS_EN = re.compile(
    r"\b(?:a|an|the|is|are|was|were|be|been|do|does|did|has|have|had|it|its|he|she|they|his|her|him|them|there|that|this|"
    r"of|to|in|on|at|by|for|with|some|something|somebody|someone|anything|any|will|would|can|could|please|because)\b"
)
_NEGATED = re.compile(r"不|没|非|\bnot?\b|n't\b|\bnever\b", re.IGNORECASE)


class KeywordReferee:
    """Knows the questions of each puzzle and the words of its keys; whatever else is asked, it calls irrelevant."""

    needs_keys = True

    def judge(self, puzzle: Puzzle, line: str) -> Judgement:
        """The verdict of the most similar known question; a line that states a key is right."""
        best, verdict = max(
            ((similarity(line, known.text), known.verdict) for known in puzzle.questions), default=(0.0, "irrelevant")
        )
        known = best >= SIMILAR
        keys = frozenset(key.id for key in puzzle.keys if states(line, key))
        if keys and not (best >= SAME and verdict == "no") and not _NEGATED.search(_without_words(puzzle, line)):
            return Judgement("yes", keys)
        return Judgement(verdict) if known else Judgement("irrelevant", sure=False)


def states(line: str, key: Key) -> bool:
    """Whether a line holds a word of every group of a key."""
    text = line.lower()
    return bool(key.words) and all(any(_holds(text, word.lower()) for word in group) for group in key.words)


def _without_words(puzzle: Puzzle, line: str) -> str:
    """A line without the words of keys, some of which hold a "not" themselves."""
    for word in (word for key in puzzle.keys for group in key.words for word in group):
        line = line.lower().replace(word.lower(), "")
    return line


def _holds(text: str, word: str) -> bool:
    if not word.isascii():
        return word in text
    return re.search(rf"\b{re.escape(word)}\w{{0,3}}\b", text) is not None


def similarity(one: str, other: str) -> float:
    """From 0 to 1: the share of common pairs of characters, and Chinese characters; fillers do not count."""
    pairs, others = _pairs(one), _pairs(other)
    total = pairs.total() + others.total()
    return 2 * (pairs & others).total() / total if total else 0.0


@lru_cache(maxsize=4096)
def _pairs(text: str) -> Counter[str]:
    text = text.lower()
    plain = _FILLERS_EN.sub(" ", text) if text.isascii() else _FILLERS_ZH.sub("", text)
    words = re.findall(r"[a-z0-9]+|[一-鿿]+", plain)
    found = Counter(pair for word in words for padded in [f"<{word}>"] for pair in map("".join, pairwise(padded)))
    return found + Counter(sign for word in words if not word.isascii() for sign in word)
