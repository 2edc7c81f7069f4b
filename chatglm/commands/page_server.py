"""Gives the page's server, which gradio starts, the limits of the API's: connections, time for a head, lines of log."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from ..serving.connections import ACCEPTED, HEADER_SECONDS, Connection, Limits, affordable_connections
from ..serving.logs import limit_lines


def limit_connections(most: int | None = None, header_seconds: float = HEADER_SECONDS) -> None:
    """Makes the servers that gradio starts from now on close connections that only wait, and log a bounded number of
    lines about them.

    Args:
        most: connections at once; by default as many as `affordable_connections` allows.
        header_seconds: time for the head of a request.
    """
    import uvicorn
    from gradio import http_server  # takes seconds

    limits = Limits(affordable_connections() if most is None else most, header_seconds)
    protocol: Any = partial(Connection, limits)
    # What gradio asks its module `uvicorn` for, with our protocol in it: `launch` has no argument for that.
    vars(http_server)["uvicorn"] = SimpleNamespace(Config=partial(uvicorn.Config, http=protocol, backlog=ACCEPTED))
    limit_lines(("asyncio", "uvicorn.error"))
