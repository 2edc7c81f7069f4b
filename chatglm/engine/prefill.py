"""How much of the waiting prompts a step reads, so that running answers do not stall."""

from __future__ import annotations

#: Maximum number of prompt tokens that a step reads.
PREFILL_TOKENS = 512
#: A step may read prompts for this many times as long as it needs for the next tokens of the running answers.
SHARE = 1.25
#: Fewer tokens are never read at once: they would take nearly as long, because all weights are read for them.
LEAST = 16


class PrefillPace:
    """Measures how long prompts and answers take, and chooses the size of the next piece of a prompt.

    Args:
        most: maximum number of prompt tokens that a step reads.
    """

    def __init__(self, most: int = PREFILL_TOKENS) -> None:
        self.most = most
        self._answer: float | None = None  # seconds of a step's answers
        self._token: float | None = None  # seconds of a prompt's token in the last piece

    def answered(self, seconds: float) -> None:
        """Notes how long the next tokens of all running answers took."""
        self._answer = seconds if self._answer is None else self._answer + 0.3 * (seconds - self._answer)

    def read(self, tokens: int, seconds: float) -> None:
        """Notes how long a piece of a prompt took."""
        self._token = seconds / tokens

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
