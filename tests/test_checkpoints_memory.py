"""How much memory is free, as Linux, containers and macOS report it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from chatglm.checkpoints import memory

GIB = 2**30


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {32 * 2**20} kB\nMemFree:  1024 kB\nMemAvailable:   {16 * 2**20} kB\n"}


def test_linux_without_a_limit(tmp_path: Path) -> None:
    root = _write(tmp_path, MEMINFO | {"proc/self/cgroup": "0::/user.slice\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert memory.linux_available(root) == 16 * GIB


def test_linux_container_limit_counts_and_cached_files_do_not(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/app/inner\n",
        "sys/fs/cgroup/app/memory.max": str(6 * GIB),
        "sys/fs/cgroup/app/memory.current": str(5 * GIB),
        "sys/fs/cgroup/app/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        "sys/fs/cgroup/app/inner/memory.max": "max",
        "sys/fs/cgroup/app/inner/memory.current": "1",
    }
    assert memory.linux_available(_write(tmp_path, MEMINFO | files)) == 3 * GIB


def test_linux_container_of_version_1_seen_from_inside(tmp_path: Path) -> None:
    # The path is the host's and does not exist in here: the limit is at the mount itself.
    files = {
        "proc/self/cgroup": "3:cpu:/docker/abc\n4:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    }
    assert memory.linux_available(_write(tmp_path, MEMINFO | files)) == 2 * GIB


def test_linux_that_tells_nothing(tmp_path: Path) -> None:
    assert memory.linux_available(tmp_path) is None


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(GIB),
        "sys/fs/cgroup/memory.current": str(GIB + 4096),
    }
    assert memory.linux_available(_write(tmp_path, MEMINFO | files)) == 0


def test_macos() -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10000.\nPages active:                            999999.\n"
        "Pages inactive:                            5000.\nPages speculative:                          500.\n"
    )
    assert memory.mac_available(lambda command: text) == 15500 * 16384


def test_macos_without_vm_stat() -> None:
    def missing(command: list[str]) -> str:
        raise FileNotFoundError(command[0])

    assert memory.mac_available(missing) is None


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin", "win32")), reason="an unknown system tells nothing")
def test_this_machine_has_some_memory() -> None:
    room = memory.available(torch.device("cpu"))
    assert room is not None
    assert 2**24 < room < 2**50


@pytest.mark.parametrize(("size", "text"), [(12_884_901_888, "12.0 GiB"), (10 * 2**20, "10 MiB"), (0, "0 MiB")])
def test_readable(size: int, text: str) -> None:
    assert memory.readable(size) == text
