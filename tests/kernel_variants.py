"""The families of CPU kernels that a machine of this kind may have; for each the tests say whether this one has it."""

from __future__ import annotations

import platform

import pytest

from chatglm.kernels import KernelUnavailable, cpu

ARM = ("dotprod", "i8mm")
POSSIBLE = [
    name for name in cpu.VARIANTS
    if name == "plain" or (name in ARM) == (platform.machine().lower() in ("aarch64", "arm64"))
]  # fmt: skip


def load_or_skip(variant: str | None = None) -> cpu.CPUBackend:
    """The kernels, by default the best ones; skips the test, with the reason, where there are none."""
    try:
        return cpu.load(variant)
    except (KernelUnavailable, ValueError) as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
