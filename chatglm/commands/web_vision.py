"""Chat about pictures with VisualGLM in the browser: open the address that this prints."""

from __future__ import annotations

import argparse

from ..demo import is_demo
from ..front.arguments import (
    LibraryError,
    add_generation_arguments,
    add_model_arguments,
    check_address,
    generation_settings,
    importing_libraries,
    load_from_arguments,
    require,
)
from ..front.messages import TERMINAL
from ..program import complain, run
from .vision_model import vision_model
from .web import add_page_arguments, read_users


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is interrupted. Returns the exit status, 1 if the model or the address is not available."""
    return run(lambda: _main(arguments, prog), prints=False)


def _main(arguments: list[str] | None, prog: str | None) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__)
    add_model_arguments(parser, "web")
    add_generation_arguments(parser)
    add_page_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        users = read_users(args.auth or [])
        require("web", args.lang)
        check_address(args.host, args.port)
        model, tokenizer = vision_model(args, load_from_arguments)
        with importing_libraries(args.lang):
            from ..front.vision.page import PicturePage
            from ..serving.chat_engine import ChatEngine
            from .page_server import limit_connections

            limit_connections()
        with ChatEngine(model, tokenizer, max_batch=args.max_batch) as engine:
            page = PicturePage(
                lambda question, history, settings, cancel: engine.chat_in_queue(
                    question, history, cancel=cancel, **settings
                ),
                tokenizer.chat_format.name,
                tokenizer.chat_format.sliders,
                generation_settings(args),
                round(model.num_parameters() / 1e6) if is_demo(model.name_or_path) else None,
                at_once=engine.max_batch + engine.max_queue,
            )
            page.launch(
                server_name=args.host, server_port=args.port, share=args.share, inbrowser=args.open, auth=users or None
            )
    except (OSError, ValueError, LibraryError) as error:
        complain(TERMINAL["error"][args.lang].format(reason=error))
        return 1
    return 0
