"""Log probabilities: of the tokens that an answer chose, and of a prompt's own tokens while the scheduler reads it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..decoding.choosing import check_finite


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's probabilities before temperature and penalties; `top`: the likeliest tokens.

    `rank` is the token's place among all tokens: 1 is the likeliest.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int = 1


def token_logprobs(scores: torch.Tensor, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Returns the log probabilities of `ids` by `scores` (tokens, vocabulary), with the `top` likeliest tokens each."""
    logprobs = scores.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(ids, device=scores.device).unsqueeze(-1))
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    values, indices = logprobs.topk(top)
    parts = zip(ids, chosen[:, 0].tolist(), indices.tolist(), values.tolist(), ranks, strict=True)
    return [
        TokenLogprob(token_id, logprob, list(zip(likeliest, likely, strict=True)), rank)
        for token_id, logprob, likeliest, likely, rank in parts
    ]


class PromptLogprobs:
    """Collects the log probabilities of a prompt's tokens, in their order, chunk by chunk.

    Tokens that no earlier token predicts have none: the first one, and in generation 1 the whole context, whose tokens
    see each other.

    Args:
        ids: of the prompt.
        top: how many of the likeliest tokens to report for each.

    Raises:
        ValueError: no token of the prompt has a probability.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], top: int) -> None:
        self._model, self._ids, self._top = model, list(ids), top
        first = 1 + bisect.bisect_left(range(1, len(ids)), True, key=self._is_predicted)
        if first >= len(ids) > 1:
            raise ValueError(
                "this model reads a prompt in both directions, so none of these tokens has a log probability: "
                "put the tokens to be scored behind [gMASK] <sop>"
            )
        self.found: list[TokenLogprob | None] = [None] * min(first, len(ids))

    def _is_predicted(self, index: int) -> bool:
        """Whether the tokens before this one see no later token."""
        return bool(self._model.reusable_prefix(self._ids, index) == index)

    @property
    def reusable(self) -> int:
        """How many tokens of a cache may be reused: the logits after the others are needed."""
        return len(self._ids) if len(self.found) == len(self._ids) else len(self.found) - 1

    def needed(self, start: int, end: int) -> int:
        """Returns after how many tokens at the end of the chunk from `start` to `end` logits are needed, at least 1."""
        return max(1, end - max(start, len(self.found) - 1))

    def read(self, scores: torch.Tensor, end: int) -> None:
        """Takes the scores (tokens, vocabulary) after the last tokens of a chunk that ends at `end`.

        Raises NonFiniteLogitsError.
        """
        start = len(self.found)
        stop = min(end + 1, len(self._ids))
        if start >= stop:
            return
        # The row for token i are the scores after token i - 1.
        rows = scores[start - 1 - end + len(scores) : stop - 1 - end + len(scores)]
        check_finite(self._model, rows, torch.tensor([self._ids[:end]], device=scores.device))
        self.found += token_logprobs(rows, self._ids[start:stop], self._top)
