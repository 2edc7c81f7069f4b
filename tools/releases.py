"""`python -m tools.releases newest` runs the tests with other releases than the locked ones, in a new environment.

    newest                everything at its newest release, even beyond the ranges; CI runs it every week
    allowed               the lock, but the newest transformers within its range
    oldest                the lock, but the oldest transformers within its range
    transformers==5.20.2  the lock, but this release; several may be given

Prints the results, and writes them to `--report FILE`; the exit status is 1 if something fails. Removes the environment
at the end. `--borrow`: the lock is installed where this runs, so that only what differs is installed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.environments import borrow_libraries
from tools.lock import ROOT, TESTED, lock_lines, requirement_lines

QUICK = "@tests/quick.txt"  # for pytest: every line of the file is an argument
SHOWN = 20_000  # characters of output in a report: GitHub takes 65,536 in all


def name_of(requirement: str) -> str:
    """The name of the package: "uvicorn" for "uvicorn>=0.54,<1"."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def any_release(requirement: str) -> str:
    """The requirement without its range: "pexpect; os_name == 'nt'" for "pexpect>=4.9; os_name == 'nt'"."""
    named, semicolon, marker = requirement.partition(";")
    return re.sub(r"[<>=!~].*", "", named).strip() + semicolon + marker


def range_of(name: str) -> str:
    """The range of a package in the requirements files: ">=5.17,<5.25"."""
    (line,) = [line for line in requirement_lines() if name_of(line) == name]
    return line.partition(";")[0].strip()[len(name) :]


def requested(wish: str, keep: Sequence[str] = ()) -> list[str]:
    """
    The requirements that pip has to install.

    Args:
        wish: "newest", "allowed", "oldest" or a requirement, as described at the top.
        keep: packages that "newest" leaves at the locked release.
    """
    if wish == "newest":
        locked = [line for line in lock_lines() if name_of(line) in keep]
        return [any_release(line) for line in requirement_lines(TESTED) if name_of(line) not in keep] + locked
    if wish == "allowed":
        return ["transformers" + range_of("transformers")]
    if wish == "oldest":
        (oldest,) = re.findall(r">=([\d.]+)", range_of("transformers"))
        return [f"transformers=={oldest}"]
    return [wish]


class Environment:
    """A new virtual environment in a folder, with the Python that runs this, and with its libraries if it borrows."""

    def __init__(self, folder: Path, borrows: bool = False) -> None:
        without = ["--without-pip"] if borrows else []  # pip is borrowed too
        subprocess.run([sys.executable, "-m", "venv", *without, str(folder)], check=True)
        self.python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        if borrows:
            borrow_libraries(self.python)
        self.variables = os.environ | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUTF8": "1"}

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit status and output of `python -m ...`; the output is printed as it arrives."""
        print("+ python -m", *arguments, flush=True)
        lines = []
        with subprocess.Popen(
            [self.python, "-m", *arguments], cwd=ROOT, env=self.variables, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
        return process.returncode, "".join(lines)

    def install(self, *arguments: str) -> tuple[int, str]:
        """As `run`, for `pip install`."""
        return self.run("pip", "install", "-q", *arguments)


def try_releases(
    wishes: Sequence[str], keep: Sequence[str] = (), quick: bool = False, borrow: bool = False
) -> tuple[bool, str]:
    """Installs the requested releases and runs the tests with them; returns whether all passed, and the report."""
    options = ["--quick"] * quick + ["--borrow"] * borrow + [f"--keep {name}" for name in keep]
    command = " ".join(["python -m tools.releases", *wishes, *options])

    def report(outcome: str, moved: str = "", output: str = "") -> str:
        """The results as Markdown: the outcome, the versions that differ from the lock, and the end of the failures."""
        system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
        parts = [f"`{command}` on {datetime.date.today()}, {system}: **{outcome}**"]
        parts += [f"```\n{text[-SHOWN:].strip()}\n```" for text in (moved, output) if text]
        return "\n\n".join(parts) + "\n"

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = Environment(Path(folder) / "venv", borrows=borrow)
        status, output = 0, ""
        if "newest" not in wishes and not borrow:
            status, output = environment.install("-r", "requirements.txt", "-r", "tests/requirements.txt")
        if status == 0:
            file = Path(folder) / "requested.txt"
            file.write_text("\n".join(line for wish in wishes for line in requested(wish, keep)), encoding="utf-8")
            status, output = environment.install("--upgrade", "-r", str(file))
        if status != 0:
            return False, report("pip cannot install them", output=output)
        same, moved = environment.run("tools.lock", "--installed")
        if same == 0 and list(wishes) == ["allowed"]:
            return True, report("the newest allowed transformers is the locked one; nothing else to run", moved)
        status, output = environment.run("pytest", "-q", "-rfE", *([QUICK] if quick else []))
        outcome = output.strip().rpartition("\n")[2].strip("= ")
        failures = output[max(0, output.rfind("short test summary info")) :] if status != 0 else ""
        return status == 0, report(outcome, moved, failures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.releases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wishes", nargs="+", metavar="RELEASES", help="newest, allowed, oldest or requirements")
    parser.add_argument("--quick", action="store_true", help="only the tests that tests/quick.txt lists")
    parser.add_argument("--borrow", action="store_true", help="take the libraries here, with the lock installed")
    parser.add_argument("--keep", action="append", default=[], metavar="PACKAGE", help="with newest: stays as locked")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results to this file, as Markdown")
    options = parser.parse_args(arguments)
    if options.borrow and "newest" in options.wishes:
        parser.error("--borrow: newest has nothing of the lock")
    unknown = sorted({*options.keep} - {name_of(line) for line in lock_lines()})
    if unknown:
        parser.error(f"--keep: not in the lock: {', '.join(unknown)}")
    well, text = try_releases(options.wishes, options.keep, options.quick, options.borrow)
    print(text, flush=True)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
