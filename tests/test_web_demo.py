"""The web page in a real browser, as a visitor uses it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
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
from chatglm.conversation import chat_format
from chatglm.front.session import Session
from ports import free_port

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need the Python package playwright")
expect = sync_api.expect

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium-headless-shell"
)
PATIENCE = int(os.environ.get("PATIENCE", 180)) * 1000  # milliseconds; much, for a busy machine


class Server:
    """web_demo.py in a process of its own."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.command = [sys.executable, "-u", script, *arguments, "--port", str(self.port)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env={**_environment(), "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.output = ""
        assert self.process.stdout is not None
        while "Running on local URL" not in self.output:
            ready, _, _ = select.select([self.process.stdout], [], [], 2 * PATIENCE / 1000)
            line = self.process.stdout.readline().decode() if ready else ""
            if not line:
                self.process.kill()
                self.process.communicate()
                raise AssertionError(f"the server did not start: {self.output}")
            self.output += line

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.process.kill()
        self.process.communicate()

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


# Counts the answers that have ended: the button that stops one is gone.
COUNT_ENDED = """{
    let runs = false
    window.ended = 0
    new MutationObserver(() => {
        const before = runs
        runs = Boolean(document.querySelector("#box .stop-button"))
        if (before && !runs) window.ended += 1
    }).observe(document, {subtree: true, childList: true})
}"""


class Visitor:
    """A browser tab with the page."""

    def __init__(self, context: Any, url: str) -> None:
        self.url = url
        self.page = context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._check_request)
        self.page.add_init_script(COUNT_ENDED)
        self.page.goto(url)
        self.box = self.page.locator("#box textarea")
        self.answers = self.page.locator("#chat [data-testid=bot]")
        self.questions = self.page.locator("#chat [data-testid=user]")
        self.speed = self.page.locator("#speed")
        self.send = self.page.locator("#box .submit-button")
        self.stop = self.page.locator("#box .stop-button")
        self.chats = self.page.locator("#chats tbody tr, #chats .gallery-item")
        expect(self.send).to_be_visible()
        self.page.wait_for_function("window.chats")  # the page listens
        expect(self.box).to_have_attribute("aria-label", re.compile("."))

    def _check_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def ask(self, question: str) -> None:
        """Asks and waits until the question is in the chat; the answer is yet to come."""
        self.send_question(question)
        expect(self.box).to_have_value("")

    def send_question(self, question: str) -> None:
        """Asks without waiting for anything: the question may come back into the box."""
        self.page.evaluate("window.asked = window.ended")
        self.box.fill(question)
        self.box.press("Enter")

    def ask_and_wait(self, question: str, drawn: int = 1) -> str:
        """Returns the answer. `drawn` counts the messages of the model's side: the result of a tool is one of them."""
        before = self.answers.count()
        self.ask(question)
        self.wait_until_free()
        expect(self.answers).to_have_count(before + drawn)
        expect(self.answers.last).to_have_text(re.compile(r"\S"), use_inner_text=True)  # it is drawn
        return self.answers.last.inner_text().strip()

    def wait_until_free(self) -> None:
        """Waits until the answer to what `ask` has asked last is complete and the next question may come."""
        self.wait_for_end()
        expect(self.speed).to_contain_text("tokens/s")
        expect(self.send).to_be_visible()

    def wait_for_end(self) -> None:
        """Waits until nothing more comes to the last question, answered or not."""
        self.page.wait_for_function("!(window.ended <= window.asked)")  # after a reload, nothing was asked

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

    def new_chat(self) -> None:
        self.open_side()
        self.page.locator("#new").click()
        expect(self.questions).to_have_count(0)
        self.close_side()

    def close_side(self) -> None:
        self.page.get_by_label("Toggle Sidebar").first.click()
        expect(self.page.locator("#new")).not_to_be_in_viewport()

    def stored(self) -> list[Any]:
        """The chats in the browser's store, the newest first."""
        chats = self.page.evaluate(
            "Object.entries(localStorage).filter(([key]) => key.includes('/')).map(([, chat]) => chat)"
        )
        return sorted(map(json.loads, chats), key=lambda chat: -chat["time"])

    def check_inert(self) -> None:
        assert self.page.evaluate("window.pwned") is None
        assert self.page.locator("#chat .message :is(script, img, style, iframe, [onload], [onerror])").count() == 0
        assert self.page.locator("a[href^=javascript], a[href*='pwned']").count() == 0
        assert not self.errors and not self.elsewhere


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


class Servers:
    """One server for each generation, started when it is first asked for."""

    def __init__(self) -> None:
        self.running: dict[int, Server] = {}

    def of(self, version: int) -> Server:
        if version not in self.running:
            self.running[version] = Server("tests/fake_page.py", str(version))
        return self.running[version]

    def __call__(self, version: int) -> str:
        """Its address."""
        return self.of(version).url


@pytest.fixture(scope="module")
def serve() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    with contextlib.ExitStack() as stack:  # if one ends badly, the others are stopped all the same
        for server in servers.running.values():
            stack.callback(server.close)


@pytest.fixture
def mortal_server(serve: Servers) -> Iterator[Server]:
    """The server of generation 2, which a test may kill; at the end it runs."""
    server = serve.of(2)
    yield server
    if server.process.poll() is not None:
        server.start()


@pytest.fixture
def own_server() -> Iterator[Callable[..., Server]]:
    """A server of a test's own."""
    servers: list[Server] = []

    def start(script: str, *arguments: str) -> Server:
        servers.append(Server(script, *arguments))
        return servers[-1]

    yield start
    with contextlib.ExitStack() as stack:
        for one in servers:
            stack.callback(one.close)


@pytest.fixture
def serve_once(own_server: Callable[..., Server]) -> Callable[..., str]:
    """A server of a test's own: its address."""
    return lambda script, *arguments: own_server(script, *arguments).url


@pytest.fixture
def visit(browser: Any, serve: Callable[[int], str]) -> Iterator[Callable[..., Visitor]]:
    """Opens the page in a browser of its own; at the end no page may have failed or asked elsewhere."""
    visitors: list[Visitor] = []

    def come(version: int = 2, url: str = "", **options: Any) -> Visitor:
        still = {"reduced_motion": "reduce"}  # a click on what moves away under the mouse is lost
        given = {"locale": "en-US", "permissions": ["clipboard-read", "clipboard-write"]} | still | options
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
    expect(visitor.page.get_by_text("Still answering").first).to_be_visible()
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
    visitor.page.locator("#mode input[value=tools]").check()
    expect(visitor.page.locator("#tools textarea")).to_be_visible()
    visitor.page.locator("#system textarea").fill("Be <b>brief</b>.")
    tool = {"name": "get_weather", "description": "weather", "parameters": {}}
    visitor.page.locator("#tools textarea").fill(json.dumps([tool]))
    system = {"role": "system", "content": "Be <b>brief</b>.", "tools": [tool]}
    assert visitor.history() == [system]
    assert [turn["role"] for turn in visitor.history()] == ["system", "user", "assistant"]
    visitor.page.locator("#tools textarea").fill("[{")
    visitor.send_question("x")
    expect(visitor.page.get_by_text("The tools must be a list in JSON or YAML")).to_be_visible()
    visitor.wait_for_end()
    expect(visitor.box).to_have_value("x")
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
    visitor.ask_and_wait("one")
    visitor.new_chat()
    visitor.ask_and_wait("formula")
    expect(visitor.chats).to_have_text(["formula", "one"])
    visitor.page.reload()
    visitor.open_side()
    expect(visitor.questions).to_have_text(["formula"])
    visitor.chats.get_by_text("one").click()
    expect(visitor.questions).to_have_text(["one"])
    visitor.chats.get_by_text("formula").click()
    expect(visitor.answers.last.locator("math")).to_have_count(3)
    history = visitor.history()
    assert "\\sqrt{2}" in json.dumps(history) and "<math" not in json.dumps(history)
    expect(visitor.chats).to_have_text(["formula", "one"])
    visitor.page.locator("#delete").click()
    expect(visitor.chats).to_have_text(["one"])
    expect(visitor.questions).to_have_count(0)
    assert visitor.history() == []  # nor does the model remember it
    other = visit(version)
    other.open_side()
    expect(other.page.locator("#chats")).not_to_contain_text("one")


@pytest.mark.parametrize("how", ["new", "trash", "another chat", "reload"])
def test_a_chat_that_is_left_while_its_answer_streams_is_kept(visit: Callable[..., Visitor], how: str) -> None:
    visitor = visit()
    visitor.ask_and_wait("another")
    visitor.new_chat()
    visitor.ask_and_wait("before")
    visitor.ask("forever")
    expect(visitor.answers.last).to_contain_text("3 4 5")
    if how == "trash":
        visitor.button("Clear").click()
        expect(visitor.questions).to_have_count(0)
        visitor.open_side()
    elif how == "reload":
        visitor.page.reload()
        expect(visitor.questions).to_have_text(["before", "forever"])
        visitor.open_side()
        visitor.page.locator("#new").click()
        expect(visitor.questions).to_have_count(0)
    else:
        visitor.open_side()
        if how == "new":
            visitor.page.locator("#new").click()
            expect(visitor.questions).to_have_count(0)
        else:
            visitor.chats.get_by_text("another").click()
            expect(visitor.questions).to_have_text(["another"])
    expect(visitor.send).to_be_visible()
    expect(visitor.chats).to_have_text(["before", "another"])
    visitor.chats.get_by_text("before").click()
    expect(visitor.questions).to_have_text(["before", "forever"])
    expect(visitor.answers.last).to_contain_text("0 1 2 3 4 5")
    expect(visitor.answers.last).to_contain_text("interrupted here")
    (before, (question, said)) = visitor.history()
    assert before == ["before", "[user] before"] and question == "forever" and said.startswith("0 1 2 3 4 5")
    assert "interrupted" not in said
    assert visitor.ask_and_wait("active") == "active: 0"


def test_a_question_during_an_answer_stays_in_the_box(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("forever")
    expect(visitor.answers).to_contain_text(["3 4 5"])
    visitor.box.fill("more")
    visitor.box.press("Enter")
    expect(visitor.page.get_by_text("Still answering").first).to_be_visible()
    expect(visitor.box).to_have_value("more")
    visitor.stop.click()
    expect(visitor.send).to_be_visible()
    visitor.box.press("Enter")
    expect(visitor.questions).to_have_text(["forever", "more"])


def test_a_restart_of_the_server_under_an_open_tab_loses_nothing(
    visit: Callable[..., Visitor], mortal_server: Server
) -> None:
    server = mortal_server
    visitor = visit(url=server.url)
    visitor.ask_and_wait("one")
    visitor.ask_and_wait("two")
    server.kill()
    server.start()
    assert [question for question, _ in visitor.history()] == ["one", "two"]
    visitor.open_side()
    expect(visitor.chats).to_have_text(["one"])
    assert [question for question, _ in visitor.stored()[0]["history"]] == ["one", "two", "history"]
    # In the middle of an answer: the page comes back by itself.
    visitor.close_side()
    visitor.ask("forever")
    expect(visitor.answers.last).to_contain_text("3 4 5")
    server.kill()
    server.start()
    expect(visitor.answers.last).to_contain_text("interrupted here")
    expect(visitor.questions).to_have_text(["one", "two", "history", "forever"])
    assert [question for question, _ in visitor.history()] == ["one", "two", "history", "forever"]


def test_a_question_that_finds_no_server_is_asked_when_it_is_back(
    visit: Callable[..., Visitor], mortal_server: Server
) -> None:
    server = mortal_server
    visitor = visit(url=server.url)
    visitor.ask_and_wait("one")
    server.kill()
    visitor.box.fill("a question\nof two lines")
    visitor.box.press("Enter")
    expect(visitor.page.get_by_text("Connection")).to_be_visible()
    server.start()
    visitor.page.goto(server.url)
    expect(visitor.questions).to_have_text(["one"])
    expect(visitor.box).to_have_value("a question\nof two lines")
    visitor.box.press("Enter")
    expect(visitor.answers).to_have_count(2)
    visitor.wait_until_free()
    assert [question for question, _ in visitor.history()] == ["one", "a question\nof two lines"]


def test_after_a_break_of_the_connection_the_model_remembers(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("one")
    context = visitor.page.context
    context.set_offline(True)  # as a closed laptop is
    context.set_offline(False)
    assert [question for question, _ in visitor.history()] == ["one"]


def test_a_reload_brings_back_settings_and_what_was_typed(visit: Callable[..., Visitor]) -> None:
    visitor = visit(3)
    visitor.open_side()
    visitor.page.locator("#system textarea").fill("Be brief.")
    visitor.page.locator("#temperature input[type=number]").fill("0.25")
    visitor.page.locator("#temperature input[type=number]").blur()
    visitor.box.fill("half a quest")
    for turns in (0, 2):  # an empty chat, then one with turns
        visitor.page.reload()
        expect(visitor.box).to_have_value("half a quest")
        expect(visitor.questions).to_have_count(turns)
        assert visitor.settings()["temperature"] == 0.25
        history = visitor.history()
        assert history[0] == {"role": "system", "content": "Be brief."}
        visitor.box.fill("half a quest")
    assert len(history) == 7


def test_a_reload_before_the_first_token_gives_the_question_back(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("one")
    visitor.ask("silent")
    visitor.box.fill("more")
    expect(visitor.stop).to_be_visible()
    visitor.page.reload()
    expect(visitor.questions).to_have_text(["one"])
    expect(visitor.box).to_have_value("silent\nmore")
    visitor.page.reload()
    expect(visitor.box).to_have_value("silent\nmore")


def test_each_chat_has_its_settings(visit: Callable[..., Visitor]) -> None:
    visitor = visit(3)
    visitor.open_side()
    for name, system, temperature in (("one", "A", "0.1"), ("two", "B", "0.2")):
        visitor.page.locator("#new").click()
        expect(visitor.questions).to_have_count(0)
        visitor.page.locator("#system textarea").fill(system)
        visitor.page.locator("#temperature input[type=number]").fill(temperature)
        visitor.page.locator("#temperature input[type=number]").blur()
        visitor.ask_and_wait(name)
    for name, system, temperature in (("one", "A", "0.1"), ("two", "B", "0.2")):
        visitor.chats.get_by_text(name, exact=True).click()
        expect(visitor.questions.first).to_have_text(name)
        expect(visitor.page.locator("#system textarea")).to_have_value(system)
        expect(visitor.page.locator("#temperature input[type=number]")).to_have_value(temperature)
        assert visitor.settings()["temperature"] == float(temperature)
        assert visitor.history()[0]["content"] == system


def test_an_answer_that_fails_half_way_is_kept_with_its_error(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("before")
    visitor.ask("half")
    note, broken = visitor.answers.last, re.compile("Error: it <.?b>broke")
    expect(note).to_contain_text(broken)
    expect(note.locator("code")).to_contain_text("half")
    expect(note.locator("code")).not_to_contain_text("broke")  # though the block of code was not closed
    expect(visitor.send).to_be_visible()
    visitor.page.reload()
    expect(note).to_contain_text(broken)
    assert visitor.history()[1] == ["half", "```python\nhalf"]
    visitor.button("Undo").click()
    expect(visitor.box).to_have_value("history")
    visitor.box.fill("")
    visitor.button("Retry").click()
    expect(note).to_contain_text(broken)
    expect(visitor.send).to_be_visible()
    expect(visitor.questions).to_have_text(["before", "half"])


def test_two_tabs_do_not_undo_each_others_chats(visit: Callable[..., Visitor]) -> None:
    one = visit()
    two = Visitor(one.page.context, one.url)
    one.ask_and_wait("first tab")
    two.ask_and_wait("second tab")
    one.ask_and_wait("more")
    expect(one.chats).to_have_text(["first tab", "second tab"])
    two.open_side()
    expect(two.chats).to_have_text(["first tab", "second tab"])
    two.chats.get_by_text("first tab").click()
    expect(two.questions).to_have_text(["first tab", "more"])
    two.page.locator("#delete").click()
    expect(two.chats).to_have_text(["second tab"])
    expect(two.questions).to_have_count(0)
    one.open_side()
    expect(one.chats).to_have_text(["second tab"])
    two.page.close()


def test_two_tabs_with_the_same_chat_lose_no_turn(visit: Callable[..., Visitor]) -> None:
    one = visit()
    one.ask_and_wait("first")
    two = Visitor(one.page.context, one.url)
    two.open_side()
    two.chats.get_by_text("first").click()
    expect(two.questions).to_have_text(["first"])
    one.ask_and_wait("in one")
    two.ask("in two")  # one after the other: the same chat
    expect(two.questions).to_have_text(["first", "in one", "in two"])
    expect(two.answers).to_have_count(3)
    two.wait_until_free()
    one.ask("history")  # the other tab's turn appears with it
    expect(one.questions).to_have_text(["first", "in one", "in two", "history"])
    expect(one.answers).to_have_count(4)
    one.wait_until_free()
    assert [question for question, _ in json.loads(one.answers.last.inner_text())] == ["first", "in one", "in two"]
    # An edit of what this tab shows does not touch what the other one has added.
    one.ask_and_wait("late")
    two.button("Edit").nth(2).click()
    two.page.locator("#chat textarea").fill("edited")
    two.button("Submit").click()
    expect(two.questions).to_have_text(["first", "in one", "edited"])
    expect(two.answers.last).to_have_text("[user] edited")
    two.wait_until_free()
    expect(two.chats).to_have_count(2)
    expect(two.page.get_by_text("kept, as two chats")).to_be_visible()
    # At the same time: two chats.
    two.chats.last.click()
    expect(two.questions.last).to_have_text("late")
    one.ask("forever")
    one.page.wait_for_function("Object.values(localStorage).some(chat => chat.includes('3 4 5'))")
    two.ask("forever")
    expect(two.answers.last).to_contain_text("3 4 5")
    one.stop.click()
    two.stop.click()
    for tab in (one, two):
        expect(tab.speed).to_contain_text("stopped")
        expect(tab.send).to_be_visible()
    asked = [[question for question, _ in chat["history"]] for chat in one.stored()]
    main, other = ["first", "in one", "in two", "history", "late"], ["first", "in one", "edited"]
    # The later tab went on after what the earlier one had stored by then, if anything: no turn is lost either way.
    assert len(asked) == 3 and other in asked and [*main, "forever"] in asked
    asked.remove(other)
    asked.remove([*main, "forever"])
    assert asked[0] in ([*main, "forever"], [*main, "forever", "forever"])
    two.page.close()


#: Another tab adds a turn to the chat that is open.
ELSEWHERE = """const key = Object.keys(localStorage).find(key => key.includes("/"))
const other = JSON.parse(localStorage[key])
other.history.push(["other tab", "answer"])
localStorage[key] = JSON.stringify({...other, revision: "other"})
"""
LATE = """() => {
    const place = chats.latest({})
    %s
    chats.save({...place, opened: undefined, turn: {id: "t", question: "edited", role: "user", kept: 0}})
    chats.choose(%s)  // the visitor leaves before the last of the answer is drawn
    const open = chats.latest({})
    chats.save({...place, opened: undefined, history: [["edited", "late"]]})
    chats.save({...open, opened: undefined, history: [...open.history, ["next", "answer"]]})
}"""


@pytest.mark.parametrize(
    ("elsewhere", "chosen", "expected"),
    [
        (ELSEWHERE, 1, [["edited"], ["first", "other tab", "next"]]),  # what the other tab has
        (ELSEWHERE, 0, [["edited"], ["first", "next"], ["first", "other tab"]]),  # the chat of the edit
        ("", 0, [["edited"], ["first", "next"]]),  # there is no other tab
    ],
)
def test_what_comes_late_from_a_chat_that_was_left_replaces_no_other(
    visit: Callable[..., Visitor], elsewhere: str, chosen: int, expected: list[list[str]]
) -> None:
    visitor = visit()
    visitor.ask_and_wait("first")
    visitor.page.evaluate(LATE % (elsewhere, chosen))
    asked = [[question for question, _ in chat["history"]] for chat in visitor.stored()]
    assert sorted(asked) == expected


@pytest.mark.parametrize("change", ['chats.rename("title")', 'chats.settings("", "", "[]", 9, 1, 1, "chat", false)'])
def test_a_new_title_or_setting_hides_no_turn_of_another_tab(visit: Callable[..., Visitor], change: str) -> None:
    visitor = visit()
    visitor.ask_and_wait("first")
    visitor.page.evaluate(
        f"""() => {{
            const place = chats.latest({{}})
            {ELSEWHERE}
            {change}
            chats.save({{...place, opened: undefined, history: [["edited", "answer"]]}})
        }}"""
    )
    asked = [[question for question, _ in chat["history"]] for chat in visitor.stored()]
    assert sorted(asked) == [["edited"], ["first", "other tab"]]


def test_no_chat_is_dropped_for_a_newer_one(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.page.evaluate(
        """() => { for (let n = 0; n < 60; n++) localStorage.setItem(`chatglm-2/${n}`, JSON.stringify(
            {id: `${n}`, revision: "r", time: n, history: [[`question ${n}`, "answer"]]})) }"""
    )
    visitor.ask_and_wait("the newest")
    assert len(visitor.stored()) == 61
    visitor.open_side()
    visitor.page.locator("#search textarea, #search input").fill("QUESTION 0")
    expect(visitor.chats).to_have_text(["question 0"])
    visitor.page.locator("#search textarea, #search input").fill("")
    expect(visitor.chats.first).to_have_text("the newest")


def test_a_full_store_is_announced_and_drops_nothing(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("the first chat")
    visitor.new_chat()
    visitor.page.evaluate("localStorage.setItem('other', 'x'.repeat(4.5 * 2 ** 20))")
    visitor.ask_and_wait("nearly full")
    notice = visitor.page.locator("#notice")
    expect(notice).to_contain_text("90% full")
    visitor.page.evaluate(
        """() => { let text = localStorage.getItem("other")
            for (let size = 2 ** 20; size >= 1; size /= 2)
                try { for (;;) { localStorage.setItem("other", text + "x".repeat(size)); text += "x".repeat(size) } }
                catch {} }"""
    )
    visitor.ask_and_wait("the last drop")
    expect(notice).to_contain_text("store is full")
    assert [question for question, _ in visitor.history()] == ["nearly full", "the last drop"]  # it goes on
    assert len(visitor.stored()) == 2
    visitor.page.evaluate("localStorage.removeItem('other')")
    visitor.ask_and_wait("there is room")
    expect(notice).to_be_hidden()
    asked = [[question for question, _ in chat["history"]] for chat in visitor.stored()]
    assert asked == [["nearly full", "the last drop", "history", "there is room"], ["the first chat"]]


def test_chats_of_earlier_versions_are_taken_over(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    old = [{"id": "b", "history": [["new one", "2"]]}, {"id": "a", "history": [["old one", "1"]]}]
    visitor.page.evaluate("text => localStorage.setItem('chatglm-2', text)", json.dumps(old))
    visitor.page.reload()
    visitor.open_side()
    expect(visitor.chats).to_have_text(["new one", "old one"])
    visitor.chats.last.click()
    expect(visitor.questions).to_have_text(["old one"])
    assert visitor.history() == [["old one", "1"]]
    assert visitor.page.evaluate("localStorage.getItem('chatglm-2')") is None


def test_what_else_is_in_the_browsers_store_is_left_out(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    for stored in ("[", "5", "null", '[null, 1, {"id": 1}, {"id": "x", "history": [["only a question"]]}]'):
        visitor.page.evaluate("text => localStorage.setItem('chatglm-2', text)", stored)
        visitor.page.evaluate("text => localStorage.setItem('chatglm-2/x', text)", stored)
        visitor.page.evaluate("localStorage.setItem('chatglm-2/y', JSON.stringify({id: 'y', history: [['a', 1]]}))")
        visitor.page.evaluate("text => sessionStorage.setItem('chatglm-2', text)", stored)
        visitor.page.reload()
        expect(visitor.send).to_be_visible()
        expect(visitor.questions).to_have_count(0)
        visitor.ask_and_wait("fine")
        visitor.open_side()
        expect(visitor.chats).to_have_text(["fine"])
        visitor.page.locator("#delete").click()
        expect(visitor.chats).to_have_count(0)


def test_a_chat_is_renamed_and_found(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask_and_wait("a cat")
    visitor.new_chat()
    visitor.ask_and_wait("a dog")
    visitor.open_side()
    title, search = (visitor.page.locator(f"{place} :is(input, textarea)") for place in ("#rename", "#search"))
    expect(title).to_have_value("a dog")
    title.fill("My <b>animal</b>")
    title.press("Enter")
    expect(visitor.chats).to_have_text(["My <b>animal</b>", "a cat"])
    for word, found in (
        ("ANIMAL", ["My <b>animal</b>"]),
        ("cat", ["a cat"]),
        ("[user] a", ["My <b>animal</b>", "a cat"]),
    ):
        search.fill(word)
        expect(visitor.chats).to_have_text(found)
    search.fill("nowhere")
    expect(visitor.chats).to_have_count(0)
    search.fill("")
    visitor.ask_and_wait("more")
    visitor.page.reload()
    expect(visitor.questions).to_have_text(["a dog", "more"])
    visitor.open_side()
    expect(visitor.chats).to_have_text(["My <b>animal</b>", "a cat"])
    expect(title).to_have_value("My <b>animal</b>")


@pytest.mark.parametrize("version", [2, 3])
def test_chats_are_exported_and_imported(visit: Callable[..., Visitor], version: int, tmp_path: Path) -> None:
    def export(button: str) -> Path:
        with visitor.page.expect_download() as download:
            visitor.page.locator(button).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        return path

    visitor = visit(version)
    visitor.open_side()
    if version == 3:
        visitor.page.locator("#system textarea").fill("Be brief.")
    visitor.page.locator("#temperature input[type=number]").fill("0.25")
    visitor.page.locator("#temperature input[type=number]").blur()
    visitor.ask_and_wait("what?")
    visitor.ask_and_wait("formula")
    markdown = export("#export-markdown")
    assert markdown.name == "what.md"
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith("# what?\n\n**") and "\\sqrt{2}" in text and text.count("**You:**") == 2
    assert ("Be brief." in text) == (version == 3)
    one = export("#export-json")
    session = Session(chat_format(version))
    session.load(one)  # the terminal reads it too
    assert len(session.history) == (5 if version == 3 else 2)
    visitor.page.locator("#new").click()
    expect(visitor.questions).to_have_count(0)
    visitor.ask_and_wait("another")
    everything = export("#export-all")
    terminals = tmp_path / "terminal.json"
    session.undo()
    session.save(terminals)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"history": [1]}', encoding="utf-8")

    other = visit(version)
    other.open_side()
    for files, found in (
        ([one], ["what?"]),
        ([everything], ["another", "what?"]),
        ([everything, terminals, wrong], ["what?", "another", "what?"]),
    ):
        with other.page.expect_file_chooser() as chooser:
            other.page.locator("#import").click()
        chooser.value.set_files(files)
        expect(other.chats).to_have_text(found)
    expect(other.page.locator("#notice")).to_contain_text("wrong.json holds no chat of this model")
    other.chats.last.click()
    expect(other.answers.last.locator("math")).to_have_count(3)
    assert other.settings()["temperature"] == 0.25
    if version == 3:
        assert other.history()[0] == {"role": "system", "content": "Be brief."}


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


def test_a_password_is_asked_for_and_chats_belong_to_who_signed_in(
    browser: Any, serve_once: Callable[..., str]
) -> None:
    url = serve_once("tests/fake_page.py", "2", "--auth", "me:a:b", "--auth", "you/:c")
    context = browser.new_context(locale="en-US")
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    page.goto(url)

    def sign_in(user: str, password: str) -> None:
        expect(page.locator("#box")).to_have_count(0)
        page.locator("input").nth(0).fill(user)
        page.locator("input").nth(1).fill(password)
        with page.expect_response(lambda response: response.url.rstrip("/").endswith("/login")):
            page.get_by_role("button", name="Login").click()

    def log_out() -> None:
        page.get_by_label("Toggle Sidebar").first.click()
        page.locator("#logout").click()
        expect(page.get_by_role("button", name="Login")).to_be_visible()

    sign_in("me", "wrong")
    sign_in("me", "a:b")
    visitor = Visitor(context, url)
    visitor.ask_and_wait("my secret")
    visitor.box.fill("a draft")
    page.close()
    page = visitor.page
    log_out()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}config")
    sign_in("you/", "c")
    expect(visitor.send).to_be_visible()
    expect(visitor.questions).to_have_count(0)
    expect(visitor.box).to_have_value("")
    assert visitor.history() == []
    visitor.open_side()
    expect(visitor.chats).to_have_text(["history"])
    visitor.close_side()
    log_out()
    sign_in("me", "a:b")
    expect(visitor.questions).to_have_text(["my secret"])
    expect(visitor.box).to_have_value("a draft")
    visitor.open_side()
    expect(visitor.chats).to_have_text(["my secret"])
    assert not visitor.errors and not visitor.elsewhere
    context.close()


def test_without_users_nobody_logs_out(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.open_side()
    expect(visitor.page.locator("#logout")).to_have_count(0)


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
    assert web_demo.main(["--port", "0", "--model", "/nowhere/at/all", "--lang", "en"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ") and "/nowhere/at/all" in captured.err and "Traceback" not in captured.err
