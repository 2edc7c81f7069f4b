"""The jail in which a kernel runs: what it can see, and how it is started.

`isolated`: bubblewrap. Namespaces of its own for users, processes, network and the rest; of the file system only the
system's libraries and this Python, read-only, and the conversation's folder as /mnt/data; an empty environment.
`trusted`: no jail, only limits, and no network where `unshare` can take it away. Code then reads what the user can
read, so that the user has to ask for it by this word.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from .watcher import Limits

GRADES = ("isolated", "trusted")
#: Where the conversation's files are, as ChatGLM3 was trained.
WORK = "/mnt/data"
_NOBODY = "65534"
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/fonts")
_SECONDS = 20.0


class NotIsolatedError(RuntimeError):
    """There is no way to isolate code here; the message says what to do."""


class Isolation:
    """A way to start kernels.

    Args:
        grade: one of `GRADES`.
        network: whether code reaches a network; False wherever it can be taken away.
    """

    def __init__(self, grade: str, network: bool, options: tuple[str, ...] = ()) -> None:
        self.grade, self.network = grade, network
        self._options = options

    def command(self, work: Path, run: Path, limits: Limits) -> list[str]:
        """The command line of a kernel.

        Args:
            work: the folder of its files.
            run: a folder with the connection file `c.json`, and for its sockets; its path must be short.
        """
        python = [sys.executable, "-I", "-m", "ipykernel_launcher", "-f", str(run / "c.json")]
        limited = [*_prlimit(limits), *python, "--HistoryManager.enabled=False"]
        if self.grade == "isolated":
            return [*_jail(self._options, limits), "--bind", str(run), str(run), "--bind", str(work), WORK, "--chdir",
                    WORK, "--remount-ro", "/", "--", *limited]  # fmt: skip
        return limited if self.network else ["unshare", "--map-current-user", "--net", "--", *limited]

    def environment(self, work: Path, run: Path) -> dict[str, str]:
        """All of the kernel's environment variables."""
        home = WORK if self.grade == "isolated" else str(work)
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MPLCONFIGDIR": "/tmp/matplotlib" if self.grade == "isolated" else str(work / ".matplotlib"),
            "MATPLOTLIBRC": str(run / "matplotlibrc"),
            "IPYTHONDIR": "/tmp/ipython" if self.grade == "isolated" else str(work / ".ipython"),
            # Each thread reserves address space, of which there is a limit.
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",
        }  # fmt: skip


def choose_isolation(wanted: str = "isolated") -> Isolation:
    """Returns the isolation of this grade.

    Raises:
        NotIsolatedError: there is no bubblewrap here, or it is not allowed to work.
        ValueError: no such grade.
    """
    if wanted not in GRADES:
        raise ValueError(f"there is no grade of isolation {wanted!r}, only {', '.join(GRADES)}")
    if wanted == "trusted":
        return Isolation("trusted", network=not _works(("unshare", "--map-current-user", "--net", "--", "true")))
    for options in (("--unshare-all", "--unshare-user", "--disable-userns"), ("--unshare-all",)):
        if _works((*_jail(options, Limits()), "--remount-ro", "/", "--", sys.executable, "-I", "-c", "")):
            return Isolation("isolated", network=False, options=options)
    found = shutil.which("bwrap")
    reason = "bubblewrap may not create namespaces here" if found else "bubblewrap is not installed"
    raise NotIsolatedError(
        f"code cannot be isolated: {reason}. On Debian and Ubuntu: apt-get install bubblewrap; elsewhere run all of it "
        "in a container without network. `trusted` runs code with your own rights: it can read all your files"
    )


def matplotlib_settings() -> str:
    """Settings with which matplotlib writes Chinese, if there is a font that has it."""
    found = next(Path("/usr/share/fonts").rglob("NotoSansCJK-Regular.ttc"), None)
    families = ["DejaVu Sans", *(["Noto Sans CJK JP"] if found else [])]  # the first of the faces in that file
    return f"font.family: {', '.join(families)}\naxes.unicode_minus: False\n"


def _jail(options: tuple[str, ...], limits: Limits) -> list[str]:
    """The beginning of bubblewrap's command line."""
    command = ["bwrap", *options, "--die-with-parent", "--new-session", "--uid", _NOBODY, "--gid", _NOBODY,
               "--hostname", "sandbox"]  # fmt: skip
    size = ["--size", str(limits.scratch)]
    # All that can be written but the work folder lies in memory, and has a size. First, as this Python may lie in /tmp.
    command += [*size, "--tmpfs", "/tmp"]
    for path in dict.fromkeys((*_SYSTEM, sys.prefix, sys.base_prefix)):
        if os.path.lexists(path):
            # /bin and the like are links on most systems, and stay so.
            command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    command += ["--proc", "/proc"]
    for path in _settings_of_the_system():
        command += ["--ro-bind", path, path]
    return [*command, "--dev", "/dev", *size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]


def _settings_of_the_system() -> list[str]:
    """What /proc has beside processes and can be written: where root starts the jail, its code is the owner of that."""
    found = []
    with contextlib.suppress(OSError), os.scandir("/proc") as entries:
        for entry in entries:
            if not entry.name.isdigit() and not entry.is_symlink():
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode) or mode & 0o222:
                    found.append(entry.path)
    return sorted(found)


def _prlimit(limits: Limits) -> list[str]:
    """Limits of each process; those of all of them together are the watcher's."""
    if shutil.which("prlimit") is None:
        return []
    each = ["prlimit", f"--as={limits.memory}", f"--cpu={limits.cpu_seconds}", "--nofile=256",
            f"--fsize={limits.file}", "--core=0"]  # fmt: skip
    if _counts_processes_by_namespace():
        each.append(f"--nproc={2 * limits.processes}")  # twice as much: the watcher can say why it ends a cell
    return [*each, "--"]


def _counts_processes_by_namespace() -> bool:
    """Whether a limit of processes holds for the jail's alone: since Linux 5.14. Root is exempt from it."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= (5, 14) and os.name == "posix" and os.getuid() != 0


@functools.cache
def _works(command: tuple[str, ...]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    try:
        return subprocess.run(command, capture_output=True, timeout=_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
