"""A conversation within a budget of tokens: the oldest whole turns go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .formats import ChatTokenizer, encode_segments, message_segments, prompt_segments, round_text
from .history import check_query, validate_history


def fit_conversation(
    tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None, budget: int, role: str = "user"
) -> tuple[list[int], list[Any]]:
    """The ids of the prompt within `budget` tokens, and the history that is left in it.

    The oldest whole turns are dropped, as few as possible. A leading system message and the current question always
    stay; for an observation, its question and its tool call belong to the current turn.
    The work grows with the budget, not with the length of the history.

    Raises:
        ValueError: what has to stay does not fit; the message has the numbers.
        TypeError, ValueError: as `encode_conversation`.
    """
    version = tokenizer.chatglm_version
    query = check_query(version, query, role)
    history = validate_history(version, history)
    head, turns, tail = _split_turns(version, history, role)

    def ids_with(kept: int) -> list[int]:
        middle = [message for turn in turns[len(turns) - kept :] for message in turn]
        return encode_segments(tokenizer, prompt_segments(version, query, [*head, *middle, *tail], role))

    ids = ids_with(0)
    if len(ids) > budget:
        raise ValueError(
            f"the question alone needs {len(ids)} tokens, but only {budget} are left for the prompt: "
            "shorten it or raise max_length (or lower max_new_tokens)"
        )
    # Estimate from the newest turn backwards; round numbers and joints can change it by a token or two per turn.
    kept, used = 0, len(ids)
    while kept < len(turns):
        used += _turn_cost(tokenizer, turns[len(turns) - kept - 1], len(turns) - kept - 1)
        if used > budget:
            break
        kept += 1
    ids = ids_with(kept)
    while len(ids) > budget:
        kept -= 1
        ids = ids_with(kept)
    while kept < len(turns) and len(more := ids_with(kept + 1)) <= budget:
        kept, ids = kept + 1, more
    return ids, [*head, *(message for turn in turns[len(turns) - kept :] for message in turn), *tail]


def _split_turns(version: int, history: list[Any], role: str) -> tuple[list[Any], list[list[Any]], list[Any]]:
    """History as (what stays in front, turns that may go, what belongs to the current turn)."""
    if version != 3:
        return [], [[pair] for pair in history], []
    head = history[:1] if history and history[0]["role"] == "system" else []
    turns: list[list[Any]] = []
    for message in history[len(head) :]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    tail = turns.pop() if turns and role in ("observation", "assistant") else []
    return head, turns, tail


def _turn_cost(tokenizer: ChatTokenizer, turn: list[Any], number: int) -> int:
    if tokenizer.chatglm_version == 3:
        return len(encode_segments(tokenizer, message_segments(turn)))
    return len(tokenizer.encode_text(round_text(tokenizer.chatglm_version, number, *turn[0])))
