"""The cache folder of compiled kernels, and the check that its files are intact."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .errors import KernelUnavailable

HASH_BYTES = 32  # of SHA-256, in front of a CUDA file's code


def cache_folder() -> Path:
    """The folder where compiled kernels are kept. Raises KernelUnavailable if the user has no home folder."""
    if chosen := os.environ.get("CHATGLM_CACHE"):
        return Path(chosen)
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "chatglm"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatglm"
    except RuntimeError as error:
        raise KernelUnavailable(
            "this user has no home folder; set CHATGLM_CACHE to a folder for the compiled kernels"
        ) from error


def digest(content: bytes) -> str:
    """The part of a CPU library's name that identifies its content."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_whole(path: Path) -> bytes | None:
    """The content of a file of compiled kernels; None if it cannot be read or is damaged.

    CPU libraries have their digest in their name: `cpu-<key>-<digest>.so`. CUDA files begin with the hash of the code.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if path.name.startswith("cpu-"):
        return content if path.stem.rpartition("-")[2] == digest(content) else None
    code = content[HASH_BYTES:]
    return code if hashlib.sha256(code).digest() == content[:HASH_BYTES] else None


def damaged_files() -> list[Path]:
    """The damaged files of compiled kernels: cut off by a full disk, for example.

    No program opens them; they are rebuilt instead. But they are a sign that the disk or the home folder loses data.
    """
    try:
        folder = cache_folder()
    except KernelUnavailable:
        return []
    return [path for path in sorted([*folder.glob("cpu-*-*"), *folder.glob("cuda-*.bin")]) if read_whole(path) is None]
