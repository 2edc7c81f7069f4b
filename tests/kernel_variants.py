"""The families of CPU kernels that a machine of this kind may have; for each the tests say whether this one has it."""

import platform

from chatglm.kernels import cpu

ARM = ("dotprod", "i8mm")
POSSIBLE = [
    name for name in cpu.VARIANTS
    if name == "plain" or (name in ARM) == (platform.machine().lower() in ("aarch64", "arm64"))
]  # fmt: skip
