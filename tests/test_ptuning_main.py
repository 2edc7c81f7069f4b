"""ptuning/main.py as users start it: the originals' arguments and scripts, what is refused, what is written."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import integration_utils

from ptuning import dry_run, methods
from ptuning import main as program
from ptuning.arguments import ArgumentsError, method_of, page_arguments, parse
from ptuning.trainer import Tuner
from tiny_folders import make_folder
from tuning import METHODS, arguments, write_rows

pytest.importorskip("datasets")
pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[1]
PTUNING = ROOT / "ptuning"
ENVIRONMENT = os.environ | {"PYTHONUTF8": "1", "LANG": "en_US.UTF-8", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LANG", "en_US.UTF-8")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "chatglm3-tiny", 3)


# ---- arguments -------------------------------------------------------------------------------------------------------

# The lines of the originals' scripts; {data} is a data file, {out} the output folder.
COMMON = (
    "--overwrite_cache --model_name_or_path THUDM/chatglm-6b --output_dir {out} --overwrite_output_dir "
    "--per_device_eval_batch_size 1 --predict_with_generate "
)
TRAIN = (
    "--do_train --train_file {data} --validation_file {data} --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 16 --max_steps 3000 --logging_steps 10 --save_steps 1000 --pre_seq_len 128 "
    "--quantization_bit 4 " + COMMON
)
COLUMNS = "--prompt_column content --response_column summary "
ORIGINALS = {
    "ChatGLM-6B train.sh": TRAIN + COLUMNS + "--max_source_length 64 --max_target_length 64 --learning_rate 2e-2",
    "ChatGLM2-6B train.sh": TRAIN + COLUMNS + "--preprocessing_num_workers 10 --max_source_length 64 "
    "--max_target_length 128 --learning_rate 2e-2",
    "train_chat.sh": TRAIN + "--prompt_column prompt --response_column response --history_column history "
    "--max_source_length 256 --max_target_length 256 --learning_rate 1e-2",
    "evaluate.sh": COMMON + COLUMNS + "--do_predict --validation_file {data} --test_file {data} --max_source_length 64 "
    "--max_target_length 64 --ptuning_checkpoint {out} --pre_seq_len 128 --quantization_bit 4",
    "evaluate_finetune.sh": COMMON + COLUMNS + "--do_predict --validation_file {data} --test_file {data} "
    "--max_source_length 256 --max_target_length 256 --fp16_full_eval",
}


@pytest.mark.parametrize("script", ORIGINALS)
def test_the_lines_of_the_originals_scripts(script: str, rows: Path, tmp_path: Path) -> None:
    found = parse(ORIGINALS[script].format(data=rows, out=tmp_path).split())
    assert found.training.predict_with_generate and found.notes == []
    assert method_of(found.model) == ("full" if script == "evaluate_finetune.sh" else "ptuning")
    if found.training.do_train:
        assert (found.training.learning_rate, found.training.max_steps) == (1e-2 if "chat" in script else 2e-2, 3000)
        assert (found.model.pre_seq_len, found.model.quantization_bit) == (128, 4)
    if script == "evaluate_finetune.sh":
        assert found.model.dtype == "float16"


SCRIPTS = ("train.sh", "train_chat.sh", "evaluate.sh", "evaluate_finetune.sh", "ds_train_finetune.sh")


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
@pytest.mark.parametrize("script", SCRIPTS)
def test_our_scripts(script: str, rows: Path, tmp_path: Path) -> None:
    """What torchrun or deepspeed would be given is what main.py takes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("torchrun", "deepspeed"):
        (tools / name).write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
        (tools / name).chmod(0o755)
    (tools / "python3").symlink_to("torchrun")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.json", "dev.json"):
        (data / name).write_bytes(rows.read_bytes())
    values = {
        "PATH": f"{tools}:{os.environ['PATH']}", "DATA": str(data), "CHECKPOINT_NAME": str(tmp_path / "out"),
        "CHAT_TRAIN_DATA": str(rows), "CHAT_VAL_DATA": str(rows), "MODEL": "THUDM/chatglm2-6b",
        "NUM_GPUS": "2",
    }  # fmt: skip
    command = ["bash", str(PTUNING / script), "--seed", "7"]
    done = subprocess.run(command, env=ENVIRONMENT | values, capture_output=True, text=True, check=True)
    launcher, _, words = done.stdout.partition("main.py\n")
    assert "--standalone" in launcher or "--num_gpus" in launcher
    argv = words.split("\n")[:-1]
    if "--deepspeed" in argv:  # parsed where there is a GPU
        config = argv.pop(argv.index("--deepspeed") + 1)
        argv.remove("--deepspeed")
        argv.remove("--fp16")
        assert json.loads((PTUNING / config).read_text())["zero_optimization"]["stage"] == 2
    if "--ptuning_checkpoint" in argv:
        argv[argv.index("--ptuning_checkpoint") + 1] = str(tmp_path)
    found = parse(argv)
    assert found.training.seed == 7 and found.notes == []

    # One process needs no launcher, which would add a traceback of its own to every message.
    if script != "ds_train_finetune.sh":
        alone = subprocess.run(command, env=ENVIRONMENT | values | {"NUM_GPUS": "1"}, capture_output=True, text=True)
        assert alone.stdout == f"main.py\n{words}"

    # DATA may be one file.
    if script in ("train.sh", "ds_train_finetune.sh"):
        one = subprocess.run(command, env=ENVIRONMENT | values | {"DATA": str(rows)}, capture_output=True, text=True)
        found = parse([word for word in one.stdout.partition("main.py\n")[2].split("\n")[:-1]
                       if word not in ("--deepspeed", config_of(script), "--fp16")])  # fmt: skip
        assert found.data.train_file in (None, [str(rows)]) and found.data.test_file in (None, str(rows))


def config_of(script: str) -> str | None:
    return "deepspeed.json" if script.startswith("ds_") else None


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
@pytest.mark.parametrize(("script", "message"), [("train.sh", "NUM_GPUS=64, but there are fewer GPUs here"),
                                                 ("ds_train_finetune.sh", "DeepSpeed is not installed")])  # fmt: skip
def test_what_a_script_lacks_is_one_line(script: str, message: str, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    for tool in ("bash", "dirname", "basename"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    values = {"PATH": str(tmp_path), "DATA": str(rows), "NUM_GPUS": "64"}
    done = subprocess.run(["bash", str(PTUNING / script)], env=ENVIRONMENT | values, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


BAD = {
    "no model": (["--do_train"], "--model_name_or_path is missing"),
    "nothing to do": (["--model_name_or_path", "x"], "nothing to do"),
    "mistyped": (["--lerning_rate", "1"], "there is no argument --lerning_rate: did you mean --learning_rate?"),
    "nothing like it": (["--flash_attn", "auto"], "there is no argument --flash_attn\n"),
    "a word too many": (["--seed", "1", "again"], "'again' belongs to no argument"),
    "no such logger": (["--report_to", "tensorbord"], "--report_to tensorbord: use none, or one of "),
    "no number": (["--max_steps", "many"], "--max_steps/--max-steps: invalid int value: 'many'"),
    "no data": (["--do_train", "--model_name_or_path", "x"], "--do_train needs --train_file"),
    "missing file": (["--train_file", "none.json"], "--train_file none.json: there is no such file"),
    "kind of file": (["--train_file", "none.txt"], "has to be .json, .jsonl or .csv"),
    "bits": (["--quantization_bit", "3"], "invalid choice: 3 (choose from 4, 8)"),
    "full and quantised": (["--quantization_bit", "4"], "full tuning needs them all"),
    "prefix and LoRA": (["--method", "lora", "--pre_seq_len", "8"], "--pre_seq_len is for --method ptuning"),
    "no length": (["--method", "ptuning"], "--method ptuning needs --pre_seq_len"),
    "length 0": (["--pre_seq_len", "0"], "--pre_seq_len 0: has to be 1 or more"),
    "projection of nothing": (["--prefix_projection"], "--prefix_projection is for P-tuning"),
    "method": (["--method", "magic"], "--method magic: use one of ptuning, lora, full"),
    "no checkpoint": (["--ptuning_checkpoint", "nowhere"], "--ptuning_checkpoint nowhere: there is no such"),
    "hub data": (["--dataset_name", "adgen"], "--dataset_name: download the data"),
    "bos": (["--forced_bos_token", "x"], "--forced_bos_token: the prompt format fixes"),
    "config": (["--config_name", "y"], "--config_name y: only the one in --model_name_or_path"),
    "cache": (["--cache_dir", "y"], "HF_HUB_CACHE"),
    "positions": (["--resize_position_embeddings", "True"], "rotary positions have no table"),
    "dtype": (["--dtype", "int8"], "--dtype int8: use one of auto"),
    "two dtypes": (["--bf16", "--use_cpu", "--dtype", "float32"], "--bf16 and --dtype float32 do not go together"),
    "float16 on a CPU": (["--dtype", "float16", "--use_cpu"], "float16 training needs a GPU"),
    "batch 0": (["--per_device_train_batch_size", "0"], "has to be 1 or more"),
    "rate": (["--learning_rate", "nan"], "--learning_rate nan: has to be a number"),
    "negative rate": (["--learning_rate", "-1"], "--learning_rate -1.0: has to be 0 or more"),
    "steps": (["--max_steps", "-5"], "--max_steps -5: has to be 1 or more"),
    "epochs": (["--num_train_epochs", "0"], "--num_train_epochs 0: has to be above 0"),
    "seed": (["--seed", "-1"], "--seed -1: has to be from 0"),
    "alpha": (["--method", "lora", "--lora_alpha", "nan"], "--lora_alpha nan: has to be above 0"),
    "hub": (["--push_to_hub"], "--push_to_hub: upload the checkpoint"),
    "report": (["--report_to", "wandb"], "--report_to wandb: it is not installed"),
    "metric": (["--metric_for_best_model", "foo"], "--metric_for_best_model foo: use one of loss;"),
    "folder of data": (["--train_file", str(ROOT)], "is a folder: name one file in it"),
    "output in a file": (["--output_dir", "{data}/out"], "is a file: name another folder"),
    "smoothing": (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor"),
    "resume": (["--resume_from_checkpoint", "gone"], "--resume_from_checkpoint gone: there is no such folder"),
    "transformers' own": (["--load_best_model_at_end"], "requires the save and eval strategy to match"),
    "untrained": (["--do_train", "False", "--do_eval", "--validation_file", "{data}", "--pre_seq_len", "8"],
                  "would evaluate an untrained prefix"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_one_line(
    case: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, message = BAD[case]
    extra = [word.format(data=rows) for word in extra]
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    argv = extra if case in ("no model", "nothing to do", "no data") else arguments("x", rows, tmp_path / "o", *extra)
    assert program.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("error: ")


def test_arguments_of_older_releases(rows: Path, tmp_path: Path) -> None:
    old = ["--evaluation_strategy", "steps", "--warmup_ratio", "0.1", "--group_by_length", "True", "--eval-steps", "5",
           "--save_safetensors", "--pre_seq_len", "4", "--validation_file", str(rows)]  # fmt: skip
    found = parse(arguments("x", rows, tmp_path, *old))
    assert found.training.eval_strategy == "steps" and found.training.eval_steps == 5
    assert found.training.warmup_steps == 0.1
    assert [note.split(" ")[0] for note in found.notes] == ["--group_by_length", "--save_safetensors"]


def test_defaults(rows: Path, tmp_path: Path) -> None:
    argv = ["--do_train", "--model_name_or_path", "x", "--train_file", str(rows), "--use_cpu"]
    model, data, training, _ = parse(argv)
    assert (data.max_source_length, data.max_target_length, data.target_length) == (1024, 128, 128)
    assert (training.warmup_steps, training.max_grad_norm) == (0.03, 1)
    assert training.train_sampling_strategy == "group_by_length"
    assert training.checkpointing and not training.checkpointing_chosen
    for value in (True, False):
        training = parse([*argv, "--gradient_checkpointing", str(value)]).training
        assert training.checkpointing == value and training.checkpointing_chosen
    assert (model.lora_rank, model.lora_alpha, model.lora_dropout, model.lora_target_modules) == (
        8, 32, 0.1, ["query_key_value"])  # fmt: skip
    assert method_of(model) == "full"


def test_the_folder_of_tensorboards_files(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=object))  # if neither is installed
    argv = ["--do_train", "--model_name_or_path", "x", "--train_file", str(rows), "--use_cpu"]
    parse([*argv, "--report_to", "tensorboard", "--logging_dir", str(tmp_path / "logs")])
    assert integration_utils.TensorBoardCallback(tb_writer=object()).logging_dir == str(tmp_path / "logs")


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_file_of_arguments(kind: str, rows: Path, tmp_path: Path) -> None:
    values = {
        "do_train": True, "model_name_or_path": "x", "train_file": str(rows), "learning_rate": 2e-2, "pre_seq_len": 16,
        "lora_target_modules": ["a", "b"], "do_sample": False, "use_cpu": True, "val_max_target_length": None,
    }  # fmt: skip
    path = tmp_path / f"arguments.{kind}"
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items())
    path.write_text(json.dumps(values) if kind == "json" else text.replace("0.02", "2e-2"))
    model, data, training, _ = parse([str(path)])
    assert (training.learning_rate, model.pre_seq_len, model.lora_target_modules) == (0.02, 16, ["a", "b"])
    assert training.do_train and not data.do_sample and data.target_length == 128
    found = parse([str(path), "--max_steps", "2", "--pre_seq_len", "8"])  # what follows the file wins
    assert (found.training.max_steps, found.model.pre_seq_len, found.training.learning_rate) == (2, 8, 0.02)
    for broken in ("{", "[1]", '{"no_such": 1}'):
        path.write_text(broken)
        with pytest.raises(ArgumentsError):
            parse([str(path)])


def test_the_arguments_of_the_page() -> None:
    argv = "--model_name_or_path base --ptuning_checkpoint out/checkpoint-3000 --pre_seq_len 128 --port 8000".split()
    with pytest.raises(ArgumentsError, match="there is no such file or folder"):
        page_arguments(argv)
    argv[3] = str(PTUNING)
    assert page_arguments(argv) == [
        "--model", "base", "--adapter", str(PTUNING), "--dtype", "auto", "--port", "8000"]  # fmt: skip


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_from_data_to_predictions(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    evaluation = ["--do_eval", "--do_predict", "--validation_file", str(rows), "--test_file", str(rows),
                  "--predict_with_generate", "--max_predict_samples", "3"]  # fmt: skip
    argv = arguments(base, rows, out, *METHODS["ptuning"], *evaluation, "--max_steps", "4", "--learning_rate", "0.1")
    assert program.main([*argv, "--show_example", "1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"loss of the untuned model on 8 validation examples: \d", text)
    assert "An example: " in text and f"--adapter {out / 'checkpoint-4'}" in text
    lines = [json.loads(line) for line in (out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()]
    assert [set(line) for line in lines] == [{"labels", "predict"}] * 3
    assert lines[0]["labels"] == "你好！"
    results = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("train", "eval", "predict")}
    assert results["train"]["baseline_loss"] > 0 and results["train"]["train_samples"] == 8
    for name in ("eval", "predict"):
        measures = {f"{name}_{measure}" for measure in ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "loss")}
        assert measures <= set(results[name])
    assert json.loads((out / "all_results.json").read_text()) == results["train"] | results["eval"] | results["predict"]
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4

    # From the checkpoint, into a folder with a file of a full disk: the same predictions. Its length is its own.
    again = ["--model_name_or_path", str(base), "--ptuning_checkpoint", str(out / "checkpoint-4"), "--output_dir",
             str(tmp_path / "again"), "--max_source_length", "64", "--max_target_length", "16", "--use_cpu",
             "--disable_tqdm", "True", "--pre_seq_len", "128"]  # fmt: skip
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "all_results.json").touch()
    assert program.main([*again, *evaluation]) == 0
    written = (tmp_path / "again" / "generated_predictions.txt").read_bytes()
    assert written == (out / "generated_predictions.txt").read_bytes()
    assert json.loads((tmp_path / "again" / "eval_results.json").read_text())["eval_loss"] == pytest.approx(
        results["eval"]["eval_loss"], abs=1e-6)  # fmt: skip
    capsys.readouterr()

    # A run resumes from the checkpoints in its output folder, unless it is to overwrite them.
    argv = arguments(base, rows, out, *METHODS["ptuning"], "--max_steps", "5", "--learning_rate", "0.1")
    assert program.main(argv) == 0
    assert f"resuming from {out / 'checkpoint-4'}" in capsys.readouterr().out
    assert program.main([*argv, "--overwrite_output_dir", "--max_steps", "1"]) == 0
    assert "resuming from" not in capsys.readouterr().out
    assert program.main([*argv, "--resume_from_checkpoint", "true", "--max_steps", "2"]) == 0
    assert f"resuming from {out / 'checkpoint-1'}" in capsys.readouterr().out


def test_an_answer_is_generated_once_for_both_measures(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    generate = Tuner._generate
    monkeypatch.setattr(Tuner, "_generate", lambda self, inputs: calls.append(1) or generate(self, inputs))
    both = ["--do_eval", "--do_predict", "--validation_file", str(rows), "--test_file", os.path.relpath(rows),
            "--max_steps", "1", "--per_device_eval_batch_size", "8"]  # fmt: skip
    assert program.main(arguments(base, rows, tmp_path / "once", *METHODS["lora"], *both)) == 0
    assert len(calls) == 1
    once = {name: json.loads((tmp_path / "once" / f"{name}_results.json").read_text()) for name in ("eval", "predict")}
    assert once["eval"]["eval_bleu-4"] == once["predict"]["predict_bleu-4"]
    assert once["eval"]["eval_loss"] == once["predict"]["predict_loss"] and once["eval"]["eval_samples"] == 8
    fewer = [*METHODS["lora"], *both, "--max_predict_samples", "4"]
    assert program.main(arguments(base, rows, tmp_path / "more", *fewer)) == 0
    assert len(calls) == 3  # other rows


def test_scores_compare_with_whole_references(base: Path, rows: Path, tmp_path: Path) -> None:
    """The originals cut them to the length of an answer, so that answers seem better than they are."""
    argv = ["--do_predict", "--model_name_or_path", str(base), "--test_file", str(rows),
            "--max_target_length", "3", "--output_dir", str(tmp_path), "--use_cpu", "--disable_tqdm", "True",
            "--max_predict_samples", "1"]  # fmt: skip
    for extra, reference in (([], "你好！"), (["--cut_references"], "你好")):
        assert program.main([*argv, *extra]) == 0
        line = (tmp_path / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()[0]
        labels = json.loads(line)["labels"]
        assert labels == reference if not extra else len(labels) < len("你好！")


@pytest.mark.parametrize("room", [2**40, 2**28])
def test_the_memory_decides_about_gradient_checkpointing(
    room: int, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(dry_run.memory, "available", lambda device: room)
    argv = arguments(base, rows, tmp_path / "out", *METHODS["ptuning"], "--max_steps", "1")
    assert program.main(argv) == 0
    said = capsys.readouterr().out
    assert f"gradient checkpointing is {'off' if room > 2**30 else 'on'}" in said and "available" in said
    assert program.main([*argv, "--overwrite_output_dir", "--gradient_checkpointing", "True"]) == 0
    assert "gradient checkpointing is" not in capsys.readouterr().out


def test_dry_run_trains_nothing(base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in METHODS.values():
        argv = arguments(base, rows, tmp_path / "out", *options, "--dry-run", "--num_train_epochs", "2")
        argv.remove("--do_train")
        assert program.main(argv) == 0
        text = capsys.readouterr().out
        assert "Peak memory" in text and "8 steps of 2 examples" in text and "it fits" in text
    assert not (tmp_path / "out").exists()


PROBLEMS = {
    "no model there": ([], "there is no folder"),
    "bad data": (["--train_file", "{bad}"], "bad.json:2: "),
    "LoRA layers": (["--method", "lora", "--lora_target_modules", "q_proj"], "this model has dense, "),
    "not a checkpoint": (["--resume_from_checkpoint", "{tmp}"], "is no training checkpoint"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "holds no checkpoint to resume from"),
    "no prefix": (["--ptuning_checkpoint", "{tmp}"], "holds no prefix"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_one_line(
    case: str, base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, message = PROBLEMS[case]
    bad = tmp_path / "bad.json"
    bad.write_text(rows.read_text(encoding="utf-8").splitlines()[0] + '\n{"prompt": \n', encoding="utf-8")
    model = tmp_path / "nowhere" if case == "no model there" else base
    argv = arguments(model, rows, tmp_path / "out", *(word.format(bad=bad, tmp=tmp_path) for word in extra))
    assert program.main(argv) in (1, 2)
    err = [line for line in capsys.readouterr().err.splitlines() if line and "Tokenizing" not in line]
    assert len(err) == 1 and message in err[0] and err[0].startswith("error: ")


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_no_numbers_predict_nothing(
    method: str, base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    start = arguments(base, rows, out, *METHODS[method], "--max_steps", "1", "--baseline_samples", "0")
    assert program.main(start) == 0
    file = next((out / "checkpoint-1").glob("*model.safetensors"))
    save_file({name: tensor * math.nan for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    model = ["--model_name_or_path", str(file.parent)]
    if method != "full":
        model = ["--model_name_or_path", str(base), "--ptuning_checkpoint", str(file.parent)]
    capsys.readouterr()
    predict = ["--do_predict", "--test_file", str(rows), "--output_dir", str(out), "--predict_with_generate",
               "--disable_tqdm", "True", "--use_cpu", "--max_target_length", "8"]  # fmt: skip
    assert program.main([*model, *predict]) == 1
    printed = capsys.readouterr()
    message = "the loss on these rows is nan" if method == "full" else f"{file.parent} holds NaN or infinite values"
    assert f"error: {message}" in printed.err and "take an earlier checkpoint" in printed.err
    assert not (out / "generated_predictions.txt").exists()


def test_going_on_with_what_does_not_fit(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one line that names the checkpoint, and the checkpoint stays as it was."""
    out, ptuning = tmp_path / "out", METHODS["ptuning"]
    start = arguments(base, rows, out, "--max_steps", "2", "--baseline_samples", "0")
    assert program.main([*start, *ptuning]) == 0
    folder = out / "checkpoint-2"
    older = make_folder(tmp_path / "chatglm-tiny", 1)

    def fails(argv: list[str]) -> str:
        capsys.readouterr()
        assert program.main(argv) in (1, 2)
        err = [line for line in capsys.readouterr().err.splitlines() if line and "Tokenizing" not in line]
        assert len(err) == 1 and err[0].startswith("error: ") and str(folder) in err[0]
        return err[0]

    longer = arguments(base, rows, out, "--max_steps", "3")
    assert "and the arguments ask for a prefix of 9 without projection" in fails([*longer, "--pre_seq_len", "9"])
    assert "ask for LoRA of rank 8 for query_key_value" in fails([*longer, "--method", "lora"])
    assert "and the arguments ask for all weights" in fails([*longer, "--method", "full"])
    assert "ask for ChatGLM of generation 1" in fails([*longer, *ptuning, "--model_name_or_path", str(older)])
    for name in ("scheduler.pt", "optimizer.pt", "trainer_state.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert "if it is broken, remove it" in fails([*longer, *ptuning])
        (folder / name).write_bytes(whole)
    assert f"--ptuning_checkpoint {folder}" in fails([*longer, *ptuning, "--model_name_or_path", str(folder)])

    results = (out / "train_results.json").read_bytes()
    assert program.main([*start, *ptuning]) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert (out / "train_results.json").read_bytes() == results
    (folder / "optimizer.pt").unlink()
    assert program.main([*longer, *ptuning, "--save_total_limit", "1"]) == 0  # deletes the one it resumed from
    assert "has no optimizer state" in capsys.readouterr().out


def test_too_little_memory(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has \n a capacity ...")

    monkeypatch.setattr(methods, "prepare", prepare)
    assert program.main(arguments(base, rows, tmp_path / "out", *METHODS["ptuning"])) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: there is not enough memory (CUDA out of memory. Tried to allocate 2.00 GiB)")
    assert "--dry_run" in message


def test_a_place_for_tokens(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", rows)
    assert program.main(arguments(base, rows, tmp_path / "out", *METHODS["ptuning"])) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "set the environment variable HF_DATASETS_CACHE" in err


def test_interrupted_before_it_begins() -> None:
    command = [sys.executable, "-X", "importtime", "main.py", "--help"]
    with subprocess.Popen(
        command, cwd=PTUNING, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "| torch" in line or "|   torch" in line or " torch." in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err


def test_a_process_is_interrupted_and_goes_on(base: Path, rows: Path, tmp_path: Path) -> None:
    """As people start it, in the folder ptuning; with Ctrl-C in the middle."""
    out = tmp_path / "out"
    argv = arguments(base, rows, out, *METHODS["ptuning"], "--max_steps", "100000", "--baseline_samples", "0")
    command = [sys.executable, "main.py", *argv]
    environment = ENVIRONMENT | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, cwd=PTUNING, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'loss'" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    found = re.search(r"stopped at step (\d+); resume with --resume_from_checkpoint (\S+)", rest)
    assert found is not None and Path(found[2]) == out / f"checkpoint-{found[1]}"
    assert "Traceback" not in err
    steps = str(int(found[1]) + 1)
    assert program.main([*argv, "--max_steps", steps, "--resume_from_checkpoint", found[2]]) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == int(steps)
