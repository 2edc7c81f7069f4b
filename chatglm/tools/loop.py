"""The loop: an answer, its calls, their results, and the next answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..conversation.formats import ChatFormat, names_of
from .running import MOST_CHARACTERS, Call, Observation, Runner, ToolRunner
from .sources import Ask, OpenAIServer, OwnModel
from .tool import Tool, check_tools

#: How often a model is asked for one question, as in ChatGLM3's page.
MAX_ROUNDS = 5
#: Decides on a call of a tool with `confirm`: True runs it, False tells the model that the user refused, None leaves
#: the call open and ends the loop.
Confirm = Callable[[Call], bool | None]

_REPEATED = "The same call was made before, with the result above; it was not made again."
_REFUSED = "The user did not allow this call."


@dataclass(frozen=True)
class Done:
    """The end of a conversation's turn.

    Args:
        messages: the whole conversation, for the next `run_conversation`: of a model of ours its history, of an
            `openai` client the messages of the API.
        reason: "stop" (an answer without a call), "rounds" (too many calls), "repeated" (the same call a second time),
            "open" (a call that waits for its result), "cancelled", "length" and others that the source gives.
    """

    messages: list[Any]
    reason: str


def run_conversation(
    model: Any,
    messages: Sequence[Any],
    tools: Iterable[Tool | Callable[..., Any]],
    max_rounds: int = MAX_ROUNDS,
    *,
    tokenizer: Any = None,
    confirm: Confirm | None = None,
    cancel: threading.Event | None = None,
    most_characters: int = MOST_CHARACTERS,
    **settings: Any,
) -> Iterator[Any]:
    """Lets a model answer the last of the messages and use tools for it.

    Args:
        model: a model of ours, with its `tokenizer`, or an `openai` client of any server.
        messages: chat messages as OpenAI's clients write them; those of a model of ours may also be a history. The
            last one is the user's, or a result. They are not changed.
        tools: tools, or functions of which `tool` can make them.
        max_rounds: most answers for this question.
        confirm: is asked about each call of a tool with `confirm`; without it, such calls are refused.
        cancel: set it to end soon; what was said stays.
        most_characters: of a result, the rest is cut off.
        **settings: for every answer: those of `stream_steps`, or of `client.chat.completions.create` (`model=` names
            one, by default the server's first).

    Yields:
        `Text` as an answer grows, `Call` before and `Observation` after each call, at last `Done`.

    Raises:
        TypeError, ValueError: the messages, tools or settings are malformed, or the model knows no tools.
    """
    known = check_tools(tools)
    if hasattr(model, "stream_steps"):
        if tokenizer is None:
            raise TypeError("a model of ours needs its tokenizer: run_conversation(..., tokenizer=tokenizer)")
        chat_format: ChatFormat = tokenizer.chat_format
        if known and not chat_format.knows_tools:
            raise ValueError(f"tools are for {names_of(lambda one: one.knows_tools)} only")

        def ask(question: str, history: list[Any], role: str) -> Iterator[Any]:
            return model.stream_steps(tokenizer, question, history, role=role, cancel=cancel, **settings)

        described = [one.describe() for one in known.values()]
        question, history, role = chat_format.open_question(messages, described or None)
        source: Any = OwnModel(ask, chat_format, question, history, role, list(known))
    elif hasattr(model, "chat") and hasattr(model.chat, "completions"):
        source = OpenAIServer(model, messages, known, cancel, settings)
    else:
        raise TypeError(f"{type(model).__name__} is neither a model of ours nor an openai client")
    return _rounds(source, ToolRunner(known, (), most_characters), max_rounds, confirm, cancel)


def tool_loop(
    ask: Ask,
    chat_format: ChatFormat,
    question: str,
    history: Sequence[Any],
    role: str,
    runner: Runner,
    max_rounds: int = MAX_ROUNDS,
    *,
    confirm: Confirm | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Any]:
    """The same for the front doors: `ask(question, history, role)` gives the steps of an answer.

    The history has its system message with the tools already. Also yields what `ask` yields beside steps.
    """
    source = OwnModel(ask, chat_format, question, history, role, runner.names)
    return _rounds(source, runner, max_rounds, confirm, cancel)


def _rounds(
    source: Any, runner: Runner, max_rounds: int, confirm: Confirm | None, cancel: threading.Event | None
) -> Iterator[Any]:
    if max_rounds < 1:
        raise ValueError(f"max_rounds must be 1 or more, not {max_rounds}")
    made: set[str] = set()

    def is_cancelled() -> bool:
        return cancel is not None and cancel.is_set()

    for number in range(1, max_rounds + 1):
        yield from source.answer()
        calls, reason = source.calls(), ""
        if not calls:
            yield Done(source.messages, source.finish_reason)
            return
        for call in calls:
            yield call
            key = json.dumps([call.name, call.arguments, call.content], sort_keys=True, default=str)
            allowed: bool | None = False
            seen = Observation(call.name, _REFUSED, ok=False)
            if is_cancelled():
                reason = "cancelled"
            elif key in made:
                seen, reason = Observation(call.name, _REPEATED, ok=False), "repeated"
            elif runner.is_manual(call):
                allowed = None
            elif runner.asks(call):
                allowed = confirm(call) if confirm is not None else False
            else:
                allowed = True
            if allowed is None:
                yield Done(source.messages, "open")
                return
            made.add(key)
            seen = runner.run(call, cancel) if allowed else seen
            yield seen
            source.observe(call, seen.content)
        if reason or number == max_rounds or is_cancelled():
            source.settle()
            yield Done(source.messages, reason or ("cancelled" if is_cancelled() else "rounds"))
            return
