"""The engine: takes requests from any thread or task and runs a scheduler in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..generation import GenerationOptions
from .errors import EngineStoppedError, QueueFullError
from .pace import Pace
from .request import AS_LOADED, CLIENT, AdapterName, Request
from .scheduler import Scheduler
from .statistics import Statistics
from .stream import Stream

Result = TypeVar("Result")

#: The queue may hold this many times its places, of requests that were refused twice and came back when they were told.
PROMISED = 4


class Engine:
    """Runs requests together on `model`, which belongs to this engine until `close`.

    Clients (see `CLIENT`) share it: one that has less than its fair share of the places gets them even if others have
    filled the queue, and the answers of the client with the fewest running ones start first.

    Args:
        decode_ids: ids of an answer -> text, see `AnswerText`.
        max_batch: how many answers run at once.
        max_queue: how many more requests may wait; more only of those that were refused twice, see `Pace`.
        cache_tokens: tokens that the KV caches of all rows may hold together; None uses half of the free memory.
            A request that would need more on its own ends with the reason "length".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode_ids: Callable[[list[int]], str],
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        cache_tokens: int | None = None,
    ) -> None:
        if max_queue < 0:
            raise ValueError(f"max_queue must be 0 or more, not {max_queue}")
        self.model = model
        self.context: int = model.config.max_position_embeddings
        self.max_batch, self.max_queue = max_batch, max_queue
        self._scheduler = Scheduler(
            model, decode_ids, max_batch=max_batch, cache_tokens=cache_tokens, on_end=self._request_ended
        )
        self._jobs: deque[tuple[Callable[[], Any], str | None, Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._held: Counter[str] = Counter()  # client -> its answers that run or wait
        self._pace = Pace()
        self._closing_at: float | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="chatglm-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------- for any thread

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._failure is None and self._closing_at is None and self._thread.is_alive()

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def statistics(self) -> Statistics:
        return self._scheduler.statistics

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV caches of all rows may hold together."""
        return self._scheduler.cache_tokens

    @property
    def cached(self) -> tuple[int, int]:
        """Number of tokens that the rows hold, and their size in bytes."""
        return self._scheduler.cached

    @property
    def used(self) -> float:
        """The share of `cache_tokens` that running requests hold."""
        return self._scheduler.used

    def submit(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        top_logprobs: int | None = None,
        adapter: AdapterName = AS_LOADED,
    ) -> Stream:
        """Starts an answer to the prompt `ids`. See `submit_all`."""
        return self.submit_all([(ids, options)], top_logprobs, adapter)[0]

    def submit_all(
        self,
        requests: Sequence[tuple[Sequence[int], GenerationOptions]],
        top_logprobs: int | None = None,
        adapter: AdapterName = AS_LOADED,
        prompt_logprobs: int | None = None,
        answers: bool = True,
    ) -> list[Stream]:
        """Starts all of these answers, or none.

        Args:
            requests: for each, the ids of its prompt and the options of its answer.
            top_logprobs: report the probability of each token and of this many likeliest ones; None reports none.
            adapter: the one that all of them use.
            prompt_logprobs: the same for the tokens of the prompts.
            answers: with False, each request ends, with the reason "length", when its prompt has been read.

        Raises:
            PromptTooLongError: a prompt leaves no room for an answer, in the context or the cache.
            ValueError: a prompt is not a prompt for this model, or there is no such adapter.
            QueueFullError: the queue is full.
            EngineStoppedError: the engine was closed, or failed.
        """
        self.check_places(len(requests))
        made = [
            self._scheduler.make_request(ids, options, top_logprobs, adapter, prompt_logprobs, answers)
            for ids, options in requests
        ]
        with self._changed:
            self._check_open()
            self._take_places(made)
            for request in made:
                self._scheduler.add(request)
            self._changed.notify_all()
        return [request.stream for request in made]

    def check_places(self, answers: int) -> None:
        """Raises ValueError if this many answers are more than the engine ever takes at once."""
        if answers > self._places:
            raise ValueError(f"{answers} answers at once are more than this server takes at most ({self._places})")

    @property
    def _places(self) -> int:
        return self.max_batch + self.max_queue

    def _take_places(self, made: Sequence[Request]) -> None:
        client, count = CLIENT.get(), len(made)
        held, clients = self._held[client], len(self._held.keys() | {client})
        total = sum(self._held.values()) + count
        if total > self._places and held + count > self._places // clients:
            name = hash(tuple(tuple(request.ids) for request in made))
            refusals = self._pace.refusals(client, name)
            if refusals < 2 or total > PROMISED * self._places:
                self.statistics.refused += count
                room = sum(request.limit - request.prompt_tokens for request in made) / count
                wait = self._pace.retry_after(client, name, count, room, held, clients, refusals)
                raise QueueFullError(self.waiting, wait)
        self._held[client] += count

    def call(self, function: Callable[[], Result], adapter: AdapterName = AS_LOADED) -> Future[Result]:
        """Runs a function that needs the model, with this adapter in use, between two steps.

        Raises:
            ValueError, QueueFullError, EngineStoppedError: as `submit_all`.
        """
        future: Future[Result] = Future()
        adapter = self._scheduler.adapter_named(adapter)
        with self._changed:
            self._check_open()
            if len(self._jobs) >= max(self.max_queue, 1):
                self.statistics.refused += 1
                raise QueueFullError(len(self._jobs), 1)
            self._jobs.append((function, adapter, future))
            self._changed.notify_all()
        return future

    def close(self, grace: float = 0.0, wait: bool = True) -> None:
        """Stops taking requests, ends those that wait, and after `grace` seconds those that still run.

        Args:
            wait: return only when all of them have ended.
        """
        with self._changed:
            closing_at = time.monotonic() + grace
            self._closing_at = closing_at if self._closing_at is None else min(self._closing_at, closing_at)
            self._changed.notify_all()
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(f"the engine has failed: {self._failure}") from self._failure
        if self._closing_at is not None:
            raise EngineStoppedError("the server is shutting down")

    # -------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait_for_work():
                    began, tokens = time.perf_counter(), self.statistics.completion_tokens
                    answering = self._scheduler.has_work
                    self._do_job()
                    self._scheduler.step()
                    if answering:
                        self._pace.worked(time.perf_counter() - began, self.statistics.completion_tokens - tokens)
        except BaseException as error:  # whatever it is, no reader may be left waiting
            self._failure = error
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; False if the engine should stop."""
        with self._changed:
            while not (self._scheduler.has_work or self._jobs or self._closing_at is not None):
                self._changed.wait()
        if self._closing_at is None:
            return True
        error = EngineStoppedError("the server is shutting down")
        self._scheduler.fail_waiting(error)
        self._fail_jobs(error)
        return self.running > 0 and time.monotonic() < self._closing_at

    def _do_job(self) -> None:
        """Runs one of the functions that wait: running answers continue before the next."""
        if self._jobs:
            function, adapter, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    self._scheduler.use(adapter)
                    future.set_result(function())
                except Exception as error:  # passed on to the caller
                    future.set_exception(error)

    def _fail_jobs(self, error: Exception) -> None:
        while self._jobs:
            _, _, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _end_all(self) -> None:
        reason = "the server is shutting down" if self._failure is None else f"the engine has failed: {self._failure}"
        with self._changed:
            if self._closing_at is None:
                self._closing_at = time.monotonic()
        error = EngineStoppedError(reason)
        self._fail_jobs(error)
        self._scheduler.fail_all(error)
        if self._failure is None:
            self._scheduler.restore_adapter()

    def _request_ended(self, request: Request) -> None:
        if request.answer_tokens:
            self._pace.ended(request.answer_tokens)
        with self._changed:
            self._held[request.client] -= 1
            if not self._held[request.client]:
                del self._held[request.client]
