"""Log probabilities of prompts: those of one forward over the whole text, however the engine reads it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from chatglm.chat import ids_to_text
from chatglm.engine import Engine, EngineStep, PromptTooLongError, Scheduler
from chatglm.generation import GenerationOptions, NonFiniteLogitsError
from tiny_chat import CONTEXT, pair

TEXT = "The quick brown fox jumps over the lazy dog. 你好，世界。" * 3


def ids_of(version: int, text: str = TEXT) -> tuple[list[int], int]:
    """Ids of a text, and the index of its first token that has a probability."""
    tokenizer = pair(version)[1]
    if version > 1:
        return list(tokenizer(text)["input_ids"]), 1
    context = list(tokenizer("一段话")["input_ids"])  # the end of the context is [gMASK] <sop>
    return context + tokenizer.encode_text(text), len(context)


def wanted(model: Any, ids: list[int]) -> torch.Tensor:
    """(tokens - 1, vocabulary): the log probabilities of what may follow each token."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


def check(step: EngineStep, model: Any, ids: list[int], first: int, top: int) -> None:
    found = step.prompt_logprobs
    assert found is not None and len(found) == len(ids)
    assert found[:first] == [None] * first
    right = wanted(model, ids)
    for index in range(first, len(ids)):
        token, row = found[index], right[index - 1]
        assert token is not None and token.token_id == ids[index]
        assert token.logprob == pytest.approx(float(row[ids[index]]), abs=1e-3)
        assert [value for _, value in token.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-3)
        if top:
            better = sum(value > token.logprob for _, value in token.top)
            assert token.rank == better + 1 if better < top else token.rank > top
    ranks = [int((right[i - 1] > right[i - 1, ids[i]]).sum()) + 1 for i in range(first, len(ids))]
    assert sum(abs(one.rank - rank) > 2 for one, rank in zip(found[first:], ranks, strict=True) if one) == 0


@pytest.mark.parametrize("version", (1, 2, 3))
@pytest.mark.parametrize("prefill", [512, 7])
def test_they_are_those_of_one_forward(version: int, prefill: int) -> None:
    model, tokenizer = pair(version)
    ids, first = ids_of(version)
    scheduler = Scheduler(model, ids_to_text(tokenizer), prefill_tokens=prefill)
    options = GenerationOptions(do_sample=False, max_new_tokens=3)
    plain = scheduler.make_request(ids, options)
    scheduler.add(plain)
    while scheduler.has_work:
        scheduler.step()
    told = scheduler.make_request(ids, options, 1, prompt_logprobs=2)
    read = scheduler.make_request(ids, options, prompt_logprobs=0, answers=False)
    for request in (told, read):  # the cache already holds the text
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    steps, (only,) = list(told.stream), list(read.stream)
    check(steps[0], model, ids, first, 2)
    assert [step.prompt_logprobs for step in steps[1:]] == [None] * (len(steps) - 1)
    assert [step.token_id for step in steps] == [step.token_id for step in plain.stream]
    check(only, model, ids, first, 0)
    assert (only.token_id, only.finish_reason, only.completion_tokens, only.text) == (None, "length", 0, "")
    assert read.cached_tokens == first - 1 and only.queue_seconds >= 0  # the logits after the others were needed


def test_a_prompt_as_long_as_the_context_can_be_read() -> None:
    model, tokenizer = pair(3)
    ids = ids_of(3, "a b c d " * CONTEXT)[0][:CONTEXT]
    with Engine(model, ids_to_text(tokenizer)) as engine:
        options = GenerationOptions(do_sample=False, max_new_tokens=1)
        (stream,) = engine.submit_all([(ids, options)], prompt_logprobs=0, answers=False)
        check(next(stream), model, ids, 1, 0)
        with pytest.raises(PromptTooLongError, match=f"{CONTEXT + 1} tokens, and the model reads at most {CONTEXT}"):
            engine.submit_all([([*ids, 5], options)], prompt_logprobs=0, answers=False)


def test_generation_1_has_none_in_its_context() -> None:
    model, tokenizer = pair(1)
    with Engine(model, ids_to_text(tokenizer)) as engine:
        prompt = (list(tokenizer(TEXT)["input_ids"]), GenerationOptions(max_new_tokens=1))
        with pytest.raises(ValueError, match="in both directions"):
            engine.submit_all([prompt], prompt_logprobs=0)


@pytest.mark.parametrize("version", (2, 3))
@pytest.mark.parametrize("steps_before", [2, 12])
def test_a_request_that_starts_again_keeps_what_was_read(version: int, steps_before: int) -> None:
    model, tokenizer = pair(version)
    ids, first = ids_of(version)
    scheduler = Scheduler(model, ids_to_text(tokenizer), prefill_tokens=16)
    told = scheduler.make_request(ids, GenerationOptions(do_sample=False, max_new_tokens=20), prompt_logprobs=1)
    scheduler.add(told)
    for _ in range(steps_before):
        scheduler.step()
    scheduler._preempt()
    while scheduler.has_work:
        scheduler.step()
    assert scheduler.statistics.preempted == 1
    steps = list(told.stream)
    check(steps[0], model, ids, first, 1)
    assert sum(step.prompt_logprobs is not None for step in steps) == 1 and steps[-1].completion_tokens == 20


def test_nan_ends_only_that_request() -> None:
    model, tokenizer = copy.deepcopy(pair(3))
    ids, _ = ids_of(3)
    bad = ids[5]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    scheduler = Scheduler(model, ids_to_text(tokenizer))
    options = GenerationOptions(do_sample=False, max_new_tokens=2)
    other = [token for token in ids if token != bad]
    requests = [
        scheduler.make_request(ids, options, prompt_logprobs=0, answers=False),
        scheduler.make_request(other, options, prompt_logprobs=0),
    ]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    with pytest.raises(NonFiniteLogitsError):
        list(requests[0].stream)
    assert [step.finish_reason for step in requests[1].stream][-1] in ("stop", "length")
