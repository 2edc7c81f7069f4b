"""Refused requests are told times at which there are places for them."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from chatglm.engine import Engine, QueueFullError
from chatglm.engine import pace as pace_module
from chatglm.engine.pace import FIRST_WAIT, HOLDS, LONGEST_WAIT, Pace
from chatglm.serving.errors import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time passes only where a test says so."""
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    return clock


def pace_of(tokens_per_second: float, length: int) -> Pace:
    pace = Pace()
    for _ in range(100):
        pace.worked(0.1, round(tokens_per_second / 10))
    pace.ended(length)
    return pace


def times_of(pace: Pace, count: int, held: int, refusals: int) -> list[float]:
    return [pace.retry_after("a", name, 1, 1000, held, 1, refusals) for name in range(count)]


def test_a_crowd_comes_back_one_by_one_and_soon_after_the_first_refusal() -> None:
    pace = pace_of(tokens_per_second=400, length=20)  # 20 requests a second
    first = times_of(pace, 220, held=80, refusals=0)
    assert first == sorted(first) and first[0] > 0.5 and FIRST_WAIT / 2 < first[-1] < FIRST_WAIT
    second = times_of(pace, 220, held=80, refusals=1)
    assert second == sorted(second)
    assert second[0] == pytest.approx((40 + 1) / 20 / 2, rel=0.05)  # half the time in which half of them end
    assert second[-1] == pytest.approx((40 + 220) / 20 / 2, rel=0.15)
    assert all(0.9 * LONGEST_WAIT < time < LONGEST_WAIT for time in times_of(pace_of(10, 2000), 1000, 80, 1)[20:])


def test_several_answers_wait_for_several_places_and_short_ones_for_less() -> None:
    def time_of(answers: int, room: float) -> float:
        return pace_of(400, 20).retry_after("a", "x", answers, room, held=0, clients=1, refusals=1)

    assert time_of(16, 1000) == pytest.approx(16 / 20 / 2, rel=0.02)
    assert time_of(1, 10) == pytest.approx(1 / 40 / 2, rel=0.02)


def test_each_client_has_its_own_line_and_its_part_of_the_speed() -> None:
    pace = pace_of(400, 20)
    times_of(pace, 10_000, held=40, refusals=1)
    assert times_of(pace, 1, held=40, refusals=1)[0] > LONGEST_WAIT / 6
    assert pace.retry_after("b", "x", 1, 1000, held=0, clients=2) == pytest.approx(2 / 20 / 2, rel=0.05)


def test_who_comes_back_when_told_is_known_once(clock: Clock) -> None:
    pace = Pace()
    told = pace.retry_after("a", "x", 1, 1000, held=1, clients=1)
    assert (pace.refusals("a", "x"), pace.refusals("b", "x")) == (0, 0)  # too early, and somebody else
    clock.now += told
    assert (pace.refusals("a", "y"), pace.refusals("a", "x"), pace.refusals("a", "x")) == (0, 1, 0)
    clock.now += pace.retry_after("a", "x", 1, 1000, held=1, clients=1, refusals=1)
    assert pace.refusals("a", "x") == 2
    clock.now += pace.retry_after("a", "x", 1, 1000, held=1, clients=1) + HOLDS + 0.1
    assert pace.refusals("a", "x") == 0  # too late


def test_what_is_not_known_and_what_was_long_ago() -> None:
    pace = Pace()
    unknown = times_of(pace, 300, held=80, refusals=0)
    assert unknown == sorted(unknown) and 0.5 < unknown[0] < unknown[-1] < FIRST_WAIT
    for _ in range(100):
        pace.worked(0.1, 1)
    for _ in range(300):
        pace.worked(0.1, 40)
    assert pace.seconds_per_request(100) == pytest.approx(100 / 400, rel=0.05)


# ---------------------------------------------------------------------------------------------------- a crowd


class Places(Engine):
    """The places of an engine, without a model: a test says when answers end."""

    statistics: Any = None
    waiting = 0

    def __init__(self, max_queue: int) -> None:
        self.max_batch, self.max_queue = 16, max_queue
        self._pace, self._held, self.statistics = Pace(), Counter(), SimpleNamespace(refused=0)


def seconds_of_a_crowd(clock: Clock, places: Places, step: float, late: float) -> float:
    """Seconds until 300 clients that ask at once, each three times at most, all have an answer of 12 tokens.

    Args:
        step: seconds in which each of the answers that run gets a token.
        late: a client comes back up to this many seconds after the time that it was told, as `openai` understands it.
    """
    rng, order, began = random.Random(0), itertools.count(), clock.now
    events: list[Any] = [(began, next(order), number, 0) for number in range(300)]  # when, -, client, its refusals
    queue: list[int] = []
    running: Counter[int] = Counter()
    answered = 0
    while answered < 300:
        clock.now, _, number, refusals = heapq.heappop(events)
        if refusals >= 0:
            request: Any = SimpleNamespace(ids=[number], limit=200, prompt_tokens=20)
            try:
                places._take_places([request])
            except QueueFullError as error:
                assert refusals < 2, "the third try was refused"
                wait = int(ApiError.of(error).headers["Retry-After-Ms"]) / 1000
                heapq.heappush(events, (clock.now + wait + late * rng.random(), next(order), number, refusals + 1))
                continue
            queue.append(number)
            if len(queue) + len(running) > 1:
                continue  # the engine is at work already
        else:
            tokens = len(running)
            running.update(list(running))
            for number in [number for number, count in running.items() if count > 12]:
                del running[number]
                answered += 1
                places._pace.ended(12)
                places._held -= Counter(places._held.keys())
            places._pace.worked(step, tokens)
        while queue and len(running) < places.max_batch:
            running[queue.pop(0)] = 1
        if running:
            heapq.heappush(events, (clock.now + step, next(order), -1, -1))
    return clock.now - began


@pytest.mark.parametrize("late", [0.0, 0.2])
@pytest.mark.parametrize("step", [0.005, 0.03, 0.3])
def test_a_crowd_that_is_refused_is_answered_in_twice_the_time_that_the_work_takes(
    clock: Clock, step: float, late: float
) -> None:
    work = seconds_of_a_crowd(clock, Places(max_queue=300), step, late)
    places = Places(max_queue=64)
    assert seconds_of_a_crowd(clock, places, step, late) < 2 * work
    assert places.statistics.refused > 200
