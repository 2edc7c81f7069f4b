"""Compiles the C code to a shared library: built with the system's C compiler at first use, then cached.

The library is kept in the folder that CHATGLM_CACHE names (else `chatglm` in the user's cache folder). Its name holds a
key of everything that decides what is built (sources, compiler, flags and CPU) and a digest of its content, so that a
damaged file is recognised before it is opened. It appears there in one step, so processes and threads that start at the
same time do not disturb each other. CC selects the compiler.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..cache_files import cache_folder, digest, read_whole
from ..errors import KernelUnavailable

#: What is compiled; it includes all the other C files of its folder.
SOURCE = Path(__file__).with_name("kernels.c")
SUFFIX = ".dll" if os.name == "nt" else ".so"
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")

Library = TypeVar("Library")


def compiled(open_library: Callable[[Path], Library]) -> tuple[Library, Path, str]:
    """The library, from the cache or built now.

    Args:
        open_library: opens the library at a path; raises OSError if the system's loader refuses it.

    Returns:
        What `open_library` returned, the path, and the first line of the compiler's version message.

    Raises:
        KernelUnavailable: no compiler, no OpenMP, or no folder to keep the library in; the message says what to do.
    """
    if sys.byteorder != "little":
        raise KernelUnavailable("our kernels need a little-endian CPU")
    sources = read_sources(SOURCE.parent)
    command, version = find_compiler()
    folder = cache_folder()
    failures = []
    for flags in _openmp_flags():
        key = hashlib.sha256(repr((sources, command, version, FLAGS, flags, cpu_name())).encode()).hexdigest()[:24]
        for path in sorted(folder.glob(f"cpu-{key}-*{SUFFIX}")):
            if read_whole(path) is not None:  # opening one that is cut off would crash the process
                with contextlib.suppress(OSError):
                    return open_library(path), path, version
        try:
            path = build([*command, *FLAGS, *flags], folder, f"cpu-{key}")
            return open_library(path), path, version
        except (subprocess.SubprocessError, OSError) as error:
            if isinstance(error, OSError) and error.filename:  # an error about a file; the loader's errors name none
                raise KernelUnavailable(
                    f"the compiled library cannot be written to {folder} ({error.strerror}); "
                    "set CHATGLM_CACHE to a writable folder"
                ) from error
            failures.append(getattr(error, "stderr", None) or str(error))
    raise KernelUnavailable(
        f"{command[0]} did not build the CPU kernels; they need GCC, or Clang with OpenMP ("
        "Debian/Ubuntu: apt install gcc; macOS: brew install libomp; CC names the compiler). "
        f"It said: {failures[0].strip()[-400:]}"
    )


def read_sources(folder: Path) -> list[tuple[str, bytes]]:
    """Names and contents of all C files in a folder, any of which may change what is built."""
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir()) if path.suffix in (".c", ".h")]


def build(command: Sequence[str], folder: Path, stem: str, source: Path = SOURCE) -> Path:
    """Compiles `source` to `<stem>-<digest>.so` in `folder`, which appears complete or not at all.

    Raises:
        OSError: nothing can be written to `folder`.
        subprocess.SubprocessError: the compiler fails; its `stderr` is the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=SUFFIX)
    os.close(handle)
    try:
        subprocess.run(
            [*command, "-o", name, str(source), "-lm"], check=True, capture_output=True, text=True, timeout=300
        )
        path = folder / f"{stem}-{digest(Path(name).read_bytes())}{SUFFIX}"
        os.replace(name, path)
        return path
    finally:
        Path(name).unlink(missing_ok=True)


def find_compiler() -> tuple[list[str], str]:
    """The command of the C compiler and the first line of its version message. Raises KernelUnavailable."""
    chosen = os.environ.get("CC")
    candidates = [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        try:
            result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
        except (subprocess.SubprocessError, OSError):
            continue
        return command, (result.stdout.splitlines() or ["unknown"])[0]
    where = f"CC={chosen} is not one" if chosen else "there is no cc, gcc or clang"
    raise KernelUnavailable(
        f"the CPU kernels need a C compiler, and {where} (Debian/Ubuntu: apt install gcc; Fedora: dnf install gcc; "
        "macOS: xcode-select --install and brew install libomp; Windows: MinGW-w64 with gcc on the PATH)"
    )


@functools.lru_cache
def cpu_name() -> str:
    """Describes this CPU in what may make the compiler build different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *found])


def _openmp_flags() -> list[list[str]]:
    """Sets of flags that enable OpenMP, in the order to try them."""
    native = [] if platform.machine().lower() in ("x86_64", "amd64") else ["-mcpu=native"]
    ways = [[*native, "-fopenmp"], ["-fopenmp"]] if native else [["-fopenmp"]]
    if sys.platform == "darwin":  # Apple's clang supports OpenMP without its library, which torch ships
        lib = Path(torch.__file__).parent / "lib"
        ways.append(["-Xclang", "-fopenmp", f"-L{lib}", f"-Wl,-rpath,{lib}", "-lomp"])
    return ways
