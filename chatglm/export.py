"""`python -m chatglm.export BASE ADAPTER OUT`: a base model and what was trained on it, as one checkpoint.

LoRA is added to the weights, so that PEFT is not needed any more; a P-tuning prefix is stored beside them. OUT is a
whole checkpoint, tokenizer included, that loads like any other.
"""

from __future__ import annotations

import argparse
import sys

from .front.messages import TERMINAL
from .language import choose_language
from .loading.export import export

__all__ = ["export", "main"]


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 1 where something failed; SystemExit(2) for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m chatglm.export", description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder or hub id of the model that was fine-tuned")
    parser.add_argument("adapter", metavar="ADAPTER", help="its LoRA adapter or P-tuning prefix")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    args = parser.parse_args(arguments)
    try:
        print(export(args.base, args.adapter, args.out))
    except (OSError, ValueError, RuntimeError) as error:
        print(TERMINAL["error"][choose_language()].format(reason=error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
