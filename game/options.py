"""The command line of the game, and the referee and puzzles that it asks for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from chatglm.demo import is_demo
from chatglm.front.arguments import add_model_arguments, load_from_arguments

from .keyword_referee import KeywordReferee
from .messages import text
from .puzzles import Puzzle, own_puzzles, read_puzzles
from .referee import Endpoint, ModelReferee, OwnModel, Referee


def parser(prog: str | None, lang: str, *extras: str) -> argparse.ArgumentParser:
    """The arguments that terminal and page share."""
    made = argparse.ArgumentParser(prog, description=text("title", lang))
    add_model_arguments(made, *extras)
    group = made.add_argument_group("game")
    group.add_argument("--puzzles", metavar="FILE", type=Path, help="JSON lines, or CSV: story, solution")
    group.add_argument("--seed", type=int, help="the same seed gives the same order of the puzzles")
    group.add_argument("--api-base", metavar="URL", help="the referee is behind an OpenAI-compatible API, such as "
                       "http://127.0.0.1:8000/v1")  # fmt: skip
    group.add_argument("--api-model", metavar="NAME", help="its name there")
    group.add_argument("--api-key-file", metavar="FILE", type=Path, help="the API key (default: $OPENAI_API_KEY)")
    made.set_defaults(lang=lang)
    return made


def puzzles(args: argparse.Namespace) -> list[Puzzle]:
    """The puzzles to play. Raises OSError or ValueError."""
    return read_puzzles(args.puzzles) if args.puzzles else own_puzzles(args.lang)


def referee(args: argparse.Namespace, to_play: Sequence[Puzzle]) -> tuple[Referee, str]:
    """The referee, and what to tell the player about it. Raises what loading a model raises, OSError or ValueError."""
    lang = args.lang
    if args.api_base:
        if not args.api_model:
            raise ValueError("--api-base needs --api-model NAME")
        key = os.environ.get("OPENAI_API_KEY", "")
        if args.api_key_file:
            key = args.api_key_file.read_text(encoding="utf-8").strip()
        return ModelReferee(Endpoint(args.api_base, args.api_model, key), lang), text("fallible", lang)
    chosen = args.model or os.environ.get("CHATGLM_MODEL")
    if chosen is None or is_demo(chosen):
        if not all(puzzle.questions and all(key.words for key in puzzle.keys) for puzzle in to_play):
            raise ValueError(text("needs_model", lang, path=args.puzzles))
        return KeywordReferee(), text("keywords", lang)
    return ModelReferee(OwnModel(*load_from_arguments(args)), lang), text("fallible", lang)
