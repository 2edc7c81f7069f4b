"""Errors as clients get them: a status, and a body in OpenAI's shape. Never a traceback."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ..engine import EngineStoppedError, PromptTooLongError, QueueFullError
from ..generation import NonFiniteLogitsError

log = logging.getLogger("chatglm.serving")

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(Exception):
    """The error response to a request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """Converts what the layers below raised."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFullError):
            # The `openai` package reads the first; all others the second, in whole seconds. Neither is too early.
            headers = {
                "Retry-After-Ms": str(max(100, math.ceil(1000 * error.retry_after))),
                "Retry-After": str(max(1, math.ceil(error.retry_after))),
            }
            return cls(429, str(error), code="queue_full", headers=headers)
        if isinstance(error, EngineStoppedError):
            return cls(503, str(error), code="unavailable", headers={"Retry-After": "10"})
        if isinstance(error, PromptTooLongError):
            return cls(400, str(error), param="messages", code="context_length_exceeded")
        if isinstance(error, NonFiniteLogitsError):
            return cls(500, str(error), code="non_finite_logits")
        if isinstance(error, (ValueError, TypeError)):
            return cls(400, str(error))
        return cls.internal(error)

    @classmethod
    def internal(cls, error: BaseException) -> ApiError:
        """A fault of the server: the log gets the details, the client does not."""
        log.error("a request failed", exc_info=error)
        return cls(500, "the server could not answer; its log says why", code="internal_error")

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(path: str, message: str, param: str | None = None) -> ApiError:
    """What is wrong with a body: 400 for OpenAI's routes, 422 for the originals', whose clients know that."""
    return ApiError(400 if path.startswith("/v1") else 422, message, param=param)


def validation_message(errors: list[Any]) -> tuple[str, str | None]:
    """Returns pydantic's errors as one readable sentence, and the first parameter concerned."""
    parts = []
    for error in errors[:3]:
        place = ".".join(_names(error))
        if not place and error["type"] == "missing":
            parts.append("the body is empty: it must be a JSON object")
        else:
            parts.append(": ".join(filter(None, (place, error["msg"].replace(" after validation", "")))))
    first = _names(errors[0])
    return "; ".join(dict.fromkeys(parts)), first[0] if first else None


def _names(error: Mapping[str, Any]) -> list[str]:
    """The fields and indices of an error's place; pydantic also names the types that it has tried there."""
    place = [str(part) for part in error["loc"]]
    unknown = place[-1:] if error["type"] == "extra_forbidden" else []  # whatever the client calls it
    types = ("body", "query", "path", "str", "int", "float", "bool", "dict")
    known = place[: len(place) - len(unknown)]
    names = [part for part in known if part not in types and re.fullmatch(r"[a-z_][a-z0-9_]*|\d+", part)]
    return names + unknown
