"""What is trained: a prefix, LoRA matrices, or all weights. Prepared before training, and written into checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizer, set_seed

import chatglm
from chatglm.adapter_files import Prefix, read_adapter
from chatglm.adapters import add_prefix, load_adapter, save_adapter
from chatglm.loading import find_folder
from chatglm.tokenization_chatglm import ChatGLMTokenizer

from .arguments import ArgumentsError, ModelArguments, TrainingArguments, method_of

NAME = "default"  # of the adapter that is trained


def prepare(
    model_args: ModelArguments, training_args: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """The model on the device of `training_args` with what is to be trained in it, trainable in float32; and its
    tokenizer. Without do_train: ready to be evaluated.

    Raises what `chatglm.load` raises, and ArgumentsError.
    """
    method, train = method_of(model_args), training_args.do_train
    dtype = compute_dtype(model_args, training_args)
    if train and training_args.device.type == "cuda" and dtype == "float16":
        # Scales the loss: small gradients would be zero in float16.
        training_args.fp16, training_args.mixed_precision = True, "fp16"
    # DeepSpeed and FSDP distribute a model that lies in main memory.
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    sharded = training_args.deepspeed_plugin is not None or bool(training_args.fsdp) or by_accelerate
    model, tokenizer = chatglm.load(
        model_args.model_name_or_path,
        "cpu" if sharded else training_args.device,
        dtype,
        quantize=model_args.quantization_bit,
        adapter=None if train else model_args.ptuning_checkpoint,
        revision=model_args.revision,
        check_memory=model_args.check_memory,
    )
    if train:
        set_seed(training_args.seed)
        if method == "full":
            model.requires_grad_(True)
            return model, tokenizer
        if model_args.ptuning_checkpoint is not None:
            load_adapter(model, model_args.ptuning_checkpoint, NAME)
        elif method == "ptuning":
            if model_args.pre_seq_len is None:
                raise ArgumentsError("--method ptuning needs --pre_seq_len, 128 for example")
            add_prefix(model, model_args.pre_seq_len, model_args.prefix_projection)
        else:
            _add_lora(model, model_args)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model, tokenizer


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizer:
    """The tokenizer alone: rows are made into tokens before the weights are loaded."""
    folder = find_folder(model_args.model_name_or_path, model_args.revision)
    chatglm.loading.check_folder(folder)
    return ChatGLMTokenizer.from_pretrained(folder, local_files_only=True)


def compute_dtype(model_args: ModelArguments, training_args: TrainingArguments) -> str:
    """The dtype to load the weights in: those of a full tuning are float32 unless DeepSpeed keeps such a copy."""
    if model_args.dtype != "auto":
        return model_args.dtype
    wanted = "float16" if training_args.fp16 else "bfloat16" if training_args.bf16 else "auto"
    if not training_args.do_train:
        return wanted
    if method_of(model_args) == "full":
        return wanted if training_args.deepspeed_plugin is not None and wanted != "auto" else "float32"
    if wanted == "auto" and training_args.device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return wanted


def _add_lora(model: PreTrainedModel, model_args: ModelArguments) -> None:
    try:
        import peft
    except ImportError as error:
        raise ArgumentsError("--method lora needs PEFT: pip install -r ptuning/requirements.txt") from error
    config = peft.LoraConfig(
        r=model_args.lora_rank,
        lora_alpha=model_args.lora_alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=model_args.lora_dropout,
        target_modules=list(model_args.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(config, NAME)
    except ValueError as error:
        linear = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        wanted = " ".join(model_args.lora_target_modules)
        raise ArgumentsError(f"--lora_target_modules {wanted}: this model has {', '.join(sorted(linear))}") from error


def save(
    model: PreTrainedModel, method: str, folder: Path, base: str, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """What was trained. `state_dict`: the tensors, gathered, where a distributed run has the model in pieces."""
    if method == "full":
        model.save_pretrained(folder, state_dict=state_dict)
    else:
        save_adapter(model, folder, base, state_dict=state_dict)


def restore(model: PreTrainedModel, folder: Path) -> None:
    """The numbers of a checkpoint in place of those of the prefix or LoRA that is being trained."""
    adapter = read_adapter(folder)
    if isinstance(adapter, Prefix):
        model.transformer.prefix_encoder.load_state_dict(adapter.tensors)
        return
    import peft

    result = peft.set_peft_model_state_dict(model, adapter.tensors, adapter_name=NAME)
    if result.unexpected_keys:
        raise ArgumentsError(f"{folder} has LoRA for other layers than --lora_target_modules names")
