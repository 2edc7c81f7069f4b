"""The page about pictures with answers that need no model: what the picture is like, and what was asked before.

The answer to "forever" grows until it is stopped.
"""

from __future__ import annotations

import argparse
import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from chatglm.front.page import running
from chatglm.front.vision.page import PicturePage
from chatglm.pictures import read_picture


def answer(question: str, history: list[Any], settings: dict[str, Any], cancel: threading.Event) -> Iterator[Any]:
    picture = settings["image"]
    seen = "nothing" if picture is None else "x".join(map(str, read_picture(picture).size))
    text = f"{question} | {seen} | {len(history)} before"
    growing = iter([text[: len(text) // 2]])
    if question == "forever":
        counts = itertools.takewhile(lambda _: not cancel.wait(0.01), itertools.count())
        growing = (f"forever {count}" for count in counts)
    for said, reason in itertools.chain(((said, None) for said in growing), [(text, "stop")]):
        yield SimpleNamespace(
            text=said, finish_reason=reason, history=[*history, (question, text)], completion_tokens=3, seconds=1.0
        )


if __name__ == "__main__":
    running.WAIT = 600.0  # for a slow browser on a busy machine
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    PicturePage(answer, "VisualGLM", (4096, 2048, 0.4, 0.8)).launch(
        server_name="127.0.0.1", server_port=parser.parse_args().port
    )
