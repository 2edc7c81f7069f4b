"""The memory available for weights, on this machine (within its container's limits) and on its accelerators."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[list[str]], str]


def available(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` now; None if the system does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    host = host_available()
    if device.type == "mps" and host is not None:
        # Unified memory, of which the driver gives the GPU only a part.
        return min(host, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return host


def host_available() -> int | None:
    """Bytes of main memory that can be allocated without swapping; None on an unknown system."""
    if sys.platform.startswith("linux"):
        return linux_available(Path("/"))
    if sys.platform == "darwin":
        return mac_available()
    if sys.platform == "win32":
        return windows_available()
    return None


def linux_available(root: Path) -> int | None:
    """The minimum of the kernel's available memory and of what each enclosing control group (container) leaves."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(found[1]) * 1024] if found else []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            mount, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        # Inside a container the path is often the host's: then only the mount itself exists here, and it is ours.
        group = mount / path.strip("/")
        while True:
            left = _group_left(group, *names)
            if left is not None:
                limits.append(left)
            if group == mount:
                break
            group = group.parent
    return max(0, min(limits)) if limits else None


def _group_left(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit, usage = _text(group / limit_name).strip(), _text(group / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= 1 << 60:  # "max" and huge numbers mean no limit
        return None
    # Cached pages of files count as used, but the kernel gives them back when memory is short.
    cache = re.search(rf"^{cache_name} (\d+)", _text(group / "memory.stat"), re.MULTILINE)
    return int(limit) - int(usage) + (int(cache[1]) if cache else 0)


def mac_available(run: Run | None = None) -> int | None:
    """Free, inactive and speculative pages of macOS, in bytes."""
    try:
        text = (run or _output)(["vm_stat"])
    except (OSError, subprocess.SubprocessError):
        return None
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", text, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def windows_available() -> int | None:
    """Available physical memory of Windows, in bytes."""
    if sys.platform != "win32":
        return None
    import ctypes

    # MEMORYSTATUSEX: two 32-bit numbers, then seven of 64 bits; the second of those is the available physical memory.
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    return int(status[2]) if ctypes.windll.kernel32.GlobalMemoryStatusEx(status) else None


def readable(size: int) -> str:
    """A size for people: `12.3 GiB`, `10 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
