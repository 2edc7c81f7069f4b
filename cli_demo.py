"""Chat with a ChatGLM in the terminal: `python cli_demo.py`, or `python cli_demo.py -p "你好"` for one answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from chatglm.arguments import (
    SETTINGS,
    add_generation_arguments,
    add_model_arguments,
    generation_settings,
    load_from_arguments,
    parse_setting,
)
from chatglm.loading import DEMO
from chatglm.messages import LANGUAGES, TERMINAL, choose_language
from chatglm.session import Session

BLOCK = '"""'


class Terminal:
    """One conversation between a person (or a pipe) and a model."""

    def __init__(self, model: Any, tokenizer: Any, session: Session, settings: dict[str, Any], language: str) -> None:
        self.model, self.tokenizer, self.session = model, tokenizer, session
        self.settings, self.language = dict(settings), language
        self.stream = True
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.failed = False
        self.retries = 0

    def text(self, key: str, **values: Any) -> str:
        return TERMINAL[key][self.language].format(**values)

    def say(self, key: str, **values: Any) -> None:
        """A message of the program. Where the output is no terminal it gets answers only, and this goes to stderr."""
        print(self.text(key, **values), file=sys.stdout if self.interactive else sys.stderr, flush=True)

    def fail(self, reason: object) -> None:
        self.failed = True
        self.say("error", reason=reason)

    def read_line(self, prompt: str) -> str:
        """One line without its end. EOFError at the end of the input."""
        line = input(self.text(prompt)) if self.interactive else sys.stdin.readline()
        if not line and not self.interactive:
            raise EOFError
        return line.rstrip("\r\n")

    def read_message(self) -> str:
        """A line, or the lines between triple quotes."""
        line = self.read_line(self.session.next_role).strip()
        if not line.startswith(BLOCK):
            return line
        lines = [line.removeprefix(BLOCK)]
        with contextlib.suppress(EOFError):
            while not lines[-1].rstrip().endswith(BLOCK):
                lines.append(self.read_line("more"))
        return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")

    def chat(self) -> None:
        """Questions and commands until /quit or the end of the input."""
        while True:
            try:
                if not self.run(self.read_message()):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                self.say("interrupt")

    def run(self, message: str) -> bool:
        """One message: a command or a question. False ends the chat."""
        command = re.fullmatch(r"/(\w+)(?:\s+(.*))?", message)
        if message in ("stop", "clear"):  # the originals' words
            command = re.fullmatch(r"(\w+)()", message)
        if command is None:
            if message.strip():
                self.answer(message, self.session.next_role)
            return True
        name, value = command[1], (command[2] or "").strip()
        if name in ("quit", "exit", "stop"):
            return False
        method = getattr(self, f"do_{name}", None)
        try:
            if method is None:
                raise ValueError(self.text("unknown", command=f"/{name}"))
            method(value)
        except (OSError, ValueError) as error:
            self.fail(error)
        return True

    def answer(self, question: str, role: str, seed_shift: int = 0) -> bool:
        """Prints the answer as it comes and keeps the turn. Ctrl-C ends it early; False: there is no turn."""
        if re.search("[\ud800-\udfff]", question):  # bytes that were no text, see main()
            self.fail(self.text("not_text", encoding=sys.stdin.encoding))
            return False
        settings, cancel = dict(self.settings), threading.Event()
        if "seed" in settings:
            settings["seed"] += seed_shift
        if self.interactive:
            print(self.text("assistant"), end="", flush=True)
        try:
            with interrupt_sets(cancel):
                for step in self.model.stream_steps(
                    self.tokenizer, question, self.session.history, role=role, cancel=cancel, **settings
                ):
                    if self.stream:
                        print(step.delta, end="", flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            return False
        except (ValueError, ArithmeticError, RuntimeError) as error:  # a long prompt, NaN, a GPU out of memory
            print(flush=True)
            self.fail(error)
            return False
        print("" if self.stream else step.text, flush=True)
        self.session.history = step.history
        if isinstance(step.response, dict):  # a tool call; one that cannot be read has its raw text as content
            given = step.response.get("parameters") or step.response.get("content")
            self.say("tool", name=step.response["name"], parameters=json.dumps(given, ensure_ascii=False))
        if self.interactive:
            note = self.text(step.finish_reason) if step.finish_reason != "stop" else ""
            rate = step.completion_tokens / max(step.seconds, 1e-9)
            self.say("speed", tokens=step.completion_tokens, rate=rate, note=note)
        return True

    def do_help(self, value: str) -> None:
        self.say("help")

    def do_clear(self, value: str) -> None:
        self.session.clear()
        self.say("cleared")

    def do_undo(self, value: str) -> None:
        self.say("undone" if self.session.undo() else "nothing")

    def do_regen(self, value: str) -> None:
        before, turn = self.session.history, self.session.undo()
        if turn is None:
            self.say("nothing")
            return
        self.retries += 1
        if not self.answer(*turn, seed_shift=self.retries):  # the same seed would only give the same answer again
            self.session.history = before

    def do_system(self, value: str) -> None:
        self.session.set_system(value)
        self.say("system")

    def do_set(self, value: str) -> None:
        name, _, number = value.partition(" ")
        if number.strip() == "default":
            self.settings.pop(name.replace("-", "_"), None)
        elif value:
            key, parsed = parse_setting(name, number.strip())
            self.settings[key] = parsed
        self.say("settings", values=", ".join(f"{name} = {self.settings.get(name, 'default')}" for name in SETTINGS))

    def do_save(self, value: str) -> None:
        self.session.save(self.needs_file(value, "/save"))
        self.say("saved", path=value)

    def do_load(self, value: str) -> None:
        self.session.load(self.needs_file(value, "/load"))
        self.say("loaded", path=value)

    def needs_file(self, value: str, command: str) -> str:
        if not value:
            raise ValueError(self.text("needs_file", command=command))
        return value


@contextlib.contextmanager
def interrupt_sets(event: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `event`; a second one, where the first takes too long to show, is a KeyboardInterrupt as ever."""

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 where something failed, 2 for wrong arguments (SystemExit), 130 after Ctrl-C."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the answers is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the end of the interpreter complains
        return 1


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and end; - reads it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (ChatGLM3)")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools that the model may call (ChatGLM3)")
    parser.add_argument("--no-stream", action="store_true", help="print an answer once it is whole")
    parser.add_argument("--lang", choices=LANGUAGES, default=choose_language(), help="language of the messages")
    args = parser.parse_args(arguments)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        stream.reconfigure(errors=errors)  # type: ignore[union-attr]  # neither odd input nor an old console ends us
    try:
        tools = json.loads(Path(args.tools).read_text(encoding="utf-8")) if args.tools else None
        model, tokenizer = load_from_arguments(args)
        session = Session(tokenizer.chatglm_version, args.system, tools)
        terminal = Terminal(model, tokenizer, session, generation_settings(args), args.lang)
    except (OSError, ValueError) as error:
        print(TERMINAL["error"][args.lang].format(reason=error), file=sys.stderr)
        return 1
    terminal.stream = not args.no_stream
    if DEMO.parent in Path(model.name_or_path).resolve().parents:
        terminal.say("demo", millions=round(model.num_parameters() / 1e6))
    if args.prompt is not None:
        terminal.interactive = False
        terminal.answer(sys.stdin.read().strip("\r\n") if args.prompt == "-" else args.prompt, "user")
        return int(terminal.failed)
    if terminal.interactive:
        with contextlib.suppress(ImportError):  # Windows has none; importing it gives input() editing and a history
            import readline  # noqa: F401
        terminal.say("welcome")
    terminal.chat()
    if terminal.interactive:
        terminal.say("bye")
        return 0
    return int(terminal.failed)


if __name__ == "__main__":
    sys.exit(main())
