"""The web page with a tuned model: the arguments of the originals' ptuning/web_demo.py, the page of ../web_demo.py.

Arguments that are not about the model, --port for example, go to the page: `python ../web_demo.py --help`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from chatglm.commands import web  # noqa: E402
from ptuning.arguments import ArgumentsError, page_arguments  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Serves until interrupted; returns the exit status."""
    try:
        return web.main(page_arguments(sys.argv[1:] if argv is None else argv))
    except ArgumentsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
