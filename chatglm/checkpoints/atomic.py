"""Writes files and folders that are complete or absent: written aside, flushed to disk, then renamed into place.

Only the standard library is used here, so that modules without torch can use it too.
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
    """Writes a file (text as UTF-8), or replaces the existing one, in one step.

    Raises:
        OSError: the file cannot be written; the error names it, and the old one is left unchanged.
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
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the name of a file to write, which becomes `path` once it is written.

    Raises:
        OSError: it cannot be written; nothing new is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}{UNFINISHED}{secrets.token_hex(4)}")
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def files_into(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a folder to write files in: those of the same names in `folder` are replaced once all are written.

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
    """Yields a folder to fill, which becomes `final` once everything in it is written.

    Args:
        aside: the folder to fill, by default beside `final`; leftovers of a killed process are removed first.
        old: where an existing `final` is kept until the new one has taken its place. If the process is killed just
            then, `put_back` restores it. Without `old`, `final` must not exist.
        writes: False in a process that fills the folder together with another one, which creates and renames it.

    Raises:
        OSError: it cannot be written, or `final` exists; nothing new is left behind.
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
    """Flushes all files of a folder, and gives them default permissions, as safetensors creates private files."""
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
    """Flushes a file, or the entries of a folder, to disk; Windows cannot do that for folders."""
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
