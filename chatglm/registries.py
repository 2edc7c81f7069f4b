"""What makes up each generation, by its number (`chatglm_version`); `generations.py` fills it.

In a module of its own, because a notebook's `%autoreload` runs changed modules again, which would empty it.
"""

from __future__ import annotations

from typing import Any

FORMATS: dict[int, Any] = {}
CONFIGS: dict[int, Any] = {}
CHAT_MODELS: dict[int, Any] = {}
TOKENIZERS: dict[int, Any] = {}
