"""Tensors under the names that training programs give them load; missing ones are never random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from chatglm import load
from chatglm.checkpoints.files import read_contents
from tiny_folders import error_of, make_folder, to_bin

VERSIONS = (1, 2, 3)
BIN = "pytorch_model.bin"


def renamed(folder: Path, rename: Any) -> dict[str, torch.Tensor]:
    """Renames the tensors in the file of a folder; returns them under the names that they had."""
    to_bin(folder)
    weights = torch.load(folder / BIN, weights_only=True)
    torch.save({rename(name): tensor for name, tensor in weights.items()}, folder / BIN)
    return dict(weights)


def assert_holds(model: Any, weights: dict[str, torch.Tensor]) -> None:
    here = model.state_dict()
    assert all(torch.equal(here[name], tensor.to(here[name].dtype)) for name, tensor in weights.items())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("front", ["module.", "_orig_mod.", "base_model.model.", "model.", "module._orig_mod."])
def test_names_with_a_wrapper_in_front(tmp_path: Path, version: int, front: str) -> None:
    folder = make_folder(tmp_path / "model", version)
    weights = renamed(folder, lambda name: front + name)
    assert_holds(load(folder)[0], weights)
    assert_holds(AutoModel.from_pretrained(folder), weights)


@pytest.mark.parametrize("version", VERSIONS)
def test_blocks_compiled_one_by_one(tmp_path: Path, version: int) -> None:
    folder = make_folder(tmp_path / "model", version)
    weights = renamed(folder, lambda name: name.replace(".layers.1.", ".layers.1._orig_mod."))
    assert_holds(load(folder)[0], weights)


@pytest.mark.parametrize("version", (2, 3))
def test_the_head_under_the_name_of_other_models(tmp_path: Path, version: int) -> None:
    folder = make_folder(tmp_path / "model", version)
    weights = renamed(folder, lambda name: name.replace("transformer.output_layer", "lm_head"))
    assert_holds(load(folder)[0], weights)
    assert_holds(AutoModel.from_pretrained(folder), weights)


def test_wrapped_weights_are_quantised_while_loading(tmp_path: Path) -> None:
    plain, wrapped = make_folder(tmp_path / "plain", 3), make_folder(tmp_path / "wrapped", 3)
    renamed(wrapped, lambda name: f"module.{name}")
    assert_holds(load(wrapped, quantize=4)[0], load(plain, quantize=4)[0].state_dict())


def test_saving_leaves_the_wrapper_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 2)
    weights = renamed(folder, lambda name: f"module.{name}")
    load(folder)[0].save_pretrained(tmp_path / "saved")
    assert set(read_contents(tmp_path / "saved" / "model.safetensors")) == set(weights)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_value_head_of_rlhf_is_left_out_with_a_warning(tmp_path: Path, version: int) -> None:
    folder = to_bin(make_folder(tmp_path / "model", version))
    weights = torch.load(folder / BIN, weights_only=True)
    torch.save(weights | {"v_head.summary.weight": torch.ones(1, 32)}, folder / BIN)
    with pytest.warns(UserWarning, match=r"RLHF \(v_head.summary.weight\): it is left out") as caught:
        model, _ = load(folder)
    assert caught[0].filename == __file__
    assert_holds(model, weights)


def test_a_lora_among_the_weights_is_named(tmp_path: Path) -> None:
    folder = to_bin(make_folder(tmp_path / "model", 2))
    weights = torch.load(folder / BIN, weights_only=True)
    name = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.default.weight"
    torch.save(weights | {name: torch.ones(2, 32)}, folder / BIN)
    assert "merge it with PEFT (merge_and_unload)" in error_of(lambda: load(folder))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("unknown", ["student.", "0."])
def test_missing_tensors_are_an_error_in_every_loader(tmp_path: Path, version: int, unknown: str) -> None:
    folder = make_folder(tmp_path / "model", version)
    renamed(folder, lambda name: unknown + name)
    for text in (error_of(lambda: load(folder)), error_of(lambda: AutoModel.from_pretrained(folder))):
        assert "lack tensors of the model" in text and f"they hold {unknown}" in text


def test_a_classifier_starts_from_the_weights_of_a_chat_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = make_folder(tmp_path / "model", 2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 3}))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.classifier_head.out_features == 3
