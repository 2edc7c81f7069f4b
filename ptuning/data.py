"""Training data, ready for a trainer: files -> rows (`rows.py`) -> examples (`encoding.py`) -> data sets, batches."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptuning.encoding import ANSWER, IGNORED, OLD_TURNS, QUESTION, check_lengths, encode_for_prediction, encode_row
from ptuning.messages import text
from ptuning.packing import Packer
from ptuning.pictures import Features, check_rows
from ptuning.rows import Columns, DataError, Row, Rows, read_rows, rows_from_records

__all__ = [
    "Collator", "Columns", "DataError", "Row", "Rows", "Summary", "describe", "encode_for_prediction", "encode_row",
    "make_dataset", "read_rows", "rows_from_records", "show_example",
]  # fmt: skip

logger = logging.getLogger(__name__)

#: Part of the cache key: increase it when the same row gives other ids or labels.
_FORMAT = 2
#: A process produces about a million tokens a second: for fewer rows than these, another is not worth starting.
ROWS_PER_PROCESS = 20_000


# ----------------------------------------------------------------------------------------------- examples -> dataset


def make_dataset(
    tokenizer: Any,
    rows: Sequence[Row],
    max_source_length: int = 1024,
    max_target_length: int = 128,
    source_prefix: str = "",
    *,
    prediction: bool = False,
    cut_references: bool = False,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    overwrite_cache: bool = False,
) -> Any:
    """The rows as a `datasets.Dataset` of integers, in a file that is mapped into memory.

    The file is named by a hash of the rows, the tokenizer and the options, so that later runs find it. With several
    processes, let one write it first (`training_args.main_process_first()`).

    Args:
        prediction: examples of `encode_for_prediction`, with the number of their row in the column `row`.
        cut_references: see `encode_for_prediction`.
        num_proc: maximum number of processes; limited by the cores, and by ROWS_PER_PROCESS.
        cache_dir: folder of the file; if None, one in the cache of `datasets`.
        overwrite_cache: write the file again.

    Returns:
        columns `input_ids`, `labels`, `length` (of `input_ids`), `learned` (how many labels), `truncated`; for
        prediction also `prompt_ids`, `target_ids`, `row`.
    """
    datasets = _import_datasets()
    check_lengths(tokenizer, max_source_length, max_target_length)
    options = (max_source_length, max_target_length, source_prefix)

    seeing = check_rows(rows)

    def encode_batch(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for number in batch["number"]:
            row = rows[number]
            made = (
                encode_for_prediction(tokenizer, row, *options, cut_references=cut_references)
                if prediction
                else [encode_row(tokenizer, row, *options)]
            )
            for example in made:
                learned = sum(label != IGNORED for label in example["labels"])
                counts = {"length": len(example["input_ids"]), "learned": learned, "row": number, "image": row.image}
                for name, value in {**example, **counts}.items():
                    if name in columns:
                        columns[name].append(value)
        return columns

    ids, number = datasets.Sequence(datasets.Value("int32")), datasets.Value("int32")
    types = {"input_ids": ids, "labels": ids, "length": number, "learned": number, "truncated": number}
    types |= {"image": datasets.Value("string")} if seeing else {}
    features = datasets.Features(types | ({"prompt_ids": ids, "target_ids": ids, "row": number} if prediction else {}))
    folder = Path(cache_dir) if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "chatglm"
    key = _cache_key(tokenizer, rows, [*options, prediction, cut_references])
    workers = min(num_proc or 1, os.cpu_count() or 1, len(rows) // ROWS_PER_PROCESS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        dataset = datasets.Dataset.from_dict({"number": list(range(len(rows)))}).map(
            encode_batch,
            batched=True,
            batch_size=256,
            remove_columns=["number"],
            features=features,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=key,
            cache_file_name=str(folder / f"{key}.arrow"),
            load_from_cache_file=not overwrite_cache,
            desc="Tokenizing",
        )
    except OSError as error:
        raise OSError(
            f"cannot write the tokens into {folder} ({error}): make room there, or set the environment variable "
            "HF_DATASETS_CACHE to another folder"
        ) from error
    summary = describe(rows, dataset)
    if summary.truncated:
        logger.warning("%s", summary.warning())
    return dataset


def _import_datasets() -> Any:
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("training data needs `datasets`: pip install -r ptuning/requirements.txt") from error
    return datasets


def _cache_key(tokenizer: Any, rows: Sequence[Row], options: Sequence[Any]) -> str:
    model = hashlib.sha256(tokenizer.vocabulary_bytes()).hexdigest()
    names = ("num_image_tokens", "do_lower_case", "remove_space", *(["image_length"] if check_rows(rows) else []))
    settings = [getattr(tokenizer, name, None) for name in names]
    key = hashlib.sha256(json.dumps([_FORMAT, tokenizer.chatglm_version, model, settings, options]).encode())
    for row in rows:
        key.update(json.dumps([row.whole, row.messages, *([row.image] if row.image else [])]).encode())
    return key.hexdigest()[:32]


@dataclass(frozen=True)
class Summary:
    """Counts of a data set; lengths in tokens."""

    path: str
    rows: int
    examples: int
    skipped: int
    truncated: int
    old_turns: int
    questions: int
    answers: int
    longest: int
    tokens: int
    learned: int
    lines: str
    forms: str = ""
    unused: str = ""

    def text(self, lang: str = "en") -> str:
        """The counts as text, one line each, in English or Chinese."""
        lines = [text("data", lang, **vars(self))]
        lines += [text("unused", lang, **vars(self))] if self.unused else []
        lines += [text("skipped", lang, **vars(self))] if self.skipped else []
        lines += [self.warning(lang)] if self.truncated else []
        return "\n".join(lines)

    def warning(self, lang: str = "en") -> str:
        """The warning about truncated examples."""
        return text("truncated", lang, **vars(self))


def describe(rows: Sequence[Row], dataset: Any) -> Summary:
    """Counts what is in the rows and in the data set made from them."""
    names = ("truncated", "length", "learned")
    flags, lengths, learned = (dataset.data.column(name).to_pylist() for name in names)
    skipped = list(getattr(rows, "skipped", ()))
    return Summary(
        path=getattr(rows, "path", ""),
        rows=getattr(rows, "found", len(rows)),
        examples=len(dataset),
        skipped=len(skipped),
        truncated=sum(map(bool, flags)),
        old_turns=sum(bool(flag & OLD_TURNS) for flag in flags),
        questions=sum(bool(flag & QUESTION) for flag in flags),
        answers=sum(bool(flag & ANSWER) for flag in flags),
        longest=max(lengths, default=0),
        tokens=sum(lengths),
        learned=sum(learned),
        lines=", ".join(map(str, skipped[:10])) + (", …" if len(skipped) > 10 else ""),
        forms=", ".join(getattr(rows, "forms", ())),
        unused=", ".join(getattr(rows, "unused", ())),
    )


# --------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Collator:
    """Examples -> a batch, padded to the longest.

    Attributes:
        pad_token_id: the tokenizer's.
        label_pad: label of the padding; the pad token's id for `ignore_pad_token_for_loss=False`.
        multiple_of: round lengths up to a multiple of this, for a GPU.
        packer: packs training examples, see `packing.py`.
        counts: add `tokens`, for the trainer, which takes it out again; a packed batch has it always.
        pictures: encodes the pictures of examples that have some.
    """

    pad_token_id: int
    label_pad: int = IGNORED
    multiple_of: int = 1
    packer: Packer | None = None
    counts: bool = False
    pictures: Features | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tensors (examples, tokens) of integers.

        `input_ids` and `labels` are padded on the right, without a mask, as causal attention does not see the padding
        and it is not learned; `prompt_ids` and `prompt_mask` (1 = a token) on the left; `target_ids` on the right with
        -100; `tokens` (examples,) counts what is no padding.
        """
        if self.packer is not None and examples and "prompt_ids" not in examples[0]:
            return self.packer(examples)
        batch: dict[str, Any] = {
            "input_ids": self._stack(examples, "input_ids", self.pad_token_id),
            "labels": self._stack(examples, "labels", self.label_pad),
        }
        if self.counts:
            batch["tokens"] = torch.tensor([len(example["input_ids"]) for example in examples])
        if self.pictures is not None and examples:
            batch |= self.pictures.of(examples)
        if examples and "prompt_ids" in examples[0]:
            batch["prompt_ids"] = self._stack(examples, "prompt_ids", self.pad_token_id, left=True)
            ones = [{"ones": [1] * len(example["prompt_ids"])} for example in examples]
            batch["prompt_mask"] = self._stack(ones, "ones", 0, left=True)
            batch["target_ids"] = self._stack(examples, "target_ids", IGNORED)
        return batch

    def _stack(self, examples: Sequence[Mapping[str, Any]], name: str, pad: int, left: bool = False) -> torch.Tensor:
        rows = [torch.as_tensor(example[name], dtype=torch.long) for example in examples]
        width = max(map(len, rows))
        if name in ("input_ids", "labels"):
            width = -(-width // self.multiple_of) * self.multiple_of
        result = torch.full((len(rows), width), pad, dtype=torch.long)
        for index, row in enumerate(rows):
            result[index, width - len(row) if left else 0 : width if left else len(row)] = row
        return result


# ------------------------------------------------------------------------------------------------------ display


def show_example(tokenizer: Any, example: Mapping[str, Any], lang: str = "en") -> str:
    """The tokens of an example, one per line: position, id, label (blank where nothing is learned), text."""
    ids, labels = [[int(index) for index in example[name]] for name in ("input_ids", "labels")]
    learned = sum(label != IGNORED for label in labels)
    title = text("example", lang, tokens=len(ids), learned=learned)
    table = [tuple(text(key, lang) for key in ("position", "id", "label", "text"))]
    for position, (index, label) in enumerate(zip(ids, labels, strict=True)):
        table.append((str(position), str(index), "" if label == IGNORED else str(label), _visible(tokenizer, index)))
    widths = [max(_width(row[column]) for row in table) for column in range(3)]
    lines = [
        "  ".join([*(" " * (width - _width(cell)) + cell for width, cell in zip(widths, row, strict=False)), row[3]])
        for row in table
    ]
    return "\n".join([title, *lines])


def _visible(tokenizer: Any, index: int) -> str:
    """A token as printable text: control characters escaped, a bar for the space at the start of a word."""
    piece = str(tokenizer.convert_ids_to_tokens(index))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
