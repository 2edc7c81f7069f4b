"""Chooses the next token: processors, sampling, the check for NaN, and stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteriaList

from .options import GenerationOptions
from .steps import FinishReason


class NonFiniteLogitsError(ArithmeticError):
    """The network gave NaN or infinite logits; the message names the first module that did and the usual causes."""


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Forces one token, whatever it is, if scores are NaN or infinite, as the originals did.

    Pass it in `logits_processor` to get this instead of a `NonFiniteLogitsError`.

    Args:
        token_id: 5 in the originals' code up to ChatGLM3, 198 in GLM-4's.
    """

    def __init__(self, token_id: int = 5) -> None:
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isfinite(scores).all():
            return scores
        forced = torch.zeros_like(scores)
        forced[..., self.token_id] = 5e4
        return forced


def find_non_finite(model: PreTrainedModel, inputs: dict[str, Any]) -> str | None:
    """Runs the model on `inputs` and returns the name of the first module whose output is not finite, or None."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def choose(scores: torch.Tensor, do_sample: bool, generator: torch.Generator | None = None) -> torch.Tensor:
    """Chooses the next token of each row of processed scores: (batch, vocabulary) -> (batch, 1)."""
    if do_sample:
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)
    return scores.argmax(-1, keepdim=True)


def check_finite(model: PreTrainedModel, scores: torch.Tensor, ids: torch.Tensor) -> None:
    """Raises NonFiniteLogitsError unless all scores that `model` computed for `ids` (batch, tokens) are finite."""
    if bool(torch.isfinite(scores).all()):
        return
    where = find_non_finite(model, {"input_ids": ids, "use_cache": False, "logits_to_keep": 1})
    raise NonFiniteLogitsError(
        f"the model gave NaN or infinite logits, first in {where or 'its output'} ({model.dtype}). "
        "Usual causes: float16 overflow (try model.bfloat16() or model.float()), damaged or incomplete weights, "
        "a prefix or adapter that was trained for another model."
    )


class Choice(NamedTuple):
    """The next token of every sequence, as (batch, 1) and as a list, and why the batch ends with it, or None."""

    tokens: torch.Tensor
    token_ids: list[int]
    finish_reason: FinishReason | None


class TokenChooser:
    """Chooses the tokens of a batch of sequences step by step, and decides when the batch has ended.

    The batch ends with "stop" when each sequence has met a stop token or one of the caller's stopping criteria, or with
    "length" at the limit. A sequence that has ended gets padding while others continue.

    Args:
        prompt_tokens: number of tokens of each prompt, padding included.
        limit: number of tokens of a sequence, prompt included, at which to end with "length".
        device: of the ids and scores.
        batch_size: number of sequences.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: GenerationOptions,
        prompt_tokens: int,
        limit: int,
        device: torch.device,
        batch_size: int = 1,
    ) -> None:
        self._model, self._do_sample, self._limit = model, options.do_sample, limit
        self._generator = options.generator(device)
        self._processors = options.processors(prompt_tokens, device)
        self._criteria = StoppingCriteriaList(options.stopping_criteria)
        self._stop_ids = set(options.stop_ids())
        self._pad = options.pad_token_id if options.pad_token_id is not None else (options.stop_ids() or [0])[0]
        self._ended = [False] * batch_size
        own = options.logits_processor
        self._must_be_finite = not any(isinstance(processor, InvalidScoreLogitsProcessor) for processor in own)

    def choose(self, ids: torch.Tensor, scores: torch.Tensor) -> Choice:
        """Chooses the next token from `scores` (batch, vocabulary) after `ids` (batch, tokens).

        Raises:
            NonFiniteLogitsError: a score is NaN or infinite.
        """
        if self._must_be_finite:
            check_finite(self._model, scores, ids)
        scores = self._processors(ids, scores)
        tokens = choose(scores, self._do_sample, self._generator)
        ended = self._ended
        if any(ended):
            tokens[ended] = self._pad
        token_ids = [token_id for (token_id,) in tokens.tolist()]
        by_criteria = self._criteria(torch.cat((ids, tokens), dim=-1), scores).tolist() if self._criteria else ended
        for row, token_id in enumerate(token_ids):
            ended[row] = ended[row] or by_criteria[row] or token_id in self._stop_ids
        reason: FinishReason | None = None
        if all(ended):
            reason = "stop"
        elif ids.shape[1] + 1 >= self._limit:
            reason = "length"
        return Choice(tokens, token_ids, reason)
