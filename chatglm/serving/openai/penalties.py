"""OpenAI's penalties for tokens that the answer already has, and its biases for tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LogitsProcessor

from ..errors import ApiError


class AnswerPenalties(LogitsProcessor):
    """Lowers the score of each token by `presence` if the answer has it, and by `frequency` for each time it does.

    As in OpenAI's API, and unlike `repetition_penalty`, the penalties are subtracted, and the prompt does not count.

    Args:
        presence, frequency: from -2 to 2; negative values favour repetition.
        prompt_tokens: number of tokens before the answer.
    """

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence, self._frequency, self._prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(-1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class LogitBias(LogitsProcessor):
    """Adds a bias to the scores of some tokens, before sampling. Source: `logit_bias` of OpenAI's API.

    Args:
        bias: decimal token id -> a number from -100, which all but excludes the token, to 100, which all but forces it.
        vocabulary: number of tokens.

    Raises:
        ApiError: (400) a key is not the id of a token.
    """

    def __init__(self, bias: Mapping[str, float], vocabulary: int) -> None:
        for name in bias:
            if not (name.isascii() and name.isdigit() and len(name) <= 9 and int(name) < vocabulary):
                reason = f"logit_bias: {name[:40]!r} is not the id of a token: the ids are from 0 to {vocabulary - 1}"
                raise ApiError(400, reason, param="logit_bias")
        self._ids = torch.tensor([int(name) for name in bias])
        self._values = torch.tensor(list(bias.values()))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        values = self._values.to(scores).expand(len(scores), -1)
        return scores.index_add(-1, self._ids.to(scores.device), values)
