"""Resuming a run: from which checkpoint, and that the command, not the checkpoint, says how it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .arguments import ArgumentsError, TrainingArguments
from .checkpoints import OPTIMIZERS, STATE, CheckpointError, broken, last_checkpoint

#: What the place in the data and the optimizer's state depend on: argument -> what would go wrong.
FIXED = {
    "optim": "the checkpoint holds the state of another optimizer",
    "seed": "the rows would come in another order, so that some were seen twice and others never",
    "data_seed": "the rows would come in another order, so that some were seen twice and others never",
    "train_sampling_strategy": "the rows would come in another order, so that some were seen twice and others never",
}
ARGUMENTS = "training_args.json"


def resume_from(training_args: TrainingArguments, say: Callable[..., None]) -> str | None:
    """The checkpoint to resume from: the named one, or the last one for `true` or an output_dir with checkpoints.

    Args:
        say: called with the key and the values of a message for the user.

    Raises:
        CheckpointError: there is none, or its state is broken.
        ArgumentsError: the arguments differ in what a resumed run cannot change.
    """
    wanted = training_args.resume_from_checkpoint
    choice = (wanted or "").lower()
    if choice in ("false", "no"):
        return None
    if wanted and choice not in ("true", "yes"):
        if not (Path(wanted) / STATE).is_file():
            raise CheckpointError(f"{wanted} is no training checkpoint: it has no {STATE}")
        folder = Path(wanted)
    else:
        last = last_checkpoint(training_args.output_dir)
        if wanted and last is None:
            raise CheckpointError(f"{training_args.output_dir} holds no checkpoint to resume from")
        if last is None or (training_args.overwrite_output_dir and not wanted):
            return None
        folder = last
        say("resuming", folder=folder)
    step_of(folder)
    if not any(path for pattern in OPTIMIZERS for path in folder.glob(pattern)):
        say("no_optimizer", folder=folder)
    check_unchanged(folder, training_args)
    return str(folder)


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """The step after which a checkpoint was written. Raises CheckpointError if its state is broken."""
    try:
        return int(json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(broken(checkpoint, error)) from error


def check_unchanged(checkpoint: Path, training_args: TrainingArguments) -> None:
    """Raises ArgumentsError if the arguments differ from the checkpoint's in what a resumed run cannot change."""
    try:
        before: dict[str, Any] = json.loads((checkpoint / ARGUMENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # written by another program
    now = training_args.to_dict()
    for name, reason in FIXED.items():
        if name in before and before[name] != now[name]:
            raise ArgumentsError(
                f"--{name} {now[name]}: a resumed run cannot change it ({checkpoint} was made with {before[name]}): "
                f"{reason}"
            )
    rows = before.get("rows_per_step")
    if rows is not None and rows != rows_per_step(training_args):
        raise ArgumentsError(
            f"{rows_per_step(training_args)} rows per step (batch x accumulation x processes): a resumed run cannot "
            f"change them ({checkpoint} was made with {rows}): its place in the data is counted in steps"
        )


def rows_per_step(training_args: TrainingArguments) -> int:
    """Rows of an optimizer step, on all processes."""
    each = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return int(each * max(1, training_args.world_size))


def write_arguments(training_args: TrainingArguments, folder: Path) -> None:
    """Writes the arguments of a run into one of its checkpoints, for `check_unchanged` and for readers."""
    values = json.loads(training_args.to_json_string()) | {"rows_per_step": rows_per_step(training_args)}
    (folder / ARGUMENTS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# ---- what an optimizer's checkpoint remembers ------------------------------------------------------------------------


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of every group of parameters, as the arguments have set them."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def keep_hyperparameters(optimizer: Optimizer, scheduler: Any, wanted: list[dict[str, Any]]) -> None:
    """Gives a loaded optimizer the settings of `hyperparameters` back; the learning rate follows its schedule."""
    by_schedule = type(scheduler) is LambdaLR
    for group, settings in zip(optimizer.param_groups, wanted, strict=True):
        group.update({name: value for name, value in settings.items() if name != "lr"})
    if by_schedule:
        scheduler.base_lrs = [settings.get("initial_lr", settings["lr"]) for settings in wanted]
        for group, base, factor in zip(
            optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
