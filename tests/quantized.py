"""Helpers for the tests of quantisation: tiny float models in folders, and comparison of quantised models."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from chatglm.quantization import QuantizedEmbedding, QuantizedLinear
from goldens import find

VERSIONS = (1, 2, 3)
BITS = (4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"quantize_embeddings": True},
    {"quantize_head": 8},
    {"quantize_embeddings": True, "quantize_head": 8},
]
OPTION_IDS = ["blocks", "embeddings", "head", "embeddings and head"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@cache
def folder_of(version: int) -> Path:
    """The tiny float model of a generation, in a folder whose config says its generation."""
    root = Path(tempfile.mkdtemp(prefix="chatglm-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    path = root / f"chatglm{version}"
    shutil.copytree(find(f"v{version if version != 2 else 3}/model"), path)
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    values["chatglm_version"] = version
    (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return path


def model_of(version: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model of `folder_of`."""
    return AutoModel.from_pretrained(folder_of(version), dtype=dtype, **options)


def prompt(model: Any) -> torch.Tensor:
    config = model.config
    ids = [5, 6, 7, 8]
    if config.chatglm_version == 1:
        ids += [config.gmask_token_id, config.bos_token_id]
    return torch.tensor([ids], device=model.device)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(prompt(model)).logits


def assert_same(ours: nn.Module, other: nn.Module) -> None:
    """Every tensor of two models, bit for bit and of the same dtype."""
    left, right = ours.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.cpu(), right[name].cpu()), name


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
