"""`benchmarks/engines.py`: servers and programs take turns; its figures are for people to read."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import engines
from live_server import Parrot, serve

PROGRAM = """
import json, sys
print("loading")
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"tokens": 10 * len(asked["prompts"]), "seconds": 0.5}), flush=True)
"""


def test_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    program = shlex.join([sys.executable, str(tmp_path / "program.py")])
    with serve(Parrot(3)) as live:
        live.engine.say("x")
        arguments = [f"here={live.url}", f"program={program}", "--clients", "1", "3", "--turns", "2", "--tokens", "4"]
        engines.main(arguments)
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in cells] == [["here", "1"], ["program", "1"], ["here", "3"], ["program", "3"]]
    assert [row[2] for row in cells if row[0] == "program"] == ["20.0", "60.0"]
    assert all(float(row[2]) > 0 and row[3].endswith(" s") and row[4] == "1.00" for row in cells if row[0] == "here")


def test_wrong_servers(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        engines.main(["http"])
    with pytest.raises(SystemExit, match="run it alone"):
        engines.main([f"program={shlex.join([sys.executable, '-c', ''])}"])
