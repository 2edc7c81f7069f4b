"""What the reader of an answer gets: its tokens, one step after the other, from any thread or task."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from ..generation import FinishReason


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the probabilities that the model gave, before temperature and penalties."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class EngineStep:
    """One token of an answer: like `GenerationStep`, but with what is new of the text only.

    All deltas together are the text: a long answer that nobody reads costs memory once.
    """

    token_id: int | None
    delta: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    logprob: TokenLogprob | None = None


class Stream:
    """The steps of one answer, for `for` and `async for`, by one reader.

    Raises what ended the request, if not its answer: NonFiniteLogitsError, EngineStoppedError.
    """

    def __init__(self) -> None:
        self._items: deque[EngineStep | BaseException] = deque()
        self._ready = threading.Condition()
        self._wake: Callable[[], object] | None = None
        self._ended = False
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the answer with the reason "cancelled" at the next step; may be called from anywhere, and twice."""
        self.cancelled = True

    def put(self, item: EngineStep | BaseException) -> None:
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
        return item

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
