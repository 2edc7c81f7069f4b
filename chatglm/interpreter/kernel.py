"""A Jupyter kernel in its jail: start, cells, interrupt, restart."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .isolation import Isolation, matplotlib_settings
from .outputs import Outputs, Part, Picture
from .watcher import Group, Limits, Watcher, descendants, is_running, size_of

START_SECONDS = 60.0
#: How long a cell may take to end after an interrupt, and after how long it is interrupted again: while a kernel
#: prepares a cell, an interrupt can be lost.
INTERRUPT_SECONDS, AGAIN_SECONDS = 10.0, 1.0
#: How long to wait for the end of processes that were killed.
END_SECONDS = 10.0
MOST_UPLOAD = 20 * 2**20

_STARTED_ANEW = "The kernel was started anew: variables are gone, files are still there."


@dataclass(frozen=True)
class Result:
    """What a cell gave.

    Args:
        status: "ok", "error" (an exception), "timeout", "interrupted", "full" (too much output) or "died".
        files: names of the files in the work folder that the cell made or changed.
    """

    status: str
    parts: list[Part | Picture] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Kernel:
    """One kernel with its folder of files; it starts at the first cell.

    Args:
        work: the folder; by default a new one, which `close` removes.

    Raises ImportError without jupyter_client and ipykernel, OSError for a folder that cannot be made.
    """

    def __init__(
        self, isolation: Isolation, limits: Limits | None = None, work: str | os.PathLike[str] | None = None
    ) -> None:
        from jupyter_client.blocking.client import BlockingKernelClient

        self._client_class = BlockingKernelClient
        self.isolation, self.limits = isolation, limits or Limits()
        self._lock = threading.RLock()
        self._folder = Path(tempfile.mkdtemp(prefix="chatglm-"))  # short: names of sockets have at most 107 bytes
        self.work = self._folder / "work" if work is None else Path(work).expanduser().resolve()
        self._is_own = work is None
        self.work.mkdir(parents=True, exist_ok=True)
        if not self._is_own:  # what is there already does not count
            before = size_of(self.work, 2**60)
            self.limits = replace(self.limits, work=self.limits.work + before)
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self._watcher: Watcher | None = None
        self._group: Group | None = None
        self._number = 0
        self._killed: list[int] = []
        #: (name, size) of files of which the model does not know yet.
        self.uploaded: list[tuple[str, int]] = []

    # ---- life --------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        from jupyter_client.connect import write_connection_file

        self._number += 1
        run, errors = self._folder / f"r{self._number}", self._folder / f"e{self._number}"
        run.mkdir()
        key = os.urandom(16).hex().encode()
        write_connection_file(str(run / "c.json"), transport="ipc", ip=str(run / "k"), key=key)
        (run / "matplotlibrc").write_text(matplotlib_settings(), encoding="utf-8")
        self._group = Group(f"{self._folder.name}-{self._number}", self.limits)
        group = self._group
        with errors.open("wb") as stderr:  # outside of what its code reaches; cannot grow past `limits.file`
            self._process = subprocess.Popen(
                self.isolation.command(self.work, run, self.limits), env=self.isolation.environment(self.work, run),
                cwd=self.work, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                start_new_session=True, close_fds=True,
            )  # fmt: skip
        for pid in descendants(self._process.pid):
            group.add(pid)
        client = self._client_class(connection_file=str(run / "c.json"))
        client.load_connection_file()
        client.start_channels()
        self._client = client
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                client.wait_for_ready(timeout=2)
                break
            except RuntimeError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self._stop()
                    said = errors.read_text(encoding="utf-8", errors="replace").strip()
                    reason = f": {said.splitlines()[-1][:500]}" if said else ""
                    raise RuntimeError(f"the kernel did not start{reason}") from None
        for pid in descendants(self._process.pid):
            group.add(pid)
        self._watcher = Watcher(self._process.pid, self.work, self.limits, self._kill)

    def _kill(self) -> None:
        process = self._process
        if process is None:
            return
        found = descendants(process.pid)
        self._killed += found
        # In the jail, the end of bubblewrap ends all; without one, everything has to be found.
        for pid in found if self.isolation.grade == "trusted" else [process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _stop(self) -> None:
        if self._client is not None:
            self._client.stop_channels()
        if self._process is not None:
            self._kill()
            self._process.wait()
        if self._watcher is not None:
            self._watcher.close()
        end = time.monotonic() + END_SECONDS
        while any(map(is_running, self._killed)) and time.monotonic() < end:  # they end a moment after bubblewrap
            time.sleep(0.005)
        self._killed.clear()
        if self._group is not None:
            self._group.close()
        self._process = self._client = self._watcher = self._group = None

    def restart(self) -> None:
        """Ends the kernel, and with it all variables; the next cell starts another one."""
        self._kill()  # a cell that is running ends
        with self._lock:
            self._stop()

    def close(self) -> None:
        """Ends the kernel and removes its files."""
        self._kill()
        with self._lock:
            self._stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def is_busy(self) -> bool:
        """Whether a cell runs now."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return False
        return True

    # ---- cells -------------------------------------------------------------------------------------------------------

    def execute(
        self, code: str, cancel: threading.Event | None = None, seconds: float | None = None
    ) -> Result:
        """Runs a cell and waits for its end; the state of earlier cells is there.

        Args:
            cancel: set it to interrupt the cell.
            seconds: its time limit, by default that of `limits`. It is then interrupted, and if it does not end, the
                kernel is started anew.
        """
        with self._lock:
            before = self._times()
            try:
                if self._process is None or self._process.poll() is not None:
                    self._stop()
                    self._start()
            except RuntimeError as error:
                return Result("died", [Part("error", f"{error}\n")])
            status, outputs = self._run(code, cancel, self.limits.seconds if seconds is None else seconds)
            changed = [name for name, stamp in self._times().items() if before.get(name) != stamp]
            return Result(status, outputs.parts, sorted(changed))

    def _run(self, code: str, cancel: threading.Event | None, seconds: float) -> tuple[str, Outputs]:
        outputs, status, begun = Outputs(), "ok", False
        give_up = next_interrupt = 0.0
        client, process = self._client, self._process
        assert process is not None
        message = client.execute(code, allow_stdin=False, store_history=True)
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            if status in ("ok", "error"):
                why = "full" if outputs.full else "timeout" if now > end else ""
                why = "interrupted" if cancel is not None and cancel.is_set() else why
                if why:
                    status, give_up = why, now + START_SECONDS
            elif now > give_up:
                self._end_badly(outputs, status, seconds)
                return status, outputs
            elif begun and now > next_interrupt:  # before its cell has begun, a kernel ignores interrupts
                if not next_interrupt:
                    give_up = now + INTERRUPT_SECONDS
                next_interrupt = now + AGAIN_SECONDS
                self.interrupt()
            try:
                given = client.get_iopub_msg(timeout=0.1)
            except queue.Empty:
                if process.poll() is not None:
                    self._end_badly(outputs, "died", seconds)
                    return "died", outputs
                continue
            if given.get("parent_header", {}).get("msg_id") != message:
                continue
            kind, content = given["msg_type"], given["content"]
            begun = begun or kind == "execute_input"
            if kind == "status" and content.get("execution_state") == "idle":
                break
            if kind == "error":
                status = "error" if status == "ok" else status
            if status in ("ok", "error") or kind == "error":
                outputs.take(kind, content)
        if self._watcher is not None and self._watcher.is_exceeded():  # processes may outlive their cell
            self._end_badly(outputs, "died", seconds)
            return "died", outputs
        if status in ("timeout", "full"):
            what = f"took more than {seconds:g} seconds" if status == "timeout" else "printed too much"
            outputs.parts.append(Part("error", f"The cell {what} and was interrupted.\n"))
        return status, outputs

    def _end_badly(self, outputs: Outputs, status: str, seconds: float) -> None:
        """Starts anew after a cell that ended its kernel, or that cannot be interrupted; says so in the output."""
        exceeded = self._watcher.exceeded if self._watcher is not None else ""
        reason = {
            "processes": f"The cell started more than {self.limits.processes} processes.",
            "memory": f"The cell used more than {self.limits.memory // 2**20} MB of memory.",
            "files": f"The files take more than {self.limits.work // 2**20} MB.",
        }.get(exceeded, "The kernel died." if status == "died" else "The cell could not be interrupted.")
        outputs.parts.append(Part("error", f"{reason} {_STARTED_ANEW}\n"))
        self._stop()
        if exceeded == "files" and self._is_own:  # or the next cell would end at once
            self._empty()

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt in the cell. By a message: a signal would stay outside of the jail."""
        client = self._client
        if client is not None:
            client.control_channel.send(client.session.msg("interrupt_request", {}))

    # ---- files -------------------------------------------------------------------------------------------------------

    def put_file(self, name: str, content: bytes) -> str:
        """Writes a file for cells to read; returns its name, reduced to letters, digits, `_`, `-` and `.`.

        Raises ValueError for a file of more than 20 MB.
        """
        if len(content) > MOST_UPLOAD:
            raise ValueError(f"{name} is larger than {MOST_UPLOAD // 2**20} MB")
        name = safe_name(name)
        with self._open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            file.write(content)
        return name

    def read_file(self, name: str) -> bytes:
        """Reads a file of the work folder. Raises OSError for what is none, such as a link out of it."""
        with self._open(name, os.O_RDONLY) as file:
            return bytes(file.read(self.limits.file + 1))

    def _open(self, name: str, flags: int) -> Any:
        # Code in the jail may have made links, and pipes that never give anything.
        if name != safe_name(name):
            raise FileNotFoundError(f"there is no file {name}")
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(self.work / name, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileNotFoundError(f"{name} is no file")
            return os.fdopen(handle, "wb" if flags & os.O_WRONLY else "rb")
        except BaseException:
            os.close(handle)
            raise

    def files(self) -> list[str]:
        """The names of the files in the work folder, without hidden ones."""
        return sorted(self._times())

    def _times(self) -> dict[str, tuple[int, int]]:
        found = {}
        with contextlib.suppress(OSError), os.scandir(self.work) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    about = entry.stat(follow_symlinks=False)
                    found[entry.name] = (about.st_mtime_ns, about.st_size)
                if len(found) >= 1000:
                    break
        return found

    def _empty(self) -> None:
        for entry in os.scandir(self.work):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def safe_name(name: str) -> str:
    """A file's name without folders and with nothing but letters, digits, `_`, `-` and `.`; never a hidden file."""
    name = re.sub(r"[^\w.-]", "_", name.replace("\\", "/").rpartition("/")[2]).lstrip(".")
    while len(name.encode()) > 200:
        name = name[1:]
    return name or "file"
