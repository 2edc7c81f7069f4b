"""The chat about pictures in a terminal or a pipe: asks for a picture, describes it, answers questions about it."""

from __future__ import annotations

from typing import Any

from ...pictures import PictureError, read_picture
from ..terminal import Terminal


class PictureTerminal(Terminal):
    """A conversation for each picture."""

    allow_urls = False

    def chat(self, first: str | None = None) -> None:
        """Takes pictures and questions until `stop` or the end of the input.

        Args:
            first: the picture to begin with.
        """
        self.more = True
        while self.more:
            try:
                path, first = first or self.read_line("picture").strip(), None
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.say("interrupt")
                continue
            if path in ("stop", "/quit", "/exit", "/stop"):
                return
            if path in ("clear", "/clear") or not self.show(path):
                continue
            if self.settings["image"] is not None:
                self.answer(self.text("describe"), "user")
            super().chat()

    def show(self, path: str) -> bool:
        """Begins a conversation about the picture at `path`, or without one if that is empty; False if it cannot be
        read, which is then said."""
        try:
            picture = read_picture(path, self.allow_urls) if path else None
        except PictureError as error:
            self.fail(error)
            return False
        self.session.clear()
        self.settings["image"] = picture
        return True

    def take(self, line: str) -> bool:
        """As in the chat without pictures; `clear` ends the conversation about this one, `stop` the program."""
        if line in ("clear", "/clear"):
            self.say("cleared")
            return False
        self.more = super().take(line)
        return self.more

    def do_load(self, value: str) -> None:
        picture: Any = self.settings.get("image")
        super().do_load(value)
        self.settings["image"] = picture
