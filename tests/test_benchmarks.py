"""The scripts in benchmarks/ run; their figures are for people to read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import load_6b


def test_load_6b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["load_6b", str(folder), "--tiny"])
    monkeypatch.chdir(Path(__file__).resolve().parents[1])  # the process it starts has to find the package
    load_6b.main()
    assert "peak over the start, to weights" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.parametrize("generation", [1, 2])
def test_load_6b_knows_every_generation(generation: int, tmp_path: Path) -> None:
    load_6b.make(tmp_path, generation, tiny=True)
    result = load_6b.measure(tmp_path, 2, "cpu", "bfloat16")
    assert result["dtype"] == "bfloat16"
    assert result["weights"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_load_6b_never_takes_a_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["load_6b", str(tmp_path), "--tiny"])
    with pytest.raises(SystemExit):
        load_6b.main()
    assert tmp_path.is_dir()
