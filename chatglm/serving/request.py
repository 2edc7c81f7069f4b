"""One request of the engine: its sequence so far, how its tokens are chosen, and to whom they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from ..generation import AnswerText, FinishReason, GenerationOptions, InvalidScoreLogitsProcessor, check_finite, choose
from .stream import EngineStep, Stream, TokenLogprob


class Request:
    """One request while it waits and runs."""

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
        self.number = 0
        self.prompt_tokens = len(ids)
        self.cached_tokens = 0
        self.stream = Stream()
        self.began = time.perf_counter()
        self.started = False
        self._answer = AnswerText(options, decode_ids)
        self._stop_ids = set(options.stop_ids())
        self._shown = ""

    def start(self, model: PreTrainedModel) -> None:
        """What needs the device, done by the engine's thread, once."""
        if self.started:
            return
        self.started = True
        options, device = self.options, model.device
        self.generator = options.generator(device)
        self.processors = options.processors(self.prompt_tokens, device)
        self.criteria = StoppingCriteriaList(options.stopping_criteria)
        self.forgiving = any(isinstance(one, InvalidScoreLogitsProcessor) for one in options.logits_processor)
        # (1, limit): what is behind the sequence repeats its last id, which tells the positions nothing new.
        self.sequence = torch.tensor([self.ids + self.ids[-1:] * (self.limit - len(self.ids))], device=device)
        #: (1, limit) or (1, 2, limit): those of tokens to come as well.
        self.positions = model.positions_from(self.sequence, 0)

    @property
    def is_cancelled(self) -> bool:
        return self.stream.cancelled or (self.options.cancel is not None and self.options.cancel.is_set())

    def choose(self, model: PreTrainedModel, scores: torch.Tensor) -> tuple[int, bool, TokenLogprob | None]:
        """The next token by `scores` (1, vocabulary), and whether the caller's own criteria end the answer with it."""
        so_far = self.sequence[:, : len(self.ids)]
        if not self.forgiving:
            check_finite(model, scores, so_far)
        processed = self.processors(so_far, scores)
        chosen = choose(processed, self.options.do_sample, self.generator)
        token_id, ends = int(chosen), False
        if self.criteria:
            ends = bool(self.criteria(torch.cat((so_far, chosen), dim=-1), processed).any())
        if self.top_logprobs is None:
            return token_id, ends, None
        logprobs = scores[0].log_softmax(-1)
        values, indices = logprobs.topk(self.top_logprobs)
        top = list(zip(indices.tolist(), values.tolist(), strict=True))
        return token_id, ends, TokenLogprob(token_id, float(logprobs[token_id]), top)

    def take(
        self, token_id: int | None, reason: FinishReason | None = None, logprob: TokenLogprob | None = None
    ) -> FinishReason | None:
        """Hands the next token (None: the end without one) to the reader; gives why it was the last, if it was."""
        if token_id is not None:
            self.sequence[0, len(self.ids)] = token_id
            self.ids.append(token_id)
            if token_id in self._stop_ids:
                reason = "stop"
            elif reason is None and len(self.ids) >= self.limit:
                reason = "length"
        text, reason = self._answer.push(token_id, reason)
        delta, self._shown = text[len(self._shown) :], text
        self.stream.put(
            EngineStep(
                token_id,
                delta,
                reason,
                self.prompt_tokens,
                self.cached_tokens,
                self._answer.tokens,
                time.perf_counter() - self.began,
                logprob,
            )
        )
        return reason
