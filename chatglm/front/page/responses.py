"""What the page's server adds to gradio's responses: headers of safety, and the title and language of the document."""

from __future__ import annotations

import html
from typing import Any

from starlette.middleware import Middleware

from ...language import browser_language
from .limits import MOST_BYTES, BoundedBodies

# Gradio's page needs inline scripts and styles; everything must still come from this server.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)


class LocalOnly:
    """ASGI middleware: nothing that a model or a visitor writes makes a browser contact another server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    *message.get("headers", []),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


class NamedDocument:
    """ASGI middleware: gives the document the title and the language that gradio sets late, or at the login never."""

    def __init__(self, app: Any, title: str) -> None:
        self.app, self.title = app, title

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        accepted = dict(scope["headers"]).get(b"accept-language", b"").decode("latin-1")
        lang = "zh-CN" if browser_language(accepted) == "zh" else "en"
        start: Any = None
        parts: list[bytes] = []

        async def send_named(message: Any) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            parts.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            title = f"<title>{html.escape(self.title)}</title></head>".encode()
            body = b"".join(parts).replace(b'lang="en"', f'lang="{lang}"'.encode(), 1).replace(b"</head>", title, 1)
            others = [header for header in start["headers"] if header[0] != b"content-length"]
            await send({**start, "headers": [*others, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, send_named)


def middleware(title: str, upload_bytes: int = MOST_BYTES) -> list[Middleware]:
    """Returns all of it, for a page with this title, which takes files of at most `upload_bytes`."""
    return [
        Middleware(LocalOnly),
        Middleware(BoundedBodies, upload_bytes=upload_bytes),
        Middleware(NamedDocument, title=title),
    ]
