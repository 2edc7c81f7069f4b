"""Prompt lookup: guesses that what followed the last tokens earlier follows again (see `guessing`).

Summaries, edited code and answers about a document repeat pieces of their prompt. The idea is that of transformers'
`prompt_lookup_num_tokens` (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

#: How many tokens have to be the same to take up a place: fewer are often the same by chance.
LEAST = 2
#: At most so many earlier places of the same pair are compared, the latest first, over so many tokens.
PLACES, LONGEST = 8, 16
#: After a different token in a copy of at least this length, the copy is expected to continue behind it.
LONG_COPY = 4
#: How often the next token was the same after so many equal ones, before anything was seen: the first bound that fits.
#: 0: behind a token that was not the same.
FIRST_RATES = ((0, 0.5), (3, 0.5), (7, 0.7), (15, 0.85), (None, 0.9))
#: As how many observations these count, and how much older observations count with each new one.
WEIGHT, FADING = 2.0, 0.95


class _Rate:
    """How often something happens, with more weight on the latest times."""

    def __init__(self, expected: float) -> None:
        self._hits, self._all = WEIGHT * expected, WEIGHT

    def saw(self, hit: bool) -> None:
        self._hits, self._all = FADING * self._hits + hit, FADING * self._all + 1

    @property
    def value(self) -> float:
        return self._hits / self._all


class PromptLookup:
    """A `Guesser` that looks the last tokens up in the prompt and in the answer so far.

    It follows one earlier place as long as the answer does the same, whether its guesses are used or not, and so knows
    how often they would have been right.

    Args:
        most: tokens of one guess.
    """

    seconds = 0.0

    def __init__(self, most: int) -> None:
        self._most = most
        self._ids: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # pair of tokens -> the places behind it
        self._source = -1  # the place of the token that is expected next; -1: no such place
        self._same = 0  # how many tokens before it are the same as those at the end
        self._rates = [_Rate(rate) for _, rate in FIRST_RATES]

    def read(self, ids: Sequence[int]) -> None:
        """See `Guesser.read`. The first call has the prompt."""
        is_answer = bool(self._ids)
        for token in ids[len(self._ids) :]:
            resume = self._follow(token) if is_answer else -1
            self._ids.append(token)
            self._note(resume if is_answer else None)
        if not is_answer:
            self._look_up(-1)

    def chances(self) -> list[float]:
        """See `Guesser.chances`."""
        if self._source < 0:
            return []
        return [self._rate(self._same + i).value for i in range(self._most)]

    def guess(self, count: int) -> list[int]:
        """See `Guesser.guess`. Behind the end of the sequence, a guess repeats itself."""
        guess = self._ids[self._source : self._source + count]
        while len(guess) < count:
            guess.append(guess[len(guess) - (len(self._ids) - self._source)])
        return guess

    def _rate(self, same: int) -> _Rate:
        return next(
            rate for rate, (bound, _) in zip(self._rates, FIRST_RATES, strict=True) if bound is None or same <= bound
        )

    def _follow(self, token: int) -> int:
        """Compares a token of the answer with the expected one; returns where a copy may continue, or -1."""
        if self._source < 0:
            return -1
        hit = self._ids[self._source] == token
        self._rate(self._same).saw(hit)
        self._source += 1
        if hit:
            self._same += 1
            return -1
        resume = self._source if self._same >= LONG_COPY else -1
        self._source = -1
        return resume

    def _note(self, resume: int | None) -> None:
        """Notes the place behind the last two tokens; looks them up first in the answer, if no place is followed."""
        if resume is not None and self._source < 0:
            self._look_up(resume)
        if len(self._ids) >= LEAST:
            places = self._places.setdefault((self._ids[-2], self._ids[-1]), [])
            places.append(len(self._ids))
            del places[:-PLACES]

    def _look_up(self, resume: int) -> None:
        """Finds the place with the longest common past, else `resume`."""
        ids, end = self._ids, len(self._ids)
        best = 0
        for place in reversed(self._places.get((ids[-2], ids[-1]), []) if end >= LEAST else []):
            if place == end:
                continue
            same = LEAST
            while same < min(LONGEST, place) and ids[place - 1 - same] == ids[end - 1 - same]:
                same += 1
            if same > best:
                best, self._source, self._same = same, place, same
        if resume >= 0 and (not best or self._rate(0).value > self._rate(best).value):
            self._source, self._same = resume, 0
