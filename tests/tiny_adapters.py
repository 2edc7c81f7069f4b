"""Tiny models, and prefixes and LoRA adapters for them, saved in folders."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny_chat
from chatglm import adapters
from chatglm.checkpoints.files import ModelLoadError

VERSIONS = (1, 2, 3)
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

every_version = pytest.mark.parametrize("version", VERSIONS)


def tiny(version: int, dtype: torch.dtype = torch.float32, bits: int = 0) -> Any:
    model = copy.deepcopy(tiny_chat.pair(version)[0]).to(dtype)
    return model.quantize(bits) if bits else model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8, model.config.bos_token_id or 9, 10, 11]])
    if model.config.chatglm_version == 1:
        ids[0, 3] = model.config.gmask_token_id
    return model(ids).logits


def randomise(model: Any, seed: int = 0) -> None:
    """Stands in for training: changes the trainable parameters."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)


def lora_config(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["query_key_value"]} | changes)


def exchange_with_peft(folder: Path, version: int, **changes: Any) -> tuple[Any, Any]:
    """Random LoRA that PEFT saves, we read and save, and PEFT reads: it computes the same each time.

    Returns:
        Our model and PEFT's.
    """
    wrapped = peft.get_peft_model(tiny(version), lora_config(**changes))
    randomise(wrapped)
    expected = logits(wrapped.get_base_model())
    wrapped.save_pretrained(folder / "peft", save_embedding_layers=False)
    model = tiny(version)
    adapters.load_adapter(model, folder / "peft", "one")
    assert torch.equal(logits(model), expected)
    adapters.save_adapter(model, folder / "ours", "nowhere")
    again = peft.PeftModel.from_pretrained(tiny(version), str(folder / "ours"))
    assert torch.equal(logits(again.get_base_model()), expected)
    return model, again


def make_prefix(folder: Path, model: Any, length: int = 4, projection: bool = False, seed: int = 0) -> Path:
    model = copy.deepcopy(model)
    adapters.add_prefix(model, length, projection)
    randomise(model, seed)
    adapters.save_prefix(model, folder, "base")
    return folder


def make_lora(folder: Path, model: Any, seed: int = 0, **changes: Any) -> Path:
    model = copy.deepcopy(model)
    adapters.add_lora(model, lora_config(**changes))
    randomise(model, seed)
    adapters.save_adapter(model, folder, "base")
    return folder


def error_of(action: Any, kind: type[Exception] = ModelLoadError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


@cache
def trained(version: int) -> dict[str, Path]:
    """Two prefixes and two LoRA adapters for the tiny model of a generation; not to be written to."""
    model, root = tiny(version), Path(tempfile.mkdtemp(prefix="chatglm-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return {
        "table": make_prefix(root / "table", model),
        "projected": make_prefix(root / "projected", model, 3, True, seed=1),
        "lora": make_lora(root / "lora", model, seed=2),
        "everywhere": make_lora(root / "everywhere", model, seed=3, target_modules=LINEARS, use_rslora=True),
    }
