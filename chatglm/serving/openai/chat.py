"""The route of chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...conversation.formats import names_of
from ...engine import Stream, TokenLogprob
from ...generation import GenerationOptions
from ...pictures import read_base64
from ..answers import AssistantMessage, Call, Change, StartWith
from ..chat_engine import ChatEngine
from ..clients import charge
from ..errors import ApiError
from ..grammar import BYTES_PER_CHARACTER, Grammar, Grammars
from ..service import EventStream, Json, Service, in_thread, service_of, submit, unless_gone
from ..tool_grammar import FollowCalls, compile_arguments
from .chat_body import ChatBody
from .logprobs import chat_logprobs, prompt_logprobs, told
from .pictures import picture_url, picturing
from .prefill import ContinuedMessage, chat_ids, check_prefill
from .streams import Usage, head_of, merged
from .tool_results import in_call_order

router = APIRouter()


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatBody) -> Response:
    service = service_of(request)
    streams, answers = await start_chat(request, body)
    head = head_of("chatcmpl", "chat.completion", service, body)
    if body.stream:
        return EventStream(_chat_chunks(service, body, streams, answers, head), done="[DONE]")
    return await unless_gone(request, _chat_whole(service, body, streams, answers, head))


async def start_chat(request: Request, body: ChatBody) -> tuple[list[Stream], list[AssistantMessage]]:
    """Checks a request and starts its answers: for each choice its stream, and what makes a message of it.

    Raises ApiError.
    """
    service = service_of(request)
    engine = service.engine
    adapter = service.adapter_of(body.model)
    body.check()
    check_prefill(body)
    schemas = [body.schema_wanted(), *body.schemas_of_calls().values()]
    charge(BYTES_PER_CHARACTER * sum(len(str(schema)) for schema in schemas if schema is not None))
    requests, grammar = await in_thread(_chat_requests, engine, body, request.app.state.grammars)
    top = (body.top_logprobs or 0) if body.logprobs else None
    streams = submit(engine, requests, adapter, top, body.prompt_logprobs)
    return streams, [_answer(engine, body, options, grammar) for _, options in requests]


def _answer(
    engine: ChatEngine, body: ChatBody, options: GenerationOptions, grammar: Grammar | None
) -> AssistantMessage:
    if grammar is not None:
        return grammar.answer(engine.tokenizer, options)
    tools = [function.name for function in body.offered()]
    at_most_one = body.parallel_tool_calls is False or body.functions is not None
    if body.continue_final_message:
        return ContinuedMessage(engine.tokenizer, options, body.messages[-1], tools, at_most_one)
    return AssistantMessage(engine.tokenizer, tools, at_most_one)


def prompt_ids(engine: ChatEngine, body: ChatBody) -> list[int]:
    """Returns the ids of the prompt. Raises ApiError (400), TypeError or ValueError for what the model cannot read."""
    chat_format = engine.tokenizer.chat_format
    messages = [
        message.model_dump(exclude_none=True) | ({"content": message.text} if message.image_urls else {})
        for message in in_call_order(body.messages)
    ]
    offered = body.described()
    if offered and not chat_format.knows_tools:
        others = names_of(lambda format: format.knows_tools, "is", "are", short=True)
        reason = f"this model was not trained to call tools, {others}: describe them in the prompt"
        raise ApiError(400, reason, param="tools")
    engine.check_size("".join(message.text for message in body.messages))
    if picture_url(body) is not None:
        chat_format = picturing(engine).format_with_picture()
    return chat_ids(engine.tokenizer, body, messages, offered, chat_format)


def _chat_requests(
    engine: ChatEngine, body: ChatBody, grammars: Grammars
) -> tuple[list[tuple[list[int], GenerationOptions]], Grammar | None]:
    """Returns the requests, and the grammar of the answers if they have one."""
    tokenizer, chat_format = engine.tokenizer, engine.tokenizer.chat_format
    choices = body.choices(lambda **settings: engine.model.turn_options(tokenizer, **settings))
    url = picture_url(body)
    picture = None if url is None else picturing(engine).place_picture(tokenizer, read_base64(url))
    ids = prompt_ids(engine, body)
    before = len(ids)
    schema, forced = body.schema_wanted(), body.forced_names()
    grammar = None if schema is None else grammars.compile(tokenizer, schema)
    if grammar is not None:
        ids = ids + chat_format.answer_start(tokenizer)
    starts = [chat_format.call_start(tokenizer, name) for name in forced or ()]
    calls = compile_arguments(grammars, tokenizer, body.schemas_of_calls())
    next_message = tokenizer.get_command(chat_format.answer_token) if calls else 0
    for options in choices:
        options.picture = picture
        options.logits_processor = [
            *body.penalties(before, engine.model.config.vocab_size),
            *([StartWith(starts, before)] if forced is not None else []),
            *([FollowCalls(calls, before, next_message)] if calls else []),
            *([grammar.processor(len(ids))] if grammar is not None else []),
        ]
    return [(ids, options) for options in choices], grammar


async def _chat_whole(
    service: Service, body: ChatBody, streams: list[Stream], answers: list[AssistantMessage], head: dict[str, Any]
) -> Response:
    usage, choices, read = Usage(), [], None
    with service.limited(streams):
        for index, (stream, answer) in enumerate(zip(streams, answers, strict=True)):
            tokens: list[TokenLogprob] = []
            reason: str = "stop"
            async for step in service.steps(stream):
                answer.take(step)
                tokens += told(service.engine, step)
                reason = step.finish_reason or reason
                usage.see(index, step)
                read = step.prompt_logprobs or read
            message: dict[str, Any] = {"role": "assistant", "content": answer.content}
            if answer.calls:
                message["content"] = answer.content or None
                message |= _whole_calls(body, answer.calls)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": chat_logprobs(service.engine, tokens) if body.logprobs else None,
                    "finish_reason": _finish_reason(body, answer, reason),
                }
            )
    body_of_prompt = {}
    if body.prompt_logprobs is not None:
        body_of_prompt["prompt_logprobs"] = prompt_logprobs(service.engine, read, body.prompt_logprobs)
    return Json(head | {"choices": choices, "usage": usage.body()} | body_of_prompt)


def _whole_calls(body: ChatBody, calls: list[Call]) -> dict[str, Any]:
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    if body.functions is not None:
        return {"function_call": functions[0]}
    pairs = zip(calls, functions, strict=True)
    return {"tool_calls": [{"id": call.id, "type": "function", "function": function} for call, function in pairs]}


def _finish_reason(body: ChatBody, answer: AssistantMessage, reason: str) -> str:
    if not answer.calls or reason != "stop":
        return reason
    return "function_call" if body.functions is not None else "tool_calls"


async def _chat_chunks(
    service: Service, body: ChatBody, streams: list[Stream], answers: list[AssistantMessage], head: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    usage = Usage()
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    head |= {"object": "chat.completion.chunk"} | ({"usage": None} if wants_usage else {})

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return head | {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    with service.limited(streams):
        for index in range(len(streams)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, step in merged(service, streams):
            usage.see(index, step)
            answer = answers[index]
            change = answer.take(step)
            tokens = told(service.engine, step) if body.logprobs else []
            logprobs = chat_logprobs(service.engine, tokens) if tokens else None
            for delta in _deltas(body, change) or ([{"content": ""}] if tokens else []):
                yield chunk(index, delta, None, logprobs)
                logprobs = None
            if step.finish_reason is not None:
                yield chunk(index, {}, _finish_reason(body, answer, step.finish_reason))
        if wants_usage:
            yield head | {"choices": [], "usage": usage.body()}


def _deltas(body: ChatBody, change: Change) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"content": change.content}] if change.content else []
    for index, call, arguments, is_new in change.calls:
        function = {"name": call.name, "arguments": arguments} if is_new else {"arguments": arguments}
        if body.functions is not None:
            deltas.append({"function_call": function})
        else:
            start = {"id": call.id, "type": "function"} if is_new else {}
            deltas.append({"tool_calls": [{"index": index, **start, "function": function}]})
    return deltas
