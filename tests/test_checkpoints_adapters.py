"""A prefix is found whatever its files are called, and anything else is reported as no prefix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm.loading import load
from tiny_folders import error_of, make_folder

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="session", params=[(1, False), (1, True), (2, False), (2, True), (3, False)], ids=str)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A base folder, the folder of a prefix for it as the originals' trainers write it, and the prefix length."""
    version, projection = request.param
    root = tmp_path_factory.mktemp("tuned")
    with_prefix = make_folder(root / "tuned", version, pre_seq_len=5, prefix_projection=projection)
    base = make_folder(root / "base", version)
    tensors = load_file(with_prefix / "model.safetensors")
    prefix = {name: tensor for name, tensor in tensors.items() if ".prefix_encoder." in name}
    assert len(prefix) == (5 if projection else 1)
    (with_prefix / "model.safetensors").unlink()
    torch.save(prefix, with_prefix / "pytorch_model.bin")
    return base, with_prefix, 5


@pytest.mark.parametrize("kind", ["folder", "bin", "safetensors"])
def test_prefix_is_found_out_from_the_file(tuned: tuple[Path, Path, int], kind: str, tmp_path: Path) -> None:
    base, adapter, length = tuned
    expected = torch.load(adapter / "pytorch_model.bin", weights_only=True)
    if kind == "bin":
        adapter = adapter / "pytorch_model.bin"
    elif kind == "safetensors":
        adapter = tmp_path / "model.safetensors"
        save_file(expected, adapter)
    model, _ = load(base, adapter=adapter, dtype="bfloat16")
    assert model.config.pre_seq_len == length
    loaded = model.transformer.prefix_encoder.state_dict()
    assert len(loaded) == len(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name.split("prefix_encoder.")[1]], tensor, rtol=0, atol=0)
    assert model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_prefix_changes_the_answer(tuned: tuple[Path, Path, int]) -> None:
    base, adapter, _ = tuned
    outputs = []
    for model, tokenizer in (load(base), load(base, adapter=adapter)):
        inputs = tokenizer("你好", return_tensors="pt")
        with torch.no_grad():
            outputs.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(*outputs)


def test_prefix_for_another_model(tuned: tuple[Path, Path, int], tmp_path: Path) -> None:
    base, adapter, _ = tuned
    version = int(json.loads((base / "config.json").read_text())["chatglm_version"])
    other = make_folder(tmp_path / "other", version, num_layers=3)
    assert "is for another model" in error_of(lambda: load(other, adapter=adapter))


def test_a_prefix_is_no_model(tuned: tuple[Path, Path, int]) -> None:
    assert "is a P-tuning prefix: load the model it was trained for" in error_of(lambda: load(tuned[1]))


def test_a_prefix_that_config_asks_for_and_nobody_has(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pre_seq_len": 5}))
    assert "adapter=" in error_of(lambda: load(folder))


def test_a_model_is_no_prefix(whole_folder: Path) -> None:
    assert "not a P-tuning checkpoint" in error_of(lambda: load(whole_folder, adapter=whole_folder))


def test_missing_prefix(whole_folder: Path, tmp_path: Path) -> None:
    assert "no prefix checkpoint" in error_of(lambda: load(whole_folder, adapter=tmp_path / "nothing.bin"))
    assert "holds no prefix" in error_of(lambda: load(whole_folder, adapter=tmp_path))


def test_lora_is_not_a_prefix(whole_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA" in error_of(lambda: load(whole_folder, adapter=tmp_path))
