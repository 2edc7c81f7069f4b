"""The data sets of a run, from its arguments: several files, weights, a held-out share, streaming."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptuning import data, methods, metrics, mixing
from ptuning.arguments import Arguments
from ptuning.rows import Rows
from ptuning.streaming import StreamedExamples


@dataclass(frozen=True)
class DataSets:
    """The data sets of a run; None for those that it does not use. `described`: one line or more for each."""

    train: Any
    held_out: Any
    test: Any
    described: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the rows to evaluate and to predict are the same."""
        return self.test is not None and self.test is self.held_out

    @property
    def streamed(self) -> bool:
        """Whether the training data is read as training goes."""
        return isinstance(self.train, StreamedExamples)

    def examples(self, count: int) -> list[Any]:
        """The first training examples."""
        if self.streamed:
            found: list[Any] = self.train.first(count)
            return found
        return [self.train[index] for index in range(min(count, len(self.train)))]


def read_data(arguments: Arguments, say: Callable[[str], None], language: str) -> tuple[Any, DataSets]:
    """Loads the tokenizer and tokenises the data sets.

    Args:
        say: called with each line for the user.

    Raises:
        DataError, ValueError, OSError: with a message for users.
    """
    model_args, data_args, training_args, _ = arguments
    if training_args.predict_with_generate and (training_args.do_eval or training_args.do_predict):
        metrics.load()
    logging.getLogger(data.__name__).setLevel(logging.ERROR)  # the summary of the data holds its warnings
    tokenizer = methods.load_tokenizer(model_args)
    columns = data.Columns(data_args.prompt_column, data_args.response_column, data_args.history_column)
    described: list[str] = []

    def read(path: str, limit: int | None) -> Rows:
        return data.read_rows(path, columns, tokenizer.chat_format, limit)

    def dataset(rows: Rows, prediction: bool) -> Any:
        with training_args.main_process_first(desc="tokens"):
            made = data.make_dataset(
                tokenizer,
                rows,
                data_args.max_source_length,
                data_args.target_length if prediction else data_args.max_target_length,
                data_args.source_prefix,
                prediction=prediction,
                cut_references=data_args.cut_references,
                num_proc=data_args.preprocessing_num_workers,
                overwrite_cache=data_args.overwrite_cache and training_args.local_process_index == 0,
            )
        lines = data.describe(rows, made).text(language)
        described.extend(lines.split("\n"))
        say(lines)
        return made

    train = held_out = test = None
    if training_args.do_train and data_args.streaming:
        options = (data_args.max_source_length, data_args.max_target_length, data_args.source_prefix)
        files = data_args.train_file or []
        train = StreamedExamples(tokenizer, files, columns, options, data_args.train_weights, training_args.seed)
        described.append(" + ".join(files))
    elif training_args.do_train:
        all_files = [read(path, data_args.max_train_samples) for path in data_args.train_file or []]
        rows = None
        if data_args.val_size:
            all_files, rows = mixing.hold_out(all_files, data_args.val_size, training_args.seed)
        train = dataset(mixing.mix(all_files, data_args.train_weights, training_args.seed), False)
        held_out = dataset(rows, True) if rows is not None else None
    validation = _rows_of(data_args.validation_file, data_args.max_eval_samples)
    if validation is not None:
        held_out = dataset(read(*validation), True)
    if training_args.do_predict:
        wanted = _rows_of(data_args.test_file, data_args.max_predict_samples)
        assert wanted is not None  # the arguments have been checked
        same = validation is not None and (wanted[1] == validation[1] and _path(wanted) == _path(validation))
        test = held_out if same else dataset(read(*wanted), True)
    return tokenizer, DataSets(train, held_out, test, described)


def _rows_of(path: str | None, limit: int | None) -> tuple[str, int | None] | None:
    return None if path is None else (path, limit)


def _path(rows: tuple[str, int | None]) -> Path:
    return Path(rows[0]).resolve()
