"""Tools and code in the terminal: arguments, confirmation, what is shown, a transcript."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatglm.front.abilities import names_of_tools, parse_tools
from test_cli_demo import ROOT, run_process, spawn

DOORS = str(ROOT / "tests" / "scripted_doors.py")
MODULE = """
from chatglm.tools import calculate, tool

@tool(confirm=True)
def write_note(text: str) -> str:
    "Writes a note"
    return f"written {text.upper()}"
"""


def isolation() -> str:
    pytest.importorskip("jupyter_client", reason="the code interpreter needs jupyter_client")
    pytest.importorskip("ipykernel", reason="the code interpreter needs ipykernel")
    from chatglm.interpreter import NotIsolatedError, choose_isolation

    try:
        return choose_isolation().grade
    except NotIsolatedError as error:
        pytest.skip(str(error))


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MODULE)
    return str(tmp_path / "mine.py")


def pipe(*arguments: str, text: str) -> SimpleNamespace:
    done = run_process("chat", "--lang", "en", *arguments, text=text, program=DOORS)
    return SimpleNamespace(out=done.stdout, err=done.stderr, status=done.returncode)


def test_tools_run_in_a_pipe_and_those_that_ask_need_yes(module: str) -> None:
    done = pipe("--tools-module", module, text="What is 6 * 7?\nWrite it down\n")
    assert done.out == "It is 42.\nAs you wish.\n"
    assert done.err.splitlines() == [
        '[tool call] calculate {"expression": "6*7"}', "[result] 42",
        '[tool call] write_note {"text": "hello"}', "(not run: nobody can be asked; --yes agrees to everything)",
        "[result] The user did not allow this call.",
    ]  # fmt: skip
    done = pipe("--tools-module", module, "--yes", "--no-stream", text="Write it down\n")
    assert done.out == "Done.\n" and "[result] written HELLO" in done.err


def test_a_call_is_confirmed_in_a_terminal(module: str) -> None:
    child = spawn(DOORS, "chat", "--lang", "en", "--tools-module", module)
    child.expect_exact("You: ")
    child.sendline("What is 6 * 7?")
    child.expect_exact('[tool call] calculate {"expression": "6*7"}')
    child.expect_exact("[result] 42")
    child.expect_exact("ChatGLM: It is 42.")
    for answer, end in (("n", "As you wish."), ("y", "Done.")):
        child.expect_exact("You: ")
        child.sendline("Write it down")
        child.expect_exact("Run it? [y/N] ")
        child.sendline(answer)
        child.expect_exact(end)
    child.expect_exact("You: ")
    child.sendline("/undo")
    child.expect_exact("taken back")
    child.sendline("/quit")
    child.expect_exact("Bye!")
    child.close()


def test_code_runs_in_a_terminal(tmp_path: Path) -> None:
    isolation()
    child = spawn(DOORS, "chat", "--lang", "en", "--interpreter", "--work", str(tmp_path / "work"))
    child.expect_exact("You: ")
    child.sendline("Plot it")
    child.expect_exact("I draw.")
    child.expect_exact("[code]")
    child.expect_exact("print(6 * 7)")
    child.expect_exact("Run it? [y/N] ")
    child.sendline("y")
    child.expect_exact("(files: made.txt, picture-1.png, in ")
    child.expect_exact("[Image]")
    child.expect_exact("Here is the picture.")
    child.expect_exact("You: ")
    child.sendline("/quit")
    child.expect_exact("Bye!")
    child.close()
    assert (tmp_path / "work" / "made.txt").read_text() == "made here"
    assert (tmp_path / "work" / "picture-1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tools-module", "/nowhere.py"], "there is no file /nowhere.py"),
        (["--interpreter", "--tools", "x"], "--interpreter goes without tools"),
        (["--interpreter", "safely"], "there is no grade of isolation 'safely'"),
        (["--mcp", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_arguments_that_are_wrong_are_one_line(arguments: list[str], reason: str, tmp_path: Path) -> None:
    arguments = [str(_tools(tmp_path)) if one == "x" else one for one in arguments]
    done = pipe(*arguments, text="hi\n")
    assert (done.out, done.status) == ("", 1)
    assert len(done.err.splitlines()) == 1 and reason in done.err


def _tools(folder: Path) -> Path:
    (folder / "tools.yaml").write_text("- name: a\n  description: b\n")
    return folder / "tools.yaml"


def test_a_tool_that_is_given_twice(tmp_path: Path, module: str) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "calculate", "description": "", "parameters": {}}]')
    done = pipe("--tools", str(tmp_path / "tools.json"), "--tools-module", module, text="hi\n")
    assert "there is another tool called 'calculate'" in done.err and done.status == 1


def test_lists_of_tools_in_json_and_yaml() -> None:
    json_text = '[{"name": "a", "description": "b", "parameters": {"x": 1}}]'
    yaml_text = "- name: a\n  description: b\n  parameters:\n    x: 1\n"
    assert parse_tools(json_text, "x") == parse_tools(yaml_text, "x") == json.loads(json_text)
    for text, reason in (
        ("[{", "x is not valid JSON"), ("- a: [", "x is neither valid JSON nor YAML"), ("hello", "x holds no list"),
        ("3", "x holds no list"), ("- !!python/object:os.system {}", "neither valid JSON nor YAML"),
        ("- 2020-01-01", "x cannot be written as JSON"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            parse_tools(text, "x")


def test_names_in_descriptions() -> None:
    written: Any = [{"name": "a"}, {"type": "function", "function": {"name": "b"}}, {"type": "python"}, 3]
    assert names_of_tools(written) == ["a", "b"]
    assert names_of_tools({"c": {"name": "c", "params": []}}) == ["c"]
    assert names_of_tools(None) == names_of_tools("x") == []
