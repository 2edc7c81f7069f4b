"""Chat with a ChatGLM in the terminal: `python cli_demo.py`, or `python cli_demo.py -p "你好"` for one answer."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from chatglm.demo import is_demo
from chatglm.front.arguments import (
    add_generation_arguments,
    add_model_arguments,
    generation_settings,
    load_from_arguments,
    read_tools,
)
from chatglm.front.messages import TERMINAL
from chatglm.front.session import Session
from chatglm.front.terminal import Terminal
from chatglm.language import LANGUAGES, choose_language


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if something failed, 2 for wrong arguments (SystemExit), 130 after Ctrl-C."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the answers is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the interpreter complains at exit
        return 1


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and exit; - reads it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (ChatGLM3)")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools that the model may call (ChatGLM3)")
    parser.add_argument("--no-stream", action="store_true", help="print an answer once it is complete")
    parser.add_argument("--lang", choices=LANGUAGES, default=choose_language(), help="language of the messages")
    args = parser.parse_args(arguments)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        stream.reconfigure(errors=errors)  # type: ignore[union-attr]  # no odd input or old console may crash us
    try:
        tools = read_tools(args.tools) if args.tools else None
        model, tokenizer = load_from_arguments(args)
        session = Session(tokenizer.chat_format, args.system, tools)
        terminal = Terminal(model, tokenizer, session, generation_settings(args), args.lang)
    except (OSError, ValueError, RuntimeError) as error:
        print(TERMINAL["error"][args.lang].format(reason=error), file=sys.stderr)
        return 1
    terminal.stream = not args.no_stream
    if is_demo(model.name_or_path):
        terminal.say("demo", millions=round(model.num_parameters() / 1e6))
    if args.prompt is not None:
        terminal.interactive = False
        terminal.answer(sys.stdin.read().strip("\r\n") if args.prompt == "-" else args.prompt, "user")
        return int(terminal.failed)
    if terminal.interactive:
        with contextlib.suppress(ImportError):  # Windows has none; importing it gives input() editing and a history
            import readline  # noqa: F401
        terminal.say("welcome")
    terminal.chat()
    if terminal.interactive:
        terminal.say("bye")
        return 0
    return int(terminal.failed)


if __name__ == "__main__":
    sys.exit(main())
