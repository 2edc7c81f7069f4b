"""`main.py --dry_run`: memory and steps of a training run, reported before any weights are loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from chatglm.checkpoints import memory
from chatglm.checkpoints.adapters import Prefix, read_adapter
from chatglm.checkpoints.file_names import LORA_CONFIG
from chatglm.checkpoints.files import find_weights, read_json
from chatglm.loading import choose_dtype, find_folder, read_config

from .arguments import Arguments, method_of
from .estimate import Estimate, Evaluation, advice, estimate
from .messages import text
from .methods import ALL_LAYERS, ALL_LINEAR, compute_dtype

#: transformers' optimizer names -> the optimizer of `estimate` that takes the same memory.
SAME = {"adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit"}


def rehearse(arguments: Arguments, longest: int, evaluation: Evaluation | None = None) -> Estimate:
    """The estimate for these arguments, with sequences of `longest` tokens. Raises ValueError or OSError."""
    model_args, _, training_args, _ = arguments
    folder = find_folder(model_args.model_name_or_path, model_args.revision)
    device, dtype = training_args.device, compute_dtype(model_args, training_args)
    method, batch = method_of(model_args), training_args.per_device_train_batch_size
    if method == "full" and (training_args.bf16 or training_args.fp16):
        dtype = "bfloat16" if training_args.bf16 else "float16"  # autocast over float32 weights
    settings: dict[str, Any] = {
        "method": method,
        "batch_size": batch,
        "sequence_length": longest,
        "quantize": model_args.quantization_bit,
        "dtype": choose_dtype("auto", device, find_weights(folder)) if dtype == "auto" else dtype,
        "gradient_checkpointing": training_args.checkpointing,
        "gradient_accumulation": training_args.gradient_accumulation_steps,
        "optimizer": SAME.get(str(training_args.optim.value), str(training_args.optim.value)),
        "world_size": training_args.world_size,
        "device": "cuda" if device.type == "cuda" else "cpu",
        "evaluation": evaluation,
        **_zero(training_args.deepspeed),
    }
    checkpoint = model_args.ptuning_checkpoint
    if method == "lora":
        rank, targets, saved = model_args.lora_rank, model_args.lora_target_modules, model_args.modules_to_save
        if checkpoint is not None:
            config = read_json(Path(checkpoint) / LORA_CONFIG)
            rank, targets, saved = config["r"], config["target_modules"], config.get("modules_to_save") or []
        names = ALL_LAYERS if ALL_LINEAR in targets else tuple(targets)
        settings |= {"lora_rank": rank, "lora_targets": names, "lora_saved": tuple(saved)}
    elif method == "ptuning":
        length, projection = model_args.pre_seq_len, model_args.prefix_projection
        if checkpoint is not None and isinstance(prefix := read_adapter(checkpoint), Prefix):
            length, projection = prefix.length, prefix.projection
        settings |= {"pre_seq_len": length, "prefix_projection": projection}
    if settings["quantize"] is None:
        del settings["quantize"]  # found in the config of a quantised checkpoint
    return estimate(read_config(folder, model_args.chatglm_version), **settings)


def evaluation_of(arguments: Arguments, train: Any, held_out: Any, test: Any) -> Evaluation | None:
    """The largest batch that the run evaluates: the untuned loss, --do_eval, --eval_strategy, --do_predict."""
    _, data_args, training_args, _ = arguments
    during = training_args.eval_strategy.value != "no" and held_out is not None
    scored: list[list[int]] = []  # for each data set, the lengths of the rows whose loss is computed
    answered: list[int] = []  # lengths of the prompts that are answered
    for rows, used in ((held_out, training_args.do_eval or during), (test, training_args.do_predict)):
        if rows is not None and used:
            scored.append(list(rows["length"]))
            if training_args.predict_with_generate:
                answered += map(len, rows["prompt_ids"])
    if training_args.resume_from_checkpoint is None and data_args.baseline_samples > 0:
        scored.append(list((train if held_out is None else held_out)["length"])[: data_args.baseline_samples])
    if not scored:
        return None
    return Evaluation(
        min(training_args.per_device_eval_batch_size, max(map(len, scored))),
        max(map(max, scored)),
        max(answered) + data_args.target_length if answered else 0,
        data_args.num_beams or 1,
    )


def report(arguments: Arguments, train: Any, held_out: Any, test: Any, language: str) -> tuple[str, bool]:
    """The report for the user, and whether the run with these data sets fits into the available memory."""
    _, _, training_args, _ = arguments
    longest = max(train["length"])
    found = rehearse(arguments, longest, evaluation_of(arguments, train, held_out, test))
    steps = training_steps(
        len(train),
        batch_size=training_args.per_device_train_batch_size,
        gradient_accumulation=training_args.gradient_accumulation_steps,
        world_size=training_args.world_size,
        epochs=training_args.num_train_epochs,
        max_steps=training_args.max_steps,
    )
    each = (
        training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    )
    lines = [
        found.text(language),
        text("steps", language, steps=steps, each=each, longest=longest),
    ]
    room = memory.available(training_args.device)
    if room is None or found.total <= room:
        if room is not None:
            lines.append(text("fits", language, size=memory.readable(room)))
        return "\n".join(lines), True
    lines.append(text("too_large", language, size=memory.readable(room)))
    lines += [f"  * {change.text(language)}" for change in advice(found, room)]
    return "\n".join(lines), False


#: The share of the available memory that a run may take for gradient checkpointing to be left off.
AMPLE = 0.7


def choose_checkpointing(
    arguments: Arguments, longest: int, evaluation: Evaluation | None
) -> tuple[int, int] | None:
    """Turns gradient checkpointing off if the run fits easily without it, unless the user has chosen.

    Args:
        longest, evaluation: as for `rehearse`.

    Returns:
        The memory that the run takes without it, and what is available, in bytes; None if nothing was to be decided.
    """
    training_args = arguments.training
    room = memory.available(training_args.device)
    if training_args.checkpointing_chosen or room is None:
        return None
    training_args.checkpointing = False
    found = rehearse(arguments, longest, evaluation)
    training_args.checkpointing = found.total > AMPLE * room
    return found.total, room


def training_steps(
    rows: int,
    *,
    batch_size: int,
    gradient_accumulation: int = 1,
    world_size: int = 1,
    epochs: float = 3.0,
    max_steps: int = -1,
) -> int:
    """Optimizer steps of a run, as transformers' Trainer counts them; `max_steps` above 0 overrides the rest."""
    if max_steps > 0:
        return max_steps
    batches = math.ceil(rows / (batch_size * world_size))
    return math.ceil(epochs * max(1, math.ceil(batches / gradient_accumulation)))


def _zero(deepspeed: Any) -> dict[str, Any]:
    """The stage of a DeepSpeed configuration, and whether it keeps the optimizer in main memory."""
    if not deepspeed:
        return {}
    config = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return {"zero_stage": int(zero.get("stage", 0)), "offload": offload}
