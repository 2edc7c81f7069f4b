"""Chat with a ChatGLM in the browser: open the address that this prints."""

from __future__ import annotations

import argparse
import contextlib
import os

from ..demo import is_demo
from ..front.abilities import add_ability_arguments, check_abilities, open_abilities
from ..front.arguments import (
    LibraryError,
    add_generation_arguments,
    add_model_arguments,
    check_address,
    generation_settings,
    importing_libraries,
    load_from_arguments,
    port_number,
    require,
)
from ..front.messages import TERMINAL
from ..language import LANGUAGES, choose_language
from ..program import complain, run

LOCAL = ("127.0.0.1", "localhost", "::1")

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported; else it sends usage data


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is interrupted. Returns the exit status, 1 if the model or the address is not available."""
    return run(lambda: _main(arguments, prog), prints=False)


def _main(arguments: list[str] | None, prog: str | None) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__)
    add_model_arguments(parser, "web")
    add_generation_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt to begin with (ChatGLM3, GLM-4)")
    add_ability_arguments(parser)
    parser.add_argument(
        "--interpreter-i-know", action="store_true", help="--interpreter for visitors from other machines, too"
    )
    parser.add_argument("--mathml", action="store_true", help="formulas as MathML, by mdtex2html; default: KaTeX")
    add_page_arguments(parser)
    args = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        return _serve(args, stack)


def _serve(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    try:
        users = read_users(args.auth or [])
        if args.interpreter and not args.interpreter_i_know and (args.share or args.host not in LOCAL):
            raise ValueError(
                "--interpreter runs code for whoever reaches the page: leave out --share and --host, "
                "or add --interpreter-i-know"
            )
        abilities = open_abilities(args, args.lang, stack)
        require("web", args.lang)
        check_address(args.host, args.port)
        model, tokenizer = load_from_arguments(args)
        check_abilities(abilities, tokenizer.chat_format)
        kernels = None
        if abilities.isolation is not None:
            from ..interpreter import KernelPool

            kernels = stack.enter_context(KernelPool(abilities.isolation))
        with importing_libraries(args.lang):  # after the model: importing gradio takes seconds, and errors come first
            from ..front.page import display
            from ..front.page.page import Page
            from ..serving.chat_engine import ChatEngine
            from .page_server import limit_connections

            if args.mathml:
                display.use_mathml()
            limit_connections()
        with ChatEngine(model, tokenizer, max_batch=args.max_batch) as engine:
            page = Page(
                lambda question, history, settings, cancel: engine.chat_in_queue(
                    question, history, cancel=cancel, **settings
                ),
                tokenizer.chat_format,
                generation_settings(args),
                system=args.system,
                abilities=abilities,
                kernels=kernels,
                adapters=model.adapter_names if args.adapter else (),
                at_once=engine.max_batch + engine.max_queue,
                signed_in=bool(users),
                demo_millions=round(model.num_parameters() / 1e6) if is_demo(model.name_or_path) else None,
            )
            page.launch(
                server_name=args.host, server_port=args.port, share=args.share, inbrowser=args.open, auth=users or None
            )
    except (OSError, ValueError, LibraryError) as error:
        complain(TERMINAL["error"][args.lang].format(reason=error))
        return 1
    return 0


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every page: where it is served, to whom, and for how many at once."""
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", action="append", help="require it; may be repeated (default: $CHATGLM_AUTH)"
    )
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="answers at once (default: %(default)s)")
    parser.add_argument("--share", action="store_true", help="public address through gradio's servers, for a week")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    parser.add_argument("--lang", choices=LANGUAGES, default=choose_language(), help="language of messages here")


def read_users(given: list[str]) -> list[tuple[str, str]]:
    """Returns (user, password) of every --auth. Raises ValueError."""
    users = []
    for text in given or filter(None, [os.environ.get("CHATGLM_AUTH")]):
        user, _, password = text.partition(":")
        if not user or not password:
            raise ValueError("--auth (or CHATGLM_AUTH) must be USER:PASSWORD, with neither of them empty")
        users.append((user, password))
    return users
