"""The page about pictures with answers that need no model: what the picture is like, and what was asked before.

"forever" is answered in halves until it is stopped.
"""

from __future__ import annotations

import argparse
import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from chatglm.front.vision.page import PicturePage
from chatglm.pictures import read_picture


def answer(question: str, history: list[Any], settings: dict[str, Any], cancel: threading.Event) -> Iterator[Any]:
    picture = settings["image"]
    seen = "nothing" if picture is None else "x".join(map(str, read_picture(picture).size))
    text = f"{question} | {seen} | {len(history)} before"
    if question == "forever":
        ends = itertools.takewhile(lambda _: not cancel.wait(0.01), itertools.repeat(len(text) // 2))
    else:
        ends = iter([len(text) // 2])
    for end, reason in itertools.chain(((end, None) for end in ends), [(len(text), "stop")]):
        yield SimpleNamespace(
            text=text[:end], finish_reason=reason, history=[*history, (question, text)], completion_tokens=3,
            seconds=1.0,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    PicturePage(answer, "VisualGLM", (4096, 2048, 0.4, 0.8)).launch(
        server_name="127.0.0.1", server_port=parser.parse_args().port
    )
