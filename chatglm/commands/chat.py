"""Chat with a ChatGLM in the terminal; with -p TEXT, answer once. A document on standard input goes behind TEXT."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import stat
import sys
import threading
from typing import Any

from ..demo import is_demo
from ..front.abilities import Abilities, add_ability_arguments, check_abilities, open_abilities
from ..front.arguments import (
    LibraryError,
    add_generation_arguments,
    add_model_arguments,
    generation_settings,
    load_from_arguments,
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
    parser.add_argument("--no-stream", action="store_true", help="print an answer once it is complete")
    parser.add_argument("--no-history", action="store_true", help="keep no file of the lines that are typed")
    add_ability_arguments(parser)
    parser.add_argument("--work", metavar="FOLDER", help="the files of --interpreter (default: a temporary folder)")
    parser.add_argument("--yes", action="store_true", help="run tools and code without asking")
    parser.add_argument("--lang", choices=LANGUAGES, default=choose_language(), help="language of the messages")
    args = parser.parse_args(arguments)
    if args.complete and (args.system or args.tools or args.tools_module or args.mcp or args.interpreter):
        parser.error("--complete has no chat: leave out --system, --tools and what else is for a chat")
    if args.work and not args.interpreter:
        parser.error("--work is the folder of --interpreter")
    with contextlib.ExitStack() as stack:
        return _chat(args, prog, stack)


def _chat(args: argparse.Namespace, prog: str | None, stack: contextlib.ExitStack) -> int:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # Terminal.answer refuses what is no text
    try:
        abilities = open_abilities(args, args.lang, stack)
        model, tokenizer = load_from_arguments(args)
        check_abilities(abilities, tokenizer.chat_format)
        terminal = _terminal(model, tokenizer, abilities, args, stack)
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


def _terminal(
    model: Any, tokenizer: Any, abilities: Abilities, args: argparse.Namespace, stack: contextlib.ExitStack
) -> Terminal:
    """The chat, with what runs its tools or its code."""
    system = args.system
    if abilities.isolation is not None:
        from ..interpreter import SYSTEM_PROMPT, CodeRunner, Kernel

        system = SYSTEM_PROMPT if system is None else system
    session = Session(tokenizer.chat_format, system, abilities.described())
    terminal = Terminal(model, tokenizer, session, generation_settings(args), args.lang)
    terminal.agrees = args.yes
    if abilities.isolation is not None:
        kernel = stack.enter_context(contextlib.closing(Kernel(abilities.isolation, work=args.work)))
        terminal.runner = CodeRunner(kernel, asks=True, seen=terminal.show_files)
        terminal.forget = kernel.restart
        if abilities.isolation.grade != "isolated":
            terminal.say("trusted")
    elif abilities.tools:
        terminal.runner = abilities.runner()
    return terminal


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
