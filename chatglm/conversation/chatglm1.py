"""The chat format of ChatGLM-6B: `[Round 0]\\n问：q\\n答：a\\n[Round 1]\\n问：q\\n答：` then `[gMASK] <sop>`."""

from __future__ import annotations

import re

from .formats import PENDING_DATE, Sliders, TrainingLimits
from .pair_format import PairFormat, template_of_rounds
from .segments import tokens

_HALF_TO_FULL = str.maketrans(",!:;?", "，！：；？")
_PUNCTUATION_BY_HAN = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class ChatGLM1Format(PairFormat):
    """Rounds numbered from 0; without history, the prompt is the bare question."""

    generation = 1
    name = "ChatGLM"
    model_name = "ChatGLM-6B"
    stop_tokens = ("<eop>",)
    ask = tokens("[gMASK]", "<sop>")
    gap = "\n"
    first_round = 0
    bare_first_question = True
    sliders = Sliders(4096, 2048, 0.7, 0.95)
    # The original's `collator` also trains on <sop>, and its lengths count the special tokens differently.
    training = TrainingLimits(prompt_extra=1, answer_less=2, target_less=2, learned_prompt=1, least_answer=3)
    template = template_of_rounds(FIRST="0", BARE="true", GAP="\\n", ASK="[gMASK]<sop>", JOIN="", END="<eop>")
    # Punctuation, because a Han character may follow; and what the tokenizer's clean-up may change: " ,", " n't".
    pending = re.compile(rf"(?:\s'[vr]?|\sn'?|[\s\ufffd,!:;?]|{PENDING_DATE})+$")

    def clean(self, text: str) -> str:
        """Restores full-width punctuation beside Han characters: the vocabulary has half-width punctuation only."""
        return _PUNCTUATION_BY_HAN.sub(lambda found: found[0].translate(_HALF_TO_FULL), super().clean(text))
