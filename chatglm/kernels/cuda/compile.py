"""CUDA source -> machine code for one GPU architecture: with NVRTC, else nvcc, and a per-user cache of the results.

NVRTC comes with torch's CUDA builds, so it supports the architectures that torch can run on. The result is a cubin:
unlike PTX, it does not need a driver as new as the compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import torch

from ..cache_files import cache_folder, read_whole
from ..errors import KernelUnavailable

FLAGS = ("--std=c++17",)


class Compiler(Protocol):
    """Something that makes machine code; `name` gives its name and version, and is part of the cache key."""

    name: str

    def architectures(self) -> list[int]:
        """The architectures it can compile for, such as [75, 80, 90], ascending."""

    def compile(self, source: str, target: str) -> bytes:
        """Cubin for a target like sm_90, PTX with a final NUL for one like compute_90. Raises KernelUnavailable."""


def choose_target(architecture: int, supported: list[int]) -> str:
    """The target to compile for on a GPU of `architecture` (major * 10 + minor).

    A cubin runs on its own minor version and later ones of the same major; a GPU newer than the compiler gets PTX of
    the newest architecture that the compiler knows, which the driver translates.

    Raises:
        KernelUnavailable: the GPU is older than any that the compiler supports.
    """
    same = [a for a in supported if a // 10 == architecture // 10 and a <= architecture]
    if same:
        return f"sm_{max(same)}"
    older = [a for a in supported if a < architecture]
    if older:
        return f"compute_{max(older)}"
    raise KernelUnavailable(f"the compiler does not support sm_{architecture}, its oldest is sm_{min(supported)}")


def compile_cached(compiler: Compiler, source: str, target: str) -> bytes:
    """`compiler.compile`, or its cached result. A cache folder that is not writable is no error."""
    key = hashlib.sha256("\0".join((compiler.name, target, *FLAGS, source)).encode()).hexdigest()
    file = cache_folder() / f"cuda-{target}-{key[:24]}.bin"
    stored = read_whole(file)
    if stored is not None:
        return stored
    code = compiler.compile(source, target)
    with contextlib.suppress(OSError):  # a read-only home: the next process compiles again
        _write(file, hashlib.sha256(code).digest() + code)
    return code


def _write(file: Path, content: bytes) -> None:
    """Writes a file that appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def find_compiler() -> Compiler:
    """NVRTC, else nvcc. Raises KernelUnavailable with both reasons."""
    try:
        return Nvrtc(load_nvrtc())
    except KernelUnavailable as no_nvrtc:
        try:
            return Nvcc(find_nvcc())
        except KernelUnavailable as no_nvcc:
            raise KernelUnavailable(f"{no_nvrtc}, and {no_nvcc}") from None


# ---- NVRTC ---------------------------------------------------------------------------------------------------------


class Nvrtc:
    """NVIDIA's run-time compiler: a shared library that needs no headers, no toolkit and no host compiler."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.name = f"NVRTC {major.value}.{minor.value}"

    def architectures(self) -> list[int]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        values = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", values)
        return sorted(values)

    def compile(self, source: str, target: str) -> bytes:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        try:
            options = [option.encode() for option in (f"--gpu-architecture={target}", *FLAGS)]
            array = (ctypes.c_char_p * len(options))(*options)
            if status := self._library.nvrtcCompileProgram(program, len(options), array):
                log = self._text(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace").strip()
                raise KernelUnavailable(f"{self.name} could not compile our kernels for {target}: {log or status}")
            return self._text(program, "nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, function: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(function, program, text)
        return text.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise KernelUnavailable(f"{function}: {self._library.nvrtcGetErrorString(status).decode()}")


def load_nvrtc() -> ctypes.CDLL:
    """The NVRTC that torch installed, else that of a CUDA toolkit or one that the system's loader finds."""
    for file in nvrtc_files():
        try:
            return _open_nvrtc(file)
        except OSError:
            continue
    major = cuda_major()
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so") if sys.platform != "win32" else (f"nvrtc64_{major}0_0.dll",):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"
    raise KernelUnavailable(
        f"NVRTC, which compiles our CUDA kernels, was not found (`pip install {package}` installs it)"
    )


def _open_nvrtc(file: Path) -> ctypes.CDLL:
    if sys.platform == "win32":
        with os.add_dll_directory(str(file.parent)):
            return ctypes.CDLL(str(file))
    # Some wheels of NVRTC (13.0) do not find their own second library; once it is loaded, its name is enough.
    for builtins in file.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(file))


def nvrtc_files() -> list[Path]:
    """The files of all NVRTC libraries that can be found; those of torch's own CUDA version first."""
    roots = [Path(path) / "nvidia" for path in {str(Path(torch.__file__).parents[1]): None, **dict.fromkeys(sys.path)}]
    folders = [folder for root in roots for name in ("*/lib", "*/bin", "*/bin/*") for folder in sorted(root.glob(name))]
    folders += [Path(torch.__file__).parent / "lib"]
    folders += [home / name for home in toolkits() for name in ("lib64", "bin")]
    pattern = re.compile(r"nvrtc64_(\d+)0_0\.dll" if sys.platform == "win32" else r"libnvrtc\.so\.(\d+)")
    found = []
    for folder in folders:
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if match := pattern.fullmatch(file.name):
                found.append((int(match[1]) != cuda_major(), file))
    return [file for _, file in sorted(found, key=lambda item: item[0])]


def cuda_major() -> int:
    """Major version of the CUDA that torch was built with; 0 without."""
    return int((torch.version.cuda or "0").split(".")[0])


def toolkits() -> list[Path]:
    """Where a CUDA toolkit may be."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    return [Path(path) for path in (*named, "/usr/local/cuda") if path]


# ---- nvcc ----------------------------------------------------------------------------------------------------------


class Nvcc:
    """The compiler of a CUDA toolkit; it also needs a C++ compiler."""

    def __init__(self, program: str) -> None:
        self._program = program
        version = re.search(r"release (\d+\.\d+)", self._run("--version"))
        self.name = f"nvcc {version[1] if version else '?'}"

    @functools.cache  # noqa: B019 - there is one object of this class
    def architectures(self) -> list[int]:
        return sorted(int(number) for number in re.findall(r"compute_(\d+)\b", self._run("--list-gpu-arch")))

    def compile(self, source: str, target: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file, result = Path(folder) / "kernels.cu", Path(folder) / "result"
            file.write_text(source, encoding="utf-8")
            kind = "--cubin" if target.startswith("sm_") else "--ptx"
            self._run(kind, f"--gpu-architecture={target}", *FLAGS, "--output-file", str(result), str(file))
            return result.read_bytes() + (b"\0" if kind == "--ptx" else b"")

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [self._program, *arguments], capture_output=True, text=True, errors="replace", timeout=600
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelUnavailable(f"{self._program} could not be run: {error}") from error
        if done.returncode:
            raise KernelUnavailable(f"{self._program} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout


def find_nvcc() -> str:
    """Path of nvcc. Raises KernelUnavailable."""
    for folder in (None, *(str(home / "bin") for home in toolkits())):
        if program := shutil.which("nvcc", path=folder):
            return program
    raise KernelUnavailable("no nvcc is on the PATH either")
