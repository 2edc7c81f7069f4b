"""Checkpoint folders for tests: real in every file, with small random weights and the demo models' vocabularies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.chat import CHAT_MODELS
from chatglm.checkpoints.files import ModelLoadError
from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.demo import with_vocabulary_of
from chatglm.loading import model_class

SIZES: dict[int, dict[str, Any]] = {
    1: {"num_layers": 2, "hidden_size": 32, "inner_hidden_size": 64, "num_attention_heads": 2},
    2: {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2, "kv_channels": 16,
        "multi_query_group_num": 1, "seq_length": 8192,
    },
}  # fmt: skip
SIZES[3] = SIZES[2]


def make_folder(folder: Path, version: int, *, shard: str = "1GB", **changes: Any) -> Path:
    """A folder with config, tokenizer and random float32 weights of this generation. `shard`: size of a weight file."""
    source = with_vocabulary_of(version)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".model"):
            shutil.copy(path, folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"chatglm_version": version}))
    values = json.loads((folder / "config.json").read_text())
    config = ChatGLMConfig.from_dict(values | SIZES[version] | {"chatglm_version": version} | changes)
    torch.manual_seed(0)
    model_class(config)(config).float().save_pretrained(folder, max_shard_size=shard)
    return folder


def to_bin(folder: Path) -> Path:
    """Turns the weight files of a folder into files of torch.save, named as in the original repositories."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / _bin_name(path.name))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: _bin_name(shard) for name, shard in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()
    return folder


def _bin_name(name: str) -> str:
    return f"pytorch_{name.removesuffix('.safetensors')}.bin"


def error_of(call: Callable[[], Any], kind: type[Exception] = ModelLoadError) -> str:
    """The one line that a call fails with."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def names_of(version: int) -> Any:
    """The names of the parts of this generation's models."""
    return CHAT_MODELS[version].part_names
