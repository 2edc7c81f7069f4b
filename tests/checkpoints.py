"""Folders like the original repositories: the real config.json, shrunk; random weights in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conftest import SHARED
from goldens import causal_lm, make_config

VERSION = {"chatglm-6b-v1.0": 1, "chatglm-6b": 1, "chatglm2-6b": 2, "chatglm3-6b": 3}
LAYOUTS = ("bin", "bin_shards", "safetensors", "safetensors_shards")
NUM_LAYERS = 2
SHRUNK: dict[int, dict[str, Any]] = {
    1: {"num_layers": NUM_LAYERS, "hidden_size": 16, "num_attention_heads": 2, "inner_hidden_size": 32},
    2: {
        "num_layers": NUM_LAYERS,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "kv_channels": 8,
        "multi_query_group_num": 1,
        "ffn_hidden_size": 24,
        "seq_length": 256,
    },
}
SHRUNK[3] = SHRUNK[2]
REMOTE_CODE = 'raise RuntimeError("code of the checkpoint folder was run")\n'


def original_config(name: str) -> dict[str, Any]:
    """config.json of ../shared/checkpoints/`name` with all its keys, but toy sizes."""
    values = json.loads((SHARED / "checkpoints" / name / "config.json").read_text(encoding="utf-8"))
    return values | SHRUNK[VERSION[name]]


def original_names(name: str) -> list[str]:
    """The tensors of the published checkpoint, up to the layers that the toy has."""
    index = json.loads((SHARED / "checkpoints" / name / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    dropped = tuple(f".layers.{layer}." for layer in range(NUM_LAYERS, 28))
    return [tensor for tensor in index["weight_map"] if not any(part in tensor for part in dropped)]


def original_state(name: str) -> dict[str, torch.Tensor]:
    """Random fp16 weights under the published names, including the leftovers that no model needs."""
    version = VERSION[name]
    shapes = causal_lm(version)(make_config(version, original_config(name))).state_dict()
    generator = torch.Generator().manual_seed(version)
    state = {}
    for tensor in original_names(name):
        if tensor.endswith("inv_freq"):
            state[tensor] = torch.ones(2).half()
        elif "layernorm" in tensor:
            state[tensor] = torch.ones(shapes[tensor].shape).half()
        else:
            state[tensor] = torch.randn(shapes[tensor].shape, generator=generator).mul_(0.2).half()
    if version == 1:  # both copies of the tied matrix are in the published files
        state["lm_head.weight"] = state["transformer.word_embeddings.weight"].clone()
    return state


def write_checkpoint(
    folder: Path, name: str, layout: str = "safetensors", *, tokenizer: bool = False, remote_code: bool = False
) -> Path:
    """Makes `folder` look like the original repository `name`; `remote_code` adds .py files, which raise when run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original_config(name), indent=2), encoding="utf-8")
    state = original_state(name)
    suffix, save = ("bin", torch.save) if layout.startswith("bin") else ("safetensors", save_file)
    stem = "pytorch_model" if suffix == "bin" else "model"
    if layout.endswith("shards"):
        halves = [dict(list(state.items())[part::2]) for part in (0, 1)]
        files = [f"{stem}-0000{part}-of-00002.{suffix}" for part in (1, 2)]
        for half, file in zip(halves, files, strict=True):
            save(half, folder / file)
        weight_map = {tensor: file for half, file in zip(halves, files, strict=True) for tensor in half}
        size = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        save(state, folder / f"{stem}.{suffix}")
    if tokenizer:
        for file in ("tokenizer_config.json", "ice_text.model", "tokenizer.model"):
            if (SHARED / "checkpoints" / name / file).exists():
                shutil.copyfile(SHARED / "checkpoints" / name / file, folder / file)
    if remote_code:
        for module in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm", "quantization"):
            (folder / f"{module}.py").write_text(REMOTE_CODE, encoding="utf-8")
    return folder
