"""Cells in their jail: what they can see and do, and that whatever they do is contained."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("jupyter_client", reason="the code interpreter needs jupyter_client")
pytest.importorskip("ipykernel", reason="the code interpreter needs ipykernel")

from chatglm.interpreter import (
    Isolation,
    Kernel,
    KernelPool,
    Limits,
    NotIsolatedError,
    Picture,
    Result,
    choose_isolation,
    isolation,
)
from chatglm.interpreter.kernel import safe_name
from chatglm.interpreter.watcher import descendants

ROOT = Path(__file__).resolve().parents[1]


def isolated() -> Isolation:
    try:
        return choose_isolation()
    except NotIsolatedError as error:
        pytest.skip(str(error))


#: Much time for a cell, for a busy machine.
LIMITS = replace(Limits(), seconds=300.0)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may need much time for the start of a kernel, and for the end of a cell after an interrupt."""
    for name in ("START_SECONDS", "INTERRUPT_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(f"chatglm.interpreter.kernel.{name}", LIMITS.seconds)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with contextlib.closing(Kernel(isolated(), LIMITS)) as made:
        yield made


def texts(result: Result) -> list[tuple[str, str]]:
    return [("picture", "") if isinstance(part, Picture) else (part.kind, part.text) for part in result.parts]


def last(result: Result) -> str:
    """The last line of the output."""
    return texts(result)[-1][1].strip().rpartition("\n")[2]


# ------------------------------------------------------------------------------------------------- what a cell gives


def test_outputs_come_in_order_and_variables_stay(kernel: Kernel) -> None:
    given = kernel.execute("import sys\nx = 41\nprint('one'); print('two', file=sys.stderr); print('three')\nx + 1")
    assert given.status == "ok"
    assert [kind for kind, _ in texts(given)][-1] == "result" and last(given) == "42"
    assert ("stderr", "two\n") in texts(given)
    assert texts(kernel.execute("x"))[0] == ("result", "41\n")
    failed = kernel.execute("print('before')\n\ndef f():\n    return 1 / 0\nf()")
    assert failed.status == "error" and texts(failed)[0] == ("stdout", "before\n")
    assert "return 1 / 0" in texts(failed)[1][1] and last(failed) == "ZeroDivisionError: division by zero"
    assert "\x1b" not in texts(failed)[1][1]
    assert "does not support input requests" in last(kernel.execute("input('name?')"))


def test_pictures_and_their_order(kernel: Kernel) -> None:
    pytest.importorskip("matplotlib", reason="it draws the pictures")
    code = "import matplotlib.pyplot as plt\nplt.title('标题')\nplt.plot([1, 2])\nplt.show()\nprint('after')"
    given = kernel.execute(code)
    assert [kind for kind, _ in texts(given) if kind != "stderr"] == ["picture", "stdout"], texts(given)
    picture = next(part for part in given.parts if isinstance(part, Picture))
    assert picture.png.startswith(b"\x89PNG")
    if "CJK" in isolation.matplotlib_settings():
        assert not [text for kind, text in texts(given) if kind == "stderr" and "Glyph" in text]


def test_files_in_and_out(kernel: Kernel) -> None:
    assert kernel.put_file("../../a b.csv", b"1,2") == "a_b.csv"
    assert last(kernel.execute("open('/mnt/data/a_b.csv').read()")) == "'1,2'"
    given = kernel.execute("open('out.txt', 'w').write('hello')\nopen('.hidden', 'w').write('x')")
    assert given.files == ["out.txt"]
    assert kernel.read_file("out.txt") == b"hello" and "out.txt" in kernel.files() and ".hidden" not in kernel.files()
    kernel.execute("import os\nos.symlink('/etc/passwd', 'link'); os.mkfifo('pipe'); os.mkdir('folder')")
    for name in ("link", "pipe", "folder", "none", "../c.json", ".hidden"):
        with pytest.raises(OSError):
            kernel.read_file(name)
    assert kernel.files() == ["a_b.csv", "out.txt"]
    with pytest.raises(ValueError, match="larger than 20 MB"):
        kernel.put_file("x", b"x" * (20 * 2**20 + 1))


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a.csv", "a.csv"), ("/etc/passwd", "passwd"), ("..", "file"), ("C:\\x\\数据 1.csv", "数据_1.csv")],
)
def test_names_of_files(given: str, kept: str) -> None:
    assert safe_name(given) == kept
    assert len(safe_name("数" * 300).encode()) <= 200


# --------------------------------------------------------------------------------------------- what it cannot reach


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (f"open({str(ROOT / 'README.md')!r})", "FileNotFoundError"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/etc/shadow')", "FileNotFoundError"),
        (f"import os; os.listdir({str(Path.home() / '.ssh')!r})", "FileNotFoundError"),
        ("open('/usr/x', 'w')", "OSError"), ("open('/x', 'w')", "OSError"), ("open('/dev/x', 'w')", "OSError"),
        ("open('/proc/sys/kernel/core_pattern', 'w')", "OSError: [Errno 30]"),
        ("import socket; socket.create_connection(('1.1.1.1', 80), timeout=5)", "OSError: [Errno 101]"),
        ("import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)", "ConnectionRefusedError"),
        ("import urllib.request; urllib.request.urlopen('http://example.com', timeout=5)", "URLError"),
        ("import os; os.unshare(os.CLONE_NEWUSER)" if hasattr(os, "unshare") else "raise OSError", "OSError"),
        ("import os; os.kill(1, 9); os.setuid(0)", "OSError: [Errno 22]"),
    ],
)  # fmt: skip
def test_what_is_outside_cannot_be_reached(kernel: Kernel, code: str, error: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = kernel.execute(code.replace("{port}", str(server.getsockname()[1])))
    assert given.status == "error" and last(given).startswith(error), texts(given)


def test_the_system_s_settings_are_read_only_even_where_root_started_the_jail(kernel: Kernel) -> None:
    code = """
import os
found = []
for folder, folders, files in os.walk("/proc"):
    if folder == "/proc":
        folders[:] = [name for name in folders if not name.isdigit() and not os.path.islink(f"/proc/{name}")]
    paths = [f"{folder}/{name}" for name in files]
    found += [path for path in paths if not os.path.islink(path) and os.access(path, os.W_OK)]
found
"""
    assert texts(kernel.execute(code)) == [("result", "[]\n")]


def test_no_secrets_and_no_other_processes(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    with contextlib.closing(Kernel(isolated(), LIMITS)) as fresh:
        given = fresh.execute(
            "import os, glob\nprint('secret' in str(os.environ), os.getuid(), os.getcwd())\n"
            "environments = [p for p in glob.glob('/proc/[0-9]*/environ') if os.access(p, os.R_OK)]\n"
            "print(len(glob.glob('/proc/[0-9]*')) < 9, any('secret' in open(p).read() for p in environments))"
        )
    assert texts(given) == [("stdout", "False 65534 /mnt/data\nTrue False\n")]


def test_two_conversations_are_apart(kernel: Kernel) -> None:
    with KernelPool(isolated(), most=2) as pool:
        one, other = pool.kernel("a" * 32), pool.kernel("b" * 32)
        one.execute("secret = 1; open('mine', 'w').write('x')")
        assert last(other.execute("secret")).startswith("NameError")
        assert other.files() == [] and one.files() == ["mine"] and pool.kernel("a" * 32) is one
        third = pool.kernel("c" * 32)  # the longest idle one ends
        assert pool.find("b" * 32) is None and pool.find("a" * 32) is one and third.files() == []
        assert not other.work.exists()
        pool.end("a" * 32)
        assert not one.work.exists()


# ------------------------------------------------------------------------------------- what it does is contained


#: Code of a cell that says that it runs, see `cancelled_when_begun`.
BEGIN = "open('/mnt/data/.begun', 'w').close()"


def cancelled_when_begun(kernel: Kernel) -> threading.Event:
    """An event that is set when the next cell has run `BEGIN`."""
    pipe, event = kernel.work / ".begun", threading.Event()
    if not pipe.exists():
        os.mkfifo(pipe)

    def wait() -> None:
        pipe.read_bytes()
        event.set()

    threading.Thread(target=wait, daemon=True).start()
    return event


def test_a_cell_that_takes_too_long_is_interrupted_and_its_variables_stay(kernel: Kernel) -> None:
    kernel.execute("x = 7")
    given = kernel.execute("while True: pass", seconds=0.5)
    assert given.status == "timeout" and last(given) == "The cell took more than 0.5 seconds and was interrupted."
    assert last(kernel.execute("x")) == "7"


def test_a_cell_can_be_interrupted(kernel: Kernel) -> None:
    cancel = cancelled_when_begun(kernel)
    given = kernel.execute(f"{BEGIN}; import time\ntime.sleep(600)", cancel, seconds=600)
    assert given.status == "interrupted" and "KeyboardInterrupt" in last(given)


def test_an_interrupt_before_the_cell_begins_is_kept_until_it_does(kernel: Kernel) -> None:
    kernel.execute("x = 7")
    cancel = threading.Event()
    cancel.set()
    assert kernel.execute("import time\ntime.sleep(600)", cancel, seconds=600).status == "interrupted"
    assert last(kernel.execute("x")) == "7"  # in the same kernel


def test_an_endless_print_ends(kernel: Kernel) -> None:
    given = kernel.execute("while True: print('y' * 1000)")
    assert given.status == "full" and last(given) == "The cell printed too much and was interrupted."
    assert sum(len(text) for _, text in texts(given)) < 110_000
    assert kernel.execute("1").status == "ok"


def test_a_cell_that_ignores_interrupts_ends_with_its_kernel(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatglm.interpreter.kernel.INTERRUPT_SECONDS", 0.5)
    stubborn = f"import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{BEGIN}\ntime.sleep(600)"
    given = kernel.execute(stubborn, cancelled_when_begun(kernel), seconds=600)
    assert given.status == "interrupted" and "could not be interrupted. The kernel was started anew" in last(given)
    assert kernel.execute("1").status == "ok"


def test_a_kernel_that_ends_itself_is_started_anew(kernel: Kernel) -> None:
    kernel.execute("x = 1; open('kept', 'w').write('y')")
    given = kernel.execute("import os\nos._exit(3)")
    assert given.status == "died" and last(given).startswith("The kernel died. The kernel was started anew")
    assert last(kernel.execute("x")).startswith("NameError") and "kept" in kernel.files()


def test_a_large_file_cannot_be_written(kernel: Kernel) -> None:
    given = kernel.execute("open('big', 'wb').write(b'x' * (65 * 2**20))")
    assert last(given) == "OSError: [Errno 27] File too large"
    assert (kernel.work / "big").stat().st_size <= 64 * 2**20


def test_a_large_allocation_fails(kernel: Kernel) -> None:
    assert last(kernel.execute("b = bytearray(3 * 2**30)")) == "MemoryError"
    assert kernel.execute("1").status == "ok"


def test_the_memory_of_all_processes_together_is_limited() -> None:
    limits = replace(LIMITS, memory=600 * 2**20)
    with contextlib.closing(Kernel(isolated(), limits)) as small:
        small.execute("1")
        assert small._process is not None
        pid = small._process.pid
        given = small.execute(
            "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        b = b'x' * (150 * 2**20)\n"
            "        time.sleep(600)\ntime.sleep(600)"
        )
        assert given.status == "died" and "600 MB of memory" in last(given), texts(given)
        assert descendants(pid) == [pid] and not Path(f"/proc/{pid}").exists()


def test_a_fork_storm_is_contained(kernel: Kernel) -> None:
    kernel.execute("1")
    assert kernel._process is not None
    pid = kernel._process.pid
    given = kernel.execute("import os\nwhile True:\n    os.fork()")
    assert given.status == "died" and "started more than 64 processes" in last(given), texts(given)
    assert not Path(f"/proc/{pid}").exists()
    assert kernel.execute("1").status == "ok"


def test_too_many_files_end_the_kernel_and_are_removed() -> None:
    with contextlib.closing(Kernel(isolated(), replace(LIMITS, work=20 * 2**20))) as small:
        given = small.execute("i = 0\nwhile True:\n    open(f'{i}', 'wb').write(b'x' * 2**20); i += 1")
        assert given.status == "died" and "The files take more than 20 MB" in last(given)
        assert small.files() == [] and small.execute("1").status == "ok"


def test_memory_disks_have_a_size(kernel: Kernel) -> None:
    for folder in ("/tmp", "/dev/shm"):
        code = f"for i in range(9):\n    open(f'{folder}/{{i}}', 'wb').write(b'x' * (60 * 2**20))"
        assert last(kernel.execute(code)) == "OSError: [Errno 28] No space left on device"
        kernel.execute(f"import glob, os\nfor path in glob.glob('{folder}/[0-9]'):\n    os.remove(path)")


def test_a_restart_forgets_variables_and_keeps_files(kernel: Kernel) -> None:
    kernel.execute("x = 1; open('kept', 'w').write('y')")
    kernel.restart()
    assert last(kernel.execute("x")).startswith("NameError") and "kept" in kernel.files()


# --------------------------------------------------------------------------------------------------------- grades


def test_a_python_in_a_folder_for_temporary_files_runs_in_the_jail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True)
        monkeypatch.setattr(sys, "prefix", folder)
        monkeypatch.setattr(sys, "executable", f"{folder}/bin/python")
        command = choose_isolation().command(tmp_path, tmp_path, Limits())
        inside = command[: command.index(sys.executable)]
        found = subprocess.run([*inside, sys.executable, "-c", "import sys; print(sys.prefix)"], capture_output=True)
        assert found.stdout.decode().strip() == folder, found.stderr


def test_a_kernel_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = isolated()
    monkeypatch.setattr(Isolation, "environment", lambda *_: {"PATH": "/usr/bin:/bin"})
    with contextlib.closing(Kernel(found, Limits(memory=2**24))) as kernel:
        given = kernel.execute("1")
        assert given.status == "died" and re.match(r"the kernel did not start: .*\w", last(given)), texts(given)


def test_without_bubblewrap_nothing_runs_unless_the_user_trusts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    isolation._works.cache_clear()
    with pytest.raises(NotIsolatedError, match=r"bubblewrap is not installed.*`trusted` runs code with your own"):
        choose_isolation()
    assert choose_isolation("trusted").network
    isolation._works.cache_clear()
    with pytest.raises(ValueError, match="no grade of isolation 'safe'"):
        choose_isolation("safe")


@pytest.mark.skipif(os.name != "posix", reason="the kernel's sockets are those of Unix")
def test_trusted_code_sees_the_user_s_files_and_is_limited_all_the_same() -> None:
    with contextlib.closing(Kernel(choose_isolation("trusted"), LIMITS)) as kernel:
        assert last(kernel.execute(f"len(open({str(ROOT / 'README.md')!r}).read()) > 9")) == "True"
        assert last(kernel.execute("import os; os.getcwd()")) == repr(str(kernel.work))
        assert "HOME" not in str(kernel.execute("'API_KEY' in os.environ").parts)
        assert kernel.execute("os._exit(0)").status == "died"
