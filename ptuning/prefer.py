"""Preference tuning through TRL: DPO, ORPO, KTO and reward models, with LoRA adapters as results.

`python -m ptuning.prefer --help` lists the arguments; one JSON or YAML file of arguments works, too.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from chatglm.language import choose_language  # noqa: E402
from ptuning import methods  # noqa: E402
from ptuning.arguments import (  # noqa: E402
    ArgumentsError,
    ModelArguments,
    Parser,
    argument_words,
    check_base,
    check_lora,
    unknown_argument,
)
from ptuning.main import explain, keep_metrics  # noqa: E402
from ptuning.messages import command_line, text  # noqa: E402
from ptuning.preferences import hold_out, read_judged, read_pairs  # noqa: E402

LOSSES = ("dpo", "orpo", "kto", "reward")
NEEDS_TRL = "preference tuning needs TRL: pip install -r ptuning/requirements-prefer.txt"


@dataclass
class PreferArguments:
    """Which preferences, and how they are learned."""

    loss: str = dataclasses.field(default="dpo", metadata={"help": "dpo, orpo, kto or reward (a reward model)"})
    train_file: str | None = dataclasses.field(default=None, metadata={"help": "JSON lines, a JSON list, or CSV"})
    validation_file: str | None = dataclasses.field(default=None, metadata={"help": "as train_file, for evaluation"})
    val_size: float = dataclasses.field(default=0.0, metadata={"help": "rows held out instead: a share, or how many"})
    max_source_length: int = dataclasses.field(default=1024, metadata={"help": "tokens of a prompt at most"})
    max_target_length: int = dataclasses.field(default=512, metadata={"help": "tokens of an answer at most"})


def main(argv: list[str] | None = None, prog: str = "ptuning.prefer") -> int:
    """Trains and evaluates. Returns the exit status: 2 for wrong arguments, 1 for later failures."""
    try:
        return run(*parse(sys.argv[1:] if argv is None else argv, prog))
    except (RuntimeError, OSError, ValueError, ImportError, MemoryError) as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentsError) else 1


def parse(argv: list[str], prog: str = "ptuning.prefer") -> tuple[ModelArguments, PreferArguments, Any]:
    """The arguments, and TRL's configuration for the loss. Raises ArgumentsError, or ImportError without TRL."""
    argv = argument_words(argv)
    loss = next((argv[at + 1] for at, word in enumerate(argv[:-1]) if word == "--loss"), "dpo")
    loss = next((word.partition("=")[2] for word in argv if word.startswith("--loss=")), loss)
    if loss not in LOSSES:
        raise ArgumentsError(f"--loss {loss}: use one of {', '.join(LOSSES)}")
    parser = Parser(
        (ModelArguments, PreferArguments, _classes(loss)[0]),
        prog=prog, allow_abbrev=False, conflict_handler="resolve", description=(__doc__ or "").split("\n")[0],
    )  # fmt: skip
    try:
        model, prefer, config, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ArgumentsError:
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise ArgumentsError(" ".join(str(error).split())) from error
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ArgumentsError(unknown_argument(rest, known))
    _check(model, prefer, config)
    return model, prefer, config


def _check(model: ModelArguments, prefer: PreferArguments, config: Any) -> None:
    if model.method not in (None, "lora") or model.pre_seq_len is not None:
        raise ArgumentsError("preference tuning trains LoRA: leave --method and --pre_seq_len out")
    model.method = "lora"
    check_base(model)
    check_lora(model)
    if model.init_lora_weights.startswith(("pissa", "olora")):
        raise ArgumentsError(f"--init_lora_weights {model.init_lora_weights} changes the base, and the base is the "
                             "reference: use default, gaussian or orthogonal")  # fmt: skip
    if model.ptuning_checkpoint is not None:
        raise ArgumentsError("--ptuning_checkpoint: merge it into the base first (python -m chatglm.export), and take "
                             "the result as --model_name_or_path")  # fmt: skip
    for name in ("train_file", "validation_file"):
        path = getattr(prefer, name)
        if path is not None and not Path(path).is_file():
            raise ArgumentsError(f"--{name} {path}: there is no such file")
    if prefer.train_file is None:
        raise ArgumentsError("--train_file is missing")
    if prefer.val_size and prefer.validation_file:
        raise ArgumentsError("--val_size and --validation_file: leave one out")
    if model.quantization_bit is not None and prefer.loss == "reward" and model.use_dora:
        raise ArgumentsError("--use_dora needs the weights of the base: leave --quantization_bit out")
    config.do_train, config.remove_unused_columns = True, False
    if config.device.type != "cuda":
        config.dataloader_pin_memory = False


def run(model_args: ModelArguments, prefer: PreferArguments, config: Any) -> int:
    """Runs what the arguments ask for, and returns the exit status."""
    language = choose_language()
    say = print if config.process_index == 0 else (lambda *_: None)
    tokenizer = methods.load_tokenizer(model_args)
    if not tokenizer.chat_format.has_roles and tokenizer.chatglm_version == 1:
        raise ArgumentsError("preference tuning is for generations 2 and later: the prompts of ChatGLM-6B are read in "
                             "both directions, which TRL's batches do not do")  # fmt: skip
    train, held_out = _data(prefer, tokenizer, config.seed)
    say(text("preferences", language, train=len(train), held_out=len(held_out or ())))
    model = _load(model_args, prefer, config)
    trainer = _trainer(prefer, config, model, tokenizer, train, held_out, model_args)
    before = _preferred(trainer, prefer, held_out)
    result = trainer.train(resume_from_checkpoint=_resume(config))
    keep_metrics(trainer, "train", result.metrics)
    trainer.save_state()
    if held_out:
        found = trainer.evaluate() | {"eval_samples": len(held_out)}
        after = _preferred(trainer, prefer, held_out)
        if before is not None and after is not None:
            found |= {"eval_preferred_before": before, "eval_preferred": after}
            say(text("preferred", language, before=before, after=after))
        keep_metrics(trainer, "eval", found)
    folder = Path(config.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if folder.is_dir() and prefer.loss != "reward":
        chat = ROOT / "cli_demo.py"
        words = ["python", os.path.relpath(chat)] if chat.is_file() else ["chatglm", "chat"]
        base = str(model_args.model_name_or_path)
        say(text("trained", language, command=command_line([*words, "--model", base, "--adapter", str(folder)])))
    elif folder.is_dir():
        say(text("reward_model", language, folder=folder))
    return 0


def _data(prefer: PreferArguments, tokenizer: Any, seed: int) -> tuple[list[Any], list[Any] | None]:
    read = read_judged if prefer.loss == "kto" else read_pairs
    lengths = (prefer.max_source_length, prefer.max_target_length)
    train: list[Any] = read(str(prefer.train_file), tokenizer, *lengths)
    if prefer.validation_file is not None:
        return train, read(prefer.validation_file, tokenizer, *lengths)
    return hold_out(train, prefer.val_size, seed) if prefer.val_size else (train, None)


def _load(model_args: ModelArguments, prefer: PreferArguments, config: Any) -> Any:
    """The frozen base; for a reward model with a head of one number."""
    import chatglm

    dtype = methods.compute_dtype(model_args, config)
    if prefer.loss != "reward":
        model, _ = chatglm.load(
            model_args.model_name_or_path, config.device, dtype, quantize=model_args.quantization_bit,
            revision=model_args.revision, chatglm_version=model_args.chatglm_version,
            check_memory=model_args.check_memory,
        )  # fmt: skip
        head = model.get_output_embeddings().weight
        if not head.is_floating_point():
            raise ArgumentsError("the output head of this base is quantised, and TRL computes with it: take a "
                                 "checkpoint whose head is not")  # fmt: skip
        return model
    from transformers import AutoModelForSequenceClassification

    from chatglm.checkpoints.files import find_weights
    from chatglm.loading import choose_dtype, find_folder
    from chatglm.quantization import ChatGLMQuantizationConfig

    folder = find_folder(model_args.model_name_or_path, model_args.revision)
    kind = choose_dtype("auto", config.device, find_weights(folder)) if dtype == "auto" else dtype
    bits = model_args.quantization_bit
    more = {} if bits is None else {"quantization_config": ChatGLMQuantizationConfig(bits)}
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=kind, num_labels=1, **more)


def _classes(loss: str) -> tuple[Any, Any]:
    """TRL's configuration and trainer for a loss. Raises ImportError without TRL."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import trl  # type: ignore[import-not-found, unused-ignore]

        if loss == "orpo":
            from trl.experimental.orpo import (  # type: ignore[import-not-found, unused-ignore]
                ORPOConfig,
                ORPOTrainer,
            )

            return ORPOConfig, ORPOTrainer
        name = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}[loss]
        return getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    except ImportError as error:
        raise ImportError(f"{NEEDS_TRL} ({error})") from error


def _trainer(
    prefer: PreferArguments, config: Any, model: Any, tokenizer: Any, train: list[Any], held_out: list[Any] | None,
    model_args: ModelArguments,
) -> Any:  # fmt: skip
    import datasets

    base: Any = _classes(prefer.loss)[1]

    class Prefers(base):  # type: ignore[misc, unused-ignore]
        """The trainer, on ids that our chat format has made."""

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            if prefer.loss == "kto" and self.calculate_KL:
                # Answers of other prompts of the same batch, as TRL's own preparation pairs them.
                def paired(rows: dict[str, Any]) -> dict[str, Any]:
                    said = rows["completion_ids"]
                    return {**rows, "KL_completion_ids": said[-1:] + said[:-1]}

                return dataset.map(paired, batched=True, batch_size=args.per_device_train_batch_size)
            return dataset

        def tokenize_row(self, feature: Any, model: Any = None) -> Any:  # of ORPO
            prompt = feature["prompt_ids"]
            made: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
            for name in ("chosen", "rejected"):
                said = feature[f"{name}_ids"]
                made |= {f"{name}_input_ids": prompt + said, f"{name}_labels": [-100] * len(prompt) + said,
                         f"{name}_attention_mask": [1] * len(prompt + said)}  # fmt: skip
            return made

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """A checkpoint holds the adapter and what resuming needs."""

    if prefer.loss == "reward":  # TRL takes whole texts
        train, held_out = _whole(train), _whole(held_out or [])
    more: dict[str, Any] = {}
    if prefer.loss == "reward":
        more = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier_head", *model_args.modules_to_save]}
    lora = methods.lora_config(model_args, **more)
    methods.check_whole_layers(model, lora)
    return Prefers(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(train),
        eval_dataset=datasets.Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora,
    )


def _whole(rows: list[Any]) -> list[Any]:
    return [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]


def _preferred(trainer: Any, prefer: PreferArguments, held_out: list[Any] | None) -> float | None:
    """The share of the held-out pairs whose chosen answer is more probable than the other; None without pairs."""
    import torch

    if not held_out or prefer.loss not in ("dpo", "orpo"):
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    better = 0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for row in held_out:
            chances = []
            for name in ("chosen_ids", "rejected_ids"):
                ids = torch.tensor([row["prompt_ids"] + row[name]], device=trainer.args.device)
                start = len(row["prompt_ids"])
                logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
                chances.append(float(logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum()))
            better += chances[0] > chances[1]
    model.train(was_training)
    return better / len(held_out)


def _resume(config: Any) -> str | None:
    """The checkpoint to resume from, if --resume_from_checkpoint names one or says true."""
    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no"):
        return None
    if str(wanted).lower() not in ("true", "yes"):
        return str(wanted)
    from ptuning.checkpoints import CheckpointError, last_checkpoint

    last = last_checkpoint(config.output_dir)
    if last is None:
        raise CheckpointError(f"{config.output_dir} holds no checkpoint to resume from")
    return str(last)


if __name__ == "__main__":
    sys.exit(main())
