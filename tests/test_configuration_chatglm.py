"""config.json as other programs write and read it, and the names that configs have besides their fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig

from chatglm import ChatGLMConfig, load
from chatglm.loading import model_class
from tiny_folders import make_folder
from tiny_networks import tiny_config

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


#: What engines read from the config.json of a ChatGLM2 or ChatGLM3, and take another value for if it is missing: vLLM,
#: SGLang, llama.cpp's converter, OpenVINO's exporter (optimum).
ENGINES = """
    num_layers padded_vocab_size hidden_size ffn_hidden_size kv_channels num_attention_heads seq_length hidden_dropout
    attention_dropout layernorm_epsilon rmsnorm apply_residual_connection_post_layernorm post_layer_norm add_bias_linear
    add_qkv_bias multi_query_attention multi_query_group_num apply_query_key_layer_scaling attention_softmax_in_fp32
    fp32_residual_connection bias_dropout_fusion quantization_bit pre_seq_len prefix_projection rope_ratio
    tie_word_embeddings eos_token_id pad_token_id model_type
    """


def saved(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_names_that_other_programs_know(version: int, dtype: torch.dtype, tmp_path: Path) -> None:
    name = {1: "THUDM/chatglm-6b", 2: "THUDM/chatglm2-6b", 3: "THUDM/chatglm3-6b"}[version]
    config = tiny_config(version, _name_or_path=name)
    values = saved(model_class(config)(config).to(dtype), tmp_path)
    assert values["architectures"] == ["ChatGLMModel"]  # as in the published files of all generations
    assert values["_name_or_path"] == name and "auto_map" not in values
    assert values["torch_dtype"] == values["dtype"] == str(dtype).removeprefix("torch.")
    if version > 1:
        assert {key: values[key] for key in ENGINES.split()} == {key: getattr(config, key) for key in ENGINES.split()}
    again = AutoModel.from_pretrained(tmp_path)
    assert (again.dtype, again.config.dtype) == (dtype, dtype)
    assert saved(again, tmp_path / "twice") == values
    assert PreTrainedConfig.from_dict(values).dtype == dtype


@pytest.mark.parametrize("version", [2, 3])
def test_a_classifier_keeps_its_name(version: int, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_config(tiny_config(version, num_labels=3))
    assert saved(classifier, tmp_path)["architectures"] == ["ChatGLMForSequenceClassification"]
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is type(classifier)


@pytest.mark.parametrize("version", [2, 3])
def test_the_number_of_key_value_heads(version: int, tmp_path: Path) -> None:
    """PEFT reads it in `to_dict()`; it is no field of its own."""
    config = tiny_config(version)
    values = config.to_dict()
    assert values["num_key_value_heads"] == config.num_key_value_heads == 2
    assert type(config)(**values).to_dict() == values
    assert ChatGLMConfig.from_dict(values | {"multi_query_group_num": 1}).num_key_value_heads == 1
    assert tiny_config(version, multi_query_attention=False).to_dict()["num_key_value_heads"] == 4
    with pytest.raises(ValueError, match="num_key_value_heads is 2, not 3"):
        type(config)(**values | {"num_key_value_heads": 3})
    config.save_pretrained(tmp_path)
    assert "num_key_value_heads" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert ChatGLMConfig.from_pretrained(tmp_path).num_key_value_heads == 2


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_separator_that_no_model_has(version: int, tmp_path: Path) -> None:
    config = tiny_config(version)
    assert config.sep_token_id is None and "sep_token_id" not in config.to_dict()
    config.sep_token_id = 5  # a checkpoint may name one
    config.save_pretrained(tmp_path)
    assert ChatGLMConfig.from_pretrained(tmp_path).sep_token_id == 5
