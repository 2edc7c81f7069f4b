"""Chat messages as OpenAI clients and transformers pass them, in the models' formats."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .fitting import fit_conversation
from .formats import (
    GAPS,
    START,
    ChatTokenizer,
    Segment,
    encode_segments,
    message_segments,
    prompt_segments,
    prompt_text,
)
from .history import Message, Pair, check_message, check_text
from .tool_calls import tool_call_message

#: The system message ChatGLM3 was trained with for tools.
TOOLS_SYSTEM_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"


def normalize_messages(messages: Sequence[Any], tools: Any = None) -> list[Message]:
    """Chat messages as OpenAI clients and transformers pass them, as role messages of generation 3.

    Contents may be None or lists of text parts; the roles `tool` and `function` become `observation`, `developer`
    becomes `system`; an assistant's `tool_calls` become messages with the tool's name as metadata; `tools` go into the
    system message, which is made where there is none.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
    result: list[Message] = []
    for index, item in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(item, Mapping) or "role" not in item:
            raise TypeError(f"{where} must be a dict like {{'role': 'user', 'content': '…'}}")
        role = item["role"]
        role = "observation" if role in ("tool", "function") else "system" if role == "developer" else role
        content = _content_text(item.get("content"), where)
        calls = item.get("tool_calls") or ([{"function": item["function_call"]}] if item.get("function_call") else [])
        if content or not calls:
            kept = {key: item[key] for key in ("metadata", "tools") if item.get(key) is not None}
            result.append(check_message({"role": role, "content": content, **kept}, where))
        result += [_tool_call_message(call, where) for call in calls]
    if tools:
        if not result or result[0]["role"] != "system":
            result.insert(0, {"role": "system", "content": TOOLS_SYSTEM_PROMPT})
        result[0]["tools"] = copy.deepcopy(list(tools) if not isinstance(tools, Mapping) else dict(tools))
    return result


def _content_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(check_text(part["text"], f"a text part of {where}") for part in content)
    raise TypeError(f"the content of {where} must be a string or a list of text parts: the models read text only")


def _tool_call_message(call: Any, where: str) -> Message:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            raise TypeError(f"the arguments are no JSON object but {type(arguments).__name__}")
        return tool_call_message(name, arguments)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"a tool call of {where} needs function.name and function.arguments (JSON): {error}"
        raise ValueError(reason) from error


def pairs_from_messages(messages: Sequence[Any]) -> tuple[list[Pair], str | None]:
    """Role messages for generations 1 and 2: (answered pairs, the open question or None).

    These generations know no system message: its text goes in front of the first question, with a newline between.

    Raises:
        ValueError: the messages are not system (at most one, first), then user and assistant in turn.
    """
    system, pairs, question = "", [], None
    for index, message in enumerate(normalize_messages(messages)):
        role, content = message["role"], message["content"]
        if role == "system" and index == 0 and not message.get("tools"):
            system = f"{content}\n" if content else ""
        elif role == "user" and question is None:
            question, system = system + content, ""
        elif role == "assistant" and question is not None and not message.get("metadata"):
            pairs.append((question, content))
            question = None
        else:
            raise ValueError(
                f"messages[{index}] has the role {role!r}: this model takes user and assistant messages in turn, "
                "after at most one system message without tools"
            )
    if question is None and not pairs:
        raise ValueError("a conversation needs a user message")
    return pairs, question


def chat_segments(
    version: int, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
) -> list[Segment]:
    """A list of messages in the model's format.

    Args:
        open_answer: end with what asks the model to answer, as `prompt_segments`.
        end: for a conversation of generations 1 and 2 that ends with an answer, the end token after it: what the
            model was trained on.

    Raises:
        TypeError, ValueError: messages of the wrong shape.
    """
    if version == 3:
        segments = [*START, *message_segments(normalize_messages(messages, tools))]
        return [*segments, ("<|assistant|>", True)] if open_answer else segments
    if tools:
        raise ValueError("tools are for ChatGLM3-6B only")
    pairs, question = pairs_from_messages(messages)
    if question is None:
        if open_answer:
            raise ValueError("add_generation_prompt needs the last message to be the user's")
        asked, answer = pairs[-1]
        stop: list[Segment] = [("<eop>" if version == 1 else "<eos>", True)]
        return [*prompt_segments(version, asked, pairs[:-1]), (answer, False), *(stop if end else [])]
    if open_answer:
        return prompt_segments(version, question, pairs)
    text = prompt_text(version, question, pairs)
    if version == 2 or pairs:
        text = text.removesuffix("答：").removesuffix(GAPS[version])
    return [*(START if version == 2 else []), (text, False)]


def encode_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Any],
    tools: Any = None,
    open_answer: bool = True,
    end: bool = True,
    budget: int | None = None,
) -> list[int]:
    """The ids of `chat_segments`; with a budget (and `open_answer`) the oldest turns go, as in `fit_conversation`."""
    version = tokenizer.chatglm_version
    segments = chat_segments(version, messages, tools, open_answer, end)
    if budget is None or not open_answer:
        return encode_segments(tokenizer, segments)
    if version == 3:
        *history, last = normalize_messages(messages, tools)
        if last["role"] not in ("user", "observation"):
            raise ValueError("truncation needs the last message to be the user's, or an observation")
        return fit_conversation(tokenizer, last["content"], history, budget, last["role"])[0]
    pairs, question = pairs_from_messages(messages)
    return fit_conversation(tokenizer, question or "", pairs, budget)[0]


def render_chat(
    version: int, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
) -> str:
    """`chat_segments` as text with the control tokens spelt out, for people and other programs.

    A prompt encoded again with `add_special_tokens=False, split_special_tokens=False` gives the ids of `encode_chat`,
    as long as nobody has typed a control token: ids are the safe form.
    """
    text, after_text = "", False
    for part, is_token in chat_segments(version, messages, tools, open_answer, end):
        # The blank stands for the one with which every text that is encoded on its own begins.
        text += ("</s>" if part == "<eos>" else part) if is_token else " " * (after_text and part != "") + part
        after_text = not is_token
    return text
