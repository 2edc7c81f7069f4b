"""Functions of `chatglm.conversation` that take a generation or a tokenizer.

Each calls the `ChatFormat` of the generation. They are older than the formats and stay for programs that use them; our
own code uses the formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import chat_messages
from .formats import Response, chat_format
from .history import Message, Pair, check_role, check_text
from .segments import ChatTokenizer


def validate_history(version: int, history: Sequence[Any] | None) -> list[Any]:
    """See `ChatFormat.validate`."""
    return chat_format(version).validate(history)


def prompt_text(version: int, query: str, history: Sequence[Pair] = ()) -> str:
    """See `PairFormat.prompt_text`. Raises ValueError for a generation whose prompts are not plain text."""
    return chat_format(version).prompt_text(query, history)


def encode_conversation(
    tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None = None, role: str = "user"
) -> list[int]:
    """See `ChatFormat.encode`."""
    return chat_format(tokenizer.chatglm_version).encode(tokenizer, query, history, role)


def encode_message(tokenizer: ChatTokenizer, role: str, metadata: str, content: str) -> list[int]:
    """The ids of one role message: `<|role|>`, `metadata\\n`, content. Raises as `ChatFormat.encode_message`."""
    message = {"role": check_role(role), "metadata": metadata, "content": check_text(content, "the message")}
    return chat_format(tokenizer.chatglm_version).encode_message(tokenizer, message)


def fit_conversation(
    tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None, budget: int, role: str = "user"
) -> tuple[list[int], list[Any]]:
    """See `fitting.fit`."""
    return chat_format(tokenizer.chatglm_version).fit(tokenizer, query, history, budget, role)


def stop_token_ids(tokenizer: ChatTokenizer) -> list[int]:
    """The ids that end an answer: `<eop>`; `</s>`; `</s>`, `<|user|>`, `<|observation|>`."""
    return chat_format(tokenizer.chatglm_version).stop_token_ids(tokenizer)


def normalize_messages(messages: Sequence[Any], tools: Any = None) -> list[Message]:
    """Converts clients' chat messages to role messages of generation 3; see `chat_messages.normalize_messages`."""
    return chat_messages.normalize_messages(messages, tools, chat_format(3))


def pairs_from_messages(messages: Sequence[Any]) -> tuple[list[Pair], str | None]:
    """Converts chat messages to pairs for generations 1 and 2; see `chat_messages.pairs_from_messages`."""
    return chat_messages.pairs_from_messages(messages, chat_format(2))


def encode_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Any],
    tools: Any = None,
    open_answer: bool = True,
    end: bool = True,
    budget: int | None = None,
) -> list[int]:
    """See `ChatFormat.encode_chat`."""
    format = chat_format(tokenizer.chatglm_version)
    return format.encode_chat(tokenizer, messages, tools, open_answer, end, budget)


def render_chat(
    version: int, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
) -> str:
    """See `ChatFormat.render_chat`."""
    return chat_format(version).render_chat(messages, tools, open_answer, end)


def clean_response(version: int, text: str) -> str:
    """See `ChatFormat.clean`."""
    return chat_format(version).clean(text)


def stable_response(version: int, text: str) -> str:
    """See `ChatFormat.stable`."""
    return chat_format(version).stable(text)


def parse_response(version: int, text: str, with_tools: bool = False) -> Response:
    """See `ChatFormat.parse`."""
    return chat_format(version).parse(text, with_tools)


def tool_call_message(name: str, parameters: Mapping[str, Any]) -> Message:
    """The assistant message that calls a tool in generation 3; `parse_response` reads it back."""
    return chat_format(3).tool_call_message(name, parameters)
