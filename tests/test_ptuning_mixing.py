"""Several files with weights, a share that is held out, and files that are streamed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ptuning import main as program
from ptuning.data_files import DataError
from ptuning.mixing import hold_out, mix
from ptuning.rows import Columns, Rows, read_rows
from ptuning.streaming import StreamedExamples
from tiny_chat import pair
from tiny_folders import make_folder
from tuning import METHODS, arguments

pytest.importorskip("datasets")
pytest.importorskip("peft")


def file_of(path: Path, name: str, rows: int) -> Path:
    lines = (json.dumps({"prompt": f"{name}{number}", "response": "ok"}) + "\n" for number in range(rows))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def names(rows: Rows) -> list[str]:
    return [row.messages[0]["content"] for row in rows]


@pytest.fixture
def files(tmp_path: Path) -> list[Rows]:
    return [read_rows(file_of(tmp_path / f"{name}.json", name, rows)) for name, rows in (("a", 10), ("b", 4))]


def test_weights_multiply_the_rows(files: list[Rows]) -> None:
    mixed = mix(files, [0.5, 2.25], seed=1)
    counts = Counter(name[0] for name in names(mixed))
    assert counts == {"a": 5, "b": 9} and len(set(names(mixed)[:5])) == 5
    assert mixed.path.endswith("b.json") and " + " in mixed.path
    assert names(mix(files, [0.5, 2.25], seed=1)) == names(mixed) != names(mix(files, [0.5, 2.25], seed=2))
    assert names(mix(files)) == names(files[0]) + names(files[1])


@pytest.mark.parametrize(("size", "count"), [(0.25, 4), (3, 3)])
def test_held_out_rows_are_never_trained_on(size: float, count: int, files: list[Rows]) -> None:
    rest, held = hold_out(files, size, seed=1)
    kept = [name for file in rest for name in names(file)]
    assert len(held) == count and not set(kept) & set(names(held))
    assert sorted(kept + names(held)) == sorted(names(files[0]) + names(files[1]))
    assert names(hold_out(files, size, seed=1)[1]) == names(held)
    with pytest.raises(ValueError, match="--val_size 14 would hold out 14 of 14 rows"):
        hold_out(files, 14)


def test_a_run_on_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_folder(tmp_path / "chatglm3", 3)
    one, two = file_of(tmp_path / "a.json", "a", 10), file_of(tmp_path / "b.json", "b", 4)
    argv = arguments(base, one, tmp_path / "out", *METHODS["ptuning"], "--val_size", "0.2", "--do_eval", "--max_steps",
                     "1", "--train_weights", "1", "2")  # fmt: skip
    argv[argv.index(str(one)) + 1 : argv.index(str(one)) + 1] = [str(two)]
    assert program.main(argv) == 0
    assert "validation examples" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert found["eval_samples"] == 3 and found["train_samples"] > 11


WRONG = {
    "weights": (["--train_weights", "1", "2"], "--train_weights: 2 for 1 of --train_file"),
    "weight 0": (["--train_weights", "0"], "has to be above 0"),
    "size": (["--val_size", "1.5"], "a share below 1, or a number of rows"),
    "two ways": (["--val_size", "2", "--validation_file", "{data}"], "leave one out"),
    "endless": (["--streaming"], "--streaming needs --max_steps"),
    "unknown size": (["--streaming", "--max_steps", "2", "--val_size", "2"], "--val_size needs to know all rows"),
    "no evaluation": (["--early_stopping", "2"], "--do_eval needs --validation_file or --val_size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = file_of(tmp_path / "a.json", "a", 4)
    extra, message = WRONG[case]
    assert program.main(arguments("x", data, tmp_path, *(word.format(data=data) for word in extra))) == 2
    assert message in capsys.readouterr().err


# ---- streaming -------------------------------------------------------------------------------------------------------


def streamed(files: list[Path], **more: Any) -> StreamedExamples:
    return StreamedExamples(pair(3)[1], [str(file) for file in files], Columns(), (64, 16, ""), **more)


def test_a_streamed_file_gives_every_row_once(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.json", "a", 50)
    examples = streamed([path], buffer=10)
    first = [tuple(example["input_ids"]) for example in examples]
    assert len(set(first)) == 50
    wanted = [tuple(example["input_ids"]) for example in examples.first(50)]
    assert first != wanted and sorted(first) == sorted(wanted)
    assert first == [tuple(example["input_ids"]) for example in examples]
    examples.set_epoch(1)
    assert first != [tuple(example["input_ids"]) for example in examples]


def test_a_streamed_file_is_not_read_whole(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.json", "a", 40)
    path.write_text(path.read_text() + "{broken\n")
    examples = streamed([path], buffer=4)
    assert len(list(islice(iter(examples), 30))) == 30
    with pytest.raises(DataError, match=r"a\.json:41: broken JSON"):
        list(examples)


def test_weights_of_streamed_files(tmp_path: Path) -> None:
    files = [file_of(tmp_path / "a.json", "a", 900), file_of(tmp_path / "b.json", "b", 900)]
    tokenizer = pair(3)[1]
    texts = [tokenizer.decode(example["input_ids"]) for example in streamed(files, weights=[3, 1])]
    shares = Counter("a" if "a" in text.split("|user|")[-1].split("|")[0] else "b" for text in texts)
    assert 2 < shares["a"] / shares["b"] < 4


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text('[{"prompt": "a", "response": "b"}]')
    with pytest.raises(DataError, match="not a JSON list"):
        streamed([path])
    csv = tmp_path / "a.csv"
    csv.write_text("prompt,response\na,b\n")
    assert len(list(streamed([csv]))) == 1


def test_a_run_on_a_streamed_file(tmp_path: Path) -> None:
    base, path = make_folder(tmp_path / "chatglm3", 3), file_of(tmp_path / "a.json", "a", 6)
    argv = arguments(base, path, tmp_path / "out", *METHODS["ptuning"], "--streaming", "--max_steps", "5",
                     "--save_steps", "2")  # fmt: skip
    assert program.main([*argv, "--packing"]) == 0  # 6 rows are 3 steps: more than an epoch
    whole = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert program.main([*argv, "--packing", "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]) == 0
    again = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in again if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in whole if "loss" in entry], abs=1e-5)  # fmt: skip
