"""A process of a model with tensor parallelism: `python -m chatglm.parallel --rank 1 --processes 2 --at HOST:PORT`."""

from __future__ import annotations

import argparse
import logging

from .. import load as _  # noqa: F401  # registers the generations
from ..checkpoints.files import ModelLoadError
from ..program import complain, run
from . import Group, ParallelError, work


def main(arguments: list[str] | None = None) -> int:
    """Holds its share of a model until the first process ends. Returns the exit status."""
    return run(lambda: _main(arguments), prints=False)


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser("python -m chatglm.parallel", description=__doc__)
    parser.add_argument("--rank", type=int, required=True, help="of this process, from 1")
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="the N of --tensor-parallel")
    parser.add_argument("--at", required=True, metavar="HOST:PORT", help="where the first process waits")
    parser.add_argument("--model", metavar="FOLDER_OR_ID", help="the same files as the first process's")
    parser.add_argument("--revision")
    parser.add_argument("--chatglm-version", type=int, metavar="N")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", type=int, choices=(4, 8))
    args = parser.parse_args(arguments)
    if not 0 < args.rank < args.processes:
        parser.error(f"--rank must be from 1 to {args.processes - 1}")
    logging.basicConfig(level=logging.WARNING)
    try:
        group = Group.join(args.rank, args.processes, args.at)
        work(
            args.model, group, args.dtype,
            quantize=args.quantize, revision=args.revision, chatglm_version=args.chatglm_version,
        )  # fmt: skip
    except (ValueError, ModelLoadError, ParallelError) as error:
        complain(str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
