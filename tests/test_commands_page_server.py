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
import socket, urllib.request
import gradio
from chatglm.commands.page_server import limit_connections

limit_connections(most=8, header_seconds=0.5)
with gradio.Blocks() as page:
    gradio.Markdown("x")
_, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
host, port = "127.0.0.1", int(address.rstrip("/").rsplit(":", 1)[1])

def connect(sent=b""):
    made = socket.create_connection((host, port), timeout=300)
    made.sendall(sent)
    return made

def ending(one):
    try:
        while (data := one.recv(65536)) and b"408" not in data:
            pass
    except ConnectionResetError:
        data = b""
    return data

silent, half = connect(), connect(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n")
assert ending(silent) == b"" and ending(half).startswith(b"HTTP/1.1 408")
crowd = [connect() for _ in range(60)]
assert urllib.request.urlopen(address, timeout=300).status == 200
assert len(page.server.server_state.connections) <= 9
for one in crowd:
    one.close()
print("fine")
page.close(verbose=False)
"""

SLOW_MACHINE = """
import itertools, threading, time, urllib.request
from types import SimpleNamespace
import gradio
from gradio import http_server, networking
from chatglm.front.page.serving import serve

http_server.time = SimpleNamespace(time=itertools.count(0, 60).__next__, sleep=time.sleep)  # a minute at each look
networking.url_ok = lambda url: False  # no answer in three seconds
with gradio.Blocks() as page:
    gradio.Markdown("x")
launch = page.launch

def launched(**options):
    _, address, _ = launch(**options)
    assert urllib.request.urlopen(address, timeout=300).status == 200
    print("fine")
    page.is_running = False

page.launch = launched
serve(page, "x", 4, quiet=True)
"""
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs gradio")


def test_connections_that_only_wait_are_closed() -> None:
    """In a process of its own: gradio leaves event loops open."""
    run(SCRIPT)


def test_a_slow_machine_is_not_taken_for_a_port_that_is_taken() -> None:
    run(SLOW_MACHINE)


def run(script: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, timeout=600, encoding="utf-8"
    )
    assert "fine" in done.stdout, done.stderr
