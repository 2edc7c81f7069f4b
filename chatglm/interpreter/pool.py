"""One kernel for each conversation, as many as the machine shall bear."""

from __future__ import annotations

import threading
import time
from typing import Any

from .isolation import Isolation
from .kernel import Kernel
from .watcher import Limits

IDLE_SECONDS = 600.0
MOST = 8


class KernelsBusyError(ValueError):
    """There are as many kernels as there may be, and each runs a cell."""


class KernelPool:
    """Kernels by the name of their conversation, which only its owner knows. One that is idle for long ends.

    Args:
        most: kernels at the same time; for another one, the longest idle one ends.
    """

    def __init__(
        self, isolation: Isolation, limits: Limits | None = None, most: int = MOST, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self.isolation = isolation
        self._limits, self._most, self._idle = limits, most, idle_seconds
        self._kernels: dict[str, tuple[Kernel, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tidy, name="kernels", daemon=True)
        self._thread.start()

    def __enter__(self) -> KernelPool:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def kernel(self, conversation: str) -> Kernel:
        """The kernel of a conversation, a new one if it has none. Raises KernelsBusyError."""
        ending = None
        with self._lock:
            if conversation not in self._kernels:
                if len(self._kernels) >= self._most:
                    idle = [(used, name) for name, (one, used) in self._kernels.items() if not one.is_busy]
                    if not idle:
                        raise KernelsBusyError("all kernels are busy: try again later")
                    ending = self._kernels.pop(min(idle)[1])[0]
                self._kernels[conversation] = Kernel(self.isolation, self._limits), 0.0
            kernel = self._kernels[conversation][0]
            self._kernels[conversation] = kernel, time.monotonic()
        if ending is not None:
            ending.close()
        return kernel

    def find(self, conversation: str) -> Kernel | None:
        """The kernel of a conversation, if it has one."""
        with self._lock:
            found = self._kernels.get(conversation)
        return found[0] if found else None

    def end(self, conversation: str) -> None:
        """Ends the kernel of a conversation, and removes its files."""
        with self._lock:
            found = self._kernels.pop(conversation, None)
        if found:
            found[0].close()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        for conversation in list(self._kernels):
            self.end(conversation)

    def _tidy(self) -> None:
        while not self._ended.wait(min(10.0, self._idle / 2)):
            with self._lock:
                now = time.monotonic()
                old = [
                    name for name, (one, used) in self._kernels.items() if now - used > self._idle and not one.is_busy
                ]
            for name in old:
                self.end(name)
