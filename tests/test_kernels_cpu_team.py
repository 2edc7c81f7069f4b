"""How the threads of the CPU kernels share work: the results do not depend on who does what, and none waits for a
thread that the system has suspended."""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from chatglm.kernels import cpu, reference
from chatglm.kernels.cpu import compile as compiler
from kernel_variants import load_or_skip


@pytest.fixture(scope="module")
def backend() -> cpu.CPUBackend:
    return load_or_skip()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_others_compute_what_a_suspended_thread_does_not(backend: cpu.CPUBackend, tmp_path: Path) -> None:
    command, _ = compiler.find_compiler()
    flags = [*compiler.FLAGS, *compiler._openmp_flags()[0], f"-I{compiler.SOURCE.parent}"]
    source = Path(__file__).with_name("suspended_thread.c")
    library = ctypes.CDLL(str(compiler.build([*command, *flags], tmp_path, "team", source)))
    published, taken = ctypes.c_int(), (ctypes.c_int * 2)()
    assert library.run_with_suspended_thread(ctypes.byref(published), taken) == 0
    assert published.value == 0
    assert list(taken) == [1, 60]


@pytest.mark.parametrize("precision", ["exact", "default", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 7, 20])
def test_products_do_not_depend_on_the_threads(
    backend: cpu.CPUBackend, threads: Callable[[int], None], rows: int, precision: str
) -> None:
    """With many more threads than CPUs, most are suspended in the middle of something."""
    bits, columns, outputs = 4, 1920, 1999
    weight = torch.randint(-8, 8, (outputs, columns), dtype=torch.int8)
    packed, scale, x = reference.pack(weight, bits).contiguous(), torch.rand(outputs), torch.randn(rows, columns)
    dense = torch.randn(outputs, columns, dtype=torch.bfloat16)
    threads(1)
    wanted = backend.linear(x, packed, scale, bits, precision), backend.dense(x, dense)
    for count in (2, 3, 16):
        threads(count)
        for _ in range(5):
            assert torch.equal(backend.linear(x, packed, scale, bits, precision), wanted[0])
            assert torch.equal(backend.dense(x, dense), wanted[1])


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() != 2 or not hasattr(os, "setsid"), reason="one busy program is a third of 2 CPUs")
def test_beside_a_busy_program_a_product_keeps_its_share(
    backend: cpu.CPUBackend, threads: Callable[[int], None]
) -> None:
    """A fair share of the CPUs is 0.67. Plain C, so that one call takes long: its end waits for all threads."""
    threads(2)
    weight, scale, x = torch.zeros(16384, 8192, dtype=torch.int8), torch.ones(16384), torch.randn(1, 16384)
    plain = cpu.load("plain")

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(10):
            plain.linear(x, weight, scale, 4)
        return time.perf_counter() - began

    seconds()
    shares = []
    for _ in range(5):
        alone = seconds()
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            seconds()
            shares.append(alone / seconds())
        finally:
            busy.send_signal(signal.SIGKILL)
            busy.wait()
    assert statistics.median(shares) > 0.58
