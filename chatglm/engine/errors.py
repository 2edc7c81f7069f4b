"""Why the engine takes no request, or did not finish one."""

from __future__ import annotations


class QueueFullError(RuntimeError):
    """The queue is full; `retry_after` is a guess in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests, or stopped before it finished this one."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""
