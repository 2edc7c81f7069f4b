"""The log probabilities of tokens, in the two formats of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...engine import EngineStep, TokenLogprob
from ..chat_engine import ChatEngine


def told(engine: ChatEngine, step: EngineStep) -> list[TokenLogprob]:
    """Returns the log probabilities of the step's token; none for a stop token, which is not part of the answer."""
    stops = engine.tokenizer.chat_format.stop_token_ids(engine.tokenizer)
    if step.logprob is None or step.logprob.token_id in stops:
        return []
    return [step.logprob]


def _token(engine: ChatEngine, token_id: int, logprob: float) -> dict[str, Any]:
    part = engine.tokenizer.token_bytes(token_id)
    return {"token": part.decode(errors="replace"), "logprob": logprob, "bytes": list(part)}


def chat_logprobs(engine: ChatEngine, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(engine, token.token_id, token.logprob)
        | {"top_logprobs": [_token(engine, other, value) for other, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(engine: ChatEngine, tokens: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
    """Returns the format of completions, and the text offset after these tokens."""
    texts = [_token(engine, token.token_id, 0.0)["token"] for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops = [{_token(engine, other, 0.0)["token"]: value for other, value in token.top} for token in tokens]
    values = [token.logprob for token in tokens]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset
