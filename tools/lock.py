"""`python -m tools.lock` writes requirements.lock: the exact version of everything that the requirements files ask for.

The requirements files say what is needed and why, in ranges; pip takes the exact versions from the lock, which they
name with `-c`. `--upgrade` moves the lock to the newest releases within the ranges, then runs the tests. `--installed`
writes nothing and compares the lock with the environment that runs it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
TESTED = (
    "requirements.txt", "ptuning/requirements.txt", "ptuning/requirements-prefer.txt", "tests/requirements.txt",
)  # fmt: skip
REQUIREMENTS = (*TESTED, "deploy/requirements-ray.txt")
HEADER = """\
# Written by `python -m tools.lock`, not by hand: exact versions of what the requirements files here, in ptuning/,
# tests/ and deploy/ ask for, and of all below it, on Linux, macOS and Windows. pip takes them as constraints (`-c`), so
# what nothing asks for is not installed, such as CUDA's packages where torch is built for the CPU. These have upper
# bounds: pip takes the newest, which is what was locked, and leaves alone a torch that is built for an older CUDA.
"""
# Exact versions make pip replace an installed torch for CUDA 12 with one for CUDA 13, which older drivers do not run.
OF_CUDA = re.compile(r"^((?:cuda-|nvidia-|triton)[\w-]*)==", re.MULTILINE)
# What a virtual environment contains anyway, and this project itself if it is installed.
NOT_LOCKED = {"chatglm-rebuilt", "pip", "wheel"}
OLDEST_PYTHON = "3.10"
# These would make the lock depend on the machine. A mirror of PyPI is allowed: the lock does not record it.
LEFT_OUT = {
    "UV_BUILD_CONSTRAINT", "UV_CONSTRAINT", "UV_EXCLUDE", "UV_EXCLUDE_NEWER", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS",
    "UV_FORK_STRATEGY", "UV_INDEX", "UV_INDEX_STRATEGY", "UV_NO_BINARY", "UV_NO_BUILD", "UV_OVERRIDE", "UV_PRERELEASE",
    "UV_RESOLUTION", "UV_TORCH_BACKEND",
}  # fmt: skip


class LockError(Exception):
    """The lock could not be written; the text says why."""


def requirement_lines(files: Sequence[str] = REQUIREMENTS) -> list[str]:
    """The requirements of these files, without comments and references to other files (`-r`, `-c`)."""
    lines = []
    for name in files:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            requirement = line.partition("#")[0].strip()
            if requirement and not requirement.startswith("-"):
                lines.append(requirement)
    return lines


def lock_lines() -> list[str]:
    """The lines of the lock, `name==version ; marker` or `name<=version ; marker`, without comments."""
    lines = (line.partition("#")[0].strip() for line in LOCK.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def resolve(upgrade: Sequence[str] | None) -> str:
    """
    The text of a new lock. Locked versions stay unless the requirements exclude them.

    Args:
        upgrade: packages to move to their newest release; empty: all; None: none.
    Raises:
        LockError: uv is missing, or no set of versions fits.
    """
    if importlib.util.find_spec("uv") is None:
        raise LockError("uv is missing: pip install -r requirements.txt -r tests/requirements.txt")
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--universal", "--python-version", OLDEST_PYTHON]
    command += ["--no-python-downloads", "--no-emit-index-url", "--no-header", "--annotation-style", "line"]
    if upgrade is not None:
        command += [f"--upgrade-package={name}" for name in upgrade] or ["--upgrade"]
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / LOCK.name
        if LOCK.exists():  # uv keeps the versions that it finds in its output file
            output.write_text(LOCK.read_text(encoding="utf-8").replace("<=", "=="), encoding="utf-8")
        done = subprocess.run(
            [*command, "--output-file", str(output)], cwd=ROOT, env=environment, encoding="utf-8",
            input="\n".join(requirement_lines()), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if done.returncode != 0:
            raise LockError(done.stderr.strip())
        return HEADER + OF_CUDA.sub(r"\1<=", output.read_text(encoding="utf-8"))


def write(text: str) -> None:
    """Replaces the old lock with the new one atomically."""
    aside = LOCK.with_name(LOCK.name + ".new")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, LOCK)


def differences(installed: Mapping[str, str], environment: Mapping[str, str] | None = None) -> list[str]:
    """
    The installed packages that differ from the lock, one per line; none if pip took everything from the lock.

    Args:
        installed: versions by distribution name.
        environment: values of markers (`python_full_version`, `sys_platform`, ...) that replace this interpreter's.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    requirements = [Requirement(line) for line in lock_lines()]
    locked = {
        canonicalize_name(each.name): each.specifier
        for each in requirements
        if each.marker is None or each.marker.evaluate(dict(environment or {}))
    }
    lines = []
    for name, version in sorted((canonicalize_name(name), version) for name, version in installed.items()):
        if name not in locked:
            if name not in NOT_LOCKED:
                lines.append(f"{name} {version}, not in the lock")
        elif not locked[name].contains(version, prereleases=True):  # 2.13.0+cpu is 2.13.0
            lines.append(f"{name} {version}, locked {str(locked[name]).lstrip('<=')}")
    return lines


def installed_here() -> dict[str, str]:
    """The versions installed in the current environment, by name; what is there twice is the one that is imported."""
    versions: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        versions.setdefault(each.metadata["Name"], each.version)
    return versions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.lock", description="Writes requirements.lock; if it changed, runs .ci/run with it."
    )
    parser.add_argument(
        "--upgrade", nargs="*", metavar="PACKAGE",
        help="move these to the newest release within the ranges; everything if none is named",
    )  # fmt: skip
    parser.add_argument("--no-tests", action="store_true", help="do not run .ci/run")
    parser.add_argument("--installed", action="store_true", help="only compare the lock with the installed packages")
    options = parser.parse_args(arguments)
    if options.installed:
        installed = installed_here()
        lines = differences(installed)
        print("\n".join(lines) or f"all {len(installed)} packages as locked")
        return 1 if lines else 0

    before = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
    try:
        after = resolve(options.upgrade)
    except LockError as error:
        print(error, file=sys.stderr)
        return 1
    if after == before:
        print(f"{LOCK.name} is up to date")
        return 0
    write(after)
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=0)
    print("\n".join(line for line in changes if not line.startswith(("@@", "---", "+++"))), flush=True)
    if options.no_tests:
        return 0
    status = subprocess.run(["bash", str(ROOT / ".ci" / "run")], cwd=ROOT).returncode
    if status != 0:
        print(f"the tests fail with it; `git checkout {LOCK.name}` restores the old one", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
