"""presence_penalty and frequency_penalty: OpenAI's formula, over the answer only; logit_bias."""

from __future__ import annotations

import torch

from chatglm.serving.openai.penalties import AnswerPenalties, LogitBias


def test_the_penalties_are_those_of_the_answers_tokens() -> None:
    ids = torch.tensor([[3, 3, 1, 1, 2], [0, 0, 2, 2, 2]])  # a prompt of two tokens, which does not count
    scores = torch.zeros(2, 4)
    wanted = torch.tensor([[0.0, -0.5 - 2 * 0.25, -0.5 - 0.25, 0.0], [0.0, 0.0, -0.5 - 3 * 0.25, 0.0]])
    assert torch.equal(AnswerPenalties(0.5, 0.25, 2)(ids, scores), wanted)
    assert torch.equal(AnswerPenalties(-0.5, -0.25, 2)(ids, scores), -wanted)
    assert not scores.any()  # the caller's scores are left alone


def test_before_the_first_token_nothing_is_lowered() -> None:
    scores = torch.randn(1, 4)
    assert torch.equal(AnswerPenalties(2.0, 2.0, 3)(torch.tensor([[0, 1, 2]]), scores), scores)


def test_a_bias_is_added_to_the_scores_of_its_tokens() -> None:
    scores = torch.zeros(2, 4)
    wanted = torch.tensor([[0.0, 100.0, 0.0, -0.5]] * 2)
    assert torch.equal(LogitBias({"1": 100, "3": -0.5}, 4)(torch.tensor([[0], [1]]), scores), wanted)
    assert not scores.any()
