"""cli_demo.py or web_demo.py with a scripted ChatGLM3: `python tests/scripted_doors.py chat|web ARGUMENTS...`.

Each question has its answer in `ANSWERS`; what is not there is repeated.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # by such a name it is one of our programs, which wait for torch only if they need it
    sys.argv[0] = str(Path(__file__).resolve().parents[1] / {"chat": "cli_demo.py", "web": "web_demo.py"}[sys.argv[1]])

from chatglm.commands import chat, web
from chatglm.conversation import chat_format
from chatglm.conversation.history import has_tools

FORMAT = chat_format(3)
PLOT = """interpreter
```python
import base64
from IPython.display import Image, display
display(Image(base64.b64decode(
    'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')))
open('made.txt', 'w').write('made here')
print(6 * 7)
```"""
ANSWERS = {
    "What is 6 * 7?": "calculate\n```python\ntool_call(expression='6*7')\n```",
    "42": "\nIt is 42.",
    "Write it down": "write_note\n```python\ntool_call(text='hello')\n```",
    "written HELLO": "\nDone.",
    "The user did not allow this call.": "\nAs you wish.",
    "Plot it": "\nI draw.<|assistant|>" + PLOT,
    "```result\n[Image]\n42\n```": "\nHere is the picture.",
    "Loop": "interpreter\n```python\nwhile True: pass\n```",
    "Print 5": "interpreter\n```python\nprint(5)\n```",
    "```result\n6\n```": "\nSix.",
    "```result\n5\n```": "\nFive.",
}


def steps(query: str, history: list[Any], role: str, cancel: threading.Event) -> Iterator[Any]:
    raw = ANSWERS.get(query, f"\n[{role}] {query}")
    parts = raw.split("<|assistant|>")
    text = "\n".join(parts).strip()
    for end in range(1, len(text), 7):
        partial = [{"role": "assistant", "metadata": "", "content": text[:end]}]
        yield _step(text[:end], text[max(0, end - 7) : end], None, text[:end], [*history, *partial], end)
        if cancel.is_set():
            break
    answer = FORMAT.parse(raw, has_tools(history))
    turn = [{"role": role, "content": query}, *answer.messages]
    yield _step(text, text, "cancelled" if cancel.is_set() else "stop", answer.content, [*history, *turn], len(text))


def _step(text: str, delta: str, reason: str | None, response: Any, history: list[Any], count: int) -> Any:
    return SimpleNamespace(
        text=text, delta=delta, finish_reason=reason, response=response, history=history, completion_tokens=count,
        seconds=0.5,
    )  # fmt: skip


class Model:
    name_or_path = "/nowhere"
    adapter_names: tuple[str, ...] = ()

    def stream_steps(
        self, tokenizer: Any, query: str, history: list[Any], *, role: str, cancel: threading.Event, **settings: Any
    ) -> Iterator[Any]:
        yield from steps(query, history, role, cancel)


class Engine:
    max_batch, max_queue = 4, 4

    def __init__(self, *arguments: Any, **sizes: Any) -> None:
        pass

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def chat_in_queue(
        self, query: str, history: list[Any], *, role: str, cancel: threading.Event, **settings: Any
    ) -> Iterator[Any]:
        yield from steps(query, history, role, cancel)


if __name__ == "__main__":
    door = {"chat": chat, "web": web}[sys.argv.pop(1)]
    vars(door)["load_from_arguments"] = lambda args: (Model(), SimpleNamespace(chat_format=FORMAT))
    if door is web:
        from chatglm.serving import chat_engine

        chat_engine.ChatEngine = Engine  # type: ignore[assignment,misc]
    sys.exit(door.main())
