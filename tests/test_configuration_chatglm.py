"""config.json as other programs write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel

from chatglm import ChatGLMConfig, load
from tiny_folders import make_folder

VERSIONS = (1, 2, 3)


def values_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def write(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("version", VERSIONS)
def test_numbers_and_truth_values_as_strings(version: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", version)
    values, wanted = values_of(folder), AutoConfig.from_pretrained(folder)
    texts = {name: str(value) for name, value in values.items() if isinstance(value, (bool, int, float))}
    assert {"num_layers", "hidden_size", "layernorm_epsilon", "use_cache", "chatglm_version"} <= texts.keys()
    write(folder, values | texts)
    for config in (AutoConfig.from_pretrained(folder), ChatGLMConfig.from_pretrained(folder), load(folder)[0].config):
        assert {name: getattr(config, name) for name in texts} == {name: getattr(wanted, name) for name in texts}
        assert type(config) is type(wanted)
    AutoModel.from_pretrained(folder)
    loaded = load(folder)[1].encode("你好")
    write(folder, values)
    assert loaded == load(folder)[1].encode("你好")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_layers", " 2 ", 2), ("num_layers", 2.0, 2), ("num_hidden_layers", "2", 2),
        ("layernorm_epsilon", "1E-5", 1e-5), ("use_cache", "false", False), ("use_cache", "True", True),
        ("pre_seq_len", "None", None),
        ("pre_seq_len", "null", None), ("quantization_bit", "0", 0), ("eos_token_id", "2", 2),
        ("rope_precision", "original", "original"),
    ],
)  # fmt: skip
def test_what_a_string_means(name: str, text: Any, value: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 2)
    write(folder, values_of(folder) | {name: text})
    found = getattr(AutoConfig.from_pretrained(folder), name)
    assert found == value and type(found) is type(value)


def test_quantisation_as_strings(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 1)
    load(folder, quantize=4)[0].save_pretrained(folder)
    values = values_of(folder)
    settings = {name: value if value is None else str(value) for name, value in values["quantization_config"].items()}
    assert settings["bits"] == "4"
    texts = {"quantization_config": settings, "quantization_bit": "4", "quantization_embeddings": "False"}
    write(folder, values | texts)
    for model in (load(folder)[0], AutoModel.from_pretrained(folder)):
        assert model.quantized and model.config.quantization_bit == 4


@pytest.mark.parametrize(("name", "text"), [("num_layers", "two"), ("layernorm_epsilon", ""), ("use_cache", "perhaps")])
def test_a_string_that_is_no_value(name: str, text: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 2)
    write(folder, values_of(folder) | {name: text})
    for call in (AutoConfig.from_pretrained, load):
        with pytest.raises(ValueError, match=f"{name} in config.json is the text '{text}': write a"):
            call(folder)
