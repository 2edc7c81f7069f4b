"""How fast requests end, and when one that was refused should come back."""

from __future__ import annotations

import time

#: Seconds after which work counts half as much in the speed.
HALF_LIFE = 5.0
#: Length of an answer in tokens, as long as none has ended.
GUESS = 256.0
#: Seconds that a client is told to wait at most: the `openai` package ignores longer times, or gives up.
LONGEST_WAIT = 60.0
#: Seconds to wait while the speed is not known.
FIRST_WAIT = 1.0


class Pace:
    """Measures the speed while there is work, and gives clients that were refused different times to come back.

    Every refused request is told a later time than the one before it, at the rate at which requests end: so a crowd
    comes back one by one, each when there is a place for it. Each client has a line of its own: one that ignores the
    times does not put the others off.
    """

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0
        self._length: float | None = None
        self._promised: dict[str, float] = {}

    def worked(self, seconds: float, tokens: int) -> None:
        """Notes that the engine needed `seconds` for `tokens` tokens of answers."""
        fading = 0.5 ** (seconds / HALF_LIFE)
        self._seconds = self._seconds * fading + seconds
        self._tokens = self._tokens * fading + tokens

    def ended(self, tokens: int) -> None:
        """Notes the length of an answer that has ended."""
        self._length = tokens if self._length is None else self._length + 0.1 * (tokens - self._length)

    def seconds_per_request(self, room: float) -> float | None:
        """Estimates how long it takes until one more request has ended, or None if nothing is known yet.

        Args:
            room: number of tokens to which the answers of the requests are limited.
        """
        if not self._tokens:
            return None
        length = min(room, GUESS if self._length is None else self._length)
        return self._seconds / self._tokens * max(1.0, length)

    def retry_after(self, client: str, answers: int, room: float, held: int, clients: int) -> float:
        """Returns in how many seconds a client should ask again for this many answers.

        Args:
            room: see `seconds_per_request`.
            held: how many answers of this client run or wait.
            clients: how many clients share the engine.
        """
        now = time.monotonic()
        self._promised = {name: due for name, due in self._promised.items() if due > now}
        seconds = self.seconds_per_request(room)
        if seconds is None:
            return FIRST_WAIT
        seconds *= clients
        # The first one comes back when half of the places are free: an estimate that is wrong by half does no harm.
        due = max(self._promised.get(client, 0.0), now + seconds * held / 2) + seconds * answers
        due = min(due, now + LONGEST_WAIT)
        self._promised[client] = due
        return due - now
