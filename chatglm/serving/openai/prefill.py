"""Prompts of chat completions: opened for an answer, or with an answer that the client has begun (vLLM's
`continue_final_message`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...chat import ids_to_text
from ...conversation.formats import ChatFormat
from ...engine import EngineStep
from ...generation import AnswerText, GenerationOptions
from ..answers import AssistantMessage, Change
from ..errors import ApiError
from .chat_body import ChatBody, Message

#: How many tokens of the beginning the decoder needs to see in order to decode those that follow.
_CONTEXT = 16


def check_prefill(body: ChatBody) -> None:
    """Raises ApiError (400) for a last message that can be neither answered nor continued."""
    last = body.messages[-1]
    if not body.continue_final_message:
        if last.role == "assistant":
            reason = "the last message is the assistant's: continue_final_message = true continues it"
            raise ApiError(400, reason, param="messages")
        return
    if body.add_generation_prompt:
        reason = "continue_final_message and add_generation_prompt exclude each other: leave one out"
        raise ApiError(400, reason, param="add_generation_prompt")
    if last.role != "assistant" or last.tool_calls or last.function_call:
        reason = "continue_final_message needs a last message of the assistant's that calls no tool"
        raise ApiError(400, reason, param="messages")
    if body.schema_wanted() is not None or body.forced_names() is not None:
        reason = "continue_final_message goes with neither response_format nor a tool_choice that forces a call"
        raise ApiError(400, reason, param="continue_final_message", code="unsupported_parameter")


def chat_ids(
    tokenizer: Any, body: ChatBody, messages: list[dict[str, Any]], tools: Any, chat_format: ChatFormat
) -> list[int]:
    """Returns the ids of the prompt. Raises TypeError or ValueError if the messages are malformed."""
    if body.continue_final_message:
        before: list[int] = chat_format.encode_chat(tokenizer, messages[:-1], tools)
        return before + begun_ids(tokenizer, body.messages[-1])
    ids: list[int] = chat_format.encode_chat(tokenizer, messages, tools, body.add_generation_prompt is not False)
    return ids


def begun_ids(tokenizer: Any, message: Message) -> list[int]:
    """Returns the ids of an answer that has begun, behind the prompt."""
    ids: list[int] = tokenizer.chat_format.encode_answer(tokenizer, {"role": "assistant", "content": message.text})
    return ids


class ContinuedMessage(AssistantMessage):
    """Continues a message that the client began: reports only what follows it.

    Args:
        begun: the client's message.
        tools, at_most_one_call: as for `AssistantMessage`.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: GenerationOptions,
        begun: Message,
        tools: Sequence[str] = (),
        at_most_one_call: bool = False,
    ) -> None:
        super().__init__(tokenizer, tools, at_most_one_call)
        decode, ids, text = ids_to_text(tokenizer), begun_ids(tokenizer, begun), begun.text
        tail = ids[-_CONTEXT:]
        size = len(decode(tail))
        # The engine decodes an answer without its beginning, and would lose the space between two words.
        self._answer = AnswerText(options, lambda new: decode([*tail, *new])[size:])
        self._said = ""
        self._hidden = len(self._format.clean(text)) + len(text) - len(text.rstrip())
        self.feed(decode(ids), False)

    def take(self, step: EngineStep) -> Change:
        said = self._answer.push(step.token_id, step.finish_reason)[0]
        delta, self._said = said[len(self._said) :], said
        return self.feed(delta, step.finish_reason is not None)

    def feed(self, delta: str, whole: bool) -> Change:
        before = self.content
        change = super().feed(delta, whole)
        self.content = self.content[self._hidden :]
        change.content = self.content[len(before) :]
        return change
