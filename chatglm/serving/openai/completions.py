"""The route of completions, which continue a text."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ...engine import EngineStep, Stream
from ...generation import GenerationOptions
from ..chat_engine import ChatEngine
from ..errors import ApiError
from ..service import EventStream, Json, Service, in_thread, service_of, submit, unless_gone
from .bodies import Prompts, Sampling
from .logprobs import MOST_LOGPROBS, TextLogprobs, control_ids, prompt_logprobs, told
from .streams import Usage, head_of, merged


class CompletionBody(Sampling):
    prompt: Prompts
    #: 0: only read the prompt, for its log probabilities.
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    #: vLLM's: the log probabilities of the prompt's tokens, by id.
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise ApiError(400, "suffix is not supported", param="suffix", code="unsupported_parameter")
        if self.best_of is not None and self.best_of != (self.n or 1):
            reason = "best_of must equal n: this server returns all answers that it computes"
            raise ApiError(400, reason, param="best_of", code="unsupported_parameter")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            reason = "max_tokens = 0 asks for no answer: give echo or prompt_logprobs with it, or more tokens"
            raise ApiError(400, reason, param="max_tokens")
        if self.stream and self.prompt_logprobs is not None:
            reason = "prompt_logprobs are not available in a stream: leave out stream, or use echo and logprobs"
            raise ApiError(400, reason, param="prompt_logprobs", code="unsupported_parameter")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.max_tokens == 0:
            del settings["max_new_tokens"]
        return settings

    def prompt_wanted(self) -> int | None:
        """Returns how many of the likeliest tokens the engine must report for each of the prompt's; None for none."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts as a list, even if there is only one."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


router = APIRouter()


@router.post("/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continues a text as it is, without the format of a conversation: for base models."""
    service = service_of(request)
    engine = service.engine
    adapter = service.adapter_of(body.model)
    body.check()
    requests, echoes = await in_thread(_completion_requests, engine, body)
    streams = submit(engine, requests, adapter, body.logprobs, body.prompt_wanted(), body.max_tokens != 0)
    answers = [
        CompletionText(engine, body, ids, echo, stream)
        for (ids, _), echo, stream in zip(requests, echoes, streams, strict=True)
    ]
    head = head_of("cmpl", "text_completion", service, body)
    if body.stream:
        return EventStream(_completion_chunks(service, body, answers, head), done="[DONE]")
    return await unless_gone(request, _completion_whole(service, body, answers, head))


def _completion_requests(
    engine: ChatEngine, body: CompletionBody
) -> tuple[list[tuple[list[int], GenerationOptions]], list[str]]:
    tokenizer, model = engine.tokenizer, engine.model
    defaults = {
        **model.sampling_defaults, **model.default_options,
        "eos_token_id": tokenizer.chat_format.stop_token_ids(tokenizer),
    }  # fmt: skip
    requests, echoes = [], []
    engine.check_places(len(body.prompts()) * (body.n or 1))
    control = control_ids(engine)
    for prompt in body.prompts():
        if isinstance(prompt, str):
            engine.check_size(prompt)
            ids = list(tokenizer(prompt)["input_ids"])
        else:
            ids = list(prompt)
        settings = defaults if body.max_tokens is not None else defaults | {"max_new_tokens": 16}  # OpenAI's default
        for options in body.choices(lambda settings=settings, **given: GenerationOptions(**settings | given)):
            options.logits_processor = body.penalties(len(ids), model.config.vocab_size)
            requests.append((ids, options))
            shown = prompt if isinstance(prompt, str) else tokenizer.decode([i for i in ids if i not in control])
            echoes.append(shown if body.echo else "")
    return requests, echoes


class CompletionText:
    """One choice while it is being answered: the echo of its prompt, then its text, with their log probabilities."""

    def __init__(self, engine: ChatEngine, body: CompletionBody, ids: list[int], echo: str, stream: Stream) -> None:
        self._engine, self._ids, self._echo, self.stream = engine, ids, echo, stream
        self._echoes, self._tells = bool(body.echo), body.logprobs is not None
        self._logprobs = TextLogprobs(engine, echo, body.logprobs or 0)
        self._begun = False
        self.read: Any = None  # what the engine found about the prompt

    def take(self, step: EngineStep) -> tuple[str, dict[str, list[Any]] | None]:
        """Returns the text and the log probabilities that a step adds; the first step also brings the echo."""
        text, parts = step.delta, []
        if not self._begun:
            self._begun, self.read = True, step.prompt_logprobs
            if self._echoes:
                text = self._echo + text
            if self._echoes and self._tells:
                parts.append(self._logprobs.part(self._ids, step.prompt_logprobs or []))
        # With the prompt, every token counts: lm-evaluation-harness takes off the one that it had to ask for.
        tokens = [step.logprob] if self._echoes and step.logprob is not None else told(self._engine, step)
        if tokens and self._tells:
            parts.append(self._logprobs.part([token.token_id for token in tokens], tokens))
        return text, _joined(parts)


def _joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
    """Returns log probabilities of parts that follow each other; None for no part."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]} if parts else None


async def _completion_whole(
    service: Service, body: CompletionBody, answers: list[CompletionText], head: dict[str, Any]
) -> Response:
    usage, choices = Usage(), []
    with service.limited([answer.stream for answer in answers]):
        for index, answer in enumerate(answers):
            text, parts, reason = "", [], None
            async for step in service.steps(answer.stream):
                delta, logprobs = answer.take(step)
                text += delta
                parts += [logprobs] if logprobs else []
                reason = step.finish_reason
                usage.see(index, step)
            empty = TextLogprobs(service.engine).part([], []) if body.logprobs is not None else None
            choice = {"index": index, "text": text, "logprobs": _joined(parts) or empty, "finish_reason": reason}
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(service.engine, answer.read, body.prompt_logprobs)
            choices.append(choice)
    return Json(head | {"choices": choices, "usage": usage.body(len(body.prompts()))})


async def _completion_chunks(
    service: Service, body: CompletionBody, answers: list[CompletionText], head: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    usage = Usage()
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    head |= {"usage": None} if wants_usage else {}
    streams = [answer.stream for answer in answers]
    with service.limited(streams):
        async for index, step in merged(service, streams):
            usage.see(index, step)
            text, logprobs = answers[index].take(step)
            if text or logprobs or step.finish_reason:
                choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": step.finish_reason}
                yield head | {"choices": [choice]}
        if wants_usage:
            yield head | {"choices": [], "usage": usage.body(len(body.prompts()))}
