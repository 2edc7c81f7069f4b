"""Which changes of the settings save memory, and how much."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .peak import peak_of
from .report import Advice, Estimate
from .settings import EIGHT_BIT, Settings


def advice(found: Estimate, available: int) -> list[Advice]:
    """Changes that save memory, the mildest first; empty where `available` bytes are enough.

    Each is for itself, against the present settings.
    """
    if found.total <= available:
        return []
    now = found.settings
    changes: list[tuple[str, str, dict[str, Any]]] = []
    if not now.gradient_checkpointing:
        changes.append(("turn gradient checkpointing on", "打开梯度检查点", {"gradient_checkpointing": True}))
    if now.batch_size > 1:
        more = now.batch_size * now.gradient_accumulation
        changes.append((
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {more} (the same result)",
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {more}（结果相同）",
            {"batch_size": 1, "gradient_accumulation": more},
        ))  # fmt: skip
    if now.evaluation is not None and now.evaluation.batch_size > 1:
        one = dataclasses.replace(now.evaluation, batch_size=1)
        flag = "--per_device_eval_batch_size 1"
        changes.append((f"{flag} (the same result)", f"{flag}（结果相同）", {"evaluation": one}))
    if now.dtype == torch.float32 and now.method != "full":
        changes.append(("compute in bfloat16", "用 bfloat16 计算", {"dtype": torch.bfloat16}))
    for bits in (8, 4):
        if now.method != "full" and (now.quantize or 16) > bits:
            changes.append((f"--quantization_bit {bits}", f"--quantization_bit {bits}", {"quantize": bits}))
    if now.method == "full":
        if now.optimizer not in (*EIGHT_BIT, "adafactor", "sgd"):
            smaller = ("adamw_bnb_8bit", "adafactor") if now.device == "cuda" else ("adafactor",)
            changes += [(f"--optim {name}", f"--optim {name}", {"optimizer": name}) for name in smaller]
        if now.device == "cuda":
            changes += _more_devices(now)
        changes.append(("train LoRA instead of all weights", "用 LoRA 代替全参数微调", {"method": "lora"}))
    half = now.sequence_length // 2
    if half >= 32:
        changes.append((
            f"sequences of {half} tokens instead of {now.sequence_length}",
            f"序列长度从 {now.sequence_length} 减到 {half}",
            {"sequence_length": half},
        ))  # fmt: skip
    result = []
    for english, chinese, values in changes:
        total = peak_of(found.config, dataclasses.replace(now, **values)).total
        if total < found.total:
            result.append(Advice(english, chinese, total, found.total - total, total <= available))
    return result


def _more_devices(now: Settings) -> list[tuple[str, str, dict[str, Any]]]:
    devices = max(now.world_size, 4)
    dtype = torch.bfloat16 if now.dtype == torch.float32 else now.dtype
    changes: list[tuple[str, str, dict[str, Any]]] = []
    for stage, offload in ((2, False), (3, False), (3, True)):
        changes.append((
            f"DeepSpeed ZeRO-{stage} on {devices} GPUs{' with the optimizer in main memory' * offload}",
            f"DeepSpeed ZeRO-{stage}，{devices} 张显卡{'，优化器放在内存' * offload}",
            {"dtype": dtype, "world_size": devices, "zero_stage": stage, "offload": offload},
        ))  # fmt: skip
    return changes
