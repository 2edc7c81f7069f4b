"""A virtual environment that borrows the libraries of the one that runs this, so that they are not installed again."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path


def borrow_libraries(python: str) -> None:
    """The interpreter of a new environment finds our libraries too, after those that are installed in its own."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = subprocess.run([python, "-c", code], check=True, capture_output=True, encoding="utf-8").stdout.strip()
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(there) / "borrowed.pth").write_text("\n".join(sorted(paths)), encoding="utf-8")
