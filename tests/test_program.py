"""How programs start and end: what they import and when, Ctrl-C, standard output that takes nothing, exit statuses."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chatglm import program

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    name: value for name, value in os.environ.items()
    if not name.startswith(("LC_", "LANG", "CHATGLM", "PYTHONUNBUFFERED"))  # unbuffered, argparse hides errors
}  # fmt: skip
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "LANG": "en_US.UTF-8", "HF_HUB_OFFLINE": "1"}
PROGRAMS = [
    ["cli_demo.py"], ["web_demo.py"], ["api.py"], ["-m", "chatglm"], ["-m", "chatglm", "chat"],
    ["-m", "chatglm", "web"], ["-m", "chatglm", "serve"], ["-m", "chatglm", "export"], ["-m", "chatglm", "doctor"],
    ["-m", "chatglm.doctor"], ["-m", "chatglm.export"],
]  # fmt: skip
every_program = pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
on_unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and /dev/full are of Unix")


def start(words: Sequence[str], folder: Path | None = None, **more: Any) -> subprocess.Popen[str]:
    """The process; modules in `folder` are found before all others."""
    path = os.pathsep.join([*([str(folder)] if folder else []), str(ROOT)])
    streams = {name: more.pop(name, subprocess.PIPE) for name in ("stdout", "stderr")}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL,
        encoding="utf-8", **streams, **more,
    )  # fmt: skip


def finished(words: Sequence[str], folder: Path | None = None, **more: Any) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)"""
    process = start(words, folder, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# ----------------------------------------------------------------------------------------------------------- --help


@every_program
def test_help_imports_nothing_large(words: list[str]) -> None:
    status, out, err = finished(["-X", "importtime", *words, "--help"])
    assert status == 0 and "usage: " in out
    imported = set(re.findall(r"\| +([\w.]+)$", err, re.MULTILINE))
    assert "chatglm.program" in imported
    assert not imported & {"torch", "transformers", "numpy", "gradio", "fastapi", "uvicorn", "peft", "safetensors"}


@on_unix
@every_program
def test_help_takes_less_than_half_a_second_of_cpu(words: list[str]) -> None:
    def seconds() -> float:
        process = start([*words, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # nothing is left to wait for
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert any(seconds() < 0.5 for _ in range(3))  # the others are a busy machine's


@pytest.mark.parametrize(
    ("command_line", "module"),
    [
        ("python -m chatglm serve", "chatglm"),
        ("python -Im chatglm.doctor", "chatglm.doctor"),
        ("python -mchatglm", "chatglm"),
        ("python -W error -X dev -m chatglm", "chatglm"),
        ("python -m other chatglm", "other"),
        ("python", ""),
    ],
)
def test_the_module_that_python_runs(command_line: str, module: str) -> None:
    assert program.module_to_run(command_line.split()) == module


@pytest.mark.parametrize(
    ("argv", "own"),
    [
        ([str(ROOT / "api.py")], True),
        (["/usr/local/bin/chatglm", "serve"], True),
        ([r"chatglm.exe"], True),
        (["/elsewhere/api.py"], False),  # somebody's own, which may count on AutoModel
        ([str(ROOT / "my_script.py")], False),
        ([str(ROOT / "chatglm")], False),
        (["/elsewhere/chatglm.py"], False),
        ([""], False),
        ([], False),
        (["-c"], False),
    ],
)
def test_which_programs_are_ours(argv: list[str], own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert program.is_own_program() is own


def test_a_worker_of_ours_is_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/chatglm", "tune"])
    assert program.is_own_program()
    monkeypatch.setattr("multiprocessing.process.parent_process", lambda: object())
    assert not program.is_own_program()


def test_in_our_programs_too_every_name_is_there_and_the_family_registered() -> None:
    code = """
import sys
sys.argv = ["/usr/local/bin/chatglm"]
import chatglm
from chatglm import conversation
assert "torch" not in sys.modules and chatglm.__version__
try:
    chatglm.no_such_name
except AttributeError as error:
    print(error)
from chatglm import *
from transformers import AutoConfig, AutoModel, AutoTokenizer
names = {"load", "ChatGLM1Config", "ChatGLM3ForConditionalGeneration", "register_generation"}
assert names <= set(globals()) and names <= set(chatglm.__all__)
folder = chatglm.demo.DEFAULT
print(type(AutoModel.from_pretrained(folder)).__name__, type(AutoTokenizer.from_pretrained(folder)).__name__)
"""
    status, out, err = finished(["-c", code])
    assert status == 0, err
    assert out.splitlines() == [
        "module 'chatglm.public' has no attribute 'no_such_name'", "ChatGLM3ForConditionalGeneration ChatGLM2Tokenizer",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- Ctrl-C


@on_unix
@pytest.mark.parametrize(
    "words",
    [["cli_demo.py"], ["api.py", "--port", "0"], ["web_demo.py", "--port", "0"], ["-m", "chatglm", "kernels"],
     ["-m", "chatglm.export", "a", "b", "c"], ["-m", "chatglm.doctor"]],
    ids=" ".join,
)  # fmt: skip
def test_ctrl_c_while_libraries_are_imported_ends_it_in_silence(words: list[str], tmp_path: Path) -> None:
    slow = """
import sys, threading
print("importing", file=sys.stderr, flush=True)
try:
    threading.Event().wait()
except KeyboardInterrupt:
    raise ImportError("this is not what the user wants to read")
"""
    (tmp_path / "torch.py").write_text(slow)
    process = start(words, tmp_path, stdout=subprocess.DEVNULL)
    assert process.stderr
    assert process.stderr.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300)[1] == ""
    assert process.returncode == program.INTERRUPTED


@on_unix
def test_ctrl_c_where_it_is_ignored_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nraise ImportError('on')")
    code = "import signal, os, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    status, _, err = finished(["-c", code, sys.executable, "cli_demo.py"], tmp_path)
    assert status == 1 and "ImportError: on" in err


@on_unix
def test_a_thread_that_loads_a_model_does_not_outlive_the_program() -> None:
    code = """
import sys, threading
from chatglm.program import start
threading.Thread(target=threading.Event().wait, name="chatglm-load").start()  # no daemon: python would wait for it
print("done", end="")
start(lambda: sys.exit(3))
"""
    assert finished(["-c", f"import sys; sys.argv = ['/usr/local/bin/chatglm']\n{code}"]) == (3, "done", "")


# -------------------------------------------------------------------------------------------------- standard output


@on_unix
@every_program
def test_a_full_disk_is_one_line(words: list[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        status, _, err = finished([*words, "--help"], stdout=full)
    assert status == 1
    assert err == "Error: cannot write to standard output (No space left on device)\n"
    with open("/dev/full", "w") as full:  # nowhere to say so: the status still tells
        assert finished([*words, "--help"], stdout=full, stderr=full)[0] == 1


@on_unix
@pytest.mark.parametrize("words", [["cli_demo.py"], ["-m", "chatglm.doctor"], ["-m", "chatglm"]], ids=" ".join)
def test_a_reader_that_is_gone_is_no_news(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert finished([*words, "--help"], stdout=write) == (1, None, "")
    finally:
        os.close(write)


@on_unix
def test_a_closed_standard_output_is_one_line() -> None:
    def closed(words: str) -> subprocess.CompletedProcess[str]:
        command = f'exec "{sys.executable}" {words} >&-'
        return subprocess.run(
            ["sh", "-c", command], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, encoding="utf-8", timeout=300
        )

    done = closed("cli_demo.py -p hello")
    assert (done.returncode, done.stderr) == (1, "Error: cannot write to standard output (it is closed)\n")
    done = closed("api.py --help")  # the results of a server are elsewhere
    assert done.returncode == 0


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(FullDisk()), encoding="utf-8", write_through=True)


def test_put_says_why_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = full_disk()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(program.OutputError, match="No space left"):
        program.put("text")
    assert program.run(lambda: program.put("text") or 0) == 1  # type: ignore[func-returns-value]
    assert "No space left" in capsys.readouterr().err
    with contextlib.suppress(OSError):
        stream.close()


def test_errors_that_are_not_about_the_streams_pass() -> None:
    def fail() -> int:
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")

    with pytest.raises(FileNotFoundError):
        program.run(fail)


def test_exit_statuses() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert program.run(lambda: 0) == 0
    assert program.run(lambda: 1) == 1
    assert program.run(interrupted) == program.INTERRUPTED == 130
    with pytest.raises(SystemExit, match="2"):
        program.run(lambda: sys.exit(2))
