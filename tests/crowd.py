"""Many clients of the `openai` package at once, with its default retries, in a process of their own.

Arguments: the server's URL, the name of its model, the number of clients. Prints how many seconds each one waited for
its answer; ends with a traceback if one is refused to the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import httpx
import openai

#: Clients that share a connection pool: a pool searches all of its connections for every request.
POOL = 20
TIMEOUT = 100.0


async def ask(client: openai.AsyncOpenAI, model: str, number: int, start: asyncio.Event) -> float:
    await start.wait()
    began = time.perf_counter()
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"question {number}"}], max_tokens=12, temperature=0
    )
    assert answer.choices[0].finish_reason
    return time.perf_counter() - began


async def crowd(url: str, model: str, count: int) -> list[float]:
    start = asyncio.Event()
    pools = [
        httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=POOL), timeout=TIMEOUT)
        for _ in range(0, count, POOL)
    ]
    clients = [
        openai.AsyncOpenAI(base_url=url, api_key="none", http_client=pools[number // POOL]) for number in range(count)
    ]
    for client in clients:
        _ = client.chat.completions  # imports what the first request would import
    asks = [asyncio.ensure_future(ask(client, model, number, start)) for number, client in enumerate(clients)]
    start.set()
    try:
        return await asyncio.gather(*asks)
    finally:
        for pool in pools:
            await pool.aclose()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(crowd(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
