"""Fine-tune a ChatGLM of any generation: P-tuning v2, LoRA or all weights. Arguments and data as in the originals.

`python main.py --help` lists the arguments, README.md explains them; main.py takes one JSON or YAML file of them, too.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130  # the exit status that a shell has for Ctrl-C
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # `cd ptuning && python main.py`: `ptuning` and `chatglm` are beside each other there
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # the imports take seconds
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))

from chatglm.messages import TUNING, choose_language  # noqa: E402
from ptuning.arguments import Arguments, ArgumentsError, TrainingArguments, method_of, parse  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Trains, evaluates and predicts: the exit status, 2 for wrong arguments, 1 for what goes wrong later."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except (RuntimeError, OSError, ValueError, ImportError, MemoryError) as error:
        if first_to_fail():
            message = explain(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentsError) else 1  # others of several see a lost connection
    except KeyboardInterrupt:
        if first_to_fail():
            print(TUNING["interrupted"][choose_language()], file=sys.stderr)
        return INTERRUPTED


def explain(error: Exception) -> str | None:
    """What went wrong, for users; None where it can only be a mistake in the program."""
    from ptuning.trainer import TrainingError

    text = str(error)
    short = " ".join(text.split())
    if isinstance(error, MemoryError) or any(sign in short for sign in ("out of memory", "can't allocate memory")):
        reason = ". ".join(short.split(". ")[:2]).rstrip(".")
        return f"there is not enough memory ({reason}): --dry_run shows what takes it, and what to change"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{text}: the disk is full: make room, or take another --output_dir"
    return None if isinstance(error, RuntimeError) and not isinstance(error, TrainingError) else text


def run(arguments: Arguments) -> int:
    """What the arguments ask for. Raises TrainingError, OSError, ValueError or ImportError with a message for users."""
    model_args, data_args, training_args, notes = arguments
    first = training_args.process_index == 0
    say = _Say(first)
    for note in notes:
        say.message("note", text=note)
    import logging

    from ptuning import data, methods, metrics
    from ptuning.trainer import Tuner

    # All that can be wrong with the data is found before the weights are loaded.
    if training_args.predict_with_generate and (training_args.do_eval or training_args.do_predict):
        metrics.load()
    logging.getLogger(data.__name__).setLevel(logging.ERROR)  # what it warns of is in what is printed about the data
    tokenizer = methods.load_tokenizer(model_args)
    columns = data.Columns(data_args.prompt_column, data_args.response_column, data_args.history_column)
    lengths = (data_args.max_source_length, data_args.max_target_length, data_args.source_prefix)

    def dataset(path: str | None, limit: int | None, prediction: bool) -> Any:
        if path is None:
            return None
        rows = data.read_rows(path, columns, tokenizer.chat_format, limit)
        source, target, prefix = lengths
        with training_args.main_process_first(desc="tokens"):
            made = data.make_dataset(
                tokenizer, rows, source, data_args.target_length if prediction else target, prefix,
                prediction=prediction, num_proc=data_args.preprocessing_num_workers,
                overwrite_cache=data_args.overwrite_cache and training_args.local_process_index == 0,
            )  # fmt: skip
        say(data.describe(rows, made).text(say.language))
        return made

    train: Any = dataset(data_args.train_file, data_args.max_train_samples, False) if training_args.do_train else None
    held_out = dataset(data_args.validation_file, data_args.max_eval_samples, True)
    test = dataset(data_args.test_file, data_args.max_predict_samples, True) if training_args.do_predict else None
    if data_args.dry_run:
        from ptuning.dry_run import report

        text, fits = report(arguments, train, held_out, test, say.language)
        say(text)
        return 0 if fits else 1
    for number in range(min(data_args.show_example, len(train) if train is not None else 0)):
        say(data.show_example(tokenizer, train[number], say.language))

    resume = resume_from(training_args, say) if train is not None else None
    if resume is not None:
        methods.check_resumable(Path(resume), model_args)
    model, tokenizer = methods.prepare(model_args, training_args)
    sampling = {"do_sample": True, "top_p": 0.7, "temperature": 0.95} if data_args.do_sample else {}

    def texts(ids: Any) -> list[str]:
        return [tokenizer.decode([i for i in row if i >= 0], skip_special_tokens=True).strip() for row in ids.tolist()]

    def scores(found: Any) -> dict[str, float]:
        return metrics.score(texts(found.predictions), texts(found.label_ids))

    trainer = Tuner(
        method=method_of(model_args),
        base=str(model_args.model_name_or_path),
        stop_ids=tokenizer.chat_format.stop_token_ids(tokenizer),
        max_new_tokens=data_args.target_length,
        generation={"num_beams": data_args.num_beams or 1, **sampling},
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=data.Collator(
            tokenizer.pad_token_id,
            -100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
            multiple_of=8 if training_args.device.type == "cuda" else 1,
        ),
        compute_metrics=scores if training_args.predict_with_generate else None,
    )
    if train is not None:
        baseline = None
        if data_args.baseline_samples > 0 and resume is None:
            rows = train if held_out is None else held_out
            count = min(len(rows), data_args.baseline_samples)
            baseline = trainer.baseline(rows.select(range(count)))
            if baseline is not None:
                kind = TUNING["training" if held_out is None else "validation"][say.language]
                say.message("untuned", count=count, kind=kind, loss=baseline)
        begin = None if resume is None else step_of(resume)
        result = trainer.train(resume_from_checkpoint=resume)
        folder = Path(training_args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if trainer.interrupted:
            say.message("stopped", step=trainer.state.global_step, folder=folder)
            return INTERRUPTED
        found = result.metrics | {"train_samples": len(train)}
        if baseline is not None:
            found["baseline_loss"] = baseline
        if trainer.state.global_step == begin:
            say.message("finished", step=trainer.state.global_step)
        else:
            trainer.log_metrics("train", found)
            trainer.save_metrics("train", found)
            trainer.save_state()
        if folder.is_dir():
            option = f"--model {folder}"
            if trainer.method != "full":
                option = f"--model {model_args.model_name_or_path} --adapter {folder}"
            say.message("trained", command=f"python {os.path.relpath(ROOT / 'cli_demo.py')} {option}")
    if training_args.do_eval:
        found = trainer.evaluate(metric_key_prefix="eval") | {"eval_samples": len(held_out)}
        trainer.log_metrics("eval", found)
        trainer.save_metrics("eval", found)
    if test is not None:
        output = trainer.predict(test, metric_key_prefix="predict")
        found = output.metrics | {"predict_samples": len(test)}
        trainer.log_metrics("predict", found)
        trainer.save_metrics("predict", found)
        if first:
            path = Path(training_args.output_dir) / "generated_predictions.txt"
            aside = path.with_suffix(".unfinished")
            with aside.open("w", encoding="utf-8") as file:
                write_predictions(file, texts(output.label_ids), texts(output.predictions))
            aside.replace(path)
            say.message("predictions", path=path)
    return 0


def first_to_fail() -> bool:
    """Whether this process tells the user what is wrong: of several, the first one, as the others only follow it."""
    import torch.distributed as processes

    if not (processes.is_available() and processes.is_initialized()):
        return os.environ.get("LOCAL_RANK", "0") == "0"  # wrong arguments, the same for all
    try:
        return bool(processes.distributed_c10d._get_default_store().add("chatglm/failed", 1) == 1)
    except RuntimeError:
        return False  # it was kept by a process that has gone


class _Say:
    """Prints for the user, in one process of several."""

    def __init__(self, active: bool) -> None:
        self.active, self.language = active, choose_language()

    def __call__(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def message(self, key: str, **values: Any) -> None:
        self(TUNING[key][self.language].format(**values))


def write_predictions(file: TextIO, labels: list[str], predictions: list[str]) -> None:
    """One JSON object a line, as the originals' generated_predictions.txt."""
    for label, prediction in zip(labels, predictions, strict=True):
        file.write(json.dumps({"labels": label, "predict": prediction}, ensure_ascii=False) + "\n")


def resume_from(training_args: TrainingArguments, say: _Say) -> str | None:
    """The checkpoint to go on from: the named one, or for `true` or an output_dir with checkpoints the last one."""
    from ptuning.trainer import OPTIMIZERS, STATE, CheckpointError, last_checkpoint

    wanted = training_args.resume_from_checkpoint
    choice = (wanted or "").lower()
    if choice in ("false", "no"):
        return None
    if wanted and choice not in ("true", "yes"):
        if not (Path(wanted) / STATE).is_file():
            raise CheckpointError(f"{wanted} is no training checkpoint: it has no {STATE}")
        folder = Path(wanted)
    else:
        last = last_checkpoint(training_args.output_dir)
        if wanted and last is None:
            raise CheckpointError(f"{training_args.output_dir} holds no checkpoint to resume from")
        if last is None or (training_args.overwrite_output_dir and not wanted):
            return None
        folder = last
        say.message("resuming", folder=folder)
    step_of(folder)
    if not any(path for pattern in OPTIMIZERS for path in folder.glob(pattern)):
        say.message("no_optimizer", folder=folder)
    return str(folder)


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """The number of the step after which a checkpoint was written. Raises CheckpointError if it does not say."""
    from ptuning.trainer import STATE, CheckpointError, broken

    try:
        return int(json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(broken(checkpoint, error)) from error


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # into a log file or a pipe, too
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
