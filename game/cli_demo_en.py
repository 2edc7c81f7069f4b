"""The game in the terminal, in English; the program itself is terminal.py."""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chatglm.program import start
from game.terminal import main

if __name__ == "__main__":
    start(partial(main, "en"))
