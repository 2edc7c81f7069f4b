"""How the web page looks."""

from __future__ import annotations

import gradio as gr

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
/* Gradio's colours for code and its greys are too close to the background to be read easily. */
#chat :is(.prose, .message-content) { opacity: 1 }
#chat .token:is(.comment, .prolog, .doctype, .cdata) { color: #5b6470 }
#chat .token:is(.punctuation, .operator, .entity) { color: #5a5a5a }
#chat .token:is(.property, .tag, .boolean, .number, .constant, .symbol, .deleted) { color: #990055 }
#chat .token:is(.selector, .attr-name, .string, .char, .builtin, .inserted, .url) { color: #3d6b00 }
#chat .token:is(.atrule, .attr-value, .keyword) { color: #00608a }
#chat .token:is(.function, .class-name) { color: #b01f45 }
#chat .token:is(.regex, .important, .variable) { color: #8a5300 }
.dark #chat .token:is(.comment, .prolog, .doctype, .cdata) { color: #a0a8b7 }
.dark #chat .token:is(.punctuation, .operator, .entity) { color: #abb2bf }
.dark #chat .token:is(.property, .tag, .boolean, .number, .constant, .symbol, .deleted) { color: #e5a06c }
.dark #chat .token:is(.selector, .attr-name, .string, .char, .builtin, .inserted, .url) { color: #98c379 }
.dark #chat .token:is(.atrule, .attr-value, .keyword) { color: #d08ee5 }
.dark #chat .token:is(.function, .class-name) { color: #61afef }
.dark #chat .token:is(.regex, .important, .variable) { color: #e5c07b }
#side :is(.info-text, .min_value, .max_value), #speed { color: var(--body-text-color) }
#box textarea::placeholder { color: var(--body-text-color); opacity: .7 }
#speed { min-height: 1.4em; opacity: .7; font-size: .85em }
"""
#: On a phone, the sidebar covers the chat.
CLOSE_SIDE = "() => { if (innerWidth < 768) document.querySelector('#side.open .toggle-button')?.click() }"
#: Fonts of the visitor's system, including Chinese ones, which gradio's own fonts lack.
FONTS = ["system-ui", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
CODE_FONTS = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's theme with fonts that have Chinese, and buttons dark enough for the white text on them."""
    dark, darker = "*primary_700", "*primary_800"
    return gr.themes.Default(font=FONTS, font_mono=CODE_FONTS).set(
        button_primary_background_fill=dark,
        button_primary_background_fill_dark=dark,
        button_primary_background_fill_hover=darker,
        button_primary_background_fill_hover_dark=darker,
    )
