"""Checkpoints of a training run: their files, the last one, and the error message for a broken one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from chatglm.checkpoints.atomic import put_back

STATE = "trainer_state.json"
OLD = "old-"  # in front of the name of a checkpoint that is being replaced
OPTIMIZERS = ("optimizer*", "global_step*", "pytorch_model_fsdp*")  # its state, as Trainer, DeepSpeed and FSDP name it


class CheckpointError(OSError):
    """A checkpoint cannot be written or found."""


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The last checkpoint written. Restores those whose replacement was interrupted first."""
    folder = Path(output_dir)
    for old in folder.glob(f"{OLD}checkpoint-*"):
        put_back(old, folder / old.name.removeprefix(OLD))
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).is_file()]
    return max(found, key=lambda path: ((path / STATE).stat().st_mtime_ns, path.name), default=None)


def broken(checkpoint: str | os.PathLike[str], error: Exception) -> str:
    """The error message for a checkpoint that training cannot resume from."""
    reason = " ".join(str(error).split())
    return (
        f"cannot resume from {checkpoint} ({reason}): use the arguments it was made with; if it is broken, "
        "remove it to resume from the one before"
    )


@contextlib.contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Turns what the libraries raise for a broken checkpoint into a CheckpointError."""
    try:
        yield
    except Exception as error:  # torch raises many types for a broken file
        if checkpoint is None or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(broken(checkpoint, error)) from error
