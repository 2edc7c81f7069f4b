"""Files and folders appear completely or not at all, with the permissions of new files, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm.checkpoints import atomic
from chatglm.checkpoints.atomic import files_into, put_back, whole_folder, write_file

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=["022", "077", "002"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def write_private(path: Path, content: str = "weights") -> None:
    """As safetensors writes: readable by the owner alone."""
    path.write_text(content)
    path.chmod(0o600)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- a file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["你好\n", b"\x00\xff\r\n"])
def test_a_file_is_written_and_replaced(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "talk.json"
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        write_file(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert names(tmp_path) == ["talk.json"]


@posix
def test_a_file_has_the_permissions_of_a_new_one(tmp_path: Path, umask: int) -> None:
    write_file(tmp_path / "file", "text")
    assert mode_of(tmp_path / "file") == 0o666 & ~umask


def test_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_file(path, "text")
    assert path.read_text() == "text"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, call) if call == "fsync" else (Path, call)), full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_file(path, "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "file", tmp_path / "folder"):
        with pytest.raises(OSError) as caught:
            write_file(path, "text")
        assert str(caught.value).endswith(f": {str(path)!r}")
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "file", "\ud800")
    assert names(tmp_path) == ["folder"]


# ---- files into a folder ---------------------------------------------------------------------------------------------


@posix
def test_files_into_a_folder_replace_those_of_their_names(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "adapter"
    for content in ("old", "new"):
        with files_into(folder) as aside:
            write_private(aside / "model.safetensors", content)
            (aside / "config.json").write_text(content)
            assert not (folder / "config.json").exists() or (folder / "config.json").read_text() == "old"
        (folder / "other").touch()
        assert names(folder) == ["config.json", "model.safetensors", "other"]
        assert {(folder / name).read_text() for name in ("config.json", "model.safetensors")} == {content}
        assert {mode_of(path) for path in folder.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_files_that_are_not_finished_replace_nothing(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(type(error)), files_into(tmp_path) as aside:
        (aside / "config.json").write_text("half")
        raise error
    assert names(tmp_path) == ["config.json"] and (tmp_path / "config.json").read_text() == "old"


# ---- a folder --------------------------------------------------------------------------------------------------------


@posix
def test_a_folder_appears_whole(tmp_path: Path, umask: int) -> None:
    final = tmp_path / "new" / "merged"
    with whole_folder(final) as aside:
        write_private(aside / "model.safetensors")
        (aside / "inner").mkdir()
        write_private(aside / "inner" / "state")
        (aside / "script.py").touch()
        (aside / "script.py").chmod(0o700)
        assert not final.exists() and aside.parent == final.parent
    assert names(final.parent) == ["merged"]
    assert mode_of(final / "model.safetensors") == mode_of(final / "inner" / "state") == 0o666 & ~umask
    assert mode_of(final / "script.py") & 0o100  # DeepSpeed's programs stay programs
    assert mode_of(final) == 0o777 & ~umask


def test_a_folder_that_exists_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-2"

    def write(**options: Any) -> None:
        with whole_folder(final, **options) as aside:
            (aside / "state").write_text(str(len(options)))

    write()
    with pytest.raises(OSError):
        write()
    assert (final / "state").read_text() == "0" and names(tmp_path) == ["checkpoint-2"]
    write(old=tmp_path / "old")
    assert (final / "state").read_text() == "1" and names(tmp_path) == ["checkpoint-2"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "final") as aside:
        pass
    (tmp_path / "final").rmdir()
    aside.mkdir()
    (aside / "half").touch()
    with whole_folder(tmp_path / "final") as again:
        assert again == aside and list(again.iterdir()) == []


def fails_while_filling(aside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raise OSError("full")


def fails_in_the_second_rename(aside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self == aside:
            raise OSError("gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)


@pytest.mark.parametrize("fail", [fails_while_filling, fails_in_the_second_rename])
def test_a_folder_that_is_not_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "state").write_text("old")
    with pytest.raises(OSError), whole_folder(final, old=tmp_path / "old") as aside:
        (aside / "state").write_text("new")
        fail(aside, monkeypatch)
    assert names(tmp_path) == ["final"] and (final / "state").read_text() == "old"


def test_of_several_processes_one_makes_the_folder(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "final") as aside, whole_folder(tmp_path / "final", writes=False) as same:
        assert same == aside
        (same / "of the other").touch()
    assert names(tmp_path / "final") == ["of the other"]


def test_put_back(tmp_path: Path) -> None:
    old, final = tmp_path / "old", tmp_path / "final"
    put_back(old, final)
    assert names(tmp_path) == []
    old.mkdir()
    put_back(old, final)
    assert names(tmp_path) == ["final"]
    old.mkdir()
    put_back(old, final)
    assert names(tmp_path) == ["final", "old"]


def test_it_needs_no_library() -> None:
    code = (
        "import runpy, sys; before = set(sys.modules); runpy.run_path(sys.argv[1]);"
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    command = [sys.executable, "-c", code, str(atomic.__file__)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"
