"""The arguments of main.py: the originals' with their defaults, transformers' training arguments, a few new ones."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import IntervalStrategy

from chatglm.checkpoints.file_names import LORA_CONFIG

from .metrics import MEASURES

METHODS = ("ptuning", "lora", "full")
#: PEFT's initialisations that need nothing but the weights. The decomposed ones change the base while training.
INITIAL_LORA = ("default", "gaussian", "orthogonal", "pissa", "olora")
DECOMPOSED = ("pissa", "olora")
DTYPES = ("auto", "float16", "bfloat16", "float32")


class ArgumentsError(ValueError):
    """Wrong or conflicting arguments; the message is one line."""


def _help(text: str, default: Any = None, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class ModelArguments:
    """Which model is tuned or evaluated, and how."""

    model_name_or_path: str | None = _help("folder or hub id of the base model, or of a fully tuned checkpoint")
    ptuning_checkpoint: str | None = _help("prefix or LoRA adapter to evaluate, or to continue training from")
    config_name: str | None = _help("must equal --model_name_or_path: the checkpoint has its own config.json")
    tokenizer_name: str | None = _help("must equal --model_name_or_path: the checkpoint has its own tokenizer")
    cache_dir: str | None = _help("refused: set the environment variable HF_HUB_CACHE")
    use_fast_tokenizer: bool = _help("no effect: the family has one tokenizer", True)
    model_revision: str = _help("branch, tag or commit of a hub id", "main")
    chatglm_version: int | None = _help("1, 2 or 3: the generation of the base, if its folder does not tell it")
    use_auth_token: bool = _help("no effect: the token of `hf auth login` is used where there is one", False)
    resize_position_embeddings: bool | None = _help("refused if true: rotary positions have no table to resize")
    quantization_bit: int | None = _help("4 or 8: quantise the frozen base while loading", choices=(4, 8))
    pre_seq_len: int | None = _help("positions of the trained prefix; P-tuning is the method then")
    prefix_projection: bool = _help("make the prefix by a small MLP", False)
    method: str | None = _help("default: ptuning with --pre_seq_len, else what --ptuning_checkpoint is, else full")
    lora_rank: int = _help("rank of the LoRA matrices", 8)
    lora_alpha: float = _help("LoRA's share is scaled by alpha / rank", 32)
    lora_dropout: float = _help("dropout in front of the LoRA matrices", 0.1)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["query_key_value"],
        metadata={"help": "names of the layers that get LoRA matrices; all-linear: all four kinds"},
    )
    use_rslora: bool = _help("scale LoRA by alpha / sqrt(rank): better at high ranks", False)
    use_dora: bool = _help("DoRA: LoRA with trained lengths of the weights' rows; not on quantised bases", False)
    init_lora_weights: str = _help("how LoRA begins: default, gaussian, orthogonal, pissa, olora", "default")
    modules_to_save: list[str] = field(
        default_factory=list,
        metadata={"help": "names of layers that LoRA trains and saves as a whole: output_layer, final_layernorm …"},
    )
    dtype: str = _help("dtype of the computation and the frozen weights; auto: one that the device is fast in", "auto")
    check_memory: bool = _help("false: load even if the memory seems too small", True)

    @property
    def revision(self) -> str | None:
        """The `revision` for `chatglm.load`; None for the default branch, and for a folder."""
        return None if self.model_revision == "main" else self.model_revision


@dataclass
class DataTrainingArguments:
    """Which data, and how it is tokenised."""

    lang: str | None = _help("no effect, as in the originals")
    dataset_name: str | None = _help("refused: download it and give the files")
    dataset_config_name: str | None = _help("refused with --dataset_name")
    prompt_column: str | None = _help("column of the questions")
    response_column: str | None = _help("column of the answers")
    history_column: str | None = _help("column of the earlier turns: a list of [question, answer]")
    train_file: list[str] | None = field(
        default=None, metadata={"help": "one file or several: JSON lines, a JSON list, or CSV"}
    )
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "for each train_file, how many times its rows are taken; 0.5: half of them"}
    )
    val_size: float = _help("hold out rows of train_file instead of a validation_file: a share, or how many", 0.0)
    streaming: bool = _help("read and tokenise train_file while training, for files larger than memory", False)
    packing: bool = _help("put the examples of a batch into one row without padding; attention keeps them apart", False)
    validation_file: str | None = _help("as train_file, for --do_eval and the untuned loss")
    test_file: str | None = _help("as train_file, for --do_predict")
    overwrite_cache: bool = _help("tokenise again instead of reusing the tokens of an earlier run", False)
    preprocessing_num_workers: int | None = _help("processes that tokenise")
    max_source_length: int = _help("tokens of a prompt at most; the oldest turns go first", 1024)
    max_target_length: int = _help("tokens of an answer at most", 128)
    val_max_target_length: int | None = _help("the same when evaluating and predicting (default: max_target_length)")
    pad_to_max_length: bool = _help("no effect, as in the originals: a batch is padded to its longest row", False)
    max_train_samples: int | None = _help("use only the first rows")
    max_eval_samples: int | None = _help("use only the first rows")
    max_predict_samples: int | None = _help("use only the first rows")
    cut_references: bool = _help("score against references cut to max_target_length, as the originals did", False)
    num_beams: int | None = _help("beam search when evaluating and predicting")
    ignore_pad_token_for_loss: bool = _help("no loss on padding", True)
    source_prefix: str = _help("put in front of every assembled prompt", "")
    forced_bos_token: str | None = _help("refused: the prompt format fixes how an answer begins")
    do_sample: bool = _help("sample as the originals did (top_p 0.7, temperature 0.95) instead of greedy", False)
    show_example: int = _help("print the first N training examples token by token, with what is learned", 0)
    baseline_samples: int = _help("rows for the loss of the untuned model, printed first; 0: none", 64)
    dry_run: bool = _help("print parameters, memory and steps, and train nothing", False)

    @property
    def target_length(self) -> int:
        """Tokens of an answer when evaluating and predicting."""
        return self.max_target_length if self.val_max_target_length is None else self.val_max_target_length


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """transformers' training arguments, with defaults for fine-tuning a chat model."""

    overwrite_output_dir: bool = _help("start from scratch even if output_dir holds checkpoints", False)
    warmup_steps: float = _help("steps until the full learning rate; below 1: a share of all steps", 0.03)
    train_sampling_strategy: str = _help("group_by_length, random or sequential", "group_by_length")
    remove_unused_columns: bool = _help("false: the collator picks the columns", False)
    logging_nan_inf_filter: bool = _help("false: a NaN or infinite loss is shown and stops the run", False)
    ddp_find_unused_parameters: bool | None = _help("false: every trained weight is used in every step", False)
    keep_best: bool = _help("end with the best checkpoint: the one with the lowest evaluation loss", False)
    early_stopping: int = _help("stop after so many evaluations in a row without a better one (keeps the best)", 0)
    logging_dir: str | None = _help("folder of tensorboard's files (default: output_dir/runs/...)")
    gradient_checkpointing: bool | None = _help("less memory, slower steps (default: if the memory needs it)")

    def __post_init__(self) -> None:
        if self.logging_dir is not None:  # where today's transformers look for it
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        self.checkpointing_chosen = self._choose_checkpointing()
        if self.keep_best or self.early_stopping > 0:
            self._keep_best()
        super().__post_init__()
        if self.device.type != "cuda":
            self.dataloader_pin_memory = False
        if self.n_gpu > 1:
            self._n_gpu = 1  # never nn.DataParallel: main.py says how to use the other GPUs

    def _choose_checkpointing(self) -> bool:
        """Sets the default of gradient checkpointing; returns whether the user has chosen it."""
        new = _checkpointing_name(self)
        chosen = False
        for suffix, default in (("", True), ("_kwargs", {"use_reentrant": False})):
            old = f"gradient_checkpointing{suffix}"
            given = [value for value in (getattr(self, new + suffix), getattr(self, old)) if value is not None]
            chosen = chosen or (not suffix and bool(given))
            setattr(self, old, None)
            setattr(self, new + suffix, given[0] if given else default)
        return chosen

    def _keep_best(self) -> None:
        """Evaluates wherever a checkpoint is written, unless the user has said when to evaluate."""
        given: Any = self
        given.load_best_model_at_end = True
        if given.eval_strategy in ("no", IntervalStrategy.NO):
            given.eval_strategy, given.eval_steps = given.save_strategy, given.save_steps
        elif given.eval_strategy == given.save_strategy == "steps" and given.eval_steps and given.save_steps == 500:
            given.save_steps = given.eval_steps  # 500 is the default

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on, under either name."""
        return bool(getattr(self, _checkpointing_name(self)))

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        setattr(self, _checkpointing_name(self), value)

    @property
    def device(self) -> torch.device:
        """`cpu`, not accelerate's `cpu:0` (several processes), where transformers 5.17 cannot load an optimizer."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def _checkpointing_name(training: Any) -> str:
    # Newer releases of transformers call it activation checkpointing, and warn about the old name.
    return "activation_checkpointing" if hasattr(training, "activation_checkpointing") else "gradient_checkpointing"


class Arguments(NamedTuple):
    """All arguments of main.py. `notes`: remarks for the user on arguments, one line each."""

    model: ModelArguments
    data: DataTrainingArguments
    training: TrainingArguments
    notes: list[str]


# Names of older transformers releases that the originals' users have in their scripts.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",
    "torch_dtype": "dtype",
}
REMOVED = {
    "group_by_length": "rows are always grouped by length (--train_sampling_strategy random turns it off)",
    "save_safetensors": "checkpoints are always safetensors",
    "half_precision_backend": "there is only one backend left",
    "fp16_backend": "there is only one backend left",
    "fp16_opt_level": "apex is not used",
    "sharded_ddp": "use --deepspeed or accelerate's FSDP",
    "past_index": "the models have no such output",
    "tpu_num_cores": "no TPU is used",
    "jit_mode_eval": "it was removed from transformers",
    "use_ipex": "it was removed from transformers",
    "ray_scope": "it was removed from transformers",
    "use_mps_device": "an Apple GPU is used automatically",
    "include_inputs_for_metrics": "it was removed from transformers",
    "prediction_debug": "the originals have no such argument",
}


class Parser(HfArgumentParser):  # type: ignore[misc, unused-ignore]
    def error(self, message: str) -> Any:
        raise ArgumentsError(message)


def parse(argv: list[str], prog: str = "main.py") -> Arguments:
    """Parses and checks a command line, which may begin with a *.json, *.yaml or *.yml file of arguments.

    What follows the file wins over what it says. `prog`: for --help.

    Raises ArgumentsError: one line that says what to do.
    """
    argv = argument_words(argv)
    notes: list[str] = []
    parser = Parser(
        (ModelArguments, DataTrainingArguments, TrainingArguments),
        prog=prog, allow_abbrev=False, description="P-tuning v2, LoRA and full tuning of ChatGLM models.",
    )  # fmt: skip
    try:
        model, data, training, rest = parser.parse_args_into_dataclasses(
            _translate(argv, notes), return_remaining_strings=True, look_for_args_file=False
        )
    except ArgumentsError:
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, NotImplementedError) as error:
        raise ArgumentsError(" ".join(str(error).split())) from error
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ArgumentsError(unknown_argument(rest, known))
    arguments = Arguments(model, data, training, notes)
    _check(arguments)
    return arguments


def argument_words(argv: list[str]) -> list[str]:
    """The words of a command line, with the file of arguments that it may begin with opened."""
    if argv and Path(argv[0]).suffix in (".json", ".yaml", ".yml"):
        return [*_from_file(Path(argv[0])), *argv[1:]]
    return argv


def unknown_argument(rest: list[str], known: list[str]) -> str:
    """The error message for what is no argument."""
    if not rest[0].startswith("-"):
        return f"{rest[0]!r} belongs to no argument: arguments begin with --, and a file of them comes first"
    # Without the dashes, which all have in common; 0.8: a letter or two are wrong, or a word's end.
    names = {name.lstrip("-").replace("-", "_"): name for name in reversed(known)}
    wanted = rest[0].partition("=")[0].lstrip("-").replace("-", "_")
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.8)
    return f"there is no argument {rest[0]}" + (f": did you mean {names[close[0]]}?" if close else "")


def page_arguments(argv: list[str]) -> list[str]:
    """Translates the arguments of the originals' ptuning/web_demo.py to those of ../web_demo.py.

    Raises ArgumentsError.
    """
    parser = Parser((ModelArguments,), prog="web_demo.py", allow_abbrev=False)
    model, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    check_base(model)
    _refuse(
        model.pre_seq_len is not None and model.ptuning_checkpoint is None,
        "--pre_seq_len without --ptuning_checkpoint would be an untrained prefix: name the checkpoint",
    )
    given = {
        "model": model.model_name_or_path, "revision": model.revision, "adapter": model.ptuning_checkpoint,
        "quantize": model.quantization_bit, "dtype": model.dtype, "chatglm-version": model.chatglm_version,
    }  # fmt: skip
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return [*words, *(() if model.check_memory else ("--no-memory-check",)), *rest]


def _translate(argv: list[str], notes: list[str]) -> list[str]:
    """Renames the arguments of older releases, and drops those without a meaning today, with a note."""
    out: list[str] = []
    skipping = False
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            skipping = name in REMOVED
            if skipping:
                notes.append(f"--{name} is left out: {REMOVED[name]}")
            elif name in RENAMED:
                out.append(f"--{RENAMED[name]}{equals}{value}")
            else:
                out.append(word)
        elif not skipping:
            out.append(word)
    return out


def _from_file(path: Path) -> list[str]:
    """The arguments of a JSON or YAML file, as they would be on the command line."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped, unused-ignore]

            values = yaml.safe_load(text)
    except OSError as error:
        raise ArgumentsError(f"cannot read the argument file {path}: {error.strerror}") from error
    except Exception as error:  # each parser has its own error types
        raise ArgumentsError(f"the argument file {path} is broken: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ArgumentsError(f"the argument file {path} has to hold names and values, not a {type(values).__name__}")
    argv: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        argv.append(f"--{name}")
        for item in value if isinstance(value, list) else [value]:
            argv.append(json.dumps(item) if isinstance(item, dict) else str(item))
    return argv


def method_of(model: ModelArguments) -> str:
    """ptuning, lora or full."""
    if model.method is not None:
        return model.method
    if model.ptuning_checkpoint is not None:
        return "lora" if (Path(model.ptuning_checkpoint) / LORA_CONFIG).is_file() else "ptuning"
    return "ptuning" if model.pre_seq_len is not None else "full"


def _check(arguments: Arguments) -> None:
    model, data, training, notes = arguments
    training.do_train = training.do_train or data.dry_run
    _check_model(model, training, notes)
    _check_data(model, data, training, notes)
    _check_training(model, training, notes)
    _check_numbers(training)
    if not data.dry_run:
        _check_output(Path(str(training.output_dir)))


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ArgumentsError(message)


def check_base(model: ModelArguments) -> None:
    path = model.model_name_or_path
    _refuse(not path, "--model_name_or_path is missing: a folder, or a hub id such as THUDM/chatglm3-6b")
    for name in ("config_name", "tokenizer_name"):
        other = getattr(model, name)
        _refuse(other not in (None, path), f"--{name} {other}: only the one in --model_name_or_path fits the weights")
    _refuse(model.cache_dir is not None, "--cache_dir: set the environment variable HF_HUB_CACHE instead")
    _refuse(bool(model.resize_position_embeddings), "--resize_position_embeddings: rotary positions have no table")
    _refuse(model.dtype not in DTYPES, f"--dtype {model.dtype}: use one of {', '.join(DTYPES)}")
    _refuse(
        model.method is not None and model.method not in METHODS,
        f"--method {model.method}: use one of {', '.join(METHODS)}",
    )
    checkpoint = model.ptuning_checkpoint
    if checkpoint is not None:
        there = Path(checkpoint).exists()
        _refuse(not there, f"--ptuning_checkpoint {checkpoint}: there is no such file or folder")
        is_lora = (Path(checkpoint) / LORA_CONFIG).is_file()
        _refuse(model.method == "full", "--method full takes no --ptuning_checkpoint: give --model_name_or_path only")
        _refuse(
            model.method is not None and (model.method == "lora") != is_lora,
            f"--method {model.method}, but {checkpoint} is {'a LoRA adapter' if is_lora else 'a prefix'}",
        )


def check_lora(model: ModelArguments) -> None:
    """Raises ArgumentsError if LoRA's arguments are wrong."""
    start = model.init_lora_weights
    known = start in INITIAL_LORA or re.fullmatch(r"pissa_niter_[1-9]\d*", start)
    _refuse(not known, f"--init_lora_weights {start}: use one of {', '.join(INITIAL_LORA)} or pissa_niter_N")
    _refuse(start.startswith(DECOMPOSED) and model.use_dora, f"--init_lora_weights {start} and --use_dora: use one")
    by_weights = (("use_dora", model.use_dora), (f"init_lora_weights {start}", start.startswith(DECOMPOSED)))
    for name, wanted in by_weights:
        _refuse(wanted and model.quantization_bit is not None,
                f"--{name} computes with the weights of the base, which --quantization_bit rounds: leave one out")
    _refuse(model.lora_rank < 1, f"--lora_rank {model.lora_rank}: has to be 1 or more")
    _refuse(not 0 <= model.lora_dropout < 1, f"--lora_dropout {model.lora_dropout}: has to be from 0 to below 1")
    _refuse(not 0 < model.lora_alpha < math.inf, f"--lora_alpha {model.lora_alpha}: has to be above 0")


def _check_model(model: ModelArguments, training: TrainingArguments, notes: list[str]) -> None:
    check_base(model)
    checkpoint = model.ptuning_checkpoint
    method = method_of(model)
    length = model.pre_seq_len
    if method == "ptuning":
        _refuse(length is None and checkpoint is None, "--method ptuning needs --pre_seq_len, 128 for example")
        _refuse(length is not None and length < 1, f"--pre_seq_len {length}: has to be 1 or more")
        _refuse(
            checkpoint is None and not training.do_train,
            "--pre_seq_len without --ptuning_checkpoint would evaluate an untrained prefix: name the checkpoint, "
            "or leave --pre_seq_len out to evaluate the base model",
        )
    else:
        if checkpoint is None:
            _refuse(length is not None, f"--pre_seq_len is for --method ptuning, and this is {method}")
        _refuse(model.prefix_projection, "--prefix_projection is for P-tuning: give --pre_seq_len, too")
    if method == "lora":
        check_lora(model)
        _refuse(checkpoint is not None and bool(model.modules_to_save),
                "--modules_to_save: the adapter in --ptuning_checkpoint says which layers it replaces: leave it out")
    else:
        _refuse(bool(model.modules_to_save), f"--modules_to_save is for --method lora, and this is {method}")
    if method == "full" and training.do_train:
        _refuse(
            model.quantization_bit is not None,
            "--quantization_bit freezes the weights: full tuning needs them all; use --method ptuning or lora",
        )
    if not model.use_fast_tokenizer:
        notes.append("--use_fast_tokenizer has no effect: the family has one tokenizer")


def _check_data(
    model: ModelArguments, data: DataTrainingArguments, training: TrainingArguments, notes: list[str]
) -> None:
    _refuse(data.dataset_name is not None or data.dataset_config_name is not None,
            "--dataset_name: download the data and give --train_file, --validation_file or --test_file")  # fmt: skip
    _refuse(data.forced_bos_token is not None, "--forced_bos_token: the prompt format fixes how an answer begins")
    _refuse(
        not (training.do_train or training.do_eval or training.do_predict),
        "nothing to do: add --do_train, --do_eval or --do_predict",
    )
    for flag, name in (("do_train", "train_file"), ("do_eval", "validation_file"), ("do_predict", "test_file")):
        given = getattr(data, name)
        missing = given is None and not (name == "validation_file" and data.val_size > 0)
        or_size = " or --val_size" if name == "validation_file" and training.do_train else ""
        _refuse(getattr(training, flag) and missing, f"--{flag} needs --{name}{or_size}")
        for path in given if isinstance(given, list) else [given] if given is not None else []:
            _refuse(Path(path).is_dir(), f"--{name} {path}: is a folder: name one file in it")
            _refuse(Path(path).suffix.lower() not in (".json", ".jsonl", ".csv"),
                    f"--{name} {path}: has to be .json, .jsonl or .csv")  # fmt: skip
            _refuse(not Path(path).is_file(), f"--{name} {path}: there is no such file")
    _check_mixing(data, training)
    for name in ("max_source_length", "max_target_length", "val_max_target_length",
                 "max_train_samples", "max_eval_samples", "max_predict_samples", "num_beams",
                 "preprocessing_num_workers"):  # fmt: skip
        value = getattr(data, name)
        _refuse(value is not None and value < 1, f"--{name} {value}: has to be 1 or more")
    if training.do_predict and not training.predict_with_generate:
        training.predict_with_generate = True
        notes.append("--do_predict writes generated answers: --predict_with_generate is turned on")
    for name in ("lang", "pad_to_max_length"):
        if getattr(data, name):
            notes.append(f"--{name} has no effect, as in the originals")


def _check_mixing(data: DataTrainingArguments, training: TrainingArguments) -> None:
    files, weights, size = data.train_file or [], data.train_weights, data.val_size
    if weights is not None:
        _refuse(len(weights) != len(files), f"--train_weights: {len(weights)} for {len(files)} of --train_file")
        wrong = [weight for weight in weights if not 0 < weight < math.inf]
        _refuse(bool(wrong), f"--train_weights {' '.join(map(str, wrong))}: has to be above 0")
    if size:
        _refuse(not 0 < size < math.inf or (size > 1 and size % 1 > 0),
                f"--val_size {size:g}: a share below 1, or a number of rows")  # fmt: skip
        _refuse(data.validation_file is not None, "--val_size and --validation_file: leave one out")
        _refuse(not training.do_train, "--val_size holds out rows of --train_file: it needs --do_train")
    if data.streaming:
        _refuse(bool(size), "--val_size needs to know all rows: give --validation_file with --streaming")
        _refuse(training.max_steps <= 0, "--streaming needs --max_steps: the end of the data is not known")
        _refuse(data.max_train_samples is not None, "--streaming reads on: use --max_steps, not --max_train_samples")
        _refuse(data.dry_run, "--dry_run reads the data: leave --streaming out")
    _refuse(training.early_stopping < 0, f"--early_stopping {training.early_stopping}: has to be 1 or more")


def _check_training(model: ModelArguments, training: TrainingArguments, notes: list[str]) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        _refuse(getattr(training, name) < 1, f"--{name} {getattr(training, name)}: has to be 1 or more")
    _refuse(training.label_smoothing_factor != 0, "--label_smoothing_factor: the loss is always plain cross-entropy")
    _refuse(training.push_to_hub, "--push_to_hub: upload the checkpoint after training, with `hf upload`")
    for name in training.report_to:
        loggers = integration_utils.INTEGRATION_TO_CALLBACK
        _refuse(name not in loggers, f"--report_to {name}: use none, or one of {', '.join(sorted(loggers))}")
        check = getattr(integration_utils, f"is_{name}_available", None)
        _refuse(check is not None and not check(), f"--report_to {name}: it is not installed: pip install {name}")
    if training.metric_for_best_model is not None:
        known = ["loss", *(MEASURES if training.predict_with_generate else ())]
        _refuse(
            training.metric_for_best_model.removeprefix("eval_") not in known,
            f"--metric_for_best_model {training.metric_for_best_model}: use one of {', '.join(known)}"
            + ("" if training.predict_with_generate else "; with --predict_with_generate also ROUGE and BLEU"),
        )
    wanted = {"fp16": "float16", "bf16": "bfloat16"}
    for flag, dtype in wanted.items():
        both = getattr(training, flag) and model.dtype not in ("auto", dtype)
        _refuse(both, f"--{flag} and --dtype {model.dtype} do not go together: leave one out")
    half = training.do_train and (training.fp16 or model.dtype == "float16")
    _refuse(
        half and training.device.type == "cpu" and not training.deepspeed,
        "float16 training needs a GPU: on a CPU take --dtype bfloat16 or float32",
    )
    # The Trainer would convert the whole model, even a prefix and quantised scales: load it in that dtype instead.
    for flag, dtype in (("fp16_full_eval", "float16"), ("bf16_full_eval", "bfloat16")):
        if getattr(training, flag):
            setattr(training, flag, False)
            if training.do_train:
                notes.append(f"--{flag} has no effect while training: evaluation uses the dtype of training")
            elif model.dtype == "auto":
                model.dtype = dtype
    resume = training.resume_from_checkpoint
    if resume is not None and resume.lower() not in ("true", "yes", "false", "no"):
        _refuse(not Path(resume).is_dir(), f"--resume_from_checkpoint {resume}: there is no such folder")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    _refuse(
        processes > 1 and training.world_size == 1,
        f"{processes} processes were started, and without GPUs each would train alone: "
        "add --use_cpu --ddp_backend gloo",
    )
    if processes == 1:
        count = torch.cuda.device_count()
        if count > 1 and training.device.type == "cuda":
            notes.append(
                f"{count} GPUs are visible and one is used; to use all: "
                f"torchrun --standalone --nproc-per-node={count} main.py ..."
            )


def _check_numbers(training: TrainingArguments) -> None:
    for name, value in vars(training).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentsError(f"--{name} {value}: has to be a number")
    if not training.do_train:
        return
    _refuse(training.learning_rate < 0, f"--learning_rate {training.learning_rate}: has to be 0 or more")
    _refuse(
        training.max_steps < -1 or training.max_steps == 0,
        f"--max_steps {training.max_steps}: has to be 1 or more (or -1 to train for --num_train_epochs)",
    )
    _refuse(
        training.max_steps < 0 and training.num_train_epochs <= 0,
        f"--num_train_epochs {training.num_train_epochs:g}: has to be above 0",
    )
    _refuse(not 0 <= training.seed < 2**32, f"--seed {training.seed}: has to be from 0 to {2**32 - 1}")


def _check_output(folder: Path) -> None:
    """Refuses an output folder that cannot be written, before anything is computed for it."""
    _refuse(folder.exists() and not folder.is_dir(), f"--output_dir {folder}: is a file: name a folder")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    _refuse(
        not (there.is_dir() and os.access(there, os.W_OK)),
        f"--output_dir {folder}: {there} is {'not writable' if there.is_dir() else 'a file'}: name another folder",
    )
