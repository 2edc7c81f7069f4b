"""The benchmark of fine-tuning runs, and its ways of making batches have the same losses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from conftest import SHARED

pytest.importorskip("datasets")
pytest.importorskip("peft")
DATA, TOKENIZER = SHARED / "data" / "AdvertiseGen" / "dev.json", SHARED / "checkpoints" / "chatglm3-6b"
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason="AdvertiseGen's dev.json is not in ../shared")
TINY = ["--layers", "1", "--hidden", "128", "--batch", "2", "--steps", "2", "--turns", "1"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("what", "extra"), [("padding", ["--ways", "originals", "padded", "packed"]),
                                             ("peer", ["--method", "lora"])])  # fmt: skip
def test_it_runs(
    what: str, extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import tuning

    few = tmp_path / "few.json"
    few.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tuning", what, str(few), str(TOKENIZER), *TINY, *extra])
    tuning.main()
    out = capsys.readouterr().out
    found = re.findall(r"^1 .*: [\d.]+ tokens/s, .* loss ([\d.]+)$", out, re.MULTILINE)
    assert len(found) == (3 if what == "padding" else 2) and " of the first" in out
    if what == "padding":
        assert len(set(found)) == 1
