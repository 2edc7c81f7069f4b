"""Logits processors that let a test choose what a model answers, and when."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import LogitsProcessor

from chatglm.conversation import stop_token_ids

SECONDS = 300  # nothing takes this long: a test that waits longer has found a fault


class Say(LogitsProcessor):
    """Makes the model answer one request with this text; `<|assistant|>` in it begins a second message."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.ids: list[int] = []
        for number, part in enumerate(text.split("<|assistant|>")):
            self.ids += [tokenizer.get_command("<|assistant|>")] if number else []
            self.ids += tokenizer.encode_text(part)
        self.ids.append(stop_token_ids(tokenizer)[0])
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.prompt_tokens is None:
            self.prompt_tokens = input_ids.shape[1]
        only = torch.full_like(scores, -100.0)
        only[:, self.ids[input_ids.shape[1] - self.prompt_tokens]] = 0.0
        return only


class Hold(LogitsProcessor):
    """Signals that its request has begun, and blocks the whole engine until it may continue.

    Args:
        after: so many tokens of the answer come before.
    """

    def __init__(self, after: int = 0) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._before = after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._before -= 1
        if self._before < 0:
            self.begun.set()
            assert self.go_on.wait(SECONDS)
        return scores
