"""One round of the game: what was asked, found and revealed. No input, no output."""

from __future__ import annotations

from dataclasses import dataclass, field

from .puzzles import Puzzle
from .referee import Judgement, Referee

#: Questions that cost nothing, and what the others and hints cost.
FREE_QUESTIONS, QUESTION, HINT = 10, 2, 10
FULL, LEAST = 100, 10


@dataclass
class Round:
    """A puzzle in play.

    `asking` until it is `solved` (all keys found) or `revealed`. The bottom is in `puzzle`; nothing else here gives it
    away before the end.
    """

    puzzle: Puzzle
    state: str = "asking"
    asked: list[tuple[str, Judgement]] = field(default_factory=list)
    hints_used: int = 0
    found: set[str] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether the bottom may be shown."""
        return self.state != "asking"

    @property
    def score(self) -> int:
        """100 less 2 for each question beyond 10 and 10 for each hint, but not below 10; 0 once it was revealed."""
        if self.state == "revealed":
            return 0
        beyond = max(0, len(self.asked) - FREE_QUESTIONS)
        return max(LEAST, FULL - QUESTION * beyond - HINT * self.hints_used)

    def ask(self, referee: Referee, line: str) -> tuple[Judgement, list[str]]:
        """Judges a line; returns the judgement and the facts that are newly found.

        A line that cannot be judged costs nothing: RefereeError passes, and the round is as before. ValueError if it
        is over.
        """
        if self.over:
            raise ValueError("the round is over")
        judgement = referee.judge(self.puzzle, line)
        new = [key for key in self.puzzle.keys if key.id in judgement.keys and key.id not in self.found]
        self.asked.append((line, judgement))
        self.found |= {key.id for key in new}
        if len(self.found) == len(self.puzzle.keys):
            self.state = "solved"
        return judgement, [key.fact for key in new]

    def hint(self) -> str | None:
        """The next hint, or None if there is none left."""
        if self.over or self.hints_used >= len(self.puzzle.hints):
            return None
        self.hints_used += 1
        return self.puzzle.hints[self.hints_used - 1]

    def reveal(self) -> None:
        """Ends the round without a solution."""
        if not self.over:
            self.state = "revealed"
