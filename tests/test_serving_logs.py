"""The log holds no characters that act on a terminal, and no flood of lines."""

from __future__ import annotations

import json
import logging
import sys

from chatglm.serving.logs import LineLimit, PrintableFormatter, printable


def test_control_and_format_characters_are_escaped() -> None:
    text = "a\x1b[31m\u202eb\u2066c\x85d\x7f\u200b\ufeff\U000e0041"
    shown = printable(text)
    assert shown.isprintable() and json.loads(f'"{shown}"') == text
    assert printable("你好, ë 😀") == "你好, ë 😀"


def test_all_of_unicode_that_turns_text_around_or_acts_on_a_terminal_is() -> None:
    import unicodedata

    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp", "Cs"):
            assert printable(chr(code)) != chr(code), hex(code)


def test_no_message_can_look_like_two_lines() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\r\n2026 INFO forged\x1b", (), None)
    assert PrintableFormatter("%(levelname)s %(message)s").format(record) == "INFO a\\r\n  2026 INFO forged\\u001b"


def test_a_flood_is_cut_off_and_counted() -> None:
    limit = LineLimit(most=3, seconds=600)
    records = [logging.LogRecord("x", logging.INFO, "", 0, "line %s", (i,), None) for i in range(10)]
    assert [limit.filter(record) for record in records] == [True] * 3 + [False] * 7
    limit._began -= 601
    last = logging.LogRecord("x", logging.INFO, "", 0, "line %s", (11,), None)
    assert limit.filter(last) and last.getMessage() == "line 11 (7 lines before this one were dropped)"
