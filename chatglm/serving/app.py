"""The HTTP application, and a server that shuts down gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from . import legacy, openai, tokens
from .chat_engine import ChatEngine
from .clients import Clients
from .connections import ACCEPTED, HEADER_SECONDS, PENDING, Connection, Limits, affordable_connections
from .errors import ApiError, bad_request, validation_message
from .gate import Gate
from .grammar import Grammars
from .logs import limit_lines
from .openai.responses_store import ResponseStore
from .service import Json, Service

#: Maximum size of a request in bytes. A context of 32k tokens in Chinese is about 200 kB.
MAX_BODY = 4 * 2**20
#: The field of the text that is too long, where it is not `messages`.
TEXT_FIELDS = {"/": "prompt", "/stream": "prompt", "/v1/completions": "prompt", "/v1/responses": "input"}
#: What a client can make us log: requests, connections that fail, HTTP that is none.
LOGGERS = ("chatglm.serving", "asyncio", "uvicorn.error")


def create_app(
    load: Callable[[], ChatEngine],
    names: Sequence[str],
    *,
    api_key: str | None = None,
    api_keys: Mapping[str, str] | None = None,
    cors_origins: Sequence[str] = (),
    timeout: float = 600.0,
    max_body: int = MAX_BODY,
    log_text: bool = False,
    adapters: Sequence[str] = (),
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """Creates the application.

    Args:
        load: makes the engine; called in a thread when the server starts, while /health says 503.
        names: the model's names for clients.
        api_key: required as a bearer token on every route but /health.
        api_keys: the same for named clients, name -> key; each name has a fair share of the queue.
        cors_origins: web pages of these origins may use the API.
        timeout: seconds that an answer may take.
        log_text: also log the text of requests.
        adapters: the model's adapters that clients may request by name; the first answers requests that name no model.
        on_failure: called with the error when `load` fails.

    Raises:
        ValueError: the model and an adapter have the same name, or an API key is empty.
    """
    keys = {**(api_keys or {}), **({} if api_key is None else {"": api_key})}
    Clients(keys)  # for its errors
    service, grammars = Service(names, timeout, adapters), Grammars()

    def start() -> None:
        try:
            engine = load()
            grammars.prepare(engine.tokenizer)
            service.loaded = engine
        except Exception as error:
            service.failure = error
            if on_failure is not None:
                on_failure(error)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # A daemon thread: stopping the server does not wait for a large model to load.
        threading.Thread(target=start, name="chatglm-load", daemon=True).start()
        yield
        if service.loaded is not None:
            await asyncio.to_thread(service.loaded.close)

    app = FastAPI(title="ChatGLM", lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.state.service, app.state.grammars = service, grammars
    app.state.responses = ResponseStore()
    app.include_router(openai.router)
    app.include_router(legacy.router)
    app.include_router(tokens.router)

    @app.get("/health", tags=["server"])
    async def health() -> Response:
        """200 while the server takes requests, else 503."""
        if service.failure is not None:
            return Json({"status": "failed"}, 503)
        if service.loaded is None:
            return Json({"status": "loading"}, 503)
        return Json({"status": "ok"}) if service.loaded.is_alive else Json({"status": "stopped"}, 503)

    @app.get("/metrics", tags=["server"])
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return PlainTextResponse(service.metrics.text(service.loaded), media_type="text/plain; version=0.0.4")

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        fields = error.body["error"]
        if fields["code"] == "context_length_exceeded":
            fields["param"] = TEXT_FIELDS.get(request.scope["path"], fields["param"])
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = validation_message(list(error.errors()))
        return bad_request(request.scope["path"], message, param).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        known = {404: f"there is no {path} here", 405: f"{path} takes no {request.method}"}
        message = known.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    paths = frozenset(app.openapi()["paths"])
    app.add_middleware(
        Gate,
        keys=keys or None,
        max_body=max_body,
        timeout=timeout,
        metrics=service.metrics,
        log_text=log_text,
        paths=lambda: paths,
    )
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    return app


class Server(uvicorn.Server):
    """A uvicorn server that ends its answers when it stops: running ones have `grace` seconds to finish."""

    def __init__(
        self, app: FastAPI, host: str, port: int, grace: float = 6.0, header_seconds: float = HEADER_SECONDS
    ) -> None:
        limits = Limits(affordable_connections(), header_seconds)
        protocol: Any = partial(Connection, limits)
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=protocol,
                ws="none",
                backlog=ACCEPTED,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(grace) + 3,
            )
        )
        self._app, self._grace = app, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        limit_lines(LOGGERS)
        await super().startup(sockets)
        for listening in (one for server in getattr(self, "servers", []) for one in server.sockets):
            with listening.dup() as same:
                same.listen(PENDING)  # uvicorn uses one number for this and for what is accepted at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        engine: Any = self._app.state.service.loaded
        if engine is not None:
            engine.close(self._grace, wait=False)
        await super().shutdown(sockets)

    @property
    def port(self) -> int:
        """The port on which it listens, once started; for port 0, the system has chosen one."""
        return int(self.servers[0].sockets[0].getsockname()[1])
