"""What a caller gets after each token of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Why an answer ended.
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerationStep:
    """One token of an answer, and the answer so far.

    `text` never ends inside a character. Only the last step has a `finish_reason`. If that is "stop" and the answer met
    no stop string, the last token is a stop token, which is not part of the text. `token_id` is None if the answer was
    cancelled.
    """

    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
