"""What has to happen at certain points of training, beside the steps themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import Tuner


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Sets the sampler's epoch, stops the training loop after an interruption, and has the trainer check steps."""

    def __init__(self, trainer: Tuner) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = getattr(self.trainer, "sampler", None)
        if sampler is not None:
            sampler.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if args.world_size > 1:  # all processes have to stop at the same step
            flag = torch.tensor(float(trainer.interrupted), device=args.device)
            trainer.interrupted = bool(trainer.accelerator.reduce(flag, "sum") > 0)
        if trainer.interrupted:
            control.should_save = control.should_training_stop = True
        self._check(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(control)

    def _check(self, control: Any) -> None:
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self.trainer.check_step()
