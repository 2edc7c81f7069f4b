"""How our programs start and end: `python cli_demo.py`, `chatglm serve`, `python -m chatglm.doctor` and the others.

Importing torch and transformers takes seconds, so a program imports them when it loads a model: --help, wrong arguments
and Ctrl-C do not wait for them. Exit statuses: 0, 1 if something failed, 2 for wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .language import choose_language

INTERRUPTED = 130  # a shell's exit status for Ctrl-C
#: How the names of threads that load a model begin, see `start`.
LOADING = "chatglm-load"

#: Programs beside the package.
_FILES = (
    "api.py", "cli_demo.py", "web_demo.py", "game/cli_demo_zh.py", "game/cli_demo_en.py", "game/web_demo_zh.py",
    "game/web_demo_en.py",
)  # fmt: skip
_PACKAGE = Path(__file__).resolve().parent
#: What a write to a standard stream raises that is closed, full or gone; such an error has no file name.
_STREAM_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EINVAL)
_OUTPUT = {"zh": "错误：无法写标准输出（{reason}）", "en": "Error: cannot write to standard output ({reason})"}
_CLOSED = {"zh": "已关闭", "en": "it is closed"}


class OutputError(BaseException):
    """Standard output takes no more: to end the program, like KeyboardInterrupt, and no trouble with a file."""


# ---- the start -------------------------------------------------------------------------------------------------------


def is_own_program() -> bool:
    """Whether this process runs a program of ours, which imports what it needs when it needs it."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        return False  # a worker: it gets our arguments, and work that may need everything
    if sys.argv[:1] == ["-m"]:  # Python is still looking for the module of `python -m`
        return module_to_run(sys.orig_argv).partition(".")[0] == __package__
    path = Path(sys.argv[0] if sys.argv and sys.argv[0] else ".")
    if re.fullmatch(r"chatglm(\.exe|-script\.pyw?)?", path.name) and not path.is_dir():  # the console command
        return True
    return any(path.resolve() == _PACKAGE.parent / name for name in _FILES)


def module_to_run(command_line: Sequence[str]) -> str:
    """The module that a command line with -m names: "a.b" for ["python", "-Im", "a.b"] and ["python", "-ma.b"]."""
    words = iter(command_line[1:])
    for word in words:
        if found := re.fullmatch(r"-[bBdEhiIOPqRsSuvx]*m(.*)", word):
            return found[1] or next(words, "")
        if word in ("-W", "-X", "--check-hash-based-pycs"):
            next(words, None)
    return ""


def _leave_now(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def leave_at_ctrl_c() -> None:
    """Makes Ctrl-C end the process at once and in silence, until `run` begins: nothing is there to be tidied up."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
        signal.signal(signal.SIGINT, _leave_now)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Ctrl-C ends the process within: KeyboardInterrupt in the midst of an import may come out as anything."""
    previous = signal.getsignal(signal.SIGINT)
    leave_at_ctrl_c()
    try:
        yield
    finally:
        if previous is signal.default_int_handler and _in_main_thread():
            signal.signal(signal.SIGINT, previous)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(work: Callable[[], int], *, prints: bool = True) -> int:
    """Runs a program; returns its exit status.

    Args:
        work: parses the arguments and does everything; returns 0 or 1. Its SystemExit (argparse's, for --help and for
            wrong arguments) passes.
        prints: its result goes to standard output, so that it fails without one. A server does without.
    """
    if signal.getsignal(signal.SIGINT) is _leave_now and _in_main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _prepare_streams(prints)
        try:
            return work()
        finally:  # also after --help: an error shows here, not when the interpreter ends
            put("", end="")
    except KeyboardInterrupt:
        return INTERRUPTED
    except OutputError as error:
        if str(error):
            complain(_OUTPUT[choose_language()].format(reason=error))
    except OSError as error:
        if error.filename is not None or error.errno not in _STREAM_ERRORS:
            raise
        if error.errno != errno.EPIPE:
            complain(_OUTPUT[choose_language()].format(reason=error.strerror))
    _discard(sys.stdout)
    return 1


def put(text: str, end: str = "\n") -> None:
    """Prints to standard output at once. Raises OutputError; without a message if nobody reads it any more."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise OutputError("" if error.errno == errno.EPIPE else str(error.strerror)) from error


def complain(text: str) -> None:
    """Prints a message on standard error, if that takes it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nowhere to say so; the exit status tells
        _discard(sys.stderr)


def start(main: Callable[[], int]) -> NoReturn:
    """Calls `main` and ends the process with the status that it returns, or exits with.

    Ends it at once if a thread still loads a model: torch aborts when the interpreter is torn down under it.
    """
    try:
        sys.exit(main())
    except SystemExit as end:
        if not any(thread.name.startswith(LOADING) for thread in threading.enumerate()):
            raise
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else end.code is not None)


def _prepare_streams(prints: bool) -> None:
    """Replaces standard streams that are closed, and lets neither odd text nor an old console crash us."""
    no_output = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if no_output and prints:
        raise OutputError(_CLOSED[choose_language()])


def _discard(stream: object) -> None:
    """Points a stream at nothing: otherwise the interpreter complains when it flushes it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]
