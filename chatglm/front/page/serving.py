"""Serves a page of gradio until it is interrupted."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import gradio as gr

from . import log
from .responses import middleware
from .style import theme


def serve(
    blocks: gr.Blocks, title: str, threads: int, *, at_end: Callable[[], None] = lambda: None, **kwargs: Any
) -> None:
    """Launches the page and waits for Ctrl-C.

    Features with which visitors could fill the disk are off.

    Args:
        threads: for visitors' requests, all at once.
        at_end: is called before the page closes.
        kwargs: for `gr.Blocks.launch`.
    """
    log.keep_brief()
    blocks.launch(
        prevent_thread_lock=True,
        theme=theme(),
        max_threads=threads,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size=1,
        app_kwargs={"middleware": middleware(title)},
        **kwargs,
    )
    with contextlib.suppress(KeyboardInterrupt):
        while blocks.is_running:
            time.sleep(0.1)
    at_end()
    server = blocks.server
    if server is not None:
        server.config.timeout_graceful_shutdown = 0  # otherwise it waits for open pages
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would log how many there are
    blocks.close(verbose=False)
    gc.freeze()  # gradio and torch have so many objects that a collection at exit takes seconds
