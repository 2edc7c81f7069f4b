"""The languages of messages, and the choice between them."""

from __future__ import annotations

import locale
import os
from collections.abc import Mapping

LANGUAGES = ("zh", "en")


def browser_language(accept_language: str) -> str:
    """Returns "zh" if a browser that sends this header Accept-Language prefers Chinese, else "en"."""
    return "zh" if accept_language.lower().startswith("zh") else "en"


def choose_language(environment: Mapping[str, str] | None = None) -> str:
    """Returns "zh" if the locale of the environment is Chinese, else "en"."""
    env = os.environ if environment is None else environment
    names = [env[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if env.get(name)]
    # Windows sets none of the variables but knows its language: "Chinese (Simplified)_China".
    name = names[0] if names else (locale.getlocale()[0] or "")
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"
