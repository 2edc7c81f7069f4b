"""Training data that is read and tokenised as training goes, for files that are larger than memory or disk."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from ptuning.data_files import DECODER, DataError
from ptuning.encoding import Example, check_lengths, encode_row
from ptuning.rows import Columns, Row, RowReader

#: Examples among which the next one is chosen at random.
BUFFER = 1000


@dataclass
class StreamedExamples(IterableDataset[Example]):
    """The examples of large files, over and over, in an order that depends on the seed and the epoch.

    Attributes:
        files: JSON lines or CSV, in UTF-8.
        weights: how likely the next row comes from each file; by default equally.
        options: `max_source_length`, `max_target_length` and `source_prefix` of `encode_row`.
    """

    tokenizer: Any
    files: Sequence[str]
    columns: Columns
    options: tuple[int, int, str]
    weights: Sequence[float] | None = None
    seed: int = 42
    buffer: int = BUFFER
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_lengths(self.tokenizer, *self.options[:2])
        for file in self.files:  # a wrong file or wrong columns show before the weights are loaded
            if not list(islice(self._rows(file), 20)):
                raise DataError(f"{file}: none of its rows has both a question and an answer")

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader; another epoch has another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Example]:
        generator = random.Random(self.seed + self.epoch)
        waiting: list[Example] = []
        for row in self._mixed(generator):
            waiting.append(self._encode(row))
            if len(waiting) > self.buffer:
                yield _without_flags(waiting.pop(generator.randrange(len(waiting))))
        generator.shuffle(waiting)
        yield from map(_without_flags, waiting)

    def first(self, count: int) -> list[Example]:
        """The first examples of the files, in their order, for display and for the loss of the untuned model."""
        rows = islice((row for file in self.files for row in self._rows(file)), count)
        return [self._encode(row) for row in rows]

    def _encode(self, row: Row) -> Example:
        example = encode_row(self.tokenizer, row, *self.options)
        return example if row.image is None else {**example, "image": row.image}

    def _mixed(self, generator: random.Random) -> Iterator[Row]:
        """Ends with the first file that ends; a single file is read once."""
        sources = [self._rows(file) for file in self.files]
        weights = self.weights or [1.0] * len(sources)
        while True:
            (source,) = generator.choices(sources, weights)
            row = next(source, None)
            if row is None:
                return
            yield row

    def _rows(self, file: str) -> Iterator[Row]:
        reader = RowReader(self.columns, self.tokenizer.chat_format, require_answer=True)
        for line, record in _records(Path(file)):
            try:
                image = reader.image(record, file)
                yield from (Row(f"{file}:{line}", *made, image=image) for made in reader.examples(record))
            except (TypeError, ValueError) as error:
                raise DataError(f"{file}:{line}: {error}") from error


def _without_flags(example: Example) -> Example:
    return {name: example[name] for name in ("input_ids", "labels", "image") if name in example}


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of JSON lines or CSV, without reading the whole file."""
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else None) as file:
            if path.suffix.lower() == ".csv":
                rows = csv.DictReader(file, strict=True)
                yield from ((rows.line_num, row) for row in rows)
                return
            for number, line in enumerate(file, 1):
                if number == 1 and line.lstrip().startswith("["):
                    raise DataError(f"{path}: --streaming reads JSON lines or CSV, not a JSON list: leave it out, or "
                                    f"convert the file (jq -c '.[]' {path})")  # fmt: skip
                if line.strip():
                    record = DECODER.decode(line)
                    if not isinstance(record, dict):
                        raise DataError(f'{path}:{number}: a row must be a JSON object like {{"prompt": …}}')
                    yield number, record
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: broken JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}): save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: broken CSV: {error}") from error
