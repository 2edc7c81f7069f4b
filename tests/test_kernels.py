"""Products with quantised weights on every backend, and the choice of the backend."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chatglm import kernels
from chatglm.kernels import KernelUnavailable, KernelWarning, reference
from chatglm.kernels.__main__ import HALF_TOLERANCE, TOLERANCE, random_weights

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
BITS = (4, 8)
# (rows, in, out): one row, few, many; odd numbers of outputs; the widest input of the family
SHAPES = [
    (1, 64, 1), (1, 13696, 33), (2, 128, 7), (3, 40, 129), (8, 4096, 65), (31, 256, 50), (33, 96, 17), (600, 72, 31)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_choice() -> Iterator[None]:
    kernels.choose_again()
    yield
    kernels.choose_again()


@pytest.fixture(params=["ours", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of a product runs twice: with what this machine has, and with plain torch."""
    if request.param == "torch":
        monkeypatch.setenv("CHATGLM_KERNELS", "torch")
    return request.param


def relative_error(ours: torch.Tensor, exact: torch.Tensor, least: float = 0.0) -> float:
    """The largest error over the largest result; `least` where a few results could all have cancelled."""
    return (ours.double().cpu() - exact.cpu()).abs().max().item() / max(exact.abs().max().item(), least)


def typical(x: torch.Tensor, dense: torch.Tensor) -> float:
    """The typical size of a result of `x @ dense.T` whose terms have random signs."""
    return (x.double().cpu().square() @ dense.T.square()).sqrt().max().item()


def case(bits: int, shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, ...]:
    rows, columns, outputs = shape
    weight, scale = random_weights(bits, (outputs, columns), device)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device)
    return x, weight, scale, reference.dequantize(weight.cpu(), scale.cpu(), bits, torch.float64)


# ---- the format ------------------------------------------------------------------------------------------------------


def test_the_even_column_is_in_the_high_nibble() -> None:
    packed = reference.pack(torch.tensor([[-7, 7, -8, 0]], dtype=torch.int8), 4)
    assert packed.view(torch.uint8).tolist() == [[0x97, 0x80]]


def test_every_byte_unpacks_and_packs() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8).unsqueeze(0)
    q = reference.unpack(every, 4)
    assert q.min() == -8 and q.max() == 7
    assert torch.equal(reference.pack(q, 4), every)
    assert torch.equal(reference.unpack(reference.pack(every, 8), 8), every)


def test_an_odd_number_of_columns_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"odd number: use 8 bits"):
        reference.pack(torch.zeros(2, 5, dtype=torch.int8), 4)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_rounds_once(
    bits: int, scale_dtype: torch.dtype, dtype: torch.dtype, device: torch.device, path: str
) -> None:
    weight, scale = random_weights(bits, (9, 34), device)
    scale = scale.to(scale_dtype)
    exact = reference.unpack(weight, bits).double() * scale.double().unsqueeze(1)
    once = exact.to(dtype) if dtype == torch.float64 else exact.float().to(dtype)
    assert torch.equal(kernels.dequantize(weight, scale, bits, dtype), once)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_product(bits: int, shape: tuple[int, int, int], precision: str, device: torch.device, path: str) -> None:
    x, weight, scale, dense = case(bits, shape, device)
    bias = torch.randn(shape[2], device=device)
    exact = x.double().cpu() @ dense.T + bias.double().cpu()
    ours = kernels.linear(x, weight, scale, bias, bits, precision)
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert relative_error(ours, exact, typical(x, dense)) < TOLERANCE[precision]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_product_in_half_precision(
    bits: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, path: str
) -> None:
    x, weight, scale, dense = case(bits, shape, device)
    x = x.to(dtype)
    ours = kernels.linear(x, weight, scale, None, bits)
    assert ours.dtype == dtype
    assert relative_error(ours, x.double().cpu() @ dense.T, typical(x, dense)) < HALF_TOLERANCE[dtype]


@pytest.mark.parametrize("bits", BITS)
def test_large_and_small_activations(bits: int, path: str) -> None:
    """One huge column beside small ones, a row of zeros, a row near the smallest numbers."""
    x, weight, scale, dense = case(bits, (4, 256, 48), CPU)
    x[0, 17] = 5e3
    x[1] = 0
    x[2] *= 1e-30
    for precision in ("exact", "default"):
        ours = kernels.linear(x, weight, scale, None, bits, precision)
        for row in (0, 2, 3):
            assert relative_error(ours[row], x[row].double() @ dense.T) < TOLERANCE[precision], (precision, row)
        assert not ours[1].any()


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_inputs_of_every_layout(bits: int, device: torch.device, path: str) -> None:
    x, weight, scale, dense = case(bits, (12, 64, 10), device)
    exact = x.double().cpu() @ dense.T
    layouts = {
        "three dims": (x.view(3, 4, 64), exact.view(3, 4, 10)),
        "one dim": (x[5], exact[5]),
        "transposed": (x.T.contiguous().T, exact),
        "every other row": (x[::2], exact[::2]),
        "a part of wider rows": (torch.cat((x, x), dim=1)[:, 64:], exact),
        "an odd start": (torch.cat((x.new_zeros(1), x.flatten()))[1:].view(12, 64), exact),
        "expanded": (x[:1].expand(5, 64), exact[:1].expand(5, 10)),
    }
    for name, (given, wanted) in layouts.items():
        ours = kernels.linear(given, weight, scale, None, bits, "exact")
        assert ours.shape == wanted.shape, name
        assert relative_error(ours, wanted) < 1e-5, name
    twice = torch.cat((weight, weight), dim=1)[:, : weight.shape[1]]
    assert torch.equal(
        kernels.linear(x, twice, scale, None, bits), kernels.linear(x, weight, scale, None, bits)
    )


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_an_empty_batch(device: torch.device, path: str) -> None:
    weight, scale = random_weights(4, (6, 16), device)
    bias = torch.ones(6, device=device)
    assert kernels.linear(torch.empty(0, 16, device=device), weight, scale, bias, 4).shape == (0, 6)
    assert kernels.linear(torch.empty(2, 0, 16, device=device), weight, scale, None, 4).shape == (2, 0, 6)


def test_float64_is_computed_in_float64(path: str) -> None:
    x, weight, scale, dense = case(4, (3, 32, 8), CPU)
    torch.testing.assert_close(kernels.linear(x.double(), weight, scale, None, 4), x.double() @ dense.T)


def test_what_does_not_fit_together() -> None:
    weight, scale = random_weights(4, (6, 16), CPU)
    with pytest.raises(ValueError, match=r"15 columns and the INT4 weights 16"):
        kernels.linear(torch.zeros(2, 15), weight, scale, None, 4)
    with pytest.raises(ValueError, match=r"move them to one device"):
        x = torch.zeros(2, 16, device="meta")  # a second device that every machine has
        kernels.check_operands(x, weight, scale, 4)


def test_autocast() -> None:
    x, weight, scale, _ = case(4, (3, 32, 8), CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.linear(x, weight, scale, None, 4).dtype == torch.bfloat16
    assert kernels.linear(x, weight, scale, None, 4).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16, 100])
def test_the_dense_product(rows: int, dtype: torch.dtype, path: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, 96, generator=generator).to(dtype)
    weight = torch.randn(51, 96, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T
    for answers in (False, True):
        assert relative_error(kernels.dense_linear(x, weight, answers), exact) < HALF_TOLERANCE.get(dtype, 1e-5)
    assert kernels.dense_linear(x[:, :0], weight).shape == (1, 0, 51)


# ---- autograd and compilation ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, in torch 2.14
@pytest.mark.parametrize("bits", BITS)
def test_the_operators_are_well_formed(bits: int, path: str) -> None:
    for dtype in (torch.float32, torch.float16):
        weight, scale = random_weights(bits, (12, 16), CPU)
        x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
        bias = torch.randn(12, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.chatglm.quantized_linear.default, (x, weight, scale, bias, bits, "exact"))
        torch.library.opcheck(torch.ops.chatglm.dequantize.default, (weight, scale, bits, dtype))
    dense = torch.randn(12, 16, dtype=torch.float16, requires_grad=True)
    for more in ((), (True,)):  # programs that were exported before have no third argument
        torch.library.opcheck(torch.ops.chatglm.dense_linear.default, (x, dense, *more))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_input_and_bias(bits: int, device: torch.device, path: str) -> None:
    x, weight, scale, dense = case(bits, (6, 64, 10), device)
    x, bias = x.view(2, 3, 64).requires_grad_(), torch.randn(10, device=device).requires_grad_()
    seed = torch.randn(2, 3, 10, device=device)
    kernels.linear(x, weight, scale, bias, bits).backward(seed)
    want_x, want_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    F.linear(want_x, dense.float().to(device), want_bias).backward(seed)
    torch.testing.assert_close(x.grad, want_x.grad)
    torch.testing.assert_close(bias.grad, want_bias.grad)
    assert scale.grad is None


def test_gradients_of_the_dense_product(path: str) -> None:
    x, weight = torch.randn(2, 3, 16).bfloat16().requires_grad_(), torch.randn(5, 16).bfloat16().requires_grad_()
    want_x, want_weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    seed = torch.randn(2, 3, 5).bfloat16()
    kernels.dense_linear(x, weight).backward(seed)
    F.linear(want_x, want_weight).backward(seed)
    torch.testing.assert_close(x.grad, want_x.grad)
    torch.testing.assert_close(weight.grad, want_weight.grad)


class Recorder:
    """A backend that notes how it was called and computes with plain torch."""

    def __init__(self) -> None:
        self.precisions: list[str] = []

    def linear(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, precision: str) -> Any:
        assert x.is_contiguous() and x.dim() == 2 and weight.is_contiguous() and scale.is_contiguous()
        assert scale.dtype in (torch.float16, torch.float32)
        self.precisions.append(precision)
        return reference.linear(x, weight, scale, bits)

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
        return reference.dequantize(weight, scale, bits, dtype)

    def describe(self) -> dict[str, str]:
        return {}


@pytest.fixture()
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    backend = Recorder()
    monkeypatch.setattr(kernels, "load_backend", lambda name: backend)
    return backend


def test_where_a_gradient_is_wanted_the_product_is_exact(recorder: Recorder) -> None:
    x, weight, scale, _ = case(4, (2, 32, 8), CPU)
    kernels.linear(x, weight, scale, None, 4, "int8")
    kernels.linear(x.requires_grad_(), weight, scale, None, 4, "int8")
    with torch.no_grad():
        kernels.linear(x, weight, scale.bfloat16(), None, 4)
    assert recorder.precisions == ["int8", "exact", "default"]


def test_a_compiled_product_is_one_graph(recorder: Recorder) -> None:
    """Forward and backward, with shapes that change."""
    _, weight, scale, dense = case(4, (2, 32, 8), CPU)
    compiled = torch.compile(
        lambda x: kernels.linear(x * 2, weight, scale, None, 4), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (2, 5, 9):
        x = torch.randn(rows, 32, requires_grad=True)
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, (2 * dense.sum(0)).float().expand(rows, 32))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), (2 * x.double() @ dense.T).float())
    assert set(recorder.precisions) == {"exact", "default"}


# ---- the choice of a backend -----------------------------------------------------------------------------------------


def test_a_device_without_kernels_of_ours_has_plain_torch() -> None:
    assert kernels.backend_for(torch.device("mps", 0)) is None


def test_plain_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATGLM_KERNELS", "torch")
    monkeypatch.setattr(kernels, "load_backend", lambda name: pytest.fail("no kernels were wanted"))
    assert kernels.backend_for(CPU) is None


def test_one_warning_and_plain_torch_where_kernels_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str) -> Any:
        calls.append(name)
        raise KernelUnavailable("no compiler: install gcc")

    monkeypatch.setattr(kernels, "load_backend", load)
    x, weight, scale, dense = case(4, (2, 32, 8), CPU)
    with pytest.warns(KernelWarning, match=r"plain torch on cpu.*no compiler: install gcc") as caught:
        for _ in range(3):
            ours = kernels.linear(x, weight, scale, None, 4)
            kernels.dequantize(weight, scale, 4, torch.float16)
            kernels.dense_linear(x.half(), dense.half())
    assert len(caught) == 1
    assert calls == ["cpu"]
    assert relative_error(ours, x.double() @ dense.T) < 1e-5


def test_a_backend_that_fails_at_its_first_product(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise KernelUnavailable("this GPU is too old")

    monkeypatch.setattr(recorder, "linear", fail, raising=False)
    x, weight, scale, dense = case(8, (2, 32, 8), CPU)
    with pytest.warns(KernelWarning, match=r"this GPU is too old") as caught:
        for _ in range(2):
            assert relative_error(kernels.linear(x, weight, scale, None, 8), x.double() @ dense.T) < 1e-5
    assert len(caught) == 1
    assert kernels.backend_for(CPU) is None


def test_a_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, package: str | None = None) -> Any:
        raise ModuleNotFoundError("No module named '_ctypes'")

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    with pytest.warns(KernelWarning, match=r"No module named '_ctypes'"):
        assert kernels.backend_for(CPU) is None


def test_threads_that_start_together_load_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Recorder] = []
    inside = threading.Event()

    def load(name: str) -> Recorder:
        inside.wait(5)
        loaded.append(Recorder())
        return loaded[-1]

    monkeypatch.setattr(kernels, "load_backend", load)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(kernels.backend_for(CPU))) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.set()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1
    assert found == loaded * 4


# ---- python -m chatglm.kernels ---------------------------------------------------------------------------------------


def run_command(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "chatglm.kernels", "--no-speed"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=1200,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CHATGLM_KERNELS": "torch"}, ["plain torch: asked for by CHATGLM_KERNELS"]),
        ({"CC": "/bin/false"}, ["plain torch: ", "CC=/bin/false"]),
        ({}, []),
    ],
    ids=["asked for", "no compiler", "as it is"],
)
def test_the_command_says_what_there_is(environment: dict[str, str], words: list[str], tmp_path: Path) -> None:
    cache = {"CHATGLM_CACHE": str(tmp_path / "cache")} if "CC" in environment else {}  # else what is built already
    result = run_command(tmp_path, **cache, **environment)
    assert result.returncode == 0, result.stderr
    assert "WRONG" not in result.stdout
    assert "cpu: " in result.stdout
    for word in ["INT4 ", "INT8 ", "right", *words]:
        assert word in result.stdout


def test_a_path_that_is_wrong_is_called_so(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from chatglm.kernels import __main__ as command

    monkeypatch.setattr(command, "devices", lambda: [CPU])
    assert command.main(["--no-speed"]) == 0
    monkeypatch.setattr(recorder, "linear", lambda x, weight, *rest: x.new_ones(len(x), len(weight)), raising=False)
    assert command.main(["--no-speed"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_command_measures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from chatglm.kernels import __main__ as command

    monkeypatch.setattr(command, "devices", lambda: [CPU])
    monkeypatch.setattr(command, "CACHES", 1 << 20)
    monkeypatch.setattr(command, "SHAPE", (64, 128))
    assert command.main([]) == 0
    out = capsys.readouterr().out
    assert "GB/s read" in out
    assert out.count("% of memory") >= 4


def test_plain_torch_computes_while_the_kernels_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built, found = threading.Event(), object()

    def find(device: torch.device) -> Any:
        assert built.wait(60)
        return found

    kernels.choose_again()
    monkeypatch.setattr(kernels, "_find", find)
    monkeypatch.setattr(kernels, "LOADING_SECONDS", 0.01)
    try:
        x, weight = torch.randn(1, 8), torch.randn(4, 8)
        assert kernels.ready_backend_for(CPU) is None
        assert torch.equal(kernels.dense_linear(x, weight), F.linear(x, weight))
        built.set()
        assert kernels.backend_for(CPU) is found
        assert kernels.ready_backend_for(CPU) is found
    finally:
        built.set()
        monkeypatch.undo()
        kernels.choose_again()
