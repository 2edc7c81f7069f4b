"""The game in the browser. The rounds of the visitors stay on the server, so that nobody can read a solution early."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from chatglm.front.arguments import LibraryError, check_address, importing_libraries, port_number, require
from chatglm.program import complain, run

from . import options
from .messages import text
from .puzzles import MOST_CHARACTERS, Deck, Puzzle
from .referee import Referee, RefereeError
from .rounds import Round
from .terminal import score

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported; else it sends usage data

STYLE = """
#story { position: sticky; top: 0; z-index: 2; padding: .6em 1em; background: var(--background-fill-primary);
         border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg) }
#note { opacity: .8; font-size: .9em }
"""
AT_ONCE = 16


@dataclass
class Visitor:
    """What the server keeps of a visitor."""

    deck: Deck
    round: Round
    lines: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: dict[int, Any]) -> Visitor:
        return self  # gradio copies what it keeps; a lock cannot be copied, and there is one round


class Page:
    """The page and its behaviour."""

    def __init__(self, referee: Referee, puzzles: list[Puzzle], lang: str, note: str, seed: int | None = None) -> None:
        import gradio as gr

        self.referee, self.puzzles, self.lang, self.seed = referee, puzzles, lang, seed
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        with gr.Blocks(title=self.text("title"), analytics_enabled=False, fill_height=True) as self.blocks:
            self.visitor = gr.State()
            gr.Markdown(f"# {self.text('title')}")
            gr.Markdown(note, elem_id="note")
            self.story = gr.Markdown(elem_id="story")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4):
                    self.chat = gr.Chatbot(
                        label=self.text("host"), elem_id="chat", sanitize_html=True, allow_tags=False,
                        render_markdown=False, buttons=[], feedback_options=None,
                    )  # fmt: skip
                    self.box = gr.Textbox(
                        show_label=False, label=self.text("box"), placeholder=self.text("box"), elem_id="box",
                        submit_btn=True, autofocus=True, max_length=MOST_CHARACTERS,
                    )  # fmt: skip
                with gr.Column(scale=1, min_width=200):
                    self.side = gr.Markdown(elem_id="score")
                    hint = gr.Button(self.text("button_hint"), elem_id="hint")
                    reveal = gr.Button(self.text("button_reveal"), elem_id="reveal")
                    new = gr.Button(self.text("button_new"), variant="primary", elem_id="new")
            shown = [self.visitor, self.story, self.chat, self.box, self.side]
            self.blocks.load(self.begin, None, shown, **quiet)
            new.click(self.begin, self.visitor, shown, **quiet)
            self.box.submit(self.ask, [self.visitor, self.box], shown, trigger_mode="once", **quiet)
            hint.click(self.hint, self.visitor, shown, **quiet)
            reveal.click(self.reveal, self.visitor, shown, **quiet)
        self.blocks.queue(default_concurrency_limit=AT_ONCE)

    def text(self, key: str, **values: object) -> str:
        return text(key, self.lang, **values)

    def begin(self, visitor: Visitor | None = None) -> tuple[Any, ...]:
        """A new round; at first also a new visitor, whose puzzles come in an order of their own."""
        if visitor is None:
            deck = Deck(self.puzzles, self.seed)
            visitor = Visitor(deck, Round(deck.draw()))
        else:
            with visitor.lock:
                visitor.round, visitor.lines = Round(visitor.deck.draw()), []
        return self.shown(visitor)

    def ask(self, visitor: Visitor, line: str) -> tuple[Any, ...]:
        with visitor.lock:
            if line.strip():
                self._ask(visitor, line.strip())
        return self.shown(visitor)

    def _ask(self, visitor: Visitor, line: str) -> None:
        played = visitor.round
        visitor.lines.append({"role": "user", "content": line[:MOST_CHARACTERS]})
        if played.over:
            self._say(visitor, self.text("bottom", bottom=played.puzzle.bottom))
            return
        if len(line) > MOST_CHARACTERS:
            self._say(visitor, self.text("too_long", most=MOST_CHARACTERS))
            return
        try:
            judgement, facts = played.ask(self.referee, line)
        except RefereeError as error:
            self._say(visitor, self.text("failed", reason=error))
            return
        said = [self.text(judgement.verdict) + ("" if judgement.sure else self.text("unsure"))]
        found = len(played.found) - len(facts)
        said += [
            self.text("key", found=number, all=len(played.puzzle.keys), fact=fact)
            for number, fact in enumerate(facts, found + 1)
        ]
        if played.over:
            said += [self.text("solved"), self.text("bottom", bottom=played.puzzle.bottom)]
        self._say(visitor, "\n".join(said))

    def hint(self, visitor: Visitor) -> tuple[Any, ...]:
        with visitor.lock:
            hint = visitor.round.hint()
            number, all_ = visitor.round.hints_used, len(visitor.round.puzzle.hints)
            said = self.text("no_hint") if hint is None else self.text("hint", number=number, all=all_, hint=hint)
            self._say(visitor, said)
        return self.shown(visitor)

    def reveal(self, visitor: Visitor) -> tuple[Any, ...]:
        with visitor.lock:
            if not visitor.round.over:
                visitor.round.reveal()
                self._say(visitor, self.text("bottom", bottom=visitor.round.puzzle.bottom))
        return self.shown(visitor)

    def _say(self, visitor: Visitor, said: str) -> None:
        visitor.lines.append({"role": "assistant", "content": said})

    def shown(self, visitor: Visitor) -> tuple[Any, ...]:
        """What the components show; of the bottom only what was said in `lines`."""
        puzzle = visitor.round.puzzle
        story = self.text("puzzle", title=_escaped(puzzle.title), surface=_escaped(puzzle.surface))
        return visitor, story, list(visitor.lines), "", self.text("score", **score(visitor.round))


def _escaped(text: str) -> str:
    """Text for Markdown: a puzzle file may hold anything."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]()#+-.!<>|~$&" else sign for sign in text)


def main(lang: str, arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is interrupted. Returns the exit status, 1 if referee or address are not available."""
    return run(lambda: _main(lang, arguments, prog), prints=False)


def _main(lang: str, arguments: list[str] | None, prog: str | None) -> int:
    parser = options.parser(prog, lang, "web")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=7860, help="default: %(default)s")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    args = parser.parse_args(arguments)
    try:
        puzzles = options.puzzles(args)
        require("web", lang)
        check_address(args.host, args.port)
        referee, note = options.referee(args, puzzles)
        with importing_libraries(lang):
            from chatglm.commands.page_server import limit_connections
            from chatglm.front.page.serving import serve

            limit_connections()
        page = Page(referee, puzzles, lang, note, args.seed)
        serve(
            page.blocks, text("title", lang), 2 * AT_ONCE, css=STYLE, server_name=args.host, server_port=args.port,
            inbrowser=args.open,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, LibraryError) as error:
        complain(text("error", lang, reason=error))
        return 1
    return 0
