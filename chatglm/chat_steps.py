"""`ChatStep`, one step of an answer in a conversation, and how it is made from a step of the decode loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .conversation.history import has_tools
from .conversation.shown_answer import AnswerCleaner
from .generation import GenerationStep


@dataclass(frozen=True)
class ChatStep(GenerationStep):
    """A `GenerationStep` of a conversation.

    `text` is the answer as the user sees it. Its end may change (generation 1's punctuation depends on what follows);
    deltas do not: together they are the last `text`. `response` and `history` are what `chat` returns; before the last
    step they hold the text so far.
    """

    delta: str
    response: str | dict[str, Any]
    history: list[Any]


class ShownAnswer:
    """Turns the `GenerationStep`s of an answer into `ChatStep`s, which hold what the user sees.

    Args:
        query, history, role: of the turn, as in `stream_steps`.
    """

    def __init__(self, tokenizer: Any, query: str, history: Sequence[Any] | None, role: str = "user") -> None:
        self._cleaner = AnswerCleaner(tokenizer)
        self._format = self._cleaner.chat_format
        self._query, self._role = query, role
        self._before, self._with_tools = self._format.validate(history, query), has_tools(history)

    def step(self, step: GenerationStep) -> ChatStep:
        cleaner, is_last = self._cleaner, step.finish_reason is not None
        parts = cleaner.messages(step.text)
        text = cleaner.text(parts)
        if is_last:
            answer = cleaner.parse(step.text, self._with_tools)
            response, messages = answer.content, answer.messages
        else:
            # A history holds what the model said: the training date is filled in for the reader only.
            response = text
            messages = [{"role": "assistant", "metadata": "", "content": "\n".join(parts).strip()}]
        return ChatStep(
            **{name: getattr(step, name) for name in GenerationStep.__dataclass_fields__ if name != "text"},
            text=text,
            delta=cleaner.advance(parts, is_last),
            response=response,
            history=self._format.history_after(self._before, self._query, self._role, response, messages),
        )


def ids_to_text(tokenizer: Any) -> Callable[[list[int]], str]:
    """Returns the function that decodes the ids of an answer, without clean-up."""
    return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
