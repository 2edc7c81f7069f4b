"""Whatever one client does, the server answers the others: a process with few files, its log and its memory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ports import free_port
from scripted import SECONDS
from tiny_folders import make_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets limits of Unix")
ROOT = Path(__file__).resolve().parents[1]
FILES = 256
MB = 2**20


class Program:
    """api.py in a process that may open few files."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.log = log
        self.port = free_port()
        command = f"ulimit -n {FILES}; exec {sys.executable} api.py --device cpu --port {self.port} --model {folder}"
        with log.open("wb") as file:
            self.process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, stdout=file, stderr=file)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False)
        until = time.monotonic() + SECONDS
        while not self._is_ready():
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)  # it does not listen yet: there is nothing else to wait for

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def health(self) -> float:
        """Seconds for which the processors work for the server until /health is answered on a connection of its own.

        Unlike the seconds on a clock, these are no more on a machine that is busy with other things.
        """
        began = self.worked()
        with self.socket() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        return self.worked() - began

    def worked(self) -> float:
        """Seconds of all threads since the program began."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, kind: str) -> int:
        """Bytes: now ("VmRSS") or at most since `forget_peak` ("VmHWM")."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("program")
    program = Program(make_folder(folder / "tiny", 3), folder / "log.txt")
    yield program
    program.http.close()
    program.process.terminate()
    assert program.process.wait(SECONDS) == 0, program.log.read_text()


def floods() -> list[tuple[str, bytes]]:
    """Bodies that are as large as the server takes, and as expensive as we could think of."""
    most = 4 * MB - 200
    values: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": [1] * (most // 3)}),
        ("/v1/chat/completions", {"messages": [1] * 100_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 900}] * 4096}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 20_000}]}),
        ("/v1/chat/completions", {f"unknown{i}": 1 for i in range(130_000)}),
        ("/v1/chat/completions", {"messages": [{f"k{i}": 1 for i in range(4000)}] * 30}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "长 " * (most // 8)}]}),
        ("/v1/completions", {"prompt": ["x"] * 200_000}),
        ("/v1/completions", {"prompt": ["x"] * 100_000}),
        ("/v1/completions", {"prompt": [[1]] * 60_000}),
        ("/v1/completions", {"prompt": "y " * (most // 2)}),
        ("/v1/embeddings", {"input": ["x"] * 120_000}),
        ("/v1/embeddings", {"input": ["word " * 400] * 20}),
        ("/", {"prompt": "x", "history": [["a", "b"]] * 40_000}),
        ("/", {"prompt": "x", "history": [["a " * 200, "b " * 200]] * 4000, "max_length": 600}),
        ("/", {"prompt": "长" * (most // 7)}),
    ]
    bodies = [(path, json.dumps(value).encode()) for path, value in values]
    bodies += [("/", b"[" * most), ("/", b'[{"":0}' + b',{"":0}' * (most // 8) + b"]"), ("/", b"9" * most)]
    return [(path, body[:most]) for path, body in bodies]


def test_one_clients_floods_stop_nobody_and_take_little_memory(program: Program) -> None:
    bodies = floods()
    program.http.post("/", json={"prompt": "x", "max_length": 60})
    program.forget_peak()
    before = program.memory("VmRSS")
    statuses: list[int] = []

    def flood(place: int) -> None:
        with httpx.Client(base_url=program.url, timeout=SECONDS, trust_env=False) as client:
            for path, body in bodies[place::4]:
                answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
                statuses.append(answer.status_code)

    threads = [threading.Thread(target=flood, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        slowest = max(slowest, program.health())
        threads[0].join(0.02)
    for thread in threads:
        thread.join()
    assert slowest < 1.0
    assert program.memory("VmHWM") - before < 300 * MB
    assert len(statuses) == len(bodies) and max(statuses) < 500, statuses


def test_silent_and_half_asking_sockets_stop_nobody_and_fill_no_log(program: Program) -> None:
    before = program.log.stat().st_size
    opened = contextlib.ExitStack()
    sockets = [opened.enter_context(program.socket()) for _ in range(FILES + 50)]
    for number, one in enumerate(sockets[::2]):
        with contextlib.suppress(OSError):  # closed to make room for others
            one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" if number % 2 else b"garbage\r\n\r\n" * 10)
    assert program.health() < 1.0
    half = opened.enter_context(program.socket())
    half.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    assert program.http.post("/", json={"prompt": "x", "max_length": 60}).status_code == 200
    files = len(os.listdir(f"/proc/{program.process.pid}/fd"))
    assert files < FILES
    opened.close()
    assert program.health() < 1.0
    assert "system resource" not in program.log.read_text()
    assert program.log.stat().st_size - before < 100_000
