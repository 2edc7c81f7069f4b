"""Keeps a visitor's chats in the browser: the scripts store.js and files.js, and how the page's events call them.

The server keeps no chats: store.js says what is kept, and what happens when several tabs change it.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...conversation.formats import ChatFormat
from ...language import LANGUAGES
from ..messages import PAGE, TERMINAL

#: Names of the settings that are kept with a chat, in the order of the page's components.
KNOBS = ("adapter", "system", "tools", "max_length", "top_p", "temperature", "mode", "auto")
CAPACITY = 5 * 2**20  # characters that browsers keep for one address
_TEXTS = (
    "store_full", "store_almost_full", "store_blocked", "two_chats", "imported", "not_a_chat", "system",
)  # fmt: skip
_SPEAKERS = ("user", "assistant", "observation")


def script(chat_format: ChatFormat) -> str:
    """Returns the script of the page's load event, which makes `window.chats` and restores what was open.

    (typed question, *settings) -> (what to open, list, title, notice, box)
    """
    texts = {
        language: {key: PAGE[key][language] for key in _TEXTS}
        | {key: TERMINAL[key][language].strip() for key in _SPEAKERS}
        for language in LANGUAGES
    }
    config = {
        "generation": chat_format.generation,
        "hasRoles": chat_format.has_roles,
        "toolsPrompt": chat_format.tools_system_prompt,
        "knobs": KNOBS,
        "capacity": CAPACITY,
        "texts": texts,
    }
    sources = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("store.js", "files.js")]
    body = "\n".join(sources).replace("= CONFIG", f"= {json.dumps(config, ensure_ascii=False)}", 1)
    return f"(...values) => {{\n{body}\nreturn restore(...values)\n}}"


def call(function: str) -> str:
    """Returns the script of an event that passes its inputs to a function of `window.chats`."""
    return f"(...inputs) => window.chats?.{function}(...inputs)"


#: (question, chat) -> the same, with what other tabs have added to the chat.
ASK = "(question, chat) => [question, window.chats ? window.chats.latest(chat) : chat]"
#: (chat) -> the same, with what other tabs have added to the chat.
LATEST = "chat => [window.chats ? window.chats.latest(chat) : chat]"
#: (chat) -> the chat as this tab shows it.
HERE = "chat => [window.chats ? window.chats.here(chat) : chat]"
#: The same, with further inputs.
HERE_WITH = "(chat, ...others) => [window.chats ? window.chats.here(chat) : chat, ...others]"
LEAVE = "() => { window.chats?.leave(); return [] }"
