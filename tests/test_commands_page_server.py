"""The page's server closes connections that only wait."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import socket, time, urllib.request
import gradio
from chatglm.commands.page_server import limit_connections

limit_connections(most=8, header_seconds=0.5)
with gradio.Blocks() as page:
    gradio.Markdown("x")
_, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
host, port = "127.0.0.1", int(address.rstrip("/").rsplit(":", 1)[1])

def connect(sent=b""):
    made = socket.create_connection((host, port), timeout=20)
    made.sendall(sent)
    return made

def ending(one):
    began = time.monotonic()
    try:
        while (data := one.recv(65536)) and b"408" not in data:
            pass
    except ConnectionResetError:
        data = b""
    return data, time.monotonic() - began

silent, half = connect(), connect(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n")
assert ending(silent)[0] == b"" and ending(half)[0].startswith(b"HTTP/1.1 408")
crowd = [connect() for _ in range(60)]
began = time.monotonic()
assert urllib.request.urlopen(address, timeout=20).status == 200
assert time.monotonic() - began < 10
assert len(page.server.server_state.connections) <= 9
for one in crowd:
    one.close()
print("fine")
page.close(verbose=False)
"""


@pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs gradio")
def test_connections_that_only_wait_are_closed() -> None:
    """In a process of its own: gradio leaves event loops open."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, timeout=300, encoding="utf-8"
    )
    assert "fine" in done.stdout, done.stderr
