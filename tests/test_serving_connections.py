"""Connections that do not ask, ask halfway or speak no HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import live_server
from chatglm.serving import connections
from live_server import Live, Parrot, serve
from scripted import SECONDS


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A server that waits briefly for the head of a request, and takes few connections."""
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 6)
    defaults = live_server._Server.__init__

    def hasty(self: Any, *args: Any, **options: Any) -> None:
        defaults(self, *args, header_seconds=2.0, **options)

    monkeypatch.setattr(live_server._Server, "__init__", hasty)
    engine = Parrot(3, max_batch=8)
    with serve(engine) as live, contextlib.ExitStack() as opened:
        connect = live.socket
        monkeypatch.setattr(live, "socket", lambda: opened.enter_context(connect()))
        yield live
    engine.close()


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def ask(connection: socket.socket) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b'{"status": "ok"}'):
        part = connection.recv(65536)
        assert part
        answer += part
    assert answer.startswith(b"HTTP/1.1 200")


def error_in(response: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head and f"content-length: {len(body)}".encode() in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def test_a_silent_connection_is_closed_and_half_a_head_gets_an_error(live: Live) -> None:
    assert rest(live.socket()) == b""
    for half in (b"G", b"POST / HTTP/1.1\r\nHost: x\r\n"):
        connection = live.socket()
        connection.sendall(half)
        assert error_in(rest(connection))[0] == 408


def test_drops_of_a_head_do_not_keep_a_connection(live: Live) -> None:
    connection = live.socket()
    stop = threading.Event()

    def drip() -> None:
        try:
            while not stop.wait(0.05):
                connection.sendall(b"x")
        except OSError:
            pass

    thread = threading.Thread(target=drip)
    connection.sendall(b"GET /")
    thread.start()
    assert error_in(rest(connection))[0] == 408
    stop.set()
    thread.join()


def test_so_does_half_a_further_request(live: Live) -> None:
    connection = live.socket()
    ask(connection)
    connection.sendall(b"GET /health HT")
    assert error_in(rest(connection))[0] == 408
    kept = live.socket()
    for _ in range(3):
        ask(kept)


def test_an_answer_may_take_longer(live: Live) -> None:
    question, hold = live.engine.hold()
    text = json.dumps({"prompt": question, "max_length": 200})
    connection = live.socket()
    head = "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
    assert hold.begun.wait(SECONDS)
    assert rest(live.socket()) == b""  # a silent one beside it is closed meanwhile
    hold.go_on.set()
    assert rest(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("nonsense", [b"\x16\x03\x01\x02", b"hello\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"x" * 100_000])
def test_what_is_no_http_gets_an_error_of_the_api(live: Live, nonsense: bytes) -> None:
    connection = live.socket()
    connection.sendall(nonsense + b"\r\n\r\n")
    status, error = error_in(rest(connection))
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", None)


def test_new_connections_close_those_that_have_been_silent_longest(live: Live) -> None:
    most = connections.affordable_connections()
    assert most == 6
    for _ in range(40):
        live.socket()
    for _ in range(10):
        ask(live.socket())
    assert len(live.server.server_state.connections) <= most


def test_connections_that_wait_for_answers_are_kept(live: Live) -> None:
    question, hold = live.engine.hold()
    text = json.dumps({"prompt": question, "max_length": 200})
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    live.http.close()
    asking = [live.socket() for _ in range(6)]
    for one in asking:
        one.sendall((head + text).encode())
    assert hold.begun.wait(SECONDS)
    while len(live.server.server_state.tasks) < 6:
        pass  # the server reads them all
    response = rest(live.socket())
    assert error_in(response)[0] == 503 and b"retry-after" in response
    hold.go_on.set()
    for one in asking:
        assert one.recv(100).startswith(b"HTTP/1.1 200")


def test_the_number_of_connections_follows_from_that_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    asked: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    for soft, hard, wanted in ((256, 256, range(8, 100)), (20_000, 20_000, [600]), (256, 100_000, [600])):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=(soft, hard): limits)
        assert connections.affordable_connections() in wanted
    assert len(asked) == 1 and asked[0][0] > 600
