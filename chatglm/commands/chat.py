"""Chat with a ChatGLM in the terminal; with -p TEXT, answer once. A document on standard input goes behind TEXT."""

from __future__ import annotations

import argparse
import io
import os
import stat
import sys
import threading

from ..demo import is_demo
from ..front.arguments import (
    LibraryError,
    add_generation_arguments,
    add_model_arguments,
    generation_settings,
    load_from_arguments,
    read_tools,
)
from ..front.input_history import InputHistory, history_file
from ..front.messages import TERMINAL
from ..front.session import Session
from ..front.terminal import Terminal
from ..language import LANGUAGES, choose_language
from ..program import complain, run

SOON = 3.0  # seconds without the end of standard input after which a note says that we wait for it


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status: 0, 1 if something failed, 2 for wrong arguments (SystemExit), 130 after Ctrl-C."""
    return run(lambda: _main(arguments, prog))


def _main(arguments: list[str] | None, prog: str | None) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and exit; - reads it from standard input")
    parser.add_argument(
        "--complete", action="store_true", help="continue texts instead of answering: for base models and CodeGeeX2"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt (ChatGLM3, GLM-4)")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools that the model may call (ChatGLM3, GLM-4)")
    parser.add_argument("--no-stream", action="store_true", help="print an answer once it is complete")
    parser.add_argument("--no-history", action="store_true", help="keep no file of the lines that are typed")
    parser.add_argument("--lang", choices=LANGUAGES, default=choose_language(), help="language of the messages")
    args = parser.parse_args(arguments)
    if args.complete and (args.system or args.tools):
        parser.error("--complete has no chat: leave out --system and --tools")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # Terminal.answer refuses what is no text
    try:
        tools = read_tools(args.tools) if args.tools else None
        model, tokenizer = load_from_arguments(args)
        session = Session(tokenizer.chat_format, args.system, tools)
        terminal = Terminal(model, tokenizer, session, generation_settings(args), args.lang)
    except (OSError, ValueError, RuntimeError, LibraryError) as error:
        complain(TERMINAL["error"][args.lang].format(reason=error))
        return 1
    terminal.stream, terminal.completes = not args.no_stream, args.complete
    if args.prompt is not None:
        terminal.interactive = False
    if is_demo(model.name_or_path):
        command = prog or f"python {os.path.basename(sys.argv[0])}"
        terminal.say("demo", millions=round(model.num_parameters() / 1e6), command=command)
    if args.prompt is not None:
        terminal.answer(read_question(args.prompt, terminal), "user")
        return int(terminal.failed)
    if terminal.interactive:
        terminal.input_history = open_history(terminal, keep=not args.no_history)
        terminal.say("welcome_complete" if args.complete else "welcome")
    terminal.chat()
    if terminal.interactive:
        terminal.say("bye")
        return 0
    return int(terminal.failed)


def read_question(prompt: str, terminal: Terminal) -> str:
    """The question of -p, with the document behind it that standard input holds; "-" is that document alone."""
    if prompt != "-" and not _has_document():
        return prompt
    # A pipe that somebody forgot to close looks like a long wait for the answer.
    note = threading.Timer(SOON, terminal.say, ["reading"])
    note.daemon = True
    note.start()
    try:
        document = sys.stdin.read().strip("\r\n")
    finally:
        note.cancel()
    if prompt == "-":
        return document
    return f"{prompt}\n\n{document}" if document.strip() else prompt


def _has_document() -> bool:
    """Whether standard input is a pipe, a socket or a file: no terminal, and not /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # no file of the system: a test's
        return not sys.stdin.isatty()
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)


def open_history(terminal: Terminal, keep: bool) -> InputHistory | None:
    """Turns line editing on; returns the lines of earlier runs, or None, with a note if the file is the obstacle."""
    try:
        import readline  # noqa: F401  # importing it gives input() editing and a history
    except ImportError:  # on Windows
        return None
    try:
        path = history_file() if keep else None
        return InputHistory(path) if path else None
    except OSError as error:
        terminal.say("no_history", reason=error)
        return None
