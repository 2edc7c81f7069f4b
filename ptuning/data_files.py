"""A data file -> records: JSON lines, a JSON list or CSV, with every problem named by its line."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Problems that one error lists.
SHOWN = 5


class DataError(ValueError):
    """Something is wrong with training data; the message starts with `FILE:LINE: ` and says what to do."""


@dataclass
class Problems:
    """Collects the problems of a file, so that users can fix them all at once."""

    path: str
    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, text: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{self.path}:{line}: {text}")

    def check(self) -> None:
        if self.count:
            more = [f"… and {self.count - len(self.shown)} more problems"] if self.count > len(self.shown) else []
            raise DataError("\n".join(self.shown + more))


def read_records(path: Path, max_records: int | None = None) -> list[tuple[int, Any]]:
    """(line, value) of each record, of at most the first `max_records`.

    Raises:
        DataError: the file is missing, empty, of an unknown type, wrongly encoded, or broken JSON or CSV.
    """
    parse = {".json": _parse_json, ".jsonl": _parse_json, ".csv": _parse_csv}.get(path.suffix.lower())
    if parse is None:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}: use .json, .jsonl or .csv")
    problems = Problems(str(path))
    records: list[tuple[int, Any]] = []
    for record in parse(_read_text(path, problems), problems):
        if max_records is not None and len(records) >= max_records:
            break
        records.append(record)
    problems.check()
    return records


def _read_text(path: Path, problems: Problems) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file (in {Path.cwd()})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data.strip():
        raise DataError(f"{path}:1: the file is empty")
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not data.startswith(codecs.BOM_UTF32_LE):
        encoding = "utf-16"
    elif b"\0" in data[:4096]:
        raise DataError(f"{path}:1: not a text file, or UTF-16 or UTF-32 without a byte order mark: save it as UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise DataError(f"{path}:1: broken UTF-16 ({error.reason}): save the file as UTF-8") from error
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte 0x{line[error.start]:02x} at column {len(line[: error.start].decode()) + 1}"
            problems.add(number, f"{where} is not UTF-8{_guess(line)}: save the whole file as UTF-8")
    problems.check()
    raise AssertionError("unreachable: some line was not UTF-8")


def _guess(line: bytes) -> str:
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return " (the line reads as GB18030/GBK)"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise _DuplicateKeyError(f"the key {twice[0]!r} is there twice: keep one")
    return result


class _DuplicateKeyError(ValueError):
    pass


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _parse_json(text: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    """Parses JSON lines, a list, or objects that span several lines."""
    start = text.lstrip()
    if start.startswith("["):
        yield from _parse_stream(text, len(text) - len(start) + 1, True, problems)
        return
    first = start.split("\n", 1)[0]
    try:
        DECODER.decode(first)
    except json.JSONDecodeError as error:
        # Only an object that is still open can continue on the next line.
        if first.startswith("{") and error.pos >= len(first.rstrip()):
            yield from _parse_stream(text, 0, False, problems)
            return
    except (_DuplicateKeyError, RecursionError):
        pass
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: texts may contain U+2028 and the like
        line = line.rstrip().lstrip("\ufeff")
        if not line:
            continue
        try:
            yield number, DECODER.decode(line)
        except json.JSONDecodeError as error:
            problems.add(number, f"broken JSON at column {error.colno}: {error.msg}; a line holds one whole object")
        except _DuplicateKeyError as error:
            problems.add(number, str(error))
        except RecursionError:
            problems.add(number, "the JSON is nested too deeply")


def _parse_stream(text: str, position: int, in_list: bool, problems: Problems) -> Iterator[tuple[int, Any]]:
    """Parses consecutive JSON values; those of a list have commas between them and a closing bracket."""
    line, counted, first = 1, 0, True

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    def fail(at: int, reason: str) -> None:
        problems.add(text.count("\n", 0, at) + 1, f"broken JSON at column {at - text.rfind(chr(10), 0, at)}: {reason}")

    while True:
        position = skip(position)
        if in_list and text[position : position + 1] == "]" and first:
            break
        if not in_list and position == len(text):
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            return fail(error.pos, error.msg)
        except _DuplicateKeyError as error:
            return problems.add(line, f"in the row that begins here {error}")
        except RecursionError:
            return problems.add(line, "the JSON is nested too deeply")
        yield line, value
        first = False
        if in_list:
            position = skip(position)
            mark = text[position : position + 1]
            if mark == "]":
                break
            if mark != ",":
                return fail(position, "a comma or the closing bracket of the list is missing")
            position += 1
    if (end := skip(position + 1)) < len(text):
        fail(end, "there is more text after the end of the list")
    return None


def _parse_csv(text: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    # The field size limit is global to the process, so it is restored.
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        yield from _csv_records(text, problems)
    finally:
        csv.field_size_limit(limit)


def _csv_records(text: str, problems: Problems) -> list[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, Any]] = []
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if not header:
                header = [name.strip() for name in values]
                if len(set(header)) < len(header):
                    twice = next(name for name in header if header.count(name) > 1)
                    problems.add(line, f"the column {twice!r} is there twice: keep one")
                    return []
            elif values and len(values) != len(header):
                problems.add(
                    line,
                    f"{len(values)} fields, but the header has {len(header)}: quote fields that contain commas, "
                    "quotes (doubled) or line breaks",
                )
            elif values:
                records.append((line, dict(zip(header, values, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        unclosed = "unexpected end" in str(error)
        problems.add(line, "a quote is opened in this row and never closed" if unclosed else f"broken CSV: {error}")
    return records
