"""The files that adapters are saved to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from chatglm import adapters
from tiny_adapters import error_of, every_version, logits, randomise, tiny, trained


@every_version
@pytest.mark.parametrize("kind", ["table", "projected"])
def test_a_saved_prefix_is_small_and_says_what_it_is(version: int, kind: str) -> None:
    paths = trained(version)
    tensors = load_file(paths[kind] / "model.safetensors")
    wanted = {"embedding.weight"} | ({"trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"}
                                     if kind == "projected" else set())  # fmt: skip
    assert set(tensors) == {f"transformer.prefix_encoder.{name}" for name in wanted}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    config = json.loads((paths[kind] / "config.json").read_text())
    assert (config["chatglm_version"], config["pre_seq_len"]) == (version, 4 if kind == "table" else 3)
    assert config["prefix_projection"] == (kind == "projected") and config["model_type"] == "chatglm"
    assert config["base_model_name_or_path"] == "base" and config["base_fingerprint"]
    assert {path.name for path in paths[kind].iterdir()} == {"model.safetensors", "config.json"}
    assert len({path.stat().st_mode for path in paths[kind].iterdir()}) == 1  # safetensors' are owner-only


@every_version
def test_a_failed_save_leaves_the_old_files(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = trained(version)
    for name in ("table", "lora"):
        model = tiny(version)
        adapters.load_adapter(model, paths[name])
        folder = tmp_path / name
        adapters.save_adapter(model, folder, "base")
        (folder / "optimizer.pt").write_text("of the trainer")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        randomise(model, 5)

        def full(tensors: Any, path: Path, **kwargs: Any) -> None:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(adapters.saving, "save_file", full)
            assert "No space left" in error_of(lambda m=model, f=folder: adapters.save_adapter(m, f), OSError)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        adapters.save_adapter(model, folder, "base")
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert set(after) == set(before) and after != before and after["optimizer.pt"] == before["optimizer.pt"]


def test_what_there_is_to_save() -> None:
    model = tiny(3)
    assert "no prefix None to save: this model has none" in error_of(
        lambda: adapters.save_prefix(model, "nowhere"), ValueError
    )
    adapters.add_prefix(model, 2, name="one")
    with model.prefix(None):
        assert "has one" in error_of(lambda: adapters.save_adapter(model, "nowhere"), ValueError)


@every_version
def test_save_pretrained(version: int, tmp_path: Path) -> None:
    """Saves what is in use: the model with its prefix, the base without it, or LoRA as transformers saves it."""
    paths = trained(version)
    model = tiny(version)
    adapters.load_adapter(model, paths["projected"])
    adapters.load_adapter(model, paths["table"])
    for name in ("projected", None):
        with model.adapter(name):
            model.save_pretrained(tmp_path / f"{name}")
            again, info = AutoModel.from_pretrained(tmp_path / f"{name}", output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            torch.testing.assert_close(logits(again.eval()), logits(model), rtol=1e-4, atol=1e-4)
    adapters.load_adapter(model, paths["lora"])
    model.name_or_path = str(tmp_path / "None")
    model.peft_config["lora"].base_model_name_or_path = str(tmp_path / "None")
    model.save_pretrained(tmp_path / "lora")
    again = tiny(version)
    adapters.load_adapter(again, tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))
