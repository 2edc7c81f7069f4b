"""OpenAI's routes: models, chat completions with tools, completions, embeddings."""

from __future__ import annotations

import asyncio
import base64
import re
import time
import uuid
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from ..conversation import encode_chat, stop_token_ids
from ..generation import GenerationOptions
from .answers import Answer, Call, Change, StartWith
from .engine import Engine, EngineStep, Stream, TokenLogprob
from .errors import ApiError
from .grammar import Grammar
from .service import EventStream, Json, Service, in_thread, service_of, submit, unless_gone

router = APIRouter(prefix="/v1", tags=["OpenAI"])

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31)]
#: Lists and objects of a request inside each other; what copies and prints them has Python's stack only.
MOST_NESTED = 100
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class Body(BaseModel):
    """A request. What we do not know is an error: an option that is ignored in silence is worse."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, values: Any) -> Any:
        return check_text(values)


def check_text(values: Any) -> Any:
    """ValueError for what JSON can spell and we cannot take: half of a surrogate pair, and too deep a nest."""
    pending = [(values, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError("a string holds half of a surrogate pair, which is no text") from error
        elif isinstance(value, (dict, list)):
            if depth == MOST_NESTED:
                raise ValueError(f"more than {MOST_NESTED} lists and objects inside each other")
            inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            pending += [(part, depth + 1) for part in inside]
    return values


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """Clients send back what they got, so keys that only answers have may be there, empty."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function


class Named(BaseModel):
    name: str


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: Named


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    """`strict` says nothing new here: an answer always follows its schema."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """What both kinds of completions take."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    max_tokens: Count | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted where they ask for nothing.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    def check(self) -> None:
        """Raises ApiError for what cannot be served."""
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                reason = f"{name} is not supported; repetition_penalty is" if name != "logit_bias" else None
                raise ApiError(400, reason or f"{name} is not supported", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are for stream = true", param="stream_options")
        if (isinstance(self.stop, str) and not self.stop) or (isinstance(self.stop, list) and "" in self.stop):
            raise ApiError(400, "a stop string must not be empty", param="stop")

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of `GenerationOptions`, where given."""
        values = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "max_new_tokens": self.max_tokens,
            "stop_strings": self.stop, "seed": self.seed,
        }  # fmt: skip
        return {name: value for name, value in values.items() if value is not None}

    def choices(self, make: Callable[..., GenerationOptions]) -> list[GenerationOptions]:
        """The options of every choice: with a seed, each has its own."""
        settings, count = self.settings(), self.n or 1
        if self.seed is None:
            return [make(**settings) for _ in range(count)]
        return [make(**settings | {"seed": (self.seed + i + 2**63) % 2**64 - 2**63}) for i in range(count)]


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = None
    function_call: Literal["none", "auto"] | Named | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def check(self) -> None:
        super().check()
        if self.schema_wanted() is not None and self.offered():
            reason = "response_format and tools exclude each other: leave one out, or set tool_choice to none"
            raise ApiError(400, reason, param="response_format", code="unsupported_parameter")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs need logprobs = true", param="top_logprobs")
        if self.functions and self.tools:
            raise ApiError(400, "give tools or functions (the older name), not both", param="functions")
        if self.messages[-1].role == "assistant":
            raise ApiError(400, "the last message is the assistant's: there is nothing to answer", param="messages")
        forced = self.forced_names()
        offered = {function.name for function in self.offered()}
        if forced is not None and not (offered and offered.issuperset(forced)):
            names = ", ".join(forced) or "a tool"
            raise ApiError(400, f"tool_choice asks for {names}, which is not among the tools", param="tool_choice")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.max_completion_tokens is not None:
            settings["max_new_tokens"] = self.max_completion_tokens
        return settings

    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema that the answer has to follow, if it has to. Raises ApiError (400) where it is not there."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "object"}
        if wanted.json_schema is None:
            raise ApiError(400, "response_format json_schema needs a json_schema", param="response_format")
        return wanted.json_schema.content

    def offered(self) -> list[Function]:
        """The functions that the model may call."""
        if self.tool_choice == "none" or self.function_call == "none":
            return []
        return list(self.functions or []) or [tool.function for tool in self.tools or []]

    def forced_names(self) -> list[str] | None:
        """The names one of which the answer has to call, if it has to."""
        if self.tool_choice == "required":
            return [function.name for function in self.offered()]
        if isinstance(self.tool_choice, ToolChoice):
            return [self.tool_choice.function.name]
        return [self.function_call.name] if isinstance(self.function_call, Named) else None


# ---------------------------------------------------------------------------------------------------- models


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "chatglm"}


@router.get("/models")
async def models(request: Request) -> Any:
    service = service_of(request)
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Any:
    service = service_of(request)
    service.check_name(name)
    return _model(service, name)


# ---------------------------------------------------------------------------------------------------- chat


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatBody) -> Response:
    service = service_of(request)
    engine = service.engine
    adapter = service.adapter_of(body.model)
    body.check()
    schema = body.schema_wanted()
    grammar = None
    if schema is not None:
        grammar = await in_thread(request.app.state.grammars.compile, engine.tokenizer, schema)
    requests = await in_thread(_chat_requests, engine, body, grammar)
    streams = submit(engine, requests, adapter, (body.top_logprobs or 0) if body.logprobs else None)
    tools = [function.name for function in body.offered()]
    at_most_one = body.parallel_tool_calls is False or body.functions is not None
    answers = [
        grammar.answer(engine.tokenizer, options) if grammar else Answer(engine.tokenizer, tools, at_most_one)
        for _, options in requests
    ]
    head = _head("chatcmpl", "chat.completion", service, body)
    if body.stream:
        return EventStream(_chat_chunks(service, body, streams, answers, head), done="[DONE]")
    return await unless_gone(request, _chat_whole(service, body, streams, answers, head))


def _head(prefix: str, kind: str, service: Service, body: Sampling) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model or service.names[0],
    }


def _chat_requests(
    engine: Engine, body: ChatBody, grammar: Grammar | None
) -> list[tuple[list[int], GenerationOptions]]:
    tokenizer = engine.tokenizer
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    offered = [function.model_dump(exclude_none=True, exclude={"strict"}) for function in body.offered()]
    if offered and tokenizer.chatglm_version != 3:
        raise ApiError(
            400, "this model was not trained to call tools, ChatGLM3 is: describe them in the prompt", param="tools"
        )
    choices = body.choices(lambda **settings: engine.model.turn_options(tokenizer, **settings))
    ids = encode_chat(tokenizer, messages, offered or None)
    forced = body.forced_names()
    if forced is not None:
        fence = tokenizer.encode_text("```python\ntool_call(")
        starts = [tokenizer.encode_text(f"{name}\n") + fence for name in forced]
        for options in choices:
            options.logits_processor = [StartWith(starts, len(ids))]
    if grammar is not None:
        if tokenizer.chatglm_version == 3:
            ids = ids + tokenizer.encode_text("\n")  # what begins an answer that calls no tool
        for options in choices:
            options.logits_processor = [grammar.processor(len(ids))]
    return [(ids, options) for options in choices]


async def _chat_whole(
    service: Service, body: ChatBody, streams: list[Stream], answers: list[Answer], head: dict[str, Any]
) -> Response:
    usage, choices = Usage(), []
    with service.limited(streams):
        for index, (stream, answer) in enumerate(zip(streams, answers, strict=True)):
            tokens: list[TokenLogprob] = []
            reason: str = "stop"
            async for step in service.steps(stream):
                answer.take(step)
                tokens += _told(service.engine, step)
                reason = step.finish_reason or reason
                usage.see(index, step)
            message: dict[str, Any] = {"role": "assistant", "content": answer.content}
            if answer.calls:
                message["content"] = answer.content or None
                message |= _whole_calls(body, answer.calls)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": _logprobs(service.engine, tokens) if body.logprobs else None,
                    "finish_reason": _finish_reason(body, answer, reason),
                }
            )
    return Json(head | {"choices": choices, "usage": usage.body()})


def _whole_calls(body: ChatBody, calls: list[Call]) -> dict[str, Any]:
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    if body.functions is not None:
        return {"function_call": functions[0]}
    pairs = zip(calls, functions, strict=True)
    return {"tool_calls": [{"id": call.id, "type": "function", "function": function} for call, function in pairs]}


def _finish_reason(body: ChatBody, answer: Answer, reason: str) -> str:
    if not answer.calls or reason != "stop":
        return reason
    return "function_call" if body.functions is not None else "tool_calls"


async def _chat_chunks(
    service: Service, body: ChatBody, streams: list[Stream], answers: list[Answer], head: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    usage = Usage()
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    head |= {"object": "chat.completion.chunk"} | ({"usage": None} if wants_usage else {})

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return head | {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    with service.limited(streams):
        for index in range(len(streams)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, step in _merged(service, streams):
            usage.see(index, step)
            answer = answers[index]
            change = answer.take(step)
            tokens = _told(service.engine, step) if body.logprobs else []
            logprobs = _logprobs(service.engine, tokens) if tokens else None
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


class Usage:
    """Token counts of a request: its prompt once, the answers of all choices."""

    def __init__(self) -> None:
        self._steps: dict[int, EngineStep] = {}

    def see(self, index: int, step: EngineStep) -> None:
        self._steps[index] = step

    def body(self, prompts: int = 1) -> dict[str, Any]:
        """`prompts`: how many there were; each has the same number of choices, one after the other."""
        steps = [self._steps[index] for index in sorted(self._steps)]
        first = steps[:: max(1, len(steps) // prompts)]
        prompt, completion = sum(s.prompt_tokens for s in first), sum(s.completion_tokens for s in steps)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in first)},
        }


async def _merged(service: Service, streams: Sequence[Stream]) -> AsyncIterator[tuple[int, EngineStep]]:
    """The steps of several answers as they come."""
    if len(streams) == 1:
        async for step in service.steps(streams[0]):
            yield 0, step
        return
    arrived: asyncio.Queue[tuple[int, EngineStep | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for step in service.steps(stream):
                arrived.put_nowait((index, step))
            arrived.put_nowait((index, None))
        except Exception as error:  # handed on to the reader
            arrived.put_nowait((index, error))

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


# ---------------------------------------------------------------------------------------------------- logprobs

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _told(engine: Engine, step: EngineStep) -> list[TokenLogprob]:
    """The token's probabilities, unless it is one that ends the answer: those are no part of it."""
    if step.logprob is None or step.logprob.token_id in stop_token_ids(engine.tokenizer):
        return []
    return [step.logprob]


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """What a token contributes to the text; of a character over several tokens each has its bytes."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    byte = _BYTE.fullmatch(piece or "")
    if byte:
        return bytes([int(byte[1], 16)])
    if tokenizer.chatglm_version != 1 and piece:
        return piece.replace("\u2581", " ").encode()
    return tokenizer.decode([token_id], clean_up_tokenization_spaces=False).encode()


def _token(engine: Engine, token_id: int, logprob: float) -> dict[str, Any]:
    part = token_bytes(engine.tokenizer, token_id)
    return {"token": part.decode(errors="replace"), "logprob": logprob, "bytes": list(part)}


def _logprobs(engine: Engine, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(engine, token.token_id, token.logprob)
        | {"top_logprobs": [_token(engine, other, value) for other, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


# ---------------------------------------------------------------------------------------------------- completions


class CompletionBody(Sampling):
    prompt: str | TokenIds | list[str] | list[TokenIds]
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
        """One or several prompts are the same to us."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


@router.post("/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Goes on with a text as it is, without the format of a conversation: what base models are for."""
    service = service_of(request)
    engine = service.engine
    adapter = service.adapter_of(body.model)
    body.check()
    requests, echoes = await in_thread(_completion_requests, engine, body)
    streams = submit(engine, requests, adapter, body.logprobs)
    head = _head("cmpl", "text_completion", service, body)
    if body.stream:
        return EventStream(_completion_chunks(service, body, streams, echoes, head), done="[DONE]")
    return await unless_gone(request, _completion_whole(service, body, streams, echoes, head))


def _completion_requests(
    engine: Engine, body: CompletionBody
) -> tuple[list[tuple[list[int], GenerationOptions]], list[str]]:
    tokenizer, model = engine.tokenizer, engine.model
    defaults = dict(model.sampling_defaults) | {"eos_token_id": stop_token_ids(tokenizer)}
    requests, echoes = [], []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            ids = list(tokenizer(prompt)["input_ids"])
        else:
            ids = list(prompt)
        settings = defaults if body.max_tokens is not None else defaults | {"max_new_tokens": 16}  # OpenAI's default
        for options in body.choices(lambda settings=settings, **given: GenerationOptions(**settings | given)):
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
                tokens += _told(service.engine, step)
                reason = step.finish_reason
                usage.see(index, step)
            logprobs = _old_logprobs(service.engine, tokens, 0)[0] if body.logprobs is not None else None
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
        async for index, step in _merged(service, streams):
            usage.see(index, step)
            tokens = _told(service.engine, step)
            logprobs = None
            if tokens:
                logprobs, offsets[index] = _old_logprobs(service.engine, tokens, offsets[index])
            if step.delta or logprobs or step.finish_reason:
                choice = {
                    "index": index, "text": step.delta, "logprobs": logprobs, "finish_reason": step.finish_reason,
                }  # fmt: skip
                yield head | {"choices": [choice]}
        if wants_usage:
            yield head | {"choices": [], "usage": usage.body(len(body.prompts()))}


def _old_logprobs(engine: Engine, tokens: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
    """The format of completions, and the offset behind these tokens."""
    texts = [_token(engine, token.token_id, 0.0)["token"] for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops = [{_token(engine, other, 0.0)["token"]: value for other, value in token.top} for token in tokens]
    values = [token.logprob for token in tokens]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset


# ---------------------------------------------------------------------------------------------------- embeddings


class EmbeddingsBody(Body):
    model: str | None = None
    input: (
        str | TokenIds | Annotated[list[str], Field(max_length=256)] | Annotated[list[TokenIds], Field(max_length=256)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingsBody) -> Response:
    """The mean of the last hidden states over the tokens, with length 1.

    The models were not trained for it: good enough to group similar texts, not for a search engine.
    """
    service = service_of(request)
    engine = service.engine
    adapter = service.adapter_of(body.model)
    if body.dimensions is not None:
        raise ApiError(400, "dimensions are as the model has them", param="dimensions", code="unsupported_parameter")
    given = body.input
    inputs: list[Any] = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else list(given)
    prompts = await in_thread(_embedding_ids, engine, inputs)
    vectors = await unless_gone(request, _embed_all(service, engine, prompts, adapter))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Json({"object": "list", "data": data, "model": body.model or service.names[0], "usage": usage})


def _embedding_ids(engine: Engine, inputs: list[Any]) -> list[list[int]]:
    result = []
    for index, text in enumerate(inputs):
        ids = list(engine.tokenizer(text)["input_ids"]) if isinstance(text, str) else list(text)
        if not 0 < len(ids) <= engine.context:
            reason = f"input[{index}] has {len(ids)} tokens; from 1 to {engine.context} can be read"
            raise ApiError(400, reason, param="input", code="context_length_exceeded" if ids else None)
        if max(ids) >= engine.model.config.vocab_size:
            raise ApiError(400, f"input[{index}] holds ids that are no tokens of this model", param="input")
        engine.model.positions_from(torch.tensor([ids]), 0)  # for its errors
        result.append(ids)
    return result


async def _embed_all(
    service: Service, engine: Engine, prompts: list[list[int]], adapter: str | None
) -> list[list[float]]:
    """One text after the other, so that answers go on in between."""
    vectors = []
    for ids in prompts:
        try:
            future = engine.call(partial(_embed, engine, ids), adapter)
            vectors.append(await asyncio.wait_for(asyncio.wrap_future(future), service.timeout))
        except asyncio.TimeoutError as error:
            raise ApiError(504, f"this took longer than {service.timeout:g} s", code="timeout") from error
        except Exception as error:
            raise ApiError.of(error) from error
    return vectors


def _embed(engine: Engine, ids: list[int]) -> list[float]:
    inputs = torch.tensor([ids], device=engine.model.device)
    hidden = engine.model.transformer(input_ids=inputs, use_cache=False).last_hidden_state[0].float().mean(0)
    vector = hidden / hidden.norm().clamp(min=1e-12)
    if not bool(torch.isfinite(vector).all()):
        raise ApiError(500, "the model gave NaN or infinite numbers for this text", code="non_finite_logits")
    return vector.tolist()


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    return base64.b64encode(array("f", vector).tobytes()).decode() if encoding == "base64" else vector
