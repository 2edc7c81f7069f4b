"""How the page shows what was said, in a real browser: links, formulas, diagrams, lists, tables, waiting, stopping."""

# ruff: noqa: F401, F811 (the fixtures are those of the other tests of the page)
from __future__ import annotations

import contextlib
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from test_web_demo import (
    Server,
    Visitor,
    browser,
    expect,
    own_server,
    pytestmark,
    serve,
    visit,
)

SELECTED = """element => {
    getSelection().selectAllChildren(element)
    return getSelection().toString()
}"""


def test_links_go_where_they_say(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    text = visitor.ask_and_wait("links")
    addresses = visitor.answers.last.locator("a").evaluate_all("links => links.map(link => link.href)")
    assert [address for address in addresses if "test" in address] == [
        "https://a.test/?b=1&copy=2",
        "https://b.test/?c=3&lt=4",
        "https://c.test/d%20e?f=5&g=6",
        "https://d.test/?h=7&i=8",
    ]
    assert not [address for address in addresses if address.startswith("javascript")]
    assert "https://b.test/?c=3&lt=4" in text and text.endswith("a < b && c <b> d")
    visitor.check_inert()


def test_what_is_selected_is_what_was_written(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    question = "if a <b> & c &lt; `<i>`"
    visitor.ask_and_wait(question)
    assert visitor.questions.last.evaluate(SELECTED).strip() == "if a <b> & c &lt; <i>"
    assert "\u2060" not in visitor.page.locator("#chat").evaluate("element => element.textContent")
    visitor.button("Edit").first.click()
    expect(visitor.page.locator("#chat textarea")).to_have_value(question)
    visitor.page.locator("#chat textarea").press("Escape")
    expect(visitor.page.locator("#chat textarea")).to_have_count(0)
    expect(visitor.questions).to_have_count(1)


def test_formulas_of_several_lines_boxes_and_limits(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("mathematics")
    answer = visitor.answers.last
    expect(answer.locator(".katex")).to_have_count(5)
    expect(answer.locator(".katex-display mtable")).to_have_count(3)
    expect(answer.locator(".katex .fbox, .katex .boxpad")).not_to_have_count(0)
    expect(answer.locator("munderover")).to_have_count(1)  # limits above and below the sum, not beside it
    expect(answer.locator(".katex-error")).to_have_text(re.compile(r"\\frac\{1\}"))  # its source, not a hole
    above, sign = answer.evaluate(  # at the same moment: the page may be scrolling
        """answer => ["mtight", "mop"].map(part =>
            answer.querySelector(`.katex-html .mop .${part}`).getBoundingClientRect().toJSON())"""
    )
    assert above["y"] < sign["y"] + sign["height"]
    visitor.check_inert()


def test_a_copied_formula_is_its_source_once(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("formula")
    visitor.answers.last.evaluate(SELECTED)
    visitor.page.keyboard.press("ControlOrMeta+c")
    copied = visitor.page.evaluate("navigator.clipboard.readText()")
    assert [part.strip() for part in copied.split("$") if part.strip()] == [
        "The root is", r"\sqrt{2}", "and", r"\frac{a_1}{b^2} = c", "as", "x*y*z", "shows.",
    ]  # fmt: skip


def test_tasks_and_columns(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("tables")
    boxes = visitor.answers.last.get_by_role("checkbox")
    expect(boxes).to_have_count(2)
    expect(boxes.first).to_be_checked()
    expect(boxes.first).to_have_accessible_name("done")
    expect(boxes.last).not_to_be_checked()
    expect(boxes.last).to_be_visible()
    styles = visitor.answers.last.locator("li, td").evaluate_all(
        "all => all.map(one => getComputedStyle(one)[one.matches('li') ? 'listStyleType' : 'textAlign'])"
    )
    assert styles[:2] == ["none", "none"] != styles[2:3] and styles[3:] == ["left", "center", "right"]


def test_a_diagram_is_drawn_and_one_that_cannot_be_shows_its_source(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("diagram")
    expect(visitor.answers.last.locator(".mermaid svg")).to_be_visible()
    expect(visitor.answers.last.locator(".mermaid svg")).to_contain_text("one")
    visitor.ask_and_wait("bomb")
    expect(visitor.answers.last.locator(".mermaid pre")).to_have_text(re.compile(r"A\[one --> B\{<img src=x"))
    expect(visitor.answers.last).to_contain_text("That is it.")
    expect(visitor.page.locator("svg[aria-roledescription=error], #chat img")).to_have_count(0)
    assert visitor.page.evaluate("window.pwned") is None


@pytest.mark.parametrize(("language", "place"), [("en-US", "Waiting, 2 before you"), ("zh-CN", "前面还有 2 个")])
def test_who_waits_is_told_how_long_and_can_stop(visit: Callable[..., Visitor], language: str, place: str) -> None:
    visitor = visit(locale=language)
    visitor.ask("queued")
    expect(visitor.speed).to_contain_text(place)
    visitor.stop.click()
    expect(visitor.box).to_have_value("queued")  # nothing was said: the question is not lost
    expect(visitor.send).to_be_visible()
    expect(visitor.questions).to_have_count(0)
    expect(visitor.speed).to_have_text("")
    visitor.box.fill("active")
    visitor.box.press("Enter")
    expect(visitor.answers.last).to_have_text("active: 0")


def test_who_waits_does_not_stop_the_others(visit: Callable[..., Visitor]) -> None:
    with contextlib.closing(Server("tests/fake_page.py", "2", "--max-batch", "1")) as server:
        visitor = visit(url=server.url)
        visitor.ask("forever")
        expect(visitor.answers.last).to_contain_text("3 4 5")
        for other in (visit(url=server.url), visit(url=server.url)):
            other.ask("queued")
            expect(other.speed).to_contain_text("Waiting")
        visitor.stop.click()
        expect(visitor.speed).to_contain_text("stopped")


def test_messages_of_gradio_are_in_the_visitors_language(visit: Callable[..., Visitor]) -> None:
    visitor = visit(locale="zh-CN")
    visitor.box.fill("boom")
    visitor.box.press("Enter")
    expect(visitor.page.locator(".toast-title")).to_have_text("注意")
    expect(visitor.page.locator("html")).to_have_attribute("lang", "zh-CN")


def test_large_requests_are_refused_by_the_page(serve: Callable[[int], str]) -> None:
    url = serve(2)
    body = b'{"session_hash": "x", "fn_index": 0, "data": [' + b"[]," * 1_000_000 + b"1]}"
    request = urllib.request.Request(f"{url}gradio_api/queue/join", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="413") as refused:
        urllib.request.urlopen(request)
    refused.value.close()
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60) as client:
        client.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")  # before any of the body
    with urllib.request.urlopen(urllib.request.Request(url, headers={"accept-language": "zh-CN"})) as response:
        text = response.read().decode()
    assert '<html\n\tlang="zh-CN"' in text and "<title>ChatGLM2</title>" in text
