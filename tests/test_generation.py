"""The decode loop on its own: with a cache and without, prompts in pieces, batches, names that users import."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch

from chatglm import generation
from chatglm.chat import ids_to_text
from chatglm.generation import ChatCache, GenerationOptions, decode, generate_text, weights_stamp
from tiny_chat import CONTEXT, pair

VERSIONS = (1, 2, 3)


def prompt(version: int, question: str) -> torch.Tensor:
    model, tokenizer = pair(version)
    return torch.tensor([model.prepare_turn(tokenizer, question)[0]])


def decoded(model: Any, ids: torch.Tensor, cache: ChatCache | None = None, **options: Any) -> list[int]:
    *_, (sequence, _) = decode(model, ids, GenerationOptions(**options), ids.shape[1] + 12, cache)
    return sequence[0].tolist()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_cache_does_not_change_the_tokens(version: int) -> None:
    model, _ = pair(version)
    ids = prompt(version, "你好 " * 10)
    without = decoded(model, ids, do_sample=False, use_cache=False)
    cache = ChatCache(weights_stamp(model))
    assert decoded(model, ids, cache, do_sample=False) == decoded(model, ids, do_sample=False) == without
    assert cache.token_ids == without[:-1]  # the last token was chosen and not read


@pytest.mark.parametrize("version", VERSIONS)
def test_a_prompt_that_is_read_in_pieces_gives_the_same(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(version)
    ids = prompt(version, "你好 " * 20)
    whole = decoded(model, ids, do_sample=False)
    for size in (7, ids.shape[1] - 1):  # generation 1: the context without the <sop> that ends it is no piece
        monkeypatch.setattr(generation, "CPU_PROMPT_TOKENS", size)
        assert generation.piece_end(model, ids, 0) == (ids.shape[1] if version == 1 else size)
        assert generation.piece_end(model, ids, ids.shape[1] - 3) == ids.shape[1]
        assert decoded(model, ids, do_sample=False) == whole


@pytest.mark.parametrize("version", VERSIONS)
def test_steps_count_and_say_why_they_end(version: int) -> None:
    model, tokenizer = pair(version)
    ids = prompt(version, "你好")[0].tolist()
    options = GenerationOptions(do_sample=False, max_new_tokens=12)
    steps = list(generate_text(model, ids, options, ids_to_text(tokenizer), CONTEXT))
    assert [step.completion_tokens for step in steps] == list(range(1, 13))
    assert [step.finish_reason for step in steps] == [None] * 11 + ["length"]
    assert {(step.prompt_tokens, step.cached_tokens) for step in steps} == {(len(ids), 0)}
    assert steps[-1].text == ids_to_text(tokenizer)([step.token_id for step in steps])
    assert all(before.seconds <= after.seconds for before, after in itertools.pairwise(steps))
    with pytest.raises(ValueError, match="shorten it"):
        list(generate_text(model, ids, options, ids_to_text(tokenizer), len(ids)))


@pytest.mark.parametrize("version", (2, 3))
def test_a_cache_is_taken_up_where_it_fits(version: int) -> None:
    model, tokenizer = pair(version)
    ids = prompt(version, "你好")[0].tolist()
    options, cache = GenerationOptions(do_sample=False, max_new_tokens=4), ChatCache(weights_stamp(model))
    first, again = (list(generate_text(model, ids, options, ids_to_text(tokenizer), CONTEXT, cache)) for _ in range(2))
    assert (first[-1].cached_tokens, again[-1].cached_tokens) == (0, len(ids) - 1)
    assert again[-1].text == first[-1].text


@pytest.mark.parametrize(
    "name",
    [
        "AnswerText", "ChatCache", "CPU_PROMPT_TOKENS", "DEFAULT_TOP_K", "FinishReason", "GenerationOptions",
        "GenerationStep", "GREEDY_BELOW", "IncrementalDecoder", "InvalidScoreLogitsProcessor", "NonFiniteLogitsError",
        "check_finite", "choose", "decode", "find_non_finite", "generate_text", "piece_end", "weights_stamp",
    ],
)  # fmt: skip
def test_names_that_users_import(name: str) -> None:
    assert name in importlib.import_module("chatglm.generation").__all__
    assert hasattr(generation, name)
