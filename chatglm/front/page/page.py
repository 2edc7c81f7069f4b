"""The web page, built with gradio: a chat for each visitor with any source of answers."""

from __future__ import annotations

import contextlib
import gc
import html
import inspect
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...conversation.formats import ChatFormat
from ...engine import Waiting
from ...language import LANGUAGES, browser_language
from ..messages import PAGE, TERMINAL
from ..session import Session
from . import behaviour, display, failures, log
from .browser_store import FORGET, KEEP, ONE, READ
from .responses import middleware
from .style import CLOSE_SIDE, STYLE, theme

#: (question, history, settings, cancel) -> places in the queue and steps of the answer, as `ChatEngine.chat_in_queue`
#: gives them. Settings are its keyword arguments, including `role` and, if there is a choice, `adapter`; once `cancel`
#: is set, the answer soon ends with the text so far.
AnswerSource = Callable[[str, list[Any], dict[str, Any], threading.Event], Iterator[Any]]

EXAMPLES = ["你好", "Hello", "12 + 7 = ?", "3公里等于多少米？"]
OTHER_THREADS = 40  # for what is not an answer
REFRESH = 0.05  # seconds between two updates of a growing answer
MOST_CHARACTERS = 200_000  # of a question; longer ones are refused before the tokenizer sees them
MOST_CHATS = 50  # kept in the browser, whose store is small
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class PendingQuestion:
    """A question, the history before it, and the history to restore if there is no answer."""

    question: str
    role: str
    history: list[Any]
    before: list[Any]
    attempt: int = 0


class Page:
    """The page and its behaviour.

    Args:
        chat_format: the model's: gives its name, the form of histories, the sliders, and whether it has a system prompt
            and tools.
        settings: keyword arguments for every answer; `max_length`, `top_p` and `temperature` are the sliders' initial
            values.
        adapters: the model's adapters, of which the visitor may choose one or none; initially the first.
        demo_millions: parameters in millions if the model is the bundled demo, for the note that says so.
        at_once: how many visitors' questions the source of answers takes at the same time; each needs a thread.
    """

    def __init__(
        self,
        answer: AnswerSource,
        chat_format: ChatFormat,
        settings: Mapping[str, Any] | None = None,
        *,
        system: str | None = None,
        tools: list[Any] | None = None,
        adapters: Sequence[str] = (),
        demo_millions: int | None = None,
        at_once: int = 64,
    ) -> None:
        self.answer, self.chat_format, self.settings = answer, chat_format, dict(settings or {})
        self.adapters = list(adapters)
        self.running: dict[str, threading.Event] = {}  # by gradio's session: at most one answer for each visitor
        texts = {
            language: {key: text[language].replace("{millions}", str(demo_millions)) for key, text in PAGE.items()}
            for language in LANGUAGES
        }
        self.labels = gr.I18n(**texts, **{"zh-CN": texts["zh"], "zh-TW": texts["zh"], "zh-HK": texts["zh"]})
        self.name = chat_format.name
        with gr.Blocks(title=self.name, analytics_enabled=False, fill_height=True) as self.blocks:
            self._draw(system, tools, demo_millions is not None)
            self._connect()
        self.blocks.queue(default_concurrency_limit=None)  # the source of answers has a queue of its own
        self.threads = at_once + OTHER_THREADS

    def launch(self, **kwargs: Any) -> None:
        """Serves the page until it is interrupted; arguments as for `gr.Blocks.launch`.

        Features with which visitors could fill the disk are off.
        """
        log.keep_brief()
        self.blocks.launch(
            prevent_thread_lock=True,
            theme=theme(),
            css=STYLE,
            js=behaviour.script(self.name),
            max_threads=self.threads,
            i18n=self.labels,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            max_file_size=1,
            app_kwargs={"middleware": middleware(self.name)},
            **kwargs,
        )
        with contextlib.suppress(KeyboardInterrupt):
            while self.blocks.is_running:
                time.sleep(0.1)
        for cancel in self.running.copy().values():
            cancel.set()
        server = self.blocks.server
        if server is not None:
            server.config.timeout_graceful_shutdown = 0  # otherwise it waits for open pages
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would log how many there are
        self.blocks.close(verbose=False)
        gc.freeze()  # gradio and torch have so many objects that a collection at exit takes seconds

    def _draw(self, system: str | None, tools: list[Any] | None, is_demo: bool) -> None:
        text: Callable[[str], Any] = self.labels
        most, length, top_p, temperature = self.chat_format.sliders
        begin = {"max_length": length, "top_p": top_p, "temperature": temperature} | self.settings
        self.history = gr.State([])  # raw texts, without the system message
        self.turn = gr.State(None)
        self.chat_id = gr.Textbox(visible=False)
        self.copied = gr.Textbox(visible=False)
        self.kept = gr.JSON(visible=False)  # on its way into the browser's store
        self.chats = gr.JSON([], visible=False)  # those that are listed
        with gr.Sidebar(open=False, elem_id="side") as self.side:
            self.new = gr.Button(text("new"), variant="primary", elem_id="new")
            self.chat_list = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[], label=text("chats"), layout="table", type="index",
                elem_id="chats",
            )  # fmt: skip
            self.delete = gr.Button(text("delete"), size="sm", elem_id="delete")
            self.adapter = gr.Dropdown(
                [*self.adapters, (self.name, "")], value=next(iter(self.adapters), ""), label=text("model"),
                visible=bool(self.adapters), filterable=False, elem_id="adapter",
            )  # fmt: skip
            self.system = gr.Textbox(
                system or "", label=text("system"), lines=2, visible=self.chat_format.knows_system_prompt,
                elem_id="system",
            )  # fmt: skip
            self.tools = gr.Textbox(
                json.dumps(tools, ensure_ascii=False, indent=1) if tools else "", label=text("tools"), lines=2,
                max_lines=6, visible=self.chat_format.knows_tools, elem_id="tools",
            )  # fmt: skip
            self.max_length = gr.Slider(
                0, max(most, begin["max_length"]), begin["max_length"], step=1, label=text("max_length"),
                info=text("max_length_info"), elem_id="max_length",
            )  # fmt: skip
            self.top_p = gr.Slider(0, 1, begin["top_p"], step=0.01, label=text("top_p"), elem_id="top_p")
            self.temperature = gr.Slider(
                0, max(1, begin["temperature"]), begin["temperature"], step=0.01, label=text("temperature"),
                info=text("temperature_info"), elem_id="temperature",
            )  # fmt: skip
        gr.Markdown(f"# {self.name}", elem_id="title")
        if is_demo:
            gr.Markdown(text("demo"), elem_id="demo-note")
        self.chat = gr.Chatbot(
            show_label=False, elem_id="chat", scale=1, height=None, placeholder=text("placeholder"), editable="user",
            buttons=["copy"], latex_delimiters=display.LATEX_DELIMITERS, allow_tags=False, sanitize_html=True,
            layout="bubble", group_consecutive_messages=False, feedback_options=None,
            examples=[{"text": text} for text in EXAMPLES],
        )  # fmt: skip
        self.speed = gr.Markdown(elem_id="speed")
        self.box = gr.Textbox(
            label=text("box"), show_label=False, placeholder=text("question"), elem_id="box", lines=1, max_lines=10,
            submit_btn=True, stop_btn=False, autofocus=True, max_length=MOST_CHARACTERS,
        )  # fmt: skip

    def _connect(self) -> None:
        begins = [
            self.box.submit(self.ask, [self.box, self.history], self._shown, queue=False, **PRIVATE),
            self.chat.example_select(self.ask_example, self.history, self._shown, queue=False, **PRIVATE),
            self.chat.retry(self.retry, [self.history, self.turn], self._shown, queue=False, **PRIVATE),
            self.chat.edit(self.edit, self.history, self._shown, queue=False, **PRIVATE),
        ]
        knobs = [self.adapter, self.system, self.tools, self.max_length, self.top_p, self.temperature]
        answers = [begin.success(self.reply, [self.turn, *knobs], self._shown, **PRIVATE) for begin in begins]
        for answer in answers:
            self._keep_after(answer)
        self.box.stop(self.stop, queue=False, **PRIVATE)
        # Leaving the conversation also ends its answer, of which nothing may arrive afterwards.
        leaving: dict[str, Any] = {"queue": False, "cancels": answers, **PRIVATE}
        place = [*self._shown, self.chat_id]
        self.new.click(self.start, None, place, **leaving)
        self.chat.clear(self.start, None, place, **leaving)
        self._keep_after(self.chat.undo(self.undo, [self.history, self.chat_id], place, **leaving))
        self.chat_list.click(self.open, [self.chat_list, self.chats], place, js=self._js(ONE), **leaving)
        for button in (self.new, self.chat_list):
            button.click(None, js=CLOSE_SIDE)
        self._list(self.blocks.load, READ)
        self._list(self.side.expand, READ)  # another tab may have stored some
        self._list(self.delete.click, FORGET).then(self.start, None, place, **leaving)
        # The box copies the rendered message; the visitor wants the text as it was written.
        self.chat.copy(self.copy, self.history, self.copied, queue=False, **PRIVATE).then(
            None, self.copied, None, js="text => { if (text) navigator.clipboard?.writeText(text) }"
        )
        self.blocks.unload(self.leave)

    def _keep_after(self, event: Any) -> None:
        kept = event.then(
            self.keep, [self.history, self.chat_id], [self.box, self.chat_id, self.kept], queue=False, **PRIVATE
        )
        self._list(kept.then, KEEP)

    def _list(self, event: Callable[..., Any], script: str) -> Any:
        """Lists the browser's chats after running `script`, which gets `kept` and the id of this chat."""
        inputs = [self.kept, self.chat_id]
        return event(self.list_chats, inputs, [self.chat_list, self.chats], js=self._js(script), queue=False, **PRIVATE)

    def _js(self, script: str) -> str:
        return script.replace("STORE", f"chatglm-{self.chat_format.generation}").replace("MOST", str(MOST_CHATS))

    @property
    def _shown(self) -> list[Any]:
        return [self.chat, self.history, self.turn, self.box, self.speed]

    # ------------------------------------------------------------------------------------ a question and its answer

    def ask(self, question: str, history: list[Any], request: gr.Request) -> dict[Any, Any]:
        if not question.strip():
            raise gr.Error("", visible=False, print_exception=False)
        return self._begin(PendingQuestion(question, self._next_role(history), history, history), request)

    def ask_example(self, history: list[Any], request: gr.Request, chosen: gr.SelectData) -> dict[Any, Any]:
        return self.ask(chosen.value["text"], history, request)

    def retry(self, history: list[Any], last: PendingQuestion | None, request: gr.Request) -> dict[Any, Any]:
        session = self._session(history)
        question, role = session.undo() or ("", "user")
        attempt = last.attempt + 1 if last else 1  # the same seed would only give the same answer again
        return self._begin(PendingQuestion(question, role, session.history, history, attempt), request)

    def edit(self, history: list[Any], request: gr.Request, edited: gr.EditData) -> dict[Any, Any]:
        index = edited.index if isinstance(edited.index, int) else edited.index[0]
        messages = self.chat_format.as_messages(history)
        kept = self.chat_format.from_messages(messages[:index])
        return self._begin(PendingQuestion(display.raw(edited.value), messages[index]["role"], kept, history), request)

    def _begin(self, turn: PendingQuestion, request: gr.Request) -> dict[Any, Any]:
        language = language_of(request)
        if request.session_hash in self.running:
            raise gr.Error(PAGE["busy"][language], print_exception=False)
        if len(turn.question) > MOST_CHARACTERS:
            raise gr.Error(PAGE["too_long"][language], print_exception=False)
        self.running[str(request.session_hash)] = threading.Event()
        return {
            self.chat: [*self._messages(turn.history), display.question(turn.question)],
            self.turn: turn,
            self.box: gr.Textbox("", submit_btn=False, stop_btn=True),
            self.speed: "",
        }

    def reply(
        self, turn: PendingQuestion, adapter: str, system: str, tools: str, max_length: int, top_p: float,
        temperature: float, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """Yields the answer as it grows. The history changes only at its end, together with the display."""
        session_hash, language = str(request.session_hash), language_of(request)
        cancel = self.running.get(session_hash)
        if cancel is None:  # the visitor left the conversation while waiting
            return
        shown = [*self._messages(turn.history), display.question(turn.question)]
        step, failure, drawn = None, "", 0.0
        yield {self.speed: PAGE["reading"][language]}
        try:
            session = Session(self.chat_format, system.strip() or None, read_tools(tools, language))
            head = len(session.history)
            settings = self.settings | {
                "role": turn.role, "max_length": int(max_length) or None, "top_p": top_p, "temperature": temperature,
            }  # fmt: skip
            if self.adapters:
                settings["adapter"] = adapter or None
            if "seed" in settings:
                settings["seed"] += turn.attempt
            for given in self.answer(turn.question, [*session.history, *turn.history], settings, cancel):
                if self.running.get(session_hash) is not cancel:
                    return
                if isinstance(given, Waiting):
                    yield {self.speed: display.waiting(given.before, language)}
                    continue
                step = given
                if step.finish_reason is None and step.text and time.monotonic() - drawn > REFRESH:
                    yield {self.chat: [*shown, display.answer(step.text, growing=True)], self.speed: ""}
                    drawn = time.monotonic()
        except Exception as error:
            failure = failures.reason(error, language)
        finally:
            if self.running.get(session_hash) is cancel:
                del self.running[session_hash]
        if not failure and step is not None and (step.text.strip() or step.finish_reason != "cancelled"):
            history = step.history[head:]
            yield {self.chat: self._messages(history), self.history: history, self.speed: display.speed(step, language)}
            return
        if failure:
            gr.Warning(html.escape(TERMINAL["error"][language].format(reason=failure)))
        # Restore the page; a typed question goes back into the box.
        restored = {self.chat: self._messages(turn.before), self.speed: ""}
        yield restored | ({} if turn.attempt else {self.box: turn.question})

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's answer; the text so far stays."""
        if cancel := self.running.get(str(request.session_hash)):
            cancel.set()

    def leave(self, request: gr.Request) -> None:
        """Ends the visitor's answer and discards it."""
        if cancel := self.running.pop(str(request.session_hash), None):
            cancel.set()

    # ------------------------------------------------------------------------------------------------ conversations

    def keep(self, history: list[Any], chat_id: str, request: gr.Request) -> tuple[Any, str, dict[str, Any]]:
        """After an answer: frees the box for a question and gives the browser the conversation to keep."""
        chat_id = chat_id or uuid.uuid4().hex
        running = str(request.session_hash) in self.running
        box = gr.skip() if running else self._free_box(history, request)
        return box, chat_id, {"id": chat_id, "history": history}

    def start(self, request: gr.Request) -> list[Any]:
        self.leave(request)
        return self._place([], "", request)

    def open(self, index: int, chosen: Any, request: gr.Request) -> list[Any]:
        self.leave(request)
        empty: dict[str, Any] = {"history": [], "id": ""}
        chat = next(iter(self._known(chosen)), empty)
        return self._place(chat["history"], chat["id"], request)

    def undo(self, history: list[Any], chat_id: str, request: gr.Request) -> list[Any]:
        """Takes the last turn back and puts its question into the box."""
        self.leave(request)
        session = self._session(history)
        question, _ = session.undo() or ("", "user")
        return self._place(session.history, chat_id, request, question)

    def list_chats(self, chats: Any, chat_id: str) -> tuple[Any, list[dict[str, Any]]]:
        known = self._known(chats)
        return gr.Dataset(samples=[[display.title(self.chat_format, chat["history"])] for chat in known]), known

    def copy(self, history: list[Any], copied: gr.CopyData) -> str:
        """Returns the raw text of a message that was copied as displayed."""
        shown = [inspect.cleandoc(message["content"]) for message in self._messages(history)]
        raw = dict(zip(shown, display.texts(self.chat_format, history), strict=True))
        return raw.get(inspect.cleandoc(copied.value)) or display.raw(copied.value)

    def _place(self, history: list[Any], chat_id: str, request: gr.Request, question: str = "") -> list[Any]:
        """Returns values for `_shown` and the id: the idle page with this conversation."""
        return [self._messages(history), history, None, self._free_box(history, request, question), "", chat_id]

    def _free_box(self, history: list[Any], request: gr.Request, question: str | None = None) -> Any:
        key = "observation" if self._next_role(history) == "observation" else "question"
        changes: dict[str, Any] = {
            "submit_btn": True,
            "stop_btn": False,
            "placeholder": PAGE[key][language_of(request)],
        }
        return gr.update(**changes) if question is None else gr.update(value=question, **changes)

    def _known(self, chats: Any) -> list[dict[str, Any]]:
        """Returns the valid conversations of this generation among a browser's chats, which anyone may have written."""
        known = []
        for chat in chats if isinstance(chats, list) else []:
            with contextlib.suppress(TypeError, ValueError, KeyError):
                known.append({"id": str(chat["id"]), "history": self.chat_format.validate(chat["history"])})
        return known[:MOST_CHATS]

    def _messages(self, history: list[Any]) -> list[dict[str, Any]]:
        return display.messages(self.chat_format, history)

    def _session(self, history: list[Any]) -> Session:
        session = Session(self.chat_format)
        session.history = list(history)
        return session

    def _next_role(self, history: list[Any]) -> str:
        return self._session(history).next_role


def language_of(request: gr.Request) -> str:
    """The language of the visitor's browser."""
    return browser_language(request.headers.get("accept-language", ""))


def read_tools(text: str, language: str) -> list[Any] | None:
    """Parses the tools that a visitor wrote. Raises ValueError if they are not JSON; the session checks the rest."""
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise ValueError(PAGE["tools_json"][language].format(reason=error)) from error
