"""Which generation a checkpoint is: everything that it says about that is weighed here, and nowhere else.

ChatGLM2-6B and ChatGLM3-6B have the same network and the same vocabulary, but different prompts. So their names decide;
where a fine-tuned model has lost its name, templates, code and a few values of config.json are all that is left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from . import file_names
from .clues import GLM4, VISUAL, Clue, Rank, gather, known_generation, own_and_nearby, read_values

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the evidence comes to.

    Args:
        clues: the most important first.
        decisive: the clue that left one generation; None if none did, and the default was taken.
        possible: the generations that no clue excludes, apart from hints.
    """

    generation: int
    clues: tuple[Clue, ...]
    decisive: Clue | None
    possible: frozenset[int]

    @property
    def is_guess(self) -> bool:
        return self.decisive is None or self.decisive.rank < Rank.FORMAT

    @property
    def against(self) -> tuple[Clue, ...]:
        """The clues that point to other generations, apart from mere hints."""
        return tuple(one for one in self.clues if one.rank >= Rank.FORMAT and self.generation not in one.generations)

    def doubt(self, where: str) -> str | None:
        """A line that says what is doubtful; None if nothing is. A stated version settles what names say."""
        settled = self.decisive is not None and self.decisive.rank >= Rank.STATED
        against = [one for one in self.against if not settled or one.rank >= Rank.STRUCTURE]
        if not against and not self.is_guess:
            return None
        reason = self.decisive.text if self.decisive else "nothing in it tells more"
        other = min((against[0].generations if against else self.possible) - {self.generation, GLM4, VISUAL}, default=2)
        but = f"although there is {against[0].text}" if against else "a guess"
        return (
            f"{where}: taken for a ChatGLM of generation {self.generation} ({reason}), {but}. If it is of another, "
            f'give chatglm_version={other}, or write "chatglm_version": {other} into {file_names.CONFIG}'
        )


def settle(
    path: str | os.PathLike[str] | None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    given: Any = None,
) -> int:
    """The generation of a checkpoint; logs one line if that is a guess or the evidence contradicts itself.

    Args and errors: see `weigh`.
    """
    verdict = weigh(path, config, tokenizer, given)
    doubt = verdict.doubt("this config" if path is None else os.fspath(path))
    if doubt:
        logger.warning_once(doubt)
    return verdict.generation


def weigh(
    path: str | os.PathLike[str] | None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    given: Any = None,
) -> Verdict:
    """Weighs all that is known of a checkpoint. Nothing is loaded, and no code is run.

    Args:
        path: its folder, its vocabulary file, or its hub id; None if there is only a config.
        config: the values of its config.json; None: those in the folder.
        tokenizer: the same of its tokenizer_config.json.
        given: `chatglm_version` as the caller gave it; nothing else counts then.

    Raises:
        ValueError: `chatglm_version` names no known generation.
    """
    if given is not None:
        clue = Clue(Rank.GIVEN, frozenset((known_generation(given),)), "argument", "chatglm_version", given)
        return Verdict(known_generation(given), (clue,), clue, clue.generations)
    place = None if path is None else Path(path).expanduser()
    if place is not None:
        folder = place.parent if place.is_file() else place
        config = read_values(folder / file_names.CONFIG) if config is None else config
        tokenizer = read_values(folder / file_names.TOKENIZER_CONFIG) if tokenizer is None else tokenizer
    clues = tuple(gather(place, config or {}, tokenizer or {}))
    possible, decisive = frozenset(file_names.VOCABULARIES) - {GLM4, VISUAL}, None
    for one in (GLM4, VISUAL):  # nothing is taken for one of these by exclusion
        if any(clue.generations == {one} for clue in clues):
            possible |= {one}
    left = possible
    for clue in clues:
        fitting = left & clue.generations
        if fitting and len(fitting) < len(left):
            left, decisive = fitting, clue if len(fitting) == 1 else None
        if clue.rank >= Rank.FORMAT:
            possible = left
        if len(left) == 1:
            break
    return Verdict(3 if 3 in left else min(left), clues, decisive, possible)


def names_of(config: Mapping[str, Any], path: str | os.PathLike[str] | None) -> list[str]:
    """The names that a checkpoint goes by, most trustworthy first: those in its config, then that of its folder."""
    inside = [config.get(key) for key in ("_name_or_path", "name_or_path")]
    place = None if path is None else Path(path)
    own = [] if place is None else [own_and_nearby((place.absolute() if place.exists() else place).parts)[0]]
    return [*(str(name) for name in inside if name), *own]
