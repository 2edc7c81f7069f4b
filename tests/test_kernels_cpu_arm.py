"""The kernels for ARM CPUs: cross-compiled, and run by an emulator (Debian: gcc-aarch64-linux-gnu, qemu-user)."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from chatglm.kernels import cpu
from chatglm.kernels.cpu.compile import FLAGS, SOURCE
from chatglm.kernels.cpu.library import PRECISIONS as CODES
from chatglm.kernels.cpu.library import TYPE_CODES
from test_kernels_cpu import BITS, HALF, PRECISIONS, random_weights, relative_error

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PROGRAM = Path(__file__).with_name("arm_products.c")
#: What the compiler builds for, the CPU that is emulated, and the families of kernels that run there.
TARGETS = {
    "plain": ("armv8-a", "cortex-a57", ["plain"]),
    "dotprod": ("armv8.2-a+dotprod", "neoverse-n1", ["plain", "dotprod"]),
    "i8mm": ("armv8.6-a", "max", ["plain", "dotprod", "i8mm"]),
}
#: (rows, in, out): one row and several, with a last group, last outputs and last rows that are not whole.
SHAPES = [(1, 4096, 33), (1, 66, 5), (2, 1024, 8), (4, 384, 4), (5, 254, 13), (15, 13696, 3)]

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or no {EMULATOR}"
)


@pytest.fixture(scope="module", params=TARGETS)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """The command that computes products on a kind of ARM CPU, and the families of kernels that it has."""
    target, emulated, families = TARGETS[request.param]
    program = tmp_path_factory.mktemp("arm") / "products"
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    command = [COMPILER, f"-march={target}", *flags, "-fopenmp", "-static", "-I", str(SOURCE.parent)]
    subprocess.run([*command, "-o", str(program), str(PROGRAM), "-lm"], check=True, timeout=600)
    return [EMULATOR, "-cpu", emulated, str(program)], families


def test_products(machine: tuple[list[str], list[str]]) -> None:
    """All families that the CPU has, against float64."""
    torch.manual_seed(0)
    command, families = machine
    cases, sent = [], b""
    for family in families:
        for bits in BITS:
            for precision in PRECISIONS:
                for rows, columns, outputs in SHAPES:
                    for dtype in HALF if rows in (1, 5) else [torch.float32]:
                        weight, scale, dense = random_weights(bits, outputs, columns)
                        x = torch.randn(rows, columns).to(dtype)
                        codes = (CODES[precision], bits, TYPE_CODES[dtype], TYPE_CODES[torch.float32])
                        sent += struct.pack("<9q", cpu.VARIANTS.index(family), 2, *codes, rows, columns, outputs)
                        sent += b"".join(one.view(torch.uint8).numpy().tobytes() for one in (x, weight, scale))
                        cases.append((family, precision, x, dense))
    done = subprocess.run(command, input=sent, capture_output=True, check=True, timeout=600).stdout
    runs, done = done[: len(cpu.VARIANTS)], done[len(cpu.VARIANTS) :]
    assert [name for name, works in zip(cpu.VARIANTS, runs, strict=True) if works] == families
    for family, precision, x, dense in cases:
        size = len(x) * len(dense) * x.element_size()
        y = torch.frombuffer(bytearray(done[:size]), dtype=x.dtype).reshape(len(x), len(dense))
        done = done[size:]
        error = relative_error(y, x, dense)
        assert error < PRECISIONS[precision] + HALF[x.dtype], (family, precision, tuple(x.shape), x.dtype)
        assert precision != "int8" or family == "plain" or error > 1e-4, "activations of 8 bits were not used"
    assert not done


def test_values_that_are_not_finite(machine: tuple[list[str], list[str]]) -> None:
    command, families = machine
    x = torch.randn(3, 256)
    x[0, 5], x[1, 200] = float("nan"), float("inf")
    for bits in BITS:
        weight, scale, _ = random_weights(bits, 8, 256)
        codes = (CODES["default"], bits, TYPE_CODES[x.dtype], TYPE_CODES[scale.dtype])
        sent = struct.pack("<9q", cpu.VARIANTS.index(families[-1]), 1, *codes, 3, 256, 8)
        sent += b"".join(one.view(torch.uint8).numpy().tobytes() for one in (x, weight, scale))
        done = subprocess.run(command, input=sent, capture_output=True, check=True, timeout=600).stdout
        y = torch.frombuffer(bytearray(done[len(cpu.VARIANTS) :]), dtype=torch.float32).reshape(3, 8)
        assert y[:2].isnan().all() and y[2].isfinite().all()
