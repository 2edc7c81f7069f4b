"""One request of the engine: its sequence so far, the choice of its next tokens, and the stream they go to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from enum import Enum

import torch
from transformers import PreTrainedModel

from ..decoding.choosing import TokenChooser
from ..decoding.options import GenerationOptions
from ..decoding.steps import FinishReason
from ..decoding.text import AnswerText
from .stream import EngineStep, Stream, TokenLogprob


class AsLoaded(Enum):
    """Stands for the adapter that was in use when the engine started."""

    AS_LOADED = 0


#: The name of an adapter; None: the base model.
AdapterName = str | None | AsLoaded
AS_LOADED = AsLoaded.AS_LOADED

#: On whose behalf the current thread or task submits requests: clients share the engine fairly.
CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")


class Request:
    """One request while it waits and runs. It belongs to the current `CLIENT`.

    Args:
        ids: of the prompt.
        limit: number of tokens, prompt included, at which the answer ends with "length".
        top_logprobs: how many of the likeliest tokens each step reports beside the chosen one; None reports no
            probabilities.
        decode_ids: see `AnswerText`.
        adapter: the name of the adapter to use, or None.
    """

    def __init__(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        limit: int,
        top_logprobs: int | None,
        decode_ids: Callable[[list[int]], str],
        adapter: str | None,
    ) -> None:
        self.ids = list(ids)  # of prompt and answer
        self.adapter = adapter
        self.options, self.limit, self.top_logprobs = options, limit, top_logprobs
        self.number = 0  # the order of arrival
        self.client = CLIENT.get()
        self.prompt_tokens = len(ids)
        self.cached_tokens = 0
        self.stream = Stream()
        self.began = time.perf_counter()
        self._chooser: TokenChooser | None = None
        self._answer = AnswerText(options, decode_ids)
        self._shown = ""

    def start(self, model: PreTrainedModel) -> None:
        """Makes the tensors on the device, once: a request that starts again continues where it was."""
        if self._chooser is not None:
            return
        self._chooser = TokenChooser(model, self.options, self.prompt_tokens, self.limit, model.device)
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

    def advance(self, scores: torch.Tensor) -> FinishReason | None:
        """Chooses the next token from `scores` (1, vocabulary) and streams it; returns why it is the last, or None.

        Raises whatever the caller's processors raise, and NonFiniteLogitsError.
        """
        assert self._chooser is not None
        choice = self._chooser.choose(self.sequence[:, : len(self.ids)], scores)
        token_id = choice.token_ids[0]
        logprob = None
        if self.top_logprobs is not None:
            logprobs = scores[0].log_softmax(-1)
            values, indices = logprobs.topk(self.top_logprobs)
            top = list(zip(indices.tolist(), values.tolist(), strict=True))
            logprob = TokenLogprob(token_id, float(logprobs[token_id]), top)
        self.sequence[0, len(self.ids)] = token_id
        self.ids.append(token_id)
        return self._hand_over(token_id, choice.finish_reason, logprob)

    def end_cancelled(self) -> None:
        """Ends the stream with the reason "cancelled"."""
        self._hand_over(None, "cancelled")

    def _hand_over(
        self, token_id: int | None, reason: FinishReason | None, logprob: TokenLogprob | None = None
    ) -> FinishReason | None:
        text, reason = self._answer.push(token_id, reason)
        delta, self._shown = text[len(self._shown) :], text
        counts = (self.prompt_tokens, self.cached_tokens, self._answer.tokens)
        self.stream.put(EngineStep(token_id, "", reason, *counts, time.perf_counter() - self.began, delta, logprob))
        return reason
