"""The routes of responses: chat completions in the form of OpenAI's newer API, which the server keeps for a while."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...engine import CLIENT, Stream
from ..answers import AssistantMessage
from ..errors import ApiError
from ..service import EventStream, Json, Service, in_thread, service_of, unless_gone
from .chat import start_chat
from .chat_body import ChatBody
from .logprobs import chat_logprobs, told
from .responses_body import ResponsesBody
from .responses_output import Event, ResponseOutput
from .responses_store import Kept, ResponseStore
from .streams import Usage

router = APIRouter()

#: The parameters of a response that a chat completion has under another name.
NAMES = {"messages": "input", "response_format": "text", "max_completion_tokens": "max_output_tokens"}


def _store_of(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


@router.post("/responses")
async def create_response(request: Request, body: ResponsesBody) -> Response:
    """Answers text or a list of items; `previous_response_id` continues a response that is still kept."""
    service, store, owner = service_of(request), _store_of(request), CLIENT.get()
    service.adapter_of(body.model)  # for its errors
    before = _before(store, body)
    new, chat = await in_thread(_chat_of, body, before)
    try:
        (stream,), (answer,) = await start_chat(request, chat)
    except ApiError as error:
        details = error.body["error"]
        details["param"] = NAMES.get(details["param"] or "", details["param"])
        raise
    output = ResponseOutput(body, service.names[0])

    def keep() -> None:
        if body.store is not False:
            store.put(owner, output.response, before, [*new, output.message()])

    async def events() -> AsyncGenerator[Event, None]:
        for event in output.begin():
            yield event
        try:
            async with contextlib.aclosing(_steps(service, body, stream, answer, output)) as steps:
                async for event in steps:
                    if event["type"] in ("response.completed", "response.incomplete"):
                        keep()
                    yield event
        except ApiError as error:
            for event in output.fail(error):
                yield event

    async def whole() -> None:
        async with contextlib.aclosing(_steps(service, body, stream, answer, output)) as steps:
            async for _ in steps:
                pass
        keep()

    if body.stream:
        return EventStream(events(), named=True)
    await unless_gone(request, whole())
    return Json(output.response)


def _chat_of(body: ResponsesBody, before: Kept | None) -> tuple[list[dict[str, Any]], ChatBody]:
    """Returns the new chat messages, and the body of the chat completion that answers the whole conversation."""
    new = body.new_messages()
    return new, body.chat_body([*(before.messages if before else ()), *new])


def _before(store: ResponseStore, body: ResponsesBody) -> Kept | None:
    name = body.previous_response_id
    if name is None:
        return None
    kept = store.get(CLIENT.get(), name)
    if kept is None:
        reason = f"there is no response {name[:80]!r} (any more): send the whole conversation as input"
        raise ApiError(400, reason, param="previous_response_id", code="previous_response_not_found")
    return kept


async def _steps(
    service: Service, body: ResponsesBody, stream: Stream, answer: AssistantMessage, output: ResponseOutput
) -> AsyncGenerator[Event, None]:
    """Yields the events of an answer, from its first token to its end."""
    usage, reason = Usage(), "stop"
    with service.limited([stream]):
        async for step in service.steps(stream):
            usage.see(0, step)
            tokens: list[dict[str, Any]] = []
            if body.tells_logprobs():
                tokens = chat_logprobs(service.engine, told(service.engine, step))["content"]
            for event in output.take(answer.take(step), tokens):
                yield event
            reason = step.finish_reason or reason
    for event in output.end(reason, usage.body()):
        yield event


@router.get("/responses/{name}")
async def response(request: Request, name: str, stream: bool = False) -> Response:
    """A response that is still kept."""
    if stream:
        raise ApiError(400, "only a new response can be streamed", param="stream", code="unsupported_parameter")
    kept = _store_of(request).get(CLIENT.get(), name)
    if kept is None:
        raise _missing(name)
    return Json(kept.response)


@router.delete("/responses/{name}")
async def delete_response(request: Request, name: str) -> Response:
    """Forgets a response. Responses that continue it keep its conversation."""
    if not _store_of(request).delete(CLIENT.get(), name):
        raise _missing(name)
    return Json({"id": name, "object": "response", "deleted": True})


def _missing(name: str) -> ApiError:
    return ApiError(404, f"there is no response {name[:80]!r} (any more)", code="response_not_found")
