"""One request of the engine: its sequence so far, the choice of its next tokens, and the stream they go to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from enum import Enum

import torch
from transformers import PreTrainedModel

from ..decoding.choosing import TokenChooser
from ..decoding.guessing import GuessAhead, guess_ahead
from ..decoding.options import GenerationOptions
from ..decoding.steps import FinishReason
from ..decoding.text import AnswerText
from ..generation import piece_end
from .errors import PromptTooLongError
from .logprobs import PromptLogprobs, TokenLogprob, token_logprobs
from .stream import EngineStep, Stream


class AsLoaded(Enum):
    """Stands for the adapter that was in use when the engine started."""

    AS_LOADED = 0


#: The name of an adapter; None: the base model.
AdapterName = str | None | AsLoaded
AS_LOADED = AsLoaded.AS_LOADED

#: On whose behalf the current thread or task submits requests: clients share the engine fairly.
CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")


def answer_limit(prompt_tokens: int, options: GenerationOptions | None, room: int) -> int:
    """Returns the number of tokens, prompt included, at which an answer ends with "length"; None: no answer is wanted.

    Raises PromptTooLongError.
    """
    if options is not None:
        try:
            return options.room_for(prompt_tokens, room)
        except ValueError as error:
            raise PromptTooLongError(str(error)) from error
    if prompt_tokens > room:
        raise PromptTooLongError(f"the prompt has {prompt_tokens} tokens, and the model reads at most {room}")
    return prompt_tokens


class Request:
    """One request while it waits and runs. It belongs to the current `CLIENT`.

    Args:
        ids: of the prompt.
        limit: number of tokens, prompt included, at which the answer ends with "length".
        top_logprobs: how many of the likeliest tokens each step reports beside the chosen one; None reports no
            probabilities.
        decode_ids: see `AnswerText`.
        adapter: the name of the adapter to use, or None.
        prompt_logprobs: collects those of the prompt; None reports none.
        answers: whether an answer is wanted; without one, the request ends when its prompt has been read.
    """

    def __init__(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        limit: int,
        top_logprobs: int | None,
        decode_ids: Callable[[list[int]], str],
        adapter: str | None,
        prompt_logprobs: PromptLogprobs | None = None,
        answers: bool = True,
    ) -> None:
        self.ids = list(ids)  # of prompt and answer
        self.adapter = adapter
        self.options, self.limit, self.top_logprobs = options, limit, top_logprobs
        self.picture = None if options.picture is None else options.picture.key
        self.number = 0  # the order of arrival
        self.client = CLIENT.get()
        self.prompt_tokens = len(ids)
        self.cached_tokens = 0
        self.stream = Stream()
        self.answers = answers
        self.began = time.perf_counter()
        self._queue_seconds = 0.0
        self._prompt_logprobs = prompt_logprobs
        self._chooser: TokenChooser | None = None
        self._ahead: GuessAhead | None = None
        self._answer = AnswerText(options, decode_ids)
        self._shown = ""

    def start(self, model: PreTrainedModel) -> None:
        """Makes the tensors on the device, once: a request that starts again continues where it was."""
        if self._chooser is not None:
            return
        self._queue_seconds = time.perf_counter() - self.began
        self._chooser = TokenChooser(model, self.options, self.prompt_tokens, self.limit, model.device)
        self._ahead = guess_ahead(model, self.options, piece_end)
        # (1, limit): padded with the last id of the sequence, which does not change any positions.
        self.sequence = torch.tensor([self.ids + self.ids[-1:] * (self.limit - len(self.ids))], device=model.device)
        #: (1, limit) or (1, 2, limit), also for future tokens.
        self.positions = model.positions_from(self.sequence, 0)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.ids) - self.prompt_tokens

    @property
    def is_cancelled(self) -> bool:
        return self.stream.cancelled or (self.options.cancel is not None and self.options.cancel.is_set())

    @property
    def reusable(self) -> int:
        """How many tokens of another row's cache the request may reuse."""
        return len(self.ids) if self._prompt_logprobs is None else self._prompt_logprobs.reusable

    def scores_needed(self, start: int, end: int) -> int:
        """After how many tokens at the end of this chunk of the prompt the request needs scores: 1 or more."""
        return 1 if self._prompt_logprobs is None else self._prompt_logprobs.needed(start, end)

    def read(self, scores: torch.Tensor, end: int) -> None:
        """Takes the scores (tokens, vocabulary) after the last tokens of a chunk. Raises NonFiniteLogitsError."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.read(scores, end)

    def guess(self, room: int) -> list[int]:
        """Tokens that may follow, at most `room`, see `GuessAhead.guess`; none without an option that asks for them."""
        return self._ahead.guess(self.ids, min(room, self.limit - len(self.ids) - 1)) if self._ahead is not None else []

    def expect(self, guess: Sequence[int]) -> None:
        """Writes guessed tokens behind the sequence, for the next forward; `advance` writes the true ones over them."""
        if guess:
            self.sequence[0, len(self.ids) : len(self.ids) + len(guess)] = self.sequence.new_tensor(guess)

    def took(self, guessed: int, right: int, seconds: float) -> None:
        """See `GuessAhead.took`."""
        if self._ahead is not None:
            self._ahead.took(guessed, right, seconds)

    def advance(self, scores: torch.Tensor) -> FinishReason | None:
        """Chooses the next token from `scores` (1, vocabulary) and streams it; returns why it is the last, or None.

        Raises whatever the caller's processors raise, and NonFiniteLogitsError.
        """
        assert self._chooser is not None
        choice = self._chooser.choose(self.sequence[:, : len(self.ids)], scores)
        token_id = choice.token_ids[0]
        logprob = None
        if self.top_logprobs is not None:
            logprob = token_logprobs(scores, [token_id], self.top_logprobs)[0]
        self.sequence[0, len(self.ids)] = token_id
        self.ids.append(token_id)
        return self._hand_over(token_id, choice.finish_reason, logprob)

    def end_cancelled(self) -> None:
        """Ends the stream with the reason "cancelled"."""
        self._hand_over(None, "cancelled")

    def end_read(self) -> None:
        """Ends the stream of a request that wants no answer, with the reason "length"."""
        self._hand_over(None, "length")

    def _hand_over(
        self, token_id: int | None, reason: FinishReason | None, logprob: TokenLogprob | None = None
    ) -> FinishReason | None:
        text, reason = self._answer.push(token_id, reason)
        delta, self._shown = text[len(self._shown) :], text
        counts = (self.prompt_tokens, self.cached_tokens, self._answer.tokens)
        prompt = self._prompt_logprobs.found if self._prompt_logprobs is not None else None
        self._prompt_logprobs = None  # handed over once; a preempted request need not find them again
        seconds = time.perf_counter() - self.began
        self.stream.put(EngineStep(token_id, "", reason, *counts, seconds, delta, logprob, prompt, self._queue_seconds))
        return reason
