"""Checks which base model an adapter was trained on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints.adapters import Adapter, Prefix, describe, generation_of
from ..checkpoints.files import ModelLoadError

SAMPLES = 64  # values in a fingerprint


def check_generation(model: PreTrainedModel, adapter: Adapter) -> None:
    """Raises ModelLoadError if an adapter's config says that it was trained for another generation."""
    ours, config = model.config.chatglm_version, adapter.config
    base = config.get("base_model_name_or_path") or config.get("_name_or_path")
    theirs = generation_of(config, base)
    if theirs is not None and theirs != ours:
        kind = "prefix" if isinstance(adapter, Prefix) else "LoRA adapter"
        raise ModelLoadError(
            f"the {kind} {adapter.path} is for another model: it was trained for ChatGLM of generation {theirs}"
            f"{f' ({base})' if base else ''}, this one is {describe(model.config.to_dict())}"
        )


def fingerprint(model: PreTrainedModel) -> str | None:
    """Tells base models apart: some values of their norms and biases, as float16 in hexadecimal.

    Quantising leaves those unchanged. None if some of them are not in memory.
    """
    vectors = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter.detach()
        for name, parameter in model.base_model.named_parameters()
        if parameter.dim() == 1 and not name.endswith("weight_scale") and "prefix_encoder." not in name
        and "lora_" not in name and ".modules_to_save." not in name
    }  # fmt: skip
    if not vectors or any(vector.is_meta or not vector.numel() for vector in vectors.values()):
        return None
    numbers = torch.cat([vectors[name].reshape(-1).float().cpu() for name in sorted(vectors)])
    places = torch.linspace(0, len(numbers) - 1, SAMPLES).long()
    return numbers[places].clamp(-65504, 65504).half().numpy().astype("<f2").tobytes().hex()


def same_base(one: str | None, other: Any) -> bool:
    """Whether two fingerprints are of the same weights; either model may have been rounded to bfloat16."""
    if one is None or not isinstance(other, str) or len(one) != len(other):
        return True  # nothing to compare: no reason to warn
    try:
        ours, theirs = (torch.frombuffer(bytearray.fromhex(text), dtype=torch.float16) for text in (one, other))
    except ValueError:
        return True
    return torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-4)
