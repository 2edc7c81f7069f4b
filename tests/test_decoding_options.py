"""The options of an answer: what they take, what they refuse, and the processors they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from chatglm.decoding.options import NEUTRAL, GenerationOptions


def test_the_chain_is_that_of_transformers() -> None:
    options = GenerationOptions(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, no_repeat_ngram_size=3,
        bad_words_ids=[[3]], min_new_tokens=2, suppress_tokens=[4], eos_token_id=1,
        logits_processor=LogitsProcessorList(),
    )  # fmt: skip
    names = [type(processor).__name__ for processor in options.processors(5, torch.device("cpu"))]
    assert names == [
        "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor", "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper",
        "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    ]  # fmt: skip
    assert not GenerationOptions(do_sample=False, temperature=0.8).processors(5, torch.device("cpu"))


def test_options_take_what_the_model_says_and_refuse_what_they_do_not_know() -> None:
    config = GenerationConfig(do_sample=True, top_k=7, eos_token_id=[3, 4])
    options = GenerationOptions.from_config(config, top_p=0.5)
    assert (options.top_k, options.top_p, options.stop_ids()) == (7, 0.5, [3, 4])
    with pytest.raises(TypeError, match="unknown generation option num_beams"):
        GenerationOptions.from_config(config, num_beams=4)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"max_length": 50}, 50),
        ({"max_length": 500}, 100),  # the context of the model
        ({"max_new_tokens": 7}, 17),
        ({"max_length": 12, "max_new_tokens": 7}, 12),
        ({}, 100),
    ],
)
def test_the_lowest_limit_decides(options: dict[str, Any], limit: int) -> None:
    assert GenerationOptions(**options).room_for(10, 100) == limit


def test_a_prompt_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the prompt has 10 tokens and the limit .* is 10"):
        GenerationOptions(max_length=10).room_for(10, 100)
    with pytest.raises(ValueError, match="give max_length or max_new_tokens"):
        GenerationOptions().room_for(10, None)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1e-6}, {"top_p": 0.0}])
def test_values_that_leave_no_choice_are_greedy(options: dict[str, Any]) -> None:
    assert not GenerationOptions(**options).do_sample


def test_only_a_seed_makes_a_generator() -> None:
    cpu = torch.device("cpu")
    assert GenerationOptions().generator(cpu) is None
    first, second = (GenerationOptions(seed=4).generator(cpu) for _ in range(2))
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))


NEUTRAL_CALLS: dict[str, dict[str, Any]] = {
    "composite demo": {"num_beams": 1, "length_penalty": 1.0},
    "evaluation": {"early_stopping": False, "num_return_sequences": 1, "typical_p": 1.0, "min_length": 0},
    "training": {"return_dict_in_generate": False, "output_scores": False, "synced_gpus": None, "num_beams": None},
}


@pytest.mark.parametrize("call", NEUTRAL_CALLS)
def test_options_that_change_nothing_are_left_out(call: str) -> None:
    options = GenerationOptions.from_config(GenerationConfig(), top_p=0.5, **NEUTRAL_CALLS[call])
    assert options == GenerationOptions.from_config(GenerationConfig(), top_p=0.5)


@pytest.mark.parametrize("name", NEUTRAL)
def test_other_values_are_unknown_options(name: str) -> None:
    with pytest.raises(TypeError, match=f"unknown generation option {name}"):
        GenerationOptions.from_config(GenerationConfig(), **{name: 2 if not isinstance(NEUTRAL[name], bool) else True})
