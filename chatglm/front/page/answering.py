"""An answer on the page, and what it leads to: calls, their results, the next answer. Each step is shown and stored.

A result is the question of the next round, so that the browser's copy of the chat is whole after each of them.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...engine import Waiting
from ..messages import PAGE, TERMINAL
from . import display, failures
from .calls import pictures_of
from .running import BUSY, Running
from .stored_chat import StoredChat

if TYPE_CHECKING:
    from .page import Page

REFRESH = 0.05  # seconds between two updates of a growing answer
Updates = Iterator[dict[Any, Any]]


class Answer:
    """The answer to the question of a chat, for one visitor.

    Args:
        values: those of the page's knobs, by name.
    """

    def __init__(self, page: Page, chat: StoredChat, values: dict[str, Any], running: Running, language: str) -> None:
        self.page, self.chat, self.values, self.running, self.language = page, chat, values, running, language
        self.said, self.step, self.drawn = "", None, 0.0
        self.is_complete = False

    def text(self, key: str) -> str:
        return PAGE[key][self.language]

    def updates(self) -> Updates:
        """Yields what to show. The stored chat changes only together with the display."""
        page, failure = self.page, ""
        yield {page.speed: self.text("reading")}
        try:
            yield from self._rounds()
        except Exception as error:
            failure = failures.reason(error, self.language)
        if self.running.is_left:
            return
        if self.is_complete and not failure:
            speed = "" if self.step is None else display.speed(self.step, self.language)
            yield {**self._shown(), page.speed: speed, **page.panel.pending(self.chat)}
            return
        if failure:
            gr.Warning(html.escape(TERMINAL["error"][self.language].format(reason=failure)))
        asked = self.chat.turn
        if self.said.strip():
            self.chat, unsent = self.chat.broken_off(self.said, failure), ""
        else:  # a typed question goes back into the box
            self.chat, unsent = self.chat.without_turn(), "" if self.chat.attempt or not asked else asked.question
        yield {**self._shown(unsent=unsent), page.speed: "", **page.panel.pending(self.chat)}

    def _rounds(self) -> Updates:
        page, values, turn = self.page, self.values, self.chat.turn
        assert turn is not None
        session = page.calls.session(values["mode"], values["system"], values["tools"], self.language)
        head = len(session.history)
        settings = page.settings | {
            "max_length": int(values["max_length"]) or None, "top_p": values["top_p"],
            "temperature": values["temperature"],
        }  # fmt: skip
        if page.adapters:
            settings["adapter"] = values["adapter"] or None
        if "seed" in settings:
            settings["seed"] += self.chat.attempt

        def ask(question: str, history: list[Any], role: str) -> Iterator[Any]:
            return page.answer(question, history, settings | {"role": role}, self.running.cancel)

        results: list[Any] = []
        runner = page.calls.runner(values["mode"], session, self.chat, results.append)
        before = [*session.history, *self.chat.before]
        if runner is None:
            yield from self._plain(ask(turn.question, before, turn.role), head)
        else:
            from ...tools import tool_loop

            loop = tool_loop(
                ask, page.chat_format, turn.question, before, turn.role, runner,
                confirm=lambda call: True if values["auto"] else None, cancel=self.running.cancel,
            )  # fmt: skip
            yield from self._with_calls(loop, head, results)

    def _plain(self, steps: Iterator[Any], head: int) -> Updates:
        """An answer whose calls somebody else runs."""
        step: Any = None
        for given in steps:
            if self.running.is_left:
                return
            if isinstance(given, Waiting):
                yield {self.page.speed: display.waiting(given.before, self.language)}
                continue
            step, self.said = given, given.text
            if step.finish_reason is None:
                yield from self._grow()
        if step is not None and (self.said.strip() or step.finish_reason != "cancelled"):
            self.chat, self.step, self.is_complete = self.chat.answered(step.history[head:]), step, True

    def _with_calls(self, loop: Iterator[Any], head: int, results: list[Any]) -> Updates:
        from ...tools import Call, Done, Observation, Text

        for given in loop:
            if self.running.is_left:
                return
            if isinstance(given, Waiting):
                yield {self.page.speed: display.waiting(given.before, self.language)}
            elif isinstance(given, Text):
                self.said = given.text
                if given.step.finish_reason is None:
                    yield from self._grow()
                elif given.text.strip() or given.step.finish_reason != "cancelled":
                    self.chat, self.step, self.said = self.chat.answered(given.step.history[head:]), given.step, ""
            elif isinstance(given, Call):
                yield {**self._shown(), self.page.speed: self.text("running")}
            elif isinstance(given, Observation):
                self.chat = self.chat.called(given.content, pictures_of(results))
                results.clear()
                yield {**self._shown(), self.page.speed: self.text("reading")}
            elif isinstance(given, Done) and not (self.chat.turn and given.reason == "cancelled" and not results):
                # As the loop has it: an answer may only have looked like a call.
                self.chat, self.is_complete = self.chat.answered(given.messages[head:]), True
                if given.reason in ("rounds", "repeated"):
                    gr.Info(html.escape(TERMINAL[given.reason][self.language]))

    def _grow(self) -> Updates:
        if not self.said or time.monotonic() - self.drawn <= REFRESH:
            return
        assert self.chat.turn is not None
        growing = {"turn": self.chat.turn.id, "answer": self.said}
        answer = display.answer(self.said, growing=True)
        page = self.page
        yield {page.chat: [*self.chat.shown(self.language), answer], page.growing: growing, page.speed: ""}
        self.drawn = time.monotonic()

    def _shown(self, **more: Any) -> dict[Any, Any]:
        return {self.page.chat: self.chat.shown(self.language), self.page.place: self.chat.write() | more}


def run_open_call(
    page: Page, chat: StoredChat, written: str, values: dict[str, Any], allowed: bool, running: Running, language: str
) -> Updates:
    """Runs the call at the end of a chat, as the visitor has edited it, or refuses it; then the model goes on."""
    found = page.calls.open_call(chat)
    if found is None:
        gr.Warning(PAGE["no_call"][language])
        yield {page.speed: ""}
        return
    try:
        call, content = page.calls.edited(found[0], written)
        session = page.calls.session(values["mode"], values["system"], values["tools"], language)
        results: list[Any] = []
        mode = "code" if found[0] == "interpreter" else "tools"
        runner = page.calls.runner(mode, session, chat, results.append)
    except ValueError as error:
        gr.Warning(html.escape(failures.reason(error, language)))
        yield {page.speed: ""}
        return
    assert runner is not None
    if written != found[1]:
        history = [*chat.history[:-1], {**chat.history[-1], "content": content}]
        chat = replace(chat, history=history, turn=None)
    busy = gr.update(**BUSY)
    hidden = gr.update(visible=False)
    shown = {page.chat: chat.shown(language), page.place: chat.write(), page.speed: PAGE["running"][language]}
    yield {**shown, page.box: busy, page.panel.group: hidden}
    seen = runner.run(call, running.cancel).content if allowed else "The user did not allow this call."
    if running.is_left:
        return
    chat = chat.called(seen, pictures_of(results))
    yield {page.chat: chat.shown(language), page.place: chat.write(), page.speed: PAGE["reading"][language]}
    if running.cancel.is_set():  # stopped while it ran: the result stays, and waits for the visitor's next question
        chat = chat.answered([*chat.before, {"role": "observation", "content": seen}])
        yield {page.chat: chat.shown(language), page.place: chat.write(), page.speed: ""}
        return
    yield from Answer(page, chat, values, running, language).updates()
