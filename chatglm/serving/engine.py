"""Many requests at once on one model: taken from any thread or task, run together, answered token by token.

One thread owns the model. Between two steps requests join and leave; a step reads the prompts of those that join, row
by row as `chat` does, then runs one token of every row together. All generations go the same way: positions come from
the model's `positions_from`, and what a row does not hold is masked.

A request may be for one of the model's adapters. A model has one of them in use at a time, so a step runs the rows of
each adapter together, one adapter after the other: nobody waits for another adapter's answers to end, and a step takes
as many forwards as there are adapters among the running answers.

This loop is ours and not transformers' continuous batching: that one has one seed for all requests, takes no logits
processors of a request's own, changes the model's attention implementation under the feet of its other users, and has
no place for generation 1's mask. It is slower on a CPU, too: 16 answers of 32 tokens at once by a model of 36M numbers
on two busy cores came at 218 tokens/s here and at 53 (first run) and 82 (second) there; see `benchmarks/serving.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import use_adapter
from ..chat import ChatStep, ShownAnswer, ids_to_text
from ..generation import GenerationOptions, GenerationStep, piece_end
from .batch import Batch, affordable_tokens
from .request import Request
from .rows import BLOCK
from .stream import Stream

#: Tokens of prompts that are read between two steps of the running answers, so that a long prompt does not stop them.
PREFILL_TOKENS = 512

Result = TypeVar("Result")


class AsLoaded(Enum):
    """Stands for the adapter that the model had in use when its engine began."""

    AS_LOADED = 0


#: The name of an adapter; None: the base model.
AdapterName = str | None | AsLoaded
AS_LOADED = AsLoaded.AS_LOADED


class QueueFullError(RuntimeError):
    """As many requests are waiting as may; `retry_after` is a guess in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class EngineStoppedError(RuntimeError):
    """The engine takes no requests (any more), or stopped before this one was finished."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""


@dataclass
class Statistics:
    """Counts since the start."""

    requests: int = 0
    refused: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preempted: int = 0
    steps: int = 0


class Engine:
    """Runs requests together on `model`, which belongs to this engine until `close`.

    Args:
        max_batch: answers that run at once.
        max_queue: requests that may wait besides.
        cache_tokens: tokens that the KV caches of all rows may hold together; None takes half of the free memory.
            A request that would need more on its own ends with the reason "length".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        cache_tokens: int | None = None,
    ) -> None:
        for name, value, lowest in (("max_batch", max_batch, 1), ("max_queue", max_queue, 0)):
            if value < lowest:
                raise ValueError(f"{name} must be {lowest} or more, not {value}")
        if cache_tokens is not None and cache_tokens < 2:
            raise ValueError(f"cache_tokens must be 2 or more, not {cache_tokens}")
        self.model, self.tokenizer = model, tokenizer
        self.context: int = model.config.max_position_embeddings
        self._as_loaded = self._adapter = model.current_adapter
        self._adapters = [None, *model.adapter_names]
        self.max_batch, self.max_queue = max_batch, max_queue
        self.cache_tokens = min(cache_tokens or affordable_tokens(model), max_batch * self.context)
        self.statistics = Statistics()
        self._decode_ids = ids_to_text(tokenizer)
        self._batch = Batch(model, max_batch, self.cache_tokens)
        self._waiting: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[], Any], str | None, Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._unfinished = 0
        self._numbers = 0
        self._faults = 0
        self._seconds_per_request = 1.0
        self._closing_at: float | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="chatglm-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------- for any thread

    @property
    def is_alive(self) -> bool:
        """Takes requests."""
        return self._failure is None and self._closing_at is None and self._thread.is_alive()

    @property
    def running(self) -> int:
        return self._batch.busy

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cached(self) -> tuple[int, int]:
        """Tokens that the rows hold, and bytes that they take."""
        return sum(len(row.ids) for row in list(self._batch.rows)), self._batch.cache.size

    def submit(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        top_logprobs: int | None = None,
        adapter: AdapterName = AS_LOADED,
    ) -> Stream:
        """Starts an answer to the prompt `ids`; `top_logprobs` asks for probabilities, with that many likeliest tokens.

        Raises as `submit_all`.
        """
        return self.submit_all([(ids, options)], top_logprobs, adapter)[0]

    def submit_all(
        self,
        requests: Sequence[tuple[Sequence[int], GenerationOptions]],
        top_logprobs: int | None = None,
        adapter: AdapterName = AS_LOADED,
    ) -> list[Stream]:
        """Starts all of these answers, with one adapter, or none.

        Raises:
            PromptTooLongError: a prompt leaves no room for an answer, in the context or the cache.
            ValueError: a prompt is no prompt for this model, or there is no such adapter.
            QueueFullError: as many requests are waiting as may.
            EngineStoppedError: the engine was closed, or failed.
        """
        adapter = self._known_adapter(adapter)
        made = [self._make_request(ids, options, top_logprobs, adapter) for ids, options in requests]
        places = self.max_batch + self.max_queue
        if len(made) > places:
            raise ValueError(f"{len(made)} answers at once are more than this server ever takes ({places})")
        with self._changed:
            self._check_open()
            if self._unfinished + len(made) > places:
                self.statistics.refused += len(made)
                waves = self._unfinished / self.max_batch
                raise QueueFullError(len(self._waiting), max(1, math.ceil(self._seconds_per_request * waves)))
            for request in made:
                self._numbers += 1
                request.number = self._numbers
                self._waiting.append(request)
            self._unfinished += len(made)
            self.statistics.requests += len(made)
            self._changed.notify_all()
        return [request.stream for request in made]

    def _known_adapter(self, name: AdapterName) -> str | None:
        if isinstance(name, AsLoaded):
            return self._as_loaded
        if name not in self._adapters:
            raise ValueError(f"there is no adapter {name!r}, only {', '.join(filter(None, self._adapters)) or 'none'}")
        return name

    def _make_request(
        self, ids: Sequence[int], options: GenerationOptions, top_logprobs: int | None, adapter: str | None
    ) -> Request:
        if not ids:
            raise ValueError("the prompt is empty")
        vocabulary = self.model.config.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:  # on a GPU one wrong id would be the end of the process
            raise ValueError(f"token ids must be from 0 to {vocabulary - 1}")
        try:
            limit = options.room_for(len(ids), min(self.context, self.cache_tokens))
        except ValueError as error:
            raise PromptTooLongError(str(error)) from error
        self.model.positions_from(torch.tensor([list(ids)]), 0)  # for its errors
        return Request(ids, options, limit, top_logprobs, self._decode_ids, adapter)

    def chat(
        self,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        adapter: AdapterName = AS_LOADED,
        **settings: Any,
    ) -> Iterator[ChatStep]:
        """`model.stream_steps` with the same arguments and the same answers, together with everybody else's.

        The request is made at once; closing the iterator cancels it. Raises as `stream_steps` and `submit`.
        """
        ids, options = self.model.prepare_turn(self.tokenizer, query, history, role, **settings)
        shown = ShownAnswer(self.tokenizer, query, history, role)
        stream = self.submit(ids, options, adapter=adapter)
        return self._chat_steps(stream, shown)

    @staticmethod
    def _chat_steps(stream: Stream, shown: ShownAnswer) -> Iterator[ChatStep]:
        text = ""
        with stream:
            for step in stream:
                text += step.delta
                yield shown.step(
                    GenerationStep(
                        step.token_id,
                        text,
                        step.finish_reason,
                        step.prompt_tokens,
                        step.cached_tokens,
                        step.completion_tokens,
                        step.seconds,
                    )
                )

    def call(self, function: Callable[[], Result], adapter: AdapterName = AS_LOADED) -> Future[Result]:
        """Runs a function that needs the model, with this adapter in use, between two steps.

        Raises:
            ValueError, QueueFullError, EngineStoppedError: as `submit_all`.
        """
        future: Future[Result] = Future()
        adapter = self._known_adapter(adapter)
        with self._changed:
            self._check_open()
            if len(self._jobs) >= max(self.max_queue, 1):
                self.statistics.refused += 1
                raise QueueFullError(len(self._jobs), 1)
            self._jobs.append((function, adapter, future))
            self._changed.notify_all()
        return future

    def close(self, grace: float = 0.0, wait: bool = True) -> None:
        """Takes nothing more, ends what waits, lets what runs finish for `grace` seconds, then ends that too."""
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
                    self._do_jobs()
                    self._drop_cancelled()
                    self._read_prompts()
                    self._answer_step()
        except BaseException as error:  # whatever it was, nobody may be left waiting
            self._failure = error
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; False where the engine is to stop."""
        with self._changed:
            while not (self._waiting or self._batch.busy or self._jobs or self._closing_at is not None):
                self._changed.wait()
        if self._closing_at is None:
            return True
        self._fail_waiting(EngineStoppedError("the server is shutting down"))
        return self._batch.busy > 0 and time.monotonic() < self._closing_at

    def _fail_waiting(self, error: Exception) -> None:
        with self._changed:
            waiting, jobs = list(self._waiting), list(self._jobs)
            self._waiting.clear()
            self._jobs.clear()
        for request in waiting:
            self._fail(request, error)
        for _, _, future in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _end_all(self) -> None:
        reason = "the server is shutting down" if self._failure is None else f"the engine has failed: {self._failure}"
        with self._changed:
            if self._closing_at is None:
                self._closing_at = time.monotonic()
        self._fail_waiting(EngineStoppedError(reason))
        for row in self._batch.rows[: self._batch.busy]:
            if row.request is not None:
                self._fail(row.request, EngineStoppedError(reason))
        self._batch = Batch(self.model, self.max_batch, self.cache_tokens)
        if self._failure is None:
            self._use(self._as_loaded)

    def _do_jobs(self) -> None:
        while self._jobs:
            function, adapter, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    self._use(adapter)
                    future.set_result(function())
                except Exception as error:  # for whoever asked for it
                    future.set_exception(error)

    def _use(self, adapter: str | None) -> None:
        if adapter != self._adapter:
            use_adapter(self.model, adapter)
            self._adapter = adapter

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = [request for request in self._waiting if request.is_cancelled]
            for request in cancelled:
                self._waiting.remove(request)
        for index in reversed(range(self._batch.busy)):
            if self._batch.request(index).is_cancelled:
                cancelled.append(self._batch.release(index))
        for request in cancelled:
            self._count(request, request.take(None, "cancelled"))

    def _fail(self, request: Request, error: Exception) -> None:
        request.stream.put(error)
        self._count(request, "error")

    def _count(self, request: Request, reason: str | None) -> None:
        spent = time.perf_counter() - request.began
        self._seconds_per_request += 0.1 * (spent - self._seconds_per_request)
        with self._changed:
            self._unfinished -= 1
        finished = self.statistics.finished
        finished[str(reason)] = finished.get(str(reason), 0) + 1

    def _admit(self) -> bool:
        """Gives the request that has waited longest a row behind the answering ones, if there is room."""
        if not self._waiting or self._batch.busy == self.max_batch:
            return False
        request = self._waiting[0]
        # Room for a few tokens each, or the next step would have to take somebody's row away again.
        spare = min(BLOCK // 2, request.limit - len(request.ids)) if self._batch.busy else 1
        if not self._batch.make_room(self._batch.busy + 1, max(len(request.ids), self._batch.longest()) + spare):
            return False
        with self._changed:
            if not self._waiting or self._waiting[0] is not request:
                return False
            self._waiting.popleft()
        try:
            request.start(self.model)
        except Exception as error:  # a processor that cannot be made, memory: this request's trouble only
            self._fail(request, error)
            return self._admit()
        request.cached_tokens = min(self._batch.place(request), request.prompt_tokens)
        self.statistics.prompt_tokens += request.prompt_tokens
        self.statistics.cached_tokens += request.cached_tokens
        return True

    # ---- steps

    def _read_prompts(self) -> None:
        """Reads prompts of requests that join, for about as long as a step may be delayed."""
        left = PREFILL_TOKENS
        while left > 0 and (self._batch.busy > self._batch.answering or self._admit()):
            left -= self._read_prompt(self._batch.answering)

    def _read_prompt(self, index: int) -> int:
        """A piece of a prompt; gives its length. Its end gives the first token."""
        row, request = self._batch.rows[index], self._batch.request(index)
        start, ids = len(row.ids), request.ids
        end = piece_end(self.model, request.sequence[:, : min(start + PREFILL_TOKENS, len(ids))], start)
        if self.model.reusable_prefix(ids, end) != end:
            end = len(ids)  # generation 1: tokens of the context see each other both ways
        self._batch.cache.select_row(index, start)
        try:
            self._use(request.adapter)
            scores = self._forward(request.sequence[:, start:end], request.positions[..., start:end])
        except Exception as error:  # most likely memory: of this request's making
            self._blame(error)
            self._fail(self._batch.release(index, damaged=True), error)
            return end - start
        row.ids = ids[:end]
        if end == len(ids):
            self._batch.answering += 1
            self._deliver(scores, index)
        return end - start

    def _answer_step(self) -> None:
        """One token of every answer."""
        while self._batch.busy and not self._batch.make_room(self._batch.busy, self._batch.longest() + 1):
            self._preempt()
        self._batch.group()
        # From the last group to the first: rows that end change places with rows behind them only.
        end = self._batch.answering
        while end:
            first = end - 1
            while first and self._batch.rows[first - 1].adapter == self._batch.rows[end - 1].adapter:
                first -= 1
            self._step_of(first, end)
            end = first

    def _step_of(self, first: int, end: int) -> None:
        """One token of each of these rows, which have one adapter."""
        requests = [self._batch.request(index) for index in range(first, end)]
        lengths = [len(row.ids) for row in self._batch.rows[first:end]]
        tokens = torch.tensor([[request.ids[-1]] for request in requests], device=self.model.device)
        places = zip(requests, lengths, strict=True)
        positions = torch.cat([request.positions[..., length : length + 1] for request, length in places])
        if len(requests) == 1:
            self._batch.cache.select_row(first, lengths[0])
        else:
            self._batch.cache.select_rows(first, lengths, self.model.device)
        try:
            self._use(requests[0].adapter)
            scores = self._forward(tokens, positions)
        except Exception as error:
            self._blame(error)
            for index in reversed(range(first, end)):
                self._fail(self._batch.release(index, damaged=True), error)
            return
        for row, request in zip(self._batch.rows[first:end], requests, strict=True):
            row.ids.append(request.ids[-1])
        self.statistics.steps += 1
        self._deliver(scores, first)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) behind the last of `ids` (rows, tokens)."""
        outputs = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._batch.cache.mask,
            past_key_values=self._batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._faults = 0
        return outputs.logits[:, -1].float().to(self.model.device)

    def _blame(self, error: Exception) -> None:
        """One failed forward may be the fault of its request; several in a row are not."""
        self._faults += 1
        if self._faults == 3:
            raise error

    def _deliver(self, scores: torch.Tensor, first: int) -> None:
        """The next token for the rows from `first` on, one for each row of `scores`; rows that end are released."""
        for offset in reversed(range(len(scores))):
            index = first + offset
            request = self._batch.request(index)
            try:
                token_id, ends, logprob = request.choose(self.model, scores[offset : offset + 1])
                reason = request.take(token_id, "stop" if ends else None, logprob)
            except Exception as error:  # NaN, or a processor of the caller's: nobody else has to suffer
                self._fail(self._batch.release(index, damaged=True), error)
                continue
            self.statistics.completion_tokens += 1
            if reason is not None:
                self._count(self._batch.release(index), reason)

    def _preempt(self) -> None:
        """Sends the request that came last back to the queue: its tokens will be read again when there is room."""
        index = max(range(self._batch.busy), key=lambda i: self._batch.request(i).number)
        request = self._batch.release(index)
        self.statistics.preempted += 1
        with self._changed:
            self._waiting.appendleft(request)
