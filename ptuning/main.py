"""Fine-tune a ChatGLM of any generation: P-tuning v2, LoRA or all weights. Arguments and data as in the originals.

`python main.py --help` lists the arguments, README.md explains them; one JSON or YAML file of arguments works, too.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130  # a shell's exit status for Ctrl-C
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # `cd ptuning && python main.py`: both packages are in the repository's root
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # the imports take seconds
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))

from chatglm.checkpoints.atomic import write_file  # noqa: E402
from chatglm.language import choose_language  # noqa: E402
from ptuning.arguments import Arguments, ArgumentsError, method_of, parse  # noqa: E402
from ptuning.messages import command_line, text  # noqa: E402
from ptuning.resuming import resume_from, step_of  # noqa: E402

if TYPE_CHECKING:
    from ptuning.reading import DataSets
    from ptuning.trainer import Tuner  # imported only when needed, so that wrong arguments are reported at once


def main(argv: list[str] | None = None, prog: str = "main.py") -> int:
    """Trains, evaluates and predicts. Returns the exit status: 2 for wrong arguments, 1 for later failures."""
    try:
        status = run(parse(sys.argv[1:] if argv is None else argv, prog))
        if status == 0:
            leave_group_at_exit()
        return status
    except (RuntimeError, OSError, ValueError, ImportError, MemoryError) as error:
        if first_to_fail():
            message = explain(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentsError) else 1  # the other processes see a lost connection
    except KeyboardInterrupt:
        if first_to_fail():
            print(text("interrupted", choose_language()), file=sys.stderr)
        return INTERRUPTED


def explain(error: Exception) -> str | None:
    """The error message for users; None if the error can only be a bug in the program."""
    from ptuning.trainer import TrainingError

    reason = str(error)
    short = " ".join(reason.split())
    if isinstance(error, MemoryError) or any(sign in short for sign in ("out of memory", "can't allocate memory")):
        cause = ". ".join(short.split(". ")[:2]).rstrip(".")
        return f"there is not enough memory ({cause}): --dry_run shows what takes it, and what to change"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{reason}: the disk is full: free some space, or use another --output_dir"
    return None if isinstance(error, RuntimeError) and not isinstance(error, TrainingError) else reason


def run(arguments: Arguments) -> int:
    """Runs what the arguments ask for, and returns the exit status.

    Raises TrainingError, OSError, ValueError or ImportError with a message for users.
    """
    _, data_args, training_args, notes = arguments
    say = _Say(training_args.process_index == 0)
    for note in notes:
        say.message("note", text=note)
    from ptuning.reading import read_data

    tokenizer, sets = read_data(arguments, say, say.language)  # wrong data is found before the weights are loaded
    if sets.train is not None:
        settle_checkpointing(arguments, sets, say)
    if data_args.dry_run:
        from ptuning.dry_run import report

        told, fits = report(arguments, sets.train, sets.held_out, sets.test, say.language)
        say(told)
        return 0 if fits else 1
    for example in sets.examples(data_args.show_example) if sets.train is not None else []:
        from ptuning import data

        say(data.show_example(tokenizer, example, say.language))
    resume = resume_from(training_args, say.message) if sets.train is not None else None
    trainer = make_trainer(arguments, sets, resume, say)
    if sets.train is not None:
        train(arguments, trainer, sets, resume, say)
        if trainer.interrupted:
            return INTERRUPTED
    if training_args.do_eval and not sets.same:
        evaluate(trainer, sets)
    answers = None
    if sets.test is not None:
        answers = predict(trainer, sets, say, also_eval=training_args.do_eval and sets.same)
    if sets.train is not None:
        summarize(arguments, trainer, sets, answers, say)
    return 0


# ---- the steps of a run ----------------------------------------------------------------------------------------------


def settle_checkpointing(arguments: Arguments, sets: DataSets, say: _Say) -> None:
    """Decides about gradient checkpointing by the memory that is available, and says so."""
    from chatglm.checkpoints.memory import readable
    from ptuning.dry_run import choose_checkpointing, evaluation_of

    training_args, data_args = arguments.training, arguments.data
    rows = sets.train
    if sets.streamed:
        rows = {"length": [data_args.max_source_length + data_args.max_target_length + 1]}
    evaluation = evaluation_of(arguments, rows, sets.held_out, sets.test)
    found = choose_checkpointing(arguments, max(rows["length"]), evaluation)
    if training_args.world_size > 1:  # all processes have to compute alike
        from accelerate.utils import broadcast_object_list

        training_args.checkpointing = broadcast_object_list([training_args.checkpointing])[0]
    if found is not None:
        needed, room = map(readable, found)
        say.message(f"checkpointing_{'on' if training_args.checkpointing else 'off'}", needed=needed, room=room)


def make_trainer(arguments: Arguments, sets: DataSets, resume: str | None, say: _Say) -> Tuner:
    """Loads the model with its trainable parts, and makes its trainer. `resume`: the checkpoint to resume from."""
    from transformers import EarlyStoppingCallback

    from ptuning import curve, data, methods, metrics
    from ptuning.packing import Packer
    from ptuning.pictures import Features, check_arguments
    from ptuning.trainer import Tuner

    model_args, data_args, training_args, _ = arguments
    if resume is not None:
        methods.check_resumable(Path(resume), model_args)
    model, tokenizer = methods.prepare(model_args, training_args)
    sampling = {"do_sample": True, "top_p": 0.7, "temperature": 0.95} if data_args.do_sample else {}

    def scores(found: Any) -> dict[str, float]:
        return metrics.score(texts_of(found.predictions, tokenizer), texts_of(found.label_ids, tokenizer))

    callbacks: list[Any] = []
    if sets.train is not None and curve.is_available():
        callbacks.append(curve.Curve(str(training_args.output_dir)))
    elif sets.train is not None:
        say.message("no_curve")
    if training_args.early_stopping:
        callbacks.append(EarlyStoppingCallback(training_args.early_stopping))
    packs = data_args.packing and sets.train is not None
    if sets.train is not None and any("image" in example for example in sets.examples(1)):
        check_arguments(data_args.packing, training_args.dataloader_num_workers)
    return Tuner(
        callbacks=callbacks,
        method=method_of(model_args),
        base=str(model_args.model_name_or_path),
        stop_ids=tokenizer.chat_format.stop_token_ids(tokenizer),
        max_new_tokens=data_args.target_length,
        generation={"num_beams": data_args.num_beams or 1, **sampling},
        model=model,
        args=training_args,
        train_dataset=sets.train,
        eval_dataset=sets.held_out,
        processing_class=tokenizer,
        data_collator=data.Collator(
            tokenizer.pad_token_id,
            -100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
            multiple_of=8 if training_args.device.type == "cuda" else 1,
            counts=True,
            packer=Packer(model) if packs else None,
            pictures=Features(model, tokenizer) if hasattr(model, "place_picture") else None,
        ),
        compute_metrics=scores if training_args.predict_with_generate else None,
    )


def train(arguments: Arguments, trainer: Tuner, sets: DataSets, resume: str | None, say: _Say) -> None:
    """Trains to the end or until interrupted, then prints how to continue."""
    baseline = untuned_loss(arguments, trainer, sets, say) if resume is None else None
    begin = None if resume is None else step_of(resume)
    result = trainer.train(resume_from_checkpoint=resume)
    step = trainer.state.global_step
    folder = Path(arguments.training.output_dir) / f"checkpoint-{step}"
    if trainer.interrupted:
        say.message("stopped", step=step, folder=command_line([folder]))
        return
    found = result.metrics | ({} if sets.streamed else {"train_samples": len(sets.train)})
    if baseline is not None:
        found["baseline_loss"] = baseline
    if step == begin:
        say.message("finished", step=step)
    else:
        keep_metrics(trainer, "train", found)
        trainer.save_state()
    best = trainer.state.best_model_checkpoint if arguments.training.load_best_model_at_end else None
    if best is not None:
        folder = Path(best)
        say.message("best", folder=folder, metric=arguments.training.metric_for_best_model,
                    value=trainer.state.best_metric)  # fmt: skip
    if folder.is_dir():
        sees = hasattr(trainer.model, "place_picture")
        program = ROOT / ("cli_demo_vision.py" if sees else "cli_demo.py")
        installed = ["chatglm", "serve" if sees else "chat"]  # from a wheel, which has no terminal for pictures
        words = ["python", os.path.relpath(program)] if program.is_file() else installed
        words.append("--model")
        if trainer.method == "full":
            words.append(str(folder))
        else:
            words += [str(arguments.model.model_name_or_path), "--adapter", str(folder)]
        say.message("trained", command=command_line(words))


def untuned_loss(arguments: Arguments, trainer: Tuner, sets: DataSets, say: _Say) -> float | None:
    """The loss before training, as a baseline; None if it is switched off or not available."""
    if arguments.data.baseline_samples <= 0:
        return None
    count = arguments.data.baseline_samples
    if sets.held_out is None:
        rows = sets.examples(count)
    else:
        rows = sets.held_out.select(range(min(len(sets.held_out), count)))
    count = len(rows)
    loss = trainer.baseline(rows)
    if loss is not None:
        kind = text("training" if sets.held_out is None else "validation", say.language)
        say.message("untuned", count=count, kind=kind, loss=loss)
    return loss


def evaluate(trainer: Tuner, sets: DataSets) -> None:
    """Computes the loss on the validation data, and the scores of the answers if they are generated."""
    found = trainer.evaluate(metric_key_prefix="eval")
    keep_metrics(trainer, "eval", found | {"eval_samples": len(sets.held_out)})


def predict(trainer: Tuner, sets: DataSets, say: _Say, also_eval: bool = False) -> Any:
    """Generates answers to the test data, writes them to generated_predictions.txt and returns what the Trainer does.

    Args:
        also_eval: they are the answers to the validation data, too: their metrics are those of the evaluation.
    """
    output = trainer.predict(sets.test, metric_key_prefix="predict")
    if also_eval:
        found = {f"eval_{name.removeprefix('predict_')}": value for name, value in output.metrics.items()}
        trainer.log(dict(found))
        keep_metrics(trainer, "eval", found | {"eval_samples": len(sets.held_out)})
    keep_metrics(trainer, "predict", output.metrics | {"predict_samples": len(sets.test)})
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "generated_predictions.txt"
        tokenizer = trainer.processing_class
        write_file(path, predictions(texts_of(output.label_ids, tokenizer), texts_of(output.predictions, tokenizer)))
        say.message("predictions", path=path)
    return output


def summarize(arguments: Arguments, trainer: Tuner, sets: DataSets, answers: Any, say: _Say) -> None:
    """Writes summary.md, with some of the answers: those of `predict`, or new ones to the validation data."""
    from ptuning import summary

    rows = sets.test
    if answers is None and sets.held_out is not None and arguments.training.predict_with_generate:
        rows = sets.held_out.select(range(min(len(sets.held_out), summary.ANSWERS)))
        answers = trainer.predict(rows, metric_key_prefix="shown")
    if not trainer.is_world_process_zero():
        return
    tokenizer, shown = trainer.processing_class, []
    if answers is not None:
        count = summary.ANSWERS
        prompts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows[:count]["prompt_ids"]]
        said, wanted = (texts_of(ids[:count], tokenizer) for ids in (answers.predictions, answers.label_ids))
        shown = list(zip(prompts, said, wanted, strict=True))
    folder = Path(trainer.args.output_dir)
    results = folder / "all_results.json"
    metrics = json.loads(results.read_bytes()) if results.is_file() else {}
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    say.message(
        "summary", path=summary.write_summary(folder, arguments, sets.described, metrics, shown, best, say.language)
    )


def keep_metrics(trainer: Tuner, split: str, found: dict[str, float]) -> None:
    """Prints the metrics, and writes them to the output folder."""
    trainer.log_metrics(split, found)
    trainer.save_metrics(split, found)


def texts_of(ids: Any, tokenizer: Any) -> list[str]:
    """Decodes rows of ids (rows, tokens) that are padded with -100."""
    return [tokenizer.decode([i for i in row if i >= 0], skip_special_tokens=True).strip() for row in ids.tolist()]


def predictions(labels: list[str], answers: list[str]) -> str:
    """One JSON object per line, as in the originals' generated_predictions.txt."""
    pairs = zip(labels, answers, strict=True)
    return "".join(json.dumps({"labels": one, "predict": other}, ensure_ascii=False) + "\n" for one, other in pairs)


# ---- messages for the user -------------------------------------------------------------------------------------------


def first_to_fail() -> bool:
    """Whether this process reports the error: of several, only the first one to fail, which makes the others fail."""
    import torch.distributed as processes

    if not (processes.is_available() and processes.is_initialized()):
        return os.environ.get("LOCAL_RANK", "0") == "0"  # wrong arguments are the same in all processes
    try:
        return bool(processes.distributed_c10d._get_default_store().add("chatglm/failed", 1) == 1)
    except RuntimeError:
        return False  # the process that kept the store has ended


def leave_group_at_exit() -> None:
    """Of several processes: an interpreter that ends beside the threads of their group may end in an abort."""
    import torch.distributed as processes

    if processes.is_available() and processes.is_initialized():
        atexit.unregister(processes.destroy_process_group)
        atexit.register(processes.destroy_process_group)


class _Say:
    """Prints for the user, in one process only."""

    def __init__(self, active: bool) -> None:
        self.active, self.language = active, choose_language()

    def __call__(self, line: str) -> None:
        if self.active:
            print(line, flush=True)

    def message(self, key: str, **values: Any) -> None:
        self(text(key, self.language, **values))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # also into a log file or a pipe
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
