"""Rows -> token ids and labels: what is learned is exactly what `model.chat` would feed, and its answer.

Lengths, as in the original scripts: a prompt has at most `max_source_length` tokens (generation 1, in training: and one
more), an answer `max_target_length` (generation 1: two fewer), then comes the end token; a conversation of generation 3
has `max_source_length + max_target_length + 1` in all. What is too long loses its oldest turns first; a question that
is too long by itself loses its middle; an answer loses its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chatglm.conversation.fitting import fit_conversation
from chatglm.conversation.formats import encode_conversation, encode_message, message_content, stop_token_ids
from chatglm.conversation.history import Message
from ptuning.rows import DataError, Row

IGNORED = -100
#: What `truncated` of an example may hold, added up.
OLD_TURNS, QUESTION, ANSWER = 1, 2, 4

Example = dict[str, Any]


def encode_row(
    tokenizer: Any, row: Row, max_source_length: int = 1024, max_target_length: int = 128, source_prefix: str = ""
) -> Example:
    """A row to train on.

    Args:
        source_prefix: goes in front of every question.

    Returns:
        `input_ids` and `labels` of the same length, -100 where nothing is learned, and `truncated` (see OLD_TURNS).

    Raises:
        DataError: what has to stay of the row does not fit.
        ValueError: lengths that leave no room for any row.
    """
    check_lengths(tokenizer, max_source_length, max_target_length)
    messages = _with_prefix(row.messages, source_prefix)
    if row.whole:
        return _encode_whole(tokenizer, row.where, messages, max_source_length, max_target_length)
    version = tokenizer.chatglm_version
    *earlier, answer = messages
    prompt, lost = _fit(tokenizer, row.where, earlier, max_source_length + (version == 1))
    body = _body(tokenizer, answer)
    kept = body[: max_target_length - (2 if version == 1 else 0)]
    end = stop_token_ids(tokenizer)[0]
    # Generation 1 learns <sop>, too, as in the original.
    labels = [IGNORED] * len(prompt) if version != 1 else [*[IGNORED] * (len(prompt) - 1), prompt[-1]]
    truncated = lost | (ANSWER if len(kept) < len(body) else 0)
    return {"input_ids": [*prompt, *kept, end], "labels": [*labels, *kept, end], "truncated": truncated}


def encode_for_prediction(
    tokenizer: Any, row: Row, max_source_length: int = 1024, max_target_length: int = 128, source_prefix: str = ""
) -> list[Example]:
    """The answers of a row to be generated, each with what it is compared with: one, or all of a conversation.

    Returns:
        dicts with `input_ids`, `labels`, `truncated` as `encode_row`, with `prompt_ids`, which chat would feed, and
        `target_ids`, the answer without its end token.
    """
    version = tokenizer.chatglm_version
    if not row.whole:
        example = encode_row(tokenizer, row, max_source_length, max_target_length, source_prefix)
        *earlier, answer = _with_prefix(row.messages, source_prefix)
        prompt, lost = _fit(tokenizer, row.where, earlier, max_source_length)
        target = _body(tokenizer, answer)[: max_target_length - (0 if version == 3 else 2)]
        truncated = example["truncated"] | lost
        return [{**example, "truncated": truncated, "prompt_ids": prompt, "target_ids": target}]
    check_lengths(tokenizer, max_source_length, max_target_length)
    messages = _with_prefix(row.messages, source_prefix)
    examples = []
    for start, stop in _answers(messages):
        prompt, lost = _fit(tokenizer, row.where, messages[:start], max_source_length)
        # Messages of the assistant in a row are one answer: it writes the role tokens between them itself.
        body = [index for m in messages[start:stop] for index in _encode(tokenizer, m)][1:]
        target = body[:max_target_length]
        spoken = [*target, _end_token(tokenizer, messages, stop)]
        examples.append(
            {
                "input_ids": [*prompt, *spoken],
                "labels": [*[IGNORED] * len(prompt), *spoken],
                "truncated": lost | (ANSWER if len(target) < len(body) else 0),
                "prompt_ids": prompt,
                "target_ids": target,
            }
        )
    return examples


def check_lengths(tokenizer: Any, max_source_length: int, max_target_length: int) -> None:
    """ValueError for lengths that leave no room for any row."""
    least = 3 if tokenizer.chatglm_version != 2 else 1
    if max_target_length < least:
        raise ValueError(f"max_target_length is {max_target_length}, but has to be at least {least}")
    needed = len(encode_conversation(tokenizer, ""))
    if max_source_length <= needed:
        raise ValueError(
            f"max_source_length is {max_source_length}, but the format of a prompt takes {needed} tokens: raise it"
        )


def _with_prefix(messages: Sequence[Message], prefix: str) -> list[Message]:
    if not prefix:
        return list(messages)
    return [{**m, "content": prefix + m["content"]} if m["role"] == "user" else m for m in messages]


def _encode(tokenizer: Any, message: Message) -> list[int]:
    """The ids of a message of generation 3, its role token first."""
    return encode_message(tokenizer, message["role"], message.get("metadata") or "", message_content(message))


def _body(tokenizer: Any, answer: Message) -> list[int]:
    """The ids of an answer, behind what the prompt ends with."""
    if tokenizer.chatglm_version == 3:
        return _encode(tokenizer, answer)[1:]
    ids: list[int] = tokenizer.encode_text(answer["content"])
    return ids


def _bare(messages: Sequence[Message]) -> list[Message]:
    """The messages as users write them in a history."""
    return [{key: value for key, value in message.items() if key != "loss"} for message in messages]


def _fit(tokenizer: Any, where: str, messages: Sequence[Message], budget: int) -> tuple[list[int], int]:
    """The ids of the prompt that ends with the last message, in at most `budget` tokens, and what it has lost."""
    *history, asked = _bare(messages)
    question, role = asked["content"], asked["role"]
    earlier: list[Any] = history
    essential: list[Any] = []
    if tokenizer.chatglm_version == 3:
        essential = _essential(history, role)
    else:
        earlier = [(q["content"], a["content"]) for q, a in zip(history[::2], history[1::2], strict=True)]
    if len(earlier) == len(essential):
        ids = encode_conversation(tokenizer, question, earlier, role)
        if len(ids) <= budget:
            return ids, 0
    else:
        try:
            ids, kept = fit_conversation(tokenizer, question, earlier, budget, role)
            return ids, OLD_TURNS if len(kept) < len(earlier) else 0
        except ValueError:  # the question alone is too long: the rows have been checked
            pass

    lost = QUESTION | (OLD_TURNS if len(earlier) > len(essential) else 0)
    if tokenizer.chatglm_version != 3:
        shorter = shorten(question, lambda text: len(encode_conversation(tokenizer, text)), budget)
        return encode_conversation(tokenizer, shorter or ""), lost  # check_lengths: the format alone does fit
    turn = [*essential, asked]
    texts = [index for index, message in enumerate(turn) if message["role"] != "system" and not message.get("metadata")]
    for index in sorted(texts, key=lambda index: -len(turn[index]["content"])):
        excess = len(encode_conversation(tokenizer, turn[-1]["content"], turn[:-1], role)) - budget
        if excess > 0:
            turn[index] = _shortened(tokenizer, turn[index], len(_encode(tokenizer, turn[index])) - excess)
    ids = encode_conversation(tokenizer, turn[-1]["content"], turn[:-1], role)
    if len(ids) > budget:
        raise DataError(
            f"{where}: what stands around the question (system message, tools, calls) takes {len(ids)} tokens, "
            f"but the limit is {budget}: raise max_source_length"
        )
    return ids, lost


def _essential(history: list[Message], role: str) -> list[Message]:
    """What of a history of generation 3 belongs to the current question: the system message, and its own turn."""
    head = history[:1] if history and history[0]["role"] == "system" else []
    if role == "user":
        return head
    asked = [index for index, message in enumerate(history) if message["role"] == "user"]
    return [*head, *history[max(asked[-1] if asked else 0, len(head)) :]]


def shorten(text: str, count: Callable[[str], int], budget: int) -> str | None:
    """The text without as much of its middle as is needed for `count(text) <= budget`; None if even "" has more.

    The middle goes because instructions stand at the beginning or at the end of a long question.
    """

    def cut(kept: int) -> str:
        return text[: (kept + 1) // 2] + text[len(text) - kept // 2 :]

    if count("") > budget:
        return None
    low, high = 0, min(len(text), max(budget, 1))
    while high < len(text) and count(cut(high)) <= budget:
        low, high = high, min(2 * high, len(text))
    if high == len(text) and count(text) <= budget:
        return text
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(cut(middle)) <= budget else (low, middle)
    return cut(low)


def _answers(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """(start, stop) of each run of the assistant's messages that is learned and follows something."""
    runs, start = [], 0
    while start < len(messages):
        stop = start
        while stop < len(messages) and messages[stop]["role"] == "assistant":
            stop += 1
        if any(m["loss"] for m in messages[start:stop]) and start and messages[start - 1]["role"] != "system":
            runs.append((start, stop))
        start = max(stop, start + 1)
    return runs


def _end_token(tokenizer: Any, messages: Sequence[Message], stop: int) -> int:
    """What follows the message before `stop`: the next role; at the end `</s>`, after a call `<|observation|>`."""
    end, _, observation = stop_token_ids(tokenizer)
    if stop < len(messages):
        index: int = tokenizer.get_command(f"<|{messages[stop]['role']}|>")
        return index
    return observation if messages[stop - 1].get("metadata") else end


def _encode_whole(tokenizer: Any, where: str, messages: list[Message], source: int, target: int) -> Example:
    """A conversation of generation 3 with loss on every message that is learned and on the token that ends it."""
    last = max(index for index, message in enumerate(messages) if message["loss"])
    end = _end_token(tokenizer, messages, last + 1)
    messages = messages[: last + 1]
    spans = [_encode(tokenizer, message) for message in messages]
    budget, truncated = source + target + 1, 0

    def excess() -> int:
        return 3 + sum(map(len, spans)) - budget

    head = 1 if messages[0]["role"] == "system" else 0
    while excess() > 0:
        later = [index for index in range(head + 1, last) if messages[index]["role"] == "user"]
        if not later:
            break
        del messages[head : later[0]], spans[head : later[0]]
        last, truncated = len(messages) - 1, truncated | OLD_TURNS
    if excess() > 0:
        body = len(spans[-1]) - 1
        if (kept := max(min(target, body), body - excess())) < body:
            spans[-1], truncated = spans[-1][: kept + 1], truncated | ANSWER
    given = [index for index in range(head, last) if not messages[index]["loss"]]
    for index in sorted(given, key=lambda index: -len(spans[index])):
        if excess() > 0:
            spans[index] = _encode(tokenizer, _shortened(tokenizer, messages[index], len(spans[index]) - excess()))
            truncated |= QUESTION
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    labels, learned = [IGNORED, IGNORED], False
    for message, span in zip(messages, spans, strict=True):
        ids += span
        labels.append(span[0] if learned else IGNORED)
        learned = message["loss"]
        labels += span[1:] if learned else [IGNORED] * (len(span) - 1)
    ids, labels = [*ids, end], [*labels, end]
    if len(ids) > budget:
        ids, labels, truncated = ids[:budget], labels[:budget], truncated | ANSWER
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{where}: nothing that is learned fits into max_source_length + max_target_length + 1 = {budget} "
                "tokens: raise max_source_length"
            )
    return {"input_ids": ids, "labels": labels, "truncated": truncated}


def _shortened(tokenizer: Any, message: Message, room: int) -> Message:
    """The message with its middle left out, so that it takes `room` tokens, or as few as it can."""

    def count(text: str) -> int:
        return len(_encode(tokenizer, {**message, "content": text}))

    return {**message, "content": shorten(message["content"], count, max(room, count(""))) or ""}
