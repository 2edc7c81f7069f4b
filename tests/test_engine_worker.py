"""The engine's thread: requests from many threads and tasks, a full queue, other work, failures, the end."""

from __future__ import annotations

import asyncio
import copy
import threading
from typing import Any

import pytest

from chatglm.chat import ids_to_text
from chatglm.engine import CLIENT, Engine, EngineStoppedError, QueueFullError, Stream
from chatglm.generation import GenerationOptions, generate_text
from scripted import SECONDS, Hold
from tiny_chat import pair

VERSIONS = (1, 2, 3)


def engine_of(model: Any, tokenizer: Any, **sizes: int) -> Engine:
    return Engine(model, ids_to_text(tokenizer), **sizes)


def prompt(question: str, version: int = 3, **settings: Any) -> tuple[list[int], GenerationOptions]:
    model, tokenizer = pair(version)
    ids, options = model.prepare_turn(tokenizer, question, **settings)
    return ids, options


def start(engine: Engine, question: str, **settings: Any) -> Stream:
    return engine.submit(*prompt(question, **settings))


@pytest.mark.parametrize("version", VERSIONS)
def test_many_threads_get_the_answers_of_the_decode_loop(version: int) -> None:
    model, tokenizer = pair(version)

    def asked(number: int) -> tuple[list[int], GenerationOptions]:
        return prompt(f"你好 q{number}", version, do_sample=False, max_new_tokens=5 + number)

    def texts(steps: Any) -> list[str]:
        return [step.text for step in steps]

    wanted = [texts(generate_text(model, *asked(number), ids_to_text(tokenizer))) for number in range(12)]
    results: dict[int, list[str]] = {}
    with engine_of(model, tokenizer, max_batch=4) as engine:

        def ask(number: int) -> None:
            results[number] = texts(engine.submit(*asked(number)))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert [results[number] for number in range(12)] == wanted


def test_many_tasks_of_an_event_loop_get_them_too() -> None:
    asked = [prompt(f"q{i}", do_sample=False, max_new_tokens=5 + i) for i in range(6)]
    with engine_of(*pair(3), max_batch=4) as engine:

        async def ask(ids: list[int], options: GenerationOptions) -> tuple[str, int]:
            text, count = "", 0
            async for step in engine.submit(ids, options):
                text, count = text + step.delta, step.completion_tokens
                assert step.text == text
            return text, count

        async def all_of_them() -> list[tuple[str, int]]:
            return await asyncio.gather(*(ask(*request) for request in asked))

        together = asyncio.run(all_of_them())
        single = [list(engine.submit(*request))[-1] for request in asked]
    assert together == [(last.text, last.completion_tokens) for last in single]


def test_a_full_queue_refuses() -> None:
    hold = Hold()
    with engine_of(*pair(3), max_batch=1, max_queue=3) as engine:
        first = start(engine, "x", logits_processor=[hold], max_new_tokens=1)
        assert hold.begun.wait(SECONDS)
        others = [start(engine, "x", max_new_tokens=1) for _ in range(3)]
        with pytest.raises(QueueFullError, match="3 requests are already waiting") as full:
            start(engine, "x")
        assert 0 < full.value.retry_after < 2
        assert (engine.running, engine.waiting) == (1, 3)
        hold.go_on.set()
        for stream in (*others, first):
            assert list(stream)[-1].finish_reason
        assert list(start(engine, "x", max_new_tokens=1))[-1].finish_reason == "length"
    assert engine.statistics.refused == 1
    with engine_of(*pair(3), max_batch=1, max_queue=1) as engine, pytest.raises(ValueError, match="3 answers at once"):
        engine.submit_all([prompt("x")] * 3)
    with pytest.raises(ValueError, match="max_queue must be 0 or more"):
        engine_of(*pair(3), max_queue=-1)


def test_cancelled_answers_end_where_they_are() -> None:
    hold = Hold()
    with engine_of(*pair(3), max_batch=1) as engine:
        running = start(engine, "x", do_sample=False, min_new_tokens=200, logits_processor=[hold])
        assert hold.begun.wait(SECONDS)
        waiting = start(engine, "x")
        event = threading.Event()
        third = start(engine, "x", cancel=event)
        running.cancel()
        waiting.cancel()
        event.set()
        hold.go_on.set()
        assert [list(stream)[-1].finish_reason for stream in (running, waiting, third)] == ["cancelled"] * 3
        hold = Hold(after=3)
        with start(engine, "x", do_sample=False, min_new_tokens=200, logits_processor=[hold]) as left:
            next(left)  # like a reader that has left
        hold.go_on.set()
        assert list(start(engine, "x", max_new_tokens=2))[-1].finish_reason
    assert engine.statistics.finished["cancelled"] == 4


def test_other_work_runs_between_the_steps() -> None:
    with engine_of(*pair(3)) as engine:
        assert engine.call(lambda: threading.current_thread().name).result(SECONDS) == "chatglm-engine"
        failed = engine.call(lambda: 1 // 0)
        assert isinstance(failed.exception(SECONDS), ZeroDivisionError)
    with pytest.raises(EngineStoppedError):
        engine.call(lambda: 1)


def test_other_work_that_waits_is_ended_too() -> None:
    hold = Hold()
    engine = engine_of(*pair(3), max_queue=1)
    running = start(engine, "x", logits_processor=[hold], max_new_tokens=1)
    assert hold.begun.wait(SECONDS)
    waiting = engine.call(lambda: 1)
    with pytest.raises(QueueFullError):
        engine.call(lambda: 2)
    engine.close(grace=SECONDS, wait=False)
    hold.go_on.set()
    assert list(running)[-1].finish_reason
    with pytest.raises(EngineStoppedError, match="shutting down"):
        waiting.result(SECONDS)
    engine.close()


def test_an_engine_whose_model_is_broken_says_so_and_leaves_nobody_waiting() -> None:
    model, tokenizer = copy.deepcopy(pair(3))
    all_asked = threading.Event()

    def fail(*args: Any) -> None:
        assert all_asked.wait(SECONDS)
        raise RuntimeError("the device is gone")

    model.register_forward_pre_hook(fail)
    with engine_of(model, tokenizer, max_batch=1) as engine:
        streams = [start(engine, "x") for _ in range(5)]
        all_asked.set()
        for stream in streams:
            with pytest.raises(RuntimeError, match="the device is gone"):
                list(stream)
        assert not engine.is_alive
        with pytest.raises(EngineStoppedError, match="the device is gone"):
            start(engine, "x")


def test_closing_lets_what_runs_finish_and_ends_what_waits() -> None:
    hold = Hold()
    engine = engine_of(*pair(3), max_batch=1)
    running = start(engine, "x", logits_processor=[hold], do_sample=False, max_new_tokens=20, min_new_tokens=20)
    assert hold.begun.wait(SECONDS)
    waiting = start(engine, "x")
    engine.close(grace=SECONDS, wait=False)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        start(engine, "x")
    hold.go_on.set()
    assert list(running)[-1].completion_tokens == 20
    with pytest.raises(EngineStoppedError, match="shutting down"):
        list(waiting)
    engine.close()
    assert not engine.is_alive


def test_closing_at_once_ends_what_runs() -> None:
    hold = Hold()
    engine = engine_of(*pair(3))
    running = start(engine, "x", logits_processor=[hold], do_sample=False, min_new_tokens=200)
    assert hold.begun.wait(SECONDS)
    engine.close(wait=False)
    hold.go_on.set()
    with pytest.raises(EngineStoppedError, match="shutting down"):
        list(running)
    engine.close()


def start_as(client: str, engine: Engine, question: str, **settings: Any) -> Stream:
    token = CLIENT.set(client)
    try:
        return start(engine, question, **settings)
    finally:
        CLIENT.reset(token)


def test_a_client_gets_its_share_of_the_places_although_another_filled_the_queue() -> None:
    hold = Hold()
    with engine_of(*pair(3), max_batch=2, max_queue=6) as engine:
        streams = [start_as("greedy", engine, "x", logits_processor=[hold], max_new_tokens=1)]
        assert hold.begun.wait(SECONDS)
        streams += [start_as("greedy", engine, "x", max_new_tokens=1) for _ in range(7)]
        with pytest.raises(QueueFullError):
            start_as("greedy", engine, "x")
        streams += [start_as("modest", engine, "x", max_new_tokens=1) for _ in range(4)]
        with pytest.raises(QueueFullError):
            start_as("modest", engine, "x")
        hold.go_on.set()
        for stream in streams:
            assert list(stream)[-1].finish_reason
        # Nothing is left over: one client alone may fill the queue again.
        while engine._held:
            pass  # the engine hands over the last token before it gives up the place
        assert len([start_as("modest", engine, "x", max_new_tokens=1) for _ in range(8)]) == 8


def test_the_rows_go_to_the_clients_in_turn() -> None:
    order: list[str] = []
    hold = Hold()

    def note(name: str) -> Any:
        def processor(input_ids: Any, scores: Any) -> Any:
            order.append(name)
            return scores

        return processor

    with engine_of(*pair(3), max_batch=1, max_queue=20) as engine:
        streams = [start_as("greedy", engine, "x", logits_processor=[hold], max_new_tokens=1)]
        assert hold.begun.wait(SECONDS)
        for name, count in (("greedy", 6), ("modest", 2), ("third", 1)):
            for _ in range(count):
                streams.append(start_as(name, engine, "x", logits_processor=[note(name)], max_new_tokens=1))
        hold.go_on.set()
        for stream in streams:
            assert list(stream)[-1].finish_reason
    assert order == ["modest", "third", "greedy", "modest", *["greedy"] * 5]


def test_a_client_with_all_rows_gives_some_back_and_its_answers_are_the_same() -> None:
    settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": 60, "max_new_tokens": 60}
    hold, second = Hold(after=5), Hold()
    with engine_of(*pair(3), max_batch=4) as engine:
        wanted = list(start_as("greedy", engine, "x", **settings))[-1].text
        long = [start_as("greedy", engine, "x", **settings) for _ in range(3)]
        long.append(start_as("greedy", engine, "x", logits_processor=[hold], **settings))
        assert hold.begun.wait(SECONDS)
        short = start_as("modest", engine, "y", max_new_tokens=1, do_sample=False, logits_processor=[second])
        hold.go_on.set()
        assert second.begun.wait(SECONDS)
        assert engine.statistics.finished.get("length", 0) <= 1  # the long answers go on
        second.go_on.set()
        assert list(short)[-1].finish_reason
        assert [list(stream)[-1].text for stream in long] == [wanted] * 4
    assert engine.statistics.preempted >= 1
