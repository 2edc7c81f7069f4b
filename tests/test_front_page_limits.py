"""Bodies that the page's server takes: bounded in bytes, values and time, refused early, one large one at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from chatglm.front.page import limits
from scripted import SECONDS


class Client:
    """One request to an application behind the limits; the application answers with the size of the body."""

    def __init__(self, app: Any, body: bytes = b"", **headers: bytes) -> None:
        self.app = app
        named = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
        self.scope = {"type": "http", "headers": named}
        self.parts = [{"type": "http.request", "body": body, "more_body": False}]
        self.read = 0
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        self.read += 1
        return self.parts.pop(0) if self.parts else await asyncio.Future()

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def ask(self) -> tuple[int, str]:
        await self.app(self.scope, self.receive, self.send)
        return self.sent[0]["status"], self.sent[-1]["body"].decode()


async def size(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"] if scope["headers"] else b""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def run(work: Callable[[], Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work(), SECONDS)

    return asyncio.run(bounded())


def ask(body: bytes = b"", app: Any = size, **headers: bytes) -> tuple[int, str]:
    return run(Client(limits.BoundedBodies(app), body, **headers).ask)


def with_length(body: bytes) -> dict[str, bytes]:
    return {"content_length": str(len(body)).encode()}


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        json.dumps({"data": ["你好" * 100_000, None]}).encode(),
        json.dumps({"data": ["1,2,[3],{4}\n" * 90_000]}).encode(),  # a text may hold any signs
        json.dumps({"data": [',"\\",[' * 90_000]}).encode(),
        json.dumps({"data": list(range(limits.MOST_VALUES - 2))}).encode(),
    ],
    ids=len,
)
def test_what_a_visitor_sends_passes_whole(body: bytes) -> None:
    assert ask(body, **with_length(body)) == (200, str(len(body)))
    assert ask(body, transfer_encoding=b"chunked") == (200, str(len(body)))


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [' + b"1," * limits.MOST_VALUES + b"1]}",
        b"[" * limits.MOST_VALUES * 2,
        b'{"data": [' + b"{}," * limits.MOST_VALUES + b"1]}",
        b'"a",' * limits.MOST_VALUES * 3,
    ],
    ids=["numbers", "depth", "objects", "texts"],
)
def test_too_many_values_are_refused_before_they_are_parsed(body: bytes) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("parsed")

    status, text = ask(body, never, **with_length(body))
    assert status == 413 and str(limits.MOST_VALUES) in text


def test_a_large_body_is_refused_before_it_is_read() -> None:
    client = Client(limits.BoundedBodies(size), content_length=b"100000000", accept_language=b"zh-CN")
    status, text = run(client.ask)
    assert (status, client.read) == (413, 0)
    assert "请求太大" in json.loads(text)["detail"]
    assert (b"connection", b"close") in client.sent[0]["headers"]


def test_a_body_without_a_length_is_read_up_to_the_limit() -> None:
    client = Client(limits.BoundedBodies(size), transfer_encoding=b"chunked")
    client.parts = [{"type": "http.request", "body": bytes(2**20), "more_body": True} for _ in range(100)]
    assert run(client.ask)[0] == 413
    assert client.read == limits.MOST_BYTES // 2**20 + 1


def test_bodies_of_all_clients_together_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_HELD", 3 * 2**20)
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    app = limits.BoundedBodies(size)

    async def together() -> list[int]:
        clients = [Client(app, transfer_encoding=b"chunked") for _ in range(4)]
        for client in clients:
            client.parts = [{"type": "http.request", "body": bytes(2**20), "more_body": True}]
        return sorted(status for status, _ in await asyncio.gather(*(client.ask() for client in clients)))

    assert run(together) == [408, 408, 408, 503]  # the others never end, and time out
    assert app.held == 0


def test_between_two_large_bodies_others_have_their_turn() -> None:
    order: list[str] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        order.append("large" if len((await receive())["body"]) > limits.LARGE else "small")  # here it would be parsed
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = limits.BoundedBodies(note)
    large = bytes(limits.LARGE + 1)

    async def together() -> None:
        clients = [Client(app, large, **with_length(large)) for _ in range(20)]
        await asyncio.gather(*(client.ask() for client in clients), Client(app, b"{}", content_length=b"2").ask())

    run(together)
    assert order.count("large") == 20 and order.index("small") <= 2


def test_without_a_body_nothing_is_read() -> None:
    client = Client(limits.BoundedBodies(size))
    assert run(client.ask) == (200, "0") and client.read == 0
