"""Replicas of the server with Ray Serve, on one machine or a cluster: for ChatGLM-6B and models with prefixes.

`serve run chatglm.serving.ray_app:app model=FOLDER max_replicas=4`; docs/serving.md has the settings.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import Response

from .relay import answer, relay


class Settings(BaseModel):
    """The `name=value` arguments of `serve run`. A replica takes `max_batch` answers at once and `max_queue` wait."""

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = None
    adapter: str | None = None
    quantize: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    api_key: str | None = None
    timeout: float = 600.0
    max_batch: int = 16
    max_queue: int = 64
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    cpus: float = 1.0
    gpus: float = 0.0


class Replica:
    """One server of the model, without its port."""

    def __init__(self, settings: Settings) -> None:
        from pathlib import Path

        from .. import load
        from .app import create_app
        from .chat_engine import ChatEngine

        model, tokenizer = load(
            settings.model, settings.device, settings.dtype, quantize=settings.quantize, adapter=settings.adapter
        )
        self._engine = ChatEngine(model, tokenizer, max_batch=settings.max_batch, max_queue=settings.max_queue)
        self._app = create_app(
            lambda: self._engine,
            [settings.name or Path(settings.model).name],
            api_key=settings.api_key,
            timeout=settings.timeout,
        )
        self._app.state.service.loaded = self._engine
        self._app.state.grammars.prepare(tokenizer)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Any, None]:
        async for part in answer(self._app, scope, body):
            yield part

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine has stopped")


class Front:
    """Takes the requests; needs no model and no core of its own."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        async def ask(scope: dict[str, Any], body: bytes) -> AsyncGenerator[Any, None]:
            parts = self._replicas.answer.remote(scope, body)
            try:
                async for part in parts:
                    yield part
            finally:
                parts.cancel()  # after the end, this does nothing

        return await relay(request, ask, (RayError, RayServeException))


def app(arguments: Settings | dict[str, Any]) -> Any:
    """What `serve run` starts: the front, and as many replicas as there is work for.

    Args:
        arguments: the settings, or their texts by name.

    Raises:
        pydantic.ValidationError: a setting is unknown, missing or no value of its type.
    """
    settings = arguments if isinstance(arguments, Settings) else Settings(**arguments)
    room = settings.max_batch + settings.max_queue
    replicas = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=room,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch,
        },
        health_check_period_s=10,
        graceful_shutdown_timeout_s=60,
    )
    front = serve.deployment(Front, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
    return front.bind(replicas.bind(settings))
