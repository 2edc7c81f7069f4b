"""Rows -> token ids and labels: the prompt is exactly what `model.chat` would feed.

The length limits are those of the original scripts: `max_source_length` tokens of prompt (generation 1, in training:
one more) and `max_target_length` of answer (generation 1: two fewer), then the end token; `ChatFormat.training` has the
exceptions. A conversation with roles has at most `max_source_length + max_target_length + 1` tokens in all. Truncation
drops the oldest turns first; then it cuts the middle of a question that is still too long, and the end of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chatglm.conversation.history import Message
from chatglm.conversation.segments import encode_segments
from ptuning.pictures import WithPicture
from ptuning.rows import DataError, Row

IGNORED = -100
#: Flags of an example's `truncated`, added up.
OLD_TURNS, QUESTION, ANSWER = 1, 2, 4

Example = dict[str, Any]


def encode_row(
    tokenizer: Any, row: Row, max_source_length: int = 1024, max_target_length: int = 128, source_prefix: str = ""
) -> Example:
    """Encodes a row for training.

    Args:
        source_prefix: goes in front of every question.

    Returns:
        `input_ids` and `labels` of the same length, -100 where nothing is learned, and `truncated` (see OLD_TURNS).

    Raises:
        DataError: the part of the row that cannot be dropped does not fit.
        ValueError: no row fits into these lengths.
    """
    tokenizer = WithPicture(tokenizer) if row.image else tokenizer
    check_lengths(tokenizer, max_source_length, max_target_length)
    messages = _with_prefix(row.messages, source_prefix)
    if row.whole:
        return _encode_whole(tokenizer, row.where, messages, max_source_length, max_target_length)
    chat_format = tokenizer.chat_format
    limits = chat_format.training
    *earlier, answer = messages
    prompt, lost = _fit(tokenizer, row.where, earlier, max_source_length + limits.prompt_extra)
    body = chat_format.encode_answer(tokenizer, answer)
    kept = body[: max_target_length - limits.answer_less]
    end = chat_format.stop_token_ids(tokenizer)[0]
    given = len(prompt) - limits.learned_prompt
    labels = [*[IGNORED] * given, *prompt[given:]]
    truncated = lost | (ANSWER if len(kept) < len(body) else 0)
    return {"input_ids": [*prompt, *kept, end], "labels": [*labels, *kept, end], "truncated": truncated}


def encode_for_prediction(
    tokenizer: Any,
    row: Row,
    max_source_length: int = 1024,
    max_target_length: int = 128,
    source_prefix: str = "",
    *,
    cut_references: bool = False,
) -> list[Example]:
    """Encodes the answers to generate for a row, each with its reference: one, or all of a conversation.

    Args:
        cut_references: cut references to `max_target_length`, as the originals do.

    Returns:
        dicts with `input_ids`, `labels` and `truncated` as in `encode_row`, `prompt_ids` as chat would feed them, and
        `target_ids`, the whole answer without its end token.
    """
    tokenizer = WithPicture(tokenizer) if row.image else tokenizer
    chat_format = tokenizer.chat_format
    if not row.whole:
        example = encode_row(tokenizer, row, max_source_length, max_target_length, source_prefix)
        *earlier, answer = _with_prefix(row.messages, source_prefix)
        prompt, lost = _fit(tokenizer, row.where, earlier, max_source_length)
        body = chat_format.encode_answer(tokenizer, answer)
        target = body[: max_target_length - chat_format.training.target_less] if cut_references else body
        truncated = example["truncated"] | lost
        return [{**example, "truncated": truncated, "prompt_ids": prompt, "target_ids": target}]
    check_lengths(tokenizer, max_source_length, max_target_length)
    messages = _with_prefix(row.messages, source_prefix)
    examples = []
    for start, stop in _answers(messages):
        prompt, lost = _fit(tokenizer, row.where, messages[:start], max_source_length)
        # Consecutive assistant messages are one answer: the model writes the role tokens between them itself.
        body = [index for m in messages[start:stop] for index in _encode(tokenizer, m)][1:]
        kept = body[:max_target_length]
        spoken = [*kept, _end_token(tokenizer, messages, stop)]
        examples.append(
            {
                "input_ids": [*prompt, *spoken],
                "labels": [*[IGNORED] * len(prompt), *spoken],
                "truncated": lost | (ANSWER if len(kept) < len(body) else 0),
                "prompt_ids": prompt,
                "target_ids": kept if cut_references else body,
            }
        )
    return examples


def check_lengths(tokenizer: Any, max_source_length: int, max_target_length: int) -> None:
    """Raises ValueError if no row fits into these lengths."""
    least = tokenizer.chat_format.training.least_answer
    if max_target_length < least:
        raise ValueError(f"max_target_length is {max_target_length}, but has to be at least {least}")
    needed = len(tokenizer.chat_format.encode(tokenizer, ""))
    if max_source_length <= needed:
        raise ValueError(
            f"max_source_length is {max_source_length}, but the format of a prompt takes {needed} tokens: raise it"
        )


def _with_prefix(messages: Sequence[Message], prefix: str) -> list[Message]:
    if not prefix:
        return list(messages)
    return [{**m, "content": prefix + m["content"]} if m["role"] == "user" else m for m in messages]


def _encode(tokenizer: Any, message: Message) -> list[int]:
    """The ids of a message with a role, its role token first."""
    ids: list[int] = tokenizer.chat_format.encode_message(tokenizer, message)
    return ids


def _bare(messages: Sequence[Message]) -> list[Message]:
    """The messages as users write them in a history."""
    return [{key: value for key, value in message.items() if key != "loss"} for message in messages]


def _fit(tokenizer: Any, where: str, messages: Sequence[Message], budget: int) -> tuple[list[int], int]:
    """Ids of the prompt that ends with the last message, at most `budget`, and the flags of what was cut."""
    chat_format = tokenizer.chat_format
    *history, asked = _bare(messages)
    question, role = asked["content"], asked["role"]
    earlier: list[Any] = chat_format.from_messages(history)
    head, _, current = chat_format.split_turns(earlier, role)
    essential = [*head, *current]  # what cannot be dropped
    if len(earlier) == len(essential):
        ids = chat_format.encode(tokenizer, question, earlier, role)
        if len(ids) <= budget:
            return ids, 0
    else:
        try:
            ids, kept = chat_format.fit(tokenizer, question, earlier, budget, role)
            return ids, OLD_TURNS if len(kept) < len(earlier) else 0
        except ValueError:  # the question alone is too long: the rows have been checked
            pass

    lost = QUESTION | (OLD_TURNS if len(earlier) > len(essential) else 0)
    if not chat_format.has_roles:
        shorter = shorten(question, lambda text: len(chat_format.encode(tokenizer, text)), budget)
        return chat_format.encode(tokenizer, shorter or ""), lost  # check_lengths: the format alone does fit
    turn = [*essential, asked]
    texts = [index for index, message in enumerate(turn) if message["role"] != "system" and not message.get("metadata")]
    for index in sorted(texts, key=lambda index: -len(turn[index]["content"])):
        excess = len(chat_format.encode(tokenizer, turn[-1]["content"], turn[:-1], role)) - budget
        if excess > 0:
            turn[index] = _shortened(tokenizer, turn[index], len(_encode(tokenizer, turn[index])) - excess)
    ids = chat_format.encode(tokenizer, turn[-1]["content"], turn[:-1], role)
    if len(ids) > budget:
        raise DataError(
            f"{where}: everything around the question (system message, tools, calls) takes {len(ids)} tokens, "
            f"but the limit is {budget}: raise max_source_length"
        )
    return ids, lost


def shorten(text: str, count: Callable[[str], int], budget: int) -> str | None:
    """Cuts the middle of the text until `count(text) <= budget`; None if even "" exceeds the budget.

    The middle goes because long questions have their instructions at the beginning or at the end.
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
    """What the model writes after the message before `stop`."""
    next_role = messages[stop]["role"] if stop < len(messages) else None
    token: int = tokenizer.chat_format.end_token(tokenizer, messages[stop - 1], next_role)
    return token


def _encode_whole(tokenizer: Any, where: str, messages: list[Message], source: int, target: int) -> Example:
    """A conversation with roles, with loss on every message that is learned and on the token that ends it."""
    last = max(index for index, message in enumerate(messages) if message["loss"])
    end = _end_token(tokenizer, messages, last + 1)
    messages = messages[: last + 1]
    spans = [_encode(tokenizer, message) for message in messages]
    start = encode_segments(tokenizer, tokenizer.chat_format.start)
    budget, truncated = source + target + 1, 0

    def excess() -> int:
        return len(start) + sum(map(len, spans)) + 1 - budget

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
    ids, labels, learned = [*start], [IGNORED] * len(start), False
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
    """The message with its middle cut, so that it takes `room` tokens, or as few as possible."""

    def count(text: str) -> int:
        return len(_encode(tokenizer, {**message, "content": text}))

    return {**message, "content": shorten(message["content"], count, max(room, count(""))) or ""}
