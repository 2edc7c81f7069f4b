"""The text of an answer as its tokens arrive: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .options import GenerationOptions
from .steps import FinishReason


class IncrementalDecoder:
    """Decodes tokens one by one. The text never ends inside a character; the final text equals decoding all at once.

    An incomplete UTF-8 sequence at the end is held back until it is complete or the caller calls `flush`. Long answers
    are decoded in windows, so that the work per token does not grow with the answer.

    Args:
        decode: ids -> text, without clean-up.
    """

    WINDOW, CONTEXT = 128, 16

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._settled = ""  # text of earlier windows
        self._context = ""  # text of this window's first ids, which repeat the last ids of the previous window

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text so far."""
        self._ids.append(token_id)
        text = self._text()
        whole = text.rstrip("\ufffd")
        # A character has at most 4 bytes: a longer run of replacement characters was written by the model.
        if len(text) - len(whole) > 4:
            whole = text[:-1]
        if whole == text and len(self._ids) > self.WINDOW:
            context = self._decode(self._ids[-self.CONTEXT :])
            if not context.startswith("\ufffd"):
                self._settled, self._context, self._ids = text, context, self._ids[-self.CONTEXT :]
        return whole

    def flush(self) -> str:
        """Returns the whole text, with an unfinished character as U+FFFD."""
        return self._text()

    def _text(self) -> str:
        return self._settled + self._decode(self._ids)[len(self._context) :]


class AnswerText:
    """The text of an answer as its tokens arrive: whole characters, without stop tokens and stop strings.

    Args:
        decode_ids: ids of the answer -> text, without clean-up. A prefix of the ids must give a prefix of the text.
    """

    def __init__(self, options: GenerationOptions, decode_ids: Callable[[list[int]], str]) -> None:
        self.tokens = 0
        self._text = ""
        self._decoder = IncrementalDecoder(decode_ids)
        self._stop_ids = set(options.stop_ids())
        self._stop_strings = list(options.stop_strings or [])

    def push(self, token_id: int | None, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """Adds a token, or none; returns the text so far, and why the answer ends here, or None.

        Args:
            reason: why the answer ends with this token, or None; a stop string in the text makes it "stop".
        """
        if token_id is not None:
            self.tokens += 1
            if token_id not in self._stop_ids:
                self._text = self._decoder.push(token_id)
        if reason is not None:
            self._text = self._decoder.flush()
        found = [place for place in map(self._text.find, self._stop_strings) if place >= 0]
        if found:
            self._text, reason = self._text[: min(found)], "stop"
        shown = self._text if reason is not None else _without_started_stop(self._text, self._stop_strings)
        return shown, reason


def _without_started_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Returns `text` without a tail that may be the beginning of a stop string."""
    longest = 0
    for stop in stop_strings:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return text[: len(text) - longest]
