"""Other engines beside this one, over HTTP, in turns: `python -m benchmarks.engines NAME=URL NAME=URL ...`.

All servers run at the same time; each in its turn answers one client, and then all clients at once, from the same
prompts, so that they share what the machine gives at that time. Prints, for each server and number of clients, the
median over the turns of the answer tokens per second (prompts are part of the time), of the time to the first token,
and the ratio of the speed to the first server's.

A NAME=COMMAND is a program that takes turns without HTTP, as `benchmarks/openvino_turns.py`: it prints `ready`; then it
reads lines of JSON, `{"prompts": [...], "tokens": N}`, and answers each with `{"tokens": N, "seconds": S, "first": S}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import httpx

from benchmarks.serving import prompts


class Turn(NamedTuple):
    """What a turn has shown: tokens per second of all clients, the median of seconds to the first token, all tokens."""

    rate: float
    first: float
    tokens: int


class HttpServer:
    """A server with OpenAI's routes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.model = httpx.get(f"{url}/v1/models", trust_env=False).raise_for_status().json()["data"][0]["id"]

    def end(self) -> None:
        """Whoever started the server ends it."""

    def turn(self, questions: list[str], tokens: int) -> Turn:
        return asyncio.run(self._turn(questions, tokens))

    async def _turn(self, questions: list[str], tokens: int) -> Turn:
        limits = httpx.Limits(max_connections=len(questions))
        async with httpx.AsyncClient(base_url=self.url, timeout=3600, limits=limits, trust_env=False) as client:
            began = time.perf_counter()
            seen = await asyncio.gather(*(self._ask(client, question, tokens) for question in questions))
            seconds = time.perf_counter() - began
        tokens = sum(count for count, _ in seen)
        return Turn(tokens / seconds, statistics.median(first for _, first in seen), tokens)

    async def _ask(self, client: httpx.AsyncClient, question: str, tokens: int) -> tuple[int, float]:
        """Tokens of one answer, and seconds until its first text."""
        body = {
            "model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        began, first, count = time.perf_counter(), None, 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise SystemExit(f"{self.url}: {response.status_code} {(await response.aread()).decode()[:300]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event: dict[str, Any] = json.loads(line[6:])
                    if first is None and any(one["delta"].get("content") for one in event.get("choices", [])):
                        first = time.perf_counter() - began
                    count = (event.get("usage") or {}).get("completion_tokens", count)
        return count, time.perf_counter() - began if first is None else first


class Program:
    """A program that takes turns by itself."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        while self._read() != "ready":
            pass

    def end(self) -> None:
        with self._process:  # closes its pipes and waits
            pass

    def turn(self, questions: list[str], tokens: int) -> Turn:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": questions, "tokens": tokens}) + "\n")
        told = json.loads(self._read())
        return Turn(told["tokens"] / told["seconds"], told["first"], told["tokens"])

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end()
            raise SystemExit("a program has ended: run it alone to see why")
        return line.strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=32, help="tokens of one answer")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args(arguments)
    servers: dict[str, HttpServer | Program] = {}
    for server in args.servers:
        name, equals, place = server.partition("=")
        if not equals:
            parser.error(f"{server}: give NAME=URL or NAME=COMMAND")
        servers[name] = HttpServer(place) if place.startswith("http") else Program(place)
    try:
        _measure(servers, args.clients, args.turns, args.tokens)
    finally:
        for each in servers.values():
            each.end()


def _measure(servers: dict[str, HttpServer | Program], counts: list[int], turns: int, tokens: int) -> None:
    for each in servers.values():
        each.turn(prompts(1), 2)  # the first answer is slower
    print("| engine | clients | tokens/s | first token | of the first engine's |")
    print("| --- | --- | --- | --- | --- |")
    for clients in counts:
        seen: dict[str, list[Turn]] = {name: [] for name in servers}
        for number in range(turns):
            asked = [f"{number} {prompt}" for prompt in prompts(clients)]  # new ones: no engine remembers them
            for name, each in servers.items():
                seen[name].append(each.turn(asked, tokens))
                turn = seen[name][-1]
                told = f"{name}, {clients}: {turn.rate:.2f} tokens/s, first token {turn.first:.2f} s"
                if turn.tokens != clients * tokens:  # the model ends its answers, and the ratio means less
                    told += f", {turn.tokens} tokens instead of {clients * tokens}"
                print(told, file=sys.stderr, flush=True)
        rates = {name: statistics.median(turn.rate for turn in taken) for name, taken in seen.items()}
        for name, taken in seen.items():
            first = statistics.median(turn.first for turn in taken)
            ratio = rates[name] / next(iter(rates.values()))
            print(f"| {name} | {clients} | {rates[name]:.1f} | {first:.2f} s | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
