"""What a run shows: its curve, the best checkpoint, a stop in time, and a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning import curve
from ptuning import main as program
from ptuning.trainer import Tuner
from tiny_folders import make_folder
from tuning import METHODS, arguments, write_rows

pytest.importorskip("datasets")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "chatglm3-tiny", 3)


def test_a_run_is_summed_up(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[int] = []
    draw = curve.draw
    monkeypatch.setattr(curve, "draw", lambda history, path: drawn.append(len(history)) or draw(history, path))
    monkeypatch.setattr(curve, "PAUSE", 0.0)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    rows, out = write_rows(tmp_path / "train.json", 24), tmp_path / "out"
    argv = arguments(base, rows, out, *METHODS["ptuning"], "--val_size", "12", "--predict_with_generate", "--do_eval",
                     "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "4")  # fmt: skip
    assert program.main(argv) == 0
    assert len(drawn) > 4 and (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "summary.md").read_text(encoding="utf-8")
    assert f"summary: {out / 'summary.md'}" in capsys.readouterr().out
    for part in ("| pre_seq_len | 4 |", "| method | ptuning |", "![Losses](loss.png)", "| eval_loss | ", "12 rows"):
        assert part in page
    assert "lora" not in page and str(rows) in page
    table = page.split("## Some answers")[1].strip().splitlines()
    assert len(table) == 2 + 10 and all(line.count("|") >= 4 for line in table)


@pytest.mark.parametrize("stops", [False, True])
def test_the_best_checkpoint(
    stops: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is given here: the second evaluation is the best one."""
    worse = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    evaluate = Tuner.evaluation_loop

    def given(self: Tuner, *args: Any, **kwargs: Any) -> Any:
        found = evaluate(self, *args, **kwargs)
        if self.is_in_train:
            found.metrics["eval_loss"] = next(worse)
        return found

    monkeypatch.setattr(Tuner, "evaluation_loop", given)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    rows, out = write_rows(tmp_path / "train.json"), tmp_path / "out"
    flag = ["--early_stopping", "2"] if stops else ["--keep_best"]
    argv = arguments(base, rows, out, *METHODS["lora"], *flag, "--validation_file", str(rows), "--save_steps", "1",
                     "--max_steps", "6", "--save_total_limit", "1")  # fmt: skip
    assert program.main(argv) == 0
    printed = capsys.readouterr().out
    best = out / "checkpoint-2"
    assert f"the best checkpoint: {best} (loss 2.0000)" in printed and f"--adapter {best}" in printed
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == (4 if stops else 6)
    assert str(best) in (out / "summary.md").read_text() and (best / "adapter_model.safetensors").is_file()


def test_without_matplotlib_it_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "is_available", lambda: False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    rows = write_rows(tmp_path / "train.json")
    argv = arguments(base, rows, tmp_path / "out", *METHODS["ptuning"], "--max_steps", "1")
    assert program.main(argv) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out and not (tmp_path / "out" / "loss.png").exists()
