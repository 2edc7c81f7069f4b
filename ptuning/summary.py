"""`summary.md`: what a run was given, how its loss went, what it measured, and some of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm.checkpoints.atomic import write_file

from .arguments import Arguments, method_of
from .curve import FILE as CURVE
from .messages import text

FILE = "summary.md"
#: Answers that are shown.
ANSWERS = 10


def write_summary(
    folder: Path,
    arguments: Arguments,
    described: Sequence[str],
    metrics: Mapping[str, Any],
    answers: Sequence[tuple[str, str, str]],
    best: str | None,
    language: str,
) -> Path:
    """Writes the page and returns its path.

    Args:
        described: the descriptions of the data sets.
        metrics: what `all_results.json` holds.
        answers: prompt, answer and reference of some rows.
        best: the best checkpoint, if the run kept it.
    """

    def title(key: str) -> str:
        return text(f"summary_{key}", language)

    settings = {
        name: value for name, value in _settings(arguments).items() if value not in (None, "", [], False, "no")
    }
    parts = [f"# {title('title')}", f"## {title('data')}", "\n".join(f"* {line}" for line in described)]
    parts += [f"## {title('settings')}", _table((title("argument"), title("value")), settings.items())]
    if (folder / CURVE).is_file():
        parts += [f"## {title('curve')}", f"![{title('curve')}]({CURVE})"]
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in metrics.items()}
    if best is not None:
        shown[title("best")] = best
    parts += [f"## {title('metrics')}", _table((title("metric"), title("value")), shown.items())]
    if answers:
        parts += [f"## {title('answers')}", _table((title("prompt"), title("answer"), title("reference")), answers)]
    path = folder / FILE
    write_file(path, "\n\n".join(parts) + "\n")
    return path


def _settings(arguments: Arguments) -> dict[str, Any]:
    """The arguments that describe the run, by their names on the command line."""
    model, data, training, _ = arguments
    found = {"method": method_of(model), **vars(model), **vars(data)}
    names = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
             "num_train_epochs", "warmup_steps", "lr_scheduler_type", "optim", "weight_decay", "seed", "bf16", "fp16",
             "early_stopping")  # fmt: skip
    found |= {name: getattr(training, name) for name in names}
    found["gradient_checkpointing"] = training.checkpointing
    found["method"] = method_of(model)
    if found["max_steps"] > 0:
        del found["num_train_epochs"]
    else:
        del found["max_steps"]
    for part, method in (("lora", "lora"), ("use_dora", "lora"), ("pre_seq_len", "ptuning"), ("prefix_", "ptuning")):
        if method != found["method"]:
            found = {name: value for name, value in found.items() if part not in name}
    return {name: getattr(value, "value", value) for name, value in found.items()}


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    for mark, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\r", ""), ("\n", "<br>")):
        shown = shown.replace(mark, escaped)
    return shown
