"""The READMEs: their Python runs, their commands exist, and both languages say the same."""

from __future__ import annotations

import json
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

import cli_demo
from chatglm.demo.corpus import WEATHER_TOOL

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README_zh.md"]


def blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(readme: str) -> list[str]:
    return [line for block in blocks(readme, "sh") for line in block.splitlines()]


def without_comments(block: str) -> str:
    return re.sub(r"\s+#.*$", "", block, flags=re.MULTILINE)


def test_the_two_commands_come_first() -> None:
    for readme in READMES:
        assert commands(readme)[:2] == [
            "pip install -r requirements.txt && python cli_demo.py",
            "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest",
        ]


def test_both_languages_hold_the_same_commands_and_code() -> None:
    assert commands(READMES[0]) == commands(READMES[1])
    codes = [[without_comments(block) for block in blocks(readme, "python")] for readme in READMES]
    assert codes[0] == codes[1]
    tables = [
        [line.count("|") for line in (ROOT / readme).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        for readme in READMES
    ]
    assert tables[0] == tables[1]


def test_the_python_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("something wants to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("CHATGLM_MODEL", raising=False)
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.strip()
    assert isinstance(namespace["response"], str)


def test_arguments_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli_demo.main(["--help"])
    known = capsys.readouterr().out
    for line in commands("README.md"):
        if "cli_demo.py" in line:
            for word in shlex.split(line.split("cli_demo.py")[1]):
                assert not word.startswith("-") or re.search(rf"{re.escape(word)}\b", known), word


def test_files_that_the_readmes_name_exist() -> None:
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding="utf-8")
        for path in re.findall(r"\]\(([\w./]+)\)|`((?:chatglm|tests|benchmarks|\.ci)/[\w./-]+)`", text):
            assert (ROOT / (path[0] or path[1])).exists(), path


def test_the_tools_file_is_what_the_demo_was_trained_with() -> None:
    assert json.loads((ROOT / "chatglm" / "demo" / "tools.json").read_text(encoding="utf-8")) == [WEATHER_TOOL]
