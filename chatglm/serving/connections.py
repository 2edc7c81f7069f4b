"""Connections: how many there may be, how long one may take to ask, and what one gets that does not speak HTTP."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

#: Connections at once. Each may hold up to about 100 kB that wait to be read.
MOST_CONNECTIONS = 600
#: Connections that the system holds ready, and those that the loop accepts at once. It takes about four rounds until
#: one too many is closed again.
PENDING, ACCEPTED, ROUNDS = 1024, 32, 4
#: Files and connections of the process besides those of clients.
OTHER_FILES = 64
#: Seconds that a client may take from connecting, or from the first byte of a further request, to the end of its head.
HEADER_SECONDS = 10.0
#: Bytes to read at once.
READ = 2**16


@dataclass(frozen=True)
class Limits:
    """Of all connections, and of each."""

    most: int = MOST_CONNECTIONS
    header_seconds: float = HEADER_SECONDS


def affordable_connections() -> int:
    """Returns how many connections the process may open, after asking the system for enough files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = ROUNDS * ACCEPTED + OTHER_FILES + _open_files()
    unlimited, wanted = resource.RLIM_INFINITY, MOST_CONNECTIONS + others
    if soft != unlimited and soft < wanted and (hard == unlimited or soft < hard):
        more = wanted if hard == unlimited else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
        except (OSError, ValueError):  # some systems have a further limit
            pass
    return MOST_CONNECTIONS if soft == unlimited else min(MOST_CONNECTIONS, max(8, soft - others))


def _open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder))
    return OTHER_FILES


class Connection(H11Protocol):
    """A connection with limits. When there are too many, the one that has been silent longest without a complete
    request is closed; if all wait for answers, the new one gets a 503."""

    def __init__(self, limits: Limits, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._asked_half = False
        self.heard = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether no complete request waits for its answer."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ  # asyncio would read 256 kB
        self.heard = self.loop.time()
        if len(self.connections) > self._limits.most and not self._make_room():
            busy = ApiError(503, "too many connections: try again", code="unavailable", headers={"Retry-After": "2"})
            self._end(busy)
        else:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._asked_half = False
            self._stop_deadline()
        elif self._deadline is None and not self.transport.is_closing():
            self._asked_half = True
            self._start_deadline()
        else:
            self._asked_half = True

    def on_response_complete(self) -> None:
        self.heard = self.loop.time()  # the client has yet to read it
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(ApiError(400, msg, code="invalid_http"))

    def _make_room(self) -> bool:
        silent = [one for one in self.connections if isinstance(one, Connection) and one is not self and one.is_silent]
        if not silent:
            return False
        oldest = min(silent, key=lambda one: one.heard)
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self._limits.header_seconds, self._too_late)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self._asked_half:
            self._end(ApiError(408, "the request took too long", code="timeout"))
        else:
            self.transport.close()

    def _end(self, error: ApiError) -> None:
        """Writes an error without regard to the state of the connection, and closes it."""
        if self.transport.is_closing():
            return
        response = error.response()
        response.headers["connection"] = "close"
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
        lines = [status, *map(b": ".join, response.raw_headers)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()
