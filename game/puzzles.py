"""The puzzles: files of JSON lines, or tables with two columns."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .verdicts import VERDICTS

FOLDER = Path(__file__).parent / "puzzles"
#: The player's lines are at most this long; so are the texts of a puzzle.
MOST_CHARACTERS = 4000


@dataclass(frozen=True)
class Key:
    """One of the facts that make up the solution.

    Args:
        words: groups of words; a line that holds one word of every group states the fact.
    """

    id: str
    fact: str
    words: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Question:
    """A question with the right answer to it, one of `VERDICTS`."""

    text: str
    verdict: str


@dataclass(frozen=True)
class Puzzle:
    """A story to be found out.

    Args:
        surface: what the player is told.
        bottom: what really happened.
        keys: the facts that the player has to find; there is at least one.
        questions: with the right answers; what the keyword referee knows.
        test: further ones, which no referee knows: by them its accuracy is measured.
    """

    id: str
    title: str
    surface: str
    bottom: str
    keys: tuple[Key, ...]
    hints: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    test: tuple[Question, ...] = ()


def own_puzzles(lang: str) -> list[Puzzle]:
    """The puzzles that come with the game, "zh" or "en"."""
    return read_puzzles(FOLDER / f"{lang}.jsonl")


def read_puzzles(path: Path) -> list[Puzzle]:
    """Reads puzzles: JSON lines as in `puzzles/`, or a CSV file with the columns story and solution.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else; the message names the line.
    """
    if path.suffix.lower() in (".xlsx", ".xls"):
        raise ValueError(f"{path}: save the table as CSV (UTF-8) first")
    text = path.read_text(encoding="utf-8-sig")
    found = _from_table(text, path) if path.suffix.lower() == ".csv" else _from_lines(text, path)
    if not found:
        raise ValueError(f"{path} holds no puzzle")
    return found


def _from_table(text: str, path: Path) -> list[Puzzle]:
    rows = list(csv.reader(io.StringIO(text, newline="")))
    puzzles = []
    for number, row in enumerate(rows[1:], 2):  # the first row has the names of the columns
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise ValueError(f"{path}, row {number}: it must have two columns, story and solution")
        surface, bottom = row[0].strip(), row[1].strip()
        puzzles.append(Puzzle(str(number), "", surface, bottom, (Key("solution", bottom),)))
    return puzzles


def _from_lines(text: str, path: Path) -> list[Puzzle]:
    puzzles = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                puzzles.append(_puzzle(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}, line {number}: {reason}") from error
    return puzzles


def _puzzle(given: Mapping[str, Any]) -> Puzzle:
    keys = tuple(
        Key(_text(key["id"]), _text(key["fact"]), tuple(tuple(map(_text, group)) for group in key.get("words", ())))
        for key in given.get("keys", ())
    )
    puzzle = Puzzle(
        id=_text(given["id"]),
        title=_text(given.get("title", "")),
        surface=_text(given["surface"]),
        bottom=_text(given["bottom"]),
        keys=keys or (Key("solution", _text(given["bottom"])),),
        hints=tuple(map(_text, given.get("hints", ()))),
        questions=_questions(given.get("questions", ())),
        test=_questions(given.get("test", ())),
    )
    if not puzzle.surface.strip() or not puzzle.bottom.strip():
        raise ValueError("surface and bottom must not be empty")
    if len({key.id for key in keys}) < len(keys):
        raise ValueError("two keys have the same id")
    return puzzle


def _questions(given: Sequence[Mapping[str, Any]]) -> tuple[Question, ...]:
    questions = tuple(Question(_text(one["text"]), _text(one["verdict"])) for one in given)
    if unknown := {one.verdict for one in questions} - set(VERDICTS):
        raise ValueError(f"the verdict {min(unknown)!r} is none of {', '.join(VERDICTS)}")
    return questions


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        raise ValueError(f"{str(value)[:40]!r} must be text of at most {MOST_CHARACTERS} characters")
    return value


class Deck:
    """Puzzles in a random order; none comes twice until all were played, and none twice in a row."""

    def __init__(self, puzzles: Sequence[Puzzle], seed: int | None = None) -> None:
        self.puzzles, self._random = list(puzzles), random.Random(seed)
        self._left: list[Puzzle] = []
        self._last: Puzzle | None = None

    def draw(self) -> Puzzle:
        """Returns the next puzzle."""
        if not self._left:
            self._left = self._random.sample(self.puzzles, len(self.puzzles))
            if self._left[-1] is self._last and len(self._left) > 1:
                self._left.reverse()
        self._last = self._left.pop()
        return self._last
