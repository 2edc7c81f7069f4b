"""`python -m chatglm.export BASE ADAPTER OUT`: exports a base model and its adapter as one checkpoint.

LoRA is added to the weights, so PEFT is no longer needed; a P-tuning prefix is stored beside them. OUT is a complete
checkpoint, including the tokenizer, and loads like any other.
"""

from __future__ import annotations

import argparse
import sys

from .front.messages import TERMINAL
from .language import choose_language
from .loading.export import export

__all__ = ["export", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if something failed. Wrong arguments raise SystemExit(2)."""
    parser = argparse.ArgumentParser(prog="python -m chatglm.export", description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder or hub id of the model that was fine-tuned")
    parser.add_argument("adapter", metavar="ADAPTER", help="its LoRA adapter or P-tuning prefix")
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    parser.add_argument("--chatglm-version", type=int, metavar="N", help="1, 2 or 3: the generation of BASE")
    args = parser.parse_args(arguments)
    try:
        print(export(args.base, args.adapter, args.out, args.chatglm_version))
    except (OSError, ValueError, RuntimeError) as error:
        print(TERMINAL["error"][choose_language()].format(reason=error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
