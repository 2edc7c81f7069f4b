"""Chat about pictures with VisualGLM in the terminal; with --image FILE and -p TEXT, answer once."""

from __future__ import annotations

import argparse
import io
import os
import sys

from ..demo import is_demo
from ..front.arguments import (
    LibraryError,
    add_generation_arguments,
    add_model_arguments,
    generation_settings,
    load_from_arguments,
)
from ..front.messages import TERMINAL
from ..front.session import Session
from ..language import LANGUAGES, choose_language
from ..program import complain, run
from .vision_model import vision_model


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status: 0, 1 if something failed, 2 for wrong arguments (SystemExit), 130 after Ctrl-C."""
    return run(lambda: _main(arguments, prog))


def _main(arguments: list[str] | None, prog: str | None) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    parser.add_argument("--image", metavar="FILE", help="the picture; without -p, the conversation begins with it")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this about --image, and exit")
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from http and https addresses, too")
    parser.add_argument("--english", action="store_true", help="the prompt of the original's English demo (Q: and A:)")
    parser.add_argument("--no-stream", action="store_true", help="print an answer once it is complete")
    parser.add_argument("--lang", choices=LANGUAGES, default=choose_language(), help="language of the messages")
    args = parser.parse_args(arguments)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # Terminal.answer refuses what is no text
    try:
        model, tokenizer = vision_model(args, load_from_arguments)
        from ..front.vision.terminal import PictureTerminal
    except (OSError, ValueError, RuntimeError, LibraryError) as error:
        complain(TERMINAL["error"][args.lang].format(reason=error))
        return 1
    settings = generation_settings(args) | ({"english": True} if args.english else {})
    terminal = PictureTerminal(model, tokenizer, Session(tokenizer.chat_format), settings, args.lang)
    terminal.stream, terminal.allow_urls = not args.no_stream, args.allow_urls
    terminal.interactive = terminal.interactive and args.prompt is None
    if is_demo(model.name_or_path):
        command = prog or f"python {os.path.basename(sys.argv[0])}"
        terminal.say("demo_vision", millions=round(model.num_parameters() / 1e6), command=command)
    if args.prompt is not None:
        if terminal.show(args.image or ""):
            terminal.answer(args.prompt, "user")
        return int(terminal.failed)
    if terminal.interactive:
        terminal.say("welcome_vision")
    terminal.chat(args.image)
    if terminal.interactive:
        terminal.say("bye")
        return 0
    return int(terminal.failed)
