"""How much of the waiting prompts a step reads, so that running answers do not stall."""

from __future__ import annotations

#: Maximum number of prompt tokens that a step reads.
PREFILL_TOKENS = 512
#: A step may read prompts for this many times as long as it needs for the next tokens of the running answers.
SHARE = 1.25
#: Fewer tokens are never read at once: they would take nearly as long, because all weights are read for them.
LEAST = 16
#: With less room beside the answers, a piece of a prompt is read on its own.
LEAST_BESIDE = 8
#: After so many pieces beside the answers, one is read on its own, so that the answers' own time is known.
BESIDE_RUN = 8
#: How much a new measurement counts.
NEW = 0.5


class PrefillPace:
    """Measures how long prompts and answers take, and chooses the size of the next piece of a prompt.

    Args:
        most: maximum number of prompt tokens that a step reads.
    """

    def __init__(self, most: int = PREFILL_TOKENS) -> None:
        self.most = most
        self._answer: float | None = None  # seconds of a step's answers
        self._token: float | None = None  # seconds of a prompt's token in the last piece
        self._beside: float | None = None  # the same for one that was read beside the answers
        self._run = 0  # pieces beside the answers since a step with answers alone

    def answered(self, seconds: float) -> None:
        """Notes how long the next tokens of all running answers took."""
        self._answer, self._run = _mean(self._answer, seconds), 0

    def read(self, tokens: int, seconds: float) -> None:
        """Notes how long a piece of a prompt took."""
        self._token = seconds / tokens

    def read_beside(self, tokens: int, seconds: float) -> None:
        """Notes how long a step took that read a piece of a prompt in one forward with answers."""
        self._answer = min(seconds, self._answer or seconds)
        self._beside, self._run = _mean(self._beside, (seconds - self._answer) / tokens), self._run + 1

    def beside(self, spent: float, read: int, room: int) -> int:
        """Returns how many tokens of a prompt to read in one forward with the next tokens of the running answers, 0 to
        read a piece on its own: it may be larger, or times have to be measured.

        Args:
            spent, read: see `piece`.
            room: how many tokens fit.
        """
        if room < LEAST_BESIDE or not self._answer or not self._token or self._run >= BESIDE_RUN:
            return 0
        time = SHARE * self._answer - spent
        if time / self._token > max(room, LEAST):
            return 0
        each = self._token if self._beside is None else self._beside
        fitting = int(time / each) if each else room
        return min(self.most - read, room, max(LEAST, fitting))

    def piece(self, spent: float, read: int, answers: int) -> int:
        """Returns how many tokens the next piece of a prompt may have, 0 to end reading in this step.

        Args:
            spent: seconds for which this step has read prompts.
            read: number of tokens that it has read.
            answers: number of running answers.
        """
        left = self.most - read
        if not answers or self._answer is None or left <= 0:
            return max(left, 0)
        time = SHARE * self._answer - spent
        if read and time <= 0:
            return 0
        fitting = left if not self._token else int(time / self._token)
        if read and fitting < LEAST:
            return 0
        return min(left, max(LEAST, fitting))


def _mean(before: float | None, new: float) -> float:
    """A mean in which older measurements count less and less."""
    return new if before is None else before + NEW * (new - before)
