"""Folders whose weights transformers does not find or read by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from chatglm import load
from tiny_folders import error_of, make_folder, to_bin

VERSIONS = (1, 2, 3)
BIN = "pytorch_model.bin"
INDEX = "model.safetensors.index.json"


def without_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def bin_without_index(folder: Path) -> None:
    (to_bin(folder) / f"{BIN}.index.json").unlink()


def without_metadata(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": content["weight_map"]}))


def bin_without_metadata(folder: Path) -> None:
    without_metadata(folder)
    to_bin(folder)


def whole_beside_a_stale_index(folder: Path) -> None:
    index = (folder / INDEX).read_text()
    torch.save(all_tensors(folder), folder / BIN)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / INDEX).write_text(index)


def inside(key: str) -> Callable[[Path], None]:
    def wrap(folder: Path) -> None:
        whole_beside_a_stale_index(folder)
        (folder / INDEX).unlink()
        torch.save({key: torch.load(folder / BIN, weights_only=True), "global_steps": 3}, folder / BIN)

    return wrap


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


FOLDERS: dict[str, Callable[[Path], None]] = {
    "shards without an index": without_index,
    "torch shards without an index": bin_without_index,
    "an index without metadata": without_metadata,
    "an index of torch files without metadata": bin_without_metadata,
    "a whole file beside a stale index": whole_beside_a_stale_index,
    "DeepSpeed": inside("module"),
    "Lightning": inside("state_dict"),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_unusual_folders_load_in_every_loader(tmp_path: Path, version: int, kind: str) -> None:
    folder = make_folder(tmp_path / "model", version, shard="20KB")
    wanted = all_tensors(folder)
    FOLDERS[kind](folder)
    models: tuple[Any, ...] = (
        load(folder)[0], AutoModel.from_pretrained(folder, dtype=torch.float32), AutoModel.from_pretrained(str(folder)),
    )  # fmt: skip
    for model in models:
        here = model.state_dict()
        assert all(torch.equal(here[name], tensor) for name, tensor in wanted.items())
        assert Path(model.config.name_or_path) == folder
        assert model.generation_config.eos_token_id == models[0].generation_config.eos_token_id


@pytest.mark.parametrize("kind", ["shards without an index", "DeepSpeed"])
def test_they_are_quantised_while_loading(tmp_path: Path, kind: str) -> None:
    folder = make_folder(tmp_path / "model", 2, shard="20KB")
    wanted = load(folder, quantize=8)[0].state_dict()
    FOLDERS[kind](folder)
    here = load(folder, quantize=8)[0].state_dict()
    assert all(torch.equal(here[name], tensor) for name, tensor in wanted.items())


def test_the_settings_for_generation_and_fields_of_the_config_hold(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 2, shard="20KB")
    without_index(folder)
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 0.25, "do_sample": True}))
    model = type(AutoModel.from_pretrained(folder)).from_pretrained(folder, seq_length=77)
    assert (model.generation_config.top_p, model.config.seq_length) == (0.25, 77)


@pytest.mark.parametrize("torch_files", [False, True])
def test_some_shards_without_an_index_are_named(tmp_path: Path, torch_files: bool) -> None:
    folder = make_folder(tmp_path / "model", 2, shard="20KB")
    (bin_without_index if torch_files else without_index)(folder)
    last = sorted(folder.glob("*-of-*"))[-1]
    last.unlink()
    text = error_of(lambda: load(folder))
    assert last.name in text and f"no {BIN if torch_files else 'model.safetensors'}.index.json" in text


def test_an_index_with_some_of_its_shards_is_not_stale(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 2, shard="20KB")
    torch.save(all_tensors(folder), folder / BIN)
    next(folder.glob("model-*.safetensors")).unlink()
    assert "weight files of model.safetensors.index.json are not in" in error_of(lambda: load(folder))
