"""The settings that determine the memory of a training run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

METHODS = ("ptuning", "lora", "full")
DEVICES = ("cpu", "cuda")

#: Optimizers whose memory is known, by transformers' names; any other is counted as AdamW in plain torch.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "adafactor", "sgd")
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit")


@dataclass(frozen=True)
class Evaluation:
    """The largest batch that a run evaluates, made of the longest rows; lengths in tokens."""

    batch_size: int
    length: int  # prompt and answer, for the loss
    generated: int = 0  # prompt and new answer; 0 where no answers are generated
    beams: int = 1


@dataclass(frozen=True)
class Settings:
    """The settings that determine the memory of a run; see `estimate`."""

    method: str
    batch_size: int
    sequence_length: int
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("query_key_value",)
    lora_saved: tuple[str, ...] = ()
    quantize: int | None = None
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = True
    gradient_accumulation: int = 1
    optimizer: str = "adamw_torch_fused"
    world_size: int = 1
    zero_stage: int = 0
    offload: bool = False
    device: str = "cpu"
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: use one of {', '.join(METHODS)}")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}: use {' or '.join(DEVICES)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage!r}: use 0 (no DeepSpeed), 1, 2 or 3")
        if self.quantize not in (None, 4, 8):
            raise ValueError(f"quantize is {self.quantize!r}: use 4, 8, or None for no quantisation")
        if self.quantize and self.method == "full":
            raise ValueError("quantised weights are frozen: full tuning needs quantize=None")
        if self.method == "ptuning" and not self.pre_seq_len:
            raise ValueError("P-tuning needs pre_seq_len, the number of trained positions (the originals take 128)")
        for name in ("batch_size", "sequence_length", "gradient_accumulation", "world_size", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be 1 or more")
        if self.offload and self.zero_stage < 1:
            raise ValueError("offloading the optimizer to the CPU needs DeepSpeed: give a zero_stage of 1, 2 or 3")


def kept_dtype(settings: Settings) -> torch.dtype:
    """The dtype of the weights that are not quantised."""
    return torch.float32 if settings.method == "full" and not settings.zero_stage else settings.dtype
