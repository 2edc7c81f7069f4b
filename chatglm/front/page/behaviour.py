"""The script of the page (`behaviour.js`) with the texts that it needs."""

from __future__ import annotations

import json
from pathlib import Path

from ...language import LANGUAGES
from ..messages import GRADIO, NAMES


def script(model: str) -> str:
    """Returns a JavaScript function for gradio to call when the page is there; `model` is the model's name."""
    code = Path(__file__).with_name("behaviour.js").read_text(encoding="utf-8")
    names = {language: {key: text[language] for key, text in NAMES.items()} for language in LANGUAGES}
    texts = {language: names[language] | {"gradio": GRADIO if language == "zh" else {}} for language in LANGUAGES}
    function = code[code.index("(texts, model) =>") :].rstrip()
    return f"() => ({function})({json.dumps(texts)}, {json.dumps(model)})"
