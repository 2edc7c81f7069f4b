"""The languages of messages, and which one a person wants."""

from __future__ import annotations

import locale
import os
from collections.abc import Mapping

LANGUAGES = ("zh", "en")


def choose_language(environment: Mapping[str, str] | None = None) -> str:
    """ "zh" where the locale of the environment is Chinese, else "en"."""
    env = os.environ if environment is None else environment
    names = [env[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if env.get(name)]
    # Windows sets none of the variables but knows its language: "Chinese (Simplified)_China".
    name = names[0] if names else (locale.getlocale()[0] or "")
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"
