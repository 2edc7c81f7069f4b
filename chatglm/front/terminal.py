"""The chat in a terminal or a pipe: reads questions and commands, prints answers as they grow."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ..program import complain, put
from .arguments import SETTINGS, parse_setting
from .input_history import InputHistory
from .messages import TERMINAL
from .session import Session

QUOTES = '"""'


class Terminal:
    """One conversation between a person (or a pipe) and a model."""

    def __init__(self, model: Any, tokenizer: Any, session: Session, settings: dict[str, Any], language: str) -> None:
        self.model, self.tokenizer, self.session = model, tokenizer, session
        self.settings, self.language = dict(settings), language
        self.stream = True
        self.completes = False  # continues texts, instead of answering questions
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.input_history: InputHistory | None = None
        self.failed = False
        self.retries = 0
        self.runner: Any = None  # runs the model's calls: a `chatglm.tools.Runner`
        self.agrees = False  # to every call
        self.pictures = 0
        self.forget: Callable[[], None] = lambda: None  # at the start of another conversation

    def text(self, key: str, **values: Any) -> str:
        return TERMINAL[key][self.language].format(**values)

    def say(self, key: str, **values: Any) -> None:
        """Prints a message of the program: to stderr if the output is not a terminal, so that it gets only answers."""
        (put if self.interactive else complain)(self.text(key, **values))

    def fail(self, reason: object) -> None:
        self.failed = True
        self.say("error", reason=reason)

    def read_line(self, prompt: str) -> str:
        """Reads one line, without its line break. Raises EOFError at the end of the input."""
        if self.interactive:
            line = input(self.text(prompt))
            self.keep_line()
        elif not (line := sys.stdin.readline()):
            raise EOFError
        return line.rstrip("\r\n")

    def keep_line(self) -> None:
        """Adds the line that was typed to the file of them."""
        try:
            if self.input_history:
                self.input_history.keep()
        except OSError as error:
            self.input_history = None
            self.say("no_history", reason=error)

    def read_block(self, first_line: str) -> str:
        """Reads the lines between triple quotes."""
        lines = [first_line.removeprefix(QUOTES)]
        with contextlib.suppress(EOFError):
            while not lines[-1].rstrip().endswith(QUOTES):
                lines.append(self.read_line("more"))
        return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")

    def chat(self) -> None:
        """Takes questions and commands until /quit or the end of the input."""
        while True:
            try:
                if not self.take(self.read_line(self.session.next_role).strip()):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                put("")
                self.say("interrupt")

    def take(self, line: str) -> bool:
        """Takes one line of input: a command, or (the beginning of) a question. Returns False to end the chat."""
        command = re.fullmatch(r"/(\w+)(?:\s+(.*))?", line)
        if line in ("stop", "clear"):  # the originals' words
            command = re.fullmatch(r"(\w+)()", line)
        if command is None:
            question = self.read_block(line) if line.startswith(QUOTES) else line
            if question.strip():
                self.answer(question, self.session.next_role)
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
        """Prints the answer, or the continuation, as it grows and keeps the turn; returns False if there is none.

        In a terminal, Ctrl-C ends the answer early and keeps the text so far; elsewhere it ends the program as usual.
        Raises OutputError.
        """
        if re.search("[\ud800-\udfff]", question):  # bytes that were not text, see commands/chat.py
            self.fail(self.text("not_text", encoding=sys.stdin.encoding))
            return False
        settings: dict[str, Any] = {**self.settings, "cancel": threading.Event()}
        if "seed" in settings:
            settings["seed"] += seed_shift
        if self.completes:
            return self._print(self.model.complete_steps(self.tokenizer, question, **settings), settings) is not None
        if self.interactive:
            put(self.text("assistant"), end="")
        if self.runner is not None:
            return self._answer_with_calls(question, role, settings)
        steps = self.model.stream_steps(self.tokenizer, question, self.session.history, role=role, **settings)
        step = self._print(steps, settings)
        if step is None:
            return False
        self.session.history = step.history
        if isinstance(step.response, dict):  # a tool call; one that cannot be parsed has its raw text as content
            self._show_call(step.response["name"], step.response.get("parameters") or step.response.get("content"))
        return True

    def _answer_with_calls(self, question: str, role: str, settings: dict[str, Any]) -> bool:
        """The same where the program runs the calls of the model itself."""
        from ..tools import Call, Observation, Text, tool_loop

        def ask(question: str, history: list[Any], role: str) -> Iterator[Any]:
            return self.model.stream_steps(self.tokenizer, question, history, role=role, **settings)

        loop = tool_loop(
            ask, self.session.chat_format, question, self.session.history, role, self.runner,
            confirm=self.confirm, cancel=settings["cancel"],
        )  # fmt: skip
        with self._answering(settings) as failed:
            for step in loop:
                if isinstance(step, Text):
                    whole = getattr(step.step, "finish_reason", None) is not None
                    if self.stream:
                        put(step.delta, end="")
                    if whole and (step.text or self.interactive):
                        put("" if self.stream else step.text)
                        self._say_speed(step.step)
                elif isinstance(step, Call):
                    self._show_call(step.name, step.content if step.arguments is None else step.arguments)
                elif isinstance(step, Observation):
                    self.say("seen", text=step.content)
                    if self.interactive:
                        put(self.text("assistant"), end="")
                else:
                    self.session.history = step.messages
                    if step.reason in ("rounds", "repeated"):
                        self.say(step.reason)
        return not failed

    def _show_call(self, name: str, given: Any) -> None:
        """Shows a call; one that cannot be parsed has its raw text."""
        if name == "interpreter":
            self.say("code", code=given)
        else:
            self.say("tool", name=name, parameters=json.dumps(given, ensure_ascii=False))

    def confirm(self, call: Any) -> bool:
        """Asks whether a call may run. Where nobody can be asked, it may not, unless --yes was given."""
        if self.agrees or not self.interactive:
            if not self.agrees:
                self.say("refused")
            return self.agrees
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return input(self.text("confirm")).strip().lower() in ("y", "yes", "是", "好")
        except (EOFError, KeyboardInterrupt):
            put("")
            return False
        finally:
            signal.signal(signal.SIGINT, previous)

    def show_files(self, result: Any) -> None:
        """Says which files and pictures a cell made; pictures become files of the working folder, too."""
        kernel = self.runner.kernel
        names = list(result.files)
        for picture in (part for part in result.parts if hasattr(part, "png")):
            self.pictures += 1
            names.append(kernel.put_file(f"picture-{self.pictures}.png", picture.png))
        if names:
            self.say("files", names=", ".join(names), folder=kernel.work)

    @contextlib.contextmanager
    def _answering(self, settings: dict[str, Any]) -> Iterator[list[str]]:
        """While an answer comes: Ctrl-C stops it in a terminal, and what fails is said, and put into the list that this
        yields."""
        failed: list[str] = []
        try:
            with interrupt_sets(settings["cancel"]) if self.interactive else contextlib.nullcontext():
                yield failed
        except KeyboardInterrupt:
            put("")
            if not self.interactive:
                raise
            failed.append("interrupted")
        except (ValueError, ArithmeticError, RuntimeError) as error:  # a long prompt, NaN, a GPU out of memory
            put("")
            self.fail(error)
            failed.append(str(error))

    def _print(self, steps: Iterator[Any], settings: dict[str, Any]) -> Any:
        """Prints the text of the steps as it grows. Returns the last step; None if something failed."""
        shown, step = "", None
        with self._answering(settings) as failed:
            for step in steps:
                delta = step.text[len(shown) :] if self.completes else step.delta
                shown += delta
                if self.stream:
                    put(delta, end="")
        if failed or step is None:
            return None
        put("" if self.stream else step.text)
        self._say_speed(step)
        return step

    def _say_speed(self, step: Any) -> None:
        if self.interactive:
            note = self.text(step.finish_reason) if step.finish_reason != "stop" else ""
            rate = step.completion_tokens / max(step.seconds, 1e-9)
            self.say("speed", tokens=step.completion_tokens, rate=rate, note=note)

    def do_help(self, value: str) -> None:
        self.say("help")

    def do_clear(self, value: str) -> None:
        self.session.clear()
        self.forget()
        self.say("cleared")

    def do_undo(self, value: str) -> None:
        self.say("undone" if self.session.undo(whole=self.runner is not None) else "nothing")

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
        self.forget()
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
        self.forget()
        self.say("loaded", path=value)

    def needs_file(self, value: str, command: str) -> str:
        if not value:
            raise ValueError(self.text("needs_file", command=command))
        return value


@contextlib.contextmanager
def interrupt_sets(event: threading.Event) -> Iterator[None]:
    """Makes Ctrl-C set `event`; a second one, if the first takes too long, raises KeyboardInterrupt as usual."""

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
