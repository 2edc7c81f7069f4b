"""The CPU kernels against float64, each variant of them."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

from chatglm.kernels import cpu, reference
from chatglm.kernels.cpu.fetching import PLACES
from kernel_variants import POSSIBLE, load_or_skip

BITS = (4, 8)
PRECISIONS = {"exact": 1e-5, "default": 2e-4, "int8": 1e-2}
HALF = {torch.float32: 0.0, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# (rows, in, out): each kernel has its own number of rows; groups of 128 columns and tiles of 64 outputs are left ragged
SHAPES = [
    (1, 4096, 65), (1, 13696, 3), (1, 66, 200), (2, 4096, 33), (2, 13696, 17), (3, 130, 64), (4, 1024, 31),
    (5, 254, 130), (6, 13696, 16), (8, 4096, 129), (13, 384, 70), (31, 510, 80), (70, 640, 65), (600, 514, 50),
]  # fmt: skip


@pytest.fixture(scope="module")
def built() -> cpu.CPUBackend:
    return load_or_skip()


@pytest.fixture(params=POSSIBLE)
def kernels(request: pytest.FixtureRequest, built: cpu.CPUBackend) -> cpu.CPUBackend:
    """Each variant that this machine has."""
    return load_or_skip(request.param)


def random_weights(bits: int, outputs: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed weights, scales and the float64 matrix they stand for; the lowest numbers included."""
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (outputs, columns), dtype=torch.int8)
    scale = torch.rand(outputs) * 0.01 + 0.001
    return reference.pack(q, bits).contiguous(), scale, q.double() * scale.double()[:, None]


def relative_error(ours: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> float:
    """Error over result, or over the typical result of terms with random signs, as a few may have cancelled."""
    x, dense = x.double(), dense.double()
    typical = (x.square() @ dense.T.square()).sum().sqrt()
    return ((ours.double() - x @ dense.T).norm() / max(typical, (x @ dense.T).norm())).item()


# ---- the products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_products_keep_the_promised_precision(kernels: cpu.CPUBackend, bits: int, shape: tuple[int, int, int]) -> None:
    rows, columns, outputs = shape
    torch.manual_seed(rows)
    weight, scale, dense = random_weights(bits, outputs, columns)
    for dtype, rounding in HALF.items():
        x = torch.randn(rows, columns).to(dtype)
        before = x.clone()
        for precision, bound in PRECISIONS.items():
            y = kernels.linear(x, weight, scale, bits, precision)
            assert (y.shape, y.dtype) == ((rows, outputs), dtype)
            assert relative_error(y, x, dense) < max(bound, rounding), (dtype, precision)
        assert torch.equal(x, before)


@pytest.mark.parametrize("columns", [1, 3, 63, 127, 129, 191, 257, 4097])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_int8_takes_odd_numbers_of_columns(kernels: cpu.CPUBackend, rows: int, columns: int) -> None:
    weight, scale, dense = random_weights(8, 70, columns)
    x = torch.randn(rows, columns)
    for precision in ("exact", "default"):
        assert relative_error(kernels.linear(x, weight, scale, 8, precision), x, dense) < PRECISIONS[precision]


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("bits", BITS)
def test_no_sum_overflows_at_the_ends_of_the_range(kernels: cpu.CPUBackend, bits: int, rows: int) -> None:
    lowest = torch.full((66, 13696), -(1 << bits - 1), dtype=torch.int8)
    weight, scale = reference.pack(lowest, bits), torch.ones(66)
    for value in (1.0, -1.0, 60000.0):
        x = torch.full((rows, 13696), value)
        for precision in PRECISIONS:
            y = kernels.linear(x, weight, scale, bits, precision)
            assert torch.allclose(y, torch.full_like(y, -(1 << bits - 1) * value * 13696), rtol=1e-5), precision


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("bits", BITS)
def test_large_and_shifted_activations(kernels: cpu.CPUBackend, bits: int, rows: int) -> None:
    weight, scale, dense = random_weights(bits, 256, 4096)
    outlier = torch.randn(rows, 4096)
    outlier[:, 7] = 300.0
    for x in (outlier, torch.randn(rows, 4096) + 20, torch.randn(rows, 4096) * torch.logspace(-6, 6, 4096)):
        for precision in ("exact", "default"):  # "int8" is worse by what an outlier takes from its group: 3e-2 here
            bound = PRECISIONS[precision]
            assert relative_error(kernels.linear(x, weight, scale, bits, precision), x, dense) < bound


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zeros_and_bad_numbers_are_not_hidden(
    kernels: cpu.CPUBackend, precision: str, bits: int, rows: int
) -> None:
    weight, scale, _ = random_weights(bits, 65, 384)
    x = torch.zeros(rows, 384)
    assert not kernels.linear(x, weight, scale, bits, precision).any()
    x[:, 128:] = 1e-42  # far below the normal range of floats
    assert kernels.linear(x, weight, scale, bits, precision).abs().max() < 1e-37
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(rows, 384)
        clean = kernels.linear(x, weight, scale, bits, precision)
        x[0, 200] = bad
        y = kernels.linear(x, weight, scale, bits, precision)
        assert not y[0].isfinite().any()
        assert torch.equal(y[1:], clean[1:])


@pytest.mark.parametrize("columns", [4096, 13696])
@pytest.mark.parametrize("bits", BITS)
def test_the_default_precision_rounds_to_14_bits(kernels: cpu.CPUBackend, bits: int, columns: int) -> None:
    weight, scale, dense = random_weights(bits, 512, columns)
    uneven = torch.randn(1, columns)
    uneven[:, columns // 2 :] *= 3.0  # groups of 128 columns that have a step of their own, and such that share one
    for x in (torch.randn(1, columns), uneven):
        assert relative_error(kernels.linear(x, weight, scale, bits), x, dense) < 5e-5


@pytest.mark.parametrize("bits", BITS)
def test_the_place_to_prefetch_to_changes_no_result(kernels: cpu.CPUBackend, bits: int) -> None:
    weight, scale, _ = random_weights(bits, 130, 1376)
    head = torch.randn(130, 1376).to(torch.bfloat16)
    inputs = [torch.randn(rows, 1376) for rows in (1, 2, 3, 9)]
    results = []
    chosen = kernels.library.chatglm_fetching()
    try:
        for place in range(len(PLACES)):
            kernels.library.chatglm_fetch(place)
            products = [kernels.linear(x, weight, scale, bits, precision) for x in inputs for precision in PRECISIONS]
            results.append(torch.cat([*products, *(kernels.dense(x, head) for x in inputs)]))
    finally:
        kernels.library.chatglm_fetch(chosen)
    for result in results[1:]:  # another kernel may compute, which adds in another order
        assert (result - results[0]).norm() < 1e-6 * results[0].norm()


@pytest.mark.parametrize("bits", BITS)
def test_scales_in_half_precision_and_empty_batches(kernels: cpu.CPUBackend, bits: int) -> None:
    weight, scale, _ = random_weights(bits, 40, 256)
    x = torch.randn(2, 256)
    for dtype in (torch.float16, torch.bfloat16):
        half = scale.to(dtype)
        assert torch.equal(kernels.linear(x, weight, half, bits), kernels.linear(x, weight, half.float(), bits))
    assert kernels.linear(x[:0], weight, scale, bits).shape == (0, 40)
    assert kernels.linear(x, weight[:0], scale[:0], bits).shape == (2, 0)
    assert not kernels.linear(x[:, :0], weight[:, :0], scale, bits).any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_equals_plain_torch_bit_for_bit(kernels: cpu.CPUBackend, bits: int, dtype: torch.dtype) -> None:
    for outputs, columns in ((5, 2), (33, 4096), (7, 13696), (3, 130)):
        weight, scale, _ = random_weights(bits, outputs, columns)
        for scales in (scale, scale.half(), scale * 1e-5, scale * 1e7):
            ours = kernels.dequantize(weight, scales, bits, dtype)
            assert torch.equal(ours, reference.dequantize(weight, scales, bits, dtype))


@pytest.mark.parametrize("shape", [(1, 4096, 130), (2, 33, 9), (3, 100, 7), (4, 64, 64), (7, 1000, 20), (40, 96, 50)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_products(kernels: cpu.CPUBackend, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, outputs = shape
    weight = torch.randn(outputs, columns).to(dtype)
    weight[0, :2] = torch.tensor([torch.finfo(dtype).smallest_normal / 4, -300.0]).to(dtype)
    for x_dtype in (torch.float32, dtype):
        x = torch.randn(rows, columns).to(x_dtype)
        y = kernels.dense(x, weight)
        assert y.dtype == x_dtype
        assert relative_error(y, x, weight) < max(1e-5, HALF[x_dtype])
    weight[0, 0] = float("nan")
    assert kernels.dense(x, weight)[:, 0].isnan().all()


@pytest.mark.parametrize("columns", [1000, 6144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_a_dense_product_equal_each_alone(kernels: cpu.CPUBackend, dtype: torch.dtype, columns: int) -> None:
    weight, x = torch.randn(101, columns).to(dtype), torch.randn(16, columns).to(dtype)
    alone = torch.cat([kernels.dense(row, weight) for row in x.split(1)])
    for rows in (2, 4, 5, 8, 11, 16):
        assert torch.equal(kernels.dense(x[:rows].contiguous(), weight), alone[:rows])


def test_half_precision_is_converted_as_torch_does(kernels: cpu.CPUBackend) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    one, scale = torch.ones(1, 1, dtype=torch.int8), torch.ones(1)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)[:, None].contiguous()
        assert torch.equal(kernels.linear(x, one, scale, 8, "exact").nan_to_num(7.0), x.nan_to_num(7.0)), dtype
    wide = torch.randn(1, 4096).mul(torch.logspace(-12, 6, 4096))
    for dtype in (torch.float16, torch.bfloat16):  # one column, many rows of scales: each result is rounded once
        y = kernels.linear(torch.ones(1, 1, dtype=dtype), one.expand(4096, 1).contiguous(), wide[0], 8, "exact")
        assert torch.equal(y, wide.to(dtype))


# ---- threads and the state of the process ----------------------------------------------------------------------------


def test_the_thread_count_of_torch_is_obeyed_at_every_call(kernels: cpu.CPUBackend) -> None:
    asked: list[int] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            function = getattr(kernels.library, name)

            def call(variant: int, threads: int, *rest: Any) -> Any:
                asked.append(threads)
                return function(variant, threads, *rest)

            return call

    recorded = dataclasses.replace(kernels, library=Recorder())  # type: ignore[arg-type]
    weight, scale, _ = random_weights(4, 200, 512)
    x = torch.randn(9, 512)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            results.append(recorded.linear(x, weight, scale, 4))
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 3, 2]
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_python_threads_at_once(kernels: cpu.CPUBackend) -> None:
    weight, scale, _ = random_weights(4, 300, 640)
    inputs = [torch.randn(rows, 640) for rows in (1, 2, 5, 9)]
    expected = [kernels.linear(x, weight, scale, 4) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(kernels.linear(inputs[index], weight, scale, 4), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_floating_point_modes_are_left_alone(kernels: cpu.CPUBackend) -> None:
    weight, scale, _ = random_weights(4, 64, 256)
    kernels.linear(torch.randn(1, 256), weight, scale, 4)
    assert 1e-310 * 0.5 > 0.0
    assert (torch.full((1 << 20,), 1e-40) * 0.5).min() > 0.0  # on the worker threads too


def test_the_best_variant_is_the_default_and_can_be_chosen(
    built: cpu.CPUBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHATGLM_CPU_KERNELS", raising=False)
    best = cpu.load()
    assert best.variant == [name for isa, name in enumerate(cpu.VARIANTS) if built.library.chatglm_runs(isa)][-1]
    assert set(best.describe()) == {"kernels", "compiler", "library", "prefetch", "threads"}
    assert cpu.load() is best
    monkeypatch.setenv("CHATGLM_CPU_KERNELS", "plain")
    assert cpu.load().variant == "plain"
    with pytest.raises(ValueError, match="this machine has plain"):
        cpu.load("altivec")
