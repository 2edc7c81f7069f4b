"""The checkpoints of a training run: their files, the last one, and what to say about a broken one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from chatglm.checkpoints.atomic import put_back

STATE = "trainer_state.json"
OLD = "old-"  # in front of the name of a checkpoint that is being replaced
OPTIMIZERS = ("optimizer*", "global_step*", "pytorch_model_fsdp*")  # as Trainer, DeepSpeed and FSDP call its state


class CheckpointError(OSError):
    """A checkpoint cannot be written or found."""


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that was written last; one whose replacement was interrupted is put back first."""
    folder = Path(output_dir)
    for old in folder.glob(f"{OLD}checkpoint-*"):
        put_back(old, folder / old.name.removeprefix(OLD))
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).is_file()]
    return max(found, key=lambda path: ((path / STATE).stat().st_mtime_ns, path.name), default=None)


def broken(checkpoint: str | os.PathLike[str], error: Exception) -> str:
    """What to do about a checkpoint that training cannot resume from."""
    reason = " ".join(str(error).split())
    return (
        f"cannot go on from {checkpoint} ({reason}): go on with the arguments it was made with; if it is broken, "
        "remove it, and the one before is taken"
    )


@contextlib.contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Turns what the libraries raise for a broken checkpoint into a CheckpointError."""
    try:
        yield
    except Exception as error:  # torch has many for a broken file
        if checkpoint is None or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(broken(checkpoint, error)) from error
