"""`model.quantize`, and what is done with quantised models: casts, copies, compiling, training, offloading, LoRA."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from chatglm import ChatGLMQuantizationConfig
from chatglm.quantization import IGNORED_ARGUMENTS, DenseHead, QuantizedEmbedding, settings_of
from conftest import enable_checkpointing
from goldens import assert_close_to_scale
from quantized import (
    BITS,
    DTYPES,
    OPTION_IDS,
    OPTIONS,
    VERSIONS,
    assert_same,
    folder_of,
    logits_of,
    model_of,
    prompt,
    quantized_layers,
)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_quantize(version: int, bits: int) -> None:
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
    assert_close_to_scale(logits_of(model), logits_of(rounded), 1e-3)
    for layer in layers.values():
        layer.precision = "exact"
    assert_close_to_scale(logits_of(model), logits_of(rounded), 1e-5)
    assert type(model.get_output_embeddings()) is DenseHead


def test_quantize_of_nothing() -> None:
    model = model_of(3)
    assert model.quantize(0) is model
    assert not quantized_layers(model)
    assert model.config.quantization_bit == 0


def test_arguments_of_the_originals() -> None:
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
def test_bits(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"use 4 or 8, or 0"):
        model_of(3).quantize(bits)


def test_a_quantised_model_cannot_become_another() -> None:
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


def test_empty_init() -> None:
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
def test_any_order(version: int, order: list[str]) -> None:
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
def test_the_dtype_of_a_model_is_not_that_of_its_scales(dtype: torch.dtype) -> None:
    model = model_of(1).quantize(4, quantize_embeddings=True).to(dtype)
    assert model.dtype == dtype
    assert logits_of(model).dtype == dtype


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_embeddings_and_head(version: int, options: dict[str, Any]) -> None:
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
    assert_close_to_scale(logits_of(model), logits_of(rounded), 1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_copies(version: int) -> None:
    model = model_of(version).quantize(4, quantize_embeddings=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other, model)
        assert torch.equal(logits_of(other), logits_of(model))


@pytest.mark.parametrize("version", [1, 3])
def test_compiled_and_exported(version: int) -> None:
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
def test_a_prefix_trains_through_quantised_weights(version: int, reentrant: bool) -> None:
    """P-tuning's order: quantise, half, prefix in float32; the same gradient with and without checkpointing."""
    config = AutoConfig.from_pretrained(folder_of(version), pre_seq_len=3)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folder_of(version), config=config, dtype=torch.float32).quantize(4)
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
def test_accelerate_offload(place: str, tmp_path: Path) -> None:
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


def test_offloaded_weights_cannot_be_quantised_afterwards() -> None:
    from accelerate import cpu_offload

    model = model_of(3)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"not in memory \(offloaded\): quantise while loading"):
        model.quantize(4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses names that transformers has renamed
def test_lora(tmp_path: Path) -> None:
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
