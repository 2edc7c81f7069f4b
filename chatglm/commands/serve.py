"""Serve a ChatGLM over HTTP: OpenAI's routes under /v1, those of the original api.py at /.

Clients see each --adapter as a model of its own, by its name; the first one answers requests that name no model.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..demo import is_demo
from ..front.arguments import (
    LibraryError,
    adapter_names,
    add_model_arguments,
    check_address,
    importing_libraries,
    load_from_arguments,
    port_number,
    require,
)
from ..language import choose_language
from ..program import complain, run

if TYPE_CHECKING:
    from ..serving.chat_engine import ChatEngine


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is stopped. Returns the exit status: 0, or 1 if the model or the address is not available."""
    return run(lambda: _main(arguments, prog), prints=False)


def _main(arguments: list[str] | None, prog: str | None) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__)
    add_model_arguments(parser, "api")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    group.add_argument("--port", type=port_number, default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--api-key", metavar="KEY", help="key that all clients send (default: $CHATGLM_API_KEY)")
    group.add_argument("--api-key-file", metavar="FILE", type=Path, help="a client's name and key on each line")
    group.add_argument("--name", action="append", metavar="NAME", help="the model's name for clients; may be repeated")
    group.add_argument("--max-batch", type=int, default=16, metavar="N", help="answers at once (default: %(default)s)")
    group.add_argument("--max-queue", type=int, default=64, metavar="N", help="requests waiting (default: %(default)s)")
    group.add_argument("--cache-tokens", type=int, metavar="N", help="in all KV caches (default: by free memory)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of an answer (default: %(default)s)")
    group.add_argument("--grace", type=float, default=6.0, metavar="S", help="for answers at shutdown (default: 6)")
    group.add_argument("--cors-origin", action="append", default=[], metavar="URL", help="web pages that may use us")
    group.add_argument("--log-text", action="store_true", help="also log what users ask")
    args = parser.parse_args(arguments)
    language = choose_language()
    try:
        require("api", language)
        check_address(args.host, args.port)
        with importing_libraries(language):
            from .. import load as _  # noqa: F401  # registers the generations
            from ..loading import find_folder
            from ..serving.app import Server, create_app
            from ..serving.chat_engine import ChatEngine
            from ..serving.clients import read_keys
            from ..serving.logs import PrintableFormatter
    except (ValueError, LibraryError) as error:
        complain(str(error))
        return 1
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    failures: list[BaseException] = []

    def load() -> ChatEngine:
        model, tokenizer = load_from_arguments(args)
        if is_demo(model.name_or_path):
            logging.getLogger("chatglm").warning("this is only the tiny demo model; --model names a real one")
        engine = ChatEngine(
            model, tokenizer, max_batch=args.max_batch, max_queue=args.max_queue, cache_tokens=args.cache_tokens
        )
        # What is loaded stays: without this, every large request makes the collector look at all of it, for 0.3 s.
        gc.collect()
        gc.freeze()
        return engine

    def fail(error: BaseException) -> None:
        failures.append(error)
        if not isinstance(error, (OSError, ValueError, LibraryError)):  # those say what is wrong in one line
            logging.getLogger("chatglm").error("the model could not be loaded", exc_info=error)
        server.should_exit = True

    source = args.model or os.environ.get("CHATGLM_MODEL") or str(find_folder())
    try:
        key = args.api_key if args.api_key is not None else os.environ.get("CHATGLM_API_KEY")
        app = create_app(
            load,
            args.name or [Path(source).name],
            api_key=key,
            api_keys=read_keys(args.api_key_file) if args.api_key_file else None,
            cors_origins=args.cors_origin,
            timeout=args.timeout,
            log_text=args.log_text,
            adapters=adapter_names(args),
            on_failure=fail,
        )
    except (OSError, ValueError) as error:  # one name for two things, no key where one is named
        print(error, file=sys.stderr)
        return 1
    server = Server(app, args.host, args.port, args.grace)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn handles them while it runs, and raises them again at its end
    server.run()
    if failures:
        print(failures[0], file=sys.stderr)
    return 1 if failures or not server.started else 0
