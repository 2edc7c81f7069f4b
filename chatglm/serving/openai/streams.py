"""Merges and counts the steps of a request's answers, and makes the head of its responses."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ...engine import EngineStep, Stream
from ..service import Service
from .bodies import Sampling


def head_of(prefix: str, kind: str, service: Service, body: Sampling) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model or service.names[0],
    }


class Usage:
    """Token counts of a request: each prompt counts once, and the answers of all choices."""

    def __init__(self) -> None:
        self._steps: dict[int, EngineStep] = {}

    def see(self, index: int, step: EngineStep) -> None:
        self._steps[index] = step

    def body(self, prompts: int = 1) -> dict[str, Any]:
        """Returns the counts; each of the `prompts` prompts has the same number of consecutive choices."""
        steps = [self._steps[index] for index in sorted(self._steps)]
        first = steps[:: max(1, len(steps) // prompts)]
        prompt, completion = sum(s.prompt_tokens for s in first), sum(s.completion_tokens for s in steps)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in first)},
        }


async def merged(service: Service, streams: Sequence[Stream]) -> AsyncIterator[tuple[int, EngineStep]]:
    """Yields the steps of several answers as they arrive."""
    if len(streams) == 1:
        async for step in service.steps(streams[0]):
            yield 0, step
        return
    arrived: asyncio.Queue[tuple[int, EngineStep | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for step in service.steps(stream):
                arrived.put_nowait((index, step))
            arrived.put_nowait((index, None))
        except Exception as error:  # passed on to the reader
            arrived.put_nowait((index, error))

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
