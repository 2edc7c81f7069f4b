"""Adapters from every form of their files, and files that hold none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_chat
from chatglm import adapters, load
from tiny_adapters import error_of, every_version, logits, make_lora, make_prefix, tiny, trained
from tiny_folders import to_bin


@every_version
@pytest.mark.parametrize("kind", ["table", "projected"])
def test_every_form_of_a_prefix(version: int, kind: str, tmp_path: Path) -> None:
    paths = trained(version)
    model = tiny(version)
    adapters.load_adapter(model, paths[kind])
    expected = logits(model)
    tensors = load_file(paths[kind] / "model.safetensors")
    forms = {name: tmp_path / name for name in ("bin", "half", "short", "whole", "shards", "whole_bin")}
    for name in ("bin", "half", "short"):
        forms[name].mkdir()
    torch.save(tensors, forms["bin"] / "pytorch_model.bin")
    torch.save({key.removeprefix("transformer."): value for key, value in tensors.items()},
               forms["short"] / "pytorch_model.bin")  # fmt: skip
    save_file({key: value.half() for key, value in tensors.items()}, forms["half"] / "model.safetensors")
    model.save_pretrained(forms["whole"])
    model.save_pretrained(forms["shards"], max_shard_size="20KB")
    model.save_pretrained(forms["whole_bin"])
    to_bin(forms["whole_bin"])
    for name, path in [*forms.items(), ("file", forms["bin"] / "pytorch_model.bin")]:
        fresh = tiny(version)
        adapters.load_adapter(fresh, path, "one")
        if name == "half":
            torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=0.05)
        else:
            assert torch.equal(logits(fresh), expected), name


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickles_that_run_code_are_refused(file: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was run"),)

    torch.save({"transformer.prefix_encoder.embedding.weight": Evil()}, tmp_path / file)
    if file.startswith("adapter"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    assert "not a file of weights" in error_of(lambda: adapters.load_adapter(tiny(3), tmp_path))
    assert not (tmp_path / "was run").exists()


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    model = tiny(3)
    (tmp_path / "out" / "checkpoint-900").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1000").mkdir()
    assert "did you mean " in (text := error_of(lambda: adapters.load_adapter(model, tmp_path / "out")))
    assert "checkpoint-1000?" in text
    lora = make_lora(tmp_path / "lora", model)
    assert "is a LoRA adapter: load the model it was made for" in error_of(lambda: load(lora))
    prefix = make_prefix(tmp_path / "prefix", model)
    assert "load the model it was trained for (base), with this as adapter" in error_of(lambda: load(prefix))
    config = json.loads((lora / "adapter_config.json").read_text())
    for change, words in (
        ({"peft_type": "PREFIX_TUNING"}, "of type 'PREFIX_TUNING'"),
        ({"trainable_token_indices": [1]}, "replaces rows of the embeddings (trainable_token_indices"),
        ({"modules_to_save": ["output_layer"]}, "transformer.output_layer.weight"),
        ({"modules_to_save": ["mlp"]}, "mlp is a part with several layers"),
        ({"r": "three"}, ""),
    ):
        (lora / "adapter_config.json").write_text(json.dumps(config | change))
        assert words in error_of(lambda: adapters.load_adapter(model, lora))
    (lora / "adapter_config.json").write_text("{")
    assert "not valid JSON" in error_of(lambda: adapters.load_adapter(model, lora))
    (lora / "adapter_config.json").write_text(json.dumps(config))
    os.truncate(lora / "adapter_model.safetensors", 999)
    assert "is cut off" in error_of(lambda: adapters.load_adapter(model, lora))
    (lora / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in error_of(lambda: adapters.load_adapter(model, lora))
    assert model.adapter_names == []


@every_version
@pytest.mark.parametrize("kind", ["table", "lora"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none(
    version: int, kind: str, value: float, tmp_path: Path
) -> None:
    paths = trained(version)
    folder = Path(shutil.copytree(paths[kind], tmp_path / kind))
    file = folder / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    model = tiny(version)
    message = error_of(lambda: adapters.load_adapter(model, folder))
    assert f"{folder} holds NaN or infinite values (in " in message and "take an earlier checkpoint" in message
    assert model.adapter_names == []
    assert error_of(lambda: load(tiny_chat.FOLDERS[version], "cpu", adapter=folder)) == message
