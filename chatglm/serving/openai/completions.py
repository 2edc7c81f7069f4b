"""The route of completions, which continue a text."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ...engine import Stream
from ...generation import GenerationOptions
from ..chat_engine import ChatEngine
from ..errors import ApiError
from ..service import EventStream, Json, Service, in_thread, service_of, submit, unless_gone
from .bodies import Prompts, Sampling
from .logprobs import completion_logprobs, told
from .streams import Usage, head_of, merged


class CompletionBody(Sampling):
    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise ApiError(400, "suffix is not supported", param="suffix", code="unsupported_parameter")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of is not supported beyond n", param="best_of", code="unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo together with logprobs is not supported", param="echo")

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
    streams = submit(engine, requests, adapter, body.logprobs)
    head = head_of("cmpl", "text_completion", service, body)
    if body.stream:
        return EventStream(_completion_chunks(service, body, streams, echoes, head), done="[DONE]")
    return await unless_gone(request, _completion_whole(service, body, streams, echoes, head))


def _completion_requests(
    engine: ChatEngine, body: CompletionBody
) -> tuple[list[tuple[list[int], GenerationOptions]], list[str]]:
    tokenizer, model = engine.tokenizer, engine.model
    defaults = dict(model.sampling_defaults) | {"eos_token_id": tokenizer.chat_format.stop_token_ids(tokenizer)}
    requests, echoes = [], []
    engine.check_places(len(body.prompts()) * (body.n or 1))
    for prompt in body.prompts():
        if isinstance(prompt, str):
            engine.check_size(prompt)
            ids = list(tokenizer(prompt)["input_ids"])
        else:
            ids = list(prompt)
        settings = defaults if body.max_tokens is not None else defaults | {"max_new_tokens": 16}  # OpenAI's default
        for options in body.choices(lambda settings=settings, **given: GenerationOptions(**settings | given)):
            options.logits_processor = body.penalties(len(ids))
            requests.append((ids, options))
            shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            echoes.append(shown if body.echo else "")
    return requests, echoes


async def _completion_whole(
    service: Service, body: CompletionBody, streams: list[Stream], echoes: list[str], head: dict[str, Any]
) -> Response:
    usage, choices = Usage(), []
    with service.limited(streams):
        for index, (stream, echo) in enumerate(zip(streams, echoes, strict=True)):
            text, tokens, reason = echo, [], None
            async for step in service.steps(stream):
                text += step.delta
                tokens += told(service.engine, step)
                reason = step.finish_reason
                usage.see(index, step)
            logprobs = completion_logprobs(service.engine, tokens, 0)[0] if body.logprobs is not None else None
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    return Json(head | {"choices": choices, "usage": usage.body(len(body.prompts()))})


async def _completion_chunks(
    service: Service, body: CompletionBody, streams: list[Stream], echoes: list[str], head: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    usage = Usage()
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    head |= {"usage": None} if wants_usage else {}
    offsets = [0] * len(streams)
    with service.limited(streams):
        for index, echo in enumerate(echoes):
            if echo:
                choice = {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
                yield head | {"choices": [choice]}
        async for index, step in merged(service, streams):
            usage.see(index, step)
            tokens = told(service.engine, step)
            logprobs = None
            if tokens:
                logprobs, offsets[index] = completion_logprobs(service.engine, tokens, offsets[index])
            if step.delta or logprobs or step.finish_reason:
                choice = {
                    "index": index, "text": step.delta, "logprobs": logprobs, "finish_reason": step.finish_reason,
                }  # fmt: skip
                yield head | {"choices": [choice]}
        if wants_usage:
            yield head | {"choices": [], "usage": usage.body(len(body.prompts()))}
