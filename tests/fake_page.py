"""web_demo.py with a model that answers at once and predictably: `python tests/fake_page.py VERSION ARGUMENTS...`."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # by this name it is one of our programs, which wait for torch only if they need it
    sys.argv[0] = str(Path(__file__).resolve().parents[1] / "web_demo.py")

from chatglm.commands import web
from chatglm.conversation import chat_format
from chatglm.engine import Waiting
from chatglm.front.page import running
from chatglm.serving import chat_engine

ANSWERS = {
    "links": (
        "[one](https://a.test/?b=1&copy=2), <https://b.test/?c=3&lt=4>, [two](<https://c.test/d e?f=5&g=6>) and "
        "https://d.test/?h=7&i=8 [no](<javascript:window.pwned=8>) a < b && c <b> d"
    ),
    "mathematics": (
        "$$\\begin{aligned} a &= b < c \\\\ &= d \\end{aligned}$$\n\n"
        "\\begin{align} x &= 1 \\\\ y &= 2 \\end{align}\n\n"
        "\\[\\begin{gathered} p \\\\ q \\end{gathered}\\]\n\n"
        "So \\(\\boxed{42}\\) and $$\\sum_{i=1}^n i$$ and \\[ \\frac{1} \\]"
    ),
    "tables": "- [x] bought\n- [ ] sold\n- plain\n\n| l | c | r |\n| :-- | :-: | --: |\n| 1 | 2 | 3 |\n",
    "diagram": "```mermaid\ngraph TD\n  A[one] --> B{two<br>lines}\n```\nThat is it.",
    "bomb": "```mermaid\ngraph TD\n  A[one --> B{<img src=x onerror='window.pwned=9'>\n```\nThat is it.",
    "formula": "The root is $\\sqrt{2}$ and\n$$\\frac{a_1}{b^2} = c$$\nas \\(x*y*z\\) shows.",
    "code": "Here:\n\n```python\nfor i in range(3):\n\n    print(i < 2)\n```\n",
    "colours": (
        "```python\n@cache\nclass A(B):  # why\n"
        "    def f(self):\n        return f'{x} y' if len(self.z) > 31 else None\n"
        "```\n```json\n{\"a\": [1, true, null, \"b\"]}\n```\nand `code`\n"
    ),
    "evil": (
        "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> ![p](http://evil.test/a.png) "
        "[j](javascript:window.pwned=3) $\\text{<img src=x onerror='window.pwned=4'>}$ &lt;b&gt; "
        "<svg onload='window.pwned = 5'> <style>body { display: none }</style> <a href='//evil.test'>a</a> **bold**"
    ),
}


class FakeEngine:
    """Answers with its settings, its history or a text above, or repeats the question.

    "forever" never ends, "silent" says nothing for as long, "half" fails in the middle, and "queued" waits in the queue
    until it is stopped.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_batch: int) -> None:
        self.max_batch, self.max_queue = max_batch, 64
        self.has_roles = tokenizer.chat_format.has_roles
        self.active = 0
        self.attempts = itertools.count(1)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def chat_in_queue(
        self, query: str, history: list[Any], *, role: str, cancel: threading.Event, **settings: Any
    ) -> Iterator[Any]:
        if query == "boom":
            raise ValueError("the question does <b>not</b> fit")
        if query == "bug":
            raise RuntimeError("secret detail")
        self.active += 1
        try:
            text, count = "", 0
            if query == "queued":
                yield Waiting(2)
                cancel.wait()
            for count, piece in enumerate(self._pieces(query, history, role, cancel, settings), 1):
                text += piece
                yield self._step(text, None, count, history)
                if cancel.is_set():
                    break
            metadata = "get_<i>weather</i>" if query == "call" else ""
            turn: list[Any] = [(query, text)]
            if self.has_roles:
                answer = {"role": "assistant", "metadata": metadata, "content": text}
                turn = [{"role": role, "content": query}, answer]
            yield self._step(text, "cancelled" if cancel.is_set() else "stop", count + 1, [*history, *turn])
        finally:
            self.active -= 1

    def _pieces(
        self, query: str, history: list[Any], role: str, cancel: threading.Event, settings: dict[str, Any]
    ) -> Iterator[str]:
        if query == "forever":
            for number in itertools.count():
                yield f"{number} "
                cancel.wait(0.01)
        elif query == "silent":
            cancel.wait()
        elif query == "half":
            yield "```python\nhalf"
            raise ValueError("it <b>broke</b>")
        elif query == "settings":
            yield json.dumps(settings, sort_keys=True)
        elif query == "queued":
            yield from ()
        elif query == "history":
            yield f"```json\n{json.dumps(history, ensure_ascii=False)}\n```"
        elif query == "active":
            yield f"active: {self.active - 1}"
        elif query == "attempt":
            yield f"attempt: {next(self.attempts)}"
        elif query == "call":
            yield "```python\ntool_call(city='北京')\n```"
        elif query in ANSWERS:
            yield from ANSWERS[query]
        else:
            yield from f"[{role}] {query}"

    @staticmethod
    def _step(text: str, reason: str | None, count: int, history: list[Any]) -> Any:
        return SimpleNamespace(text=text, finish_reason=reason, completion_tokens=count, seconds=0.5, history=history)


if __name__ == "__main__":
    running.WAIT = 600.0  # for a slow browser on a busy machine
    model = SimpleNamespace(name_or_path="/nowhere", adapter_names=["law", "poems"])
    fakes = model, SimpleNamespace(chat_format=chat_format(int(sys.argv.pop(1))))
    web.load_from_arguments = lambda args: fakes
    chat_engine.ChatEngine = FakeEngine  # type: ignore[assignment,misc]
    sys.exit(web.main())
