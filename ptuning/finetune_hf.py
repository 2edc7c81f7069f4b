"""ChatGLM3's `finetune_demo/finetune_hf.py`: `python -m ptuning.finetune_hf DATA_DIR MODEL_DIR CONFIG.yaml [yes|N]`.

Translates its three arguments and the keys of its configuration files to the arguments of `main.py`, which trains.
Arguments of `main.py` may follow, and win.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptuning import main as training
from ptuning.arguments import ArgumentsError

USAGE = "usage: python -m ptuning.finetune_hf DATA_DIR MODEL_DIR CONFIG.yaml [yes | N] [--ARGUMENT VALUE ...]"
#: How many rows the original evaluated while it trained.
EVALUATED_ROWS = 50

_TOP = {"data_config", "max_input_length", "max_output_length", "training_args", "peft_config"}
_FILES = {
    "train_file": ("train_file", "do_train"),
    "val_file": ("validation_file", "do_eval"),
    "test_file": ("test_file", "do_predict"),
}
#: Keys of `peft_config` by its type: name here -> (argument of main.py, PEFT's default).
_PEFT: dict[str, dict[str, tuple[str, Any]]] = {
    "LORA": {
        "r": ("lora_rank", 8), "lora_alpha": ("lora_alpha", 8), "lora_dropout": ("lora_dropout", 0.0),
        "target_modules": ("lora_target_modules", ["query_key_value"]), "modules_to_save": ("modules_to_save", None),
    },
    "PREFIX_TUNING": {
        "num_virtual_tokens": ("pre_seq_len", None), "prefix_projection": ("prefix_projection", False),
    },
}  # fmt: skip
_METHODS = {"LORA": "lora", "PREFIX_TUNING": "ptuning"}


def main(argv: list[str] | None = None) -> int:
    """Trains; returns the exit status as `main.py` does."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    try:
        arguments = translate(words)
    except ArgumentsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return training.main(arguments, "finetune_hf")


def translate(argv: list[str]) -> list[str]:
    """Returns the arguments of main.py. Raises ArgumentsError, also for a key that it does not know."""
    extra = next((index for index, word in enumerate(argv) if word.startswith("--")), len(argv))
    given, rest = argv[:extra], argv[extra:]
    if len(given) not in (3, 4):
        raise ArgumentsError(USAGE)
    data, model, config = Path(given[0]), given[1], _read(Path(given[2]))
    if not data.is_dir():
        raise ArgumentsError(f"{data}: there is no such folder of data")
    _known(config, _TOP, "")
    values: dict[str, Any] = {"model_name_or_path": model}
    values |= _data_arguments(data, _section(config, "data_config"))
    for key, name in (("max_input_length", "max_source_length"), ("max_output_length", "max_target_length")):
        if key in config:
            values[name] = config[key]
    values |= _training_arguments(_section(config, "training_args"))
    values |= _peft_arguments(_section(config, "peft_config"))
    values |= _resume_arguments(given[3] if len(given) == 4 else "", values)
    return [*_words(values), *rest]


def _read(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ArgumentsError(f"{path} is broken: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ArgumentsError(f"{path} has to hold names and values, as finetune_demo/configs/lora.yaml does")
    return config


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ArgumentsError(f"{name} has to hold names and values")
    return dict(section)


def _known(section: Mapping[str, Any], known: Any, where: str) -> None:
    for key in section:
        if key not in known:
            raise ArgumentsError(
                f"{where}{key} is no key of finetune_demo's configurations: {', '.join(sorted(known))}"
            )


def _data_arguments(folder: Path, section: dict[str, Any]) -> dict[str, Any]:
    _known(section, {*_FILES, "num_proc"}, "data_config.")
    if not section.get("train_file"):
        raise ArgumentsError("data_config.train_file is missing")
    values: dict[str, Any] = {}
    for key, (name, flag) in _FILES.items():
        if section.get(key):
            values |= {name: folder / section[key], flag: True}
    if values.get("do_eval"):
        values["max_eval_samples"] = EVALUATED_ROWS
    if section.get("num_proc"):
        values["preprocessing_num_workers"] = section["num_proc"]
    return values


def _training_arguments(section: dict[str, Any]) -> dict[str, Any]:
    generation = section.pop("generation_config", None) or {}
    if not isinstance(generation, dict):
        raise ArgumentsError("training_args.generation_config has to hold names and values")
    _known(generation, {"max_new_tokens"}, "training_args.generation_config.")
    if "max_new_tokens" in generation:
        section["val_max_target_length"] = generation["max_new_tokens"]
    return section


def _peft_arguments(section: dict[str, Any]) -> dict[str, Any]:
    if not section:
        return {"method": "full"}
    kind = str(section.pop("peft_type", "")).upper()
    if kind not in _PEFT:
        raise ArgumentsError(f"peft_config.peft_type {kind or 'is missing'}: use {' or '.join(_PEFT)}")
    task = section.pop("task_type", "CAUSAL_LM")
    if task != "CAUSAL_LM":
        raise ArgumentsError(f"peft_config.task_type {task}: only CAUSAL_LM is trained")
    keys = _PEFT[kind]
    _known(section, keys, "peft_config.")
    values = {name: section.get(key, default) for key, (name, default) in keys.items()}
    if kind == "PREFIX_TUNING" and values["pre_seq_len"] is None:
        raise ArgumentsError("peft_config.num_virtual_tokens is missing")
    return values | {"method": _METHODS[kind]}


def _resume_arguments(word: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: from the start; `yes`: from the newest checkpoint; a number: from that one."""
    if word == "":
        return {"overwrite_output_dir": True}
    if word.lower() == "yes":
        return {"resume_from_checkpoint": True}
    if word.isdecimal():
        return {"resume_from_checkpoint": Path(str(values.get("output_dir", "output"))) / f"checkpoint-{word}"}
    raise ArgumentsError(f"{word!r}: give yes, the number of a checkpoint, or nothing to train from the start")


def _words(values: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


if __name__ == "__main__":
    sys.exit(main())
