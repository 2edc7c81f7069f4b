"""Ports for programs that have to be told one."""

from __future__ import annotations

import random
import socket

_RANDOM = random.SystemRandom()  # other than in the processes beside this one, whatever seeds they have


def free_port() -> int:
    """A port of 127.0.0.1 that is free, and still will be when a program has started and binds it.

    So it is none of those that systems give to connections and to whoever binds port 0 (on Linux from 32,768 on):
    another test would get it in the seconds between.
    """
    while True:
        port = _RANDOM.randrange(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
