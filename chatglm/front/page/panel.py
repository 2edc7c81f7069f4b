"""The page's parts around calls: the panel of a call that waits for the visitor, and the files of the code's folder."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..messages import PAGE
from . import browser_store, failures
from .answering import run_open_call
from .browser_store import KNOBS
from .stored_chat import StoredChat
from .visitor import language_of

if TYPE_CHECKING:
    from .page import Page

MOST_DOWNLOAD = 16 * 2**20  # bytes of a file that code has made


class Panel:
    """Draws them with `text`, which gives labels; `connect` makes them work."""

    def __init__(self, page: Page, text: Callable[[str], Any]) -> None:
        self.page, self._text = page, text

    def draw_side(self, is_shown: bool) -> None:
        """The files, for the sidebar."""
        text = self._text
        with gr.Group(visible=is_shown) as self.files:
            self.upload = gr.Button(text("upload"), size="sm", elem_id="upload")
            self.made = gr.Dropdown([], label=text("made"), filterable=False, elem_id="made")
            self.fetch = gr.Button(text("fetch"), size="sm", elem_id="fetch")
            self.restart = gr.Button(text("restart"), size="sm", elem_id="restart")
        self.uploaded = gr.JSON(visible=False)
        self.fetched = gr.JSON(visible=False)

    def draw(self) -> None:
        """The call, for the place under the chat."""
        text = self._text
        with gr.Group(visible=False, elem_id="call") as self.group:
            self.written = gr.Textbox(label=text("pending"), lines=2, max_lines=12, elem_id="pending")
            with gr.Row():
                self.run_it = gr.Button(text("run"), size="sm", variant="primary", elem_id="run")
                self.refuse_it = gr.Button(text("refuse"), size="sm", elem_id="refuse")

    def connect(self, outputs: list[Any], private: dict[str, Any]) -> list[Any]:
        """Returns the events that lead to an answer; `outputs` are the components that it changes."""
        at_once: dict[str, Any] = {"queue": False, **private}
        page = self.page
        self.upload.click(None, None, self.uploaded, js=browser_store.call("pickFiles"))
        self.uploaded.change(self.put_files, [self.uploaded, page.place], [page.place, page.speed], **at_once)
        gr.on([page.speed.change, page.place.change], self.list_files, page.place, self.made, **at_once)
        self.fetch.click(self.read_file, [self.made, page.place], [self.fetched, page.speed], **at_once)
        self.fetched.change(None, self.fetched, None, js=browser_store.call("keepFile"))
        self.restart.click(self.restart_kernel, page.place, page.speed, **at_once)
        given = [page.place, self.written, *page.knobs]
        buttons = (self.run_it, self.refuse_it)
        begins = [button.click(page.begin_call, None, page.refusal, **at_once) for button in buttons]
        return [
            begin.success(function, given, outputs, js=browser_store.HERE_WITH, **private)
            for begin, function in zip(begins, (self.run, self.refuse), strict=True)
        ]

    def pending(self, chat: StoredChat) -> dict[Any, Any]:
        """Values that show the call that waits for the visitor, or nothing."""
        call = self.page.calls.open_call(chat)
        return {self.group: gr.update(visible=call is not None), self.written: call[1] if call else ""}

    # ---- the call ----------------------------------------------------------------------------------------------------

    def run(
        self, place: Any, written: str, adapter: str, system: str, tools: str, max_length: int, top_p: float,
        temperature: float, mode: str, auto: bool, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        values = (adapter, system, tools, max_length, top_p, temperature, mode, auto)
        yield from self._decide(place, written, values, True, request)

    def refuse(
        self, place: Any, written: str, adapter: str, system: str, tools: str, max_length: int, top_p: float,
        temperature: float, mode: str, auto: bool, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        values = (adapter, system, tools, max_length, top_p, temperature, mode, auto)
        yield from self._decide(place, written, values, False, request)

    def _decide(
        self, place: Any, written: str, values: tuple[Any, ...], allowed: bool, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        with self.page.running.answering(request) as running:
            knobs, chat = dict(zip(KNOBS, values, strict=True)), self.page.read(place)
            if running is not None:
                yield from run_open_call(self.page, chat, written, knobs, allowed, running, language_of(request))

    # ---- the files ---------------------------------------------------------------------------------------------------

    def put_files(self, sent: Any, place: Any, request: gr.Request) -> list[Any]:
        """Takes files for the code of a chat, which so begins, if it has not."""
        language = language_of(request)
        sent = sent if isinstance(sent, Mapping) else {}
        if sent.get("tooLarge"):
            return [gr.skip(), PAGE["upload_large"][language]]
        chat = self.page.read(place).named()
        try:
            names = self.page.calls.put_files(chat, sent.get("files") or [])
        except ValueError as error:
            return [gr.skip(), html.escape(failures.reason(error, language))]
        return [chat.write(), html.escape(PAGE["uploaded"][language].format(names=", ".join(names)))]

    def list_files(self, place: Any) -> Any:
        kernel = self.page.calls.kernel(self.page.read(place))
        return gr.update(choices=kernel.files() if kernel else [])

    def read_file(self, name: str | None, place: Any, request: gr.Request) -> list[Any]:
        kernel = self.page.calls.kernel(self.page.read(place))
        try:
            content = kernel.read_file(name) if kernel and name else None
        except OSError as error:
            return [gr.skip(), html.escape(f"{name}: {error.strerror or error}")]
        if content is None or len(content) > MOST_DOWNLOAD:
            return [gr.skip(), PAGE["no_file"][language_of(request)]]
        return [{"name": name, "data": base64.b64encode(content).decode("ascii"), "time": time.time()}, gr.skip()]

    def restart_kernel(self, place: Any, request: gr.Request) -> str:
        if kernel := self.page.calls.kernel(self.page.read(place)):
            kernel.restart()
        return PAGE["restarted"][language_of(request)]
