"""The route of embeddings."""

from __future__ import annotations

import asyncio
import base64
import time
from array import array
from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import torch
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from ..chat_engine import ChatEngine
from ..clients import embedding_alone
from ..errors import ApiError
from ..service import Service, dumps, in_thread, service_of, unless_gone
from .bodies import Body, TokenIds

#: In single precision.
Vector: TypeAlias = "array[float]"

#: Texts in a request, as in OpenAI's API.
MOST_INPUTS = 2048
#: Vectors that are written at once: the text of all of them would take hundreds of megabytes.
WRITTEN_AT_ONCE = 64


class EmbeddingsBody(Body):
    model: str | None = None
    input: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MOST_INPUTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MOST_INPUTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


router = APIRouter()


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingsBody) -> Response:
    """The mean of the last hidden states over the tokens, normalised to length 1.

    The models were not trained for embeddings: these are good enough to group similar texts, not for a search engine.
    """
    service = service_of(request)
    engine = service.engine
    adapter = service.adapter_of(body.model)
    if body.dimensions is not None:
        raise ApiError(400, "dimensions cannot be chosen", param="dimensions", code="unsupported_parameter")
    given = body.input
    inputs: list[Any] = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else list(given)
    prompts = await in_thread(_embedding_ids, engine, inputs)
    async with embedding_alone():
        vectors = await unless_gone(request, _embed_all(service, engine, prompts, adapter))
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    last = {"object": "list", "model": body.model or service.names[0], "usage": usage}
    return StreamingResponse(_written(vectors, body.encoding_format, last), media_type="application/json")


async def _written(vectors: list[Vector], encoding: str, last: dict[str, Any]) -> AsyncGenerator[str, None]:
    """Yields the JSON of the response in parts, each made in a thread."""
    yield '{"data": ['
    for first in range(0, len(vectors), WRITTEN_AT_ONCE):
        part = await in_thread(_items, vectors[first : first + WRITTEN_AT_ONCE], encoding, first)
        yield f"{', ' if first else ''}{part}"
    yield f"], {dumps(last)[1:]}"


def _items(vectors: list[Vector], encoding: str, first: int) -> str:
    return ", ".join(
        dumps({"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)})
        for index, vector in enumerate(vectors, first)
    )


def _embedding_ids(engine: ChatEngine, inputs: list[Any]) -> list[list[int]]:
    result = []
    for index, text in enumerate(inputs):
        if isinstance(text, str):
            engine.check_size(text)
        ids = list(engine.tokenizer(text)["input_ids"]) if isinstance(text, str) else list(text)
        if not 0 < len(ids) <= engine.context:
            reason = f"input[{index}] has {len(ids)} tokens; the model reads from 1 to {engine.context}"
            raise ApiError(400, reason, param="input", code="context_length_exceeded" if ids else None)
        if max(ids) >= engine.model.config.vocab_size:
            raise ApiError(400, f"input[{index}] holds ids that are not tokens of this model", param="input")
        engine.model.positions_from(torch.tensor([ids]), 0)  # for its errors
        result.append(ids)
    return result


async def _embed_all(
    service: Service, engine: ChatEngine, prompts: list[list[int]], adapter: str | None
) -> list[Vector]:
    """Embeds one text after the other, so that answers continue in between."""
    vectors, until = [], time.monotonic() + service.timeout
    for ids in prompts:
        try:
            future = engine.call(partial(_embed, engine, ids), adapter)
            vectors.append(await asyncio.wait_for(asyncio.wrap_future(future), max(0.0, until - time.monotonic())))
        except asyncio.TimeoutError as error:
            raise ApiError(504, f"this took longer than {service.timeout:g} s", code="timeout") from error
        except Exception as error:
            raise ApiError.of(error) from error
    return vectors


def _embed(engine: ChatEngine, ids: list[int]) -> Vector:
    inputs = torch.tensor([ids], device=engine.model.device)
    hidden = engine.model.transformer(input_ids=inputs, use_cache=False).last_hidden_state[0].float().mean(0)
    vector = hidden / hidden.norm().clamp(min=1e-12)
    if not bool(torch.isfinite(vector).all()):
        raise ApiError(500, "the model gave NaN or infinite values for this text", code="non_finite_logits")
    return array("f", vector.tolist())


def _encoded(vector: Vector, encoding: str) -> list[float] | str:
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
