"""`benchmarks/engines.py`: servers and programs take turns; its figures are for people to read."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

import chatglm
from benchmarks import engines, random_6b
from chatglm.demo import FOLDERS
from live_server import Parrot, serve

PROGRAM = """
import json, sys
print("loading")
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"tokens": 10 * len(asked["prompts"]), "seconds": 0.5, "first": 0.25}), flush=True)
"""


def test_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    program = shlex.join([sys.executable, str(tmp_path / "program.py")])
    with serve(Parrot(3)) as live:
        live.engine.say("x")
        arguments = [f"here={live.url}", f"program={program}", "--clients", "1", "3", "--turns", "2", "--tokens", "4"]
        engines.main(arguments)
    shown = capsys.readouterr()
    rows = [line.strip("|").split("|") for line in shown.out.splitlines()[2:]]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in cells] == [["here", "1"], ["program", "1"], ["here", "3"], ["program", "3"]]
    assert [row[2:4] for row in cells if row[0] == "program"] == [["20.0", "0.25 s"], ["60.0", "0.25 s"]]
    assert "program, 3: 60.00 tokens/s, first token 0.25 s, 30 tokens instead of 12" in shown.err
    assert all(float(row[2]) > 0 and row[3].endswith(" s") and row[4] == "1.00" for row in cells if row[0] == "here")


def test_wrong_servers(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        engines.main(["http"])
    with pytest.raises(SystemExit, match="run it alone"):
        engines.main([f"program={shlex.join([sys.executable, '-c', ''])}"])


def test_random_checkpoint_answers_with_text(tmp_path: Path) -> None:
    out = tmp_path / "random"
    random_6b.main([str(out), "--like", str(FOLDERS[3]), "--layers", "1"])
    model, tokenizer = chatglm.load(out, "cpu")
    assert model.config.num_hidden_layers == 1
    silent = random_6b.not_text(out / "tokenizer.model", model.config.vocab_size)
    assert set(tokenizer.chat_format.stop_token_ids(tokenizer)) <= set(silent)
    ids = tokenizer.build_chat_input("你好")["input_ids"]
    answer = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :].tolist()
    assert len(answer) == 16
    assert not set(answer) & set(silent)
    with pytest.raises(SystemExit):
        random_6b.main([str(out), "--like", str(FOLDERS[3])])
