"""How the CPU kernels are built, cached and given up."""

from __future__ import annotations

import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm.kernels import cpu
from chatglm.kernels.cache_files import damaged_files
from chatglm.kernels.cpu import backend, library
from chatglm.kernels.cpu import compile as compiler
from chatglm.kernels.errors import KernelUnavailable
from kernel_variants import load_or_skip


@pytest.fixture(scope="module")
def built() -> cpu.CPUBackend:
    return load_or_skip()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no state kept from before or for later."""
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def forget() -> None:
    library.load_library.cache_clear()
    backend.load_variant.cache_clear()


@pytest.fixture
def hasty_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler that is found, without its optimisations: ten times as fast."""
    if os.name == "nt":  # a shell script is no program there
        return
    script = tmp_path / "hasty"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler.find_compiler()[0])} "$@" -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", shlex.quote(str(script)))


def test_processes_that_start_together_build_one_library(
    built: cpu.CPUBackend, cache: Path, hasty_compiler: None
) -> None:
    program = (
        "import torch; from chatglm.kernels import cpu; b = cpu.load(); "
        "y = b.linear(torch.ones(1, 2), torch.tensor([[0x12]], dtype=torch.int8), torch.ones(1), 4); "
        "print(b.path, y.item())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(said) == 1
    assert said.pop().endswith(" 3.0")
    assert len(list(cache.glob("cpu-*"))) == 1


@pytest.fixture
def prebuilt(built: cpu.CPUBackend, cache: Path) -> Path:
    """The cache with the library in it, without building it again."""
    cache.mkdir()
    path = cache / built.path.name
    path.write_bytes(built.path.read_bytes())
    return path


def test_a_cache_that_cannot_be_written_to_still_serves(prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "cache")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert cpu.load().path == prebuilt
    forget()
    prebuilt.unlink()
    with pytest.raises(KernelUnavailable, match=r"Permission denied.*set CHATGLM_CACHE"):
        cpu.load()


def test_threads_that_start_together_share_one_library(prebuilt: Path) -> None:
    found: list[cpu.CPUBackend] = []
    threads = [threading.Thread(target=lambda: found.append(cpu.load())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({id(backend.library) for backend in found}) == 1


@pytest.mark.parametrize("size", [0, 100, 50_000])
def test_a_damaged_library_is_built_anew_and_never_opened(
    prebuilt: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    whole = prebuilt.read_bytes()
    prebuilt.write_bytes(whole[:size])  # opened, the last of these would end the process with a bus error
    assert damaged_files() == [prebuilt]

    def build(command: list[str], folder: Path, stem: str) -> Path:
        prebuilt.write_bytes(whole)
        return prebuilt

    def open_whole(path: Path) -> Any:
        assert path.read_bytes() == whole
        return open_library(path)

    open_library = library.open_library
    monkeypatch.setattr(compiler, "build", build)
    monkeypatch.setattr(library, "open_library", open_whole)
    assert cpu.load().path == prebuilt
    assert damaged_files() == []


def test_a_cache_below_a_file_is_named_in_the_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    monkeypatch.setenv("CHATGLM_CACHE", str(cache / "below"))
    with pytest.raises(KernelUnavailable, match="set CHATGLM_CACHE to a writable folder"):
        cpu.load()


def test_no_compiler_is_said_with_the_cure(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("/bin/false", "/no/such/compiler"):
        monkeypatch.setenv("CC", nothing)
        forget()
        with pytest.raises(KernelUnavailable, match=r"apt install gcc.*MinGW"):
            cpu.load()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    forget()
    with pytest.raises(KernelUnavailable, match="there is no cc, gcc or clang"):
        cpu.load()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for a compiler is a shell script")
def test_a_compiler_without_openmp_is_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "my cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "unsupported option -fopenmp" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", f"'{script}'")
    with pytest.raises(KernelUnavailable, match=r"brew install libomp.*unsupported option -fopenmp"):
        cpu.load()
    assert not list(cache.iterdir())


def test_every_source_is_part_of_the_key(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library that was built before any of the C files changed is not taken for the new one."""
    folder = tmp_path / "sources"
    shutil.copytree(compiler.SOURCE.parent, folder)
    monkeypatch.setattr(compiler, "SOURCE", folder / compiler.SOURCE.name)
    monkeypatch.setattr(compiler, "find_compiler", lambda: (["cc"], "a compiler"))
    monkeypatch.setattr(compiler, "build", lambda command, folder, stem: Path(stem))

    def key() -> str:
        return compiler.compiled(lambda path: None)[1].name

    keys = [key()]
    assert key() == keys[0]
    sources = [path for path in folder.iterdir() if path.suffix in (".c", ".h")]
    for path in sources:
        with path.open("a") as file:
            file.write("/* */\n")
        keys.append(key())
    assert len(set(keys)) == len(sources) + 1 > 10


def test_every_source_is_in_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    package = Path(cpu.__file__).parents[2]
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["chatglm"]
    files = [path for path in (package / "kernels").rglob("*") if path.suffix not in ("", ".py", ".pyc")]
    assert {path.suffix for path in files} == {".c", ".h", ".cu"}
    for path in files:
        assert any(fnmatch.fnmatch(str(path.relative_to(package)), pattern) for pattern in patterns), path
