"""Refused requests are told times at which there are places for them."""

from __future__ import annotations

import pytest

from chatglm.engine.pace import FIRST_WAIT, LONGEST_WAIT, Pace


def pace_of(tokens_per_second: float, length: int) -> Pace:
    pace = Pace()
    for _ in range(100):
        pace.worked(0.1, round(tokens_per_second / 10))
    pace.ended(length)
    return pace


def test_a_crowd_comes_back_one_by_one_at_the_rate_at_which_requests_end() -> None:
    pace = pace_of(tokens_per_second=400, length=20)  # 20 requests a second
    times = [pace.retry_after("a", 1, 1000, held=80, clients=1) for _ in range(220)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(2.0 + 0.05, abs=0.02)  # when half of the places are free
    assert times[-1] == pytest.approx(2.0 + 220 / 20, abs=0.1)


def test_several_answers_wait_for_several_places_and_short_ones_for_less() -> None:
    assert pace_of(400, 20).retry_after("a", 16, 1000, held=0, clients=1) == pytest.approx(16 / 20)
    assert pace_of(400, 20).retry_after("a", 1, 10, held=0, clients=1) == pytest.approx(1 / 40)


def test_each_client_has_its_own_line_and_its_part_of_the_speed() -> None:
    pace = pace_of(400, 20)
    for _ in range(10_000):
        hammering = pace.retry_after("hammer", 1, 1000, held=40, clients=2)
    assert hammering == LONGEST_WAIT
    assert pace.retry_after("other", 1, 1000, held=0, clients=2) == pytest.approx(2 / 20)


def test_what_is_not_known_and_what_was_long_ago() -> None:
    pace = Pace()
    assert pace.retry_after("a", 1, 100, held=80, clients=1) == FIRST_WAIT
    for _ in range(100):
        pace.worked(0.1, 1)
    for _ in range(300):
        pace.worked(0.1, 40)
    assert pace.seconds_per_request(100) == pytest.approx(100 / 400, rel=0.05)
