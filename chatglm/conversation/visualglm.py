"""The chat format of VisualGLM-6B: `<img>`, a picture, `</img>问：q\\n答：a\\n问：q\\n答：` then `[gMASK] <sop>`."""

from __future__ import annotations

from collections.abc import Sequence

from .chatglm1 import ChatGLM1Format
from .formats import Sliders
from .history import Pair
from .segments import Segment, tokens

#: The words before a question and an answer; the second pair is that of the original's English demo.
_WORDS = {"zh": ("问：", "答："), "en": ("Q:", "A:")}


class VisualGLMFormat(ChatGLM1Format):
    """Rounds without numbers. The picture stands once, in front of them all.

    Args:
        image_length: how many placeholders stand for the picture; 0 for a conversation without one.
        english: write `Q:` and `A:`, as the original's English demo, for answers in English.
    """

    generation = 11
    name = "VisualGLM"
    model_name = "VisualGLM-6B"
    bare_first_question = False
    sliders = Sliders(4096, 2048, 0.4, 0.8)
    template = (
        "{% set ns = namespace(system='') %}{% for message in messages %}"
        "{% if message.role == 'system' %}{% set ns.system = message.content + '\\n' %}"
        "{% elif message.role == 'user' %}{{ '问：' ~ ns.system ~ message.content }}{% set ns.system = '' %}"
        "{{ '\\n答：' if add_generation_prompt or not loop.last else '' }}"
        "{{ '[gMASK]<sop>' if loop.last and add_generation_prompt else '' }}"
        "{% elif loop.last %}{{ '[gMASK]<sop>' ~ message.content ~ '<eop>' }}"
        "{% else %}{{ message.content ~ '\\n' }}{% endif %}{% endfor %}"
    )

    def __init__(self, image_length: int = 0, english: bool = False) -> None:
        self.image_length = image_length
        self._question, self._answer = _WORDS["en" if english else "zh"]

    def question_text(self, number: int, question: str) -> str:
        return f"{self._question}{question}"

    def round_text(self, number: int, question: str, answer: str | None = None) -> str:
        text = f"{self.question_text(number, question)}\n{self._answer}"
        return text if answer is None else f"{text}{answer}\n"

    def _with_image(self, segments: list[Segment]) -> list[Segment]:
        if not self.image_length:
            return segments
        (text, is_token), *rest = segments
        return [("<img>", False), *tokens(*["<unk>"] * self.image_length), (f"</img>{text}", is_token), *rest]

    def prompt_segments(self, query: str, history: Sequence[Pair], role: str = "user") -> list[Segment]:
        return self._with_image(super().prompt_segments(query, history, role))
