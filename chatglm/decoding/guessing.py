"""Guessing ahead: several likely next tokens go through the network together, and the right ones are kept.

One forward of a few tokens costs little more than one of a single token, because both read all weights once. The choice
of each token is the same as without guesses (`TokenChooser` chooses after every token that was right), so answers have
the same distribution, and with the same seed the same tokens, up to the rounding of a forward of several tokens. For a
guess of one token per place, this is rejection sampling (https://arxiv.org/abs/2211.17192): the guess is accepted with
its probability, and else the choice has the distribution without it.

Whether a guess is worth its cost is known from measured times and from how often earlier guesses were, or would have
been, right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .drafting import DraftModel
from .lookup import PromptLookup
from .options import GenerationOptions

#: The share of the time that guesses may lose, up to every token of an answer.
LOSS = 0.02
#: The most that may be saved up for later losses, in forwards of one token.
MOST_LOSS = 2.0
#: Guess only for an expected gain of this much: estimates are not exact.
LEAST_GAIN = 1.1
#: What each further token adds to the time of a forward, as long as nothing was measured.
COST_OF_TOKEN = 0.2
#: Numbers of tokens of a forward to choose from. Costs rise in steps, so that few sizes are enough.
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Guesser(Protocol):
    """Something that guesses the next tokens of one sequence."""

    #: Seconds for one token of a guess.
    seconds: float

    def read(self, ids: Sequence[int]) -> None:
        """Takes the sequence so far, which begins with what it was in the last call."""

    def chances(self) -> list[float]:
        """For each token that can be guessed: the probability that it is right if those before it are."""

    def guess(self, count: int) -> list[int]:
        """Returns `count` tokens, at most as many as there are `chances`."""


class Costs:
    """How long forwards of several tokens of one sequence take, compared with one token."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def took(self, tokens: int, seconds: float) -> None:
        """Notes the time of a forward. A longer one than before counts less: the machine may have been busy."""
        before = self._seconds.get(tokens, seconds)
        self._seconds[tokens] = before + (0.5 if seconds < before else 0.1) * (seconds - before)

    @property
    def of_one(self) -> float | None:
        """Seconds for one token."""
        return self._seconds.get(1)

    def ratio(self, tokens: int) -> float:
        """The time of a forward of this many tokens over that of one; between measured sizes, in proportion."""
        one = self.of_one
        known = {size: max(1.0, time / one) for size, time in self._seconds.items()} if one else {}
        known[1] = 1.0
        if tokens in known:
            return known[tokens]
        below = max(size for size in known if size < tokens)
        above = min((size for size in known if size > tokens), default=None)
        if above is None:
            return known[below] + COST_OF_TOKEN * (tokens - below)
        return known[below] + (known[above] - known[below]) * (tokens - below) / (above - below)


#: Of each model, as long as it lives.
_costs: weakref.WeakKeyDictionary[Any, Costs] = weakref.WeakKeyDictionary()


class GuessAhead:
    """Decides before each forward how many tokens to guess for one answer.

    A guess has to be paid for, should it be wrong, by `LOSS` of the time so far and by what earlier ones have gained:
    an answer with guesses never takes more than that longer, as far as the times of forwards are known.
    """

    def __init__(self, guesser: Guesser, costs: Costs) -> None:
        self._guesser, self._costs = guesser, costs
        self._balance = 0.0  # what the next guess may lose, in forwards of one token

    def guess(self, ids: Sequence[int], room: int) -> list[int]:
        """Returns tokens that may follow `ids`, at most `room`; none if that is not worth its cost."""
        self._guesser.read(ids)
        if self._costs.of_one is None or self._balance <= 0:  # the first step shows what one token costs
            return []
        count = self._worthwhile(self._guesser.chances()[: max(room, 0)])
        return self._guesser.guess(count) if count else []

    def took(self, guessed: int, right: int, seconds: float) -> None:
        """Notes that a forward with this many guessed tokens took `seconds`, and how many of them were right."""
        self._costs.took(1 + guessed, seconds)
        if guessed:
            self._balance += 1 + right - self._cost(guessed)
        self._balance = min(MOST_LOSS, self._balance + LOSS * (1 + right))

    def _cost(self, guessed: int) -> float:
        """Of a forward with this many guessed tokens and of guessing them, in forwards of one token."""
        return self._costs.ratio(1 + guessed) + guessed * self._guesser.seconds / (self._costs.of_one or 1.0)

    def _worthwhile(self, chances: list[float]) -> int:
        """Returns for how many tokens the expected gain per time is largest."""
        best, most = 0, LEAST_GAIN
        expected = chance = 1.0
        for count, next_chance in enumerate(chances, 1):
            chance *= next_chance
            expected += chance
            if count + 1 in SIZES or count == len(chances):
                cost = self._cost(count)
                if expected / cost > most and cost - 1 <= self._balance:
                    best, most = count, expected / cost
        return best


def guess_ahead(
    model: Any, options: GenerationOptions, piece_end: Callable[[Any, torch.Tensor, int], int]
) -> GuessAhead | None:
    """Returns what guesses for an answer of `model` with these options, or None.

    Args:
        piece_end: see `chatglm.generation`.

    Raises:
        ValueError: the assistant has another vocabulary.
    """
    guesser: Guesser
    if options.assistant_model is not None:
        guesser = DraftModel(model, options.assistant_model, options.num_assistant_tokens, piece_end)
    elif options.prompt_lookup_num_tokens:
        guesser = PromptLookup(options.prompt_lookup_num_tokens)
    else:
        return None
    return GuessAhead(guesser, _costs.setdefault(model, Costs()))
