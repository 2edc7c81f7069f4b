"""How fast a run trains: tokens per second, and the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Speed:
    """A clock that stands still during evaluation and saving."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, step: int) -> None:
        """Starts at this step."""
        self.first_step, self.tokens = step, torch.zeros((), dtype=torch.long)
        self.started = self.last = time.monotonic()

    def count(self, tokens: torch.Tensor | None) -> None:
        """Adds the tokens of a batch; a tensor on a GPU is not fetched before `measure`."""
        if tokens is not None:
            self.tokens = self.tokens.to(tokens.device) + tokens.sum()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out the time of a `with` block."""
        begin = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begin
            self.started, self.last = self.started + spent, self.last + spent

    def measure(self, step: int, last_step: int, processes: int = 1) -> dict[str, float]:
        """Tokens per second since the last call, without padding, and the seconds that are left."""
        now = time.monotonic()
        rate = int(self.tokens) * processes / max(now - self.last, 1e-9)
        each = (now - self.started) / max(step - self.first_step, 1)
        self.last, self.tokens = now, torch.zeros_like(self.tokens)
        return {"tokens_per_second": round(rate, 1), "seconds_left": round(each * (last_step - step))}
