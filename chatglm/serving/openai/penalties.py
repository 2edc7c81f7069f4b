"""OpenAI's penalties for tokens that the answer already has."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


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
