"""The web page in a real browser, as a visitor uses it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import web_demo

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need the Python package playwright")
expect = sync_api.expect

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium-headless-shell"
)
PATIENCE = int(os.environ.get("PATIENCE", 60)) * 1000  # milliseconds; much, for a busy machine


class Server:
    """web_demo.py in a process of its own."""

    def __init__(self, script: str, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process = subprocess.Popen(
            [sys.executable, "-u", script, *arguments, "--port", str(self.port)],
            cwd=ROOT, env={**_environment(), "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.output = ""
        assert self.process.stdout is not None
        while "Running on local URL" not in self.output:
            ready, _, _ = select.select([self.process.stdout], [], [], 120)
            line = self.process.stdout.readline().decode() if ready else ""
            if not line:
                self.process.kill()
                self.process.communicate()
                raise AssertionError(f"the server did not start: {self.output}")
            self.output += line

    def close(self) -> None:
        """Ends it with Ctrl-C, which has to suffice."""
        self.process.send_signal(signal.SIGINT)
        try:
            rest = self.process.communicate(timeout=PATIENCE / 1000)[0].decode()
        finally:
            self.process.kill()
            self.process.wait()
        assert self.process.returncode == 0 and "KeyboardInterrupt" not in rest, rest


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GRADIO")}


class Visitor:
    """A browser tab with the page."""

    def __init__(self, context: Any, url: str) -> None:
        self.url = url
        self.page = context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._check_request)
        self.page.goto(url)
        self.box = self.page.locator("#box textarea")
        self.answers = self.page.locator("#chat [data-testid=bot]")
        self.questions = self.page.locator("#chat [data-testid=user]")
        self.speed = self.page.locator("#speed")
        self.send = self.page.locator("#box .submit-button")
        self.stop = self.page.locator("#box .stop-button")
        expect(self.send).to_be_visible()

    def _check_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def ask(self, question: str) -> None:
        """Asks and waits until the question is in the chat; the answer is yet to come."""
        self.box.fill(question)
        self.box.press("Enter")
        expect(self.box).to_have_value("")

    def ask_and_wait(self, question: str) -> str:
        before = self.answers.count()
        self.ask(question)
        expect(self.answers).to_have_count(before + 1)
        self.wait_until_free()
        return self.answers.last.inner_text().strip()

    def wait_until_free(self) -> None:
        expect(self.speed).to_contain_text("tokens/s")
        expect(self.send).to_be_visible()

    def history(self) -> Any:
        """What the model gets as history."""
        return json.loads(self.ask_and_wait("history"))

    def settings(self) -> dict[str, Any]:
        return json.loads(self.ask_and_wait("settings"))

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def open_side(self) -> None:
        self.page.locator("#side .toggle-button").click()
        expect(self.page.locator("#new")).to_be_in_viewport(ratio=1)

    def check_inert(self) -> None:
        assert self.page.evaluate("window.pwned") is None
        assert self.page.locator("#chat .message :is(script, img, style, iframe, [onload], [onerror])").count() == 0
        assert self.page.locator("a[href^=javascript], a[href*='pwned']").count() == 0
        assert not self.errors and not self.elsewhere


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[int], str]]:
    servers: dict[int, Server] = {}

    def start(version: int) -> str:
        if version not in servers:
            servers[version] = Server("tests/fake_page.py", str(version))
        return servers[version].url

    yield start
    with contextlib.ExitStack() as stack:  # if one ends badly, the others are stopped all the same
        for server in servers.values():
            stack.callback(server.close)


@pytest.fixture
def serve_once() -> Iterator[Callable[..., str]]:
    """A server of a test's own: its address."""
    servers: list[Server] = []

    def start(script: str, *arguments: str) -> str:
        servers.append(Server(script, *arguments))
        return servers[-1].url

    yield start
    with contextlib.ExitStack() as stack:
        for one in servers:
            stack.callback(one.close)


@pytest.fixture
def visit(browser: Any, serve: Callable[[int], str]) -> Iterator[Callable[..., Visitor]]:
    """Opens the page in a browser of its own; at the end no page may have failed or asked elsewhere."""
    visitors: list[Visitor] = []

    def come(version: int = 2, url: str = "", **options: Any) -> Visitor:
        given = {"locale": "en-US", "permissions": ["clipboard-read", "clipboard-write"]} | options
        context = browser.new_context(**given)
        context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        visitors.append(Visitor(context, url or serve(version)))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.page.context.close()
        assert not visitor.errors and not visitor.elsewhere


def test_an_answer_streams_and_a_stop_keeps_it_and_ends_the_computation(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("forever")
    expect(visitor.answers.last).to_contain_text("3 4 5")
    expect(visitor.answers.last).to_contain_text("30 31 32")  # it grows
    expect(visitor.send).to_be_hidden()
    visitor.stop.click()
    expect(visitor.speed).to_contain_text("stopped")
    expect(visitor.send).to_be_visible()
    expect(visitor.stop).to_be_hidden()
    said = visitor.answers.last.inner_text().strip()
    assert re.fullmatch(r"0 1 2 [\d ]+", said)
    assert visitor.ask_and_wait("active") == "active: 0"
    ((question, answer), _) = visitor.history()
    assert (question, answer.strip()) == ("forever", said)


def test_chinese_is_asked_and_answered_and_counted(visit: Callable[..., Visitor]) -> None:
    visitor = visit(locale="zh-CN")
    expect(visitor.box).to_have_attribute("placeholder", re.compile("输入消息"))
    visitor.box.press_sequentially("你好，世界")
    visitor.send.click()
    expect(visitor.answers.last).to_have_text("[user] 你好，世界")
    expect(visitor.speed).to_have_text(re.compile(r"\[\d+ 个词元，\d+\.\d 词元/秒\]"))
    visitor.open_side()
    for text in ("新对话", "最大长度", "温度", "删除此对话"):
        expect(visitor.page.get_by_text(text).first).to_be_visible()


def test_several_lines(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.box.fill("one")
    visitor.box.press("Shift+Enter")
    visitor.box.press_sequentially("two")
    visitor.box.press("Enter")
    expect(visitor.answers.last).to_have_text(re.compile(r"\[user\] one\s*two"))
    visitor.wait_until_free()
    assert visitor.history() == [["one\ntwo", "[user] one\ntwo"]]


def test_nothing_is_asked_with_an_empty_box(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.box.fill("   ")
    # gradio takes no second Enter before it has handled the first.
    with visitor.page.expect_response(lambda response: response.request.method == "POST") as dealt_with:
        visitor.box.press("Enter")
    dealt_with.value.finished()
    visitor.page.evaluate("() => new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert visitor.ask_and_wait("history") == "[]"
    expect(visitor.questions).to_have_count(1)


@pytest.mark.parametrize("version", [2, 3])
def test_retry(visit: Callable[..., Visitor], version: int) -> None:
    visitor = visit(version)
    visitor.ask_and_wait("before")
    first = visitor.ask_and_wait("attempt")
    visitor.button("Retry").click()
    expect(visitor.answers.last).not_to_have_text(first)
    visitor.wait_until_free()
    expect(visitor.questions).to_have_text(["before", "attempt"])
    history = visitor.history()
    assert len(history) == (4 if version == 3 else 2)
    assert first not in json.dumps(history)


@pytest.mark.parametrize("version", [2, 3])
def test_undo_gives_the_question_back(visit: Callable[..., Visitor], version: int) -> None:
    visitor = visit(version)
    visitor.ask_and_wait("before")
    visitor.ask_and_wait("a < b && <i>")
    visitor.button("Undo").click()
    expect(visitor.box).to_have_value("a < b && <i>")
    expect(visitor.questions).to_have_text(["before"])
    visitor.box.fill("")
    assert len(visitor.history()) == (2 if version == 3 else 1)


@pytest.mark.parametrize("version", [2, 3])
def test_an_edited_question_is_answered_anew(visit: Callable[..., Visitor], version: int) -> None:
    visitor = visit(version)
    visitor.ask_and_wait("first <b>")
    visitor.ask_and_wait("second <i> $x$")
    visitor.ask_and_wait("third")
    visitor.button("Edit").nth(1).click()
    area = visitor.page.locator("#chat textarea")
    area.press("End")
    area.press_sequentially(" &amp;")
    visitor.button("Submit").click()
    expect(visitor.answers.last).to_contain_text("second <")
    expect(visitor.questions).to_have_count(2)
    visitor.wait_until_free()
    history = visitor.history()
    questions = [turn[0] for turn in history] if version == 2 else [turn["content"] for turn in history[::2]]
    assert questions == ["first <b>", "second <i> $x$ &amp;"]


@pytest.mark.parametrize("how", ["Clear", "new"])
def test_clearing_ends_the_answer_and_nothing_of_it_comes_back(visit: Callable[..., Visitor], how: str) -> None:
    visitor = visit()
    visitor.ask_and_wait("before")
    visitor.ask("forever")
    expect(visitor.answers.last).to_contain_text("3 4 5")
    if how == "Clear":
        visitor.button("Clear").click()
    else:
        visitor.open_side()
        visitor.page.locator("#new").click()
    expect(visitor.questions).to_have_count(0)
    expect(visitor.answers).to_have_count(0)
    expect(visitor.send).to_be_visible()
    assert visitor.history() == []
    assert visitor.ask_and_wait("active") == "active: 0"
    expect(visitor.questions).to_have_text(["history", "active"])


def test_while_one_answer_comes_no_second_is_asked_for(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("forever")
    expect(visitor.answers.last).to_contain_text("3 4 5")
    visitor.box.fill("second")
    visitor.box.press("Enter")
    visitor.stop.click()
    expect(visitor.speed).to_contain_text("stopped")
    expect(visitor.box).to_have_value("second")
    expect(visitor.questions).to_have_text(["forever"])
    expect(visitor.send).to_be_visible()
    visitor.box.press("Enter")
    expect(visitor.answers.last).to_have_text("[user] second")


def test_two_visitors_at_once(visit: Callable[..., Visitor]) -> None:
    one, two = visit(), visit(locale="zh-CN")
    one.ask_and_wait("I am one")
    one.ask("forever")
    expect(one.answers.last).to_contain_text("3 4 5")
    two.ask("history")
    expect(two.answers.last).to_contain_text("[]")
    expect(two.speed).to_contain_text("词元/秒")
    two.ask("active")
    expect(two.answers.last).to_have_text("active: 1")
    expect(one.stop).to_be_visible()
    expect(one.questions).to_have_text(["I am one", "forever"])
    one.stop.click()
    expect(one.speed).to_contain_text("stopped")
    assert [turn[0] for turn in one.history()] == ["I am one", "forever"]
    expect(two.questions).to_have_text(["history", "active"])


def test_a_closed_tab_ends_its_answer(visit: Callable[..., Visitor]) -> None:
    one, two = visit(), visit()
    one.ask("forever")
    expect(one.answers.last).to_contain_text("3 4 5")
    assert two.ask_and_wait("active") == "active: 1"
    one.page.close()
    deadline = time.monotonic() + PATIENCE / 1000
    while two.ask_and_wait("active") != "active: 0":
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("version", "sliders"),
    [
        (1, {"max_length": (4096, 2048), "top_p": (1, 0.7), "temperature": (1, 0.95)}),
        (2, {"max_length": (32768, 8192), "top_p": (1, 0.8), "temperature": (1, 0.95)}),
        (3, {"max_length": (32768, 8192), "top_p": (1, 0.8), "temperature": (1, 0.6)}),
    ],
)
def test_the_sliders(visit: Callable[..., Visitor], version: int, sliders: dict[str, tuple[int, float]]) -> None:
    visitor = visit(version)
    assert visitor.settings() == {name: default for name, (_, default) in sliders.items()}
    visitor.open_side()
    for name, (most, default) in sliders.items():
        slider = visitor.page.locator(f"#{name} input[type=range]")
        assert (float(slider.get_attribute("min") or -1), float(slider.get_attribute("max") or -1)) == (0, most)
        expect(slider).to_have_value(str(default))
    visitor.page.locator("#max_length input[type=number]").fill("512")
    visitor.page.locator("#temperature input[type=range]").press("Home")
    visitor.page.locator("#top_p input[type=number]").fill("0.5")
    visitor.page.locator("#top_p input[type=number]").blur()
    assert visitor.settings() == {"max_length": 512, "temperature": 0, "top_p": 0.5}
    visitor.page.locator("#max_length input[type=number]").fill("0")
    visitor.page.locator("#max_length input[type=number]").blur()
    assert visitor.settings()["max_length"] is None  # as long as the model can
    expect(visitor.page.locator("#system")).to_be_visible(visible=version == 3)


def test_system_prompt_and_tools_of_generation_3(visit: Callable[..., Visitor]) -> None:
    visitor = visit(3)
    visitor.open_side()
    visitor.page.locator("#system textarea").fill("Be <b>brief</b>.")
    tool = {"name": "get_weather", "description": "weather", "parameters": {}}
    visitor.page.locator("#tools textarea").fill(json.dumps([tool]))
    system = {"role": "system", "content": "Be <b>brief</b>.", "tools": [tool]}
    assert visitor.history() == [system]
    assert [turn["role"] for turn in visitor.history()] == ["system", "user", "assistant"]
    visitor.page.locator("#tools textarea").fill("[{")
    visitor.ask("x")
    expect(visitor.page.get_by_text("The tools must be a JSON list")).to_be_visible()
    visitor.page.locator("#tools textarea").fill("")
    visitor.page.locator("#system textarea").fill("")
    assert visitor.history()[0]["role"] == "user"


def test_a_tool_call_is_folded_and_its_result_is_asked_for(visit: Callable[..., Visitor]) -> None:
    visitor = visit(3)
    visitor.ask("call")
    title = visitor.page.locator("#chat").get_by_text("get_")
    expect(title).to_be_visible()
    visitor.wait_until_free()
    code = visitor.page.locator("#chat").get_by_text("tool_call")
    expect(code).to_be_hidden()
    expect(visitor.box).to_have_attribute("placeholder", re.compile("tool: enter its result"))
    title.click()
    expect(code).to_be_visible()
    visitor.check_inert()
    visitor.ask("sunny")
    expect(visitor.answers.last).to_have_text("[observation] sunny")
    visitor.wait_until_free()
    expect(visitor.box).to_have_attribute("placeholder", re.compile("Message"))
    assert [turn["role"] for turn in visitor.history()] == ["user", "assistant", "observation", "assistant"]


def test_formulas_are_mathml_and_the_model_gets_the_text(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("formula")
    expect(visitor.answers.last.locator("math")).to_have_count(3)
    expect(visitor.answers.last.locator("math[display=block] mfrac")).to_be_visible()
    visitor.wait_until_free()
    assert "<" not in visitor.answers.last.inner_text()
    visitor.button("Copy message").last.click()
    text = "The root is $\\sqrt{2}$ and\n$$\\frac{a_1}{b^2} = c$$\nas \\(x*y*z\\) shows."
    visitor.page.wait_for_function("text => navigator.clipboard.readText().then(copied => copied === text)", arg=text)
    assert visitor.history() == [["formula", text]]


def test_code_is_highlighted_and_keeps_its_lines(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("code")
    code = visitor.answers.last.locator("pre code")
    expect(code).to_have_text("for i in range(3):\n\n    print(i < 2)\n", use_inner_text=False)
    expect(code.locator(".keyword").first).to_have_text("for")


def test_markup_of_model_and_visitor_does_nothing(visit: Callable[..., Visitor]) -> None:
    visitor = visit(3)
    visitor.ask_and_wait("evil")
    expect(visitor.answers.last).to_contain_text("<")
    expect(visitor.answers.last).to_contain_text("script>window.pwned = 1<")
    expect(visitor.answers.last.locator("strong")).to_have_text("bold")
    visitor.check_inert()
    attack = "<script>window.pwned = 6</script><img src=x onerror='window.pwned = 7'>![a](http://evil.test/b.png)"
    assert "img src=x" in visitor.ask_and_wait(attack)  # it is shown
    visitor.open_side()
    visitor.page.locator("#new").click()
    expect(visitor.questions).to_have_count(0)
    visitor.ask_and_wait(attack)  # now it is a title in the list of chats too
    expect(visitor.page.locator("#chats")).to_contain_text("<script>")
    visitor.check_inert()
    assert visitor.history()[0]["content"] == attack


def test_what_fails_is_said_and_the_question_is_not_lost(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("before")
    visitor.box.fill("boom")
    visitor.box.press("Enter")
    expect(visitor.page.get_by_text("the question does <b>not</b> fit")).to_be_visible()
    expect(visitor.box).to_have_value("boom")
    expect(visitor.send).to_be_visible()
    visitor.box.fill("bug")
    visitor.box.press("Enter")
    expect(visitor.page.get_by_text("its log says why")).to_be_visible()
    expect(visitor.page.get_by_text("secret detail")).to_have_count(0)
    expect(visitor.box).to_have_value("bug")
    expect(visitor.send).to_be_visible()
    assert [turn[0] for turn in visitor.history()] == ["before"]


@pytest.mark.parametrize("version", [2, 3])
def test_chats_are_kept_in_the_browser(visit: Callable[..., Visitor], version: int) -> None:
    visitor = visit(version)
    chats = visitor.page.locator("#chats tbody tr, #chats .gallery-item")
    visitor.ask_and_wait("one")
    visitor.open_side()
    visitor.page.locator("#new").click()
    expect(visitor.questions).to_have_count(0)
    visitor.ask_and_wait("formula")
    expect(chats).to_have_text(["formula", "one"])
    visitor.page.reload()
    expect(visitor.send).to_be_visible()
    expect(visitor.questions).to_have_count(0)
    visitor.open_side()
    chats.get_by_text("formula").click()
    expect(visitor.answers.last.locator("math")).to_have_count(3)
    history = visitor.history()
    assert "\\sqrt{2}" in json.dumps(history) and "<math" not in json.dumps(history)
    expect(chats).to_have_text(["formula", "one"])
    visitor.page.locator("#delete").click()
    expect(chats).to_have_text(["one"])
    expect(visitor.questions).to_have_count(0)
    other = visit(version)
    expect(other.page.locator("#chats")).not_to_contain_text("one")


def test_two_tabs_do_not_undo_each_others_chats(visit: Callable[..., Visitor]) -> None:
    one = visit()
    two = Visitor(one.page.context, one.url)
    one.ask_and_wait("first tab")
    two.ask_and_wait("second tab")
    one.ask_and_wait("more")
    chats = [visitor.page.locator("#chats tbody tr, #chats .gallery-item") for visitor in (one, two)]
    expect(chats[0]).to_have_text(["first tab", "second tab"])
    two.open_side()
    expect(chats[1]).to_have_text(["first tab", "second tab"])
    chats[1].get_by_text("first tab").click()
    expect(two.questions).to_have_text(["first tab", "more"])
    two.page.locator("#delete").click()
    expect(chats[1]).to_have_text(["second tab"])
    expect(two.questions).to_have_count(0)
    one.open_side()
    expect(chats[0]).to_have_text(["second tab"])
    two.page.close()


def test_what_else_is_in_the_browsers_store_is_left_out(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    for stored in ("[", "5", '[null, 1, {"id": 1}, {"id": "x", "history": [["only a question"]]}]'):
        visitor.page.evaluate("text => localStorage.setItem('chatglm-2', text)", stored)
        visitor.page.reload()
        expect(visitor.send).to_be_visible()
        visitor.ask_and_wait("fine")
        visitor.open_side()
        expect(visitor.page.locator("#chats tbody tr, #chats .gallery-item")).to_have_text(["fine"])


def test_on_a_phone(visit: Callable[..., Visitor]) -> None:
    visitor = visit(1, viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True)
    visitor.ask_and_wait("formula")
    visitor.ask_and_wait("x" * 300)
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(visitor.box).to_be_in_viewport(ratio=1)
    expect(visitor.answers.last).to_be_in_viewport()
    visitor.open_side()
    expect(visitor.page.locator("#temperature")).to_be_visible()
    visitor.page.locator("#chats tbody tr, #chats .gallery-item").first.click()  # the sidebar gives way to the chat
    expect(visitor.page.locator("#new")).not_to_be_in_viewport()
    expect(visitor.questions).to_have_count(2)


def test_a_password_is_asked_for(visit: Callable[..., Visitor], browser: Any, serve_once: Callable[..., str]) -> None:
    url = serve_once("tests/fake_page.py", "2", "--auth", "me:a:b", "--auth", "you:c")
    context = browser.new_context(locale="en-US")
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(url)
    fields = page.locator("input")
    for user, password in (("me", "wrong"), ("me", "a:b")):
        expect(page.locator("#box")).to_have_count(0)
        fields.nth(0).fill(user)
        fields.nth(1).fill(password)
        page.get_by_role("button", name="Login").click()
    expect(page.locator("#box textarea")).to_be_visible()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}config")
    context.close()


def test_one_of_several_adapters_is_chosen(visit: Callable[..., Visitor], serve_once: Callable[..., str]) -> None:
    visitor = visit(url=serve_once("tests/fake_page.py", "2", "--adapter", "law=/x", "--adapter", "poems=/y"))
    assert visitor.settings()["adapter"] == "law"
    visitor.open_side()
    for name, chosen in (("poems", "poems"), ("ChatGLM2", None)):
        visitor.page.locator("#adapter input").click()
        visitor.page.get_by_role("option", name=name).click()
        assert visitor.settings()["adapter"] == chosen


def test_the_real_engine_with_the_demo_model(visit: Callable[..., Visitor], serve_once: Callable[..., str]) -> None:
    url = serve_once("web_demo.py", "--model", "chatglm/demo/chatglm3-demo", "--seed", "1", "--device", "cpu")
    one, two = visit(url=url), visit(url=url)
    for visitor in (one, two):
        expect(visitor.page.locator("#demo-note")).to_be_visible()
        visitor.open_side()
        visitor.page.locator("#temperature input[type=range]").press("Home")
        visitor.ask("你好")
    one.wait_until_free()
    two.wait_until_free()
    assert one.answers.last.inner_text().strip() == two.answers.last.inner_text().strip() != ""
    one.ask("12 + 7 = ?")
    expect(one.questions).to_have_count(2)
    one.wait_until_free()
    expect(two.questions).to_have_count(1)


def test_dark_mode_follows_the_system(visit: Callable[..., Visitor]) -> None:
    def brightness(visitor: Visitor) -> int:
        colour = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness(visit(color_scheme="dark")) < 100 < 600 < brightness(visit(color_scheme="light"))


def test_the_page_may_only_ask_its_own_server(serve: Callable[[int], str]) -> None:
    with urllib.request.urlopen(serve(2)) as response:
        policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy


def test_a_user_without_a_password_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("me", ":x", "me:"):
        assert web_demo.main(["--auth", wrong, "--lang", "en"]) == 1
        assert "USER:PASSWORD" in capsys.readouterr().err


def test_a_wrong_address_or_model_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert web_demo.main(["--model", "/nowhere/at/all", "--lang", "en"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ") and "/nowhere/at/all" in captured.err and "Traceback" not in captured.err
