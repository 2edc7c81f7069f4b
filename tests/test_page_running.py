"""What follows an answer on the page waits until the browser has drawn it (`chatglm.front.page.running`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

running = pytest.importorskip("chatglm.front.page.running", reason="needs gradio")
ONE, OTHER = (SimpleNamespace(session_hash=name) for name in ("one", "other"))


def answer(answers: Any, request: Any = ONE) -> Iterator[str]:
    with answers.answering(request) as mine:
        while mine is not None and not mine.is_left and not mine.cancel.is_set():
            yield "more"


async def is_waiting(task: asyncio.Task[Any]) -> bool:
    for _ in range(20):
        await asyncio.sleep(0)
    return not task.done()


async def begun() -> tuple[Any, Iterator[str]]:
    answers = running.RunningAnswers()
    assert await answers.begin(ONE)
    steps = answer(answers)
    assert next(steps) == "more"
    return answers, steps


@pytest.mark.parametrize("follow", [lambda answers: answers.leave(ONE), lambda answers: answers.begin(ONE)])
def test_what_follows_waits_until_the_answer_is_drawn(follow: Callable[[Any], Any]) -> None:
    async def main() -> None:
        answers, steps = await begun()
        assert await answers.begin(OTHER)  # others do not wait
        answers.get(ONE).cancel.set()
        assert list(steps) == []
        task = asyncio.ensure_future(follow(answers))
        assert await is_waiting(task)
        assert not await answers.drawn(ONE)  # whoever waits decides what the page shows
        await task
        assert answers.get(OTHER) is not None

    asyncio.run(main())


def test_leaving_ends_an_answer_and_discards_the_rest() -> None:
    async def main() -> None:
        answers, steps = await begun()
        task = asyncio.ensure_future(answers.leave(ONE))
        assert await is_waiting(task)
        assert answers.get(ONE).cancel.is_set() and list(steps) == []
        assert await is_waiting(task)  # the browser may still be drawing what came before
        await answers.drawn(ONE)
        await task
        assert answers.get(ONE) is None

    asyncio.run(main())


def test_there_is_one_answer_at_a_time() -> None:
    async def main() -> None:
        answers, steps = await begun()
        assert not await answers.begin(ONE)
        assert list(answer(answers)) == []  # nor is one computed twice
        assert not await answers.drawn(ONE)  # which does not end the first
        assert next(steps) == "more"

    asyncio.run(main())


def test_an_answer_that_is_left_before_it_begins_shows_nothing() -> None:
    async def main() -> None:
        answers = running.RunningAnswers()
        assert await answers.begin(ONE)
        task = asyncio.ensure_future(answers.leave(ONE))
        assert await is_waiting(task)
        assert list(answer(answers)) == []
        await answers.drawn(ONE)
        await task

    asyncio.run(main())


def test_nobody_waits_for_a_browser_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        answers, steps = await begun()
        steps.close()  # type: ignore[attr-defined]  # as gradio does when the connection breaks
        assert await answers.begin(ONE)
        answers.close(ONE)
        assert answers.get(ONE) is None and await answers.begin(ONE)
        monkeypatch.setattr(running, "WAIT", 0.01)
        await answers.leave(ONE)
        assert answers.get(ONE) is None

    asyncio.run(main())
