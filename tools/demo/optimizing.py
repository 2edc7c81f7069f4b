"""What the trainings of all demo checkpoints share: the optimisers, the averaged weights, and how they are written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from chatglm.checkpoints.atomic import files_into
from chatglm.checkpoints.file_names import TOKENIZER_CONFIG


@dataclass(frozen=True)
class Schedule:
    """Shares of the training in which the learning rate rises and falls, and how many steps the average covers."""

    warm_up: float
    decay: float
    averaged_steps: int

    def scale(self, share: float) -> float:
        """The learning rate, as a part of the highest, when `share` of the training is done."""
        return min(1.0, (share + 1e-3) / self.warm_up, max(0.02, (1.0 - share) / self.decay))


class Optimization:
    """Muon for the matrices of the layers, AdamW for the rest, and an average of the weights.

    `average` is steadier than the last weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        matrices: Sequence[torch.nn.Parameter],
        others: Sequence[torch.nn.Parameter],
        rate: float,
        schedule: Schedule,
    ) -> None:
        self._model, self._schedule, self._steps = model, schedule, 0
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), rate),
            (torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True), rate),
        ]
        self.average = [parameter.detach().clone() for parameter in model.parameters()]

    def step(self, loss: torch.Tensor, share: float) -> float:
        """One update; `share` of the training is done. Returns the loss."""
        scale = self._schedule.scale(share)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0, foreach=True)
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        last = min(self._steps, self._schedule.averaged_steps)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self._model.parameters()), 1 / last)
        return float(loss.detach())


@torch.no_grad()
def scale_residuals(model: torch.nn.Module, prefix: str) -> None:
    """Enlarges the matrices of generation 1's layers, whose names begin with `prefix`: it multiplies its residual."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith(prefix):
            parameter.mul_(3.0 if name.endswith(("dense.weight", "dense_4h_to_h.weight")) else 1.5)


def save(half: Any, weights: Sequence[torch.Tensor], tokenizer: Any, folder: Path, **generation: Any) -> None:
    """Writes a checkpoint with these parameters in float16; its files in `folder` are replaced once it is whole.

    Args:
        half: a model of the right shape, whose weights are replaced.
        generation: values of its generation config.
    """
    with torch.no_grad():
        for parameter, weight in zip(half.parameters(), weights, strict=True):
            parameter.copy_(weight)
    half = half.half()
    config = half.config
    config.dtype = torch.float16
    values = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id, "do_sample": False}
    half.generation_config = GenerationConfig(**values | generation)
    with files_into(folder) as aside:
        half.save_pretrained(aside)
        for name in (Path(tokenizer.vocab_file).name, TOKENIZER_CONFIG):
            shutil.copyfile(Path(tokenizer.vocab_file).with_name(name), aside / name)
