"""Quantised layers alone: products, casts, and their state."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chatglm.quantization import QuantizedEmbedding, QuantizedLinear
from quantized import BITS, assert_same


def make_layer(bits: int = 4, bias: bool = True) -> tuple[QuantizedLinear, torch.Tensor]:
    linear = nn.Linear(32, 12, bias=bias)
    layer = QuantizedLinear.like(linear, bits)
    layer.set_weight(linear.weight)
    return layer, layer.dequantize()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_is_a_linear_layer(bits: int, bias: bool) -> None:
    layer, dense = make_layer(bits, bias)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (32, 12)
    assert set(layer.state_dict()) == {"weight", "weight_scale", *(["bias"] if bias else [])}
    assert not layer.weight.requires_grad and not layer.weight_scale.requires_grad
    assert f"bits={bits}" in repr(layer)
    x = torch.randn(2, 3, 32, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, dense, layer.bias))
    out.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))
    assert layer.weight_scale.grad is None


CASTS: dict[str, Any] = {
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to dtype": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "type": lambda module: module.type(torch.float16),
    "there and back": lambda module: module.half().bfloat16().float(),
    "cpu": lambda module: module.cpu(),
    **({"cuda": lambda module: module.half().cuda().float()} if torch.cuda.is_available() else {}),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_weights_and_scales_alone(cast: str) -> None:
    layer, _ = make_layer()
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    bias_dtype = CASTS[cast](nn.Linear(1, 1)).bias.dtype
    layer = CASTS[cast](layer)
    assert layer.weight.dtype == torch.int8 and torch.equal(layer.weight.cpu(), weight)
    assert layer.weight_scale.dtype == torch.float16 and torch.equal(layer.weight_scale.cpu(), scale)
    assert layer.bias is not None and layer.bias.dtype == bias_dtype


@pytest.mark.parametrize("bits", BITS)
def test_an_embedding(bits: int) -> None:
    embedding = nn.Embedding(20, 8)
    layer = QuantizedEmbedding.like(embedding, bits)
    layer.set_weight(embedding.weight)
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    assert layer.half()(ids).dtype == torch.float16
    assert copy.deepcopy(layer.bfloat16())(ids).dtype == torch.bfloat16
    assert layer.float()(ids).dtype == torch.float32
    assert layer.weight_scale.dtype == torch.float16


def test_state_of_a_layer() -> None:
    layer, _ = make_layer()
    x = torch.randn(2, 32)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    for assign in (False, True):
        other = QuantizedLinear(32, 12, bits=4)
        other.load_state_dict(torch.load(stored, weights_only=True), assign=assign)
        stored.seek(0)
        assert torch.equal(other(x), layer(x))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert_same(other, layer)


def test_scales_of_another_type_are_loaded_as_they_are() -> None:
    layer, _ = make_layer()
    state = layer.state_dict() | {"weight_scale": torch.rand(12) * 1e-3}
    layer.load_state_dict(state)
    assert torch.equal(layer.weight_scale, state["weight_scale"])


@pytest.mark.parametrize("bits", BITS)
def test_float_weights_are_not_loaded_into_a_quantised_layer(bits: int) -> None:
    """INT8 weights have the shape of the float ones: copying these would silently make them zeros."""
    layer = QuantizedLinear(32, 12, bits=bits)
    with pytest.raises(RuntimeError, match=r"weight is torch.float32 .* then call model.quantize"):
        layer.load_state_dict(nn.Linear(32, 12).state_dict(), strict=False)


def test_columns_that_fill_no_byte() -> None:
    with pytest.raises(ValueError, match=r"33 columns .* use 8 bits"):
        QuantizedLinear(33, 4, bits=4)
    assert QuantizedLinear(33, 4, bits=8)(torch.zeros(1, 33)).shape == (1, 4)
