"""LoRA that begins with a part of the weights (PiSSA, OLoRA), saved so that it fits the base as it was.

PEFT subtracts the first product B0 A0 from the base: training then changes W - B0 A0 + B A. What is saved is the
difference B A - B0 A0, as plain LoRA of twice the rank, so that the adapter needs no decomposition where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chatglm.adapters.lora import FRONT, set_tensors
from chatglm.adapters.saving import save_adapter
from chatglm.checkpoints.adapters import LORA_CONFIG, LORA_WEIGHTS, import_peft, written_aside

from .arguments import ArgumentsError

_START = "_lora_start"  # where a model keeps A0 and B0


def remember_start(model: Any, name: str) -> None:
    """Keeps the matrices that a fresh adapter begins with."""
    tensors = import_peft().get_peft_model_state_dict(model, adapter_name=name)
    model.__dict__[_START] = {
        key: value.detach().cpu().clone() for key, value in tensors.items() if ".lora_" in key
    }


def has_start(model: Any) -> bool:
    """Whether `remember_start` was called for the model."""
    return _START in model.__dict__


def save_difference(
    model: Any, folder: Path, base: str, name: str, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """`save_adapter` of the difference. The errors are the same."""
    save_adapter(model, folder, base, name=name, state_dict=state_dict)
    given = None if state_dict is None else dict(state_dict)
    now = import_peft().get_peft_model_state_dict(model, state_dict=given, adapter_name=name)
    tensors = {
        f"{FRONT}{key.removeprefix(FRONT)}": value.detach().cpu().contiguous()
        for key, value in now.items()
        if ".lora_" not in key  # modules_to_save
    }
    for key, before in model.__dict__[_START].items():
        after = now[key].detach().cpu()
        first = ".lora_A." in key
        both = torch.cat((after, before), 0) if first else torch.cat((after, -before), 1)
        tensors[f"{FRONT}{key.removeprefix(FRONT)}"] = both.contiguous()
    config = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8"))
    config |= {"r": 2 * config["r"], "init_lora_weights": True,
               "lora_alpha": config["lora_alpha"] * (math.sqrt(2) if config["use_rslora"] else 2)}  # fmt: skip
    with written_aside(folder) as aside:
        save_file(tensors, aside / LORA_WEIGHTS[0], metadata={"format": "pt"})
        (aside / LORA_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def restore_difference(model: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads the trained half of a saved difference into the adapter that is being trained.

    Raises ArgumentsError if it began with other matrices than this run.
    """
    found, start = {}, model.__dict__[_START]
    for key, value in tensors.items():
        plain = key if key in start else key.removeprefix(FRONT)
        if ".lora_" not in key:
            found[plain] = value
            continue
        dim = 0 if ".lora_A." in key else 1
        after, before = value.chunk(2, dim)
        first = start[plain] if dim == 0 else -start[plain]
        if before.shape != first.shape or not torch.allclose(before.float(), first.float(), atol=1e-4):
            raise ArgumentsError(
                "the checkpoint began with another decomposition of the weights: resume with the base, seed, rank and "
                "--init_lora_weights that it was made with"
            )
        found[plain] = after.contiguous()
    set_tensors(model, found, name)
