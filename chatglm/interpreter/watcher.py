"""Limits of a kernel and of all that it starts, held from outside.

The system's limits of a process hold for each of them: many processes of medium size pass below, and root may start any
number. Where we may make a control group, the system counts all of them together. Everywhere, a thread looks at the
processes of the jail, their memory and the size of the work folder, and ends all of them at once if it is too much.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Limits of one kernel: bytes, seconds and numbers.

    Args:
        memory: of a process's address space, and of all resident memory together.
        processes: at the same time, the kernel's own included.
        file: largest file that can be written.
        work: of all files in the work folder together.
        scratch: /tmp and /dev/shm, each.
        cpu_seconds: of the kernel in all; after that it is started anew.
        seconds: for one cell.
    """

    memory: int = 2 * 2**30
    processes: int = 64
    file: int = 64 * 2**20
    work: int = 256 * 2**20
    scratch: int = 128 * 2**20
    cpu_seconds: int = 600
    seconds: float = 30.0


class Group:
    """A control group with limits for all its processes together, where this process may make one.

    Both versions of Linux' interface: one tree for each kind of limit, or one tree for all of them.
    """

    ROOT = Path("/sys/fs/cgroup")
    _VERSION_1 = {"pids": ("pids.max", "processes"), "memory": ("memory.limit_in_bytes", "memory")}
    _VERSION_2 = {"": ("pids.max", "processes"), ".": ("memory.max", "memory")}

    def __init__(self, name: str, limits: Limits) -> None:
        self._folders: list[Path] = []
        is_one_tree = (self.ROOT / "cgroup.controllers").exists()
        for kind, (file, limit) in (self._VERSION_2 if is_one_tree else self._VERSION_1).items():
            folder = self.ROOT / kind / name
            try:
                folder.mkdir(exist_ok=True)
                # Twice as much, for the case that the watcher comes late: it can say why it ends a cell.
                (folder / file).write_text(str(2 * getattr(limits, limit)), encoding="ascii")
            except OSError:  # not ours to make
                with contextlib.suppress(OSError):
                    folder.rmdir()
                continue
            if folder not in self._folders:
                self._folders.append(folder)

    def add(self, pid: int) -> None:
        """Moves a process, and with it all that it starts from now on."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def close(self) -> None:
        """Removes the group, once its processes have ended."""
        for folder in self._folders:
            for _ in range(100):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.02)


class Watcher:
    """Watches a process and its descendants until it ends. Where there is no /proc, it watches the work folder only.

    Args:
        kill: ends all of them at once.
    """

    PAUSE = 0.05
    FOLDER_EVERY = 10  # looks at the folder at every tenth pause

    def __init__(self, pid: int, work: Path, limits: Limits, kill: Callable[[], None]) -> None:
        self._pid, self._work, self._limits, self._kill = pid, work, limits, kill
        #: What was too much, if anything: "processes", "memory" or "files".
        self.exceeded = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watcher {pid}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def is_exceeded(self) -> bool:
        """Whether something is too much, now; then all has been ended."""
        return bool(self.exceeded) or self._look()

    def _watch(self) -> None:
        looks = 0
        while not self._ended.wait(self.PAUSE):
            looks += 1
            if self._look(folder=looks % self.FOLDER_EVERY == 0):
                return

    def _look(self, folder: bool = False) -> bool:
        processes, memory = tree_of(self._pid)
        if memory > self._limits.memory:  # counted exactly, which takes longer
            processes, memory = tree_of(self._pid, exact=True)
        if processes > self._limits.processes:
            self.exceeded = "processes"
        elif memory > self._limits.memory:
            self.exceeded = "memory"
        elif folder and size_of(self._work, self._limits.work) > self._limits.work:
            self.exceeded = "files"
        else:
            return False
        self._kill()
        return True


def tree_of(root: int, exact: bool = False) -> tuple[int, int]:
    """Returns (number of processes, bytes of memory) of a process and all its descendants.

    Args:
        exact: count memory once that a process still shares with its parent; otherwise it counts for each.
    """
    count, memory, page = 0, 0, os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
    for pid in descendants(root):
        with contextlib.suppress(OSError, ValueError):  # it has just ended, or there is no /proc
            text = Path(f"/proc/{pid}/{'smaps_rollup' if exact else 'statm'}").read_text(encoding="ascii")
            if exact:
                memory += sum(int(kilobytes) * 1024 for kilobytes in re.findall(r"^Pss_Anon: +(\d+)", text, re.M))
            else:
                _, resident, shared, *_ = map(int, text.split())
                memory += (resident - shared) * page
            count += 1
    return count, memory


def descendants(root: int) -> list[int]:
    """The ids of a process and of all that descend from it, as far as the system tells."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        with contextlib.suppress(OSError, ValueError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                    todo += map(int, file.read().split())
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and is only still listed."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def size_of(folder: Path, enough: int) -> int:
    """Returns the bytes of all files in a folder, or something above `enough`. Follows no links."""
    total, todo = 0, [str(folder)]
    while todo and total <= enough:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    else:
                        total += max(4096, entry.stat(follow_symlinks=False).st_size)
        except OSError:  # it has just been removed
            continue
    return total
