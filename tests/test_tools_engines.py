"""`python -m tools.engines`: this project's own server plays the engine that is compared with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from chatglm.demo import FOLDERS
from tools.engines import __main__ as engines
from tools.engines import table
from tools.engines.known import ENGINES, ENVIRONMENTS, Engine
from tools.lock import ROOT

OURS = Engine(
    "ours", "api.py", "torch", "none", "demo", "chatglm3-demo",
    (sys.executable, "api.py", "--model", "{path}", "--name", "{path}", "--host", "127.0.0.1", "--port", "{port}",
     "--device", "cpu", "--dtype", "float32"),
)  # fmt: skip

posix = pytest.mark.skipif(os.name != "posix", reason="servers end with their processes by killpg")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed: engines find the programs of this environment."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(engines, "installed", lambda engine, work: Path(sys.executable).parent)


@posix
@pytest.mark.usefixtures("here")
def test_a_server_with_equal_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = engines.questions()
    assert len(asked) == len(set(asked)) == 24
    ours = engines.own_answers(asked, None)
    assert len({answer.strip() for answer in ours}) > 16 and all(len(answer) > 0 for answer in ours)
    assert next(iter(engines.run(OURS, asked, tmp_path).values())).split("|")[4].strip() == "24 / 24"

    wrong = [*ours[:-1], "another"]
    monkeypatch.setattr(engines, "own_answers", lambda asked, bits: wrong)
    monkeypatch.setattr(engines, "answers_of", lambda *arguments: ours)
    assert "23 / 24" in next(iter(engines.run(OURS, asked, tmp_path).values()))
    assert repr(asked[-1]) in capsys.readouterr().err


@posix
@pytest.mark.usefixtures("here")
def test_a_server_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Engine(
        "broken", "broken", "torch", "none", "demo", "demo", (sys.executable, "-c", "raise SystemExit('no such thing')")
    )
    monkeypatch.setattr(engines, "ENGINES", (broken,))
    pages: list[Any] = []
    monkeypatch.setattr(table, "write", pages.append)
    assert engines.main(["--work", str(tmp_path), "--write"]) == 1
    assert "no such thing" in capsys.readouterr().err and pages == []
    with pytest.raises(SystemExit):
        engines.main(["unknown"])


def test_exports_are_made_once(tmp_path: Path) -> None:
    assert engines.checkpoint("demo", tmp_path) == FOLDERS[3]
    made = engines.checkpoint("gguf-ours4.gguf", tmp_path)
    assert made.read_bytes()[:4] == b"GGUF" and (tmp_path / "demo-int4" / "config.json").is_file()
    made.write_bytes(b"kept")
    assert engines.checkpoint("gguf-ours4.gguf", tmp_path).read_bytes() == b"kept"


def test_the_engines() -> None:
    assert len({engine.name for engine in ENGINES}) == len({engine.title for engine in ENGINES}) == len(ENGINES)
    for engine in ENGINES:
        assert bool(engine.command) != bool(engine.script)
        assert ENVIRONMENTS[engine.environment].requirements
        assert not engine.script or (Path(engines.__file__).parent / engine.script[0]).is_file()


PAGE = f"""# Page

{table.BEGIN}

| engine | reads |
| --- | --- |
| one 1.0 | a |
| two 1.0 | b |

{table.END}

The end.
"""


def test_the_table(tmp_path: Path) -> None:
    rows = table.row("two 1.0", "c") | table.row("three", "d")
    changed = table.merged(PAGE, rows)
    assert changed == PAGE.replace("| two 1.0 | b |", "| two 1.0 | c |\n| three | d |")
    assert table.merged(changed, rows) == changed
    with pytest.raises(ValueError, match="lacks the lines"):
        table.merged("# Page", rows)
    pages = (tmp_path / "one.md", tmp_path / "two.md")
    pages[0].write_text(PAGE)
    pages[1].write_text("no table")
    with pytest.raises(ValueError):
        table.write(rows, pages)
    assert pages[0].read_text() == PAGE  # neither or both


def test_both_pages_have_the_same_table() -> None:
    texts = [page.read_text(encoding="utf-8") for page in table.PAGES]
    bodies = [text.partition(table.BEGIN)[2].partition(table.END)[0].strip().splitlines()[2:] for text in texts]
    assert bodies[0] == bodies[1] and bodies[0]
