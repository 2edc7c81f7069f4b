"""The log probabilities of tokens, in the formats of OpenAI's API and of vLLM's `prompt_logprobs`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from ...engine import EngineStep, TokenLogprob
from ..chat_engine import ChatEngine

#: How many of the likeliest tokens a request may ask for.
MOST_LOGPROBS = 20


def told(engine: ChatEngine, step: EngineStep) -> list[TokenLogprob]:
    """Returns the log probabilities of the step's token; none for a stop token, which is not part of the answer."""
    stops = engine.tokenizer.chat_format.stop_token_ids(engine.tokenizer)
    if step.logprob is None or step.logprob.token_id in stops:
        return []
    return [step.logprob]


def control_ids(engine: ChatEngine) -> set[int]:
    """Returns the ids of tokens that are no text."""
    return {*engine.tokenizer.commands.values(), *engine.tokenizer.all_special_ids}


def _text(part: bytes) -> str:
    return part.decode(errors="replace")


def _token(engine: ChatEngine, token_id: int, logprob: float) -> dict[str, Any]:
    part = engine.tokenizer.token_bytes(token_id)
    return {"token": _text(part), "logprob": logprob, "bytes": list(part)}


def chat_logprobs(engine: ChatEngine, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(engine, token.token_id, token.logprob)
        | {"top_logprobs": [_token(engine, other, value) for other, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    engine: ChatEngine, tokens: Sequence[TokenLogprob | None] | None, top: int
) -> list[dict[str, Any] | None] | None:
    """Returns vLLM's format: for each token of the prompt None, or an object by token id of it and the likeliest."""
    if tokens is None:
        return None
    return [None if token is None else _by_id(engine, token, top) for token in tokens]


def _by_id(engine: ChatEngine, token: TokenLogprob, top: int) -> dict[str, Any]:
    ranked = [(token.token_id, token.logprob, token.rank)]
    others = enumerate(token.top[:top], 1)
    ranked += [(other, value, rank) for rank, (other, value) in others if other != token.token_id]
    return {
        str(token_id): {
            "logprob": logprob,
            "rank": rank,
            "decoded_token": _text(engine.tokenizer.token_bytes(token_id)),
        }
        for token_id, logprob, rank in ranked
    }


class TextLogprobs:
    """The `logprobs` of a completion, part by part: `text_offset` goes on from one part to the next.

    Args:
        text: what the client sees of the prompt, if it is echoed.
        top: how many of the likeliest tokens to name.
    """

    def __init__(self, engine: ChatEngine, text: str = "", top: int = MOST_LOGPROBS) -> None:
        self._tokenizer, self._text, self._count = engine.tokenizer, text, top
        self._control = control_ids(engine)
        # Counts whole characters: some tokens are single bytes of one.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._at_start = True

    def part(self, ids: Sequence[int], tokens: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Returns the lists for more tokens; a token of None has no log probability."""
        texts, offsets = [], []
        for token_id in ids:
            part: bytes = self._tokenizer.token_bytes(token_id)
            texts.append(_text(part))
            offsets.append(self._offset)
            if token_id not in self._control:
                self._offset += len(self._decoder.decode(part)) - self._is_added_space(part)
        return {
            "tokens": texts,
            "token_logprobs": [token and token.logprob for token in tokens],
            "top_logprobs": [token and self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _is_added_space(self, part: bytes) -> bool:
        """Whether this part of the text begins with the space that tokenizers put before every text."""
        at_start, self._at_start = self._at_start, self._at_start and not part
        return at_start and part.startswith(b" ") and not self._text.startswith(" ")

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """Several tokens may have the same text: the likeliest counts, so that the greatest value is the model's."""
        values: dict[str, float] = {}
        for token_id, value in [*token.top[: self._count], (token.token_id, token.logprob)]:
            values.setdefault(_text(self._tokenizer.token_bytes(token_id)), value)
        return values
