"""The page's modes in a real browser: tools that run, code with a picture, calls that wait for the visitor."""

# ruff: noqa: F401, F811 (the fixtures are those of the other tests of the page)
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from test_front_calls import MODULE, isolation
from test_web_demo import Server, Visitor, browser, expect, pytestmark, serve, visit

DOORS = "tests/scripted_doors.py"


@pytest.fixture(scope="module")
def tools_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("tools") / "mine.py"
    file.write_text(MODULE)
    server = Server(DOORS, "web", "--tools-module", str(file))
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def code_page() -> Iterator[str]:
    isolation()
    server = Server(DOORS, "web", "--interpreter")
    yield server.url
    server.close()


def choose(visitor: Visitor, mode: str) -> None:
    visitor.open_side()
    visitor.page.locator(f"#mode input[value={mode}]").check()
    visitor.close_side()


def history(visitor: Visitor) -> list[dict[str, str]]:
    visitor.page.wait_for_function("Object.entries(localStorage).some(([key]) => key.includes('/'))")
    newest = visitor.stored()[0]
    return list(newest["history"])


def test_a_question_is_answered_through_a_call(visit: Callable[..., Visitor], tools_page: str) -> None:
    visitor = visit(url=tools_page)
    visitor.ask("What is 6 * 7?")
    expect(visitor.answers.last).to_have_text("It is 42.")
    visitor.wait_until_free()
    call = visitor.page.locator("#chat").get_by_text("tool_call")
    expect(call).to_be_hidden()  # folded
    visitor.page.locator("#chat").get_by_text("calculate").click()
    expect(call).to_be_visible()
    assert [one["role"] for one in history(visitor)] == ["user", "assistant", "observation", "assistant"]
    assert history(visitor)[2]["content"] == "42"
    visitor.page.reload()
    expect(visitor.answers.last).to_have_text("It is 42.")


def test_a_call_waits_for_the_visitor_who_may_edit_or_refuse_it(
    visit: Callable[..., Visitor], tools_page: str
) -> None:
    visitor = visit(url=tools_page)
    visitor.ask("Write it down")
    pending = visitor.page.locator("#pending textarea")
    expect(pending).to_have_value('{"text": "hello"}')
    visitor.wait_until_free()
    visitor.page.locator("#refuse").click()
    expect(visitor.answers.last).to_have_text("As you wish.")
    expect(pending).to_be_hidden()
    visitor.wait_until_free()
    visitor.ask("Write it down")
    expect(pending).to_have_value('{"text": "hello"}')
    visitor.wait_until_free()
    pending.fill('{"text": 3')
    visitor.page.locator("#run").click()
    expect(visitor.page.get_by_text("Expecting ',' delimiter")).to_be_visible()
    pending.fill('{"text": "hello"}')
    visitor.page.locator("#run").click()
    expect(visitor.answers.last).to_have_text("Done.")


def test_modes_have_chats_of_their_own(visit: Callable[..., Visitor], tools_page: str) -> None:
    visitor = visit(url=tools_page)
    visitor.ask_and_wait("one")
    choose(visitor, "chat")
    expect(visitor.questions).to_have_count(0)
    visitor.ask_and_wait("two")
    visitor.ask("What is 6 * 7?")  # without tools, a call is an answer that nobody runs
    visitor.wait_until_free()
    expect(visitor.answers.get_by_text("It is 42.")).to_have_count(0)
    choose(visitor, "tools")
    expect(visitor.questions).to_have_text(["one"])
    choose(visitor, "chat")
    expect(visitor.questions).to_have_text(["two", "What is 6 * 7?"])


def test_code_gives_a_picture_and_a_file(visit: Callable[..., Visitor], code_page: str) -> None:
    visitor = visit(url=code_page)
    visitor.ask("Plot it")
    pending = visitor.page.locator("#pending textarea")
    expect(pending).to_have_value(re.compile(r"print\(6 \* 7\)"))
    expect(visitor.answers.first).to_have_text("I draw.")
    visitor.wait_until_free()
    visitor.page.locator("#run").click()
    picture = visitor.page.locator("#chat img[src^='data:image/png;base64,']")
    expect(picture).to_be_visible()
    assert picture.evaluate("one => one.naturalWidth") == 1
    expect(visitor.answers.last).to_have_text("Here is the picture.")
    visitor.wait_until_free()
    visitor.page.reload()  # the picture is kept with the chat
    expect(picture).to_be_visible()
    visitor.open_side()
    visitor.page.locator("#made input").click()
    visitor.page.get_by_role("option", name="made.txt").click()
    with visitor.page.expect_download() as download:
        visitor.page.locator("#fetch").click()
    assert Path(download.value.path()).read_text() == "made here"


def test_code_can_be_edited_and_stopped(visit: Callable[..., Visitor], code_page: str) -> None:
    visitor = visit(url=code_page)
    visitor.ask("Print 5")
    pending = visitor.page.locator("#pending textarea")
    expect(pending).to_have_value("print(5)")
    visitor.wait_until_free()
    pending.fill("print(2 * 3)")
    visitor.page.locator("#run").click()
    expect(visitor.answers.last).to_have_text("Six.")
    visitor.wait_until_free()
    assert "print(2 * 3)" in history(visitor)[1]["content"]
    visitor.ask("Loop")
    expect(pending).to_have_value("while True: pass")
    visitor.wait_until_free()
    visitor.page.locator("#run").click()
    expect(visitor.speed).to_have_text("Running …")
    visitor.stop.click()
    expect(visitor.send).to_be_visible()
    visitor.page.wait_for_function("JSON.stringify(localStorage).includes('KeyboardInterrupt')")
    assert history(visitor)[-1]["role"] == "observation"


def test_code_runs_without_asking_if_the_visitor_wants_it(visit: Callable[..., Visitor], code_page: str) -> None:
    visitor = visit(url=code_page)
    visitor.open_side()
    visitor.page.locator("#auto input").check()
    visitor.close_side()
    visitor.ask("Print 5")
    expect(visitor.answers.last).to_have_text("Five.")
    visitor.wait_until_free()
    with visitor.page.expect_file_chooser() as chooser:
        visitor.open_side()
        visitor.page.locator("#upload").click()
    chooser.value.set_files({"name": "../a b.csv", "mimeType": "text/csv", "buffer": b"1,2"})
    expect(visitor.speed).to_contain_text("Uploaded: a_b.csv")
    visitor.close_side()
    visitor.ask("And now?")
    expect(visitor.questions.last).to_contain_text("#File: /mnt/data/a_b.csv")
