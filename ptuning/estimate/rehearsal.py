"""Builds the model to be trained and runs a training step, with tensors that have a shape but no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from chatglm import quantization
from chatglm.adapters.lora import add_lora
from chatglm.loading import model_class

from .settings import Evaluation, Settings, kept_dtype


def build(config: Any, settings: Settings) -> Any:
    """The model with fresh weights as in training: dtype, quantisation, prefix or LoRA, frozen parameters."""
    config = copy.deepcopy(config)
    config.pre_seq_len = settings.pre_seq_len if settings.method == "ptuning" else None
    config.prefix_projection = settings.prefix_projection
    with _default_dtype(kept_dtype(settings)):
        model = model_class(config)(config)
        model.tie_weights()  # skipped when nothing is initialised
        if settings.quantize and quantization.settings_of(config) is None:
            quantization.apply(model, quantization.ChatGLMQuantizationConfig(settings.quantize), empty=True)
    if settings.method == "ptuning":
        model.transformer.prefix_encoder.float()
    if settings.gradient_checkpointing:
        checkpoint(model)
    if settings.method == "lora":
        return _with_lora(model, settings)
    return model.train()


def materialise(model: nn.Module) -> None:
    """Replaces meta tensors by those of the rehearsal; shared tensors stay shared."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                tensors[name] = made[tensor]


def checkpoint(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.20 or so
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _with_lora(model: PreTrainedModel, settings: Settings) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install -r ptuning/requirements.txt") from error
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_rank, lora_dropout=0.1, target_modules=list(settings.lora_targets),
        modules_to_save=list(settings.lora_saved) or None,
    )  # fmt: skip
    add_lora(model, lora)
    return model.train()


def step(model: Any, settings: Settings, on_forward: Callable[[], None] = lambda: None) -> None:
    """One forward and backward pass over zeros."""
    on_forward()
    ids = torch.zeros(settings.batch_size, settings.sequence_length, dtype=torch.long)
    with _autocast(settings):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def _autocast(settings: Settings) -> AbstractContextManager[Any]:
    if settings.method == "full" and not settings.zero_stage and settings.dtype != torch.float32:
        return torch.autocast("cpu", settings.dtype)
    return nullcontext()


def evaluate(model: Any, settings: Settings, plan: Evaluation) -> None:
    """What `Tuner.prediction_step` does: the loss row by row from all logits, then answers with a cache."""
    model.eval()
    with torch.no_grad(), _autocast(settings):
        ids = torch.zeros(plan.batch_size, plan.length, dtype=torch.long)
        logits = model(input_ids=ids, use_cache=False).logits
        functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
        del logits
        if plan.generated:
            # All at once, where `generate` continues token by token: only the size of the cache matters.
            ids = torch.zeros(plan.batch_size * plan.beams, plan.generated, dtype=torch.long)
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            if plan.beams > 1:
                cache.reorder_cache(torch.zeros(len(ids), dtype=torch.long))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
