"""Keeps clients from filling the log: gradio prints all of the input of every request that fails."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import Any

SECONDS_APART = 1.0
MOST_CHARACTERS = 500  # of an error's message

logger = logging.getLogger(__name__)


class BriefTraceback:
    """Stands for the module `traceback` in gradio: logs errors without their inputs, and not more than one a second."""

    def __init__(self) -> None:
        self.last, self.left_out = -SECONDS_APART, 0

    def print_exc(self) -> None:
        error, now = sys.exc_info()[1], time.monotonic()
        if error is None:
            return
        if now - self.last < SECONDS_APART:
            self.left_out += 1
            return
        frames = "".join(traceback.format_tb(error.__traceback__))
        name, message = type(error).__name__, str(error)[:MOST_CHARACTERS]
        logger.error("a request failed (%d more since the last):\n%s%s: %s", self.left_out, frames, name, message)
        self.last, self.left_out = now, 0


def keep_brief() -> None:
    """Makes gradio log errors in this way."""
    from gradio import queueing, route_utils, routes  # takes seconds

    brief: Any = BriefTraceback()
    for module in (queueing, route_utils, routes):
        vars(module)["traceback"] = brief
