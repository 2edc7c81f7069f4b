"""Refused requests are told times at which there are places for them."""

from __future__ import annotations

import pytest

from chatglm.engine import pace as pace_module
from chatglm.engine.pace import FIRST_WAIT, HOLDS, LONGEST_WAIT, Pace


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


def test_who_comes_back_when_told_is_known_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now)
    pace = Pace()
    told = pace.retry_after("a", "x", 1, 1000, held=1, clients=1)
    assert (pace.refusals("a", "x"), pace.refusals("b", "x")) == (0, 0)  # too early, and somebody else
    now += told
    assert (pace.refusals("a", "y"), pace.refusals("a", "x"), pace.refusals("a", "x")) == (0, 1, 0)
    now += pace.retry_after("a", "x", 1, 1000, held=1, clients=1, refusals=1)
    assert pace.refusals("a", "x") == 2
    now += pace.retry_after("a", "x", 1, 1000, held=1, clients=1) + HOLDS + 0.1
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
