"""Token ids -> tokens, one at a time: sampling, stopping, the KV cache kept between turns, text as it comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .adapters import switching
from .cache import GrowingLayer

FinishReason = Literal["stop", "length", "cancelled"]

#: The originals ran on transformers 4.30, whose sampling always kept the 50 likeliest tokens.
DEFAULT_TOP_K = 50
#: Tokens of a prompt that go through a model on a CPU at a time: more at once take memory and save no time.
CPU_PROMPT_TOKENS = 256
#: Lower temperatures leave only the likeliest token anyway, and scores divided by them would overflow.
GREEDY_BELOW = 1e-5


class NonFiniteLogitsError(ArithmeticError):
    """The network gave NaN or infinite logits; the message names where they began and the usual causes."""


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """What the originals did with NaN or infinite scores: force token 5, whatever it is, and go on.

    Not used unless passed in `logits_processor`: then `NonFiniteLogitsError` is off.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isfinite(scores).all():
            return scores
        forced = torch.zeros_like(scores)
        forced[..., 5] = 5e4
        return forced


@dataclass(frozen=True)
class GenerationStep:
    """One token of an answer, and the answer so far.

    `text` never ends inside a character; `finish_reason` is set on the last step only, whose token is a stop token
    (not part of the text) where the reason is "stop" and no stop string was met.
    """

    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float


@dataclass
class GenerationOptions:
    """How to choose and when to stop. Names and meaning are those of transformers' `GenerationConfig`.

    `seed` makes the choices repeatable, `cancel` ends the answer from another thread, `stop_strings` are cut off.
    """

    do_sample: bool = True
    temperature: float | None = None
    top_k: int | None = DEFAULT_TOP_K
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    min_new_tokens: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    use_cache: bool = True
    seed: int | None = None
    cancel: threading.Event | None = None
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None
    logits_processor: Sequence[LogitsProcessor] = field(default_factory=list)
    stopping_criteria: Sequence[Callable[..., Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, lowest in (("max_length", 1), ("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or int(value) != value or value < lowest):
                raise ValueError(f"{name} must be a whole number of {lowest} or more, not {value!r}")
        for name, low, high in (("temperature", 0.0, math.inf), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"{low:g} (greedy) or more"
                raise ValueError(f"{name} must be {limits}, not {value!r}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty!r}")
        if (self.temperature is not None and self.temperature < GREEDY_BELOW) or self.top_p == 0:
            self.do_sample = False
        if isinstance(self.stop_strings, str):
            self.stop_strings = [self.stop_strings]
        self.stop_strings = [text for text in self.stop_strings or [] if text]
        self.logits_processor = list(self.logits_processor or [])
        self.stopping_criteria = list(self.stopping_criteria or [])

    @classmethod
    def names(cls) -> set[str]:
        return {option.name for option in fields(cls)}

    @classmethod
    def from_config(cls, config: GenerationConfig, **kwargs: Any) -> GenerationOptions:
        """Values of `config` where `kwargs` say nothing. Raises TypeError for a name that is no option here."""
        unknown = sorted(set(kwargs) - cls.names())
        if unknown:
            raise TypeError(
                f"unknown generation option {', '.join(unknown)}; token by token there are "
                f"{', '.join(sorted(cls.names()))}. What else transformers offers works with generate() and chat()."
            )
        for name in cls.names() - set(kwargs):
            value = getattr(config, name, None)
            if value is not None:
                kwargs[name] = value
        return cls(**kwargs)

    def stop_ids(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def length_limit(self, prompt_tokens: int, context: int | None) -> int:
        """The number of tokens, prompt included, after which an answer ends with "length"."""
        limits = [limit for limit in (self.max_length, context) if limit is not None]
        if self.max_new_tokens is not None:
            limits.append(prompt_tokens + self.max_new_tokens)
        if not limits:
            raise ValueError("give max_length or max_new_tokens: the model has no context length of its own")
        return min(limits)

    def room_for(self, prompt_tokens: int, context: int | None) -> int:
        """`length_limit`, where it leaves room for a token. Raises ValueError where it does not."""
        limit = self.length_limit(prompt_tokens, context)
        if prompt_tokens >= limit:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens and the limit for prompt and answer together is {limit}: "
                "shorten it, or raise max_length (at most the model's context length)"
            )
        return limit

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The source of the choices: of its own with a seed, else torch's (None)."""
        return None if self.seed is None else torch.Generator(device=device).manual_seed(self.seed)

    def processors(self, prompt_tokens: int, device: torch.device) -> LogitsProcessorList:
        """The chain that transformers builds for the same options: penalties, the caller's own, then the sampling."""
        chain = LogitsProcessorList()
        stop_ids = self.stop_ids()
        if self.repetition_penalty not in (None, 1.0):
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            chain.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.bad_words_ids:
            chain.append(NoBadWordsLogitsProcessor(self.bad_words_ids, stop_ids or None))
        if self.min_new_tokens and stop_ids:
            chain.append(MinNewTokensLengthLogitsProcessor(prompt_tokens, self.min_new_tokens, stop_ids, device=device))
        if self.prefix_allowed_tokens_fn is not None:
            chain.append(PrefixConstrainedLogitsProcessor(self.prefix_allowed_tokens_fn, 1))
        if self.suppress_tokens:
            chain.append(SuppressTokensLogitsProcessor(self.suppress_tokens, device=device))
        chain.extend(self.logits_processor)
        if self.do_sample:
            if self.temperature not in (None, 1.0):
                chain.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                chain.append(TopKLogitsWarper(self.top_k))
            if self.top_p is not None and self.top_p < 1.0:
                chain.append(TopPLogitsWarper(self.top_p))
            if self.min_p is not None:
                chain.append(MinPLogitsWarper(self.min_p))
        return chain


class ChatCache(DynamicCache):
    """A KV cache that knows which tokens it holds, so that a later turn reuses exactly what is the same."""

    def __init__(self, stamp: object = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
        self.token_ids: list[int] = []
        self.stamp = stamp

    def keep_prefix_of(self, ids: Sequence[int], model: PreTrainedModel) -> int:
        """Forget all but what this cache has in common with `ids`; returns how many tokens are left.

        At least the last id is left out: its logits are wanted.
        """
        common = min(len(self.token_ids), len(ids) - 1)
        common = next((i for i in range(common) if self.token_ids[i] != ids[i]), common)
        # A forward that was interrupted has left some layers longer than others.
        whole = all(layer.get_seq_length() == len(self.token_ids) for layer in self.layers)
        if not whole or self.stamp != weights_stamp(model):
            common = 0
        common = model.reusable_prefix(list(ids), common)
        if common < len(self.token_ids):
            if common:
                self.crop(common - len(self.token_ids))
            else:
                self.__init__(weights_stamp(model))  # type: ignore[misc]  # also when device or dtype have changed
        del self.token_ids[common:]
        return common


def weights_stamp(model: PreTrainedModel) -> object:
    """Changes when weights are replaced, moved, cast or trained, or another adapter is used.

    What was computed before is then worthless.
    """
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return object()
    # What is offloaded comes anew for each use: all that stays of it is a placeholder on the meta device.
    state = tuple((one.data_ptr(), 0 if one.is_meta else one._version) for one in parameters)
    return hash(state), switching.stamp(model)


def find_non_finite(model: PreTrainedModel, inputs: dict[str, Any]) -> str | None:
    """The name of the first module whose output is not finite, by running `inputs` again without a cache."""
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
    """One token for each row of processed scores: (batch, vocabulary) -> (batch, 1)."""
    if do_sample:
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)
    return scores.argmax(-1, keepdim=True)


def check_finite(model: PreTrainedModel, scores: torch.Tensor, ids: torch.Tensor) -> None:
    """Raises NonFiniteLogitsError unless all scores that `model` gave for `ids` (batch, tokens) are finite."""
    if bool(torch.isfinite(scores).all()):
        return
    where = find_non_finite(model, {"input_ids": ids, "use_cache": False, "logits_to_keep": 1})
    raise NonFiniteLogitsError(
        f"the model gave NaN or infinite logits, first in {where or 'its output'} ({model.dtype}). "
        "Usual causes: float16 overflow (try model.bfloat16() or model.float()), damaged or incomplete weights, "
        "a prefix or adapter that was trained for another model."
    )


def piece_end(model: PreTrainedModel, ids: torch.Tensor, start: int) -> int:
    """Where the piece of `ids` (1, tokens) ends that is best read at once from `start` on."""
    tokens = ids.shape[1]
    if ids.device.type != "cpu" or tokens - start <= CPU_PROMPT_TOKENS:
        return tokens
    end = start + CPU_PROMPT_TOKENS
    whole = model.reusable_prefix(ids[0].tolist(), end) < end  # generation 1: its context sees itself both ways
    return tokens if whole else end


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    options: GenerationOptions,
    limit: int,
    cache: ChatCache | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, FinishReason | None]]:
    """The decode loop: the sequence after every new token, and why it ended.

    Args:
        input_ids: (batch, tokens), left-padded if the rows differ in length.
        limit: number of tokens in a row, prompt included, at which to end with "length".
        cache: holds the first tokens of a single sequence already (see `ChatCache.keep_prefix_of`).
        attention_mask: (batch, tokens), 0 for padding.

    Yields:
        (batch, tokens so far) with the new token last. A cancelled run yields the sequence as it is, once.

    Raises:
        NonFiniteLogitsError: see there.
    """
    ids = input_ids
    batch_size = len(ids)
    processors = options.processors(ids.shape[1], ids.device)
    forgiving = any(isinstance(processor, InvalidScoreLogitsProcessor) for processor in options.logits_processor)
    criteria = StoppingCriteriaList(options.stopping_criteria)
    stop_ids = torch.tensor(options.stop_ids(), device=ids.device, dtype=ids.dtype)
    generator = options.generator(ids.device)
    if cache is None and options.use_cache:
        cache = ChatCache()
    start = len(cache.token_ids) if cache is not None else 0
    unfinished = torch.ones(batch_size, dtype=torch.bool, device=ids.device)
    pad = options.pad_token_id if options.pad_token_id is not None else (options.stop_ids() or [0])[0]
    while True:
        if options.cancel is not None and options.cancel.is_set():
            yield ids, "cancelled"
            return
        end = ids.shape[1]
        if cache is not None and batch_size == 1 and attention_mask is None:
            end = piece_end(model, ids, start)
        outputs = model(
            input_ids=ids[:, start:end],
            position_ids=model.positions_from(ids, start, attention_mask)[..., : end - start],
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        if cache is not None:
            if batch_size == 1:
                cache.token_ids += ids[0, start:end].tolist()
            start = end
            if end < ids.shape[1]:
                continue
        scores = outputs.logits[:, -1].float().to(ids.device)
        if not forgiving:
            check_finite(model, scores, ids)
        scores = processors(ids, scores)
        chosen = choose(scores, options.do_sample, generator)
        chosen = torch.where(unfinished.unsqueeze(-1), chosen, pad)
        ids = torch.cat((ids, chosen), dim=-1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch_size, 1)), dim=-1)
        unfinished = unfinished & ~torch.isin(chosen[:, 0], stop_ids)
        if criteria:
            unfinished = unfinished & ~criteria(ids, scores).to(ids.device)
        reason: FinishReason | None = None
        if not bool(unfinished.any()):
            reason = "stop"
        elif ids.shape[1] >= limit:
            reason = "length"
        yield ids, reason
        if reason is not None:
            return


class IncrementalDecoder:
    """Text from tokens as they come, never ending inside a character, equal in the end to decoding them at once.

    A tail of incomplete UTF-8 bytes is held back until it is whole or `flush` is called. Long answers are decoded in
    windows, so that the work per token does not grow with the answer.

    Args:
        decode: ids -> text, without clean-up.
    """

    WINDOW, CONTEXT = 128, 16

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._settled = ""  # text of the windows before this one
        self._context = ""  # how this window's first ids, which belong to the one before, read by themselves

    def push(self, token_id: int) -> str:
        """The text so far."""
        self._ids.append(token_id)
        text = self._text()
        whole = text.rstrip("\ufffd")
        # A character has at most 4 bytes: a longer run of replacement characters is what the model means.
        if len(text) - len(whole) > 4:
            whole = text[:-1]
        if whole == text and len(self._ids) > self.WINDOW:
            context = self._decode(self._ids[-self.CONTEXT :])
            if not context.startswith("\ufffd"):
                self._settled, self._context, self._ids = text, context, self._ids[-self.CONTEXT :]
        return whole

    def flush(self) -> str:
        """The whole text, an unfinished character as U+FFFD."""
        return self._text()

    def _text(self) -> str:
        return self._settled + self._decode(self._ids)[len(self._context) :]


def generate_text(
    model: PreTrainedModel,
    ids: Sequence[int],
    options: GenerationOptions,
    decode_ids: Callable[[list[int]], str],
    context: int | None = None,
    cache: ChatCache | None = None,
) -> Iterator[GenerationStep]:
    """One answer to the prompt `ids`, step by step.

    Args:
        decode_ids: ids of the answer -> text, without clean-up (its result for a prefix is a prefix of its result).
        context: the most tokens the model can take, or None.
        cache: from an earlier turn; what it has in common with `ids` is not computed again.

    Raises:
        ValueError: the prompt leaves no room for a token.
        NonFiniteLogitsError: see there.
    """
    began = time.perf_counter()
    limit = options.room_for(len(ids), context)
    cached = cache.keep_prefix_of(ids, model) if cache is not None else 0
    answer = AnswerText(options, decode_ids)
    prompt = torch.tensor([list(ids)], device=model.device)
    for sequence, reason in decode(model, prompt, options, limit, cache):
        token_id = None if reason == "cancelled" else int(sequence[0, -1])
        text, reason = answer.push(token_id, reason)
        yield GenerationStep(token_id, text, reason, len(ids), cached, answer.tokens, time.perf_counter() - began)
        if reason is not None:
            return


class AnswerText:
    """The text of an answer as its tokens come: whole characters, nothing of a stop string, no stop token.

    Args:
        decode_ids: as in `generate_text`.
    """

    def __init__(self, options: GenerationOptions, decode_ids: Callable[[list[int]], str]) -> None:
        self.tokens = 0
        self._text = ""
        self._decoder = IncrementalDecoder(decode_ids)
        self._stop_ids = set(options.stop_ids())
        self._stop_strings = list(options.stop_strings or [])

    def push(self, token_id: int | None, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """The text with one more token (None: without), and why the answer ends here if it does."""
        if token_id is not None:
            self.tokens += 1
            if token_id not in self._stop_ids:
                self._text = self._decoder.push(token_id)
        if reason is not None:
            self._text = self._decoder.flush()
        found = [place for place in map(self._text.find, self._stop_strings) if place >= 0]
        if found:
            self._text, reason = self._text[: min(found)], "stop"
        shown = self._text if reason is not None else _without_started_stop(self._text, self._stop_strings)
        return shown, reason


def _without_started_stop(text: str, stop_strings: Sequence[str]) -> str:
    """`text` without an end that may turn out to be the beginning of a stop string."""
    longest = 0
    for stop in stop_strings:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return text[: len(text) - longest]
