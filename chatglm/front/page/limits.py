"""What the page's server takes from a client: bodies of bounded size, read and counted before anything parses them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ...language import browser_language
from ..messages import PAGE

MOST_BYTES = 4 * 2**20
#: Items of lists and objects: what costs time is their number, not the length of a text. A message has about five.
MOST_VALUES = 20_000
#: Bytes of bodies that are in memory at the same time, whoever sends them.
MOST_HELD = 64 * 2**20
#: Bodies larger than this are handled one at a time, and between two of them all other requests have their turn.
LARGE = 64 * 2**10
BODY_SECONDS = 30.0


class RefusedError(Exception):
    """The request is refused with this status; `key` names the text."""

    def __init__(self, status: int, key: str) -> None:
        super().__init__(status, key)
        self.status, self.key = status, key


class ClientGoneError(Exception):
    """The client disconnected before its request was complete."""


class BoundedBodies:
    """ASGI middleware that refuses large bodies, those of too many values, and those that arrive too slowly.

    Args:
        upload_bytes: the limit of uploaded files, which are no JSON.
    """

    def __init__(self, app: Any, upload_bytes: int = MOST_BYTES) -> None:
        self.app, self.upload_bytes = app, upload_bytes
        self.held = 0
        self.alone = asyncio.Semaphore(1)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        if scope["type"] != "http" or (length == b"0" and b"transfer-encoding" not in headers):
            await self.app(scope, receive, send)
            return
        held = [0]
        uploads = scope.get("path", "").endswith("/upload")
        most = self.upload_bytes if uploads else MOST_BYTES
        try:
            if length.isdigit() and int(length) > most:
                raise RefusedError(413, "too_large")
            body = await asyncio.wait_for(self._read(receive, held, most), BODY_SECONDS)
            if not uploads and not _is_small(body):
                raise RefusedError(413, "too_large")
            if len(body) <= LARGE:
                await self.app(scope, _replay(body, receive), send)
            else:
                await self._handle_alone(scope, body, receive, send)
        except ClientGoneError:
            pass
        except asyncio.TimeoutError:
            await self._refuse(RefusedError(408, "too_slow"), headers, send)
        except RefusedError as error:
            await self._refuse(error, headers, send)
        finally:
            self.held -= held[0]

    async def _read(self, receive: Any, held: list[int], most: int) -> bytes:
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            parts.append(part)
            held[0] += len(part)
            self.held += len(part)
            if held[0] > most:
                raise RefusedError(413, "too_large")
            if self.held > MOST_HELD:
                raise RefusedError(503, "too_many")
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _handle_alone(self, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        """Passes a large body on when no other one is being parsed: until its answer begins."""
        await self.alone.acquire()
        busy = True

        async def answer(message: Any) -> None:
            nonlocal busy
            if busy:
                busy = False
                self.alone.release()
            await send(message)

        try:
            await self.app(scope, _replay(body, receive), answer)
        finally:
            if busy:
                self.alone.release()

    async def _refuse(self, error: RefusedError, headers: dict[bytes, bytes], send: Any) -> None:
        language = browser_language(headers.get(b"accept-language", b"").decode("latin-1"))
        text = PAGE[error.key][language].format(bytes=MOST_BYTES, values=MOST_VALUES)
        body = json.dumps({"detail": text}, ensure_ascii=False).encode()
        kept = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": error.status, "headers": [*kept, (b"connection", b"close")]}
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _is_small(body: bytes) -> bool:
    """Whether JSON has at most `MOST_VALUES` values; counts separators and brackets, those in strings left out."""
    if sum(map(body.count, (b",", b"[", b"{"))) <= MOST_VALUES:
        return True
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * MOST_VALUES:
        return False
    outside = plain.split(b'"')[::2]
    return sum(part.count(sign) for part in outside for sign in (b",", b"[", b"{")) <= MOST_VALUES


def _replay(body: bytes, receive: Any) -> Any:
    """Returns a `receive` that gives the body once, then passes further messages on."""
    given = False

    async def replayed() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
