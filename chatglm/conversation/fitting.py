"""Fits a conversation into a token budget by dropping the oldest whole turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .segments import ChatTokenizer, encode_segments

if TYPE_CHECKING:
    from .formats import ChatFormat


class QuestionTooLongError(ValueError):
    """What must stay in the prompt needs `needed` tokens, and there is room for `room`."""

    def __init__(self, needed: int, room: int) -> None:
        super().__init__(
            f"the question alone needs {needed} tokens, but only {room} are left for the prompt: "
            "shorten it or raise max_length (or lower max_new_tokens)"
        )
        self.needed, self.room = needed, room


def fit(
    chat_format: ChatFormat,
    tokenizer: ChatTokenizer,
    query: str,
    history: Sequence[Any] | None,
    budget: int,
    role: str = "user",
) -> tuple[list[int], list[Any]]:
    """Returns the ids of the prompt, at most `budget` of them, and the history that is left in it.

    Drops the oldest whole turns, as few as possible. A leading system message and the current question always
    stay; for an observation, its question and its tool call belong to the current turn.
    The work grows with the budget, not with the length of the history.

    Raises:
        QuestionTooLongError: what must stay does not fit; the message gives the token counts.
        TypeError, ValueError: as `ChatFormat.encode`.
    """
    query = chat_format.check_query(query, role)
    head, turns, tail = chat_format.split_turns(chat_format.validate(history, query), role)

    def kept_turns(kept: int) -> list[Any]:
        return [*head, *(item for turn in turns[len(turns) - kept :] for item in turn), *tail]

    def ids_with(kept: int) -> list[int]:
        return encode_segments(tokenizer, chat_format.prompt_segments(query, kept_turns(kept), role))

    ids = ids_with(0)
    if len(ids) > budget:
        raise QuestionTooLongError(len(ids), budget)
    # Estimate from the newest turn backwards; round numbers and joints can change it by a token or two per turn.
    kept, used = 0, len(ids)
    while kept < len(turns):
        number = len(turns) - kept - 1
        used += chat_format.turn_tokens(tokenizer, turns[number], number)
        if used > budget:
            break
        kept += 1
    ids = ids_with(kept)
    while len(ids) > budget:
        kept -= 1
        ids = ids_with(kept)
    while kept < len(turns) and len(more := ids_with(kept + 1)) <= budget:
        kept, ids = kept + 1, more
    return ids, kept_turns(kept)
