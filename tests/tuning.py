"""A small fine-tuning run for tests: data, arguments and a trainer for tiny models of any generation and method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatglm.conversation import stop_token_ids
from ptuning import data, methods
from ptuning.arguments import Arguments, method_of, parse
from ptuning.packing import Packer
from ptuning.trainer import Tuner

PAIRS = [("你好", "你好！"), ("1+1=?", "2"), ("What is the sky?", "Blue."), ("再见", "下次见。")]
METHODS = {"ptuning": ["--pre_seq_len", "4"], "lora": ["--method", "lora"], "full": ["--method", "full"]}


def write_rows(path: Path, rows: int = 8) -> Path:
    """JSON lines with questions and answers of different lengths."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt, response = PAIRS[number % len(PAIRS)]
            row = {"prompt": prompt + "?" * (number // len(PAIRS)), "response": response}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def arguments(model: Path | str, train_file: Path, output: Path, *extra: str) -> list[str]:
    """A command line of main.py for the CPU, without --method."""
    return [
        "--do_train", "--train_file", str(train_file), "--model_name_or_path", str(model), "--output_dir", str(output),
        "--max_source_length", "64", "--max_target_length", "16", "--per_device_train_batch_size", "2",
        "--logging_steps", "1", "--disable_tqdm", "True", "--use_cpu", *extra,
    ]  # fmt: skip


def make_tuner(argv: list[str], cache: Path) -> Tuner:
    """The trainer that main.py would make of these arguments, with the training data as data to be evaluated."""
    parsed: Arguments = parse(argv)
    model, tokenizer = methods.prepare(parsed.model, parsed.training)
    rows = data.read_rows((parsed.data.train_file or [])[0], None, tokenizer.chat_format)
    lengths = (parsed.data.max_source_length, parsed.data.max_target_length)
    train, held_out = (
        data.make_dataset(tokenizer, rows, *lengths, prediction=prediction, cache_dir=cache)
        for prediction in (False, True)
    )
    packer = Packer(model) if parsed.data.packing else None
    return Tuner(
        method=method_of(parsed.model),
        base=str(parsed.model.model_name_or_path),
        stop_ids=stop_token_ids(tokenizer),
        max_new_tokens=parsed.data.target_length,
        model=model,
        args=parsed.training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=data.Collator(tokenizer.pad_token_id, packer=packer, counts=True),
    )


def losses(tuner: Tuner) -> dict[int, float]:
    """The logged training loss of every step."""
    history: list[dict[str, Any]] = tuner.state.log_history
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
