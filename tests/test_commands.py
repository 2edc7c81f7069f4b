"""The console command `chatglm`: the same programs as the files at the top, under one name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import api
import cli_demo
import cli_demo_vision
import web_demo
import web_demo_vision
from chatglm import __main__ as console
from chatglm.commands import chat, chat_vision, serve, web, web_vision
from chatglm.front import arguments
from test_program import finished


def test_the_files_at_the_top_are_the_same_programs() -> None:
    assert (cli_demo.main, web_demo.main, api.main) == (chat.main, web.main, serve.main)
    assert (cli_demo_vision.main, web_demo_vision.main) == (chat_vision.main, web_vision.main)


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        console.main([name, "--help"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out.startswith(f"usage: chatglm {name} [-h]")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_help_lists_every_command(
    language: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "choose_language", lambda: language)
    assert console.main(["--help"]) == 0
    told = capsys.readouterr().out
    for name, command in console.COMMANDS.items():
        assert any(line.split() == [name, *getattr(command, language).split()] for line in told.splitlines())
    assert console.main([]) == 2  # nothing was asked for
    assert capsys.readouterr() == ("", told)


def test_a_command_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "choose_language", lambda: "en")
    assert console.main(["server"]) == 2
    assert "there is no command server, did you mean serve?" in capsys.readouterr().err
    assert console.main(["docker"]) == 2  # only what is close is suggested
    assert "there is no command docker; chatglm --help" in capsys.readouterr().err


def test_the_exit_status_is_the_program_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["chat", "--model", "/nowhere/at/all", "--lang", "en"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        console.main(["serve", "--port", "70000"])
    assert console.main(["tune", "--no_such_argument"]) == 2
    assert "--no_such_argument" in capsys.readouterr().err


def test_fine_tuning_names_the_extra_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from chatglm.doctor import versions

    really = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: None if name == "datasets" else really(name))
    monkeypatch.setattr(arguments, "CLONE", tmp_path)
    assert console.main(["tune", "--help"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and 'pip install "chatglm-rebuilt[tune]"' in err and "datasets" in err


def test_python_m_chatglm_answers() -> None:
    status, out, err = finished(["-m", "chatglm", "chat", "-p", "hello", "--temperature", "0", "--lang", "en"])
    assert status == 0 and out.strip()
    assert "For a real model: chatglm chat --model FOLDER" in err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import chatglm

    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out == f"chatglm {chatglm.__version__}\n"
    assert sys.modules["chatglm"] is chatglm
