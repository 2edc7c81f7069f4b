"""What every request passes first: request id, API key, limits of size and time, JSON, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .clients import SMALL_BODY, Body, Clients, address_of, in_lane
from .errors import ApiError, bad_request
from .json_body import check_json
from .logs import printable
from .metrics import Metrics

log = logging.getLogger("chatglm.serving")

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
BODY_SECONDS = 30.0
#: A request may take this much longer than its answer's timeout; then a client that does not read is disconnected.
SPARE_SECONDS = 30.0
_JSON = re.compile(rb"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)
#: Headers that only browsers send. A page of another site can make a browser send any body, but not its type as JSON.
_OF_BROWSERS = frozenset({b"origin", b"referer", b"cookie", b"sec-fetch-site"})


class Gate:
    """ASGI middleware.

    Args:
        keys: see `Clients`; required on every path but /health.
        max_body: maximum size of a body in bytes.
        timeout: seconds that an answer may take.
        log_text: also log the bodies of requests.
        paths: the paths with a count of their own; all others share one.
        body_seconds: seconds that the body may take to arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Mapping[str, str] | None,
        max_body: int,
        timeout: float,
        metrics: Metrics,
        log_text: bool = False,
        paths: Callable[[], frozenset[str]] = frozenset,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._max_body, self._timeout = app, max_body, timeout
        self._clients = Clients(keys)
        self._metrics, self._log_text, self._paths = metrics, log_text, paths
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _without_slash(scope)
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        error: ApiError | None = None
        client, text = address_of(scope.get("client")), b""
        try:
            if scope["path"] != "/health":
                client = self._clients.name_of(headers.get(b"authorization", b""), client)
            with self._clients.request_of(client) as account:
                body = await asyncio.wait_for(self._read(receive, headers, account), self._body_seconds)
                text = body if self._log_text else b""
                if body:
                    scope = self._as_json(scope, headers)
                    await _check(scope["path"], body)
                replayed, body = _replay(body, receive), b""  # one copy in memory
                await asyncio.wait_for(self._app(scope, replayed, answer), self._timeout + SPARE_SECONDS)
        except ApiError as refused:
            error = refused
        except asyncio.TimeoutError:
            error = ApiError(408, "the request took too long", code="timeout", headers={"Connection": "close"})
        except ClientGoneError:
            status = 499
        except Exception as fault:
            error = ApiError.internal(fault)
        if error is not None and not status:
            await error.response()(scope, receive, answer)
        self._write_down(scope, request_id, client, status, time.perf_counter() - began, text)

    def _as_json(self, scope: Scope, headers: dict[bytes, bytes]) -> Scope:
        """Returns the scope with a JSON content type, which the originals did not ask for.

        Raises ApiError for another type where a page of another site could have sent the body: a browser adds its
        headers to every such request, but never the API key of this server.
        """
        if _JSON.fullmatch(headers.get(b"content-type", b"")):
            return scope
        if not self._clients.need_keys and not _OF_BROWSERS.isdisjoint(headers):
            raise bad_request(scope["path"], "send JSON, with the header Content-Type: application/json")
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
        return {**scope, "headers": [*others, (b"content-type", b"application/json")]}

    async def _read(self, receive: Receive, headers: dict[bytes, bytes], account: Body) -> bytes:
        """Reads the whole body before the application gets it."""
        too_large = ApiError(
            413, f"the request has more than {self._max_body} bytes", code="too_large", headers={"Connection": "close"}
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise too_large
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            parts.append(part)
            account.add(len(part))
            if account.size > self._max_body:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)

    def _write_down(self, scope: Scope, request_id: str, client: str, status: int, seconds: float, body: bytes) -> None:
        path = scope["path"]
        self._metrics.responses[path if path in self._paths() else "other", status] += 1
        entry = {
            "request": request_id, "client": client, "method": scope["method"], "path": path, "status": status,
            "seconds": round(seconds, 4),
        }  # fmt: skip
        if body:
            entry["body"] = body.decode(errors="replace")
        log.info("%s", printable(json.dumps(entry, ensure_ascii=False)))


class ClientGoneError(Exception):
    """The client disconnected before its request was complete."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body once, then passes further messages on."""
    left = [body]

    async def replayed() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return replayed


def _without_slash(scope: Scope) -> Scope:
    """Returns the scope with the path of the route: `/v1/models/` is `/v1/models`, without a redirection."""
    path = scope["path"]
    if len(path) < 2 or not path.endswith("/"):
        return scope
    raw = scope.get("raw_path") or b""
    return {**scope, "path": path.rstrip("/") or "/", "raw_path": raw.rstrip(b"/") or b"/"}


async def _check(path: str, body: bytes) -> None:
    """Raises ApiError for what is not JSON, or more of it than the server reads. Large bodies do not stop the loop."""
    try:
        if len(body) <= SMALL_BODY:
            check_json(body)
        else:
            async with in_lane():
                await asyncio.to_thread(check_json, body)
    except ValueError as error:
        raise bad_request(path, str(error)) from error
