"""The estimates of ptuning/estimate against real training runs and against sums done by hand."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from chatglm.checkpoints.memory import readable
from ptuning.dry_run import training_steps
from ptuning.estimate import LIBRARIES, PARTS, Estimate, Evaluation, advice, estimate
from tiny_folders import make_folder

PROGRAM = Path(__file__).with_name("training_memory.py")
GIB = 2**30
#: 35 to 60 million parameters, most of them in the embeddings, as with small models of a real vocabulary.
SHAPES: dict[int, dict[str, Any]] = {
    1: {"num_layers": 4, "hidden_size": 384, "inner_hidden_size": 1536, "num_attention_heads": 6, "vocab_size": 130528},
    2: {
        "num_layers": 4, "hidden_size": 384, "ffn_hidden_size": 1024, "num_attention_heads": 6, "kv_channels": 64,
        "padded_vocab_size": 65024,
    },
}  # fmt: skip
SHAPES[3] = SHAPES[2]
CONFIGS = {1: chatglm.ChatGLM1Config, 2: chatglm.ChatGLM2Config, 3: chatglm.ChatGLM3Config}


def of_shape(version: int, **changes: Any) -> Any:
    return CONFIGS[version](**SHAPES[version] | changes)


def of_6b(version: int, layers: int = 28, **settings: Any) -> Estimate:
    """P-tuning as in the originals' train.sh, at lengths 64/64, on a GPU."""
    chosen = {"method": "ptuning", "pre_seq_len": 128, "dtype": "float16", "device": "cuda"} | settings
    return estimate(CONFIGS[version](num_layers=layers), **{"batch_size": 1, "sequence_length": 128} | chosen)


# ---- against training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def get(version: int) -> Path:
        if version not in made:
            made[version] = make_folder(tmp_path_factory.mktemp("models") / "model", version, **SHAPES[version])
        return made[version]

    return get


FAST: list[tuple[int, dict[str, Any]]] = [
    (3, {"method": "ptuning", "sequence_length": 192, "pre_seq_len": 64}),
]
MORE: list[tuple[int, dict[str, Any]]] = [
    (1, {"method": "lora", "sequence_length": 128, "dtype": "bfloat16", "gradient_checkpointing": False}),
    (2, {"method": "full", "sequence_length": 128, "batch_size": 2}),
    (3, {"method": "lora", "sequence_length": 192, "quantize": 4}),
    (1, {"method": "ptuning", "sequence_length": 256, "pre_seq_len": 128, "prefix_projection": True}),
    (1, {"method": "full", "sequence_length": 128, "dtype": "bfloat16", "gradient_checkpointing": False}),
    (1, {"method": "ptuning", "sequence_length": 128, "pre_seq_len": 64, "quantize": 8, "dtype": "bfloat16"}),
    (2, {"method": "lora", "sequence_length": 512, "batch_size": 2, "gradient_checkpointing": False}),
    (3, {"method": "full", "sequence_length": 256, "batch_size": 4, "gradient_accumulation": 2}),
    (3, {"method": "ptuning", "sequence_length": 512, "pre_seq_len": 128, "batch_size": 4}),
    (2, {"method": "full", "sequence_length": 128, "optimizer": "adamw_torch"}),
]


def _check_against_training(folder: Path, settings: dict[str, Any]) -> None:
    settings = {"batch_size": 1, "dtype": "float32"} | settings
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from /proc, which only Linux has")
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    found = estimate(chatglm.ChatGLMConfig.from_pretrained(folder), **settings)
    command = [sys.executable, str(PROGRAM), str(folder), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, told = int(done.stdout.split()[-1]), found.resident - LIBRARIES["cpu"]
    print(f"{settings}: told {readable(told)}, measured {readable(measured)}, {told / measured:.3f}")
    assert told == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("version", "settings"), FAST)
def test_the_peak_of_a_run(folder: Callable[[int], Path], version: int, settings: dict[str, Any]) -> None:
    _check_against_training(folder(version), settings)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "settings"), MORE)
def test_the_peak_of_more_runs(folder: Callable[[int], Path], version: int, settings: dict[str, Any]) -> None:
    _check_against_training(folder(version), settings)


PROGRAM_ITSELF = """
import sys
sys.path.insert(0, sys.argv[1])
from ptuning.main import main
from training_memory import status
status_of_main = main(sys.argv[2:])
print("PEAK", status("VmHWM"))
sys.exit(status_of_main)
"""
WHOLE_RUNS: list[tuple[int, str]] = [
    (3, "--pre_seq_len 64 --quantization_bit 4"),
    (1, "--method lora --per_device_train_batch_size 1 --per_device_eval_batch_size 8"),
    (3, "--method full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("version", "options"), WHOLE_RUNS)
def test_what_top_shows_of_the_program(
    folder: Callable[[int], Path],
    version: int,
    options: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """main.py with data, Trainer, untuned loss, checkpoints, answers and metrics, against its own --dry_run."""
    for name in ("peft", "datasets", "jieba"):
        pytest.importorskip(name)
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc, which only Linux has")
    import datasets

    from ptuning import dry_run, main

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.json"
    row = {"content": "类型#上衣*材质#牛仔布*颜色#白色" * 8, "summary": "简约而不简单的牛仔外套，十分百搭。" * 9}
    rows.write_text("\n".join([json.dumps(row, ensure_ascii=False)] * 8) + "\n", encoding="utf-8")
    data = " ".join(f"--{name}_file {rows}" for name in ("train", "validation", "test"))
    argv = (
        f"--do_train --do_eval --do_predict --predict_with_generate {data} --max_source_length 128 "
        "--max_target_length 128 --val_max_target_length 8 --max_steps 2 --save_steps 2 "
        "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 "
        f"--model_name_or_path {folder(version)} --output_dir {tmp_path / 'out'} {options}"
    ).split()
    told: list[Estimate] = []

    def kept(*args: Any, **kwargs: Any) -> Estimate:
        told.append(estimate(*args, **kwargs))
        return told[-1]

    monkeypatch.setattr(dry_run, "estimate", kept)
    assert main.main([*argv, "--dry_run"]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent)}
    command = [sys.executable, "-c", PROGRAM_ITSELF, str(PROGRAM.parents[1]), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split("PEAK")[1].split()[0])
    print(f"{options}: told {readable(told[0].resident)}, measured {readable(measured)}")
    assert told[0].resident == pytest.approx(measured, rel=0.15)
    assert f"top will show up to {readable(told[0].resident)}" in told[0].text()


# ---- against sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "quantize", "most"), [(1, 4, 7), (1, 8, 9), (1, None, 14), (2, 4, 7)])
def test_p_tuning_of_6b_is_as_documented(version: int, quantize: int | None, most: float) -> None:
    """7 GB with INT4, 9 GB with INT8, 14 GB with float16 (G1 ptuning/README)."""
    found = of_6b(version, quantize=quantize)
    assert found.total / 1e9 < most
    assert found.trainable_parameters == (29_360_128 if version == 1 else 1_835_008)


def test_weights_and_states_are_as_large_as_their_numbers() -> None:
    config = of_shape(3)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in chatglm.ChatGLM3ForConditionalGeneration(config).parameters())
    found = estimate(config, method="full", batch_size=1, sequence_length=16, gradient_accumulation=2)
    assert found.parameters == found.trainable_parameters == numbers
    assert found.trainable == found.parts["trainable"] == 4 * numbers
    assert found.parts["optimizer"] == 8 * numbers
    assert found.parts["gradients"] == pytest.approx(4 * numbers, rel=0.01)
    lora = estimate(config, method="lora", batch_size=1, sequence_length=16, lora_rank=4, quantize=4)
    rows = (6 + 2 * 2) * 64
    assert lora.trainable_parameters == 4 * 4 * (384 + rows)
    assert lora.parameters == numbers + lora.trainable_parameters
    assert lora.parts["optimizer"] == 8 * lora.trainable_parameters
    whole = estimate(config, method="lora", batch_size=1, sequence_length=16, lora_rank=4, quantize=4,
                     lora_saved=("final_layernorm",))  # fmt: skip
    assert whole.trainable_parameters == lora.trainable_parameters + config.hidden_size
    blocks = 4 * (384 * rows + 384 * 384 + 384 * 2048 + 1024 * 384)
    assert lora.parts["weights"] == pytest.approx(blocks / 2 + 4 * (numbers - blocks), rel=0.02)
    assert set(found.parts) == set(PARTS)


def test_what_makes_a_run_smaller() -> None:
    config, usual = of_shape(2, num_layers=2), {"method": "lora", "batch_size": 2, "sequence_length": 256}

    def total(**changes: Any) -> int:
        return estimate(config, **{**usual, **changes}).total

    base = total()
    assert total(gradient_checkpointing=False) > base
    assert total(batch_size=1) < base
    assert total(sequence_length=512) > base
    assert total(dtype="bfloat16") < base
    assert total(quantize=8) < base
    full = total(method="full")
    assert full > base
    assert total(method="full", optimizer="adafactor") < total(method="full", optimizer="adamw_8bit") < full
    assert total(method="full", gradient_accumulation=4) >= full
    many: dict[str, Any] = {"method": "full", "gradient_accumulation": 2, "world_size": 4}
    one, two, three = (total(**many, dtype="bfloat16", zero_stage=stage) for stage in (1, 2, 3))
    assert three < two < one < total(**many)
    assert total(**many, dtype="bfloat16", zero_stage=3, offload=True) < three


def test_evaluation_counts_where_it_takes_more_than_training() -> None:
    usual: dict[str, Any] = {"method": "lora", "batch_size": 1, "sequence_length": 64, "gradient_checkpointing": True}
    config = of_shape(1, num_layers=1)

    def of(*plan: int) -> Estimate:
        return estimate(config, **usual, evaluation=Evaluation(*plan))

    none, small, large = estimate(config, **usual), of(1, 64), of(16, 64)
    assert (small.total, small.parts["evaluation"]) == (none.total, 0)
    assert large.parts["evaluation"] == pytest.approx(16 * 64 * config.vocab_size * 4, rel=0.2)  # the logits
    assert of(4, 8, 1024, 4).parts["evaluation"] > 3 * of(4, 8, 1024).parts["evaluation"] > 0  # a cache for each beam
    changes = {found.text().partition(":")[0]: found for found in advice(large, none.total)}
    assert changes["--per_device_eval_batch_size 1 (the same result)"].fits


def test_the_batch_that_a_run_evaluates(tmp_path: Path) -> None:
    from ptuning.arguments import parse
    from ptuning.dry_run import evaluation_of

    rows = tmp_path / "rows.json"
    rows.write_text("{}", encoding="utf-8")
    train: dict[str, Any] = {"length": [30, 40, 50]}
    dev: dict[str, Any] = {"length": [10, 20], "prompt_ids": [[1] * 5, [1] * 9]}
    test: dict[str, Any] = {"length": [60], "prompt_ids": [[1] * 15]}

    def of(options: str, held_out: Any = None, tested: Any = None) -> Evaluation | None:
        usual = f"--do_train --train_file {rows} --model_name_or_path x --output_dir {tmp_path} --max_target_length 7 "
        return evaluation_of(parse((usual + options).split()), train, held_out, tested)

    dev_file, test_file = f"--do_eval --validation_file {rows} ", f"--do_predict --test_file {rows} "
    assert of("--baseline_samples 0") is None
    assert of("--baseline_samples 2") == Evaluation(2, 40)
    assert of(dev_file, dev) == Evaluation(2, 20)  # never more rows than one data set has
    assert of(dev_file + "--predict_with_generate --num_beams 3", dev) == Evaluation(2, 20, 9 + 7, 3)
    assert of(dev_file + test_file + "--per_device_eval_batch_size 1", dev, test) == Evaluation(1, 60, 15 + 7)


def test_sharding_divides_weights_gradients_and_states() -> None:
    settings: dict[str, Any] = {
        "method": "full", "dtype": "bfloat16", "zero_stage": 3, "gradient_accumulation": 2, "batch_size": 1,
        "sequence_length": 16,
    }  # fmt: skip
    whole, quarter = estimate(of_shape(2), **settings), estimate(of_shape(2), **settings, world_size=4)
    for part in ("trainable", "gradients", "optimizer"):
        assert quarter.parts[part] == pytest.approx(whole.parts[part] / 4, rel=0.01)
    assert whole.parts["optimizer"] == 12 * whole.trainable_parameters  # a float32 copy, and two states of AdamW


def test_neither_the_config_nor_torch_is_changed() -> None:
    config = of_shape(1)
    before = copy.deepcopy(config.to_dict())
    estimate(config, method="ptuning", pre_seq_len=8, batch_size=1, sequence_length=16, quantize=4, dtype="bfloat16")
    assert config.to_dict() == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    assert type(torch.zeros(1)) is torch.Tensor


def test_a_quantised_checkpoint_is_known_from_its_config() -> None:
    values = of_shape(2).to_dict() | {"quantization_bit": 4}
    stored = chatglm.ChatGLMConfig.from_dict(values)
    fresh = of_shape(2)
    settings: dict[str, Any] = {"method": "lora", "batch_size": 1, "sequence_length": 16, "dtype": "float16"}
    assert estimate(stored, **settings).parts["weights"] == estimate(fresh, quantize=4, **settings).parts["weights"]


# ---- for people ------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    found = of_6b(1, quantize=4)
    english, chinese = found.text("en"), found.text("zh")
    assert "6,202,646,528" in english
    assert "29,360,128" in english
    assert readable(found.total) in english
    assert "frozen weights" in english
    assert "峰值内存" in chinese
    assert readable(found.total) in chinese
    assert "each device" in estimate(of_shape(2), method="lora", batch_size=1, sequence_length=16, world_size=2).text()
    with pytest.raises(ValueError, match="'en' or 'zh'"):
        found.text("fr")


def test_advice_says_what_each_change_gains() -> None:
    found = of_6b(2, layers=2, gradient_checkpointing=False, batch_size=16, sequence_length=512)
    assert advice(found, found.total) == []
    changes = advice(found, 3 * GIB)
    assert all(one.gain == found.total - one.total > 0 for one in changes)
    assert all(one.fits == (one.total <= 3 * GIB) for one in changes)
    english = [one.text() for one in changes]
    assert any("gradient checkpointing" in line for line in english)
    assert any("--per_device_train_batch_size 1 --gradient_accumulation_steps 16" in line for line in english)
    assert any("--quantization_bit 4" in line for line in english)
    assert all("省" in one.text("zh") for one in changes)


def test_advice_for_full_tuning() -> None:
    changes = advice(of_6b(2, layers=2, method="full", dtype="bfloat16"), 4 * GIB)
    english = "\n".join(one.text() for one in changes)
    for words in ("--optim adamw_bnb_8bit", "--optim adafactor", "ZeRO-2 on 4", "ZeRO-3 on 4", "LoRA"):
        assert words in english
    lora = next(one for one in changes if "LoRA" in one.text())
    assert lora.fits
    assert "which fits" in lora.text()


def test_steps_are_counted_as_the_trainer_does() -> None:
    assert training_steps(1070, batch_size=1, gradient_accumulation=16, epochs=3) == 3 * 67
    assert training_steps(10, batch_size=4, world_size=2, epochs=1) == 2
    assert training_steps(3, batch_size=8, gradient_accumulation=4, epochs=2) == 2
    assert training_steps(1070, batch_size=1, max_steps=3000) == 3000


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "prompt"}, "ptuning, lora, full"),
        ({"method": "ptuning"}, "pre_seq_len"),
        ({"method": "full", "quantize": 4}, "quantize=None"),
        ({"method": "full", "zero_stage": 4}, "zero_stage"),
        ({"method": "lora", "device": "tpu"}, "cpu or cuda"),
        ({"method": "lora", "dtype": "int3"}, "dtype"),
        ({"method": "lora", "batch_size": 0}, "batch_size"),
        ({"method": "full", "offload": True}, "zero_stage"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimate(of_shape(2), **{"batch_size": 1, "sequence_length": 16} | settings)


def test_lora_needs_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="ptuning/requirements"):
        estimate(of_shape(2), method="lora", batch_size=1, sequence_length=16)
