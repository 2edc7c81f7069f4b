"""The engine: the answers of chat, for many at once; joining, leaving, limits, failures, the end."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from chatglm.engine import EngineStoppedError, PromptTooLongError, QueueFullError
from chatglm.generation import GenerationOptions, NonFiniteLogitsError
from chatglm.serving.chat_engine import ChatEngine as Engine
from scripted import SECONDS, Hold, Say
from tiny_chat import CONTEXT, pair

VERSIONS = (1, 2, 3)


def questions(count: int, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """Questions and settings of all kinds, none of which depends on chance."""
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


def alone(model: Any, tokenizer: Any, question: str, history: Any = None, **settings: Any) -> Any:
    model.clear_chat_cache()
    return list(model.stream_steps(tokenizer, question, history, **settings))[-1]


def said(step: Any) -> Any:
    return step.text, step.finish_reason, step.history, step.prompt_tokens, step.completion_tokens


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "sizes",
    [{"max_batch": 8}, {"max_batch": 3, "cache_tokens": 400}, {"max_batch": 1}],
    ids=["wide", "tight", "single"],
)
def test_answers_are_those_of_chat_in_whatever_company(version: int, sizes: dict[str, int]) -> None:
    model, tokenizer = pair(version)
    asked = questions(20)
    wanted = [said(alone(model, tokenizer, question, **settings)) for question, settings in asked]
    with Engine(model, tokenizer, **sizes) as engine:
        answers = [engine.chat(question, **settings) for question, settings in asked]
        assert [said(list(answer)[-1]) for answer in answers] == wanted
        tokens, _ = engine.cached
        assert tokens <= engine.cache_tokens
    assert engine.statistics.steps < sum(one[-1] for one in wanted) or sizes["max_batch"] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_requests_join_and_leave_between_steps(version: int) -> None:
    model, tokenizer = pair(version)
    asked = questions(12, seed=1)
    wanted = [said(alone(model, tokenizer, question, **settings)) for question, settings in asked]
    with Engine(model, tokenizer, max_batch=4) as engine:
        results: dict[int, Any] = {}

        def ask(number: int) -> None:
            question, settings = asked[number]
            for step in engine.chat(question, **settings):
                results[number] = said(step)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert [results[number] for number in range(len(asked))] == wanted


@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_that_is_taken_away_is_read_again(version: int) -> None:
    model, tokenizer = pair(version)
    settings = {"do_sample": False, "max_new_tokens": 150, "min_new_tokens": 150}
    wanted = [said(alone(model, tokenizer, f"q{i}", **settings)) for i in range(4)]
    with Engine(model, tokenizer, max_batch=4, cache_tokens=360) as engine:
        answers = [engine.chat(f"q{i}", **settings) for i in range(4)]
        assert [said(list(answer)[-1]) for answer in answers] == wanted
    assert engine.statistics.preempted > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_long_prompts_are_read_in_pieces(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair(version)
    asked = questions(6, seed=2)
    wanted = [said(alone(model, tokenizer, question, **settings)) for question, settings in asked]
    with Engine(model, tokenizer, max_batch=4) as engine:
        answers = [engine.chat(question, **settings) for question, settings in asked]
        assert [said(list(answer)[-1]) for answer in answers] == wanted


@pytest.mark.parametrize("version", (2, 3))
def test_a_later_turn_reuses_what_was_computed(version: int) -> None:
    model, tokenizer = pair(version)
    with Engine(model, tokenizer, max_batch=3) as engine:
        first = list(engine.chat("你好", do_sample=False, max_new_tokens=10))[-1]
        other = list(engine.chat("something else", do_sample=False, max_new_tokens=10))[-1]
        second = list(engine.chat("what?", first.history, do_sample=False, max_new_tokens=10))[-1]
        again = list(engine.chat("and?", other.history, do_sample=False, max_new_tokens=10))[-1]
    # Generation 2 encodes a conversation as one text, so that an answer may read as other tokens the second time.
    assert 2 * second.cached_tokens > first.prompt_tokens and 2 * again.cached_tokens > other.prompt_tokens
    assert said(second) == said(alone(model, tokenizer, "what?", first.history, do_sample=False, max_new_tokens=10))
    assert said(again) == said(alone(model, tokenizer, "and?", other.history, do_sample=False, max_new_tokens=10))


def test_conversations_are_kept_as_long_as_there_is_room() -> None:
    model, tokenizer = pair(3)
    settings = {"do_sample": False, "max_new_tokens": 5}
    with Engine(model, tokenizer, max_batch=6) as engine:
        first = [list(engine.chat(f"你好 {number}", **settings))[-1] for number in range(6)]
        second = [list(engine.chat("what?", one.history, **settings))[-1] for one in first]
    assert all(two.cached_tokens >= one.prompt_tokens for one, two in zip(first, second, strict=True))


def test_generation_1_reuses_only_a_prompt_that_is_the_same() -> None:
    model, tokenizer = pair(1)
    with Engine(model, tokenizer) as engine:
        first = list(engine.chat("你好", do_sample=False, max_new_tokens=5))[-1]
        same = list(engine.chat("你好", do_sample=False, max_new_tokens=5))[-1]
        other = list(engine.chat("what?", first.history, do_sample=False, max_new_tokens=5))[-1]
    assert (same.cached_tokens, other.cached_tokens) == (first.prompt_tokens - 1, 0)
    assert same.text == first.text


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("text", ["好", "1+1=2", "😀 好", "get_weather", "你好 , 世界,", "[[训练时间]],对", "a\n\nb"])
def test_streamed_text_is_the_whole_text(version: int, text: str) -> None:
    model, tokenizer = pair(version)
    with Engine(model, tokenizer) as engine:
        steps = list(engine.chat("x", logits_processor=[Say(tokenizer, text)], do_sample=False))
    whole = alone(model, tokenizer, "x", logits_processor=[Say(tokenizer, text)], do_sample=False)
    assert "".join(step.delta for step in steps) == steps[-1].text == whole.text != ""
    assert said(steps[-1]) == said(whole)


@pytest.mark.parametrize("version", VERSIONS)
def test_stop_strings_and_stop_tokens(version: int) -> None:
    model, tokenizer = pair(version)
    with Engine(model, tokenizer) as engine:
        settings = {"logits_processor": [Say(tokenizer, "one STtwo STOP x")], "do_sample": False}
        last = list(engine.chat("x", stop_strings=["STOP"], **settings))[-1]
        assert (last.text, last.finish_reason) == ("one STtwo", "stop")
        stop = tokenizer.encode_text("two")[-1]
        options = GenerationOptions(
            do_sample=False, max_new_tokens=9, eos_token_id=[stop], logits_processor=[Say(tokenizer, "one two three")]
        )
        *_, last = engine.submit(model.prepare_turn(tokenizer, "x")[0], options)
        assert (last.token_id, last.finish_reason) == (stop, "stop")


def test_probabilities_are_those_of_the_model() -> None:
    model, tokenizer = pair(3)
    ids, _ = model.prepare_turn(tokenizer, "你好")
    options = GenerationOptions(do_sample=False, max_new_tokens=4)
    with Engine(model, tokenizer) as engine:
        steps = list(engine.submit(ids, options, top_logprobs=3))
    for step in steps:
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert step.logprob is not None and len(step.logprob.top) == 3
        assert step.logprob.top[0][0] == step.logprob.token_id == step.token_id
        assert step.logprob.logprob == pytest.approx(float(wanted.max()), abs=1e-4)
        ids = [*ids, step.token_id]


# ---------------------------------------------------------------------------------------------------- limits


def test_a_full_queue_refuses_and_waiting_requests_are_served_in_order() -> None:
    model, tokenizer = pair(3)
    order: list[int] = []

    class Note(LogitsProcessor):
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            order.append(self.number)
            return scores

    hold = Hold()
    with Engine(model, tokenizer, max_batch=1, max_queue=3) as engine:
        first = engine.chat("x", logits_processor=[hold], max_new_tokens=1)
        assert hold.begun.wait(SECONDS)
        others = [engine.chat("x", logits_processor=[Note(number)], max_new_tokens=1) for number in range(3)]
        with pytest.raises(QueueFullError, match="3 requests are waiting") as full:
            engine.chat("x")
        assert full.value.retry_after >= 1
        assert (engine.running, engine.waiting) == (1, 3)
        hold.go_on.set()
        for answer in (*others, first):
            assert list(answer)[-1].finish_reason
        assert order == [0, 1, 2]
        assert list(engine.chat("x", max_new_tokens=1))[-1].finish_reason == "length"
    assert engine.statistics.refused == 1
    with Engine(model, tokenizer, max_batch=1, max_queue=1) as engine:
        ids, options = model.prepare_turn(tokenizer, "x", max_new_tokens=1)
        with pytest.raises(ValueError, match="3 answers at once"):
            engine.submit_all([(ids, options)] * 3)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_cannot_be_a_prompt_is_refused_at_once(version: int) -> None:
    model, tokenizer = pair(version)
    options = GenerationOptions(max_length=CONTEXT)
    with Engine(model, tokenizer, max_batch=2, cache_tokens=100) as engine:
        ids = model.prepare_turn(tokenizer, "你好")[0]
        with pytest.raises(PromptTooLongError, match=r"\d+ tokens and the limit .* is 100"):
            engine.submit(ids[:1] * 100 + ids, options)
        for wrong in ([], [-1, *ids], [10**9, *ids]):
            with pytest.raises(ValueError, match=r"empty|token ids"):
                engine.submit(wrong, options)
        if version == 1:
            with pytest.raises(ValueError, match="<sop>"):
                engine.submit([5, 6], options)
        # A budget below the context ends an answer as the context does.
        last = list(engine.chat("x", do_sample=False, min_new_tokens=200))[-1]
        assert (last.finish_reason, last.prompt_tokens + last.completion_tokens) == ("length", 100)
    with pytest.raises(ValueError, match="max_batch must be 1 or more"):
        Engine(model, tokenizer, max_batch=0)


# ---------------------------------------------------------------------------------------------------- leaving


def test_a_cancelled_answer_makes_room() -> None:
    model, tokenizer = pair(3)
    hold = Hold()
    with Engine(model, tokenizer, max_batch=1) as engine:
        ids, options = model.prepare_turn(tokenizer, "x", do_sample=False, min_new_tokens=200, logits_processor=[hold])
        running = engine.submit(ids, options)
        assert hold.begun.wait(SECONDS)
        waiting = engine.submit(*model.prepare_turn(tokenizer, "x"))
        event = threading.Event()
        third = engine.chat("x", cancel=event)
        running.cancel()
        waiting.cancel()
        event.set()
        hold.go_on.set()
        assert [list(stream)[-1].finish_reason for stream in (running, waiting, third)] == ["cancelled"] * 3
        assert list(engine.chat("x", max_new_tokens=2))[-1].completion_tokens == 2
        answer = engine.chat("x", do_sample=False, min_new_tokens=200)
        next(answer)
        answer.close()  # type: ignore[attr-defined]  # as a reader that is gone
        assert list(engine.chat("x", max_new_tokens=2))[-1].completion_tokens == 2
    assert engine.statistics.finished == {"cancelled": 4, "length": 2}


def test_for_many_tasks_of_an_event_loop() -> None:
    model, tokenizer = pair(3)
    asked = [model.prepare_turn(tokenizer, f"q{i}", do_sample=False, max_new_tokens=5 + i) for i in range(6)]
    with Engine(model, tokenizer, max_batch=4) as engine:

        async def ask(ids: list[int], options: GenerationOptions) -> tuple[str, int]:
            text, count = "", 0
            async for step in engine.submit(ids, options):
                text, count = text + step.delta, step.completion_tokens
            return text, count

        async def all_of_them() -> list[tuple[str, int]]:
            return await asyncio.gather(*(ask(*request) for request in asked))

        together = asyncio.run(all_of_them())
        single = [list(engine.submit(*request)) for request in asked]
    assert together == [("".join(step.delta for step in steps), steps[-1].completion_tokens) for steps in single]


# ---------------------------------------------------------------------------------------------------- failures


@pytest.fixture(params=VERSIONS)
def poisoned(request: pytest.FixtureRequest) -> Any:
    """(model, tokenizer, text): a model that computes NaN for prompts with this text."""
    model, tokenizer = copy.deepcopy(pair(request.param))
    bad = tokenizer.encode_text("毒")[-1]

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == bad).unsqueeze(-1), float("nan"))

    model.get_input_embeddings().register_forward_hook(poison)
    return model, tokenizer, "毒"


def test_nan_is_the_trouble_of_one_request(poisoned: Any) -> None:
    model, tokenizer, text = poisoned
    settings = {"do_sample": False, "max_new_tokens": 20}
    wanted = said(alone(model, tokenizer, "hello", **settings))
    with Engine(model, tokenizer, max_batch=3) as engine:
        for _ in range(3):
            answers = [engine.chat(question, **settings) for question in ("hello", text, "hello", text)]
            assert said(list(answers[0])[-1]) == wanted == said(list(answers[2])[-1])
            for answer in (answers[1], answers[3]):
                with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
                    list(answer)
        assert engine.is_alive


@pytest.mark.parametrize("version", VERSIONS)
def test_nan_in_the_middle_of_an_answer_does_not_spread(version: int) -> None:
    """As float16 overflows do: a prompt is read well, then one row of a step in company is NaN, and what it caches."""
    model, tokenizer = copy.deepcopy(pair(version))
    settings = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30}
    wanted = said(alone(model, tokenizer, "hello", **settings))
    bad = tokenizer.encode_text("毒")[-1]

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == bad).unsqueeze(-1), float("nan"))

    model.get_input_embeddings().register_forward_hook(poison)
    with Engine(model, tokenizer, max_batch=3) as engine:
        for _ in range(2):
            good = [engine.chat("hello", **settings) for _ in range(2)]
            broken = engine.chat("hello", logits_processor=[Say(tokenizer, "one two 毒 three")], do_sample=False)
            with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
                list(broken)
            assert [said(list(answer)[-1]) for answer in good] == [wanted] * 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_request_begins_within_a_step_of_free_capacity(version: int) -> None:
    model, tokenizer = pair(version)
    order: list[str] = []
    later: list[Any] = []

    class Note(LogitsProcessor):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            if order == ["first"] * 5:
                settings = {"do_sample": False, "max_new_tokens": 3}
                later.append(engine.chat("later", logits_processor=[Note("later")], **settings))
            return scores

    with Engine(model, tokenizer, max_batch=2) as engine:
        settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
        assert list(engine.chat("x", logits_processor=[Note("first")], **settings))
        assert list(later[0])
    assert "later" in order[5:7]


def test_a_processor_that_fails_is_the_trouble_of_one_request() -> None:
    model, tokenizer = pair(3)

    def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with Engine(model, tokenizer) as engine:
        good = engine.chat("x", max_new_tokens=5)
        bad = engine.chat("x", max_new_tokens=5, logits_processor=[fail])
        with pytest.raises(KeyError, match="mine"):
            list(bad)
        assert list(good)[-1].finish_reason == "length"


def test_an_engine_whose_model_is_broken_says_so_and_leaves_nobody_waiting() -> None:
    model, tokenizer = copy.deepcopy(pair(3))

    all_asked = threading.Event()

    def fail(*args: Any) -> None:
        assert all_asked.wait(SECONDS)
        raise RuntimeError("the device is gone")

    model.register_forward_pre_hook(fail)
    with Engine(model, tokenizer, max_batch=1) as engine:
        answers = [engine.chat("x") for _ in range(5)]
        all_asked.set()
        for answer in answers:
            with pytest.raises(RuntimeError, match="the device is gone"):
                list(answer)
        assert not engine.is_alive
        with pytest.raises(EngineStoppedError, match="the device is gone"):
            engine.chat("x")


# ---------------------------------------------------------------------------------------------------- the end


def test_closing_lets_what_runs_finish_and_ends_what_waits() -> None:
    model, tokenizer = pair(3)
    hold = Hold()
    engine = Engine(model, tokenizer, max_batch=1)
    running = engine.chat("x", logits_processor=[hold], do_sample=False, max_new_tokens=20, min_new_tokens=20)
    assert hold.begun.wait(SECONDS)
    waiting = engine.chat("x")
    engine.close(grace=SECONDS, wait=False)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.chat("x")
    hold.go_on.set()
    assert list(running)[-1].completion_tokens == 20
    with pytest.raises(EngineStoppedError, match="shutting down"):
        list(waiting)
    engine.close()
    assert not engine.is_alive


def test_closing_at_once_ends_what_runs() -> None:
    model, tokenizer = pair(3)
    hold = Hold()
    engine = Engine(model, tokenizer)
    running = engine.chat("x", logits_processor=[hold], do_sample=False, min_new_tokens=200)
    assert hold.begun.wait(SECONDS)
    engine.close(wait=False)
    hold.go_on.set()
    with pytest.raises(EngineStoppedError, match="shutting down"):
        list(running)
    engine.close()


def test_other_work_runs_between_the_steps() -> None:
    model, tokenizer = pair(3)
    with Engine(model, tokenizer) as engine:
        assert engine.call(lambda: threading.current_thread().name).result(SECONDS) == "chatglm-engine"
        failed = engine.call(lambda: 1 // 0)
        assert isinstance(failed.exception(SECONDS), ZeroDivisionError)
    with pytest.raises(EngineStoppedError):
        engine.call(lambda: 1)


def test_memory_is_flat_over_many_requests() -> None:
    model, tokenizer = pair(3)
    with Engine(model, tokenizer, max_batch=4) as engine:
        sizes = []
        for number in range(60):
            answers = [engine.chat(f"{number} {i}", do_sample=False, max_new_tokens=3) for i in range(4)]
            assert all(list(answer)[-1].finish_reason for answer in answers)
            sizes.append(engine.cached[1])
    assert sizes[-1] == sizes[9]
