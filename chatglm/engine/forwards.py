"""Runs the model for the rows of the batch: a piece of a prompt, the next tokens of answers, or both in one forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters import use_adapter
from ..generation import is_piece, piece_end
from .batch import Batch, Row
from .request import Request
from .statistics import Statistics


class Forwards:
    """Computes what the scheduler asks for, and hands each request its tokens.

    An error of a request ends only that request. Three failed forwards in a row raise: the model is then broken. One
    for answers and a piece of a prompt does not count, since what it was for is tried again in two.

    Args:
        on_end: called with each request that ends by itself, and the reason.
        on_error: called with each request that ends by an error.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        statistics: Statistics,
        on_end: Callable[[Request, str], None],
        on_error: Callable[[Request, Exception], None],
    ) -> None:
        self._model, self._batch, self._statistics = model, batch, statistics
        self._on_end, self._on_error = on_end, on_error
        self._adapter = model.current_adapter
        self._faults = 0
        self._apart: Request | None = None  # its prompt could not be read together with answers

    def use(self, adapter: str | None) -> None:
        """Switches the model to this adapter until the next forward."""
        if adapter != self._adapter:
            use_adapter(self._model, adapter)
            self._adapter = adapter

    def room_beside(self) -> int:
        """How many tokens of the prompt of the row behind the answers fit into one walk over the weights with the
        running answers of its adapter; 0 if they need a walk of their own."""
        row, request = self._reading()
        answers = sum(one.adapter == request.adapter for one in self._batch.rows[: self._batch.answering])
        start = len(row.ids)
        if not answers or request is self._apart:
            return 0
        if not is_piece(self._model, request.ids, start) or request.options.prompt_inputs(start):
            return 0
        try:
            self.use(request.adapter)
            return max(0, self._model.tokens_at_once() - answers)
        except Exception:  # if `read` meets it too, it ends the request
            return 0

    def read(self, most: int) -> int:
        """Reads up to about `most` tokens of the prompt of the row behind the answers, and returns how many; 0 if its
        request ended by an error. The last piece gives the first token of the answer."""
        row, request = self._reading()
        start, ids = len(row.ids), request.ids
        end = piece_end(self._model, request.sequence[:, : min(start + most, len(ids))], start)
        if not is_piece(self._model, ids, end):
            end = len(ids)
        self._batch.cache.select_row(self._batch.answering, start)
        try:
            self.use(request.adapter)
            scores = self._run(
                request.sequence[:, start:end],
                request.positions[..., start:end],
                request.scores_needed(start, end),
                request.options.prompt_inputs(start),
            )[0]
        except Exception as error:  # most likely out of memory, because of this request
            self._blame(error)
            self._on_error(self._batch.release(self._batch.answering, damaged=True), error)
            return 0
        self._has_read(end, scores)
        return end - start

    def answer(self, first: int, end: int, beside: int = 0) -> int:
        """Computes one token of each of these rows, which have the same adapter; of a row alone also those that its
        request guesses.

        Args:
            beside: up to how many tokens of the prompt of the row behind the answers to read in the same forward.

        Returns:
            How many it has read in the same forward; 0 if that failed, and took two.
        """
        if beside:
            if read := self._answer_and_read(first, end, beside):
                return read
            self.read(beside)
        if end - first == 1:
            self._answer_alone(first)
        else:
            self._answer_together(first, end)
        return 0

    def _answer_together(self, first: int, end: int) -> None:
        """Computes one token of each of these rows."""
        try:
            scores = self._run_at(range(first, end), self._lengths(first, end), 1)[:, 0]
        except Exception as error:
            self._blame(error)
            for index in reversed(range(first, end)):
                self._on_error(self._batch.release(index, damaged=True), error)
            return
        self._have_answered(first, end, scores)

    def _answer_and_read(self, first: int, end: int, most: int) -> int:
        """As `answer`; 0 if that failed, and is to be tried apart to see which request it is the fault of."""
        row, request = self._reading()
        start, stop, answers = len(row.ids), min(len(row.ids) + most, len(request.ids)), end - first
        lines = [*range(first, end), *[self._batch.answering] * (stop - start)]
        kept = torch.ones(len(lines), 1, dtype=torch.bool, device=self._model.device)
        kept[answers : len(lines) - request.scores_needed(start, stop)] = False
        try:
            scores = self._run_at(lines, [*self._lengths(first, end), *range(start, stop)], kept)
        except Exception:
            self._apart = request
            return 0
        self._has_read(stop, scores[answers:])
        self._have_answered(first, end, scores[:answers])
        return stop - start

    def _answer_alone(self, index: int) -> None:
        """Computes the next token of one row, and with it those that its request guesses."""
        row, request = self._batch.rows[index], self._batch.request(index)
        began, start = time.perf_counter(), len(row.ids)
        try:
            guess = request.guess(self._batch.room(index) - 1)
            request.expect(guess)
            fed = slice(start, start + 1 + len(guess))
            self._batch.cache.select_row(index, start)
            self.use(request.adapter)
            scores = self._run(request.sequence[:, fed], request.positions[..., fed], 1 + len(guess))
        except Exception as error:
            self._blame(error)
            self._on_error(self._batch.release(index, damaged=True), error)
            return
        self._statistics.steps += 1
        for right, guessed in enumerate([*guess, None]):
            row.ids.append(request.ids[-1])
            self._deliver(scores[:, right], index)
            if row.request is not request or request.ids[-1] != guessed:
                break
        request.took(len(guess), right, time.perf_counter() - began)

    def _lengths(self, first: int, end: int) -> list[int]:
        """How many tokens each of these rows holds."""
        return [len(row.ids) for row in self._batch.rows[first:end]]

    def _reading(self) -> tuple[Row, Request]:
        """The row behind the answers, whose prompt is being read, and its request."""
        return self._batch.rows[self._batch.answering], self._batch.request(self._batch.answering)

    def _has_read(self, end: int, scores: torch.Tensor) -> None:
        """Notes that the prompt has been read up to `end`; `scores` (tokens, vocabulary) are those after its last
        tokens."""
        index = self._batch.answering
        row, request = self._reading()
        try:
            request.read(scores, end)
        except Exception as error:  # NaN
            self._on_error(self._batch.release(index, damaged=True), error)
            return
        row.ids = request.ids[:end]
        if end == len(request.ids) and request.answers:
            self._batch.answering += 1
            self._deliver(scores[-1:], index)
        elif end == len(request.ids):
            request.end_read()
            self._on_end(self._batch.release(index), "length")

    def _have_answered(self, first: int, end: int, scores: torch.Tensor) -> None:
        for index in range(first, end):
            self._batch.rows[index].ids.append(self._batch.request(index).ids[-1])
        self._statistics.steps += 1
        self._deliver(scores, first)

    def _run_at(self, lines: Sequence[int], places: Sequence[int], keep: int | torch.Tensor) -> torch.Tensor:
        """`_run` for one token of each of these rows, which have the same adapter: the one at that place."""
        requests = [self._batch.request(line) for line in lines]
        tokens = [[one.ids[at]] for one, at in zip(requests, places, strict=True)]
        positions = [one.positions[..., at : at + 1] for one, at in zip(requests, places, strict=True)]
        self._batch.cache.select_places(lines, places, self._model.device)
        self.use(requests[0].adapter)
        return self._run(torch.tensor(tokens, device=self._model.device), torch.cat(positions), keep)

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        keep: int | torch.Tensor,
        more: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Returns scores after some of `ids` (rows, tokens): the last `keep`, (rows, keep, vocabulary); or those where
        a mask (rows, tokens) is True, (tokens, vocabulary)."""
        outputs = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._batch.cache.mask,
            past_key_values=self._batch.cache,
            use_cache=True,
            logits_to_keep=keep,
            **(more or {}),
        )
        self._faults = 0
        scores: torch.Tensor = outputs.logits.float().to(self._model.device)
        return scores

    def _blame(self, error: Exception) -> None:
        """One failed forward may be the fault of its request; three in a row are not."""
        self._faults += 1
        if self._faults == 3:
            raise error

    def _deliver(self, scores: torch.Tensor, first: int) -> None:
        """Chooses the next token of each row from `first` on by its row of `scores`, and releases rows that end."""
        for offset in reversed(range(len(scores))):
            index = first + offset
            try:
                reason = self._batch.request(index).advance(scores[offset : offset + 1])
            except Exception as error:  # NaN, or a fault in the caller's processor: other requests continue
                self._on_error(self._batch.release(index, damaged=True), error)
                continue
            self._statistics.completion_tokens += 1
            if reason is not None:
                self._on_end(self._batch.release(index), reason)
