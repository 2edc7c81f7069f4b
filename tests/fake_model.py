"""cli_demo.py with a model that answers at once and predictably: `python tests/fake_model.py VERSION ARGUMENTS...`."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # by this name it is one of our programs, which wait for torch only if they need it
    sys.argv[0] = str(Path(__file__).resolve().parents[1] / "cli_demo.py")

from chatglm.commands import chat
from chatglm.conversation import chat_format


class FakeModel:
    """Repeats the question with its number. Some questions do more: see `_pieces`."""

    name_or_path = "/nowhere"

    def __init__(self, version: int) -> None:
        self.version = version

    def stream_steps(
        self, tokenizer: Any, query: str, history: list[Any], *, role: str, cancel: threading.Event, **settings: Any
    ) -> Iterator[Any]:
        text, count = "", 0
        response: Any = None
        for count, piece in enumerate(self._pieces(query, history, role, cancel, settings), 1):
            if cancel.is_set() and query != "deaf":
                break
            text += piece
            yield self._step(piece, text, None, count, None, history)
        metadata = ""
        if query == "call":
            metadata, response = "weather", {"name": "weather", "parameters": {"城市": "北京"}}
        turn: list[Any] = [(query, text)]
        if self.version == 3:
            answer = {"role": "assistant", "metadata": metadata, "content": text}
            turn = [{"role": role, "content": query}, answer]
        reason = "cancelled" if cancel.is_set() else "stop"
        yield self._step("", text, reason, count + 1, response or text, [*history, *turn])

    def complete_steps(self, tokenizer: Any, text: str, *, cancel: threading.Event, **settings: Any) -> Iterator[Any]:
        for count, so_far in enumerate((text, f"{text} a", f"{text} a time")):
            yield self._step("", so_far, "stop" if count == 2 else None, count + 1, None, [])

    def _pieces(
        self, query: str, history: list[Any], role: str, cancel: threading.Event, settings: dict[str, Any]
    ) -> Iterator[str]:
        if query == "boom":
            raise ValueError("the question does not fit")
        if query in ("forever", "deaf"):
            for number in itertools.count():
                yield f"{number} "
                if cancel.wait(0.001) and query == "deaf":
                    yield "I do not listen "
        if query == "settings":
            yield json.dumps(settings)
        elif query == "history":
            yield json.dumps(history, ensure_ascii=False)
        else:
            yield from (f"{len(history)}", f"[{role}] ", *query)

    @staticmethod
    def _step(delta: str, text: str, reason: str | None, count: int, response: Any, history: list[Any]) -> Any:
        return SimpleNamespace(
            delta=delta, text=text, finish_reason=reason, completion_tokens=count, seconds=0.5, response=response,
            history=history,
        )  # fmt: skip


def load_fake(version: int) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    return FakeModel(version), SimpleNamespace(chat_format=chat_format(version))


if __name__ == "__main__":
    chosen = int(sys.argv.pop(1))
    chat.load_from_arguments = lambda args: load_fake(chosen)
    sys.exit(chat.main())
