"""Many concurrent clients of the server: tokens per second, time to the first token and between tokens.

`python -m benchmarks.serving` makes a mid-size model (about 300M parameters) with random weights and the demo's
vocabulary, starts the real server on 127.0.0.1 in this process, and sends requests over HTTP: one client after the
other, then all at once; then more clients than the queue holds, and many short requests with the memory before and
after.
`--peer` also runs transformers' continuous batching on the same model and prompts, without HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

import chatglm
from chatglm.demo import with_vocabulary_of
from chatglm.loading import model_class
from chatglm.serving.app import Server, create_app
from chatglm.serving.chat_engine import ChatEngine

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "heads": 4, "ffn": 128},
    "small": {"num_layers": 12, "hidden_size": 512, "heads": 8, "ffn": 1376},
    "300m": {"num_layers": 28, "hidden_size": 1024, "heads": 16, "ffn": 2752},
}
WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"


@dataclass
class Seen:
    """One answer as its client saw it; times in seconds since the request."""

    text: str
    tokens: int
    first: float
    gaps: list[float]


def make_model(version: int, size: str, dtype: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) with random weights; by default float32 on the CPU and float16 on a GPU."""
    folder = with_vocabulary_of(version)
    tokenizer = chatglm.ChatGLMTokenizer.from_pretrained(folder, chatglm_version=version)
    shape = SIZES[size]
    values: dict[str, Any] = {
        "num_layers": shape["num_layers"], "hidden_size": shape["hidden_size"], "num_attention_heads": shape["heads"],
        "chatglm_version": version,
    }  # fmt: skip
    if version == 1:
        values |= {"inner_hidden_size": 4 * shape["hidden_size"]}
    else:
        values |= {"ffn_hidden_size": shape["ffn"], "kv_channels": shape["hidden_size"] // shape["heads"]}
        values |= {"multi_query_group_num": 2}
    config = chatglm.ChatGLMConfig.from_dict(chatglm.ChatGLMConfig.from_pretrained(folder).to_dict() | values)
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    model = model_class(config)(config).eval().to(getattr(torch, dtype or ("float16" if gpu else "float32")))
    return (model.cuda() if gpu else model), tokenizer


def prompts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(WORDS, k=rng.randrange(5, 40))) for _ in range(count)]


class Running:
    """The server in a thread."""

    def __init__(self, engine: ChatEngine) -> None:
        self.server = Server(create_app(lambda: engine, ["model"]), "127.0.0.1", 0)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.port}"
        while httpx.get(f"{self.url}/health", trust_env=False).status_code != 200:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


async def ask(client: httpx.AsyncClient, prompt: str, tokens: int) -> Seen | int:
    """One streamed answer of `tokens` tokens, or the HTTP status of a refusal."""
    body = {
        "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": tokens, "stream": True,
        "stream_options": {"include_usage": True}, "logprobs": True,
    }  # fmt: skip
    began = time.perf_counter()
    text, times, count = "", [], 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return response.status_code
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
            for choice in event.get("choices", []):
                text += choice["delta"].get("content") or ""
                if choice["logprobs"]:  # one for every token, even if it completes no character
                    times.append(time.perf_counter() - began)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return Seen(text, count, times[0] if times else 0.0, gaps)


async def ask_all(url: str, questions: list[str], tokens: int, at_once: int) -> tuple[list[Seen | int], float]:
    limits = httpx.Limits(max_connections=max(at_once, 1))
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits, trust_env=False) as client:
        turn = asyncio.Semaphore(at_once)

        async def one(question: str) -> Seen | int:
            async with turn:
                return await ask(client, question, tokens)

        began = time.perf_counter()
        answers = await asyncio.gather(*(one(question) for question in questions))
        return list(answers), time.perf_counter() - began


def describe(values: list[float]) -> str:
    if not values:
        return "-"
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{1000 * statistics.median(ordered):.0f} / {1000 * p99:.0f}"


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc/self/statm") else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages else 0.0


@dataclass(frozen=True)
class Measured:
    """Tokens per second of all clients, milliseconds as `describe` gives them, and the answers."""

    rate: float
    first: str
    between: str
    texts: list[str]


def measure(url: str, name: str, questions: list[str], tokens: int, at_once: int) -> Measured:
    answers, seconds = asyncio.run(ask_all(url, questions, tokens, at_once))
    seen = [answer for answer in answers if isinstance(answer, Seen)]
    rate = sum(answer.tokens for answer in seen) / seconds
    first, between = describe([one.first for one in seen]), describe([gap for one in seen for gap in one.gaps])
    print(f"| {name} | {rate:.1f} | {first} | {between} |", flush=True)
    return Measured(rate, first, between, [answer.text for answer in seen])


def peer(model: Any, tokenizer: Any, questions: list[str], tokens: int) -> float:
    """Tokens per second of transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    ids = [model.prepare_turn(tokenizer, question)[0] for question in questions]
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)
    blocks = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
    began = time.perf_counter()
    done = model.generate_batch(ids, generation_config=config, continuous_batching_config=blocks, warmup=False)
    return sum(len(one.generated_tokens) for one in done.values()) / (time.perf_counter() - began)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--size", choices=list(SIZES), default="300m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of one answer")
    parser.add_argument("--crowd", type=int, default=200, help="clients for a queue of 64; 0 skips this part")
    parser.add_argument("--requests", type=int, default=2000, help="short requests; 0 skips this part")
    parser.add_argument("--peer", action="store_true", help="generations 2 and 3: transformers' own batching, too")
    args = parser.parse_args(arguments)
    model, tokenizer = make_model(args.generation, args.size, args.dtype)
    millions = model.num_parameters() / 1e6
    print(f"{millions:.0f}M parameters, {model.dtype}, {model.device}, {torch.get_num_threads()} threads")
    engine = ChatEngine(model, tokenizer, max_batch=args.clients, max_queue=64)
    running = Running(engine)
    questions = prompts(args.clients)
    try:
        asyncio.run(ask_all(running.url, questions[:1], 4, 1))  # the first forward is slower
        print("| clients | tokens/s | ms to first token, median / p99 | ms between tokens, median / p99 |")
        print("| --- | --- | --- | --- |")
        single = measure(running.url, "one after another", questions, args.tokens, 1)
        together = measure(running.url, f"{args.clients} at once", questions, args.tokens, args.clients)
        same = sum(a == b for a, b in zip(single.texts, together.texts, strict=True))
        times = together.rate / single.rate
        print(f"\n{times:.1f} x; {same} of {len(single.texts)} answers equal those generated alone")
        if args.crowd:
            answers, seconds = asyncio.run(ask_all(running.url, prompts(args.crowd), 4, args.crowd))
            refused = sum(answer == 429 for answer in answers)
            done = sum(isinstance(answer, Seen) for answer in answers)
            print(f"{args.crowd} clients, queue of 64: {done} answered, {refused} refused with 429 in {seconds:.1f} s")
            if done + refused != args.crowd:
                raise SystemExit("some requests were lost")
        if args.requests:
            count = max(args.requests // 10, 1)
            asyncio.run(ask_all(running.url, prompts(count), 2, args.clients))
            before = resident()
            asyncio.run(ask_all(running.url, prompts(args.requests - count), 2, args.clients))
            print(f"memory after {count} requests: {before:.0f} MiB, after {args.requests}: {resident():.0f} MiB")
    finally:
        running.stop()
    if args.peer:
        print(f"transformers' continuous batching: {peer(model, tokenizer, questions, args.tokens):.1f} tokens/s")


if __name__ == "__main__":
    main()
