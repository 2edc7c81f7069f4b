"""`python -m chatglm.kernels`: shows which kernels compute quantised models here, whether they are right, and how fast.

For every device: the compiler, the cache and the path that INT4 and INT8 products take, or the reason for using plain
torch; the error of a product against float64; and how fast one row (a decoding step) reads its weights, compared with
the memory bandwidth of the device.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable

import torch

from ..program import run, start
from . import PRECISIONS, KernelUnavailable, backend_for, cpu, dense_linear, linear, load_backend
from .cpu import probes
from .errors import KernelWarning
from .reference import dequantize, pack

Work = Callable[[int], object]

SHAPE = (27392, 4096)  # (out, in): the largest matrix of a ChatGLM3-6B block
TOLERANCE = {"exact": 1e-5, "default": 2e-4, "int8": 1e-2}
HALF_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
CACHES = 1 << 29  # bytes to read, more than any cache holds


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps", 0))
    return found


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return f"{platform.machine()}, {torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU"


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(device: torch.device, work: Work, rounds: int) -> float:
    """Seconds of one call of `work(round)`: those of the best round, as other load only adds time."""
    work(0)
    best = float("inf")
    for index in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        work(index)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def random_weights(bits: int, shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    largest = 2 ** (bits - 1) - 1
    q = torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[0], generator=generator).mul_(0.01).add_(0.001).half()
    return pack(q, bits).to(device), scale.to(device)


def error_of(device: torch.device, bits: int, precision: str, dtype: torch.dtype) -> float:
    """Largest error against the product in float64, relative to the largest result, over several row counts."""
    weight, scale = random_weights(bits, (515, 1376), device)
    dense = dequantize(weight.cpu(), scale.cpu(), bits, torch.float64)
    worst = 0.0
    for rows in (1, 2, 3, 8, 33, 100):
        x = torch.randn(rows, 1376, generator=torch.Generator().manual_seed(rows)).to(dtype)
        want = x.double() @ dense.T
        got = linear(x.to(device), weight, scale, None, bits, precision).cpu().double()
        worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
    return worst


def bandwidth(device: torch.device) -> float:
    """Bytes per second that the memory of `device` delivers."""
    if device.type != "cpu":
        source = torch.empty(CACHES, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return 2 * CACHES / seconds(device, lambda _: target.copy_(source), 10)
    data = torch.ones(CACHES // 4)
    ways: list[Work] = [lambda _: data.sum(), lambda _: data.dot(data)]
    backend = backend_for(device)
    if isinstance(backend, cpu.CPUBackend):
        ours = backend
        ways.append(lambda _: probes.read(ours, data))
    return CACHES / min(seconds(device, way, 5) for way in ways)


def speed(device: torch.device, bits: int, precision: str, dtype: torch.dtype) -> float:
    """Bytes of weights read per second for one row; 16 bits: the dense product of the output head."""
    size = SHAPE[0] * SHAPE[1] * bits // 8
    count = max(1, CACHES // size)
    x = torch.randn(1, SHAPE[1], device=device, dtype=dtype)
    if bits == 16:
        matrices = [torch.randn(SHAPE, device=device, dtype=dtype) for _ in range(count)]
        return size / seconds(device, lambda index: dense_linear(x, matrices[index % count]), 2 * count)
    weight, scale = random_weights(bits, SHAPE, device)
    copies = [weight.clone() for _ in range(count)]
    return size / seconds(
        device, lambda index: linear(x, copies[index % count], scale, None, bits, precision), 2 * count
    )


def why_plain_torch(device: torch.device) -> str:
    """Why `backend_for(device)` is None."""
    if device.type not in ("cpu", "cuda"):
        return f"we have no kernels for {device.type}"
    try:
        load_backend(device.type)
    except KernelUnavailable as error:
        return str(error)
    return "asked for by CHATGLM_KERNELS"


def use_once(device: torch.device) -> None:
    """Runs a first product, so that kernels built on demand are built now, or given up."""
    linear(torch.zeros(1, 64, device=device), *random_weights(4, (8, 64), device), None, 4)


def describe(device: torch.device) -> None:
    """Prints the compiler, the cache and so on, or why plain torch is used."""
    backend = backend_for(device)
    if backend is None:
        print(f"  INT4, INT8   plain torch: {why_plain_torch(device)}")
        return
    use_once(device)
    own = f"our {device.type.upper()} kernel, weights read as they are stored"
    for key, text in ({"INT4": own, "INT8": own} | backend.describe()).items():
        print(f"  {key:12s} {text}")


def check(device: torch.device) -> bool:
    """Prints the errors of all paths; returns whether all are within their tolerances."""
    right = True
    own = backend_for(device) is not None
    for bits in (4, 8):
        for precision in PRECISIONS if own else ("exact",):
            error = error_of(device, bits, precision, torch.float32)
            good = error < TOLERANCE[precision]
            right &= good
            print(f"  check        INT{bits} {precision:8s} error {error:.1e}  {'right' if good else 'WRONG'}")
        for dtype, tolerance in HALF_TOLERANCE.items():
            error = error_of(device, bits, "default", dtype)
            good = error < tolerance
            right &= good
            print(
                f"  check        INT{bits} {str(dtype).removeprefix('torch.'):8s} error {error:.1e}  "
                f"{'right' if good else 'WRONG'}"
            )
    return right


def measure(device: torch.device) -> None:
    """Prints the GB/s of the products, and what fraction of the memory's that is."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    limit = bandwidth(device)
    print(f"  memory       {limit / 1e9:.1f} GB/s {'read' if device.type == 'cpu' else 'copied'}")
    own = backend_for(device) is not None
    for bits in (4, 8):
        for precision in PRECISIONS[::-1] if own and device.type == "cpu" else ("default",):
            got = speed(device, bits, precision, dtype)
            print(f"  speed        INT{bits} {precision:8s} {got / 1e9:8.1f} GB/s, {got / limit:4.0%} of memory")
    for dense in (torch.bfloat16, torch.float16):
        got = speed(device, 16, "", dense)
        name = str(dense).removeprefix("torch.")
        print(f"  speed        {name:13s} {got / 1e9:8.1f} GB/s, {got / limit:4.0%} of memory")


def main(arguments: list[str] | None = None, prog: str = "python -m chatglm.kernels") -> int:
    """Returns the exit status: 1 if a kernel is wrong or something failed, 130 after Ctrl-C."""
    return run(lambda: _main(arguments, prog))


def _main(arguments: list[str] | None, prog: str) -> int:
    parser = argparse.ArgumentParser(prog, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--no-speed", action="store_true", help="skip measuring speed (it takes about 2 GB of memory)")
    args = parser.parse_args(arguments)
    right = True
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", KernelWarning)  # its reason is printed
        for device in devices():
            print(f"{device}: {name_of(device)}")
            describe(device)
            right &= check(device)
            if not args.no_speed:
                measure(device)
    return 0 if right else 1


if __name__ == "__main__":
    start(main)
