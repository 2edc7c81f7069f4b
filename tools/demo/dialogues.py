"""Conversations of the turns of `corpus.py` and `tool_turns.py`: what the demo models are trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import lru_cache

from . import strings
from .corpus import LANGUAGES, Dialogue, Message, ask_name_turn, give_name_turn, random_turn
from .phrases import FOLDER
from .tool_turns import offers, plain_turn, system_message, used_turn

_SYSTEM_TEXTS = (
    "You are a helpful assistant.|You are ChatGLM3, a large language model. Follow the user's instructions carefully.|"
    "你是一个乐于助人的助手。|Be brief.|请简短回答。|You are a friendly bot.|You are a pirate.|你是一只猫。|"
    "Answer politely.|You are a teacher who explains well.|请用礼貌的语气回答。|你是一名客服。|"
    "Always tell the truth.|You are an expert.|请认真回答用户的问题。"
).split("|")

#: The share of dialogues that describe tools.
TOOL_SHARE = 0.3


def dialogue(rng: random.Random, with_roles: bool) -> Dialogue:
    """A random conversation of one to five turns; with roles some have a system message, or a tool."""
    lang = rng.choice(LANGUAGES)
    kind = rng.random()
    if with_roles and kind < TOOL_SHARE:
        return _tool_dialogue(lang, rng)
    messages: Dialogue = []
    if with_roles and rng.random() < 0.05:
        messages.append(Message("system", rng.choice(_SYSTEM_TEXTS)))
    if rng.random() < 0.23:
        return messages + _name_dialogue(lang, rng)
    for _ in range(rng.choices((1, 2, 3, 4), (40, 30, 20, 10))[0]):
        if rng.random() < 0.08:
            lang = "zh" if lang == "en" else "en"
        messages += random_turn(lang, rng)
        if rng.random() < 0.04 and len(messages) < 6:
            messages += ask_name_turn(None, lang, rng)
    return messages


def _name_dialogue(lang: str, rng: random.Random) -> Dialogue:
    """The user gives a name, may change it, and asks for it later, with other turns in between."""
    if rng.random() < 0.12:
        return [*(random_turn(lang, rng) if rng.random() < 0.4 else ()), *ask_name_turn(None, lang, rng)]
    messages: Dialogue = []
    if rng.random() < 0.2:
        messages += random_turn(lang, rng)
    name = strings.name(rng, lang)
    messages += give_name_turn(name, lang, rng)
    if rng.random() < 0.06:
        name = strings.name(rng, lang)
        messages += give_name_turn(name, lang, rng)
    for _ in range(rng.choices((0, 1, 2, 3), (45, 32, 16, 7))[0]):
        messages += random_turn(lang, rng)
    if rng.random() < 0.1:
        lang = "zh" if lang == "en" else "en"
    messages += ask_name_turn(name, lang, rng)
    return messages


def _tool_dialogue(lang: str, rng: random.Random) -> Dialogue:
    """Some tools, and questions for them and for none of them."""
    offered = offers(rng)
    messages: Dialogue = [system_message(offered, rng)]
    for _ in range(rng.choices((1, 2, 3, 4, 5, 6, 7, 8), (8, 8, 10, 14, 16, 16, 14, 14))[0]):
        if rng.random() < 0.12:
            lang = "zh" if lang == "en" else "en"
        messages += used_turn(rng.choice(offered), lang, rng) if rng.random() < 0.66 else plain_turn(offered, lang, rng)
        if messages[-1].metadata:  # a call waits for its observation
            break
    return messages


def letters(text: str) -> str:
    """A question without case, blanks and punctuation: what counts as the same question."""
    return "".join(sign for sign in text.lower() if sign.isalnum())


@lru_cache(maxsize=1)
def held_out() -> frozenset[str]:
    """The questions of the evaluation that stand alone. None of them, however spelt, may be learned."""
    found = set()
    for path in (FOLDER.parent / "evaluation").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            turns = json.loads(line)["turns"]
            if len(turns) == 1:
                found.add(letters(str(turns[0])))
    return frozenset(found - {""})


def dialogues(seed: int, with_roles: bool) -> Iterator[Dialogue]:
    """An endless stream of conversations without any held-out question; the same seed gives the same ones."""
    rng = random.Random(seed)
    while True:
        made = dialogue(rng, with_roles)
        if not any(message.role == "user" and letters(message.content) in held_out() for message in made):
            yield made
