"""A conversation <-> token ids: the prompt formats of ChatGLM-6B (1), ChatGLM2-6B (2) and ChatGLM3-6B (3).

Formats, with q and a for questions and answers:

* 1: `[Round 0]\\n问：q\\n答：a\\n[Round 1]\\n问：q\\n答：` then `[gMASK] <sop>`; without history the bare question.
* 2: `[gMASK] sop` then `[Round 1]\\n\\n问：q\\n\\n答：a\\n\\n[Round 2]\\n\\n问：q\\n\\n答：`, always.
* 3: `[gMASK] sop` then for every message `<|role|>`, the ids of `metadata\\n` and the ids of the content, each encoded
  on its own; at the end `<|assistant|>`.

Text of a conversation is always encoded as plain text: a typed `<|user|>` or `[gMASK]` never becomes a control token.
"""

from __future__ import annotations

from .chat_messages import TOOLS_SYSTEM_PROMPT, encode_chat, normalize_messages, pairs_from_messages, render_chat
from .fitting import fit_conversation
from .formats import encode_conversation, encode_message, prompt_text, stop_token_ids
from .history import ROLES, has_tools, validate_history
from .responses import Response, clean_response, parse_response, stable_response
from .templates import CHAT_TEMPLATES
from .tool_calls import tool_call_message

__all__ = [
    "CHAT_TEMPLATES",
    "ROLES",
    "TOOLS_SYSTEM_PROMPT",
    "Response",
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
    "render_chat",
    "stable_response",
    "stop_token_ids",
    "tool_call_message",
    "validate_history",
]
