"""A stream of steps: read from threads and tasks, completely, once, and small while nobody reads it."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc

import pytest

from chatglm.engine import EngineStep, Stream, Waiting
from scripted import SECONDS

COUNT = 2000


def step(number: int, count: int = COUNT) -> EngineStep:
    """A step as the engine puts it into a stream, with ten characters of text."""
    return EngineStep(number, "", "length" if number == count else None, 5, 0, number, 0.1, f"{number:9} ")


def test_the_text_of_a_step_is_that_of_all_deltas_so_far() -> None:
    stream, seen = Stream(), ""
    for number in range(1, 6):
        stream.put(step(number, 5))
    for number, one in enumerate(stream, start=1):
        seen += f"{number:9} "
        assert (one.token_id, one.delta, one.text) == (number, f"{number:9} ", seen)
    assert one.finish_reason == "length"
    assert list(stream) == []


def test_steps_that_nobody_reads_take_memory_once() -> None:
    tracemalloc.start()
    try:
        stream = Stream()
        for number in range(1, COUNT + 1):
            stream.put(step(number))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < COUNT * 1000  # the texts of all steps would be 20 MB
    *_, last = stream
    assert len(last.text) == 10 * COUNT


def test_a_reader_waits_for_what_comes() -> None:
    stream, texts = Stream(), []
    reading = threading.Event()

    def read() -> None:
        reading.set()
        texts.extend(one.delta for one in stream)

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(SECONDS)
    for number in range(1, 4):
        stream.put(step(number, 3))
    thread.join(SECONDS)
    assert texts == [f"{number:9} " for number in range(1, 4)]


def test_a_task_waits_for_what_comes_from_a_thread() -> None:
    async def read() -> list[int | None]:
        stream, seen = Stream(), []
        stream.put(step(1, 4))
        async for one in stream:
            seen.append(one.token_id)
            # One step comes before the task waits, the next one while it does.
            comes = threading.Thread(target=stream.put, args=(step(len(seen) + 1, 4),))
            comes.start()
            if len(seen) == 2:
                comes.join(SECONDS)
        return seen

    assert asyncio.run(read()) == [1, 2, 3, 4]


def test_what_ended_a_request_early_is_raised() -> None:
    stream = Stream()
    stream.put(step(1))
    stream.put(ValueError("broken"))
    assert next(stream).token_id == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)
    assert list(stream) == []


def test_leaving_a_stream_cancels_it() -> None:
    with Stream() as stream:
        assert not stream.cancelled
    assert stream.cancelled
    stream.cancel()
    assert stream.cancelled


def test_a_place_in_the_queue_is_told_when_it_changes_until_the_request_begins() -> None:
    stream, told = Stream(), []
    heard = threading.Semaphore(0)

    def read() -> None:
        for place in stream.queue():
            told.append(place)
            heard.release()
        heard.release()

    thread = threading.Thread(target=read)
    thread.start()
    for before in (2, 2, 1, 0):
        known = len(told)
        stream.wait(before)
        if before not in [place.before for place in told[:known]]:
            assert heard.acquire(timeout=SECONDS)
    stream.begin()
    assert heard.acquire(timeout=SECONDS)
    thread.join(SECONDS)
    assert told == [Waiting(2), Waiting(1), Waiting(0)]
    assert list(stream.queue()) == []


def test_what_never_waits_has_no_place_and_an_end_is_no_place() -> None:
    begun, ended = Stream(), Stream()
    begun.begin()
    ended.wait(3)
    ended.put(step(1, 1))
    assert list(begun.queue()) == list(ended.queue()) == []
    assert len(list(ended)) == 1
