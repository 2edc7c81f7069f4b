"""Files and folders that are whole or absent: written aside, flushed to the disk, then renamed into place.

Only the standard library is used here, so that modules without torch can write this way too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished-"


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file (text as UTF-8), or replaces the one that is there, in one step.

    Raises:
        OSError: the file cannot be written; the error names it, and the old one is as it was.
    """
    path, data = Path(path), content.encode() if isinstance(content, str) else content
    aside = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def files_into(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files in: those of the same names in `folder` are replaced once all are written.

    They are replaced in reverse alphabetical order: the weights before the config.json that describes them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
    try:
        yield aside
        _settle(aside)
        for path in sorted(aside.iterdir(), reverse=True):
            path.replace(folder / path.name)
        _sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(
    final: str | os.PathLike[str],
    *,
    aside: Path | None = None,
    old: Path | None = None,
    writes: bool = True,
) -> Iterator[Path]:
    """A folder to fill, which becomes `final` once everything in it is written.

    Args:
        aside: where it is filled; what a killed process left there is removed first. By default beside `final`.
        old: where a `final` that exists already is kept until the new one has taken its place. A process that is killed
            just then leaves it there: `put_back` restores it. Without `old`, `final` must not exist.
        writes: False in a process that fills the folder together with another one, which makes and renames it.

    Raises:
        OSError: it cannot be written, or `final` exists; nothing new is left behind then.
    """
    final = Path(final)
    aside = aside or final.with_name(f".{final.name}.unfinished")
    try:
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        yield aside
        if writes:
            _settle(aside)
            if old is not None and final.exists():
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            aside.rename(final)
            _sync(final.parent)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if old is not None:
            put_back(old, final)
        raise


def put_back(old: Path, final: Path) -> None:
    """Restores a folder whose replacement was interrupted between the two renames of `whole_folder`."""
    if old.exists() and not final.exists():
        with contextlib.suppress(FileNotFoundError):  # another process has just done it
            old.rename(final)


def _settle(folder: Path) -> None:
    """Flushes all files of a folder, and gives them the permissions of new ones: safetensors makes private files."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            present = path.stat().st_mode & 0o777
            if present | mode != present:
                path.chmod(present | mode)
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; Windows has no such thing for folders."""
    if os.name == "posix":
        flags = os.O_RDONLY
    elif path.is_file():
        flags = os.O_RDWR
    else:
        return
    number = os.open(path, flags)
    try:
        os.fsync(number)
    finally:
        os.close(number)
