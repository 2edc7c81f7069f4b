"""Weights that do not fit config.json are named with the cure, before they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from chatglm import load
from tiny_folders import error_of, make_folder, to_bin

VERSIONS = (1, 2, 3)
BIN = "pytorch_model.bin"


def edit(folder: Path, **changes: object) -> None:
    """Changes fields of config.json; None removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def quantised(folder: Path, bits: int) -> Path:
    load(folder, quantize=bits)[0].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_without_a_word_in_the_config(tmp_path: Path, version: int, bits: int) -> None:
    folder = quantised(make_folder(tmp_path / "model", version), bits)
    edit(folder, quantization_bit=None, quantization_config=None)
    text = error_of(lambda: load(folder))
    assert f"are quantised to {bits} bits" in text and f'add "quantization_bit": {bits}' in text
    text = error_of(lambda: AutoModel.from_pretrained(folder))
    assert "are quantised" in text and "quantization_bit" in text
    edit(folder, quantization_bit=bits)  # the cure
    assert load(folder)[0].config.quantization_bit == bits


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_config_says_other_bits(tmp_path: Path, version: int, bits: int) -> None:
    folder = quantised(make_folder(tmp_path / "model", version), bits)
    edit(folder, quantization_bit=12 - bits, quantization_config=None)
    text = error_of(lambda: load(folder))
    assert f"quantised to {bits} bits" in text and text.endswith(f"(and bits in quantization_config) to {bits}")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_config_of_a_quantised_model_beside_plain_weights(tmp_path: Path, version: int, bits: int) -> None:
    folder = make_folder(tmp_path / "model", version)
    edit(folder, quantization_bit=bits)
    assert "they are not: remove quantization_bit" in error_of(lambda: load(folder))
    assert "they are not: remove quantization_bit" in error_of(lambda: AutoModel.from_pretrained(folder))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("more", [8, -8])
def test_resized_embeddings_with_the_old_vocab_size(tmp_path: Path, version: int, more: int) -> None:
    folder = to_bin(make_folder(tmp_path / "model", version))
    weights = torch.load(folder / BIN, weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    key = "vocab_size" if version == 1 else "padded_vocab_size"
    rows = config[key] + more
    for name, tensor in weights.items():
        if "word_embeddings" in name or "lm_head" in name or "output_layer" in name:
            weights[name] = torch.cat((tensor, tensor[:8]))[:rows].clone()
    torch.save(weights, folder / BIN)
    for call in (load, AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        text = error_of(lambda call=call: call(folder))
        assert f"({rows}, 32) in the file, ({config[key]}, 32) by config.json" in text
        assert f"set {key} to {rows}" in text
    edit(folder, **{key: rows})  # the cure
    assert load(folder)[0].get_input_embeddings().num_embeddings == rows
