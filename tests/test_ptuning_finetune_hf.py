"""ChatGLM3's finetune_demo: its command line and its three configuration files, on our training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptuning import finetune_hf, inference_hf
from ptuning.arguments import ArgumentsError, parse
from tiny_folders import make_folder

#: The values of finetune_demo/configs: what the three files have in common, and what each adds.
COMMON: dict[str, Any] = {
    "data_config": {"train_file": "train.json", "val_file": "dev.json", "test_file": "dev.json", "num_proc": 16},
    "max_input_length": 256,
    "max_output_length": 512,
    "training_args": {
        "output_dir": "./output", "max_steps": 3000, "learning_rate": 5e-5, "per_device_train_batch_size": 4,
        "dataloader_num_workers": 16, "remove_unused_columns": False, "save_strategy": "steps", "save_steps": 500,
        "log_level": "info", "logging_strategy": "steps", "logging_steps": 10, "per_device_eval_batch_size": 16,
        "evaluation_strategy": "steps", "eval_steps": 500, "predict_with_generate": True,
        "generation_config": {"max_new_tokens": 512}, "use_cpu": True,
    },
}  # fmt: skip
PEFT: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
    "ptuning_v2": {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 128},
    "sft": {},
}


def configure(folder: Path, name: str, **changes: Any) -> list[str]:
    """Writes data and a configuration; returns DATA_DIR MODEL_DIR CONFIG."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    conversation = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    for file in ("train.json", "dev.json"):
        (data / file).write_text(f"{json.dumps({'conversations': conversation})}\n" * 4, encoding="utf-8")
    config = COMMON | ({"peft_config": PEFT[name]} if PEFT[name] else {}) | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [str(data), "THUDM/chatglm3-6b", str(path)]


@pytest.mark.parametrize("name", PEFT)
def test_the_three_files_give_their_values(tmp_path: Path, name: str) -> None:
    words = configure(tmp_path, name)
    model, data, training, _ = parse(finetune_hf.translate(words))
    folder = Path(words[0])
    assert model.model_name_or_path == "THUDM/chatglm3-6b"
    assert data.train_file == [str(folder / "train.json")]
    assert data.validation_file == data.test_file == str(folder / "dev.json")
    assert (data.max_source_length, data.max_target_length, data.target_length) == (256, 512, 512)
    assert (data.preprocessing_num_workers, data.max_eval_samples, data.max_predict_samples) == (16, 50, None)
    assert (training.do_train, training.do_eval, training.do_predict) == (True, True, True)
    assert training.predict_with_generate and training.use_cpu and training.overwrite_output_dir
    assert (training.output_dir, training.max_steps, training.learning_rate) == ("./output", 3000, 5e-5)
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (4, 16)
    assert (training.dataloader_num_workers, training.remove_unused_columns, training.log_level) == (16, False, "info")
    assert (training.save_steps, training.logging_steps, training.eval_steps) == (500, 10, 500)
    assert training.eval_strategy == "steps"
    if name == "lora":
        assert (model.method, model.lora_rank, model.lora_alpha, model.lora_dropout) == ("lora", 8, 32, 0.1)
        assert model.lora_target_modules == ["query_key_value"]
    elif name == "ptuning_v2":
        assert (model.method, model.pre_seq_len, model.prefix_projection) == ("ptuning", 128, False)
    else:
        assert model.method == "full"


def test_the_fourth_argument_and_further_ones(tmp_path: Path) -> None:
    words = configure(tmp_path, "lora")
    assert parse(finetune_hf.translate([*words, "yes"])).training.resume_from_checkpoint == "True"
    (tmp_path / "output" / "checkpoint-500").mkdir(parents=True)
    config = {"training_args": COMMON["training_args"] | {"output_dir": str(tmp_path / "output")}}
    words = configure(tmp_path, "lora", **config)
    resumed = parse(finetune_hf.translate([*words, "500", "--max_steps", "7"])).training
    assert resumed.resume_from_checkpoint == str(tmp_path / "output" / "checkpoint-500")
    assert not resumed.overwrite_output_dir and resumed.max_steps == 7
    with pytest.raises(ArgumentsError, match="give yes, the number"):
        finetune_hf.translate([*words, "maybe"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_config": {"peft_type": "IA3"}}, "IA3: use LORA or PREFIX_TUNING"),
        ({"peft_config": {"peft_type": "LORA", "rank": 8}}, "peft_config.rank is no key"),
        ({"peft_config": {"peft_type": "PREFIX_TUNING"}}, "num_virtual_tokens is missing"),
        ({"peft_config": {"peft_type": "LORA", "task_type": "SEQ_CLS"}}, "SEQ_CLS: only CAUSAL_LM"),
        ({"data_config": {"val_file": "dev.json"}}, "train_file is missing"),
        ({"data_config": {"train_file": "train.json", "train": "x"}}, "data_config.train is no key"),
        ({"max_length": 5}, "max_length is no key"),
        ({"training_args": {"generation_config": {"top_p": 1}}}, "top_p is no key"),
        ({"training_args": 3}, "training_args has to hold names"),
    ],
)
def test_a_key_that_means_nothing_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArgumentsError, match=reason):
        finetune_hf.translate(configure(tmp_path, "lora", **changes))


def test_a_wrong_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model, config = configure(tmp_path, "lora")
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    for words in (
        [], [data, model], ["nowhere", model, config], [data, model, "nowhere.yaml"],
        [data, model, str(tmp_path / "broken.yaml")], [data, model, config, "--no_such", "1"],
    ):  # fmt: skip
        assert finetune_hf.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
    assert finetune_hf.main(["--help"]) == 0
    assert inference_hf.main([str(tmp_path), "--prompt", "你好"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_training_and_the_answer_of_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_folder(tmp_path / "base", 3)
    small = {
        "output_dir": str(tmp_path / "output"), "max_steps": 1, "save_steps": 1, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    changes = {"training_args": small, "data_config": {"train_file": "train.json"}, "max_output_length": 32}
    data, _, config = configure(tmp_path, "lora", **changes)
    assert finetune_hf.main([data, str(model), config, "--max_source_length", "32", "--baseline_samples", "0"]) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "output" / "checkpoint-1"
    assert inference_hf.base_of(checkpoint) == str(model)
    assert inference_hf.main([str(checkpoint), "--prompt", "你好", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("\n")
