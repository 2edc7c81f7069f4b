"""Requests passed on to replicas: the same response, another replica before it begins, an error event after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatglm.serving import relay
from chatglm.serving.relay import answer
from chatglm.serving.service import EventStream


class Lost(Exception):
    """A replica has ended."""


class Replicas:
    """Two replicas in this process; the first one is lost after as many parts as a test says."""

    def __init__(self, lost_after: int | None = None) -> None:
        self.lost_after, self.asked, self.closed = lost_after, 0, asyncio.Event()
        self.app = Starlette(routes=[Route("/json", self.json, methods=["POST"]), Route("/events", self.events)])

    async def json(self, request: Request) -> Response:
        body = await request.json()
        return JSONResponse({"got": body, "key": request.headers["x-key"]}, 201, {"X-Own": "1"})

    async def events(self, request: Request) -> Response:
        async def items() -> AsyncGenerator[Any, None]:
            try:
                for number in range(3):
                    yield {"number": number}
            finally:
                self.closed.set()

        return EventStream(items(), done="[DONE]")

    async def ask(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Any, None]:
        self.asked += 1
        first, count = self.asked == 1, 0
        async for part in answer(self.app, scope, body):
            if first and count == self.lost_after:
                raise Lost
            count += 1
            yield part

    def client(self) -> httpx.AsyncClient:
        async def front(request: Request) -> Response:
            return await relay.relay(request, self.ask, (Lost,))

        app = Starlette(routes=[Route("/{path:path}", front, methods=["GET", "POST"])])
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")


@pytest.mark.parametrize("lost_after", [None, 0])
def test_a_response_comes_through_even_if_a_replica_is_lost_before_it(
    lost_after: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_PAUSE", 0)

    async def run() -> None:
        replicas = Replicas(lost_after)
        async with replicas.client() as client:
            got = await client.post("/json", json={"a": "你好"}, headers={"X-Key": "k"})
        assert (got.status_code, got.headers["x-own"]) == (201, "1")
        assert got.json() == {"got": {"a": "你好"}, "key": "k"}
        assert got.headers["content-type"] == "application/json"
        assert replicas.asked == (1 if lost_after is None else 2)

    asyncio.run(run())


def test_a_stream_comes_through() -> None:
    async def run() -> None:
        replicas = Replicas()
        async with replicas.client() as client:
            got = await client.get("/events")
        assert got.headers["content-type"].startswith("text/event-stream")
        assert [line for line in got.text.splitlines() if line] == [
            *(f'data: {{"number": {number}}}' for number in range(3)), "data: [DONE]",
        ]  # fmt: skip

    asyncio.run(run())


def test_a_stream_whose_replica_is_lost_ends_with_an_error_event() -> None:
    async def run() -> None:
        replicas = Replicas(lost_after=2)
        async with replicas.client() as client:
            got = await client.get("/events")
        lines = [line for line in got.text.splitlines() if line]
        assert lines[0] == 'data: {"number": 0}'
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and error["code"] == "unavailable"
        assert "[DONE]" not in got.text and replicas.asked == 1

    asyncio.run(run())


def test_no_replica_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_PAUSE", 0)

    async def nobody(scope: dict[str, Any], body: bytes) -> AsyncGenerator[Any, None]:
        raise Lost
        yield

    async def run() -> None:
        replicas = Replicas()
        monkeypatch.setattr(replicas, "ask", nobody)
        async with replicas.client() as client:
            got = await client.post("/json", json={})
        assert got.status_code == 503 and got.headers["retry-after"] == "5"

    asyncio.run(run())


def test_a_client_that_goes_ends_the_answer() -> None:
    async def run() -> None:
        replicas = Replicas()
        scope = {"type": "http", "method": "GET", "path": "/events", "query_string": b"", "headers": []}
        parts = answer(replicas.app, scope, b"")
        assert (await anext(parts))["status"] == 200
        await parts.aclose()
        await asyncio.wait_for(replicas.closed.wait(), 10)

    asyncio.run(run())
