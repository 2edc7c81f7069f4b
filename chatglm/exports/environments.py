"""Environments of their own for programs that need other releases than this project: made once, then used again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

#: In the folder of an environment: what was installed. A folder without it was not made here and is left alone.
MARKER = "installed.txt"
_UNFINISHED = "unfinished\n"


def environment(
    folder: Path, requirements: Sequence[str], without: Sequence[str] = (), told: Callable[[], None] | None = None
) -> Path:
    """The folder of the programs of a virtual environment (`bin`, on Windows `Scripts`), which is made if necessary.

    Args:
        folder: the environment. If it holds other requirements or was not finished, it is made anew.
        requirements: what pip installs.
        without: packages that are uninstalled afterwards, though others ask for them.
        told: called before an environment is made, which takes minutes.

    Raises:
        FileExistsError: the folder holds something else.
        RuntimeError: the environment cannot be made; what pip says is on standard error.
    """
    marker, content = folder / MARKER, "".join(f"{line}\n" for line in (*requirements, *(f"no {n}" for n in without)))
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    if marker.is_file():
        if marker.read_text(encoding="utf-8") == content:
            return programs
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not an environment that this program made: name another folder")
    if told is not None:
        told()
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(_UNFINISHED, encoding="utf-8")
    _run([sys.executable, "-m", "venv", str(folder)], "make the environment (on Debian: apt install python3-venv)")
    pip = [str(programs / "python"), "-m", "pip"]
    _run([*pip, "install", "-q", *requirements], f"install {', '.join(requirements)}")
    if without:
        _run([*pip, "uninstall", "-q", "-y", *without], f"uninstall {', '.join(without)}")
    marker.write_text(content, encoding="utf-8")
    return programs


def alone() -> dict[str, str]:
    """The variables for a program in another environment: it must not find the packages of this one."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _run(command: list[str], what: str) -> None:
    """Runs a command with its output on standard error; our standard output belongs to the result."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.__stderr__, env=alone(), check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cannot {what}: the lines above say why")
