"""Which changes of the settings save memory, and how much."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .peak import peak_of
from .report import Advice, Estimate
from .settings import EIGHT_BIT, Settings

#: (key of its message, values of the message, changed settings)
Change = tuple[str, dict[str, Any], dict[str, Any]]


def advice(found: Estimate, available: int) -> list[Advice]:
    """Changes that save memory, the mildest first; empty where `available` bytes are enough.

    Each is a change on its own, compared with the present settings.
    """
    if found.total <= available:
        return []
    now = found.settings
    changes: list[Change] = []
    if not now.gradient_checkpointing:
        changes.append(("checkpointing", {}, {"gradient_checkpointing": True}))
    if now.batch_size > 1:
        more = now.batch_size * now.gradient_accumulation
        flag = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {more}"
        changes.append(("same_result", {"flag": flag}, {"batch_size": 1, "gradient_accumulation": more}))
    if now.evaluation is not None and now.evaluation.batch_size > 1:
        one = dataclasses.replace(now.evaluation, batch_size=1)
        changes.append(("same_result", {"flag": "--per_device_eval_batch_size 1"}, {"evaluation": one}))
    if now.dtype == torch.float32 and now.method != "full":
        changes.append(("bfloat16", {}, {"dtype": torch.bfloat16}))
    for bits in (8, 4):
        if now.method != "full" and (now.quantize or 16) > bits:
            changes.append(("flag", {"flag": f"--quantization_bit {bits}"}, {"quantize": bits}))
    if now.method == "full":
        if now.optimizer not in (*EIGHT_BIT, "adafactor", "sgd"):
            smaller = ("adamw_bnb_8bit", "adafactor") if now.device == "cuda" else ("adafactor",)
            changes += [("flag", {"flag": f"--optim {name}"}, {"optimizer": name}) for name in smaller]
        if now.device == "cuda":
            changes += _more_devices(now)
        changes.append(("lora", {}, {"method": "lora"}))
    half = now.sequence_length // 2
    if half >= 32:
        changes.append(("shorter", {"now": now.sequence_length, "half": half}, {"sequence_length": half}))
    result = []
    for key, values, settings in changes:
        total = peak_of(found.config, dataclasses.replace(now, **settings)).total
        if total < found.total:
            result.append(Advice(key, values, total, found.total - total, total <= available))
    return result


def _more_devices(now: Settings) -> list[Change]:
    devices = max(now.world_size, 4)
    dtype = torch.bfloat16 if now.dtype == torch.float32 else now.dtype
    changes: list[Change] = []
    for stage, offload in ((2, False), (3, False), (3, True)):
        settings = {"dtype": dtype, "world_size": devices, "zero_stage": stage, "offload": offload}
        changes.append(("zero_offload" if offload else "zero", {"stage": stage, "devices": devices}, settings))
    return changes
