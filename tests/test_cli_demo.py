"""cli_demo.py as users start it: in a pipe, for one answer, and in a terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatglm.commands import chat
from chatglm.front.messages import TERMINAL
from chatglm.language import choose_language
from fake_model import load_fake
from test_program import full_disk

ROOT = Path(__file__).resolve().parents[1]
FAKE = str(ROOT / "tests" / "fake_model.py")
CLI = str(ROOT / "cli_demo.py")
Run = Callable[..., SimpleNamespace]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "CHATGLM"))}
ENVIRONMENT |= {
    "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "TERM": "dumb", "LANG": "en_US.UTF-8", "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1", "CHATGLM_HISTORY": "",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """The program with a fake model, its standard streams being pipes: run(version, *arguments, text=input)."""

    def call(version: int, *arguments: str, text: str | bytes = "") -> SimpleNamespace:
        data = text.encode() if isinstance(text, str) else text
        streams = [io.TextIOWrapper(io.BytesIO(content), encoding="utf-8") for content in (data, b"", b"")]
        monkeypatch.setattr(chat, "load_from_arguments", lambda args: load_fake(version))
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        try:
            status = chat.main(["--lang", "en", *arguments])
        except SystemExit as end:  # argparse
            status = end.code
        for stream in streams[1:]:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
        return SimpleNamespace(stdout=out, stderr=err, returncode=status)

    return call


def run_process(*arguments: str, text: str = "", program: str = CLI) -> subprocess.CompletedProcess[str]:
    """The finished process, as people start it."""
    return subprocess.run(
        [sys.executable, program, *arguments],
        input=text, capture_output=True, timeout=300, env=ENVIRONMENT, encoding="utf-8",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ pipes, one-shot


def test_a_real_pipe() -> None:
    done = run_process("1", text="你好\nhello\n/quit\nmore\n", program=FAKE)
    assert (done.stdout, done.stderr, done.returncode) == ("0[user] 你好\n1[user] hello\n", "", 0)


def test_every_line_of_a_pipe_is_a_turn_and_stdout_has_answers_only(run: Run) -> None:
    done = run(1, text="你好\n\nhello\n")
    assert done.stdout == "0[user] 你好\n1[user] hello\n"
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_last_line_without_its_end_counts(run: Run) -> None:
    assert run(1, text="你好").stdout == "0[user] 你好\n"


def test_several_lines_between_quotes_are_one_message(run: Run) -> None:
    done = run(1, text='"""one\n  two\n\nthree"""\n"""\nfour\n"""\n"""five"""\n')
    assert done.stdout == "0[user] one\n  two\n\nthree\n1[user] four\n2[user] five\n"


@pytest.mark.parametrize("text", ["stop", "/help", "clear"])
def test_quotes_make_text_of_a_command(run: Run, text: str) -> None:
    assert run(1, text=f'"""{text}"""\n').stdout == f"0[user] {text}\n"


def test_quotes_that_never_end_end_with_the_input(run: Run) -> None:
    assert run(1, text='"""one\ntwo\n').stdout == "0[user] one\ntwo\n"


@pytest.mark.parametrize("word", ["stop", "/quit", "/exit"])
def test_words_that_end_the_chat(run: Run, word: str) -> None:
    assert run(1, text=f"one\n{word}\ntwo\n").stdout == "0[user] one\n"


@pytest.mark.parametrize("word", ["clear", "/clear"])
def test_clear(run: Run, word: str) -> None:
    done = run(1, text=f"one\n{word}\ntwo\n")
    assert done.stdout == "0[user] one\n0[user] two\n"
    assert "cleared" in done.stderr


@pytest.mark.parametrize("text", ["stop it", "clear sky", "/etc/hosts holds what?", "/", "// a comment"])
def test_what_only_looks_like_a_command(run: Run, text: str) -> None:
    assert run(1, text=f"{text}\n").stdout == f"0[user] {text}\n"


def test_one_shot(run: Run) -> None:
    done = run(3, "-p", "你好", "--no-stream")
    assert (done.stdout, done.stderr, done.returncode) == ("0[user] 你好\n", "", 0)


@pytest.mark.parametrize("document", ["line\n\n  more\n", "\r\n\nline\n\n  more", "line\n\n  more"])
def test_a_document_goes_behind_the_question(run: Run, document: str) -> None:
    done = run(3, "-p", "summarise", text=document)
    assert (done.stdout, done.stderr, done.returncode) == ("0[user] summarise\n\nline\n\n  more\n", "", 0)


def test_a_document_of_blanks_is_none(run: Run) -> None:
    assert run(3, "-p", "summarise", text=" \n\n").stdout == "0[user] summarise\n"


def test_a_document_that_is_no_text_is_not_sent(run: Run) -> None:
    done = run(1, "-p", "summarise", text=b"b\xffd")
    assert (done.stdout, done.returncode) == ("", 1)
    assert "not utf-8 text" in done.stderr


def test_a_pipe_that_stays_open_is_no_mystery() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, FAKE, "1", "-p", "one"],
        stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT, encoding="utf-8",
    )  # fmt: skip
    assert process.stderr
    assert "reading standard input" in process.stderr.readline()
    assert process.communicate("two\n", timeout=300) == ("0[user] one\n\ntwo\n", "")


def test_a_document_from_a_pipe_a_file_or_nowhere(tmp_path: Path) -> None:
    assert run_process("1", "-p", "one", text="two\n", program=FAKE).stdout == "0[user] one\n\ntwo\n"
    (tmp_path / "document").write_text("three\n")
    for path, answer in ((tmp_path / "document", "0[user] one\n\nthree\n"), (os.devnull, "0[user] one\n")):
        with open(path) as file:
            done = subprocess.run(
                [sys.executable, FAKE, "1", "-p", "one"], stdin=file, capture_output=True, timeout=300, env=ENVIRONMENT,
                encoding="utf-8",
            )  # fmt: skip
        assert (done.stdout, done.stderr, done.returncode) == (answer, "", 0)


def test_one_shot_takes_a_command_word_as_text(run: Run) -> None:
    assert run(3, "-p", "clear").stdout == "0[user] clear\n"


def test_one_shot_from_standard_input(run: Run) -> None:
    assert run(3, "-p", "-", text="one\ntwo\n").stdout == "0[user] one\ntwo\n"


def test_one_shot_that_fails(run: Run) -> None:
    done = run(3, "-p", "boom")
    assert done.returncode == 1
    assert done.stderr == "Error: the question does not fit\n"


def test_completion(run: Run) -> None:
    done = run(3, "--complete", "-p", "once upon")
    assert (done.stdout, done.stderr, done.returncode) == ("once upon a time\n", "", 0)
    done = run(3, "--complete", text='one\n"""def f():\n    return"""\n')
    assert done.stdout == "one a time\ndef f():\n    return a time\n"
    assert run(3, "--complete", "--no-stream", "-p", "-", text="x").stdout == "x a time\n"
    assert run(3, "--complete", "--system", "s").returncode == 2


def test_no_stream_prints_the_same(run: Run) -> None:
    assert run(1, "--no-stream", text="one\ntwo\n").stdout == run(1, text="one\ntwo\n").stdout


def test_an_error_in_one_turn_does_not_end_the_chat(run: Run) -> None:
    done = run(1, text="boom\none\n")
    assert done.stdout == "\n0[user] one\n"
    assert "Error: the question does not fit" in done.stderr
    assert done.returncode == 1


def test_input_that_is_no_text_is_not_sent(run: Run) -> None:
    done = run(1, text=b"one\nb\xffd\ntwo\n")
    assert done.stdout == "0[user] one\n1[user] two\n"
    assert done.stderr == "Error: the input is not utf-8 text and was not sent\n"
    assert done.returncode == 1


def test_one_shot_input_that_is_no_text_is_not_sent(run: Run) -> None:
    done = run(1, "-p", "-", text=b"b\xffd")
    assert (done.stdout, done.returncode) == ("", 1)
    assert "not utf-8 text" in done.stderr


def test_a_reader_that_goes_away() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, FAKE, "1"], stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT)
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"0[user] one\n"
    process.stdout.close()
    process.stdin.write(b"two\n" * 10)
    process.stdin.close()
    assert process.wait(300) != 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["-p", "one"], ["-p", "one", "--no-stream"], []])
def test_a_full_disk_ends_the_chat_in_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "load_from_arguments", lambda args: load_fake(1))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"" if arguments else b"one\n/regen\ntwo\n")))
    monkeypatch.setattr(sys, "stdout", full_disk())
    assert chat.main(["--lang", "en", *arguments]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- commands


def test_unknown_command_is_not_sent(run: Run) -> None:
    done = run(1, text="/foo bar\n")
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr == "Error: there is no command /foo; /help lists them\n"


def test_help_names_every_command(run: Run) -> None:
    done = run(1, text="/help\n")
    for command in ("help", "clear", "undo", "regen", "system", "set", "save", "load", "quit"):
        assert f"/{command}" in done.stderr
    assert done.stdout == ""


def test_undo_and_regen(run: Run) -> None:
    done = run(1, text="one\ntwo\n/undo\nthree\n/regen\n/undo\n/undo\n/undo\n/regen\nhistory\n")
    assert done.stdout == "0[user] one\n1[user] two\n1[user] three\n1[user] three\n[]\n"
    assert done.stderr.count("taken back") == 3
    assert done.stderr.count("there is no turn yet") == 2


def test_regen_of_a_turn_that_now_fails_keeps_the_old_answer(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"chatglm_version": 1, "history": [["boom", "once it worked"]]}))
    assert '[["boom", "once it worked"]]' in run(1, text=f"/load {path}\n/regen\nhistory\n").stdout


def test_regen_with_a_seed_takes_another_seed(run: Run) -> None:
    done = run(1, "--seed", "7", text="settings\n/regen\n/regen\nsettings\n")
    assert [json.loads(line)["seed"] for line in done.stdout.splitlines()] == [7, 8, 9, 7]


def test_settings_reach_the_model(run: Run) -> None:
    done = run(
        1, "--max-length", "99", "--top-p", "0.5", "--temperature", "0",
        text="settings\n/set temperature 0.3\n/set max-new-tokens 5\n/set max_length default\nsettings\n/set\n",
    )  # fmt: skip
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {"max_length": 99, "top_p": 0.5, "temperature": 0.0}
    assert second == {"max_new_tokens": 5, "top_p": 0.5, "temperature": 0.3}
    last = "(max_length = default, max_new_tokens = 5, top_p = 0.5, temperature = 0.3, seed = default)"
    assert done.stderr.splitlines()[-1] == last


@pytest.mark.parametrize(
    "value",
    ["temperature -1", "temperature nan", "temperature inf", "top_p 1.5", "top-p nan", "max_length 0", "max_length -1",
     "max_length many", "max_new_tokens 1.5", "seed -1", "seed", "colour blue"],
)  # fmt: skip
def test_wrong_settings_change_nothing(run: Run, value: str) -> None:
    done = run(1, text=f"/set {value}\nsettings\n")
    assert done.stdout == "{}\n"
    assert done.stderr.startswith("Error: ")
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", [["--top-p", "2"], ["--max-length", "0"], ["--seed", "x"], ["--lang", "fr"]])
def test_wrong_arguments(run: Run, arguments: list[str]) -> None:
    done = run(1, *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_system_prompt(run: Run) -> None:
    done = run(3, "--system", "Be brief.", text="one\n/system 说中文。\nhistory\nclear\nhistory\n/system\nhistory\n")
    first, *rest = done.stdout.splitlines()
    assert first == "1[user] one"
    system = [{"role": "system", "content": "说中文。"}]
    assert [json.loads(line) for line in rest] == [system, system, []]


@pytest.mark.parametrize("version", [1, 2])
def test_system_prompt_of_a_generation_without_one(run: Run, version: int) -> None:
    done = run(version, text="one\n/system Be brief.\ntwo\n")
    assert "only ChatGLM3" in done.stderr
    assert done.stdout == "0[user] one\n1[user] two\n"
    done = run(version, "--system", "Be brief.", "-p", "one")
    assert (done.stdout, done.returncode) == ("", 1)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_save_and_load(run: Run, version: int, tmp_path: Path) -> None:
    path = tmp_path / "对话 1.json"
    done = run(version, text=f"你好\n/save {path}\nclear\n/load {path}\nhistory\n/undo\n/undo\nhistory\n")
    before, after = map(json.loads, done.stdout.splitlines()[1:])
    assert "你好" in json.dumps(before, ensure_ascii=False)
    assert json.loads(path.read_text(encoding="utf-8")) == {"chatglm_version": version, "history": before}
    assert after == []
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert done.returncode == 0


def test_pairs_go_from_one_generation_to_the_next(run: Run, tmp_path: Path) -> None:
    run(1, text=f"one\n/save {tmp_path / 'talk'}\n")
    assert run(2, text=f"/load {tmp_path / 'talk'}\ntwo\n").stdout == "1[user] two\n"


def test_a_loaded_system_prompt_stays(run: Run, tmp_path: Path) -> None:
    run(3, "--system", "Be brief.", text=f"one\n/save {tmp_path / 'talk'}\n")
    assert "Be brief." in run(3, text=f"/load {tmp_path / 'talk'}\nclear\nhistory\n").stdout


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a conversation that was saved here"),
        ("[]", "not a conversation that was saved here"),
        ('{"chatglm_version": 3}', "not a conversation that was saved here"),
        ('{"chatglm_version": 3, "history": [["a", "b"]]}', "not a conversation that was saved here"),
        ('{"chatglm_version": 3, "history": [{"role": "king", "content": "b"}]}', "king"),
        ('{"chatglm_version": 1, "history": [["a", "b"]]}', "with ChatGLM1, this model is a ChatGLM3"),
        (None, "No such file"),
    ],
)
def test_files_that_cannot_be_loaded_change_nothing(run: Run, content: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    if content is not None:
        path.write_text(content)
    done = run(3, text=f"one\n/load {path}\ntwo\n")
    assert done.stdout == "0[user] one\n2[user] two\n"
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_save_that_fails_leaves_the_old_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = run(1, text=f"one\n/save {tmp_path / 'folder'}\n/save {tmp_path / 'no' / 'talk'}\n/save\ntwo\n")
    assert [line[:6] for line in done.stderr.splitlines()] == ["Error:"] * 3
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert done.stdout.endswith("1[user] two\n")


def test_tool_call_is_shown_and_the_next_line_is_its_result(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "weather", "description": "", "parameters": {}}]')
    done = run(3, "--tools", str(tmp_path / "tools.json"), text="call\n晴\nthanks\n")
    assert done.stdout == "1[user] call\n3[observation] 晴\n5[user] thanks\n"
    assert done.stderr == '[tool call] weather {"城市": "北京"}\n'


@pytest.mark.parametrize("content", ["{", "3", '["weather", 3'])
def test_tools_that_are_none(run: Run, content: str, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(content)
    done = run(3, "--tools", str(tmp_path / "tools.json"), "-p", "one")
    assert (done.stdout, done.returncode) == ("", 1)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there, Ctrl-C cannot be sent to another process")
def test_ctrl_c_ends_a_program_that_nobody_watches() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, FAKE, "1", "-p", "forever"],
        stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout and process.stderr
    assert process.stdout.read(8) == b"0 1 2 3 "
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == b""


# ---------------------------------------------------------------------------------------------------- languages


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "zh_TW.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "de_DE.UTF-8", "LC_ALL": ""}, "en"),
        ({"LANG": "C"}, "en"),
    ],
)
def test_language_of_the_locale(environment: dict[str, str], language: str) -> None:
    assert choose_language(environment) == language


def test_messages_in_chinese(run: Run) -> None:
    assert run(1, "--lang", "zh", text="clear\n/foo\n").stderr == (
        "（对话已清空）\n错误：没有 /foo 这个命令，/help 查看全部命令\n"
    )


def test_every_message_is_there_in_both_languages_with_the_same_blanks() -> None:
    for key, texts in TERMINAL.items():
        assert list(texts) == ["zh", "en"], key
        blanks = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in texts.values()]
        assert blanks[0] == blanks[1], key


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    done = run_process("--model", str(tmp_path), "--lang", "zh")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"错误：{tmp_path} has no config.json")
    assert len(done.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------------- a terminal


def spawn(program: str, *arguments: str, **environment: str) -> Any:
    """A program on a new terminal."""
    pexpect = pytest.importorskip("pexpect", reason="needs a pseudo-terminal")
    return pexpect.spawn(
        sys.executable, [program, *arguments], env=ENVIRONMENT | environment, encoding="utf-8", timeout=300,
        dimensions=(50, 200),
    )  # fmt: skip


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Any]:
    """cli_demo.py on a terminal of its own; `params`: (program, arguments)."""
    child = spawn(*getattr(request, "param", (FAKE, "1")))
    yield child
    if child.isalive():
        child.kill(signal.SIGKILL)
        child.wait()
    child.close()


def test_terminal_chat(terminal: Any) -> None:
    terminal.expect_exact("Welcome")
    terminal.expect_exact("You: ")
    terminal.sendline("你好")
    terminal.expect_exact("ChatGLM: 0[user] 你好")
    terminal.expect(r"\[\d+ tokens, \d+\.\d tokens/s\]")
    terminal.expect_exact("You: ")
    terminal.sendline('"""one')
    terminal.expect_exact("... ")
    terminal.sendline('two"""')
    terminal.expect_exact("ChatGLM: 1[user] one\r\ntwo")
    terminal.expect_exact("You: ")
    terminal.sendline("stop")
    terminal.expect_exact("Bye!")
    terminal.wait()
    assert terminal.exitstatus == 0


def test_ctrl_c_stops_the_answer_only_and_keeps_it(terminal: Any) -> None:
    terminal.expect_exact("You: ")
    terminal.sendline("forever")
    terminal.expect_exact("0 1 2 3 ")
    terminal.sendintr()
    terminal.expect(r"\[\d+ tokens, .* stopped\]")
    terminal.expect_exact("You: ")
    terminal.sendline("history")
    terminal.expect_exact('[["forever", "0 1 2 3 ')
    terminal.expect_exact("You: ")


def test_ctrl_c_twice_leaves_a_turn_that_does_not_listen(terminal: Any) -> None:
    terminal.expect_exact("You: ")
    terminal.sendline("deaf")
    terminal.expect_exact("0 1 2 3 ")
    terminal.sendintr()
    terminal.expect_exact("I do not listen")
    terminal.sendintr()
    terminal.expect_exact("You: ")
    terminal.sendline("history")
    terminal.expect_exact("ChatGLM: []")


def test_ctrl_c_at_the_prompt_and_ctrl_d(terminal: Any) -> None:
    terminal.expect_exact("You: ")
    terminal.send("half a line")
    terminal.expect_exact("half a line")
    terminal.sendintr()
    terminal.expect_exact("(/quit or Ctrl-D exits)")
    terminal.expect_exact("You: ")
    terminal.sendline("whole")
    terminal.expect_exact("0[user] whole")
    terminal.expect_exact("You: ")
    terminal.sendeof()
    terminal.expect_exact("Bye!")
    terminal.wait()
    assert terminal.exitstatus == 0


def test_line_editing_and_history(terminal: Any) -> None:
    pytest.importorskip("readline", reason="there is no line editing on this system")
    terminal.expect_exact("You: ")
    terminal.sendline("one")
    terminal.expect_exact("0[user] one")
    terminal.expect_exact("You: ")
    terminal.send("\x10")  # Ctrl-P: the line before
    terminal.expect_exact("one")
    terminal.sendline("!")
    terminal.expect_exact("1[user] one!")


def test_what_was_typed_is_there_in_the_next_run(tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="there is no line editing on this system")
    variables = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "CHATGLM_HISTORY"} | variables
    pexpect = pytest.importorskip("pexpect", reason="needs a pseudo-terminal")

    def chat_of(*arguments: str) -> Any:
        child = pexpect.spawn(
            sys.executable, [FAKE, "1", *arguments], env=environment, encoding="utf-8", timeout=300,
            dimensions=(50, 200),
        )  # fmt: skip
        child.expect_exact("You: ")
        return child

    first, second = chat_of(), chat_of()  # two at once: neither overwrites what the other keeps
    for child, line in ((first, "one 一"), (second, "two")):
        child.sendline(line)
        child.expect_exact(f"0[user] {line}")
        child.expect_exact("You: ")
    first.kill(signal.SIGKILL)  # nothing waits for the end
    second.sendline("/quit")
    for child in (first, second):
        child.expect(pexpect.EOF)
        child.close()
    path = tmp_path / "state" / "chatglm" / "history"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.read_text(encoding="utf-8").splitlines() == ["one 一", "two", "/quit"]
    third = chat_of("--no-history")
    third.send("\x10")
    third.sendline("three")
    third.expect_exact("0[user] three")
    third.sendline("/quit")
    third.expect(pexpect.EOF)
    third.close()
    assert "three" not in path.read_text(encoding="utf-8")
    fourth = chat_of()
    fourth.send("\x10\x10\x10")  # Ctrl-P: the lines before
    fourth.expect_exact("one 一")
    fourth.sendline("!")
    fourth.expect_exact("0[user] one 一!")
    fourth.sendline("/quit")
    fourth.expect(pexpect.EOF)
    fourth.close()


def test_a_history_that_cannot_be_kept_is_no_obstacle(tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="there is no line editing on this system")
    child = spawn(FAKE, "1", CHATGLM_HISTORY=str(tmp_path))  # a folder
    child.expect_exact("(input history is not kept: ")
    child.expect_exact("You: ")
    child.sendline("one")
    child.expect_exact("0[user] one")
    child.sendline("/quit")
    child.expect_exact("Bye!")
    child.close()


@pytest.mark.parametrize("terminal", [(FAKE, "3", "--lang", "zh")], indirect=True)
def test_terminal_in_chinese_with_a_tool(terminal: Any) -> None:
    terminal.expect_exact("欢迎")
    terminal.expect_exact("用户：")
    terminal.sendline("call")
    terminal.expect_exact('[调用工具] weather {"城市": "北京"}')
    terminal.expect_exact("工具结果：")
    terminal.sendline("晴")
    terminal.expect_exact("[observation] 晴")
    terminal.expect("词元/秒")
    terminal.expect_exact("用户：")


# ------------------------------------------------------------------------------------------------ the demo model


def test_the_demo_answers_in_both_languages_and_says_what_it_is() -> None:
    done = run_process("--temperature", "0", "--lang", "en", text="你好\nclear\nhello\n")
    assert done.returncode == 0
    chinese, english = done.stdout.splitlines()
    assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese)
    assert not any("\u4e00" <= letter <= "\u9fff" for letter in english)
    assert english.strip()
    assert "only the tiny demo model" in done.stderr
    assert "--model FOLDER" in done.stderr


def test_the_demo_remembers_the_turn_before() -> None:
    done = run_process("--temperature", "0", text="我叫小明\n我叫什么名字？\n")
    assert "小明" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("terminal", [(CLI, "--max-new-tokens", "64")], indirect=True)
def test_ctrl_c_while_the_demo_answers(terminal: Any) -> None:
    pexpect = pytest.importorskip("pexpect", reason="needs a pseudo-terminal")
    terminal.expect_exact("You: ")
    terminal.sendline("hello")
    terminal.expect_exact("ChatGLM: ")
    terminal.kill(signal.SIGINT)  # early or late, the session continues
    terminal.expect_exact("You: ")
    for _ in range(30):  # this may be the prompt before the interrupt, which then takes back the line
        terminal.sendline("hello")
        if terminal.expect([r"\[\d+ tokens", pexpect.TIMEOUT], timeout=10) == 0:
            break
    terminal.sendline("/quit")
    terminal.expect_exact("Bye!")
