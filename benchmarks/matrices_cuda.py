"""Speed of the INT4, INT8 and fp16 products of the 6B models on a GPU: `python -m benchmarks.matrices_cuda`.

Every product is timed inside a CUDA graph that walks over so many copies of the weights that they exceed the GPU's
cache. GB/s counts the bytes that have to be read and written once: weights, scales, x and y; the limit beside it is the
copying of a large tensor, measured in the same run before every row of the table. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch.nn import functional as F

from chatglm.kernels import cuda

#: (out, in) of the matrices of a block of ChatGLM-6B, then of ChatGLM2-6B and ChatGLM3-6B, then their heads.
SHAPES = (
    (12288, 4096),
    (4096, 4096),
    (16384, 4096),
    (4096, 16384),
    (4608, 4096),
    (27392, 4096),
    (4096, 13696),
    (65024, 4096),
    (130528, 4096),
)
COPIED = 1 << 30  # bytes of the tensor whose copying is the limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="rows of the input")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--repeats", type=int, default=20, help="timed replays of every graph; the median is reported")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU that torch can use")
    dtype = getattr(torch, args.dtype)
    backend = cuda.load()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}, kernels: {backend.describe()}\n")
    print(f"| out x in | rows | copy GB/s | INT4 us | GB/s | share | INT8 us | GB/s | share | {args.dtype} us | GB/s |")
    print("|---" * 11 + "|")
    for rows in args.rows:
        for out, columns in SHAPES:
            limit = 2 * COPIED / copy_seconds(args.repeats) / 1e9
            cells = [f"{out}x{columns}", f"{rows}", f"{limit:.0f}"]
            for bits in (4, 8, None):
                seconds, size = product_seconds(backend, rows, out, columns, bits, dtype, args.repeats)
                cells += [f"{seconds * 1e6:.1f}", f"{size / seconds / 1e9:.0f}"]
                if bits:
                    cells.append(f"{size / seconds / 1e9 / limit:.0%}")
            print("| " + " | ".join(cells) + " |", flush=True)


def product_seconds(
    backend: cuda.CUDABackend, rows: int, out: int, columns: int, bits: int | None, dtype: torch.dtype, repeats: int
) -> tuple[float, int]:
    """Seconds of one product and the bytes it has to move; `bits` None is a dense matrix of `dtype`."""
    item = dtype.itemsize
    weight_bytes = out * columns * (bits or 8 * item) // 8
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, -(-3 * cache // weight_bytes))
    x = torch.randn(rows, columns, device="cuda").to(dtype)
    if bits:
        packed = torch.randint(-128, 128, (copies, out, columns * bits // 8), dtype=torch.int8, device="cuda")
        scale = torch.full((out,), 1e-3, dtype=torch.float16, device="cuda")

        def product(i: int) -> torch.Tensor:
            return backend.linear(x, packed[i], scale, bits)
    else:
        dense = torch.randn(copies, out, columns, device="cuda", dtype=dtype)

        def product(i: int) -> torch.Tensor:
            return F.linear(x, dense[i])

    seconds = graph_seconds(lambda: [product(i) for i in range(copies)], repeats) / copies
    return seconds, weight_bytes + (2 * out if bits else 0) + rows * (columns + out) * item


def copy_seconds(repeats: int) -> float:
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return graph_seconds(lambda: target.copy_(source), repeats)


def graph_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of one replay of `work` captured as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    seconds = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
