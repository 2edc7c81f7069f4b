"""A model of ours that says what a test wrote, token by token, and keeps the prompts that it was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from scripted import Say
from tiny_chat import pair

CONTEXT = 2048  # room for tools and observations


class ScriptedModel:
    """`stream_steps` of a tiny model, whose answers are chosen in their order; the prompts' ids are in `prompts`."""

    def __init__(self, *answers: str, version: int = 3) -> None:
        self.model, self.tokenizer = copy.deepcopy(pair(version))
        self.model.config.max_position_embeddings = CONTEXT
        self.answers = list(answers)
        self.prompts: list[list[int]] = []

    def stream_steps(
        self, tokenizer: Any, query: str, history: Any = None, role: str = "user", **settings: Any
    ) -> Iterator[Any]:
        self.prompts.append(self.model.prepare_turn(tokenizer, query, history, role)[0])
        say = [Say(tokenizer, self.answers.pop(0))]
        yield from self.model.stream_steps(tokenizer, query, history, role, logits_processor=say, **settings)

    @property
    def last_prompt(self) -> str:
        return str(self.tokenizer.decode(self.prompts[-1]))


def call(name: str, arguments: str) -> str:
    """A call as ChatGLM3 writes it: `call("f", "a=1")`."""
    return f"{name}\n```python\ntool_call({arguments})\n```"
