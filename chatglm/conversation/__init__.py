"""Conversations to token ids and back: one `ChatFormat` per generation.

A format checks histories, drops old turns when the context is short, builds the prompt, names the tokens that end an
answer, cleans the answer for display, and writes and parses tool calls. `chat_format(3)`, `tokenizer.chat_format` and
`model.chat_format` return it; docs/adding_a_generation.md explains how to add one.
"""

from __future__ import annotations

from .by_generation import (
    clean_response,
    encode_chat,
    encode_conversation,
    encode_message,
    fit_conversation,
    normalize_messages,
    pairs_from_messages,
    parse_response,
    prompt_text,
    render_chat,
    stable_response,
    stop_token_ids,
    tool_call_message,
    validate_history,
)
from .chatglm1 import ChatGLM1Format
from .chatglm2 import ChatGLM2Format
from .chatglm3 import TOOLS_SYSTEM_PROMPT, ChatGLM3Format
from .chatglm4 import ChatGLM4Format
from .formats import ChatFormat, Response, chat_format, register_chat_format
from .history import ROLES, has_tools
from .pair_format import PairFormat
from .role_format import RoleFormat
from .visualglm import VisualGLMFormat

__all__ = [
    "CHAT_TEMPLATES",
    "ROLES",
    "TOOLS_SYSTEM_PROMPT",
    "ChatFormat",
    "PairFormat",
    "Response",
    "RoleFormat",
    "chat_format",
    "clean_response",
    "encode_chat",
    "encode_conversation",
    "encode_message",
    "fit_conversation",
    "has_tools",
    "normalize_messages",
    "pairs_from_messages",
    "parse_response",
    "prompt_text",
    "register_chat_format",
    "render_chat",
    "stable_response",
    "stop_token_ids",
    "tool_call_message",
    "validate_history",
]

_FORMATS = [
    register_chat_format(made())
    for made in (ChatGLM1Format, ChatGLM2Format, ChatGLM3Format, ChatGLM4Format, VisualGLMFormat)
]

#: The formats as Jinja templates, by generation.
CHAT_TEMPLATES = {format.generation: format.template for format in _FORMATS}
