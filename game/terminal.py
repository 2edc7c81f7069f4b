"""The game in a terminal, or in a pipe, where only answers go to standard output."""

from __future__ import annotations

import sys
from typing import Any

from chatglm.front.arguments import LibraryError
from chatglm.program import complain, put, run

from . import options
from .messages import COMMANDS, text
from .puzzles import MOST_CHARACTERS, Deck
from .referee import Referee, RefereeError
from .rounds import Round

CLEAR = "\x1b[2J\x1b[H"


class Terminal:
    """One player. `play` reads lines until `stop` or the end of the input."""

    def __init__(self, referee: Referee, deck: Deck, lang: str) -> None:
        self.referee, self.deck, self.lang = referee, deck, lang
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.round = Round(deck.draw())
        self.failed = False

    def say(self, key: str, **values: object) -> None:
        """Prints a message of the program: in a pipe on standard error."""
        (put if self.interactive else complain)(text(key, self.lang, **values))

    def answer(self, line: str) -> None:
        put(text("answer", self.lang, text=line) if self.interactive else line)

    def play(self) -> None:
        self.begin()
        while True:
            try:
                line = self.read()
                if not self.take(line.strip()):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                put("")
                self.say("stopped")

    def read(self) -> str:
        """Reads a line. Raises EOFError at the end of the input."""
        if self.interactive:
            return input(text("ask", self.lang))
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line

    def begin(self) -> None:
        self.say("puzzle", title=self.round.puzzle.title, surface=self.round.puzzle.surface)
        self.say("rules")

    def take(self, line: str) -> bool:
        """Takes a line: a word of `COMMANDS`, or a question. Returns False to end the game."""
        command = COMMANDS.get(line.casefold())
        if command == "stop":
            return False
        if command is not None:
            getattr(self, f"do_{command}")()
        elif line:
            self.ask(line)
        return True

    def ask(self, line: str) -> None:
        if self.round.over:
            self.say("over")
            return
        if len(line) > MOST_CHARACTERS:
            self.say("too_long", most=MOST_CHARACTERS)
            return
        try:
            judgement, facts = self.round.ask(self.referee, line)
        except RefereeError as error:
            self.failed = True
            self.say("failed", reason=error)
            return
        self.answer(text(judgement.verdict, self.lang) + ("" if judgement.sure else text("unsure", self.lang)))
        found = len(self.round.found) - len(facts)
        for number, fact in enumerate(facts, found + 1):
            put(text("key", self.lang, found=number, all=len(self.round.puzzle.keys), fact=fact))
        if self.round.over:
            self.say("solved")
            self.end()

    def end(self) -> None:
        put(text("bottom", self.lang, bottom=self.round.puzzle.bottom))
        self.do_score()
        self.say("over")

    def do_finish(self) -> None:
        if self.interactive:
            put(CLEAR, end="")
        self.round = Round(self.deck.draw())
        self.begin()

    def do_hint(self) -> None:
        hint = self.round.hint()
        if hint is None:
            self.say("no_hint")
        else:
            put(text("hint", self.lang, number=self.round.hints_used, all=len(self.round.puzzle.hints), hint=hint))

    def do_reveal(self) -> None:
        if self.round.over:
            self.say("over")
            return
        self.round.reveal()
        self.end()

    def do_score(self) -> None:
        self.say("score", **score(self.round))

    def do_help(self) -> None:
        self.say("rules")


def score(played: Round) -> dict[str, Any]:
    """The numbers of the message `score`."""
    return {
        "found": len(played.found), "all": len(played.puzzle.keys), "questions": len(played.asked),
        "hints": played.hints_used, "score": played.score,
    }  # fmt: skip


def main(lang: str, arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Plays until `stop`. Returns the exit status: 1 if no referee is available, or if one failed in a pipe."""
    return run(lambda: _main(lang, arguments, prog))


def _main(lang: str, arguments: list[str] | None, prog: str | None) -> int:
    args = options.parser(prog, lang).parse_args(arguments)
    try:
        puzzles = options.puzzles(args)
        referee, note = options.referee(args, puzzles)
    except (OSError, ValueError, RuntimeError, LibraryError) as error:
        complain(text("error", lang, reason=error))
        return 1
    terminal = Terminal(referee, Deck(puzzles, args.seed), lang)
    (put if terminal.interactive else complain)(note)
    terminal.play()
    if terminal.interactive:
        terminal.say("bye")
        return 0
    return int(terminal.failed)
