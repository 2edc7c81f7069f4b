"""The page for everyone: axe-core finds no serious fault in it, and every function works by keyboard alone."""

# ruff: noqa: F401, F811 (the fixtures are those of the other tests of the page)
from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from test_web_demo import (
    PATIENCE,
    ROOT,
    Server,
    Visitor,
    browser,
    expect,
    own_server,
    pytestmark,
    serve,
    visit,
)

AXE = Path(os.environ.get("AXE_CORE", ROOT / "node_modules/axe-core/axe.min.js"))
needs_axe = pytest.mark.skipif(
    not AXE.exists(), reason="no axe-core here: npm install --no-save axe-core, or name its axe.min.js in $AXE_CORE"
)
DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True},
}


def faults(page: Any) -> list[str]:
    """What axe-core finds on the page as it is, serious or critical."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    page.wait_for_function("document.getAnimations().every(one => one.effect.getTiming().duration > 1000)")  # faded in
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [
        f"{fault['id']} ({fault['impact']}): {node['html'][:200]} {node['failureSummary']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


@needs_axe
@pytest.mark.parametrize(  # each two of them meet: words, colours and widths have nothing to do with one another
    ("language", "scheme", "device"),
    [("en-US", "light", "desktop"), ("en-US", "dark", "phone"), ("zh-CN", "light", "phone"),
     ("zh-CN", "dark", "desktop")],
)  # fmt: skip
def test_axe_finds_no_serious_fault(visit: Callable[..., Visitor], language: str, scheme: str, device: str) -> None:
    visitor = visit(3, locale=language, color_scheme=scheme, reduced_motion="reduce", **DEVICES[device])
    seen = {"at first": faults(visitor.page)}
    for question in ("mathematics", "colours", "tables", "links", "call"):
        visitor.ask(question)
        expect(visitor.speed).to_contain_text(re.compile("tokens/s|词元/秒"))
        expect(visitor.send).to_be_visible()
    seen["a conversation"] = faults(visitor.page)
    visitor.box.fill("boom")
    visitor.box.press("Enter")
    expect(visitor.page.locator(".toast-body")).to_be_visible()
    seen["an error"] = faults(visitor.page)
    visitor.ask("queued")
    expect(visitor.speed).to_contain_text("2")
    seen["waiting"] = faults(visitor.page)
    visitor.page.keyboard.press("Escape")
    expect(visitor.send).to_be_visible()
    visitor.open_side()
    seen["settings and chats"] = faults(visitor.page)
    assert not any(seen.values()), seen


@needs_axe
def test_axe_finds_no_serious_fault_at_the_login(browser: Any) -> None:
    with contextlib.closing(Server("tests/fake_page.py", "2", "--auth", "me:secret")) as server:
        context = browser.new_context(locale="en-US")
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(server.url)
        expect(page.get_by_role("button", name="Login")).to_be_visible()
        found = faults(page)
        context.close()
    assert found == []


def reach(visitor: Visitor, place: Any, key: str = "Tab") -> None:
    """Moves the focus with this key alone until it is on the place, or in it."""
    for _ in range(80):
        visitor.page.keyboard.press(key)
        if place.evaluate("place => place.contains(document.activeElement)"):
            return
    raise AssertionError(f"{place} cannot be reached with {key}")


def focused(visitor: Visitor) -> str:
    return visitor.page.evaluate("document.activeElement.closest('[id]:not([id^=component])')?.id ?? ''")


def test_a_conversation_by_keyboard(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    keyboard = visitor.page.keyboard
    expect(visitor.box).to_be_focused()  # one can type at once
    reach(visitor, visitor.page.get_by_role("button", name="Hello"), "Shift+Tab")
    keyboard.press("Enter")
    expect(visitor.answers.last).to_have_text("[user] Hello")
    visitor.wait_until_free()
    reach(visitor, visitor.box)
    keyboard.type("attempt")
    keyboard.press("Enter")
    expect(visitor.answers.last).to_contain_text("attempt:")
    visitor.wait_until_free()
    first = visitor.answers.last.inner_text()
    reach(visitor, visitor.button("Retry"), "Shift+Tab")
    keyboard.press("Enter")
    expect(visitor.answers.last).not_to_have_text(first)
    visitor.wait_until_free()
    reach(visitor, visitor.button("Copy message").last, "Shift+Tab")
    keyboard.press("Enter")
    copied = visitor.answers.last.inner_text().strip()
    visitor.page.wait_for_function("text => navigator.clipboard.readText().then(now => now === text)", arg=copied)
    reach(visitor, visitor.button("Edit").first, "Shift+Tab")
    keyboard.press("Enter")
    area = visitor.page.locator("#chat textarea")
    expect(area).to_be_focused()
    expect(area).to_have_accessible_name("Edit the question")
    keyboard.press("End")
    keyboard.type(", you")
    reach(visitor, visitor.button("Submit"))
    keyboard.press("Enter")
    expect(visitor.answers).to_have_text(["[user] Hello, you"])
    visitor.wait_until_free()
    reach(visitor, visitor.button("Undo"), "Shift+Tab")
    keyboard.press("Enter")
    expect(visitor.box).to_have_value("Hello, you")


def test_escape_stops_and_closes(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("forever")
    expect(visitor.answers.last).to_contain_text("3 4 5")
    expect(visitor.stop).to_have_accessible_name("Stop (Esc)")
    visitor.page.keyboard.press("Escape")
    expect(visitor.speed).to_contain_text("stopped")
    expect(visitor.send).to_have_accessible_name("Send")
    reach(visitor, visitor.page.locator("#side .toggle-button"), "Shift+Tab")
    visitor.page.keyboard.press("Enter")
    expect(visitor.page.locator("#new")).to_be_in_viewport(ratio=1)
    reach(visitor, visitor.page.locator("#new"))
    visitor.page.keyboard.press("Escape")
    expect(visitor.page.locator("#side")).not_to_have_class(re.compile(r"\bopen\b"))
    expect(visitor.page.locator("#side .toggle-button")).to_be_focused()


def test_the_sidebar_by_keyboard(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    keyboard, toggle = visitor.page.keyboard, visitor.page.locator("#side .toggle-button")
    visitor.ask_and_wait("first")
    expect(toggle).to_have_attribute("aria-expanded", "false")
    visited = set()
    for _ in range(40):  # all around: nothing of the closed sidebar
        keyboard.press("Tab")
        visited.add(focused(visitor))
    assert not visited & {"new", "delete", "chats", "side-content", "max_length", "top_p", "temperature"}
    assert {"side", "box"} <= visited
    reach(visitor, toggle)
    keyboard.press("Enter")
    expect(toggle).to_have_attribute("aria-expanded", "true")
    reach(visitor, visitor.page.locator("#new"))
    keyboard.press("Enter")
    expect(visitor.questions).to_have_count(0)
    for name in ("max_length", "top_p", "temperature"):
        reach(visitor, visitor.page.locator(f"#{name} input[type=range]"))
    keyboard.press("Home")
    expect(visitor.page.locator("#temperature input[type=number]")).to_have_value("0")
    chat = visitor.page.get_by_text("first", exact=True)
    reach(visitor, visitor.page.locator("#chats tr, #chats li, #chats .gallery-item").filter(has=chat), "Shift+Tab")
    keyboard.press("Enter")
    expect(visitor.questions).to_have_text(["first"])
    reach(visitor, visitor.page.locator("#delete"))
    keyboard.press("Enter")
    expect(visitor.questions).to_have_count(0)


@pytest.mark.parametrize(("language", "you", "send"), [("en-US", "You", "Send"), ("zh-CN", "你", "发送")])
def test_who_speaks_and_what_things_are(
    visit: Callable[..., Visitor], language: str, you: str, send: str
) -> None:
    visitor = visit(3, locale=language)
    visitor.ask("formula")
    expect(visitor.answers.last.locator(".katex")).to_have_count(3)
    expect(visitor.page.locator("#speed")).to_contain_text("/")
    speakers = visitor.page.get_by_role("article")
    expect(speakers).to_have_count(2)
    expect(speakers.first).to_have_accessible_name(you)
    expect(speakers.last).to_have_accessible_name("ChatGLM3")
    expect(visitor.page.locator("#speed")).to_have_role("status")
    expect(visitor.send).to_have_accessible_name(send)
    expect(visitor.box).to_have_accessible_name("Message" if language == "en-US" else "消息")
    visitor.open_side()
    for name, text in (("top_p", "Top P"), ("temperature", "Temperature" if language == "en-US" else "温度")):
        expect(visitor.page.locator(f"#{name} input[type=range]")).to_have_accessible_name(text)
        expect(visitor.page.locator(f"#{name} input[type=number]")).to_have_accessible_name(re.compile(text))
    unnamed = visitor.page.locator("button, input, textarea").evaluate_all(
        "all => all.filter(one => one.checkVisibility() && !one.labels?.length && !one.textContent.trim()"
        " && !one.ariaLabel && !one.title).map(one => one.outerHTML)"
    )
    assert unnamed == []
