"""The peak memory of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from chatglm import quantization
from chatglm.loading import DTYPES

from .ledger import Ledger
from .overheads import LIBRARIES, METRICS, RUNNING, communication, file_pages, optimizer_states, shares, step_copies
from .rehearsal import build, evaluate, materialise, step
from .report import PARTS, Estimate
from .settings import Settings


def estimate(config: Any, *, dtype: str | torch.dtype = "float32", **settings: Any) -> Estimate:
    """Estimates the peak memory of training the model of `config`, without its weights.

    Args:
        config: a ChatGLM config of any generation; it is not changed.
        dtype: what the model computes in, a torch.dtype or its name. The trained prefix and LoRA stay in float32, and
            so do the weights of full tuning (autocast computes in `dtype`), except with a `zero_stage`: DeepSpeed holds
            them in `dtype`, with a float32 copy among the optimizer's states.
        method: "ptuning" (with `pre_seq_len`, `prefix_projection`), "lora" (with `lora_rank`, `lora_targets`,
            `lora_saved`), "full".
        batch_size, sequence_length: of one forward pass on one device: `sequence_length` counts prompt and answer.
        quantize: 4 or 8 for a quantised frozen base.
        gradient_checkpointing: keep only the inputs of each block for the backward pass.
        gradient_accumulation: forward passes for one optimizer step.
        optimizer: one of OPTIMIZERS, or another name that transformers knows.
        world_size, zero_stage, offload: devices that train together; DeepSpeed's stage (0 for plain data parallelism);
            optimizer states in main memory.
        device: "cpu" or "cuda".
        evaluation: the largest batch that is evaluated before, during or after training, if any.

    Raises:
        ValueError: settings that do not go together.
        ImportError: the method is LoRA and peft is not installed.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    present = quantization.settings_of(config)
    if present is not None:
        settings.setdefault("quantize", present.bits)
    return peak_of(config, Settings(dtype=dtype, **settings))


def peak_of(config: Any, settings: Settings) -> Estimate:
    ledger = Ledger(config.vocab_size, shares(settings))
    with torch.device("meta"), no_init_weights():
        model = build(config, settings)
    with FakeTensorMode(), ledger:
        materialise(model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            ledger.move(parameter, "trainable")
        states = optimizer_states(trained, settings, ledger)
        gradients = ledger.watch_gradients(trained)
        for _ in range(min(settings.gradient_accumulation, 2)):
            step(model, settings, on_forward=lambda: ledger.tag_as("activations"))
        ledger.touch("buffers", step_copies(trained, settings))
        model.zero_grad()
        if settings.evaluation is not None:
            ledger.tag_as("evaluation")
            evaluate(model, settings, settings.evaluation)
        parts = {name: int(ledger.at_peak.get(name, 0)) for name in PARTS}
        del gradients, states
        quantized = _quantized_numbers(model)
        scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_scale"))
        stored = sum(p.numel() for p in parameters if p.dtype == torch.int8)
        total = sum(p.numel() for p in parameters) - stored - scales + quantized
        trainable = sum(p.numel() for p in trained)
    parts["buffers"] += communication(trained, parameters, settings)
    parts["libraries"] = LIBRARIES[settings.device] + RUNNING[settings.device]
    if settings.evaluation is not None and settings.evaluation.generated:
        parts["libraries"] += METRICS[settings.device]
    in_file = total if settings.method == "full" else total - trainable
    pages = file_pages(config, in_file, quantized, settings)
    return Estimate(settings, total, trainable, parts, *pages, config)


def _quantized_numbers(model: nn.Module) -> int:
    """The number of quantised parameters, two of which may share a byte."""
    found = {
        id(module.weight): module.weight.numel() * 8 // module.bits
        for module in model.modules()
        if isinstance(module, (quantization.QuantizedLinear, quantization.QuantizedEmbedding))
    }
    return sum(found.values())
