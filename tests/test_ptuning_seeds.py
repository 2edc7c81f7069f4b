"""A run of 300 steps with three seeds, by every method: the same curve within noise, and one that falls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import SHARED
from ptuning import main as program

pytest.importorskip("datasets")
pytest.importorskip("peft")
DATA, DEMO = SHARED / "data" / "AdvertiseGen" / "dev.json", Path(program.__file__).parents[1] / "chatglm/demo"
HELD_OUT = 100
# With the learning rates of the table in ptuning/README.md.
METHODS = {
    "ptuning": ["--pre_seq_len", "32", "--learning_rate", "5e-2"],
    "lora": ["--method", "lora", "--lora_target_modules", "all-linear", "--learning_rate", "5e-3"],
    "full": ["--method", "full", "--learning_rate", "2e-3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.skipif(not DATA.is_file(), reason="AdvertiseGen's dev.json is not in ../shared")
def test_three_seeds_have_one_curve(tmp_path: Path, method: str) -> None:
    lines = DATA.read_text(encoding="utf-8").splitlines(keepends=True)
    train, held_out = tmp_path / "train.json", tmp_path / "dev.json"
    train.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
    held_out.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    curves, ends = [], []
    for seed in ("1", "2", "3"):
        out = tmp_path / seed
        argv = ["--do_train", "--do_eval", "--train_file", str(train), "--validation_file", str(held_out),
                "--model_name_or_path", str(DEMO / "chatglm3-demo"), "--output_dir", str(out), "--seed", seed,
                "--max_source_length", "64", "--max_target_length", "64", "--per_device_train_batch_size", "4",
                "--per_device_eval_batch_size", "20", "--max_steps", "300", "--logging_steps", "30", "--save_strategy",
                "no", "--use_cpu", "--disable_tqdm", "True", "--report_to", "none", *METHODS[method]]  # fmt: skip
        assert program.main(argv) == 0
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        curves.append([entry["loss"] for entry in history if "loss" in entry])
        ends.append(json.loads((out / "all_results.json").read_text())["eval_loss"])
        print(method, seed, [round(loss, 3) for loss in curves[-1]], round(ends[-1], 4))
    for losses in zip(*curves, strict=True):
        assert max(losses) - min(losses) < 0.1 * min(losses)
    assert max(ends) - min(ends) < 0.03 * min(ends)
    assert all(curve[-1] < 0.8 * curve[0] for curve in curves)
