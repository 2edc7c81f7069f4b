"""Passes the steps of one answer from the engine to its reader in any thread or task."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace

from ..decoding.steps import GenerationStep
from .logprobs import TokenLogprob


@dataclass(frozen=True)
class EngineStep(GenerationStep):
    """A `GenerationStep` of the engine: `delta` is the new part of `text`, `logprob` is there if requested.

    The first step has the `prompt_logprobs`, if requested: one entry per token, None where nothing predicts it.
    `queue_seconds` passed before the engine began to read the prompt. `token_id` is also None if no answer was wanted.
    """

    delta: str
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    queue_seconds: float = 0.0


@dataclass(frozen=True)
class Waiting:
    """The request is in the queue, and `before` others come before it."""

    before: int


class Stream:
    """The steps of one answer, to be read once, with `for` or `async for`.

    Reading raises the error that ended the request early: NonFiniteLogitsError, EngineStoppedError, or whatever one of
    the caller's processors raised.
    """

    def __init__(self) -> None:
        self._items: deque[EngineStep | BaseException] = deque()
        self._ready = threading.Condition()
        self._wake: Callable[[], object] | None = None
        self._text = ""
        self._ended = False
        self._before: int | None = None  # None: no step of the scheduler has seen the request yet
        self._begun = False
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the answer with the reason "cancelled" at the next step. Any thread may call it, and more than once."""
        self.cancelled = True

    def wait(self, before: int) -> None:
        """Says how many requests in the queue come before this one."""
        if before != self._before:
            with self._ready:
                self._before = before
                self._ready.notify_all()

    def begin(self) -> None:
        """Says that the request has left the queue."""
        with self._ready:
            self._begun = True
            self._ready.notify_all()

    def queue(self) -> Iterator[Waiting]:
        """Yields the place in the queue whenever it changes, until the request leaves the queue."""
        said: int | None = None

        def has_news() -> bool:
            return self._begun or bool(self._items) or self._before != said

        while True:
            with self._ready:
                self._ready.wait_for(has_news)
                if self._begun or self._items or self._before is None:
                    return
                said = self._before
            yield Waiting(said)

    def put(self, item: EngineStep | BaseException) -> None:
        """Adds a step, or the error that ended the request early.

        Steps arrive without `text`, which is joined from their deltas on reading: so a long answer that nobody reads is
        in memory only once.
        """
        with self._ready:
            self._items.append(item)
            self._ready.notify_all()
            if self._wake is not None:
                with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                    self._wake()

    def _take(self) -> EngineStep:
        item = self._items.popleft()
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        self._text += item.delta
        return replace(item, text=self._text)

    def __iter__(self) -> Iterator[EngineStep]:
        return self

    def __next__(self) -> EngineStep:
        if self._ended:
            raise StopIteration
        with self._ready:
            self._ready.wait_for(lambda: self._items)
            return self._take()

    def __aiter__(self) -> AsyncIterator[EngineStep]:
        return self

    async def __anext__(self) -> EngineStep:
        if self._ended:
            raise StopAsyncIteration
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._ready:
            if self._items:
                return self._take()
            self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        await arrived.wait()
        with self._ready:
            return self._take()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()
