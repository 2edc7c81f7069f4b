"""The page about pictures in a real browser: upload, paste, a description at once, more questions, clear."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_pictures_reading import BAD
from test_web_demo import CHROMIUM, PATIENCE, Server, expect, sync_api
from tiny_visualglm import picture_bytes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = Server(str(Path(__file__).with_name("fake_picture_page.py")))
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)


@pytest.fixture(params=["zh-CN", "en-US"])
def page(browser: Any, url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(locale=request.param, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(url)
    expect(opened.locator("#box textarea")).to_be_visible()
    yield opened
    assert errors == []
    context.close()


def answers(page: Any) -> Any:
    return page.locator("#chat [data-testid=bot]")


def upload(page: Any, data: bytes, name: str = "picture.png") -> None:
    page.locator("#picture input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def ask(page: Any, question: str) -> None:
    page.locator("#box textarea").fill(question)
    page.locator("#box textarea").press("Enter")


def test_a_visit(page: Any) -> None:
    chinese = page.evaluate("navigator.language") == "zh-CN"
    describe = "描述这张图片。" if chinese else "Describe this picture."
    expect(page.locator("#clear")).to_have_text("清空" if chinese else "Clear")
    upload(page, picture_bytes())
    expect(answers(page)).to_have_text([re.compile(rf"{re.escape(describe)} \| 20x30 \| 0 before")])
    ask(page, "<img>/etc/passwd</img> & <b>?")
    mark = "\u2060?"  # display.MARK makes tags inert
    typed = f"<{mark}img>/etc/passwd<{mark}/img> & <{mark}b>"
    expect(answers(page).last).to_have_text(re.compile(typed + r"\? \| 20x30 \| 1 before"))
    page.locator("#clear").click()
    expect(answers(page)).to_have_count(0)
    upload(page, picture_bytes(size=(40, 9)), "other.png")
    expect(answers(page)).to_have_text([re.compile(r"40x9 \| 0 before")])
    page.locator("#clear").click()
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#picture img")).to_have_count(0)
    ask(page, "你好")
    expect(answers(page)).to_have_text([re.compile(r"你好 \| nothing \| 0 before")])


@pytest.mark.parametrize("page", ["en-US"], indirect=True)
def test_a_question_during_an_answer_stays_in_the_box(page: Any) -> None:
    ask(page, "forever")
    expect(answers(page)).to_have_text([re.compile("forever")])
    ask(page, "more")
    expect(page.get_by_text("Still answering").first).to_be_visible()
    expect(page.locator("#box textarea")).to_have_value("more")
    page.locator("#box .stop-button").click()
    expect(page.locator("#box .submit-button")).to_be_visible()
    page.locator("#box textarea").press("Enter")
    expect(answers(page).last).to_have_text(re.compile(r"more \| nothing \| 1 before"))


@pytest.mark.parametrize("page", ["en-US"], indirect=True)
@pytest.mark.parametrize("button", ["#clear", "#picture button[aria-label='Remove Image']"])
def test_an_answer_that_is_left_shows_no_more(page: Any, button: str) -> None:
    upload(page, picture_bytes())
    expect(answers(page)).to_have_text([re.compile(r"20x30 \| 0 before")])
    expect(page.locator("#box .submit-button")).to_be_visible()
    ask(page, "forever")
    expect(answers(page).last).to_contain_text(re.compile(r"forever \d\d"))
    page.locator(button).click()
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#picture img")).to_have_count(0)
    ask(page, "next")
    expect(answers(page)).to_have_text([re.compile(r"next \| nothing \| 0 before")])


@pytest.mark.parametrize("page", ["en-US"], indirect=True)
def test_a_pasted_picture(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async data => {
            const blob = await (await fetch("data:image/png;base64," + data)).blob()
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})])
        }""",
        base64.b64encode(picture_bytes(size=(11, 13))).decode(),
    )
    page.locator("#picture button[aria-label*=lipboard], #picture button[title*=lipboard]").first.click()
    expect(answers(page)).to_have_text([re.compile(r"11x13 \| 0 before")])


@pytest.mark.parametrize("page", ["en-US"], indirect=True)
def test_damaged_pictures_are_one_line(page: Any) -> None:
    for name in ("half of a png", "text", "a billion pixels", "no width"):
        upload(page, BAD[name], f"{name}.png")
        expect(answers(page)).to_have_text([re.compile(r"^Error: [^\n]{10,200}\s*$")])
        page.locator("#clear").click()
        expect(answers(page)).to_have_count(0)
