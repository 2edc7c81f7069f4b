"""Keeps responses for a while, so that clients can read them again and continue them (`previous_response_id`)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..service import dumps

#: How many responses are kept, for how long, and how large all of them may be together.
MOST_RESPONSES = 1000
SECONDS = 3600.0
MOST_CHARACTERS = 64 * 2**20


@dataclass(frozen=True)
class Kept:
    """A response, and the chat messages of its conversation up to and including its answer, without instructions.

    `owner`: the client that asked for it; nobody else may read it.
    """

    owner: str
    response: dict[str, Any]
    messages: Sequence[dict[str, Any]]
    size: int
    until: float


class ResponseStore:
    """Responses in memory, the oldest first to go. For one thread: that of the event loop.

    Args:
        most, seconds, characters: as the constants of this module; `characters` counts a conversation once for each of
            its responses.
    """

    def __init__(
        self,
        most: int = MOST_RESPONSES,
        seconds: float = SECONDS,
        characters: int = MOST_CHARACTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._seconds, self._characters, self._clock = most, seconds, characters, clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        self._drop()
        return len(self._kept)

    def put(self, owner: str, response: dict[str, Any], before: Kept | None, new: Sequence[dict[str, Any]]) -> None:
        """Keeps a response.

        Args:
            owner: the client that asked for it.
            before: the response that it continues.
            new: the chat messages since then, the answer included.
        """
        size = len(dumps(response)) + len(dumps(list(new))) + (before.size if before else 0)
        messages = [*(before.messages if before else ()), *new]
        self._kept[response["id"]] = Kept(owner, response, messages, size, self._clock() + self._seconds)
        self._size += size
        self._drop()

    def get(self, owner: str, name: str) -> Kept | None:
        """Returns a client's response; None if it has none of this name (any more)."""
        self._drop()
        kept = self._kept.get(name)
        return kept if kept is not None and kept.owner == owner else None

    def delete(self, owner: str, name: str) -> bool:
        """Forgets a client's response; returns whether it was there."""
        kept = self.get(owner, name)
        if kept is not None:
            del self._kept[name]
            self._size -= kept.size
        return kept is not None

    def _drop(self) -> None:
        now = self._clock()
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if oldest.until > now and len(self._kept) <= self._most and self._size <= self._characters:
                return
            self._kept.popitem(last=False)
            self._size -= oldest.size
