"""The options of an answer: how to choose its tokens and when to stop."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

#: The originals ran on transformers 4.30, whose sampling always kept the 50 likeliest tokens.
DEFAULT_TOP_K = 50
#: Lower temperatures leave only the likeliest token anyway, and dividing the scores by them would overflow.
GREEDY_BELOW = 1e-5

#: Options that are whole numbers, and the lowest one each.
WHOLE_NUMBERS = (
    ("max_length", 1), ("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0), ("prompt_lookup_num_tokens", 0),
    ("num_assistant_tokens", 1),
)  # fmt: skip

#: Options of transformers' `generate` that decoding token by token does not have, and the value with which each
#: changes nothing: programs for the originals pass them on in every call.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
    "synced_gpus": False,
    "low_memory": False,
}


def without_neutral(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the options without those of `NEUTRAL` that are None or have their neutral value."""
    return {name: value for name, value in options.items() if name not in NEUTRAL or value not in (None, NEUTRAL[name])}


@dataclass(frozen=True)
class PlacedPicture:
    """A picture in a prompt.

    Args:
        features: its embeddings, (batch, image_length, hidden).
        place: how many tokens stand before its placeholders.
        key: equal for equal pictures.
    """

    features: torch.Tensor
    place: int
    key: object

    @property
    def inputs(self) -> dict[str, Any]:
        """What the forward that reads the prompt takes besides the ids."""
        return {"image_features": self.features, "pre_image_length": self.place}


@dataclass
class GenerationOptions:
    """How to choose tokens and when to stop. Names and meaning are those of transformers' `GenerationConfig`.

    `seed` makes the choices repeatable, `cancel` ends the answer from another thread, and the text ends before the
    first of the `stop_strings`. `picture` is the one in the prompt, for a model that sees.
    `prompt_lookup_num_tokens` (0: none) and `assistant_model` guess tokens ahead, see `guessing`; they change the speed
    of a single sequence and not its distribution.
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
    prompt_lookup_num_tokens: int | None = None
    assistant_model: Any = None
    num_assistant_tokens: int | None = None
    use_cache: bool = True
    seed: int | None = None
    cancel: threading.Event | None = None
    picture: PlacedPicture | None = None
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None
    logits_processor: Sequence[LogitsProcessor] = field(default_factory=list)
    stopping_criteria: Sequence[Callable[..., Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, lowest in WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or int(value) != value or value < lowest):
                raise ValueError(f"{name} must be a whole number of {lowest} or more, not {value!r}")
        for name, low, high in (("temperature", 0.0, math.inf), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"{low:g} (greedy) or more"
                raise ValueError(f"{name} must be {limits}, not {value!r}")
        if self.picture is not None and not isinstance(self.picture, PlacedPicture):
            raise TypeError(f"picture must be a PlacedPicture, not {type(self.picture).__name__}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty!r}")
        if self.assistant_model is not None and self.prompt_lookup_num_tokens:
            raise ValueError("give prompt_lookup_num_tokens or assistant_model, not both")
        if self.guesses and not self.use_cache:
            raise ValueError("prompt_lookup_num_tokens and assistant_model need the KV cache: leave out use_cache")
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
        """Takes options that `kwargs` lack from `config`; leaves out those that change nothing (`NEUTRAL`).

        Raises TypeError for any other name that is not an option.
        """
        kwargs = without_neutral(kwargs)
        unknown = sorted(set(kwargs) - cls.names())
        if unknown:
            raise TypeError(
                f"unknown generation option {', '.join(unknown)}; decoding token by token supports "
                f"{', '.join(sorted(cls.names()))}. Other options of transformers work with generate() and chat()."
            )
        for name in cls.names() - set(kwargs):
            value = getattr(config, name, None)
            if value is not None:
                kwargs[name] = value
        return cls(**kwargs)

    def prompt_inputs(self, start: int) -> dict[str, Any]:
        """What a forward that begins at token `start` of the sequence takes besides the ids: the picture is read with
        the first one."""
        return self.picture.inputs if self.picture is not None and start == 0 else {}

    @property
    def guesses(self) -> bool:
        """Whether tokens should be guessed ahead."""
        return self.assistant_model is not None or bool(self.prompt_lookup_num_tokens)

    def stop_ids(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def length_limit(self, prompt_tokens: int, context: int | None) -> int:
        """Returns the number of tokens, prompt included, at which an answer ends with "length"."""
        limits = [limit for limit in (self.max_length, context) if limit is not None]
        if self.max_new_tokens is not None:
            limits.append(prompt_tokens + self.max_new_tokens)
        if not limits:
            raise ValueError("give max_length or max_new_tokens: the model has no context length of its own")
        return min(limits)

    def room_for(self, prompt_tokens: int, context: int | None) -> int:
        """Returns `length_limit`; raises ValueError if it leaves no room for a token."""
        limit = self.length_limit(prompt_tokens, context)
        if prompt_tokens >= limit:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens and the limit for prompt and answer together is {limit}: "
                "shorten it, or raise max_length (at most the model's context length)"
            )
        return limit

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Returns a random generator with the seed, or None (torch's own generator) without one."""
        return None if self.seed is None else torch.Generator(device=device).manual_seed(self.seed)

    def processors(self, prompt_tokens: int, device: torch.device) -> LogitsProcessorList:
        """The chain that transformers builds for the same options: penalties, the caller's processors, sampling."""
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
