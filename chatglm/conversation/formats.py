"""The prompt formats of the generations: text, segments, token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from .history import Message, Pair, check_query, check_role, check_text, validate_history


class ChatTokenizer(Protocol):
    """What the prompt formats need of a tokenizer."""

    chatglm_version: int

    def encode_text(self, text: str) -> list[int]: ...

    def get_command(self, token: str) -> int: ...


def prompt_text(version: int, query: str, history: Sequence[Pair] = ()) -> str:
    """The text of a prompt of generation 1 or 2 (training-critical: not a character may differ)."""
    if version == 1 and not history:
        return query
    rounds = [round_text(version, number, *pair) for number, pair in enumerate(history)]
    return "".join(rounds) + round_text(version, len(history), query)


GAPS = {1: "\n", 2: "\n\n"}


def round_text(version: int, number: int, question: str, answer: str | None = None) -> str:
    gap = GAPS[version]
    text = f"[Round {number + version - 1}]{gap}问：{question}{gap}答："
    return text if answer is None else f"{text}{answer}{gap}"


def message_content(message: Message) -> str:
    """What is encoded as the content of a role message: for a system message with tools also their JSON.

    An empty list is written as well, as in the original: `[]`. None is no tools.
    """
    tools = message.get("tools")
    if tools is None or message["role"] != "system":
        return message["content"]
    try:
        return message["content"] + "\n" + json.dumps(_unwrap_tools(tools), indent=4, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the tools of the system message cannot be written as JSON: {error}") from error


def _unwrap_tools(tools: Any) -> Any:
    """OpenAI's `{"type": "function", "function": {…}}` become the bare descriptions ChatGLM3 was trained with."""

    def bare(tool: Any) -> Any:
        wrapped = isinstance(tool, Mapping) and tool.get("type") == "function" and "function" in tool
        return tool["function"] if wrapped else tool

    return tools if isinstance(tools, Mapping) else [bare(tool) for tool in tools]


# ----------------------------------------------------------------------------------------- segments of a prompt

#: A piece of a prompt: text that is encoded on its own, or the name of a control token (True).
Segment = tuple[str, bool]

START: list[Segment] = [("[gMASK]", True), ("sop", True)]


def prompt_segments(version: int, query: str, history: Sequence[Any], role: str = "user") -> list[Segment]:
    """The whole prompt, up to where the model starts to answer. The history has to be valid."""
    if version == 1:
        return [(prompt_text(1, query, history), False), ("[gMASK]", True), ("<sop>", True)]
    if version == 2:
        return [*START, (prompt_text(2, query, history), False)]
    return [*START, *message_segments([*history, {"role": role, "content": query}]), ("<|assistant|>", True)]


def message_segments(messages: Iterable[Message]) -> list[Segment]:
    segments: list[Segment] = []
    for message in messages:
        metadata = message.get("metadata") or ""
        segments += [(f"<|{message['role']}|>", True), (f"{metadata}\n", False), (message_content(message), False)]
    return segments


def encode_segments(tokenizer: ChatTokenizer, segments: Iterable[Segment]) -> list[int]:
    """The ids of the segments: what has been typed is in texts and stays text."""
    ids: list[int] = []
    for text, is_token in segments:
        ids += [tokenizer.get_command(text)] if is_token else tokenizer.encode_text(text)
    return ids


def encode_message(tokenizer: ChatTokenizer, role: str, metadata: str, content: str) -> list[int]:
    """The ids of one message of generation 3: `<|role|>`, `metadata\\n`, content."""
    message = {"role": check_role(role), "metadata": metadata, "content": check_text(content, "the message")}
    return encode_segments(tokenizer, message_segments([message]))


def encode_conversation(
    tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None = None, role: str = "user"
) -> list[int]:
    """The ids of the whole prompt, up to where the model starts to answer.

    Args:
        query: what is asked now (generation 3: the content of a message with the given role).
        history: pairs for generations 1 and 2, role dicts for 3; not changed.

    Raises:
        TypeError, ValueError: as `validate_history`; an unknown role.
    """
    version = tokenizer.chatglm_version
    query = check_query(version, query, role)
    return encode_segments(tokenizer, prompt_segments(version, query, validate_history(version, history), role))


def stop_token_ids(tokenizer: ChatTokenizer) -> list[int]:
    """The ids that end an answer: `<eop>`; `</s>`; `</s>`, `<|user|>`, `<|observation|>`."""
    names = {1: ("<eop>",), 2: ("<eos>",), 3: ("<eos>", "<|user|>", "<|observation|>")}
    return [tokenizer.get_command(name) for name in names[tokenizer.chatglm_version]]
