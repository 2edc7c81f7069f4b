"""Preference data: files -> token ids of prompts, chosen and rejected answers, by the model's chat format.

A row is one of

* `prompt`, `chosen`, `rejected`, each a text or a list of messages, optionally with `history` or `system`;
* Alpaca's `instruction`, `input`, `chosen`, `rejected`, or ShareGPT's `conversations` with `chosen` and `rejected`;
* for KTO also `prompt`, `completion` (or `response`) and `label`: whether the answer is good.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptuning import forms
from ptuning.data_files import DataError, Problems, read_records
from ptuning.encoding import IGNORED, check_lengths, encode_row
from ptuning.rows import Columns, Row, RowReader

Pair = dict[str, list[int]]


def read_pairs(path: str, tokenizer: Any, max_source_length: int, max_target_length: int) -> list[Pair]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of every row; answers end with the token that ends a turn.

    Raises:
        DataError: the file is missing or broken, or a row has no prompt or not two answers; it names file and line.
    """
    return _read(path, tokenizer, (max_source_length, max_target_length), ("chosen", "rejected"))


def read_judged(path: str, tokenizer: Any, max_source_length: int, max_target_length: int) -> list[dict[str, Any]]:
    """`prompt_ids`, `completion_ids` and `label` (a bool) of every answer; a row with two answers gives both.

    Raises:
        DataError: see `read_pairs`.
    """
    lengths, examples = (max_source_length, max_target_length), []
    records = read_records(Path(path))
    if any("label" in record for _, record in records if isinstance(record, Mapping)):
        for example, (line, record) in zip(
            _read(path, tokenizer, lengths, ("completion",)), records, strict=True
        ):
            if not isinstance(record.get("label"), bool):
                raise DataError(f"{path}:{line}: 'label' must be true or false")
            examples.append({**example, "label": record["label"]})
        return examples
    for pair in _read(path, tokenizer, lengths, ("chosen", "rejected")):
        for name, label in (("chosen_ids", True), ("rejected_ids", False)):
            examples.append({"prompt_ids": pair["prompt_ids"], "completion_ids": pair[name], "label": label})
    return examples


def hold_out(examples: Sequence[Any], size: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(the remaining examples, the held-out ones). Raises ValueError if one side would be empty."""
    count = round(len(examples) * size) if size < 1 else int(size)
    if not 0 < count < len(examples):
        raise ValueError(f"--val_size {size:g} would hold out {count} of {len(examples)} rows: both sides need some")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:count])
    return ([one for number, one in enumerate(examples) if number not in chosen],
            [one for number, one in enumerate(examples) if number in chosen])  # fmt: skip


def _read(path: str, tokenizer: Any, lengths: tuple[int, int], answers: tuple[str, ...]) -> list[Pair]:
    check_lengths(tokenizer, *lengths)
    reader, problems = RowReader(Columns(), tokenizer.chat_format, True), Problems(path)
    pairs: list[Pair] = []
    for line, record in read_records(Path(path)):
        where = f"{path}:{line}"
        try:
            if not isinstance(record, Mapping):
                raise TypeError("a row must be a JSON object with 'prompt', 'chosen' and 'rejected'")
            if "img" in record:
                raise ValueError("'img' is a picture, and preferences are learned without: leave it out")
            prompt, pair = None, {}
            for name in answers:
                ids, said = _encoded(reader, tokenizer, where, _with_answer(record, name), lengths)
                prompt = ids if prompt is None else prompt
                pair[f"{name}_ids"] = said
            pairs.append({"prompt_ids": prompt or [], **pair})
        except DataError:
            raise
        except (TypeError, ValueError) as error:
            problems.add(line, str(error))
    problems.check()
    if not pairs:
        raise DataError(f"{path}:1: there are no rows in this file")
    return pairs


def _encoded(
    reader: RowReader, tokenizer: Any, where: str, record: Mapping[str, Any], lengths: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer."""
    made = reader.examples(record)
    if not made:
        raise ValueError("there is no question, or an answer is empty")
    example = encode_row(tokenizer, Row(where, *made[-1]), *lengths)
    start = next(index for index, label in enumerate(example["labels"]) if label != IGNORED)
    return example["input_ids"][:start], example["input_ids"][start:]


def _with_answer(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`prompt`, `history` and `response` with the answer of this name."""
    answer = record.get(name, record.get("response") if name == "completion" else None)
    if answer is None:
        raise ValueError(f"there is no {name!r}: a row has 'prompt', 'chosen' and 'rejected', or for KTO 'prompt', "
                         "'completion' and 'label'")  # fmt: skip
    answer = _content(answer, name)
    if "instruction" in record:
        return forms.from_alpaca({**record, "output": answer})
    if "conversations" in record:
        prompt: Any = forms.from_sharegpt(record)["conversations"] if forms.form_of(record) == forms.SHAREGPT else (
            record["conversations"])  # fmt: skip
    else:
        prompt = record.get("prompt", record.get("messages"))
    if prompt is None:
        raise ValueError("there is no 'prompt'")
    history: list[Any] = list(record.get("history") or [])
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        *history, asked = prompt
        if not isinstance(asked, Mapping) or asked.get("role") != "user":
            raise ValueError("'prompt' must end with a message of the user")
        prompt = asked.get("content")
    elif record.get("system"):
        history = [{"role": "system", "content": record["system"]}, *forms.messages_of(history)]
    return {"prompt": prompt, "history": history, "response": answer}


def _content(answer: Any, name: str) -> str:
    """The text of an answer: a text, a message, or a list of one."""
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Mapping):
        answer = answer.get("content", answer.get("value"))
    if not isinstance(answer, str):
        raise TypeError(f"{name!r} must be a text or one message of the assistant")
    return answer
