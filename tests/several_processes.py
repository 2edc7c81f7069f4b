"""Runs ptuning/main.py several times in the processes that torchrun or accelerate started: a program for tests.

Its argument is a JSON file: a list of {"name", "argv", "fault"}. Each process writes `NAME.RANK.json` beside it: the
exit status, the output, and the number of rows that it tokenised.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ptuning import data, main, methods
from ptuning.trainer import Tuner


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Dropout masks are random, and differ between one batch in one process and two batches in two."""
    prepare = methods.prepare

    def prepare_plainly(*args: Any) -> Any:
        model, tokenizer = prepare(*args)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model, tokenizer

    with mock.patch.object(methods, "prepare", prepare_plainly):
        yield


def _faulty(rank: int, fault: str | None) -> Any:
    """A Tuner's compute_loss that breaks in the second step of process 1."""
    compute_loss = Tuner.compute_loss

    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        if rank == 1 and self.state.global_step == 1:
            if fault == "nan":
                return loss * float("nan")
            if fault == "error":
                raise OSError("broken on purpose")
        return loss

    return compute


def _fsdp_on_a_cpu() -> None:
    """accelerate offers FSDP only for GPUs, so it is made to see a GPU in each process; everything else is real."""
    start = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def _run(number: int, job: dict[str, Any], folder: Path) -> int:
    rank = int(os.environ["RANK"])
    made = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            return function(*args, **kwargs)

        return call

    printed = io.StringIO()
    status: int | None = None
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            without_dropout(),
            mock.patch.object(Tuner, "compute_loss", _faulty(rank, job.get("fault"))),
            mock.patch.object(data, "encode_row", counted(data.encode_row)),
            mock.patch.object(data, "encode_for_prediction", counted(data.encode_for_prediction)),
        ):
            status = main.main(job["argv"])
    finally:
        result = {"status": status, "printed": printed.getvalue(), "made": made}
        (folder / f"{job['name']}.{rank}.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    return status


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _fsdp_on_a_cpu()
    last = 0
    for index, one in enumerate(json.loads(where.read_text(encoding="utf-8"))):
        if index:  # as in fresh processes
            torch.distributed.barrier()
            torch.distributed.distributed_c10d._get_default_store().delete_key("chatglm/failed")
            torch.distributed.barrier()
            AcceleratorState._reset_state()
            GradientState._reset_state()
        last = _run(index, one, where.parent)
    sys.exit(last)
