"""What the log may hold: no characters that act on a terminal or turn text around, and no flood of lines."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable

#: Control and format characters: escape codes, line breaks, bidirectional marks, invisible ones.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
#: Lines of one logger in so many seconds; further ones are counted.
MOST_LINES, SECONDS = 500, 10.0


def printable(text: str) -> str:
    r"""Returns the text with control and format characters as JSON writes them: `\u202e`."""
    return _UNPRINTABLE.sub(lambda found: json.dumps(found[0])[1:-1], text)


class PrintableFormatter(logging.Formatter):
    """Escapes control and format characters. The lines of a traceback stay lines, indented so that none looks new."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n  ".join(map(printable, super().format(record).split("\n")))


def limit_lines(names: Iterable[str]) -> None:
    """Gives the loggers of these names a `LineLimit`, once."""
    for logger in map(logging.getLogger, names):
        if not any(isinstance(one, LineLimit) for one in logger.filters):
            logger.addFilter(LineLimit())


class LineLimit(logging.Filter):
    """Drops the lines of a logger beyond `most` in `seconds`; the next line after that says how many."""

    def __init__(self, most: int = MOST_LINES, seconds: float = SECONDS) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds
        self._began, self._lines = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._began >= self._seconds:
            dropped = self._lines - self._most
            self._began, self._lines = now, 0
            if dropped > 0:
                record.msg, record.args = f"{record.getMessage()} ({dropped} lines before this one were dropped)", ()
        self._lines += 1
        return self._lines <= self._most
