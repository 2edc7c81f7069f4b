"""A server with OpenAI's routes, started, asked and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chatglm.exports.environments import alone
from tools.engines.known import Engine

START = 600.0  # seconds that it may take to start
AT_ONCE = 8  # requests
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """The server of an engine, for a `with` statement.

    Attributes:
        url: its address.
        model: how requests name the checkpoint.

    Raises:
        RuntimeError: it ended, or did not answer in ten minutes; the message has its last lines.
    """

    def __init__(self, engine: Engine, programs: Path, path: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.model = f"http://127.0.0.1:{port}", str(path)
        self._log = log
        command = [part.format(programs=programs, path=path, port=port) for part in engine.command]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=alone() | {"HF_HUB_OFFLINE": "1"} | engine.variables,
            )  # fmt: skip

    def __enter__(self) -> Server:
        end = time.monotonic() + START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                raise RuntimeError("\n".join(["the server does not start:", *lines]))
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the server and the processes that it has started."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, how)
                self._process.wait(30)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _answers(self) -> bool:
        try:
            with _OPENER.open(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def ask(url: str, model: str, question: str, tokens: int) -> str:
    """The greedy answer to one question, as it is streamed.

    Raises:
        RuntimeError: the server refuses, or breaks off.
    """
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": tokens,
        "stream": True,
    }  # fmt: skip
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    text, reason = "", None
    try:
        with _OPENER.open(request, timeout=300) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    event: Any = json.loads(line[6:])
                    for choice in event.get("choices", []):
                        text += choice["delta"].get("content") or ""
                        reason = choice.get("finish_reason") or reason
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {error.read().decode(errors='replace')[:500]}") from error
    if reason is None:
        raise RuntimeError(f"the answer to {question!r} breaks off after {text!r}")
    return text


def ask_all(url: str, model: str, questions: Sequence[str], tokens: int) -> list[str]:
    """The answers to all questions, several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda question: ask(url, model, question, tokens), questions))
