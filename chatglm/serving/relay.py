"""Passes requests on to replicas of the server, and ends an answer with an error event if its replica is lost.

An ordinary proxy cuts such an answer off; a client then cannot tell it from one that is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp

from .errors import ApiError
from .service import dumps

#: How often a request whose answer has not begun is given to another replica.
TRIES = 5
_PAUSE = 0.2  # seconds until the next try
#: Headers that belong to one connection.
_OF_CONNECTION = (b"connection", b"content-length", b"keep-alive", b"transfer-encoding")

#: Asks some replica for an answer: a dict with status and headers, then parts of the body.
Ask = Callable[[dict[str, Any], bytes], AsyncGenerator[Any, None]]


def plain_scope(request: Request) -> dict[str, Any]:
    """What a replica needs to know of a request, of types that can go to another process."""
    kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    scope = {name: request.scope[name] for name in kept if name in request.scope}
    return scope | {"headers": [tuple(pair) for pair in request.scope["headers"]], "client": request.scope["client"]}


async def answer(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Any, None]:
    """In a replica: the app's answer, status and headers first. Closing the generator is the client's disconnect."""
    gone = asyncio.Event()
    messages: asyncio.Queue[Any] = asyncio.Queue()
    received = False

    async def receive() -> dict[str, Any]:
        nonlocal received
        if not received:
            received = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def call() -> None:
        try:
            await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, _put(messages))
        finally:
            messages.put_nowait(None)

    task = asyncio.ensure_future(call())
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield {"status": message["status"], "headers": list(message.get("headers", []))}
            elif message.get("body"):
                yield bytes(message["body"])
        await task
    finally:
        gone.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _put(messages: asyncio.Queue[Any]) -> Callable[[Any], Any]:
    async def send(message: Any) -> None:
        messages.put_nowait(message)

    return send


async def relay(request: Request, ask: Ask, lost: tuple[type[BaseException], ...]) -> Response:
    """In front of the replicas: the response of one of them.

    Args:
        lost: what `ask` raises when its replica ends.

    Returns:
        The replica's response. If the replica is lost before it begins, another one gets the request; if it is lost
        later, a stream ends with an error event and any other body is cut off.
    """
    scope, body = plain_scope(request), await request.body()
    for _ in range(TRIES):
        parts = ask(scope, body)
        try:
            start = await anext(parts)
            break
        except lost:
            await asyncio.sleep(_PAUSE)
    else:
        return ApiError(503, "no replica answers", code="unavailable", headers={"Retry-After": "5"}).response()
    headers = [pair for pair in start["headers"] if pair[0].lower() not in _OF_CONNECTION]
    events = any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
    response = StreamingResponse(_rest(parts, events, lost), start["status"])
    response.raw_headers = headers
    return response


async def _rest(
    parts: AsyncGenerator[Any, None], events: bool, lost: tuple[type[BaseException], ...]
) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(parts):
        try:
            async for part in parts:
                yield part
        except lost:
            if not events:
                raise
            error = ApiError(503, "the replica that wrote this answer has ended", code="unavailable")
            yield f"\n\ndata: {dumps(error.body)}\n\n".encode()
