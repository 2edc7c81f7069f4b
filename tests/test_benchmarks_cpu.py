"""The CPU benchmarks run, at sizes too small for meaningful figures."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from benchmarks import decode_6b, matrices, tables, turns
from chatglm.kernels import KernelUnavailable, cpu

TINY = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "max_sequence_length": 64}
WIDTHS = {1: {"inner_hidden_size": 256}, 2: {"ffn_hidden_size": 256, "kv_channels": 64, "seq_length": 64}}


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    try:
        cpu.load()
    except KernelUnavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")


def test_matrices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(matrices, "LAYER", {2: ((64, 128), (128, 256))})
    monkeypatch.setattr(matrices, "HEAD", {2: (192, 128)})
    monkeypatch.setattr(sys, "argv", ["matrices", "--repeats", "1", "--layers", "2", "--rows", "1", "3"])
    matrices.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 2 * (4 + 4 + 2)
    assert {line.count("|") for line in table} == {11}


@pytest.mark.parametrize("generation", [1, 2])
def test_decode_6b(generation: int) -> None:
    torch.manual_seed(0)
    model = decode_6b.make(generation, 4, 8, torch.float32, "default", **TINY, **WIDTHS[generation])
    assert sum(p.dtype == torch.int8 for p in model.parameters()) == 2 * 4 + 1
    whole, cache = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        ids, seconds = decode_6b.run(model, decode_6b.prompt_of(model, 8), cache)
        again, _ = decode_6b.run(model, ids, cache)
        once, _ = decode_6b.run(model, ids, whole)
    assert seconds > 0
    assert ids.shape == (1, 9)
    assert torch.equal(again, once)
    assert len(decode_6b.weights_read(model)) == 9


def test_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('loading')\nprint('ready', flush=True)\n"
                       "for _ in sys.stdin:\n    print(*[sys.argv[1]] * 6, flush=True)\n")  # fmt: skip
    commands = [f"{sys.executable} {program} {milliseconds}" for milliseconds in (50, 100)]
    monkeypatch.setattr(sys, "argv", ["turns", "--turns", "3", *commands])
    turns.main()
    first, second = capsys.readouterr().out.splitlines()
    assert "20.0 tokens/s (50.0 ms); time / first: 1.00 / 1.00 / 1.00" in first
    assert "10.0 tokens/s (100.0 ms); time / first: 2.00 / 2.00 / 2.00" in second
    monkeypatch.setattr(sys, "argv", ["turns", f"{sys.executable} -c pass"])
    with pytest.raises(SystemExit, match="run it alone"):
        turns.main()


@pytest.mark.parametrize("random_cache", [False, True])
@pytest.mark.parametrize("generation", [1, 2])
def test_decode_6b_in_turns(
    generation: int, random_cache: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = decode_6b.make(generation, 4, None, torch.float32, "default", **TINY, **WIDTHS[generation])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    with torch.inference_mode():
        decode_6b.take_turns(model, 8, random_cache)
    ready, *lines = capsys.readouterr().out.splitlines()
    assert ready == "ready" and [len(line.split()) for line in lines] == [6 + 2] * 2


def test_one_command_writes_all_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readmes = tuple(tmp_path / path.name for path in tables.READMES)
    for copied, path in zip(readmes, tables.READMES, strict=True):
        copied.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tables, "READMES", readmes)
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tables.ROOT)
    tables.main(["--tiny", "--turns", "1", "--write"])
    printed = capsys.readouterr().out
    english, chinese = (path.read_text(encoding="utf-8") for path in readmes)
    assert not list(tmp_path.glob("*.new"))
    assert "llama.cpp was left out: not found" in english and "未与 llama.cpp 比较" in chinese
    assert all(block in english for block in printed.strip().split("\n\n"))
    for text in (english, chinese):
        assert text.count(tables.machine()) == len(tables.TABLES)
        assert text.count("<!-- end -->") == len(tables.TABLES)
    rows = [[line.count("|") for line in text.splitlines() if line.startswith("| ")] for text in (english, chinese)]
    assert rows[0] == rows[1]


def test_a_readme_without_the_region_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no region"):
        tables.put(path, "decode", "| a |")
    assert path.read_text(encoding="utf-8") == "nothing"
