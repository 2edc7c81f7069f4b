"""The scheduler: decides which requests run together and computes their next tokens, in the caller's thread.

Requests join and leave between two steps. A step reads the prompts of those that join, row by row as `chat` does, then
computes one token of every row together; where that reads the weights once instead of twice, a piece of a prompt goes
with them. All generations are treated the same: positions come from the model's `positions_from`, and a mask hides the
unused end of a row.

Requests belong to clients. The client with the fewest running answers starts its next request first, and one that has
more than others gives rows back to them: its newest request returns to the queue.

A model uses one adapter at a time, so a step runs the rows of each adapter together, one adapter after the other: no
request waits for another adapter's answers to end, and a step takes one forward per adapter among the running answers.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ..generation import GenerationOptions
from .batch import Batch, affordable_tokens
from .forwards import Forwards
from .logprobs import PromptLogprobs
from .prefill import PREFILL_TOKENS, PrefillPace
from .request import AS_LOADED, AdapterName, AsLoaded, Request, answer_limit
from .statistics import Statistics


class Scheduler:
    """Runs requests together on `model`; nothing else may change its adapters meanwhile.

    Any thread may call `make_request`, `add` and the properties. Everything else must stay in one thread.

    Args:
        decode_ids: ids of an answer -> text, see `AnswerText`.
        max_batch: how many requests run at once.
        cache_tokens: tokens that the KV caches of all rows may hold together; None uses half of the free memory.
            A request that would need more on its own ends with the reason "length".
        prefill_tokens: maximum number of prompt tokens that a step reads.
        on_end: called with each request that ends, whatever the reason.
        clock: seconds, for the choice of how much of the prompts a step reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode_ids: Callable[[list[int]], str],
        *,
        max_batch: int = 16,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        on_end: Callable[[Request], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be 1 or more, not {max_batch}")
        if cache_tokens is not None and cache_tokens < 2:
            raise ValueError(f"cache_tokens must be 2 or more, not {cache_tokens}")
        self._model, self._decode_ids = model, decode_ids
        self._max_batch, self._on_end = max_batch, on_end
        self._prefill, self._clock = PrefillPace(prefill_tokens), clock
        self._context: int = model.config.max_position_embeddings
        self.cache_tokens = min(cache_tokens or affordable_tokens(model), max_batch * self._context)
        self.statistics = Statistics()
        self._as_loaded = model.current_adapter
        self._adapters = [None, *model.adapter_names]
        self._begin()
        self._arrived: deque[Request] = deque()  # added by any thread, not yet seen by a step
        self._waiting: deque[Request] = deque()
        self._numbers = itertools.count(1)
        self._turns: dict[str, int] = {}  # client -> when one of its requests last started

    # ------------------------------------------------------------------------------------------- for any thread

    @property
    def running(self) -> int:
        return self._batch.busy

    @property
    def waiting(self) -> int:
        return len(self._arrived) + len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._arrived or self._waiting or self._batch.busy)

    @property
    def cached(self) -> tuple[int, int]:
        """Number of tokens that the rows hold, and their size in bytes."""
        return self._batch.tokens(), self._batch.cache.size

    @property
    def used(self) -> float:
        """The share of `cache_tokens` that running requests hold."""
        return self._batch.tokens(running=True) / self.cache_tokens

    def adapter_named(self, name: AdapterName) -> str | None:
        """Returns the adapter that `name` stands for. Raises ValueError if there is none."""
        if isinstance(name, AsLoaded):
            return self._as_loaded
        if name not in self._adapters:
            raise ValueError(f"there is no adapter {name!r}, only {', '.join(filter(None, self._adapters)) or 'none'}")
        return name

    def make_request(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        top_logprobs: int | None = None,
        adapter: AdapterName = AS_LOADED,
        prompt_logprobs: int | None = None,
        answers: bool = True,
    ) -> Request:
        """Makes a request for an answer to the prompt `ids`; pass it to `add`. The arguments are `submit_all`'s.

        Raises:
            PromptTooLongError: the prompt leaves no room for an answer, in the context or the cache.
            ValueError: `ids` are not a prompt for this model, no token of the prompt has a probability that was asked
                for, or there is no such adapter.
        """
        adapter = self.adapter_named(adapter)
        if not ids:
            raise ValueError("the prompt is empty")
        limit = answer_limit(len(ids), options if answers else None, min(self._context, self.cache_tokens))
        vocabulary = self._model.config.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:  # on a GPU, one wrong id would crash the process
            raise ValueError(f"token ids must be from 0 to {vocabulary - 1}")
        self._model.positions_from(torch.tensor([list(ids)]), 0)  # for its errors
        told = None if prompt_logprobs is None else PromptLogprobs(self._model, ids, prompt_logprobs)
        return Request(ids, options, limit, top_logprobs, self._decode_ids, adapter, told, answers)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue."""
        request.number = next(self._numbers)
        self._arrived.append(request)

    # ------------------------------------------------------------------------------------------- for one thread

    @torch.no_grad()
    def step(self) -> None:
        """Drops cancelled requests, admits waiting ones and computes one token of every running answer.

        An error of a request ends only that request. Raises after three failed forwards in a row: the model is then
        broken, and the caller should call `fail_all`.
        """
        self._drop_cancelled()
        self._answer_step(self._read_prompts())

    def use(self, adapter: str | None) -> None:
        """Switches the model to this adapter until the next step."""
        self._forwards.use(adapter)

    def fail_waiting(self, error: Exception) -> None:
        """Ends all requests that are not running yet."""
        self._receive()
        while self._waiting:
            self._fail(self._waiting.popleft(), error)

    def fail_all(self, error: Exception) -> None:
        """Ends all requests, and empties the KV cache."""
        self.fail_waiting(error)
        for row in self._batch.rows[: self._batch.busy]:
            if row.request is not None:
                self._fail(row.request, error)
        self._begin()

    def restore_adapter(self) -> None:
        """Switches the model back to the adapter that it used at the start."""
        self.use(self._as_loaded)

    def _begin(self) -> None:
        """Makes an empty KV cache."""
        self._batch = Batch(self._model, self._max_batch, self.cache_tokens)
        self._forwards = Forwards(self._model, self._batch, self.statistics, self._ended, self._fail)

    def _receive(self) -> None:
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
            self.statistics.requests += 1

    def _drop_cancelled(self) -> None:
        self._receive()
        cancelled = [request for request in self._waiting if request.is_cancelled]
        for request in cancelled:
            self._waiting.remove(request)
        for index in reversed(range(self._batch.busy)):
            if self._batch.request(index).is_cancelled:
                cancelled.append(self._batch.release(index))
        for request in cancelled:
            request.end_cancelled()
            self._ended(request, "cancelled")

    def _fail(self, request: Request, error: Exception) -> None:
        request.stream.put(error)
        self._ended(request, "error")

    def _ended(self, request: Request, reason: str) -> None:
        finished = self.statistics.finished
        finished[reason] = finished.get(reason, 0) + 1
        if self._on_end is not None:
            self._on_end(request)

    def _admit(self) -> bool:
        """Gives the request whose turn it is a row after the answering ones, if there is room."""
        self._receive()
        if not self._waiting:
            return False
        running = self._running()
        # Of a client's own requests, the one that has waited longest.
        request = min(self._waiting, key=lambda one: (running[one.client], self._turns.get(one.client, 0)))
        while self._batch.busy == self._max_batch or not self._batch.make_room_for(request):
            if not self._take_back_for(request.client):
                return False
        self._waiting.remove(request)
        waiting = {one.client for one in self._waiting} | running.keys() | {request.client}
        self._turns = {client: turn for client, turn in self._turns.items() if client in waiting}
        self._turns[request.client] = next(self._numbers)
        try:
            request.start(self._model)
        except Exception as error:  # a processor that cannot be built, or out of memory: only this request ends
            self._fail(request, error)
            return self._admit()
        request.stream.begin()
        request.cached_tokens = min(self._batch.place(request), request.prompt_tokens)
        self.statistics.prompt_tokens += request.prompt_tokens
        self.statistics.cached_tokens += request.cached_tokens
        return True

    def _running(self) -> Counter[str]:
        return Counter(self._batch.request(index).client for index in range(self._batch.busy))

    def _take_back_for(self, client: str) -> bool:
        """Sends the newest request of the client with the most running answers back to the queue, if that is fair."""
        ((richest, most),) = self._running().most_common(1) or [("", 0)]
        if most <= self._running()[client] + 1:
            return False
        self._preempt(richest)
        return True

    def _read_prompts(self) -> int:
        """Reads prompts of requests that join, for about the time that running answers may wait. Returns how many
        tokens are to be read in one forward with the answers."""
        began, read, beside = self._clock(), 0, 0
        while most := self._prefill.piece(self._clock() - began, read, self._batch.answering):
            if self._batch.busy == self._batch.answering and not self._admit():
                break
            if self._batch.answering:
                room = self._forwards.room_beside()
                if beside := self._prefill.beside(self._clock() - began, read, room):
                    break
            before = self._clock()
            if tokens := self._forwards.read(most):
                self._prefill.read(tokens, self._clock() - before)
                read += tokens
        for before, request in enumerate(self._waiting):
            request.stream.wait(before)
        return beside

    def _answer_step(self, beside: int) -> None:
        """Computes one token of every answer, and reads `beside` tokens of a prompt with them."""
        began = self._clock()
        while self._batch.busy and not self._batch.make_room(self._batch.busy, self._batch.longest() + 1):
            self._preempt()
        if self._batch.busy == self._batch.answering:
            beside = 0  # it was the prompt's row that had to give way
        joins = self._batch.rows[self._batch.answering].adapter if beside else None
        self._batch.group()
        # From the last group to the first: a row that ends is swapped only with rows after it.
        end = answers = self._batch.answering
        read = 0
        while end:
            first = end - 1
            while first and self._batch.rows[first - 1].adapter == self._batch.rows[end - 1].adapter:
                first -= 1
            here = beside if self._batch.rows[first].adapter == joins else 0
            read += self._forwards.answer(first, end, here)
            end = first
        if read:
            self._prefill.read_beside(read, self._clock() - began)
        elif answers and not beside:
            self._prefill.answered(self._clock() - began)

    def _preempt(self, client: str | None = None) -> None:
        """Sends the newest request (of this client) back to the queue; its tokens are read again when there is room."""
        indices = [index for index in range(self._batch.busy) if client in (None, self._batch.request(index).client)]
        request = self._batch.release(max(indices, key=lambda index: self._batch.request(index).number))
        self.statistics.preempted += 1
        self._waiting.appendleft(request)
