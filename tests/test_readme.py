"""The READMEs and the pages of docs/: their code runs, their commands exist, and both languages say the same."""

from __future__ import annotations

import json
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

import chatglm
import cli_demo
from chatglm import adapters
from chatglm.front.messages import TERMINAL
from chatglm.serving.chat_engine import ChatEngine
from live_server import serve
from tiny_folders import make_folder
from tools.demo.tool_turns import TOOLS

ROOT = Path(__file__).resolve().parents[1]
#: English pages; each has a Chinese one beside it.
PAGES = [
    "README.md", "docs/command_line.md", "docs/export.md", "docs/http_api.md", "docs/notebooks.md", "docs/python.md",
    "docs/quantization.md", "docs/serving.md", "docs/tools.md", "docs/web_page.md",
    "game/README.md",
]  # fmt: skip
every_page = pytest.mark.parametrize("page", PAGES)


def chinese(page: str) -> str:
    return page.removesuffix(".md") + "_zh.md"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines()]


def without_comments(block: str) -> str:
    return re.sub(r"\s+#.*$", "", block, flags=re.MULTILINE)


def run(block: str, page: str, namespace: dict[str, Any]) -> None:
    exec(compile(block, page, "exec"), namespace)


def test_the_two_commands_come_first() -> None:
    for readme in ("README.md", "README_zh.md"):
        assert commands(readme)[:2] == [
            "pip install -r requirements.txt && python cli_demo.py",
            "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest",
        ]


@every_page
def test_both_languages_hold_the_same_commands_code_and_tables(page: str) -> None:
    assert commands(page) == commands(chinese(page))
    for language in ("python", "py", "bibtex"):
        codes = [[without_comments(block) for block in blocks(one, language)] for one in (page, chinese(page))]
        assert codes[0] == codes[1]
    tables = [[line.count("|") for line in read(one).splitlines() if line[:1] == "|"] for one in (page, chinese(page))]
    assert tables[0] == tables[1]
    headings = [[line.split(" ")[0] for line in read(one).splitlines() if re.match("#+ ", line)]
                for one in (page, chinese(page))]  # fmt: skip
    assert headings[0] == headings[1]


@every_page
def test_python_blocks_run_without_the_network(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("something wants to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("CHATGLM_MODEL", raising=False)
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        run(block, page, namespace)
    assert bool(capsys.readouterr().out.strip()) == bool(blocks(page, "python"))


def test_the_block_about_adapters_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "path" / "to" / "chatglm2-6b", 2)
    for name in ("adgen", "support"):
        model = chatglm.load(folder)[0]
        adapters.add_prefix(model, 4)
        adapters.save_prefix(model, tmp_path / "output" / name)
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("docs/python.md", "py") if "adapter=" in block)
    run(block, "docs/python.md", {"chatglm": chatglm})
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_the_clients_of_the_api_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("requests")
    monkeypatch.chdir(ROOT)
    found = blocks("docs/http_api.md", "py")
    assert len(found) == 3
    with serve(ChatEngine(*chatglm.load())) as live:
        address = str(live.http.base_url).rstrip("/")
        for block in found:
            assert "http://127.0.0.1:8000" in block
            run(block.replace("http://127.0.0.1:8000", address), "docs/http_api.md", {})
            assert capsys.readouterr().out.strip()


@every_page
def test_arguments_of_the_commands_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli_demo.main(["--help"])
    known = capsys.readouterr().out
    for line in commands(page):
        if "cli_demo.py" in line:
            for word in shlex.split(line.split("cli_demo.py")[1]):
                assert not word.startswith("-") or re.search(rf"{re.escape(word)}\b", known), word


@pytest.mark.parametrize("page", [*PAGES, *map(chinese, PAGES)])
def test_files_that_a_page_names_exist(page: str) -> None:
    text = read(page)
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for path in re.findall(r"`((?:chatglm|tests|benchmarks|docs|game|ptuning|evaluation|\.ci)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_commands_of_the_terminal_page_exist() -> None:
    for page, language in (("docs/command_line.md", "en"), ("docs/command_line_zh.md", "zh")):
        for command in re.findall(r"`(/\w+)", read(page)):
            assert command in TERMINAL["help"][language], command


def test_the_tools_file_is_what_the_demo_was_trained_with() -> None:
    assert json.loads((ROOT / "chatglm" / "demo" / "tools.json").read_text(encoding="utf-8")) == [TOOLS["get_weather"]]
