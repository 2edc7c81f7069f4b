"""The quantisation scheme: the bytes and scales of the originals, and what cannot be quantised."""

from __future__ import annotations

import pytest
import torch

from chatglm import kernels
from chatglm.kernels import reference
from chatglm.quantization import quantize_weight
from conftest import needs_shared
from deviations import DEVIATIONS
from goldens import read_json, read_tensors
from quantized import BITS, DEVICES, DTYPES


@needs_shared
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_matrices_of_the_originals(dtype: str, bits: int, rule: str) -> None:
    """Packed bytes, scales, dequantised weights; generation 1's scales are float16, later ones of the weight's type."""
    tensors, remarks = read_tensors("v1/quant/quant_matrices.safetensors"), read_json("v1/quant/quant_matrices.json")
    matrices = sorted({name.partition(".")[0] for name in tensors})
    assert matrices == ["a", "b", "c", "ties", "zero_row_and_outlier"] and len(remarks) == len(matrices) * 8
    for matrix in matrices:
        name = f"{matrix}.{dtype}.int{bits}.{rule}"
        golden = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        q, scale = quantize_weight(golden["weight"], bits, torch.float16 if rule == "v1" else None)
        assert scale.dtype == golden["scale"].dtype
        assert torch.equal(scale, golden["scale"])
        assert torch.equal(q, golden["qweight"])
        numbers = reference.unpack(q, bits)
        assert torch.equal(numbers, golden["q_unpacked" if bits == 4 else "qweight"])
        assert torch.equal(kernels.dequantize(q, scale.half(), bits, torch.float16), golden["dequant_fp16"])
        assert torch.equal(kernels.dequantize(q, scale, bits, torch.float32), golden["dequant_fp32"])
        assert remarks[name] == {
            "shape": list(golden["weight"].shape),
            "max_abs_err": (golden["dequant_fp32"] - golden["weight"].float()).abs().max().item(),
            "scale_nan_or_zero": int((scale == 0).sum()),
            "q_min": int(numbers.min()),
            "q_max": int(numbers.max()),
        }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_dtype(dtype: torch.dtype, bits: int, device: str) -> None:
    weight = torch.randn(70, 36, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, scale = quantize_weight(weight, bits)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float16)
    assert dtype == torch.float16 or DEVIATIONS["scales_are_float16"]
    assert q.shape == (70, 36 * bits // 8)
    error = (reference.dequantize(q, scale, bits, torch.float64) - weight.double()).abs()
    largest = 2 ** (bits - 1) - 1
    # Half a step, a little of the largest where the scale was rounded down, and float16's own rounding of w / scale.
    step = scale.double().unsqueeze(1)
    assert (error <= step * (0.5 + 0.002 * largest)).all()


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros(bits: int) -> None:
    weight = torch.randn(3, 8)
    weight[1] = 0
    q, scale = quantize_weight(weight, bits)
    assert scale[1] == 0 and not q[1].any()
    assert not kernels.dequantize(q, scale, bits, torch.float32)[1].any()
    assert not kernels.linear(torch.randn(2, 8), q, scale, None, bits)[:, 1].any()


@pytest.mark.parametrize("bits", BITS)
def test_tiny_rows_do_not_wrap_around(bits: int) -> None:
    """Where float16 rounds the scale coarsely, values are clipped instead of changing their sign."""
    weight = torch.tensor([[-1.0, 1.0, 0.5, -0.5]]) * torch.tensor([1e-6, 4e-7, 1e-7, 1e-12]).unsqueeze(1)
    q, scale = quantize_weight(weight, bits)
    back = reference.dequantize(q, scale, bits, torch.float64)
    assert (back.sign() * weight.sign() >= 0).all()
    assert (back - weight.double()).abs().max() < 1e-6


def test_large_matrices_are_quantised_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 24)
    whole = quantize_weight(weight, 4)
    monkeypatch.setattr("chatglm.quantization.scheme.SLICE_NUMBERS", 24 * 5)
    monkeypatch.setattr("chatglm.kernels.reference.SLICE", 24 * 5)
    for ours, theirs in zip(quantize_weight(weight, 4), whole, strict=True):
        assert torch.equal(ours, theirs)
    dense = reference.dequantize(*whole, 4, torch.float32)
    assert torch.equal(dense, reference.dequantize_rows(*whole, 4, torch.float32))
    x = torch.randn(3, 24)
    torch.testing.assert_close(reference.linear(x, *whole, 4), x @ dense.T)


@pytest.mark.parametrize(
    ("weight", "bits", "words"),
    [
        (torch.ones(2, 4), 5, "bits is 5"),
        (torch.ones(2, 4), True, "bits is True"),
        (torch.ones(2, 5), 4, "odd number"),
        (torch.ones(4), 4, "only float matrices"),
        (torch.ones(2, 4, dtype=torch.int8), 8, "only float matrices"),
        (torch.full((2, 4), float("nan")), 8, "not finite"),
        (torch.full((2, 4), 1e9), 8, "too large"),
    ],
)
def test_what_cannot_be_quantised(weight: torch.Tensor, bits: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_weight(weight, bits)
