"""What the bodies of all requests have in common, and what those of both kinds of completions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import LogitsProcessor

from ...generation import GenerationOptions
from ..errors import ApiError
from .neutral import without_neutral
from .penalties import AnswerPenalties, LogitBias

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
#: Maximum numbers of messages or rounds, of parts of a message, of tools, of prompts: counted before each is checked.
MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, MOST_PROMPTS = 4096, 1024, 128, 256
#: One text to continue, or several, as text or as ids of tokens.
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(max_length=MOST_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(max_length=MOST_PROMPTS, fail_fast=True)]
)
#: Token id -> bias.
Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]], Field(max_length=1024)]
StopText = Annotated[str, Field(max_length=1024)]


class Body(BaseModel):
    """The body of a request. Unknown keys are errors, unless they ask for nothing: silently ignoring an option would be
    worse."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        return without_neutral(values, cls.model_fields)

    @model_validator(mode="before")
    @classmethod
    def _without_true_for_one(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            value = values.get(name)
            if isinstance(value, bool) and not _takes_bool(field.annotation):
                raise ApiError(400, f"{name} is {str(value).lower()}: give a value of another type", param=name)
        return values


def _takes_bool(annotation: Any) -> bool:
    """Whether a field takes true and false, which pydantic would also take for the numbers 1 and 0."""
    return annotation in (bool, Any, True, False) or any(map(_takes_bool, get_args(annotation)))


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(Body):
    """The fields of both kinds of completions."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Probability | None = None
    do_sample: bool | None = None
    #: 0 and, as in vLLM, -1 take all tokens.
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    max_tokens: Count | None = None
    #: Of prompt and answer together, as in the originals.
    max_length: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Bias | None = None
    # Accepted only where it has no effect.
    user: str | None = None

    def check(self) -> None:
        """Raises ApiError for values that are not supported."""
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ApiError(400, "stream_options are for stream = true", param="stream_options")
        if (isinstance(self.stop, str) and not self.stop) or (isinstance(self.stop, list) and "" in self.stop):
            raise ApiError(400, "a stop string must not be empty", param="stop")
        most = self.settings().get("max_new_tokens")
        if most is not None and (self.min_tokens or 0) > most:
            raise ApiError(400, f"min_tokens ({self.min_tokens}) is more than max_tokens ({most})", param="min_tokens")

    def settings(self) -> dict[str, Any]:
        """Returns the given fields as keyword arguments of `GenerationOptions`."""
        values = {
            "do_sample": self.do_sample, "temperature": self.temperature, "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "max_new_tokens": self.max_tokens,
            "max_length": self.max_length, "min_new_tokens": self.min_tokens, "stop_strings": self.stop,
            "seed": self.seed,
        }  # fmt: skip
        return {name: value for name, value in values.items() if value is not None}

    def penalties(self, prompt_tokens: int, vocabulary: int) -> list[LogitsProcessor]:
        """Returns the processors that penalties and biases ask for.

        Args:
            prompt_tokens: number of tokens before the answer.
            vocabulary: number of tokens of the model.

        Raises:
            ApiError: (400) a bias is for a token that the model does not have.
        """
        presence, frequency = self.presence_penalty or 0.0, self.frequency_penalty or 0.0
        given = [AnswerPenalties(presence, frequency, prompt_tokens)] if presence or frequency else []
        return [*given, *([LogitBias(self.logit_bias, vocabulary)] if self.logit_bias else [])]

    def choices(self, make: Callable[..., GenerationOptions]) -> list[GenerationOptions]:
        """Returns the options of every choice; with a seed, each choice has a different one."""
        settings, count = self.settings(), self.n or 1
        if self.seed is None:
            return [make(**settings) for _ in range(count)]
        return [make(**settings | {"seed": (self.seed + i + 2**63) % 2**64 - 2**63}) for i in range(count)]
