"""How the web page looks, and the header that keeps browsers from loading anything for it from elsewhere."""

from __future__ import annotations

from typing import Any

STYLE = """
#title h1 { margin: 0; font-size: var(--text-xxl) }
#demo-note { opacity: .8; font-size: .9em }
#chat { min-height: 14rem; height: calc(100dvh - 13rem) !important; flex: none }
#demo-note + #chat { height: calc(100dvh - 16rem) !important }
@media (max-width: 640px) { #demo-note + #chat { height: calc(100dvh - 23rem) !important } }
#chat .katex-display { overflow: auto hidden; margin: .4em 0; padding: .2em 0 }
#chat .katex-display + br, #chat span:has(> .katex-display) + br { display: none }
#chat .katex-error { color: inherit !important; font-family: var(--font-mono) }
.dark #chat .katex [style*="rgb(204, 0, 0)"] { color: #ff8080 !important }  /* commands that KaTeX does not know */
#chat .mermaid:not(:has(svg)) { white-space: pre-wrap }
#chat :is(td, th)[align=left] { text-align: left }
#chat :is(td, th)[align=center] { text-align: center }
#chat :is(td, th)[align=right] { text-align: right }
#chat li.task { list-style: none; margin-left: -1.4em }
#chats td { padding: .4em .6em; text-align: left }
#chats .thumbnail, #chats td div { min-height: 0; padding: 0 }
#speed { min-height: 1.4em; opacity: .7; font-size: .85em }
"""
#: On a phone, the sidebar covers the chat.
CLOSE_SIDE = "() => { if (innerWidth < 768) document.querySelector('#side.open .toggle-button')?.click() }"
#: Fonts of the visitor's system, including Chinese ones, which gradio's own fonts lack.
FONTS = ["system-ui", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
CODE_FONTS = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "monospace"]

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
