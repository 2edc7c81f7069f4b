"""The web page about pictures: a picture beside a chat, whose first answer describes it."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from ...engine import Waiting
from ...language import LANGUAGES
from ...pictures import MOST_BYTES
from ..messages import PAGE, TERMINAL
from ..page import display, failures
from ..page.running import BUSY, FREE, RunningAnswers, connect_drawn, refused, tell
from ..page.serving import serve
from ..page.visitor import language_of

#: (question, history, settings, cancel) -> places in the queue and steps of the answer; the picture is the setting
#: `image`.
AnswerSource = Callable[[str, list[Any], dict[str, Any], threading.Event], Iterator[Any]]

STYLE = """
#title h1 { margin: 0; font-size: var(--text-xxl) }
#demo-note { opacity: .8; font-size: .9em }
#chat { height: calc(100dvh - 15rem) !important; min-height: 16rem }
#speed { min-height: 1.4em; opacity: .7; font-size: .85em }
"""
OTHER_THREADS = 40  # for what is not an answer
REFRESH = 0.05  # seconds between two updates of a growing answer
MOST_CHARACTERS = 20_000
#: Seconds between two looks at uploaded pictures, and their age at which they are deleted.
DELETED = (600, 3600)
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class PicturePage:
    """The page and its behaviour.

    Args:
        answer: where answers come from.
        name: the model's.
        sliders: upper limit and default of the maximum length, then top_p and temperature.
        settings: keyword arguments for every answer.
        demo_millions: parameters in millions if the model is the bundled demo, for the note that says so.
        at_once: how many questions the source of answers takes at the same time; each needs a thread.
    """

    def __init__(
        self,
        answer: AnswerSource,
        name: str,
        sliders: Sequence[float],
        settings: Mapping[str, Any] | None = None,
        demo_millions: int | None = None,
        at_once: int = 64,
    ) -> None:
        self.answer, self.name, self.settings = answer, name, dict(settings or {})
        self.running = RunningAnswers()
        texts = {
            language: {key: text[language].replace("{millions}", str(demo_millions)) for key, text in PAGE.items()}
            for language in LANGUAGES
        }
        self.labels = gr.I18n(**texts, **{"zh-CN": texts["zh"], "zh-TW": texts["zh"], "zh-HK": texts["zh"]})
        with gr.Blocks(title=name, analytics_enabled=False, fill_height=True, delete_cache=DELETED) as self.blocks:
            self._draw(sliders, demo_millions is not None)
            self._connect()
        self.blocks.queue(default_concurrency_limit=None)  # the source of answers has a queue of its own
        self.threads = at_once + OTHER_THREADS

    def launch(self, **kwargs: Any) -> None:
        """Serves the page until it is interrupted; arguments as for `gr.Blocks.launch`."""
        serve(
            self.blocks, self.name, self.threads, at_end=self.running.cancel_all, upload_bytes=MOST_BYTES, css=STYLE,
            i18n=self.labels, **kwargs,
        )  # fmt: skip

    def _draw(self, sliders: Sequence[float], is_demo: bool) -> None:
        text: Callable[[str], Any] = self.labels
        most, length, top_p, temperature = sliders
        begin = {"max_length": length, "top_p": top_p, "temperature": temperature} | self.settings
        self.history = gr.State([])
        gr.Markdown(f"# {self.name}", elem_id="title")
        if is_demo:
            gr.Markdown(text("demo_vision"), elem_id="demo-note")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.picture = gr.Image(
                    label=text("picture"), sources=["upload", "clipboard"], type="filepath", height=320,
                    elem_id="picture", buttons=[],
                )  # fmt: skip
                # Nobody opens the file before `read_picture` does.
                vars(self.picture)["preprocess"] = lambda payload: None if payload is None else payload.path
                self.max_length = gr.Slider(
                    0, max(most, begin["max_length"]), begin["max_length"], step=1, label=text("max_length"),
                    elem_id="max_length",
                )  # fmt: skip
                self.top_p = gr.Slider(0, 1, begin["top_p"], step=0.01, label=text("top_p"), elem_id="top_p")
                self.temperature = gr.Slider(
                    0, max(1, begin["temperature"]), begin["temperature"], step=0.01, label=text("temperature"),
                    elem_id="temperature",
                )  # fmt: skip
                self.clear = gr.Button(text("clear"), elem_id="clear")
            with gr.Column(scale=3, min_width=320):
                self.chat = gr.Chatbot(
                    show_label=False, elem_id="chat", height=None, placeholder=text("picture_first"),
                    latex_delimiters=display.LATEX_DELIMITERS, allow_tags=False, sanitize_html=True, layout="bubble",
                    feedback_options=None, buttons=["copy"],
                )  # fmt: skip
                self.speed = gr.Markdown(elem_id="speed")
                self.box = gr.Textbox(
                    label=text("box"), show_label=False, placeholder=text("question"), elem_id="box", lines=1,
                    max_lines=6, submit_btn=True, max_length=MOST_CHARACTERS,
                )  # fmt: skip

    def _connect(self) -> None:
        sliders = [self.max_length, self.top_p, self.temperature]
        shown = [self.chat, self.history, self.speed]
        at_once: dict[str, Any] = {"queue": False, **PRIVATE}
        unsent = gr.State("")
        refusal = gr.JSON(visible=False)
        asked = self.box.submit(self.take, self.box, [self.box, unsent, refusal], **at_once)
        refusal.change(tell, refusal, None, **PRIVATE)
        changed = self.picture.input(self.renew, None, self.box, **at_once)
        for answer in (
            asked.success(self.ask, [unsent, self.picture, self.history, *sliders], shown, **PRIVATE),
            changed.success(self.describe, [self.picture, *sliders], shown, **PRIVATE),
        ):
            connect_drawn(answer, self.free, None, self.box, **at_once)
        self.box.stop(self.running.stop, **at_once)
        self.clear.click(self.reset, None, [self.picture, *shown, self.box], **at_once)
        self.blocks.unload(self.running.close)

    async def take(self, question: str, request: gr.Request) -> tuple[Any, Any, Any]:
        """Takes a question out of the box, or says why not."""
        if await self.running.begin(request):
            return gr.Textbox("", **BUSY), question, gr.skip()
        return gr.skip(), gr.skip(), refused(PAGE["busy"][language_of(request)])

    async def renew(self, request: gr.Request) -> Any:
        """Leaves the conversation about the picture before."""
        await self.running.leave(request)
        await self.running.begin(request)
        return gr.update(**BUSY)

    async def free(self, request: gr.Request) -> Any:
        return gr.update(**FREE) if await self.running.drawn(request) else gr.skip()

    async def reset(self, request: gr.Request) -> tuple[Any, ...]:
        await self.running.leave(request)
        return None, [], [], "", gr.update(**FREE)

    def describe(
        self, picture: str | None, max_length: int, top_p: float, temperature: float, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """A new picture begins a new conversation, with its description; no picture begins an empty one."""
        if picture is None:
            with self.running.answering(request):
                yield {self.chat: [], self.history: [], self.speed: ""}
            return
        question = TERMINAL["describe"][language_of(request)]
        yield from self.ask(question, picture, [], max_length, top_p, temperature, request)

    def ask(
        self, question: str, picture: str | None, history: list[Any], max_length: int, top_p: float, temperature: float,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """Yields the answer as it grows. The history changes only at its end."""
        with self.running.answering(request) as running:
            if running is None:
                return
            settings = self.settings | {
                "image": picture, "max_length": int(max_length) or None, "top_p": top_p, "temperature": temperature,
            }  # fmt: skip
            for update in self._answer(question, history, settings, running.cancel, language_of(request)):
                if running.is_left:
                    return
                yield update

    def _answer(
        self, question: str, history: list[Any], settings: dict[str, Any], cancel: threading.Event, language: str
    ) -> Iterator[dict[Any, Any]]:
        if not question.strip():
            yield {self.speed: ""}
            return
        before = [
            message
            for asked, said in history
            for message in (display.question(asked), display.answer(said))
        ]
        shown = [*before, display.question(question)]
        yield {self.chat: shown, self.speed: PAGE["reading"][language]}
        step, drawn = None, 0.0
        try:
            for given in self.answer(question, [tuple(pair) for pair in history], settings, cancel):
                if isinstance(given, Waiting):
                    yield {self.speed: display.waiting(given.before, language)}
                    continue
                step = given
                if step.finish_reason is None and step.text and time.monotonic() - drawn > REFRESH:
                    yield {self.chat: [*shown, display.answer(step.text, growing=True)], self.speed: ""}
                    drawn = time.monotonic()
        except Exception as error:
            reason = failures.reason(error, language)
            told = html.escape(TERMINAL["error"][language].format(reason=reason))
            gr.Warning(told)
            yield {self.chat: [*shown, display.answer(told)], self.speed: ""}
            return
        if step is not None and step.finish_reason == "cancelled" and not step.text.strip():
            yield {self.chat: before, self.speed: ""}
        elif step is not None:
            said = [*shown, display.answer(step.text)]
            yield {self.chat: said, self.history: step.history, self.speed: display.speed(step, language)}
