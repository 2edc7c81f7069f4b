"""A chat in the form in which the visitor's browser keeps it and sends it with every question."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...conversation.formats import ChatFormat
from ..messages import PAGE, TERMINAL
from . import display

MOST_PICTURES = 1_500_000  # characters of a chat's pictures


@dataclass(frozen=True)
class Turn:
    """A question whose answer is still coming; `kept` counts the messages before it."""

    id: str
    question: str
    role: str
    kept: int


@dataclass(frozen=True)
class StoredChat:
    """One chat, as an immutable value.

    Args:
        id: its name in the browser's store; "" for a chat without a question.
        visit: the browser's name for this opening of it, by which it knows what comes late from an earlier one.
        history: in the model's form, without the system message.
        notes: index of a message -> what is said under it: why the answer failed, or "" if it was interrupted.
        pictures: index of a message -> pictures under it, PNG in Base64.
        attempt: how often the last question has been asked again.
        turn: the question that is being answered. Until there is an answer, `history` is what to go back to.
    """

    chat_format: ChatFormat
    id: str = ""
    history: list[Any] = field(default_factory=list)
    notes: dict[int, str] = field(default_factory=dict)
    attempt: int = 0
    turn: Turn | None = None
    pictures: dict[int, list[str]] = field(default_factory=dict)
    visit: str = ""

    @classmethod
    def read(cls, chat_format: ChatFormat, value: Any) -> StoredChat:
        """Reads what a browser sent, which anyone may have written. Raises ValueError."""
        if value is None:
            return cls(chat_format)
        try:
            history = chat_format.validate(value["history"])
            notes = {int(index): str(note) for index, note in (value.get("notes") or {}).items()}
            turn = value.get("turn")
            if turn is not None:
                turn = Turn(
                    str(turn["id"]), chat_format.check_query(turn["question"], turn["role"]), turn["role"],
                    max(0, int(turn["kept"])),
                )  # fmt: skip
            pictures = {int(index): list(map(str, some)) for index, some in (value.get("pictures") or {}).items()}
            for some in pictures.values():
                _ = [display.picture(one) for one in some]
            name, visit, attempt = str(value["id"]), str(value.get("visit") or ""), int(value.get("attempt") or 0)
            return cls(chat_format, name, history, notes, attempt, turn, pictures, visit)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is not a chat of {chat_format.name} ({error})") from error

    def write(self) -> dict[str, Any]:
        """Returns what `read` reads."""
        written: dict[str, Any] = {
            "id": self.id, "visit": self.visit, "history": self.history,
            "notes": {str(index): note for index, note in self.notes.items()},
            "attempt": self.attempt, "pictures": {str(index): some for index, some in self.pictures.items()},
        }  # fmt: skip
        return written | ({"turn": vars(self.turn)} if self.turn else {})

    def asked(self, question: str, role: str, kept: int | None = None, attempt: int = 0) -> StoredChat:
        """Returns the chat with a question after its first `kept` messages, or after all of them."""
        kept = len(self.messages) if kept is None else kept
        turn = Turn(uuid.uuid4().hex, question, role, kept)
        return replace(self.named(), attempt=attempt, turn=turn)

    def named(self) -> StoredChat:
        """Returns the chat with a name, which it otherwise gets with its first question."""
        return replace(self, id=self.id or uuid.uuid4().hex, visit=self.visit or uuid.uuid4().hex)

    def answered(self, history: list[Any]) -> StoredChat:
        """Returns the chat after the turn; `history` includes it."""
        kept = self.turn.kept if self.turn else len(self.messages)
        return replace(self._before(kept), history=history, turn=None)

    def called(self, observation: str, pictures: Sequence[str] = ()) -> StoredChat:
        """Returns the chat with the result of its last call, which is to be answered."""
        asked = self.asked(observation, "observation", attempt=self.attempt)
        if not pictures:
            return asked
        return replace(asked, pictures=_newest({**self.pictures, len(self.messages): list(pictures)}))

    def _before(self, kept: int) -> StoredChat:
        """Returns the chat without what belongs to later messages; a picture may be the turn's that is answered."""
        notes = {index: note for index, note in self.notes.items() if index < kept}
        return replace(self, notes=notes, pictures={at: some for at, some in self.pictures.items() if at <= kept})

    def broken_off(self, answer: str, reason: str) -> StoredChat:
        """Returns the chat after an answer of which only the beginning came."""
        assert self.turn is not None
        message = {"role": "assistant", "metadata": "", "content": answer}
        turn = self.turn
        history = self.chat_format.history_after(self.before, turn.question, turn.role, answer, [message])
        after = self.answered(history)
        return replace(after, notes={**after.notes, len(after.messages) - 1: reason})

    def without_turn(self) -> StoredChat:
        """Returns the chat as it was before the question."""
        return replace(self, turn=None)

    def cut(self, history: Sequence[Any]) -> StoredChat:
        """Returns the chat with only the beginning `history` of it."""
        kept = len(self.chat_format.as_messages(history))
        pictures = {index: some for index, some in self.pictures.items() if index < kept}
        return replace(self._before(kept), history=list(history), pictures=pictures, turn=None, attempt=0)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history as role messages."""
        return self.chat_format.as_messages(self.history)

    @property
    def before(self) -> list[Any]:
        """The history to which the question is added."""
        return self.chat_format.from_messages(self.messages[: self.turn.kept]) if self.turn else self.history

    def places(self) -> list[int]:
        """The index of the message to which each of `shown` belongs: pictures are under theirs."""
        count = len(self.chat_format.as_messages(self.before)) + (self.turn is not None)
        return [index for index in range(count) for _ in (0, *self.pictures.get(index, []))]

    def shown(self, language: str) -> list[dict[str, Any]]:
        """Returns the chat as gradio's messages, with the notes, and the question that is being answered."""
        shown = display.messages(self.chat_format, self.before)
        for index, note in self.notes.items():
            if index < len(shown):
                said = TERMINAL["error"][language].format(reason=note) if note else PAGE["interrupted"][language]
                shown[index]["content"] = with_note(shown[index]["content"], said)
        if self.turn:
            asked = display.observation if self.turn.role == "observation" else display.question
            shown.append(asked(self.turn.question))
        return [
            message
            for index, text in enumerate(shown)
            for message in (text, *map(display.picture, self.pictures.get(index, [])))
        ]

    def raw_text(self, shown: str, language: str) -> str:
        """Returns the text of a message that was copied as displayed."""
        displayed = [inspect.cleandoc(message["content"]) for message in self.shown(language)]
        texts = display.texts(self.chat_format, self.before)
        raw = {one: texts[place] for one, place in zip(displayed, self.places(), strict=True) if place < len(texts)}
        return raw.get(inspect.cleandoc(shown)) or display.raw(shown)


def _newest(pictures: dict[int, list[str]]) -> dict[int, list[str]]:
    """The latest pictures, as many as the browser's store and a request bear."""
    kept: dict[int, list[str]] = {}
    for index in sorted(pictures, reverse=True):
        if sum(len(one) for some in (*kept.values(), pictures[index]) for one in some) > MOST_PICTURES:
            break
        kept[index] = pictures[index]
    return kept


def with_note(markdown: str, note: str) -> str:
    """Returns the Markdown of a message with a note under it, also if its last block of code is not closed."""
    fences = [line.strip()[:3] for line in markdown.splitlines() if line.lstrip().startswith(("```", "~~~"))]
    closing = f"\n{fences[-1]}" if len(fences) % 2 else ""
    return f"{markdown}{closing}\n\n⚠ {display.question_markdown(note)}"
