"""`python -m chatglm.export BASE ADAPTER OUT`: exports a base model and its adapter as one checkpoint.

LoRA is added to the weights, so PEFT is no longer needed; a P-tuning prefix is stored beside them. OUT is a complete
checkpoint, including the tokenizer, and loads like any other.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .front.arguments import LibraryError, importing_libraries
from .front.messages import TERMINAL
from .language import choose_language
from .program import complain, put, run, start

__all__ = ["export", "main"]


def export(base: str | os.PathLike[str], adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """`chatglm.loading.export.export`: writes the checkpoint and returns its folder."""
    from . import load as _  # noqa: F401  # registers the generations
    from .loading.export import export

    return export(base, adapter, out)


def main(arguments: list[str] | None = None, prog: str = "python -m chatglm.export") -> int:
    """Returns the exit status: 0, or 1 if something failed. Wrong arguments raise SystemExit(2)."""
    return run(lambda: _main(arguments, prog))


def _main(arguments: list[str] | None, prog: str) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder or hub id of the model that was fine-tuned")
    parser.add_argument("adapter", metavar="ADAPTER", help="its LoRA adapter or P-tuning prefix")
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    args = parser.parse_args(arguments)
    language = choose_language()
    try:
        with importing_libraries(language):
            from . import load as _  # noqa: F401
        put(str(export(args.base, args.adapter, args.out)))
    except (OSError, ValueError, RuntimeError, LibraryError) as error:
        complain(TERMINAL["error"][language].format(reason=error))
        return 1
    return 0


if __name__ == "__main__":
    start(main)
