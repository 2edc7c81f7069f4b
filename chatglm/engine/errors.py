"""Errors of the engine: it refused a request, or did not finish one."""

from __future__ import annotations

import math


class QueueFullError(RuntimeError):
    """The queue is full; `retry_after` is an estimate in seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are already waiting: try again in {max(1, math.ceil(retry_after))} s")
        self.retry_after = retry_after


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests, or stopped before it finished this one."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""
