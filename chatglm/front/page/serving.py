"""Serves a page of gradio until it is interrupted."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import gradio as gr

from . import log
from .responses import middleware
from .style import theme

#: What a form with an uploaded file has beside the file.
FORM_BYTES = 2**16


def serve(
    blocks: gr.Blocks,
    title: str,
    threads: int,
    *,
    at_end: Callable[[], None] = lambda: None,
    upload_bytes: int = 0,
    **kwargs: Any,
) -> None:
    """Launches the page and waits for Ctrl-C.

    Features with which visitors could fill the disk are off.

    Args:
        threads: for visitors' requests, all at once.
        at_end: is called before the page closes.
        upload_bytes: maximum size of a file that a visitor may send.
        kwargs: for `gr.Blocks.launch`.
    """
    log.keep_brief()
    _wait_until_it_runs()
    limits = (title, upload_bytes + FORM_BYTES) if upload_bytes else (title,)
    with contextlib.suppress(KeyboardInterrupt):
        blocks.launch(
            prevent_thread_lock=True,
            theme=theme(),
            max_threads=threads,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            _frontend=False,  # no request of its own that has to be answered within three seconds
            max_file_size=upload_bytes or 1,
            app_kwargs={"middleware": middleware(*limits)},
            **kwargs,
        )
        while blocks.is_running:
            time.sleep(0.1)
    at_end()
    server = getattr(blocks, "server", None)  # there is none if it was interrupted early
    if server is not None:
        server.config.timeout_graceful_shutdown = 0  # otherwise it waits for open pages
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would log how many there are
    blocks.close(verbose=False)
    gc.freeze()  # gradio and torch have so many objects that a collection at exit takes seconds


def _wait_until_it_runs() -> None:
    """gradio takes a server that has not started within five seconds for one whose port is taken: on a machine that is
    busy, it may take longer. One that cannot start ends its thread."""
    from gradio import http_server

    class Server(http_server.Server):
        def run_in_thread(self) -> None:
            self.thread = threading.Thread(target=self.run, daemon=True)
            self.thread.start()
            while not self.started:
                if not self.thread.is_alive():
                    raise http_server.ServerFailedToStartError("the server did not start: its message says why")
                time.sleep(0.001)

    vars(http_server)["Server"] = Server
