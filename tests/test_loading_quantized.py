"""`chatglm.load` with `quantize`, from Python and from the command line."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from chatglm import load
from chatglm.front.arguments import add_model_arguments, load_from_arguments
from chatglm.loading import DEMO, NotEnoughMemoryError
from chatglm.quantization import quantize_weight, settings_of
from checkpoints import write_checkpoint
from conftest import needs_shared
from quantized import BITS, assert_same, logits_of, quantized_layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ChatGLM3-6B in float16, with its tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("load") / "chatglm3-6b", "chatglm3-6b", tokenizer=True)


@needs_shared
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_quantises_the_numbers_in_the_file(dtype: str, bits: int, checkpoint: Path) -> None:
    """Quantises before any conversion: the result does not depend on the dtype of the computation."""
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
