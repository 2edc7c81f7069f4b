"""Speed of the CPU products with a 6B model's matrices, beside memory and torch: `python -m benchmarks.matrices`.

Walks over all matrices of the model (random weights, no norms, no attention) as decoding a token does. A loop that only
reads the same bytes runs before every walk; the ratio of the two times is what counts, as the bandwidth of a machine
changes from second to second. Prints a Markdown table; `share` is that ratio, as minimum / median / maximum. `int peak`
is the CPU's multiplication rate without memory access, which bounds several rows: the default precision takes two
products per weight.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from chatglm.checkpoints.memory import host_available
from chatglm.kernels import cpu, huge_pages, reference
from chatglm.kernels.cpu import probes

#: (out, in) of the matrices of a layer, by generation, and of the head.
LAYER = {
    0: ((64, 128), (128, 256)),  # a toy
    1: ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)),
    2: ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696)),
}
HEAD = {0: (192, 128), 1: (130528, 4096), 2: (65024, 4096)}
GROUP = 128  # columns that share a scale in torch's INT4 format
FOREIGN = "torch INT4 (layout of its own)"

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, weight, scale


@dataclass(frozen=True)
class Kernel:
    """A way to multiply: `bits` of its weights, the dtype of x, and the product."""

    name: str
    bits: int
    dtype: torch.dtype
    product: Product


def ours(backend: cpu.CPUBackend) -> list[Kernel]:
    """Our kernels of every precision, and that of the head."""
    kernels = []
    for bits in (4, 8):
        for precision in ("default", "int8", "exact"):

            def product(
                x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, bits: int = bits, precision: str = precision
            ) -> torch.Tensor:
                return backend.linear(x, w, s, bits, precision)

            kernels.append(Kernel(f"INT{bits} {precision}", bits, torch.float32, product))
    kernels.append(Kernel("bf16", 16, torch.bfloat16, lambda x, w, s: backend.dense(x, w)))
    return kernels


def peers() -> list[Kernel]:
    """torch's products for such weights; only its bfloat16 versions are fast."""

    @functools.cache
    def groups(columns: int, out: int) -> torch.Tensor:
        return torch.zeros(columns // GROUP, out, 2, dtype=torch.bfloat16)

    def int4(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w.view(torch.uint8), GROUP, groups(x.shape[1], len(s)))

    def int8(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, w, s.to(x.dtype))

    return [
        Kernel(FOREIGN, 4, torch.bfloat16, int4),
        Kernel("torch INT8", 8, torch.bfloat16, int8),
        Kernel("torch bf16", 16, torch.bfloat16, lambda x, w, s: F.linear(x, w)),
    ]


def random_weights(shape: tuple[int, int], bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in our format (bfloat16 for 16 bits) and its scales. Writes every page of it."""
    out, columns = shape
    scale = torch.rand(out) * 1e-2
    if bits == 16:
        return huge_pages.empty(shape, torch.bfloat16).uniform_(-1, 1), scale
    weight = huge_pages.empty((out, columns * bits // 8))
    weight.view(torch.int64).random_()
    return weight, scale


def error(kernel: Kernel) -> str:
    """Relative error of a random product with 4096 columns against float64."""
    if kernel.name == FOREIGN:
        return "-"  # its weights have another layout
    torch.manual_seed(0)
    weight, scale = random_weights((512, 4096), kernel.bits)
    x = torch.randn(1, 4096).to(kernel.dtype)
    dense = weight.double() if kernel.bits == 16 else reference.dequantize(weight, scale, kernel.bits, torch.float64)
    exact = x.double() @ dense.T
    return f"{float((kernel.product(x, weight, scale).double() - exact).norm() / exact.norm()):.1e}"


def measure(
    backend: cpu.CPUBackend, kernels: list[Kernel], generation: int, layers: int, rows: int, repeats: int
) -> list[list[str]]:
    """The table's rows for kernels whose weights have the same number of bits."""
    bits = kernels[0].bits
    layer = sum(out * columns for out, columns in LAYER[generation]) * bits // 8
    room = (host_available() or 8 << 30) * 0.6 - HEAD[generation][0] * HEAD[generation][1] * bits / 8
    layers = max(1, min(layers, int(room / layer)))
    weights = [random_weights(shape, bits) for shape in (*LAYER[generation] * layers, HEAD[generation])]
    size = sum(weight.numel() * weight.element_size() for weight, _ in weights)
    columns = {shape[1] for shape in (*LAYER[generation], HEAD[generation])}

    def walk(kernel: Kernel, inputs: dict[int, torch.Tensor]) -> None:
        for weight, scale in weights:
            kernel.product(inputs[weight.shape[1] * (8 // bits if bits < 8 else 1)], weight, scale)

    def read() -> None:
        for weight, _ in weights:
            probes.read(backend, weight)

    table = []
    inputs = {k.dtype: {c: torch.randn(rows, c).to(k.dtype) for c in columns} for k in kernels}
    walks = [lambda k=k: walk(k, inputs[k.dtype]) for k in kernels]
    times: list[list[float]] = [[] for _ in kernels]
    limits: list[list[float]] = [[] for _ in kernels]
    peaks: list[float] = []
    for repeat in range(repeats + 1):
        for index, run in enumerate(walks):
            pair = seconds(read), seconds(run)
            if repeat:  # the first warms up
                limits[index].append(pair[0])
                times[index].append(pair[1])
            peaks.append(integer_peak(backend))
    for index, kernel in enumerate(kernels):
        middle = statistics.median(times[index])
        shares = [limit / taken for limit, taken in zip(limits[index], times[index], strict=True)]
        table.append([
            kernel.name, f"{rows}", f"{layers}", f"{middle * 1e3:.1f}", f"{size / middle / 1e9:.1f}",
            f"{size / statistics.median(limits[index]) / 1e9:.1f}",
            f"{min(shares):.2f} / {statistics.median(shares):.2f} / {max(shares):.2f}",
            f"{2 * rows * size * 8 / bits / middle / 1e9:.0f}", f"{statistics.median(peaks):.0f}", error(kernel),
        ])  # fmt: skip
    return table


def integer_peak(backend: cpu.CPUBackend) -> float:
    """Billions of integer additions and multiplications per second, of all threads; 0 without AVX-512."""
    count = 12_000_000
    taken = seconds(lambda: probes.multiply(backend, count))
    return 2 * 64 * count * torch.get_num_threads() / taken / 1e9 if backend.variant == "avx512" else 0.0


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", type=int, choices=(1, 2), default=2, help="2 stands for 3 as well")
    parser.add_argument("--layers", type=int, default=28, help="fewer if they do not fit into 60 %% of the free memory")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of the input")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="number of threads (default: torch's choice)")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8, 16), default=[4, 8, 16])
    parser.add_argument("--no-peers", action="store_true", help="our kernels only")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    backend = cpu.load()
    print(f"torch {torch.__version__}, kernels: {backend.describe()}\n")
    print("| kernel | rows | layers | ms | GB/s | read loop GB/s | share of it | GOP/s | int peak | relative error |")
    print("|---" * 10 + "|")
    everything = ours(backend) + ([] if args.no_peers else peers())
    for bits in args.bits:
        for rows in args.rows:
            kernels = [kernel for kernel in everything if kernel.bits == bits]
            for cells in measure(backend, kernels, args.generation, args.layers, rows, args.repeats):
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
