"""The choice of the next token, without a network: sampling, the end of an answer, batches, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import chatglm
from chatglm.decoding.choosing import TokenChooser
from chatglm.decoding.options import GenerationOptions
from tiny_chat import pair

CPU = torch.device("cpu")


def chooser(prompt_tokens: int = 2, limit: int = 10, batch_size: int = 1, **options: Any) -> TokenChooser:
    return TokenChooser(pair(2)[0], GenerationOptions(**options), prompt_tokens, limit, CPU, batch_size)


def scores(*likeliest: int) -> torch.Tensor:
    """(batch, 10): each row has one likeliest token."""
    return torch.nn.functional.one_hot(torch.tensor(likeliest), 10).float()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.ones(batch, tokens, dtype=torch.long)


def test_the_likeliest_token() -> None:
    choice = chooser(do_sample=False).choose(ids(1, 2), scores(7))
    assert choice.tokens.tolist() == [[7]] and choice.token_ids == [7]
    assert choice.finish_reason is None


def test_samples_follow_the_seed() -> None:
    def sampled(seed: int) -> list[int]:
        one = chooser(seed=seed)
        return [one.choose(ids(1, 2), torch.zeros(1, 10)).token_ids[0] for _ in range(8)]

    assert sampled(1) == sampled(1) != sampled(2)
    assert len(set(sampled(1))) > 1


@pytest.mark.parametrize(
    ("token", "tokens", "reason"), [(3, 2, None), (4, 2, "stop"), (3, 9, "length"), (4, 9, "stop"), (3, 10, "length")]
)
def test_why_an_answer_ends(token: int, tokens: int, reason: str | None) -> None:
    one = chooser(do_sample=False, eos_token_id=[4, 5])
    assert one.choose(ids(1, tokens), scores(token)).finish_reason == reason


def test_the_callers_criteria_see_the_token_and_end_the_answer() -> None:
    def has_three(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (input_ids == 3).any(-1)

    one = chooser(do_sample=False, stopping_criteria=[has_three])
    assert one.choose(ids(1, 2), scores(2)).finish_reason is None
    assert one.choose(ids(1, 3), scores(3)).finish_reason == "stop"


@pytest.mark.parametrize(("pad", "padding"), [(None, 4), (8, 8)])
def test_a_batch_ends_when_all_its_sequences_have(pad: int | None, padding: int) -> None:
    batch = chooser(batch_size=3, do_sample=False, eos_token_id=4, pad_token_id=pad)
    said = [
        batch.choose(ids(3, 2), scores(1, 4, 2)),
        batch.choose(ids(3, 3), scores(4, 5, 2)),
        batch.choose(ids(3, 4), scores(6, 6, 4)),
    ]
    assert [choice.token_ids for choice in said] == [[1, 4, 2], [4, padding, 2], [padding, padding, 4]]
    assert [choice.finish_reason for choice in said] == [None, None, "stop"]


def test_processors_come_before_the_choice() -> None:
    class Never(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert input_ids.shape == (1, 2)
            return scores.index_fill(1, torch.tensor([7]), float("-inf"))

    assert chooser(do_sample=False, logits_processor=[Never()]).choose(ids(1, 2), scores(7)).token_ids != [7]


def test_nan_is_an_error_or_what_the_originals_made_of_it() -> None:
    broken = scores(7).index_fill(1, torch.tensor([2]), float("nan"))
    with pytest.raises(chatglm.NonFiniteLogitsError, match="NaN or infinite logits, first in its output"):
        chooser(do_sample=False).choose(ids(1, 2), broken)
    forgiving = chooser(do_sample=False, logits_processor=[chatglm.InvalidScoreLogitsProcessor()])
    assert forgiving.choose(ids(1, 2), broken).token_ids == [5]
