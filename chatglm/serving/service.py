"""What the routes share: the engine, model names, time limits, server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..conversation import ChatFormat
from ..engine import EngineStep, Stream
from .chat_engine import ChatEngine
from .clients import in_lane
from .errors import ApiError
from .metrics import Metrics

Result = TypeVar("Result")


#: Owners and suffixes of the published models' names, as in THUDM/chatglm3-6b-32k.
_OWNERS, _SUFFIXES = ("THUDM", "zai-org", "ZhipuAI"), ("", "-32k", "-128k", "-int4", "-int8", "-int4-qe")


def is_published_name(name: str, chat_format: ChatFormat) -> bool:
    """Whether this is a name under which a chat model of this generation was published, with or without its owner."""
    owner, slash, bare = name.rpartition("/")
    if slash and owner.lower() not in {one.lower() for one in _OWNERS}:
        return False
    return bare.lower() in {f"{chat_format.model_name.lower()}{suffix}" for suffix in _SUFFIXES}


class Service:
    """The state of one server.

    Args:
        names: the model's names for clients; the first is listed first.
        timeout: seconds that one request may take.
        adapters: the model's adapters that clients may request as models; the first answers if a request names none.

    Raises:
        ValueError: the model and an adapter have the same name.
    """

    def __init__(self, names: Sequence[str], timeout: float, adapters: Sequence[str] = ()) -> None:
        both = sorted(set(names) & set(adapters))
        if both:
            raise ValueError(f"the model and an adapter are both called {both[0]!r}: give one of them another name")
        self.names, self.adapters, self.timeout = [*adapters, *names], list(adapters), timeout
        self.created = int(time.time())
        self.metrics = Metrics(names[0])
        self.loaded: ChatEngine | None = None
        self.failure: BaseException | None = None

    @property
    def engine(self) -> ChatEngine:
        """The engine. Raises ApiError (503) while it is not loaded."""
        if self.loaded is None:
            reason = "the model is still loading" if self.failure is None else "the model could not be loaded"
            raise ApiError(503, reason, code="unavailable", headers={"Retry-After": "5"})
        return self.loaded

    def check_name(self, name: str) -> str:
        """Returns the name. Raises ApiError (404) if no model has it, and (503) if that is not known yet.

        The published names of the model's generation are other names of the model: clients have them built in.
        """
        if name not in self.names and not is_published_name(name, self.engine.tokenizer.chat_format):
            message = f"there is no model {name!r} here, only {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def adapter_of(self, name: str | None) -> str | None:
        """Returns the adapter for a request with this `model`. Raises ApiError (404) for an unknown name."""
        name = self.names[0] if name is None else self.check_name(name)
        if name in self.adapters:
            return name
        # A checkpoint may have a prefix of its own.
        return next((one for one in self.engine.model.adapter_names if one not in self.adapters), None)

    async def steps(self, stream: Stream) -> AsyncIterator[EngineStep]:
        """Yields the steps of an answer and measures them. Raises ApiError for whatever ends it early."""
        before: EngineStep | None = None
        try:
            async for step in stream:
                self._measure(step, before)
                before = step
                if step.finish_reason == "cancelled":
                    raise ApiError(504, f"the answer took longer than {self.timeout:g} s", code="timeout")
                yield step
        except ApiError:
            raise
        except Exception as error:
            raise ApiError.of(error) from error

    def _measure(self, step: EngineStep, before: EngineStep | None) -> None:
        if before is None and step.finish_reason != "cancelled":
            self.metrics.queue.add(step.queue_seconds)
        if step.token_id is not None and before is None:
            self.metrics.first_token.add(step.seconds)
        elif step.token_id is not None and before is not None:
            self.metrics.between_tokens.add(step.seconds - before.seconds)
        if step.finish_reason in ("stop", "length"):
            self.metrics.answer.add(step.seconds)

    @contextlib.contextmanager
    def limited(self, streams: Sequence[Stream]) -> Iterator[None]:
        """Cancels the answers when their time is up, or when nobody waits for them any more."""

        def cancel() -> None:
            for stream in streams:
                stream.cancel()

        timer = asyncio.get_running_loop().call_later(self.timeout, cancel)
        try:
            yield
        finally:
            timer.cancel()
            cancel()


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def in_thread(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Runs a function that may take a while (encoding long texts) in a thread; its errors become ApiError."""
    try:
        async with in_lane():
            return await asyncio.to_thread(function, *args, **kwargs)
    except Exception as error:
        raise ApiError.of(error) from error


def submit(
    engine: ChatEngine,
    requests: Sequence[Any],
    adapter: str | None,
    top_logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    answers: bool = True,
) -> list[Stream]:
    """`engine.submit_all` with its errors as ApiError."""
    try:
        return engine.submit_all(requests, top_logprobs, adapter, prompt_logprobs, answers)
    except Exception as error:
        raise ApiError.of(error) from error


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Returns the result of `work`, which is cancelled when the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def dumps(value: Any) -> str:
    """Returns JSON that UTF-8 can encode: a lone surrogate, which a model may write as an escape, stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


async def _events(items: AsyncGenerator[Any, None], done: str | None, named: bool) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(items):
        try:
            async for item in items:
                yield (f"event: {item['type']}\n" if named else "") + f"data: {dumps(item)}\n\n"
        except ApiError as error:
            yield f"data: {dumps(error.body)}\n\n"
    if done is not None:
        yield f"data: {done}\n\n"


class EventStream(StreamingResponse):
    """JSON values as server-sent events; an ApiError among them becomes the last one.

    Args:
        items: closed when the client disconnects.
        done: text of the last event.
        named: each value has the name of its event under "type".
    """

    def __init__(self, items: AsyncGenerator[Any, None], done: str | None = None, named: bool = False) -> None:
        self._generator = _events(items, done, named)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._generator, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._generator):
            await super().__call__(scope, receive, send)
