"""What gradio logs of requests that fail: why, but not their inputs, and not as often as a client likes."""

from __future__ import annotations

import logging

import pytest

from chatglm.front.page import log


def fail(brief: log.BriefTraceback, message: str) -> None:
    try:
        raise ValueError(message)
    except ValueError:
        brief.print_exc()


def test_errors_are_logged_in_brief_and_once_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    brief = log.BriefTraceback()
    for _ in range(50):
        fail(brief, "not enough inputs: " + "x" * 1_000_000)
    now += log.SECONDS_APART
    fail(brief, "another")
    first, second = (record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert "not enough inputs: x" in first and __file__ in first and len(first) < 2000
    assert "(49 more" in second and "another" in second


def test_without_an_error_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    log.BriefTraceback().print_exc()
    assert not caplog.records
