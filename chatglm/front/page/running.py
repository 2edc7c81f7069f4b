"""The answers of a page's visitors: at most one for each, and what follows it waits until the browser has drawn it.

gradio's `cancels` does not suffice: a slow browser goes on to draw the updates that it has received, over whatever was
shown in the meantime.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gradio import Error, Request

WAIT = 20.0  # seconds; then the browser is taken to be gone
#: The buttons of the box for questions, while an answer comes and otherwise.
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": True}
FREE: dict[str, Any] = {"submit_btn": True, "stop_btn": False}


class Running:
    """An answer to a visitor.

    Attributes:
        cancel: set when the answer shall end.
        is_left: the visitor has gone to another conversation; nothing of this one may be shown any more.
        is_computed: somebody computes it.
        is_over: the server has sent the last of it.
    """

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.is_left = self.is_computed = self.is_over = self.is_awaited = False
        self.is_drawn = asyncio.Event()


class RunningAnswers:
    """The answers by gradio's session. What is `async` runs in the server's event loop."""

    def __init__(self) -> None:
        self._answers: dict[str, Running] = {}

    def get(self, request: Request) -> Running | None:
        return self._answers.get(str(request.session_hash))

    async def begin(self, request: Request) -> bool:
        """Begins an answer. Returns whether it did: not while another one is being computed."""
        while answer := self.get(request):
            if not answer.is_over and not answer.is_left:
                return False
            await self._drawn(answer, request)
        self._answers[str(request.session_hash)] = Running()
        return True

    @contextlib.contextmanager
    def answering(self, request: Request) -> Iterator[Running | None]:
        """Gives the answer that has begun to whoever computes it, or None if it is left already."""
        answer = self.get(request)
        if answer is None or answer.is_computed:
            yield None
            return
        answer.is_computed = True
        try:
            yield None if answer.is_left else answer
        except GeneratorExit:  # the connection broke, so that the browser draws no more of it
            self._forget(answer, request)
            raise
        finally:
            answer.is_over = True

    async def leave(self, request: Request) -> None:
        """Ends the visitor's answer, if there is one, discards the rest of it, and waits for the browser."""
        while answer := self.get(request):
            answer.is_left = True
            answer.cancel.set()
            await self._drawn(answer, request)

    async def drawn(self, request: Request) -> bool:
        """The browser has drawn the last of an answer. Returns whether the visitor may ask again at once."""
        answer = self.get(request)
        if answer is None:
            return True
        if not answer.is_over:  # that was an earlier one
            return False
        self._forget(answer, request)
        answer.is_drawn.set()
        return not answer.is_awaited

    def stop(self, request: Request) -> None:
        """Ends the visitor's answer; the text so far stays."""
        if answer := self.get(request):
            answer.cancel.set()

    def close(self, request: Request) -> None:
        """The visitor has closed the page."""
        if answer := self.get(request):
            answer.is_left = True
            answer.cancel.set()
            self._forget(answer, request)

    def cancel_all(self) -> None:
        for answer in self._answers.copy().values():
            answer.cancel.set()

    async def _drawn(self, answer: Running, request: Request) -> None:
        answer.is_awaited = True
        try:
            await asyncio.wait_for(answer.is_drawn.wait(), WAIT)
        except asyncio.TimeoutError:
            self._forget(answer, request)

    def _forget(self, answer: Running, request: Request) -> None:
        if self.get(request) is answer:
            del self._answers[str(request.session_hash)]


def connect_drawn(answer: Any, function: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Has `function` called once the browser has drawn an answer, which gradio's `then` does not do after a failure."""
    answer.then(function, *given, **options)
    answer.failure(function, *given, **options)


def refused(reason: str) -> dict[str, Any]:
    """The value of a hidden component that says why a question was not taken; each is another one."""
    return {"reason": reason, "time": time.time()}


def tell(refusal: dict[str, Any]) -> None:
    """Shows the reason when that component changes. Of errors, gradio shows those of events of its queue; one that runs
    for every question could close the stream of messages that the answer is about to use."""
    raise Error(refusal["reason"], print_exception=False)
