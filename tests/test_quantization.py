"""The quantisation scheme, quantised models however they are made, and the originals' quantised checkpoints."""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import chatglm
from chatglm import ChatGLMQuantizationConfig, kernels, load
from chatglm.arguments import add_model_arguments, load_from_arguments
from chatglm.kernels import reference
from chatglm.loading import DEMO, NotEnoughMemoryError
from chatglm.quantization import (
    IGNORED_ARGUMENTS,
    DenseHead,
    QuantizedEmbedding,
    QuantizedLinear,
    quantize_weight,
    settings_of,
)
from checkpoints import write_checkpoint
from conftest import enable_checkpointing, needs_shared
from deviations import DEVIATIONS
from goldens import assert_close_to_scale, find, read_json, read_tensors

VERSIONS = (1, 2, 3)
BITS = (4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHECKPOINTS = [(1, "int4"), (1, "int8"), (1, "int4_qe"), (2, "int4"), (2, "int8"), (3, "int4"), (3, "int8")]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"quantize_embeddings": True},
    {"quantize_head": 8},
    {"quantize_embeddings": True, "quantize_head": 8},
]
OPTION_IDS = ["blocks", "embeddings", "head", "embeddings and head"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny float model of every generation, under a name that tells its generation."""
    root = tmp_path_factory.mktemp("models")

    def folder(version: int) -> Path:
        path = root / f"chatglm{version}"
        if not path.exists():
            shutil.copytree(find(f"v{version if version != 2 else 3}/model"), path)
            values = json.loads((path / "config.json").read_text(encoding="utf-8"))
            values["chatglm_version"] = version
            (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        return path

    return folder


@pytest.fixture()
def model_of(folders: Any) -> Any:
    def make(version: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return AutoModel.from_pretrained(folders(version), dtype=dtype, **options)

    return make


def prompt(model: Any) -> torch.Tensor:
    config = model.config
    ids = [5, 6, 7, 8]
    if config.chatglm_version == 1:
        ids += [config.gmask_token_id, config.bos_token_id]
    return torch.tensor([ids], device=model.device)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(prompt(model)).logits


def assert_same(ours: nn.Module, other: nn.Module) -> None:
    """Every tensor of two models, bit for bit and of the same dtype."""
    left, right = ours.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.cpu(), right[name].cpu()), name


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


# ---- the scheme ------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_matrices_of_the_originals(dtype: str, bits: int, rule: str) -> None:
    """Packed bytes, scales, dequantised weights; generation 1's scales are float16, later ones of the weight's type."""
    tensors = read_tensors("v1/quant/quant_matrices.safetensors")
    end = f".{dtype}.int{bits}.{rule}.weight"
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(end)]
    assert names
    for name in names:
        golden = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        q, scale = quantize_weight(golden["weight"], bits, torch.float16 if rule == "v1" else None)
        assert scale.dtype == golden["scale"].dtype
        assert torch.equal(scale, golden["scale"])
        assert torch.equal(q, golden["qweight"])
        if "q_unpacked" in golden:
            assert torch.equal(reference.unpack(q, bits), golden["q_unpacked"])
        assert torch.equal(kernels.dequantize(q, scale.half(), bits, torch.float16), golden["dequant_fp16"])
        torch.testing.assert_close(kernels.dequantize(q, scale, bits, torch.float32), golden["dequant_fp32"])


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
    """Where float16 holds the scale coarsely, the numbers are cut instead of changing their sign."""
    weight = torch.tensor([[-1.0, 1.0, 0.5, -0.5]]) * torch.tensor([1e-6, 4e-7, 1e-7, 1e-12]).unsqueeze(1)
    q, scale = quantize_weight(weight, bits)
    back = reference.dequantize(q, scale, bits, torch.float64)
    assert (back.sign() * weight.sign() >= 0).all()
    assert (back - weight.double()).abs().max() < 1e-6


def test_large_matrices_are_quantised_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 24)
    whole = quantize_weight(weight, 4)
    monkeypatch.setattr("chatglm.quantization.BLOCK", 16 * 24 * 5)
    monkeypatch.setattr("chatglm.kernels.reference.BLOCK", 24 * 5)
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


# ---- layers ----------------------------------------------------------------------------------------------------------


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
    """INT8 has the shape of the float weights: copying them would make them zeros without a word."""
    layer = QuantizedLinear(32, 12, bits=bits)
    with pytest.raises(RuntimeError, match=r"weight is torch.float32 .* and call model.quantize"):
        layer.load_state_dict(nn.Linear(32, 12).state_dict(), strict=False)


def test_columns_that_fill_no_byte() -> None:
    with pytest.raises(ValueError, match=r"33 columns .* use 8 bits"):
        QuantizedLinear(33, 4, bits=4)
    assert QuantizedLinear(33, 4, bits=8)(torch.zeros(1, 33)).shape == (1, 4)


# ---- model.quantize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_quantize(version: int, bits: int, model_of: Any) -> None:
    """The four matrices of each block and no other; what they compute is the float model of the rounded weights."""
    model, rounded = model_of(version), model_of(version)
    assert model.quantize(bits) is model
    layers = quantized_layers(model)
    assert len(layers) == 4 * model.config.num_layers
    assert {name.rpartition(".")[2] for name in layers} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"
    }  # fmt: skip
    for name, layer in layers.items():
        rounded.get_submodule(name).weight.data = layer.dequantize()
    assert_close_to_scale(logits_of(model), logits_of(rounded), 2e-3)
    for layer in layers.values():
        layer.precision = "exact"
    assert_close_to_scale(logits_of(model), logits_of(rounded), 1e-5)
    assert type(model.get_output_embeddings()) is DenseHead


def test_quantize_of_nothing(model_of: Any) -> None:
    model = model_of(3)
    assert model.quantize(0) is model
    assert not quantized_layers(model)
    assert model.config.quantization_bit == 0


def test_arguments_of_the_originals(model_of: Any) -> None:
    """All are taken; those without meaning are named with their reason."""
    model = model_of(1).quantize(
        4, use_quantization_cache=True, kernel_file="quantization_kernels.so", empty_init=False, device="cpu",
        source_code="x.c", compile_parallel_kernel=True, parallel_num=4, quantize_embeddings=False,
    )  # fmt: skip
    assert_same(model, model_of(1).quantize(4))
    assert all(IGNORED_ARGUMENTS.values())
    assert model.quantize(4, kernel_file="x.so") is model  # the originals' way to load another kernel
    with pytest.raises(TypeError, match=r"no argument quantise_head"):
        model.quantize(4, quantise_head=8)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 16, -4, True, None, "4", 4.5])
def test_bits(bits: Any, model_of: Any) -> None:
    with pytest.raises(ValueError, match=r"use 4 or 8, or 0"):
        model_of(3).quantize(bits)


def test_a_quantised_model_cannot_become_another(model_of: Any) -> None:
    model = model_of(3).quantize(8)
    assert model.quantize(8) is model
    with pytest.raises(ValueError, match=r"quantised to 8 bits already.*full-precision checkpoint"):
        model.quantize(4)
    with pytest.raises(ValueError, match=r"already, without quantize_head"):
        model.quantize(8, quantize_head=8)
    assert all(layer.precision == "default" for layer in quantized_layers(model).values())
    model.quantize(8, precision="int8")
    assert all(layer.precision == "int8" for layer in quantized_layers(model).values())
    assert settings_of(model.config).precision == "int8"
    with pytest.raises(ValueError, match=r"precision is 'float'"):
        model.quantize(8, precision="float")


def test_an_error_names_the_layer(model_of: Any, folders: Any, tmp_path: Path) -> None:
    model = model_of(3)
    name = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"
    model.get_parameter(name).data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: weights that are not finite"):
        model.quantize(4)
    with pytest.raises(ValueError, match=f"{name}: weights that are not finite"):
        AutoModel.from_pretrained(tmp_path, quantization_config=ChatGLMQuantizationConfig(bits=4))


def test_empty_init(model_of: Any) -> None:
    """For weights that are loaded afterwards, as the originals' constructors do it."""
    for options in OPTIONS:
        done, empty = model_of(1).quantize(4, **options), model_of(1).quantize(4, empty_init=True, **options)
        assert not any(layer.weight.any() for layer in quantized_layers(empty).values())
        empty.load_state_dict(done.state_dict())
        assert_same(empty, done)
        assert torch.equal(logits_of(empty), logits_of(done))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "order",
    [
        ["quantize", "half", "float"],
        ["half", "quantize", "float"],
        ["quantize", "bfloat16", "float"],
        ["half", "float", "quantize"],
        ["to", "quantize", "to", "float"],
    ],
    ids=" ".join,
)
def test_any_order(version: int, order: list[str], model_of: Any) -> None:
    """The weights of the folder are float16 numbers, so every order has to end with the same scales."""
    model = model_of(version).half().float()
    for step in order:
        if step == "quantize":
            model = model.quantize(8)
        else:
            model = model.to(torch.float16) if step == "to" else getattr(model, step)()
    plain = model_of(version).half().quantize(8)
    for name, layer in quantized_layers(model).items():
        same = plain.get_submodule(name)
        assert torch.equal(layer.weight_scale, same.weight_scale), name
        assert layer.weight.dtype == torch.int8
    assert model.dtype == torch.float32
    assert logits_of(model).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_a_model_is_not_that_of_its_scales(dtype: torch.dtype, model_of: Any) -> None:
    model = model_of(1).quantize(4, quantize_embeddings=True).to(dtype)
    assert model.dtype == dtype
    assert logits_of(model).dtype == dtype


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_embeddings_and_head(version: int, options: dict[str, Any], model_of: Any) -> None:
    model = model_of(version)
    tied = model.config.tie_word_embeddings
    model = model.quantize(4, **options)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings, QuantizedEmbedding) == options.get("quantize_embeddings", False)
    bits = options.get("quantize_head") or (4 if options.get("quantize_embeddings") else None)
    assert getattr(head, "bits", None) == bits
    shared = tied and options in ({}, {"quantize_embeddings": True})
    assert (head.weight is embeddings.weight) == shared
    if shared and bits:
        assert head.weight_scale is embeddings.weight_scale
    rounded = model_of(version)
    for name, layer in quantized_layers(model).items():
        rounded.get_submodule(name).weight = nn.Parameter(layer.dequantize())
    assert_close_to_scale(logits_of(model), logits_of(rounded), 2e-3)


# ---- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_saved_loaded_and_quantised_while_loading(
    version: int, options: dict[str, Any], bits: int, dtype: torch.dtype, model_of: Any, tmp_path: Path
) -> None:
    """Three ways to the same model, bit for bit."""
    model = model_of(version, dtype).quantize(bits, **options)
    settings = ChatGLMQuantizationConfig(bits=bits, **options)
    while_loading, info = AutoModel.from_pretrained(
        model.config._name_or_path, dtype=dtype, quantization_config=settings, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "one")
    while_loading.save_pretrained(tmp_path / "two")
    for folder in ("one", "two"):
        again, info = AutoModel.from_pretrained(tmp_path / folder, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(again) is type(model)
        for other in (again, while_loading):
            assert_same(other, model)
            assert other.dtype == dtype
            assert other.all_tied_weights_keys == model.all_tied_weights_keys
            assert torch.equal(logits_of(other), logits_of(model))
            assert not [key for key, value in other.named_parameters() if value.requires_grad and "scale" in key]
    saved = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    assert saved["quantization_bit"] == bits  # what the original code reads
    assert saved["quantization_config"]["bits"] == bits
    assert saved["quantization_config"]["quant_method"] == "chatglm"


@pytest.mark.parametrize("version", VERSIONS)
def test_copies(version: int, model_of: Any) -> None:
    model = model_of(version).quantize(4, quantize_embeddings=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other, model)
        assert torch.equal(logits_of(other), logits_of(model))


@pytest.mark.parametrize("make", ["quantize", "while loading", "saved"])
def test_casts_of_a_loaded_model(make: str, model_of: Any, tmp_path: Path) -> None:
    """The classic `.half().cuda()` works on every quantised model, and so does training mode."""
    if make == "while loading":
        model = model_of(3, quantization_config=ChatGLMQuantizationConfig(bits=4))
    else:
        model = model_of(3).quantize(4)
    if make == "saved":
        model.save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path)
    for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
        assert logits_of(getattr(model, cast)().train().eval()).dtype == dtype


def test_a_classifier(folders: Any, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folders(3), num_labels=3)
    model = chatglm.ChatGLM3ForSequenceClassification(config).eval().quantize(8)
    assert type(model.classifier_head) is nn.Linear
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(again, model)
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_base_model_alone(folders: Any, tmp_path: Path) -> None:
    """The network without chat or head is quantised, saved and loaded like the others."""
    from chatglm.modeling_chatglm import ChatGLM1Model

    model = ChatGLM1Model(AutoConfig.from_pretrained(folders(1))).eval().quantize(4)
    assert len(quantized_layers(model)) == 4 * model.config.num_layers
    model.save_pretrained(tmp_path)
    assert_same(ChatGLM1Model.from_pretrained(tmp_path), model)


def test_a_config_that_only_claims_to_be_quantised(folders: Any) -> None:
    """Float weights are never read into INT8 layers."""
    message = r"to quantise one, load it with quantization_config=ChatGLMQuantizationConfig"
    config = AutoConfig.from_pretrained(folders(3))
    config.quantization_bit = 8
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folders(3), config=config)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folders(3), quantization_bit=8)
    config = type(config)(**(config.to_dict() | {"quantization_config": None}))
    with pytest.raises(ValueError, match=r"says that this checkpoint is quantised, but .* give quantization_config"):
        AutoModel.from_pretrained(folders(3), config=config)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"bits": 3}, "bits is 3"), ({"quantize_head": 2}, "bits is 2"), ({"precision": "fp8"}, "precision is 'fp8'")],
)
def test_settings_that_mean_nothing(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChatGLMQuantizationConfig(**values)


def test_a_config_makes_a_quantised_model(folders: Any) -> None:
    """The constructor, as the originals' does, with the config of a quantised checkpoint."""
    config = AutoConfig.from_pretrained(folders(1))
    config = type(config)(**(config.to_dict() | {"quantization_bit": 4, "quantization_embeddings": True}))
    model = chatglm.ChatGLM1ForConditionalGeneration(config)
    assert len(quantized_layers(model)) == 4 * config.num_layers + 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    done = AutoModel.from_pretrained(folders(1), dtype=torch.float32).quantize(4, quantize_embeddings=True)
    model.load_state_dict(done.state_dict())
    assert torch.equal(logits_of(model.eval()), logits_of(done))


# ---- the originals' checkpoints --------------------------------------------------------------------------------------


def as_published(version: int, kind: str, layout: str, folder: Path) -> Path:
    """A published quantised folder: the golden one as `.safetensors`, or as one or two `.bin` files."""
    golden = find(f"v{version}/quant/ckpt_{kind}")
    values = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    values["_name_or_path"] = {1: "THUDM/chatglm-6b-int4", 2: "THUDM/chatglm2-6b-int4", 3: "THUDM/chatglm3-6b"}[version]
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    state = load_file(golden / "model.safetensors")
    if layout == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        halves = [dict(list(state.items())[part::2]) for part in (0, 1)]
        for half, file in zip(halves, files, strict=True):
            torch.save(half, folder / file)
        weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    return folder


@needs_shared
@pytest.mark.parametrize("layout", ["safetensors", "bin", "bin shards"])
@pytest.mark.parametrize(("version", "kind"), CHECKPOINTS)
def test_published_checkpoints(version: int, kind: str, layout: str, tmp_path: Path) -> None:
    """Bytes and scales as they are in the file, the logits and the greedy answer of the original code."""
    folder = as_published(version, kind, layout, tmp_path)
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.chatglm_version == version
    state = model.state_dict()
    for name, tensor in load_file(find(f"v{version}/quant/ckpt_{kind}/model.safetensors")).items():
        if tensor.dtype == torch.int8 or name.endswith("weight_scale"):
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor), name
    golden = read_tensors(f"v{version}/quant/ckpt_{kind}/forward.safetensors")
    inputs = {name: tensor for name, tensor in golden.items() if name != "logits_fp32"}
    rows = golden["attention_mask"].bool() if version > 1 else None
    assert rows is None or DEVIATIONS["pad_rows_are_not_fully_visible"]
    with torch.no_grad():
        assert_close_to_scale(model(**inputs).logits, golden["logits_fp32"], 2e-3, rows)
    greedy = read_json(f"v{version}/quant/ckpt_{kind}/forward.json")["greedy"]
    ids, sequences = torch.tensor(greedy["input_ids"]), torch.tensor(greedy["sequences"])
    ours = model.generate(ids, max_new_tokens=sequences.shape[1] - ids.shape[1], do_sample=False)
    assert torch.equal(ours, sequences)


@needs_shared
@pytest.mark.parametrize(("version", "kind"), CHECKPOINTS)
def test_published_checkpoints_in_other_types_and_saved_again(version: int, kind: str, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    folder = as_published(version, kind, "safetensors", tmp_path / "published")
    models = {dtype: AutoModel.from_pretrained(folder, dtype=dtype) for dtype in DTYPES}
    for dtype, model in models.items():
        assert logits_of(model).dtype == dtype
        for name, layer in quantized_layers(model).items():
            assert torch.equal(layer.weight_scale, models[torch.float32].get_submodule(name).weight_scale)
        model.save_pretrained(tmp_path / str(dtype))
        assert_same(AutoModel.from_pretrained(tmp_path / str(dtype)), model)


@needs_shared
def test_scales_in_float32_stay_so(tmp_path: Path) -> None:
    """As the first CPU code of generation 1 wrote them."""
    folder = as_published(1, "int4", "safetensors", tmp_path)
    state = load_file(folder / "model.safetensors")
    wide = {name: tensor.float() * 1.0001 if name.endswith("scale") else tensor for name, tensor in state.items()}
    save_file(wide, folder / "model.safetensors")
    model = AutoModel.from_pretrained(folder, dtype=torch.float16)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight_scale, wide[f"{name}.weight_scale"])


# ---- everything that is done with models -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 3])
def test_compiled_and_exported(version: int, model_of: Any) -> None:
    model = model_of(version).quantize(4)
    ids, wanted = prompt(model), logits_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted)
        exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, wanted)
    assert "chatglm.quantized_linear" in str(exported.graph)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_prefix_trains_through_quantised_weights(version: int, reentrant: bool, folders: Any) -> None:
    """P-tuning's order: quantise, half, prefix in float32; the same gradient with and without checkpointing."""
    config = AutoConfig.from_pretrained(folders(version), pre_seq_len=3)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folders(version), config=config, dtype=torch.float32).quantize(4)
    model.transformer.prefix_encoder.dropout.p = 0.0
    model.train()
    ids = prompt(model)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.transformer.prefix_encoder.embedding.weight.grad.clone()

    plain = gradient()
    assert plain.abs().max() > 0
    enable_checkpointing(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.testing.assert_close(gradient(), plain)
    assert [name for name, value in model.named_parameters() if value.grad is not None] == [
        "transformer.prefix_encoder.embedding.weight"
    ]
    model.half().transformer.prefix_encoder.float()
    assert all(layer.weight_scale.dtype == torch.float16 for layer in quantized_layers(model).values())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_accelerate_offload(place: str, model_of: Any, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    model = model_of(3, quantization_config=ChatGLMQuantizationConfig(bits=4, quantize_embeddings=True))
    wanted = logits_of(model)
    if place == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[5, 6, 7, 8]])).logits, wanted)


def test_offloaded_weights_cannot_be_quantised_afterwards(model_of: Any) -> None:
    from accelerate import cpu_offload

    model = model_of(3)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"not in memory \(offloaded\): quantise while loading"):
        model.quantize(4)


def test_a_device_map(model_of: Any) -> None:
    settings = ChatGLMQuantizationConfig(bits=4)
    model = model_of(3, quantization_config=settings, device_map={"": "cpu"})
    assert_same(model, model_of(3).quantize(4))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses names that transformers has renamed
def test_lora(model_of: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = model_of(3).quantize(4)
    ids = prompt(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query_key_value"]))
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=1.0)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of(3).quantize(4), tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, adapted.eval()(ids).logits)


MEASURE = """
import sys, threading, time
import torch
from chatglm import ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLMQuantizationConfig

def anonymous():
    with open("/proc/self/status") as status:
        return int(status.read().split("RssAnon:")[1].split()[0]) * 1024

torch.set_num_threads(1)
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
settings = ChatGLMQuantizationConfig(bits=4)
model = ChatGLM2ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float16, quantization_config=settings)
done.set()
watcher.join()
print(peak[0] - before, sum(value.nbytes for value in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_peak_memory_of_quantising_while_loading(layout: str, tmp_path: Path) -> None:
    """The quantised model, one layer and 10 %: never the whole float model (here three times as large)."""
    config = chatglm.ChatGLM2Config(
        hidden_size=1024, num_layers=12, num_attention_heads=8, ffn_hidden_size=2816, padded_vocab_size=4096,
        seq_length=128, chatglm_version=2,
    )  # fmt: skip
    model = chatglm.ChatGLM2ForConditionalGeneration(config).half()
    whole = sum(value.nbytes for value in model.parameters())
    layer = sum(value.nbytes for value in model.transformer.encoder.layers[0].parameters())
    model.save_pretrained(tmp_path)
    if layout == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    peak, quantized = map(int, result.stdout.split())
    assert whole > 2.5 * quantized
    assert peak < 1.1 * quantized + layer


# ---- chatglm.load and the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ChatGLM3-6B in float16, with its tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("load") / "chatglm3-6b", "chatglm3-6b", tokenizer=True)


@needs_shared
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_quantises_the_numbers_in_the_file(dtype: str, bits: int, checkpoint: Path) -> None:
    """Not those that another dtype makes of them: the result does not hang on the dtype that is computed in."""
    model, _ = load(checkpoint, device="cpu", dtype=dtype, quantize=bits)
    assert model.dtype == getattr(torch, dtype)
    file = load_file(checkpoint / "model.safetensors")
    layers = quantized_layers(model)
    assert len(layers) == 4 * model.config.num_layers
    for name, layer in layers.items():
        q, scale = quantize_weight(file[f"{name}.weight"], bits)
        assert torch.equal(layer.weight, q) and torch.equal(layer.weight_scale, scale), name


@needs_shared
def test_load_leaves_the_prefix_in_float32(checkpoint: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint, pre_seq_len=3)
    AutoModel.from_pretrained(checkpoint, config=config).save_pretrained(tmp_path)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(checkpoint / file, tmp_path)
    model, _ = load(tmp_path, device="cpu", dtype="bfloat16", quantize=4)
    table = model.transformer.prefix_encoder.embedding.weight
    assert table.dtype == torch.float32
    saved = load_file(tmp_path / "model.safetensors")["transformer.prefix_encoder.embedding.weight"]
    assert torch.equal(table, saved)
    assert logits_of(model).dtype == torch.bfloat16


@needs_shared
def test_load_what_is_quantised_already(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load(checkpoint, device="cpu", quantize=8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for quantize in (None, 8):
        again, _ = load(tmp_path, device="cpu", quantize=quantize)
        assert_same(again, model)
    with pytest.raises(ValueError, match=r"quantize=4, but .* is quantised to 8 bits already"):
        load(tmp_path, device="cpu", quantize=4)


@needs_shared
def test_the_memory_check_counts_quantised_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    outside = 2 * config.vocab_size * config.hidden_size
    needed = 1.1 * ((sum(tensor.numel() for tensor in tensors.values()) - outside) / 2 + outside * 4)
    monkeypatch.setattr("chatglm.checkpoints.memory.available", lambda device: int(needed) + 100)
    with pytest.raises(NotEnoughMemoryError, match=r"load with quantize=4"):
        load(checkpoint, device="cpu", dtype="float32")
    assert quantized_layers(load(checkpoint, device="cpu", dtype="float32", quantize=4)[0])
    with pytest.raises(NotEnoughMemoryError):
        load(checkpoint, device="cpu", dtype="float32", quantize=8)


@needs_shared
def test_the_command_line_argument(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    given = ["--model", str(checkpoint), "--device", "cpu", "--quantize", "8"]
    model, _ = load_from_arguments(parser.parse_args(given))
    settings = settings_of(model.config)
    assert settings is not None and settings.bits == 8
    with pytest.raises(SystemExit):
        parser.parse_args(["--quantize", "5"])
    assert "choose from" in capsys.readouterr().err


@pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="the bundled demo model is not there")
@pytest.mark.parametrize("bits", BITS)
def test_the_demo_answers_when_quantised(bits: int) -> None:
    """INT8 answers as full precision does; for INT4, where a word may differ, that it answers."""
    answers = []
    for quantize in (None, bits):
        model, tokenizer = load(DEMO, device="cpu", dtype="float32", quantize=quantize)
        answers.append([model.chat(tokenizer, question, do_sample=False)[0] for question in ("你好", "Who are you?")])
    assert all(answers[1])
    assert bits == 4 or answers[0] == answers[1]
