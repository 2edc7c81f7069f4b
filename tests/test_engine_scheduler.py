"""The scheduler, stepped by the tests themselves: joining, leaving, limits, failures, without a thread or a clock."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from chatglm.chat import ids_to_text
from chatglm.decoding import guessing
from chatglm.engine import PromptTooLongError, Request, Scheduler
from chatglm.generation import GenerationOptions, NonFiniteLogitsError, generate_text
from scripted import Say
from test_decoding_guessing import Steady
from tiny_chat import CONTEXT, pair

VERSIONS = (1, 2, 3)
LONG: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30}


class Asked:
    """A scheduler of a tiny model, with prompts made from questions."""

    def __init__(self, model: Any, tokenizer: Any, **sizes: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(model, ids_to_text(tokenizer), **{"clock": lambda: 0.0} | sizes)

    def ask(self, question: str, history: Any = None, top_logprobs: int | None = None, **settings: Any) -> Request:
        prompt = self.model.prepare_turn(self.tokenizer, question, history, **settings)
        request = self.scheduler.make_request(*prompt, top_logprobs)
        self.scheduler.add(request)
        return request

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()

    def run(self) -> None:
        while self.scheduler.has_work:
            self.scheduler.step()
            tokens, _ = self.scheduler.cached
            assert tokens <= self.scheduler.cache_tokens

    def answer(self, question: str, history: Any = None, **settings: Any) -> Any:
        """The last step of an answer."""
        request = self.ask(question, history, **settings)
        self.run()
        return list(request.stream)[-1]


def asked(version: int, **sizes: Any) -> Asked:
    return Asked(*pair(version), **sizes)


def alone(model: Any, tokenizer: Any, question: str, **settings: Any) -> list[Any]:
    """The steps of the decode loop."""
    ids, options = model.prepare_turn(tokenizer, question, **settings)
    return said(generate_text(model, ids, options, ids_to_text(tokenizer), model.config.max_position_embeddings))


def said(steps: Any) -> list[Any]:
    """What steps have in common, whoever made them."""
    return [(one.token_id, one.text, one.finish_reason, one.prompt_tokens, one.completion_tokens) for one in steps]


def questions(count: int, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """Questions and settings of all kinds, all deterministic."""
    rng = random.Random(seed)
    asked = []
    for number in range(count):
        settings: dict[str, Any] = {"max_new_tokens": rng.randrange(1, 50), "do_sample": False}
        if number % 4 == 1:
            settings = {"max_new_tokens": 30, "seed": number, "temperature": 1.5, "repetition_penalty": 1.2}
        if number % 4 == 2:
            settings |= {"no_repeat_ngram_size": 2, "min_new_tokens": 3}
        asked.append(("你好 " * rng.randrange(1, 20) + f"q{number}", settings))
    return asked


@cache
def answers_alone(version: int) -> list[list[Any]]:
    """What the decode loop answers to `questions(20)`."""
    return [alone(*pair(version), question, **settings) for question, settings in questions(20)]


# ---------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "sizes",
    [{"max_batch": 8}, {"max_batch": 3, "cache_tokens": 400}, {"max_batch": 1}, {"max_batch": 4, "prefill_tokens": 7}],
    ids=["wide", "tight", "single", "prompts in pieces"],
)
def test_every_step_is_that_of_the_decode_loop(version: int, sizes: dict[str, int]) -> None:
    many = asked(version, **sizes)
    wanted = answers_alone(version)
    requests = [many.ask(question, **settings) for question, settings in questions(20)]
    many.run()
    assert [said(request.stream) for request in requests] == wanted
    seen = many.scheduler.statistics
    assert (seen.requests, sum(seen.finished.values())) == (20, 20)
    assert seen.completion_tokens == sum(map(len, wanted))
    assert seen.steps < seen.completion_tokens - 20 or sizes["max_batch"] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_piece_may_be_all_of_a_prompt_but_one_token(version: int) -> None:
    (question, settings), *_ = questions(1)
    tokens = asked(version).ask(question, **settings).prompt_tokens
    many = asked(version, prefill_tokens=tokens - 1)
    request = many.ask(question, **settings)
    many.run()
    assert said(request.stream) == alone(many.model, many.tokenizer, question, **settings)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_may_have_one_token_left_for_a_prompt(version: int) -> None:
    def ask(many: Asked) -> list[Request]:
        return [many.ask(question, top_logprobs=0, do_sample=False, max_new_tokens=3) for question in ("你好", "what?")]

    whole = asked(version)
    wanted = ask(whole)
    many = asked(version, prefill_tokens=wanted[0].prompt_tokens + 1)
    found = ask(many)
    whole.run()
    many.run()
    for one, other in zip(found, wanted, strict=True):
        chosen = [[step.logprob.logprob for step in each.stream] for each in (one, other)]  # type: ignore[union-attr]
        assert chosen[0] == pytest.approx(chosen[1], abs=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_requests_join_and_leave_between_steps(version: int) -> None:
    many = asked(version, max_batch=4)
    wanted = [alone(many.model, many.tokenizer, question, **settings) for question, settings in questions(12, seed=1)]
    requests, running = [], set()
    for question, settings in questions(12, seed=1):
        requests.append(many.ask(question, **settings))
        many.steps(3)
        running.add(many.scheduler.running)
    many.run()
    assert [said(request.stream) for request in requests] == wanted
    assert len(running) > 2, "there was no coming and going"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_request_begins_at_the_next_step(version: int) -> None:
    many = asked(version, max_batch=2)
    first = many.ask("x", **LONG)
    many.steps(5)
    later = many.ask("later", **LONG)
    assert (many.scheduler.running, many.scheduler.waiting) == (1, 1)
    many.steps(1)
    assert (many.scheduler.running, many.scheduler.waiting) == (2, 0)
    assert next(later.stream).completion_tokens == 1
    assert len(first.ids) == first.prompt_tokens + 7  # one token by its prompt, and one by each step


@pytest.mark.parametrize("version", (2, 3))
def test_a_long_prompt_does_not_stop_the_others(version: int) -> None:
    many = asked(version, max_batch=2, prefill_tokens=7)
    first = many.ask("x", **LONG)
    while len(first.ids) == first.prompt_tokens:
        many.steps(1)
    long = many.ask("你好 " * 30, **LONG)
    steps = 0
    while len(long.ids) == long.prompt_tokens:
        before = len(first.ids)
        many.steps(1)
        steps += 1
        assert len(first.ids) == before + 1
    assert steps == -(-(long.prompt_tokens - long.cached_tokens) // 7) > 5


@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_that_is_taken_away_is_read_again(version: int) -> None:
    many = asked(version, max_batch=4, cache_tokens=360)
    settings = {"do_sample": False, "max_new_tokens": 150, "min_new_tokens": 150}
    wanted = [alone(many.model, many.tokenizer, f"q{i}", **settings) for i in range(4)]
    requests = [many.ask(f"q{i}", **settings) for i in range(4)]
    many.run()
    assert [said(request.stream) for request in requests] == wanted
    assert many.scheduler.statistics.preempted > 0


def test_probabilities_are_those_of_the_model() -> None:
    many = asked(3)
    request = many.ask("你好", top_logprobs=3, do_sample=False, max_new_tokens=4)
    many.run()
    ids = request.ids[: request.prompt_tokens]
    for step in request.stream:
        with torch.no_grad():
            wanted = many.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert step.logprob is not None and len(step.logprob.top) == 3
        assert step.logprob.top[0][0] == step.logprob.token_id == step.token_id
        assert step.logprob.logprob == pytest.approx(float(wanted.max()), abs=1e-4)
        ids = [*ids, step.token_id]


# ---------------------------------------------------------------------------------------------------- later turns


@pytest.mark.parametrize("version", (2, 3))
def test_a_later_turn_reuses_what_was_computed(version: int) -> None:
    many = asked(version, max_batch=6)
    settings = {"do_sample": False, "max_new_tokens": 5}

    def history(question: str, answer: str) -> list[Any]:
        if version == 3:
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [(question, answer)]

    first = [many.answer(f"你好 {number}", **settings) for number in range(6)]
    for number, one in enumerate(first):
        second = many.answer("what?", history(f"你好 {number}", one.text), **settings)
        # Generation 2 encodes a conversation as one text, so an answer may give other tokens in a later prompt.
        assert 2 * second.cached_tokens > one.prompt_tokens


def test_generation_1_reuses_only_a_prompt_that_is_the_same() -> None:
    many = asked(1)
    settings = {"do_sample": False, "max_new_tokens": 5}
    first = many.answer("你好", **settings)
    same = many.answer("你好", **settings)
    other = many.answer("what?", [("你好", first.text)], **settings)
    assert (same.cached_tokens, other.cached_tokens) == (first.prompt_tokens - 1, 0)
    assert same.text == first.text


def test_generation_1_reuses_no_part_of_a_longer_context() -> None:
    """A text in which [MASK] is to be filled, then the same one without its end: all tokens of the first saw that."""
    many = asked(1)
    config, text = many.model.config, [200, 201, 202, 203]
    options = GenerationOptions(do_sample=False, max_new_tokens=3)
    cached = []
    for end in ([300, 301], []):
        ids = [*text, config.mask_token_id, *end, config.bos_token_id]
        request = many.scheduler.make_request(ids, options)
        many.scheduler.add(request)
        many.run()
        cached.append(list(request.stream)[-1].cached_tokens)
        with torch.no_grad():
            assert request.ids[len(ids)] == int(many.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert cached == [0, 0]


def test_memory_is_flat_over_many_requests() -> None:
    many = asked(3, max_batch=4)
    sizes = []
    for number in range(60):
        requests = [many.ask(f"{number} {i}", do_sample=False, max_new_tokens=3) for i in range(4)]
        many.run()
        assert all(list(request.stream)[-1].finish_reason for request in requests)
        sizes.append(many.scheduler.cached[1])
    assert sizes[-1] == sizes[9]


# ---------------------------------------------------------------------------------------------------- limits


def test_waiting_requests_are_served_in_order() -> None:
    ended: list[int] = []
    many = Asked(*pair(3), max_batch=1, on_end=lambda request: ended.append(request.number))
    numbers = [many.ask("x", do_sample=False, max_new_tokens=2, min_new_tokens=2).number for _ in range(4)]
    assert numbers == [1, 2, 3, 4]
    waiting = []
    while many.scheduler.has_work:
        many.steps(1)
        waiting.append(many.scheduler.waiting)
        assert many.scheduler.running <= 1
    assert ended == numbers and waiting == [3, 2, 1, 0]


def test_waiting_requests_know_how_many_come_before_them() -> None:
    one = asked(3, max_batch=1)
    requests = [one.ask(f"question {number}", **LONG) for number in range(4)]
    places = [request.stream.queue() for request in requests]
    one.steps(1)
    assert list(places[0]) == []  # it runs
    assert [next(place).before for place in places[1:]] == [0, 1, 2]
    requests[2].stream.cancel()
    one.steps(1)
    assert list(places[2]) == [] and next(places[3]).before == 1
    assert next(iter(requests[2].stream)).finish_reason == "cancelled"
    one.run()
    assert list(places[1]) == list(places[3]) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_cannot_be_a_prompt_is_refused(version: int) -> None:
    many = asked(version, max_batch=2, cache_tokens=100)
    options = GenerationOptions(max_length=CONTEXT)
    ids = many.model.prepare_turn(many.tokenizer, "你好")[0]
    with pytest.raises(PromptTooLongError, match=r"\d+ tokens and the limit .* is 100"):
        many.scheduler.make_request(ids[:1] * 100 + ids, options)
    for wrong in ([], [-1, *ids], [10**9, *ids]):
        with pytest.raises(ValueError, match=r"empty|token ids"):
            many.scheduler.make_request(wrong, options)
    if version == 1:
        with pytest.raises(ValueError, match="<sop>"):
            many.scheduler.make_request([5, 6], options)
    with pytest.raises(ValueError, match="no adapter 'nobody', only none"):
        many.scheduler.make_request(ids, options, adapter="nobody")
    # A budget below the context ends an answer as the context does.
    last = many.answer("x", do_sample=False, min_new_tokens=200)
    assert (last.finish_reason, last.prompt_tokens + last.completion_tokens) == ("length", 100)
    for sizes in ({"max_batch": 0}, {"cache_tokens": 1}):
        with pytest.raises(ValueError, match="must be"):
            asked(version, **sizes)


def test_cancelled_requests_make_room() -> None:
    many = asked(3, max_batch=1)
    running, waiting, last = (many.ask(f"q{i}", **LONG) for i in range(3))
    many.steps(2)
    running.stream.cancel()
    waiting.stream.cancel()
    many.steps(1)
    for request in (running, waiting):
        step = list(request.stream)[-1]
        assert (step.token_id, step.finish_reason) == (None, "cancelled")
    many.run()
    assert list(last.stream)[-1].completion_tokens == 30
    assert many.scheduler.statistics.finished == {"cancelled": 2, "length": 1}


# ---------------------------------------------------------------------------------------------------- failures


def poisoned(version: int, text: str) -> tuple[Any, Any]:
    """(model, tokenizer); the model computes NaN for this text, as float16 overflows do."""
    model, tokenizer = copy.deepcopy(pair(version))
    bad = tokenizer.encode_text(text)[-1]

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == bad).unsqueeze(-1), float("nan"))

    model.get_input_embeddings().register_forward_hook(poison)
    return model, tokenizer


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_nan_ends_one_request_and_does_not_spread(version: int, where: str) -> None:
    many = Asked(*poisoned(version, "毒"), max_batch=3)
    wanted = alone(*pair(version), "hello", **LONG)
    for _ in range(3):  # in rows that held NaN before
        good = [many.ask("hello", **LONG) for _ in range(2)]
        if where == "prompt":
            bad = many.ask("毒", **LONG)
        else:
            bad = many.ask("x", do_sample=False, logits_processor=[Say(many.tokenizer, "one two 毒 three")])
        many.run()
        with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
            list(bad.stream)
        assert [said(request.stream) for request in good] == [wanted] * 2
    assert many.scheduler.statistics.finished == {"length": 6, "error": 3}


@pytest.mark.parametrize("when", ["made", "called"])
def test_a_processor_that_fails_ends_one_request(when: str) -> None:
    class Fail(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    many = asked(3)
    good = many.ask("x", do_sample=False, max_new_tokens=5, min_new_tokens=5)
    bad = many.ask("x", **({"logits_processor": [Fail()]} if when == "called" else {"bad_words_ids": [["no ids"]]}))
    many.run()
    with pytest.raises(KeyError if when == "called" else ValueError):
        list(bad.stream)
    assert list(good.stream)[-1].finish_reason == "length"


def test_a_forward_that_fails_ends_its_requests_and_three_in_a_row_are_the_model() -> None:
    model, tokenizer = copy.deepcopy(pair(3))
    broken = True

    def fail(*args: Any) -> None:
        if broken:
            raise RuntimeError("the device is gone")

    model.register_forward_pre_hook(fail)
    many = Asked(model, tokenizer, max_batch=1)
    for _ in range(2):
        bad = many.ask("x")
        many.steps(1)
        with pytest.raises(RuntimeError, match="the device is gone"):
            list(bad.stream)
    broken = False
    assert many.answer("x", max_new_tokens=2).completion_tokens == 2
    broken = True
    requests = [many.ask("x") for _ in range(5)]
    with pytest.raises(RuntimeError, match="the device is gone"):
        many.run()
    assert many.scheduler.has_work
    many.scheduler.fail_all(ValueError("given up"))
    assert not many.scheduler.has_work
    for request, message in zip(requests, ["device", "device", "given up", "given up", "given up"], strict=True):
        with pytest.raises((RuntimeError, ValueError), match=message):
            list(request.stream)
    assert many.scheduler.statistics.finished == {"error": 7, "length": 1}


def test_what_waits_can_be_ended_without_what_runs() -> None:
    many = asked(3, max_batch=1)
    running, waiting = many.ask("x", **LONG), many.ask("y", **LONG)
    many.steps(2)
    many.scheduler.fail_waiting(ValueError("closing"))
    with pytest.raises(ValueError, match="closing"):
        list(waiting.stream)
    many.run()
    assert list(running.stream)[-1].completion_tokens == 30


@pytest.mark.parametrize("version", VERSIONS)
def test_an_answer_that_runs_alone_is_guessed_ahead(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair(version)
    monkeypatch.setattr(guessing, "_costs", {model: Steady()})
    text = "一二三四五六七八九十 one two three"
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
    for guess in ({}, {"prompt_lookup_num_tokens": 10}, {"assistant_model": model}):
        engine = asked(version)
        for repeats in (True, False):  # the question, or the model's own answer
            script = [[Say(tokenizer, text)] if repeats else [] for _ in range(2)]
            expected = alone(model, tokenizer, text, **settings, logits_processor=script[0])
            before = engine.scheduler.statistics.steps
            request = engine.ask(text, **settings, **guess, logits_processor=script[1])
            engine.run()
            assert said(request.stream) == expected
            steps = engine.scheduler.statistics.steps - before
            if not guess:
                assert steps == len(expected) - 1
            elif repeats == ("prompt_lookup_num_tokens" in guess):  # an assistant knows the model's own answer
                assert steps < 0.6 * len(expected)
        together = [engine.ask(question, **settings, **guess) for question in ("你好", "再见")]
        engine.run()
        for one, question in zip(together, ("你好", "再见"), strict=True):
            assert said(one.stream) == alone(model, tokenizer, question, **settings)
