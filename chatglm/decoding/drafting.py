"""A draft model: a smaller model that guesses the next tokens of a larger one (see `guessing`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..cache import ChatCache

#: Tokens of one guess, unless `num_assistant_tokens` says so.
DRAFT_TOKENS = 8
#: How often a guessed token is right, before anything was seen, and as how many tokens this counts.
FIRST_RATE, WEIGHT = 0.7, 4.0
#: How much older tokens count with each new one.
FADING = 0.98


def check_assistant(model: Any, draft: Any) -> None:
    """Raises ValueError if `draft` has another vocabulary than `model`."""
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the assistant_model has a vocabulary of {theirs} tokens, the model one of {ours}: it has to be a smaller "
            "model with the same tokenizer"
        )


class DraftModel:
    """A `Guesser` that takes the likeliest tokens of another model.

    Args:
        model: whose tokens are guessed.
        draft: any model with the interface of ours, and with the vocabulary of `model`.
        most: tokens of one guess.
        piece_end: see `chatglm.generation`.

    Raises:
        ValueError: the draft has another vocabulary.
    """

    def __init__(
        self, model: Any, draft: Any, most: int | None, piece_end: Callable[[Any, torch.Tensor, int], int]
    ) -> None:
        check_assistant(model, draft)
        self.seconds = 0.0
        self._draft, self._most, self._piece_end = draft, most or DRAFT_TOKENS, piece_end
        self._cache = ChatCache(kv_cache_dtype=getattr(draft, "kv_cache_dtype", "auto"))
        self._ids: list[int] = []
        self._guess: list[int] = []
        self._hits, self._all = WEIGHT * FIRST_RATE, WEIGHT

    def read(self, ids: Sequence[int]) -> None:
        """See `Guesser.read`."""
        new = ids[len(self._ids) :]
        for guessed, token in zip(self._guess, new, strict=False):
            self._hits, self._all = FADING * self._hits + (guessed == token), FADING * self._all + 1
            if guessed != token:
                break
        self._ids += new
        self._guess = []

    def chances(self) -> list[float]:
        """See `Guesser.chances`."""
        return [self._hits / self._all] * self._most

    @torch.no_grad()
    def guess(self, count: int) -> list[int]:
        """See `Guesser.guess`."""
        ids = list(self._ids)
        self._cache.keep_prefix_of(ids, self._draft, None)
        unread = len(ids) - len(self._cache.token_ids)
        for _ in range(count):
            began = time.perf_counter()
            ids.append(self._next(ids))
            if unread == 1:  # else the time is that of a prompt
                taken = time.perf_counter() - began
                self.seconds += 0.3 * (taken - self.seconds) if self.seconds else taken
            unread = 1
        self._guess = ids[len(self._ids) :]
        return list(self._guess)

    def _next(self, ids: list[int]) -> int:
        """Feeds what the cache lacks of `ids`; returns the likeliest next token."""
        sequence = torch.tensor([ids], device=self._draft.device)
        start = len(self._cache.token_ids)
        while True:
            end = self._piece_end(self._draft, sequence, start)
            outputs = self._draft(
                input_ids=sequence[:, start:end],
                position_ids=self._draft.positions_from(sequence, start)[..., : end - start],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._cache.token_ids += ids[start:end]
            start = end
            if end == len(ids):
                return int(outputs.logits[0, -1].argmax())
