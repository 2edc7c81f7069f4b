"""The chat format of ChatGLM2-6B: `[gMASK] sop [Round 1]\\n\\n问：q\\n\\n答：a\\n\\n[Round 2]\\n\\n问：q\\n\\n答：`."""

from __future__ import annotations

from .formats import Sliders, TrainingLimits
from .pair_format import PairFormat, template_of_rounds
from .segments import tokens


class ChatGLM2Format(PairFormat):
    """Rounds numbered from 1, with or without history."""

    generation = 2
    name = "ChatGLM2"
    model_name = "ChatGLM2-6B"
    stop_tokens = ("<eos>",)
    start = tokens("[gMASK]", "sop")
    sliders = Sliders(32768, 8192, 0.8, 0.95)
    training = TrainingLimits(target_less=2)
    template = "[gMASK]sop" + template_of_rounds(FIRST="1", BARE="false", GAP="\\n\\n", ASK="", JOIN=" ", END="</s>")
