"""The web page, built with gradio: a chat for each visitor with any source of answers."""

from __future__ import annotations

import asyncio
import html
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from ...conversation.formats import ChatFormat
from ...language import LANGUAGES
from ..abilities import Abilities
from ..messages import PAGE
from ..session import Session
from . import behaviour, browser_store, display
from .answering import Answer
from .browser_store import KNOBS
from .calls import MODES, Calls
from .panel import Panel
from .running import BUSY, FREE, RunningAnswers, connect_drawn, refused, tell
from .serving import serve
from .stored_chat import StoredChat
from .style import CLOSE_SIDE, STYLE
from .visitor import language_of, valid_settings

#: (question, history, settings, cancel) -> places in the queue and steps of the answer, as `ChatEngine.chat_in_queue`
#: gives them. Settings are its keyword arguments, including `role` and, if there is a choice, `adapter`; once `cancel`
#: is set, the answer soon ends with the text so far.
AnswerSource = Callable[[str, list[Any], dict[str, Any], threading.Event], Iterator[Any]]

EXAMPLES = ["你好", "Hello", "12 + 7 = ?", "3公里等于多少米？"]
OTHER_THREADS = 40  # for what is not an answer
MOST_CHARACTERS = 200_000  # of a question; longer ones are refused before the tokenizer sees them
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Page:
    """The page and its behaviour.

    Args:
        chat_format: the model's: gives its name, the form of histories, the sliders, and whether it has a system prompt
            and tools.
        settings: keyword arguments for every answer; `max_length`, `top_p` and `temperature` are the sliders' initial
            values.
        abilities: tools that were given with the page.
        kernels: a `KernelPool`, if the visitors' models may run code.
        adapters: the model's adapters, of which the visitor may choose one or none; initially the first.
        demo_millions: parameters in millions if the model is the bundled demo, for the note that says so.
        at_once: how many visitors' questions the source of answers takes at the same time; each needs a thread.
        signed_in: whether visitors have signed in, and may want to sign out.
    """

    def __init__(
        self,
        answer: AnswerSource,
        chat_format: ChatFormat,
        settings: Mapping[str, Any] | None = None,
        *,
        system: str | None = None,
        abilities: Abilities | None = None,
        kernels: Any = None,
        adapters: Sequence[str] = (),
        demo_millions: int | None = None,
        at_once: int = 64,
        signed_in: bool = False,
    ) -> None:
        self.answer, self.chat_format, self.settings = answer, chat_format, dict(settings or {})
        self.adapters, self.signed_in = list(adapters), signed_in
        self.calls = Calls(chat_format, abilities or Abilities(), kernels)
        self.running = RunningAnswers()
        texts = {
            language: {key: text[language].replace("{millions}", str(demo_millions)) for key, text in PAGE.items()}
            for language in LANGUAGES
        }
        self.labels = gr.I18n(**texts, **{"zh-CN": texts["zh"], "zh-TW": texts["zh"], "zh-HK": texts["zh"]})
        self.name = chat_format.name
        with gr.Blocks(title=self.name, analytics_enabled=False, fill_height=True) as self.blocks:
            self._draw(system, (abilities or Abilities()).written, demo_millions is not None)
            self._connect()
        self.blocks.queue(default_concurrency_limit=None)  # the source of answers has a queue of its own
        self.threads = at_once + OTHER_THREADS

    def launch(self, **kwargs: Any) -> None:
        """Serves the page until it is interrupted; arguments as for `gr.Blocks.launch`."""
        serve(
            self.blocks, self.name, self.threads, at_end=self.running.cancel_all, css=STYLE,
            js=behaviour.script(self.name), i18n=self.labels, **kwargs,
        )  # fmt: skip

    def _draw(self, system: str | None, tools: Any, is_demo: bool) -> None:
        text: Callable[[str], Any] = self.labels
        self.panel = Panel(self, text)
        most, length, top_p, temperature = self.chat_format.sliders
        begin = {"max_length": length, "top_p": top_p, "temperature": temperature} | self.settings
        # These live in the browser, so that a restart of the server loses nothing.
        self.place = gr.JSON(visible=False)  # the open chat, as `StoredChat.write` gives it
        self.growing = gr.JSON(visible=False)  # its answer so far, on its way into the store
        self.wanted = gr.JSON(visible=False)  # what to open, with its settings
        self.copied = gr.Textbox(visible=False)
        self.refusal = gr.JSON(visible=False)  # why a question was not taken
        with gr.Sidebar(open=False, elem_id="side") as self.side:
            self.new = gr.Button(text("new"), variant="primary", elem_id="new")
            self.search = gr.Textbox(label=text("search"), elem_id="search")
            self.chat_list = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[], label=text("chats"), layout="table", type="index",
                samples_per_page=50, elem_id="chats",
            )  # fmt: skip
            self.title = gr.Textbox(label=text("rename"), max_length=200, elem_id="rename")
            self.delete = gr.Button(text("delete"), size="sm", elem_id="delete")
            self.adapter = gr.Dropdown(
                [*self.adapters, (self.name, "")], value=next(iter(self.adapters), ""), label=text("model"),
                visible=bool(self.adapters), filterable=False, elem_id="adapter",
            )  # fmt: skip
            self.mode = gr.Radio(
                [(MODES[mode], mode) for mode in self.calls.modes], value=self.calls.first, label=text("mode"),
                visible=len(self.calls.modes) > 1, elem_id="mode",
            )  # fmt: skip
            self.system = gr.Textbox(
                system or "", label=text("system"), lines=2, visible=self.chat_format.knows_system_prompt,
                elem_id="system",
            )  # fmt: skip
            self.tools = gr.Textbox(
                json.dumps(tools, ensure_ascii=False, indent=1) if tools else "", label=text("tools"), lines=2,
                max_lines=6, visible=self.calls.first == "tools", elem_id="tools",
            )  # fmt: skip
            can_run = bool(self.calls.tools or self.calls.kernels)
            self.auto = gr.Checkbox(False, label=text("auto"), visible=can_run, elem_id="auto")
            self.panel.draw_side(self.calls.first == "code")
            self.max_length = gr.Slider(
                0, max(most, begin["max_length"]), begin["max_length"], step=1, label=text("max_length"),
                info=text("max_length_info"), elem_id="max_length",
            )  # fmt: skip
            self.top_p = gr.Slider(0, 1, begin["top_p"], step=0.01, label=text("top_p"), elem_id="top_p")
            self.temperature = gr.Slider(
                0, max(1, begin["temperature"]), begin["temperature"], step=0.01, label=text("temperature"),
                info=text("temperature_info"), elem_id="temperature",
            )  # fmt: skip
            with gr.Row():
                self.export_markdown = gr.Button(text("export_markdown"), size="sm", elem_id="export-markdown")
                self.export_json = gr.Button(text("export_json"), size="sm", elem_id="export-json")
                self.export_all = gr.Button(text("export_all"), size="sm", elem_id="export-all")
                self.import_files = gr.Button(text("import"), size="sm", elem_id="import")
            self.logout = gr.Button(text("logout"), size="sm", visible=self.signed_in, elem_id="logout")
        sliders = [self.max_length, self.top_p, self.temperature]
        # In the order of KNOBS.
        self.knobs: list[Any] = [self.adapter, self.system, self.tools, *sliders, self.mode, self.auto]
        gr.Markdown(f"# {self.name}", elem_id="title")
        if is_demo:
            gr.Markdown(text("demo"), elem_id="demo-note")
        self.notice = gr.Markdown(visible=False, elem_id="notice")  # about the browser's store
        self.chat = gr.Chatbot(
            show_label=False, elem_id="chat", scale=1, height=None, placeholder=text("placeholder"), editable="user",
            buttons=["copy"], latex_delimiters=display.LATEX_DELIMITERS, allow_tags=False, sanitize_html=True,
            layout="bubble", group_consecutive_messages=False, feedback_options=None,
            examples=[{"text": text} for text in EXAMPLES],
        )  # fmt: skip
        self.panel.draw()
        self.speed = gr.Markdown(elem_id="speed")
        self.box = gr.Textbox(
            label=text("box"), show_label=False, placeholder=text("question"), elem_id="box", lines=1, max_lines=10,
            submit_btn=True, stop_btn=False, autofocus=True, max_length=MOST_CHARACTERS,
        )  # fmt: skip

    def _connect(self) -> None:
        store, chat = browser_store, self.chat
        at_once: dict[str, Any] = {"queue": False, **PRIVATE}
        begun = [*self._shown, self.refusal]
        begins = [
            self.box.submit(self.ask, [self.box, self.place], begun, js=store.ASK, **at_once),
            chat.example_select(self.ask_example, self.place, begun, js=store.LATEST, **at_once),
            chat.retry(self.retry, self.place, begun, js=store.HERE, **at_once),
            chat.edit(self.edit, self.place, begun, js=store.HERE, **at_once),
        ]
        replied = [*self._shown, self.growing]
        answers = [begin.success(self.reply, [self.place, *self.knobs], replied, **PRIVATE) for begin in begins]
        answers += self.panel.connect(replied, PRIVATE)
        self.refusal.change(tell, self.refusal, None, **PRIVATE)
        for answer in answers:
            connect_drawn(answer, self.free, self.place, self.box, **at_once)
        self.box.stop(self.running.stop, **at_once)
        self.new.click(self.start, None, self._shown, js=store.LEAVE, **at_once)
        chat.clear(self.start, None, self._shown, js=store.LEAVE, **at_once)
        chat.undo(self.undo, self.place, self._shown, js=store.HERE, **at_once)
        self.chat_list.click(None, self.chat_list, self.wanted, js=store.call("choose"))
        self.wanted.change(self.open, self.wanted, [*self._shown, *self.knobs], **at_once)
        self.new.click(None, js=CLOSE_SIDE)
        self.chat_list.click(None, js=CLOSE_SIDE)
        self.mode.input(None, self.mode, self.wanted, js=store.call("mode"))
        self.mode.change(self.show_mode, self.mode, [self.system, self.tools, self.panel.files], **at_once)
        self._connect_store(at_once)
        # The box copies the rendered message; the visitor wants the text as it was written.
        chat.copy(self.copy, self.place, self.copied, **at_once).then(
            None, self.copied, None, js="text => { if (text) navigator.clipboard?.writeText(text) }"
        )
        self.blocks.unload(self.running.close)

    def _connect_store(self, at_once: dict[str, Any]) -> None:
        """Connects what happens in the browser alone."""
        call = browser_store.call
        listed = [self.chat_list, self.title, self.notice, self.box]
        loaded = browser_store.script(self.chat_format)
        self.blocks.load(None, [self.box, *self.knobs], [self.wanted, *listed], js=loaded)
        self.place.change(None, self.place, listed, js=call("save"))
        self.growing.change(None, self.growing, None, js=call("grow"))
        self.box.change(None, self.box, None, js=call("draft"))
        gr.on([knob.change for knob in self.knobs], None, self.knobs, None, js=call("settings"))
        self.side.expand(None, None, listed, js=call("shown"))  # another tab may have changed some
        self.search.change(None, self.search, listed, js=call("search"))
        gr.on([self.title.submit, self.title.blur], None, self.title, listed, js=call("rename"))
        self.import_files.click(None, None, listed, js=call("importFiles"))
        buttons = [self.export_markdown, self.export_json, self.export_all, self.logout]
        for button, function in zip(buttons, ("exportMarkdown", "exportJson", "exportAll", "logout"), strict=True):
            button.click(None, js=call(function))
        self.delete.click(None, None, listed, js=call("forget")).then(self.start, None, self._shown, **at_once)

    @property
    def _shown(self) -> list[Any]:
        return [self.chat, self.place, self.box, self.speed, self.panel.group, self.panel.written]

    # ------------------------------------------------------------------------------------ a question and its answer

    async def ask(self, question: str, place: Any, request: gr.Request) -> dict[Any, Any]:
        if not question.strip():
            raise gr.Error("", visible=False, print_exception=False)

        def asked() -> StoredChat:
            chat = self.read(place)
            role = self._session(chat).next_role
            return chat.asked(self.calls.announced(chat, question) if role == "user" else question, role)

        begun = await self._begin(asked, request)
        return begun | ({self.box: gr.Textbox("", **BUSY)} if self.box in begun else {})

    async def ask_example(self, place: Any, request: gr.Request, chosen: gr.SelectData) -> dict[Any, Any]:
        return await self._begin(lambda: self.read(place).asked(chosen.value["text"], "user"), request)

    async def retry(self, place: Any, request: gr.Request) -> dict[Any, Any]:
        def asked() -> StoredChat:
            chat = self.read(place)
            session = self._session(chat)
            question, role = session.undo() or ("", "user")
            kept = len(chat.cut(session.history).messages)
            # The same seed would only give the same answer again.
            return chat.asked(question, role, kept, chat.attempt + 1)

        return await self._begin(asked, request)

    async def edit(self, place: Any, request: gr.Request, edited: gr.EditData) -> dict[Any, Any]:
        def asked() -> StoredChat:
            chat = self.read(place)
            index = chat.places()[edited.index if isinstance(edited.index, int) else edited.index[0]]
            return chat.asked(display.raw(edited.value), chat.messages[index]["role"], index)

        return await self._begin(asked, request)

    async def _begin(self, ask: Callable[[], StoredChat], request: gr.Request) -> dict[Any, Any]:
        """Begins an answer to the question of the chat that `ask` returns."""
        language = language_of(request)
        try:
            chat = await asyncio.to_thread(ask)
        except gr.Error as error:
            return {self.refusal: refused(error.message)}
        if chat.turn and len(chat.turn.question) > MOST_CHARACTERS:
            return {self.refusal: refused(PAGE["too_long"][language])}
        if not await self.running.begin(request):
            return {self.refusal: refused(PAGE["busy"][language])}
        return {
            self.chat: await asyncio.to_thread(chat.shown, language),
            self.place: chat.write(),
            self.box: gr.Textbox(**BUSY),
            self.speed: "",
            self.panel.group: gr.update(visible=False),
        }

    async def begin_call(self, request: gr.Request) -> Any:
        """Begins the answer after a call that waited for the visitor, or says why not."""
        return gr.skip() if await self.running.begin(request) else refused(PAGE["busy"][language_of(request)])

    def reply(
        self, place: Any, adapter: str, system: str, tools: str, max_length: int, top_p: float, temperature: float,
        mode: str, auto: bool, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """Yields the answer as it grows. The history changes only at its end, together with the display."""
        with self.running.answering(request) as running:
            chat = self.read(place)
            if running is not None and chat.turn is not None:
                settings = (adapter, system, tools, max_length, top_p, temperature, mode, auto)
                values = dict(zip(KNOBS, settings, strict=True))
                yield from Answer(self, chat, values, running, language_of(request)).updates()

    # ------------------------------------------------------------------------------------------------ conversations

    async def free(self, place: Any, request: gr.Request) -> Any:
        """After an answer: frees the box for a question."""
        if not await self.running.drawn(request):
            return gr.skip()
        return await asyncio.to_thread(lambda: self._free_box(self.read(place), request))

    async def start(self, request: gr.Request) -> list[Any]:
        await self.running.leave(request)
        return self._place(StoredChat(self.chat_format), request)

    async def open(self, wanted: Any, request: gr.Request) -> dict[Any, Any]:
        """Shows a chat of the browser with its settings; without a chat, sets only these."""
        wanted = wanted if isinstance(wanted, Mapping) else {}
        values = valid_settings(dict(zip(KNOBS, self.knobs, strict=True)), wanted.get("settings"))
        faster = wanted.get("restored") and self.running.get(request)  # the visitor has asked already
        if wanted.get("place") is None or faster:
            return values or {self.speed: gr.skip()}
        await self.running.leave(request)

        def shown() -> dict[Any, Any]:
            try:
                chat = self.read(wanted["place"])
            except gr.Error as error:
                return {self.speed: error.message}
            place = {self.place: chat.write() | {"opened": True}}
            return dict(zip(self._shown, self._place(chat, request), strict=True)) | place

        return values | await asyncio.to_thread(shown)

    async def undo(self, place: Any, request: gr.Request) -> list[Any]:
        """Takes the last turn back and puts its question into the box."""
        await self.running.leave(request)
        return await asyncio.to_thread(self._undo, place, request)

    def _undo(self, place: Any, request: gr.Request) -> list[Any]:
        chat = self.read(place)
        if chat.turn:
            return self._place(chat.without_turn(), request, chat.turn.question)
        session = self._session(chat)
        question, _ = session.undo() or ("", "user")
        return self._place(chat.cut(session.history), request, question)

    def copy(self, place: Any, copied: gr.CopyData, request: gr.Request) -> str:
        """Returns the raw text of a message that was copied as displayed."""
        return self.read(place).raw_text(copied.value, language_of(request))

    def show_mode(self, mode: str) -> list[Any]:
        """Shows what belongs to a mode."""
        system = self.chat_format.knows_system_prompt and mode != "code"
        return [gr.update(visible=one) for one in (system, mode == "tools", mode == "code")]

    def _place(self, chat: StoredChat, request: gr.Request, question: str = "") -> list[Any]:
        """Returns values for `_shown`: the idle page with this chat, and a question that returns into the box."""
        place = chat.write() | {"unsent": question}
        shown = [chat.shown(language_of(request)), place, self._free_box(chat, request), ""]
        return [*shown, *self.panel.pending(chat).values()]

    def _free_box(self, chat: StoredChat, request: gr.Request) -> Any:
        key = "observation" if self._session(chat).next_role == "observation" else "question"
        return gr.update(**FREE, placeholder=PAGE[key][language_of(request)])

    def read(self, place: Any) -> StoredChat:
        try:
            return StoredChat.read(self.chat_format, place)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def _session(self, chat: StoredChat) -> Session:
        session = Session(self.chat_format)
        session.history = list(chat.history)
        return session
