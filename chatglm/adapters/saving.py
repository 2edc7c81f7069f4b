"""Saves adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..checkpoints.adapters import LORA_WEIGHTS, PREFIX, import_peft, written_aside
from ..network.slots import AdapterSlots
from .bases import fingerprint


def save_prefix(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    base: str | None = None,
    *,
    name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a prefix, and nothing else, as `model.safetensors` and `config.json`; files of these names are replaced.

    The tensors have the originals' names, `transformer.prefix_encoder.*`, in float32. The config is the base model's
    with `pre_seq_len` and `prefix_projection`, and says what the prefix was trained on: `chatglm_version`,
    `base_model_name_or_path` and `base_fingerprint`. Both are written aside first, then renamed.

    Args:
        base: the base model's folder or hub id to record; by default where it was loaded from.
        name: the prefix to save; by default the current one.
        state_dict: the gathered tensors, if a distributed run has sharded the model; by default the model's own.

    Raises:
        ValueError: no prefix is current, or there is none of this name.
        OSError: the files cannot be written; existing ones are left unchanged.
    """
    slots: AdapterSlots = model.adapter_slots
    name = slots.current if name is None else name
    encoder = slots.prefixes.get(name) if name is not None else None
    if encoder is None:
        names = ", ".join(slots.prefixes) or "none"
        raise ValueError(f"there is no prefix {name!r} to save: this model has {names}")
    given = {PREFIX.sub("", key): value for key, value in (state_dict or {}).items() if PREFIX.match(key)}
    tensors = {
        f"transformer.prefix_encoder.{key}": value.detach().float().cpu().contiguous()
        for key, value in (given or encoder.state_dict()).items()
    }
    config = json.loads(model.config.to_json_string())
    for key in ("quantization_config", "quantization_bit", "quantization_embeddings"):
        config.pop(key, None)  # a property of this base, not of the prefix
    config |= {
        "chatglm_version": model.config.chatglm_version,
        "pre_seq_len": encoder.pre_seq_len,
        "prefix_projection": encoder.trans is not None,
        "base_model_name_or_path": base or model.name_or_path or None,
        "base_fingerprint": encoder.base_fingerprint or fingerprint(model),
    }
    with written_aside(Path(folder)) as aside:
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    base: str | None = None,
    *,
    name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`save_prefix`, or for LoRA what PEFT saves: `adapter_model.safetensors` and `adapter_config.json`.

    It raises the same errors as `save_prefix`.
    """
    slots: AdapterSlots = model.adapter_slots
    name = slots.current if name is None else name
    if name not in slots.loras:
        return save_prefix(model, folder, base, name=name, state_dict=state_dict)
    peft = import_peft()
    given = None if state_dict is None else dict(state_dict)
    tensors = peft.get_peft_model_state_dict(model, state_dict=given, adapter_name=name, save_embedding_layers=False)
    tensors = {
        f"base_model.model.{key.removeprefix('base_model.model.')}": value.detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    config = peft.PeftConfig.from_peft_type(**slots.loras[name].to_dict())
    config.base_model_name_or_path, config.inference_mode = base or model.name_or_path or None, True
    with written_aside(Path(folder)) as aside:
        save_file(tensors, aside / LORA_WEIGHTS[0], metadata={"format": "pt"})
        config.save_pretrained(str(aside))
    return None
