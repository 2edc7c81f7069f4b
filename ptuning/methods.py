"""The trained parts - a prefix, LoRA matrices or all weights: set up before training, saved in checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizer, set_seed

import chatglm
from chatglm.adapters.attaching import load_adapter
from chatglm.adapters.lora import add_lora, set_tensors
from chatglm.adapters.prefixes import add_prefix
from chatglm.adapters.saved_layers import SavedLayersError, check_saved_layers
from chatglm.adapters.saving import save_adapter
from chatglm.checkpoints.adapters import PREFIX, Prefix, describe, import_peft, read_adapter
from chatglm.checkpoints.file_names import CONFIG, LORA_CONFIG, VOCABULARIES
from chatglm.checkpoints.files import ModelLoadError, check_folder, read_contents, read_json, weight_files
from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.loading import find_folder
from chatglm.quantization import settings_of
from chatglm.tokenization_chatglm import ChatGLMTokenizer

from .arguments import DECOMPOSED, ArgumentsError, ModelArguments, TrainingArguments, method_of
from .decomposed import has_start, remember_start, restore_difference, save_difference

ALL_LINEAR = "all-linear"  # PEFT's word for ALL_LAYERS
ALL_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
NAME = "default"  # name of the adapter that is trained


def prepare(
    model_args: ModelArguments, training_args: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Loads the model on the device of `training_args`, with its trained parts in float32, and its tokenizer.

    Without do_train, the model is ready for evaluation.

    Raises what `chatglm.load` raises, and ArgumentsError.
    """
    method, train = method_of(model_args), training_args.do_train
    dtype = compute_dtype(model_args, training_args)
    if train and training_args.device.type == "cuda" and dtype == "float16":
        # Scales the loss: small gradients would be zero in float16.
        training_args.fp16, training_args.mixed_precision = True, "fp16"
    # DeepSpeed and FSDP distribute a model that is in main memory.
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    sharded = training_args.deepspeed_plugin is not None or bool(training_args.fsdp) or by_accelerate
    model, tokenizer = chatglm.load(
        model_args.model_name_or_path,
        "cpu" if sharded else training_args.device,
        dtype,
        quantize=model_args.quantization_bit,
        adapter=None if train else model_args.ptuning_checkpoint,
        revision=model_args.revision,
        chatglm_version=model_args.chatglm_version,
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
    return model, tokenizer


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizer:
    """Loads only the tokenizer: rows are tokenised before the weights are loaded."""
    folder = find_folder(model_args.model_name_or_path, model_args.revision)
    check_folder(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES.values()):
        found = _described(folder)
        if found is not None and found.startswith("a prefix"):
            base = read_json(folder / CONFIG).get("base_model_name_or_path") or "the model it was trained for"
            raise ArgumentsError(f"{folder} is {found}: use --model_name_or_path {base} --ptuning_checkpoint {folder}")
    tokenizer = ChatGLMTokenizer.from_pretrained(
        folder, local_files_only=True, chatglm_version=model_args.chatglm_version
    )
    image_length = read_json(folder / CONFIG).get("image_length")
    if image_length is not None:  # of a model that sees: how many tokens of a prompt are a picture's
        tokenizer.image_length = int(image_length)
    return tokenizer


def compute_dtype(model_args: ModelArguments, training_args: TrainingArguments) -> str:
    """The dtype to load the weights in: float32 for full tuning, unless DeepSpeed keeps a float32 copy."""
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
    start = model_args.init_lora_weights
    by_weights = model_args.use_dora or start.startswith(DECOMPOSED)
    if by_weights and settings_of(model.config) is not None:
        what = "--use_dora" if model_args.use_dora else f"--init_lora_weights {start}"
        raise ArgumentsError(f"{what} computes with the weights of the base, and this one is quantised: leave it out")
    targets = list(model_args.lora_target_modules)
    config = lora_config(model_args)
    check_whole_layers(model, config)
    try:
        add_lora(model, config, NAME)
    except ValueError as error:
        raise ArgumentsError(f"--lora_target_modules {' '.join(targets)}: {error}") from error
    if start.startswith(DECOMPOSED):
        remember_start(model, NAME)


def check_whole_layers(model: PreTrainedModel, config: Any) -> None:
    """Raises ArgumentsError if the model cannot train what `modules_to_save` of a `peft.LoraConfig` names."""
    try:
        check_saved_layers(model, config, to_train=True)
    except SavedLayersError as error:
        raise ArgumentsError(f"--modules_to_save: {error}") from error


def lora_config(model_args: ModelArguments, **more: Any) -> Any:
    """The `peft.LoraConfig` of the arguments. `more`: other fields of it."""
    start, targets = model_args.init_lora_weights, list(model_args.lora_target_modules)
    settings: dict[str, Any] = {
        "r": model_args.lora_rank,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "target_modules": list(ALL_LAYERS) if ALL_LINEAR in targets else targets,  # by name: PEFT would list all paths
        "use_rslora": model_args.use_rslora,
        "use_dora": model_args.use_dora,
        "init_lora_weights": True if start == "default" else start,
        "modules_to_save": list(model_args.modules_to_save) or None,
        "task_type": "CAUSAL_LM",
    }
    return import_peft().LoraConfig(**{**settings, **more})


def save(
    model: PreTrainedModel, method: str, folder: Path, base: str, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Saves the trained parts. `state_dict`: the gathered tensors, if a distributed run has the model in pieces."""
    if method == "full":
        model.save_pretrained(folder, state_dict=state_dict)
    elif has_start(model):
        save_difference(model, folder, base, NAME, state_dict)
    else:
        save_adapter(model, folder, base, state_dict=state_dict)


def check_resumable(folder: Path, model_args: ModelArguments) -> None:
    """Raises ArgumentsError if a training checkpoint does not hold what the arguments train."""
    found, wanted = _described(folder), _wanted(model_args)
    if (folder / CONFIG).is_file() and found == wanted:
        base = find_folder(model_args.model_name_or_path, model_args.revision)
        found, wanted = (describe(ChatGLMConfig.from_pretrained(one).to_dict()) for one in (folder, base))
    if None not in (found, wanted) and found != wanted:
        raise ArgumentsError(
            f"{folder} was made with {found}, and the arguments ask for {wanted}: resume with the same arguments, "
            "or start from scratch with another --output_dir or --overwrite_output_dir"
        )


def _described(folder: Path) -> str | None:
    """What a checkpoint holds, in words; None if that is missing, or only in files of DeepSpeed or FSDP."""
    if (folder / LORA_CONFIG).is_file():
        config = read_json(folder / LORA_CONFIG)
        return _lora(config)
    try:
        names = [name for file in weight_files(folder) for name in read_contents(file)]
    except ModelLoadError:
        return None  # loading it reports the error
    if not all(map(PREFIX.match, names)):
        return "all weights"
    adapter = read_adapter(folder)
    return _prefix(adapter.length, adapter.projection) if isinstance(adapter, Prefix) else None


def _wanted(model_args: ModelArguments) -> str | None:
    method = method_of(model_args)
    if method == "full":
        return "all weights"
    if model_args.ptuning_checkpoint is not None:
        return _described(Path(model_args.ptuning_checkpoint))
    if method == "lora":
        twice = 2 if model_args.init_lora_weights.startswith(DECOMPOSED) else 1  # see save_difference
        targets = set(model_args.lora_target_modules)
        return _lora(
            {"r": twice * model_args.lora_rank, "target_modules": ALL_LAYERS if ALL_LINEAR in targets else targets,
             "use_dora": model_args.use_dora, "use_rslora": model_args.use_rslora,
             "modules_to_save": model_args.modules_to_save}
        )  # fmt: skip
    return _prefix(model_args.pre_seq_len, model_args.prefix_projection)


def _lora(config: Mapping[str, Any]) -> str:
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    targets = config["target_modules"]
    names = [targets] if isinstance(targets, str) else sorted(targets)
    whole = sorted(config.get("modules_to_save") or ())
    return f"{kind} of rank {config['r']} for {' '.join(names)}{' and all of ' if whole else ''}{' '.join(whole)}"


def _prefix(length: int | None, projection: bool) -> str:
    return f"a prefix of {length} with{'' if projection else 'out'} projection"


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Loads the parameters of a checkpoint into the prefix or LoRA that is being trained."""
    adapter = read_adapter(folder)
    try:
        if isinstance(adapter, Prefix):
            model.transformer.prefix_encoder.load_state_dict(adapter.tensors)
            return
        if has_start(model):
            restore_difference(model, NAME, adapter.tensors)
            return
        _, unexpected = set_tensors(model, adapter.tensors, NAME)
    except (RuntimeError, KeyError) as error:
        raise ArgumentsError(f"{folder} is for another model than {model.name_or_path}: use its own") from error
    if unexpected:
        raise ArgumentsError(f"{folder} has LoRA for other layers than --lora_target_modules names")
