"""What every request passes first: request id, API key, limits of size and time, and the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

log = logging.getLogger("chatglm.serving")

REQUEST_ID = re.compile(r"[\w.:-]{1,64}")
BODY_SECONDS = 30.0
#: A request may take this much longer than its answer's timeout; then a client that does not read is disconnected.
SPARE_SECONDS = 30.0


class Gate:
    """ASGI middleware.

    Args:
        api_key: required on every path but /health; None lets everybody in.
        max_body: maximum size of a body in bytes.
        timeout: seconds that an answer may take.
        log_text: also log the bodies of requests.
        paths: the paths with a count of their own; all others share one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body: int,
        timeout: float,
        metrics: Metrics,
        log_text: bool = False,
        paths: Callable[[], frozenset[str]] = frozenset,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._max_body, self._timeout = app, max_body, timeout
        self._key = api_key.encode() if api_key is not None else None
        self._metrics, self._log_text, self._paths = metrics, log_text, paths
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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
        body = b""
        try:
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            body = await asyncio.wait_for(self._read(receive, headers), self._body_seconds)
            replayed = _replay(body, receive)
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
        self._write_down(scope, request_id, status, time.perf_counter() - began, body)

    def _check_key(self, path: str, authorization: bytes) -> None:
        if self._key is None or path == "/health":
            return
        scheme, _, key = authorization.partition(b" ")
        if not (scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)):
            reason = "give the API key of this server in the header Authorization: Bearer KEY"
            raise ApiError(401, reason, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """Reads the whole body before the application gets it."""
        too_large = ApiError(
            413, f"the request has more than {self._max_body} bytes", code="too_large", headers={"Connection": "close"}
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self._max_body:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)

    def _write_down(self, scope: Scope, request_id: str, status: int, seconds: float, body: bytes) -> None:
        path = scope["path"]
        self._metrics.responses[path if path in self._paths() else "other", status] += 1
        entry = {
            "request": request_id, "method": scope["method"], "path": path, "status": status,
            "seconds": round(seconds, 4),
        }  # fmt: skip
        if self._log_text and body:
            entry["body"] = body.decode(errors="replace")
        log.info("%s", json.dumps(entry, ensure_ascii=False))


class ClientGoneError(Exception):
    """The client disconnected before its request was complete."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body once, then passes further messages on."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
