"""The page with GLM-4's demo in a real browser: an answer, and a round with a tool in JSON."""

# ruff: noqa: F401, F811 (the fixtures are those of the other tests of the page)
from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from chatglm.demo import FOLDERS
from test_web_demo import Server, Visitor, browser, expect, pytestmark, serve, visit
from tools.demo import corpus

TOOLS = FOLDERS[4].parent / "tools.json"


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    server = Server("web_demo.py", "--model", str(FOLDERS[4]))
    yield server.url
    server.close()


def test_a_question_and_a_call(visit: Callable[..., Visitor], page: str) -> None:
    visitor = visit(url=page)
    assert visitor.ask_and_wait("Hello") == corpus.INTENTS["hello"]["en"]
    visitor.open_side()
    visitor.page.locator("#mode input[value=tools]").check()
    visitor.page.locator("#tools textarea").fill(TOOLS.read_text(encoding="utf-8"))
    visitor.close_side()
    visitor.ask("What is the weather in London?")
    visitor.wait_until_free()
    visitor.page.locator("#chat").get_by_text("get_weather").first.click()
    expect(visitor.answers.last).to_contain_text('{"city": "London"}')
    visitor.ask_and_wait('{"weather": "sunny", "temperature": 12}', drawn=2)
    expect(visitor.answers.last).to_have_text(re.compile("The weather in London: sunny, 12 degrees"))
