"""Folders that cannot be loaded: one clear line for each, before anything is read into memory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm.loading import load
from tiny_folders import error_of, make_folder, to_bin

pytestmark = pytest.mark.usefixtures("no_network")

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 1980000000\n"


def test_missing_folder(tmp_path: Path) -> None:
    text = error_of(lambda: load(tmp_path / "nowhere"))
    assert f"no folder {tmp_path / 'nowhere'}" in text


def test_a_file_is_no_folder(folder: Path) -> None:
    assert "give the folder" in error_of(lambda: load(folder / "model.safetensors"))


def test_empty_folder(tmp_path: Path) -> None:
    assert "no config.json" in error_of(lambda: load(tmp_path))


def test_the_folder_above_names_the_right_one(folder: Path) -> None:
    assert f"did you mean the folder {folder}?" in error_of(lambda: load(folder.parent))


def test_folder_of_another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in error_of(lambda: load(folder))


@pytest.mark.parametrize("content", ["{", "[]", ""], ids=["cut off", "a list", "empty"])
def test_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in error_of(lambda: load(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights (model.safetensors, pytorch_model.bin" in error_of(lambda: load(folder))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 3, shard="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    text = error_of(lambda: load(folder))
    assert f"1 of {len(shards)} weight files" in text
    assert shards[1].name in text


def test_index_without_a_map(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 3, shard="40KB")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "model.safetensors.index.json has no weight_map" in error_of(lambda: load(folder))


@pytest.mark.parametrize("left", [4, 100, 0.5, -1], ids=["4 bytes", "in the header", "half", "last byte"])
def test_cut_off_safetensors(folder: Path, left: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left) if 0 < left < 1 else int(left)])
    text = error_of(lambda: load(folder))
    assert str(path) in text
    assert "download it again" in text
    if left in (0.5, -1):
        assert f"of {len(whole)} bytes" in text


def test_safetensors_with_something_at_the_end(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "is broken" in error_of(lambda: load(folder))


@pytest.mark.parametrize("left", [100, 0.5, -1], ids=["100 bytes", "half", "last byte"])
def test_cut_off_bin(folder: Path, left: float) -> None:
    path = to_bin(folder) / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left) if 0 < left < 1 else int(left)])
    text = error_of(lambda: load(folder))
    assert f"{path} is cut off" in text


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><title>404</title>", b"\x80\x02garbage", b"\0" * 1000])
@pytest.mark.parametrize("torch_file", [False, True], ids=["safetensors", "bin"])
def test_weights_that_are_something_else(folder: Path, content: bytes, torch_file: bool) -> None:
    path = folder / "model.safetensors"
    if torch_file:
        path = to_bin(folder) / "pytorch_model.bin"
    path.write_bytes(content)
    assert str(path) in error_of(lambda: load(folder))


def test_code_in_a_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "it_ran"),))

    path = to_bin(folder) / "pytorch_model.bin"
    torch.save({"transformer.output_layer.weight": Evil()}, path)
    assert str(path) in error_of(lambda: load(folder))
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_git_lfs_pointers(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS_POINTER)
    text = error_of(lambda: load(folder))
    assert f"{folder / name} is only a git-lfs pointer" in text
    assert "git lfs pull" in text


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_empty_files(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    assert f"{folder / name} is empty" in error_of(lambda: load(folder))


def test_no_vocabulary(any_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(any_folder, tmp_path / any_folder.name))
    vocabulary = next(folder.glob("*.model"))
    vocabulary.unlink()
    assert f"has no {vocabulary.name}" in error_of(lambda: load(folder))


def test_broken_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"no vocabulary" * 100)
    assert "cannot read the tokenizer files" in error_of(lambda: load(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_hidden_size": 80}))
    text = error_of(lambda: load(folder))
    assert "do not fit together" in text
    assert "layers.0.mlp.dense_4h_to_h.weight: (32, 48) in the file, (32, 80) by config.json" in text


def test_a_lost_tensor_is_an_error_and_not_noise(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = error_of(lambda: load(folder))
    assert "lack tensors of the model (transformer.encoder.layers.1.mlp.dense_4h_to_h.weight)" in text
    assert capfd.readouterr() == ("", "")


def test_weights_of_a_deeper_model_are_not_cut_down_in_silence(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    text = error_of(lambda: load(folder))
    assert "hold tensors that config.json has no place for (transformer.encoder.layers.1.input_layernorm" in text
    assert "and 4 more" in text
