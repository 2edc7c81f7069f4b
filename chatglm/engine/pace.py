"""How fast requests end, and when one that was refused should come back."""

from __future__ import annotations

import heapq
import time
from collections.abc import Hashable

#: Seconds after which work counts half as much in the speed.
HALF_LIFE = 5.0
#: Length of an answer in tokens, as long as none has ended.
GUESS = 256.0
#: Seconds that a client is told to wait at most: the `openai` package ignores longer times, or gives up.
LONGEST_WAIT = 60.0
#: Seconds to wait at most after the first refusal: in the first moments of a crowd, the speed is a guess.
FIRST_WAIT = 2.0
#: Seconds to wait while no speed is known, and seconds per request after them.
UNKNOWN_WAIT, UNKNOWN_SECONDS = 1.0, 0.005
#: Seconds for which a time to come back holds, and for how many requests of one client.
HOLDS, MOST_TIMES = 30.0, 1024


class Pace:
    """Measures the speed while there is work, and gives clients that were refused different times to come back.

    Every refused request is told a later time than the one before it: so a crowd comes back one by one. The times are
    early, half of the estimate, since an idle engine costs more than another refusal; the second time is also a
    promise: who comes back then need not be refused again, because the `openai` package tries three times.
    Each client has a line of its own: one that ignores the times does not put the others off.
    """

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0
        self._length: float | None = None
        self._lines: dict[str, _Line] = {}

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

    def refusals(self, client: str, request: Hashable) -> int:
        """Returns how often this request of `client` was refused before, if it has come back when it was told."""
        line = self._lines.get(client)
        return 0 if line is None else line.came_back(request, time.monotonic())

    def retry_after(
        self, client: str, request: Hashable, answers: int, room: float, held: int, clients: int, refusals: int = 0
    ) -> float:
        """Returns in how many seconds a client should ask again for this many answers.

        Args:
            request: what tells the client's requests apart, and is the same when one comes back.
            room: see `seconds_per_request`.
            held: how many answers of this client run or wait.
            clients: how many clients share the engine.
            refusals: how often the request has been refused before.
        """
        now = time.monotonic()
        self._lines = {name: line for name, line in self._lines.items() if line.last + HOLDS >= now}
        line = self._lines.setdefault(client, _Line())
        before, seconds = line.before(refusals, now) + answers, self.seconds_per_request(room)
        if seconds is None:
            wait = UNKNOWN_WAIT + UNKNOWN_SECONDS * before
        else:
            # The first one comes back when half of the places are free: an estimate that is wrong by half does no harm.
            wait = seconds * clients * (held / 2 + before) / 2
        longest = LONGEST_WAIT if refusals else FIRST_WAIT
        wait = wait * longest / (wait + longest)  # near `longest`, those who come later still get later times
        line.tell(request, refusals, answers, now + wait, now)
        return wait


class _Line:
    """The times at which the refused requests of one client should come back."""

    def __init__(self) -> None:
        self.last = 0.0
        # Of the answers that were refused once, and more often: two lines, since the first times are much shorter.
        self._dues: tuple[list[float], list[float]] = [], []
        self._told: dict[Hashable, list[tuple[float, int]]] = {}  # request -> when to come back, refusals

    def before(self, refusals: int, now: float) -> int:
        """Returns how many answers should come back before one that has been refused this often."""
        dues = self._dues[refusals > 0]
        while dues and dues[0] <= now:
            heapq.heappop(dues)
        return len(dues)

    def tell(self, request: Hashable, refusals: int, answers: int, due: float, now: float) -> None:
        """Notes that a request was refused once more and told to come back at `due`."""
        self.last = max(self.last, due)
        if len(self._told) >= MOST_TIMES:
            self._told = {name: told for name, told in self._told.items() if told[-1][0] + HOLDS >= now}
        if len(self._told) >= MOST_TIMES:
            return
        for _ in range(answers):
            heapq.heappush(self._dues[refusals > 0], due)
        self._told.setdefault(request, []).append((due, refusals + 1))

    def came_back(self, request: Hashable, now: float) -> int:
        """Returns how often this request was refused, and forgets it, if its time has come and is not long ago."""
        times = self._told.get(request, [])
        found = next((time for time in times if time[0] <= now <= time[0] + HOLDS), None)
        if found is None:
            return 0
        times.remove(found)
        if not times:
            del self._told[request]
        return found[1]
