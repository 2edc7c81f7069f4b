"""The phrase files: templates with alternatives, `[a|b|]`, and slots, `{name}`; and typing noise."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "phrases"

#: A template as a tree: text, the name of a slot, or alternatives.
Node = str | tuple[str, str] | list[list["Node"]]
Slots = Mapping[str, Callable[[random.Random], str]]

# These enclose text that must be copied letter by letter while noise is added.
OPEN, CLOSE = "\x01", "\x02"


@cache
def read(name: str) -> dict[str, list[str]]:
    """The lines of `phrases/<name>.txt` by section: `# section`, or `@section` for a list of words."""
    sections: dict[str, list[str]] = {}
    section = ""
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(("# ", "@")):
            section = line if line[0] == "@" else line[2:]
            sections[section] = []
        elif line.strip():
            sections[section].append(line)
    return sections


@cache
def parse(template: str) -> list[Node]:
    """`how [do|can] i {act}` -> a tree. ValueError for a bracket that is not closed."""
    return _sequence(template, 0, "")[0]


def _sequence(text: str, at: int, stop: str) -> tuple[list[Node], int]:
    nodes: list[Node] = []
    plain = ""
    while at < len(text) and text[at] not in stop:
        if text[at] == "[":
            alternatives: list[list[Node]] = []
            while text[at] != "]":
                alternative, at = _sequence(text, at + 1, "|]")
                if at == len(text):
                    raise ValueError(f"a bracket is not closed in the template {text!r}")
                alternatives.append(alternative)
            nodes += [plain, alternatives]
            plain = ""
        elif slot := re.match(r"\{([a-z_]+)\}", text[at:]):
            nodes += [plain, ("slot", slot[1])]
            plain = ""
            at += slot.end() - 1
        elif text[at] != "\\":
            plain += text[at]
        at += 1
    return [*nodes, plain], at


def expand(template: str, rng: random.Random, slots: Slots) -> str:
    """One random text of a template."""
    return _expand(parse(template), rng, slots)


def _expand(nodes: list[Node], rng: random.Random, slots: Slots) -> str:
    parts = []
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
        elif isinstance(node, tuple):
            parts.append(slots[node[1]](rng))
        else:
            parts.append(_expand(node[int(rng.random() * len(node))], rng, slots))
    return "".join(parts)


@cache
def count(template: str) -> int:
    """How many texts a template gives, slots not counted."""

    def nodes_count(nodes: list[Node]) -> int:
        product = 1
        for node in nodes:
            if isinstance(node, list):
                product *= sum(nodes_count(alternative) for alternative in node)
        return product

    return nodes_count(parse(template))


@cache
def _weights(templates: tuple[str, ...]) -> list[float]:
    total = 0.0
    sums = []
    for template in templates:
        total += min(count(template), 900) ** 0.5
        sums.append(total)
    return sums


def pick(templates: list[str], rng: random.Random, slots: Slots) -> str:
    """A random text of a list of templates; rich templates come more often."""
    chosen = tuple(templates)
    return expand(rng.choices(chosen, cum_weights=_weights(chosen))[0], rng, slots)


# --------------------------------------------------------------------------------------------------------- noise

_EN_QUESTION = re.compile(
    r"^(what|how|who|where|when|why|which|can|could|do|does|did|is|are|will|would|may|should|am|have|has)\b"
)
_ZH_QUESTION = re.compile("吗|什么|怎|谁|哪|几|多少|如何|为何|为啥|多大|呢|能不能|可不可以|是不是|有没有|么|咋")
_EN_BEFORE = (
    "hi, |hello, |hey, |hi there, |hey chatglm, |excuse me, |ok so |so |so, |well, |um, |please, |quick question: |now "
    "|and |also, |ok, |hello! |hi! |one more thing: |a question: |by the way, |tell me, |just curious, |hmm, |listen, "
    "|i have a question: |please tell me: |right, |dear bot, |sorry, |then "
).split("|")
_EN_ASK = (
    "can you tell me |do you know |i want to know |i would like to know |could you tell me |i wonder |may i ask "
    "|i was wondering |tell me |please explain |any idea |do you have any idea |would you tell me |i'd like to know "
).split("|")
_EN_AFTER = (
    " please| thanks|, thank you| pls|, please| mate| my friend|, chatglm| now| exactly| then| btw|, any idea| here"
    "|, i'm new here| again| actually| today|, just asking| for me|, can you tell me| bro| right now|, i forgot"
).split("|")
_ZH_BEFORE = (
    "请问|请问一下，|你好，|您好，|那个，|嗨，|哎，|我想问一下|想问下|问一下，|告诉我，|麻烦问下|我想知道|小助手，|对了，|那|话说"
    "|顺便问一下，|嘿，|喂，|请问，|我有个问题，|问你一下，|那么|我问你，|你好！|嗯，|帮我看看，|想知道|现在|再问一下，|不好意思，|然后|好的，"
).split("|")
_ZH_AFTER = (
    "呢|啊|呀|，谢谢|哦|吧|哈|来着|，请问|，告诉我|？谢谢|嘛|，急|，在线等|，我想知道|？急|，可以说说吗|，麻烦了".split(
        "|"
    )
)
_EN_SHORT = [
    ("i am", "i'm"), ("what is", "what's"), ("do not", "don't"), ("it is", "it's"), ("you are", "you're"),
    ("can not", "can't"), ("cannot", "can't"), ("how is", "how's"), ("who is", "who's"), ("i would", "i'd"),
    ("please", "pls"), ("want to", "wanna"), ("going to", "gonna"), ("you", "u"), ("thanks", "thx"), ("are", "r"),
    ("your", "ur"), ("where is", "where's"), ("does not", "doesn't"), ("let us", "let's"), ("the ", ""), ("a ", ""),
]  # fmt: skip
_EN_LONG = [
    ("i'm", "i am"), ("what's", "what is"), ("don't", "do not"), ("it's", "it is"), ("you're", "you are"),
    ("can't", "cannot"), ("how's", "how is"), ("i'd like", "i would like"), ("program", "programme"),
]  # fmt: skip
_ZH_SWAP = [
    ("你", "您"), ("怎么", "怎样"), ("什么", "啥"), ("吗", "嘛"),
    ("吗", ""), ("的", ""), ("怎么", "如何"), ("在", "再"),
    ("哪里", "哪儿"), ("那", "哪"), ("一下", ""), ("了", ""),
    ("我想", "我要"), ("怎么", "咋"), ("多少", "几"), ("可以", "能"),
    ("能不能", "可不可以"), ("程序", "软件"), ("对话", "聊天"), ("回答",
    "答案"), ("没有", "没"), ("什么", "甚么"), ("啊", "阿"),
]  # fmt: skip


def add_noise(text: str, lang: str, rng: random.Random, strong: bool = True) -> str:
    """Fillers, contractions, typos, case and punctuation, as people type. What is between OPEN and CLOSE stays.

    Args:
        strong: also fillers before and after, which change the sense of very short phrases.
    """
    return (_noise_en if lang == "en" else _noise_zh)(text, rng, strong)


def _swap(swaps: list[tuple[str, str]], rng: random.Random, text: str) -> str:
    """One of the fitting shortenings (or their reverse)."""
    fits = [swap for swap in swaps if re.search(rf"\b{re.escape(swap[0])}", text)]
    if not fits:
        return text
    old, new = rng.choice(fits)
    return _edit(text, lambda part: re.sub(rf"\b{re.escape(old)}(?!\w)", new, part))


def _edit(text: str, change: Callable[[str], str]) -> str:
    """Apply a change to the parts that need not be copied."""
    if OPEN not in text:
        return change(text)
    parts = re.split(f"({OPEN}[^{CLOSE}]*{CLOSE})", text)
    return "".join(part if part.startswith(OPEN) else change(part) for part in parts)


def _typo(text: str, rng: random.Random) -> str:
    letters = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if len(letters) < 3:
        return text
    at = rng.choice(letters)
    kind = rng.random()
    if kind < 0.35:
        return text[:at] + text[at + 1 :]
    if kind < 0.65:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if kind < 0.85:
        return text[:at] + text[at] + text[at:]
    return text[:at] + rng.choice("etaoinshrdlu") + text[at + 1 :]


def _noise_en(text: str, rng: random.Random, strong: bool) -> str:
    is_question = bool(_EN_QUESTION.match(text))
    if strong:
        if is_question and rng.random() < 0.06:
            text = rng.choice(_EN_ASK) + text
        if rng.random() < 0.16:
            text = rng.choice(_EN_BEFORE) + text
        if rng.random() < 0.12:
            text += rng.choice(_EN_AFTER)
    for chance, swaps in ((0.22, _EN_SHORT), (0.2, _EN_LONG)):
        if rng.random() < chance:
            text = _swap(swaps, rng, text)
    if rng.random() < 0.09:
        text = _edit(text, lambda part: _typo(part, rng))
    if rng.random() < 0.05:
        text = _edit(text, lambda part: part.replace("'", ""))
    elif rng.random() < 0.08:
        text = _edit(text, lambda part: part.replace("'", "’"))
    case = rng.random()
    if case < 0.6:
        text = _edit(text, lambda part: re.sub(r"\bi\b", "I", part))
        text = text[:1].upper() + text[1:]
    elif case < 0.64:
        text = _edit(text, str.upper)
    elif case < 0.67:
        text = _edit(text, lambda part: re.sub(r"\b[a-z]", lambda m: m[0].upper(), part))
    end = rng.random()
    if is_question:
        text += "?" if end < 0.56 else "" if end < 0.88 else rng.choice(["??", "!", ".", " ?", "?!", "...", "？"])
    else:
        text += "" if end < 0.45 else "." if end < 0.7 else "!" if end < 0.88 else rng.choice(
            ["!!", "?", "...", " :)", ",", "~", " .", " !"]
        )  # fmt: skip
    return text


def _noise_zh(text: str, rng: random.Random, strong: bool) -> str:
    is_question = bool(_ZH_QUESTION.search(text))
    if strong:
        if rng.random() < 0.2:
            text = rng.choice(_ZH_BEFORE) + text
        if rng.random() < 0.12:
            text += rng.choice(_ZH_AFTER)
    if rng.random() < 0.3:
        fits = [swap for swap in _ZH_SWAP if swap[0] in text]
        if fits:
            old, new = rng.choice(fits)
            text = _edit(text, lambda part: part.replace(old, new, 1))
    if rng.random() < 0.06:

        def drop(part: str) -> str:
            at = rng.randrange(len(part)) if len(part) > 5 else -1
            return part[:at] + part[at + 1 :] if at >= 0 else part

        text = _edit(text, drop)
    if rng.random() < 0.04:
        text = _edit(text, lambda part: part.replace("，", " "))
    elif rng.random() < 0.05:
        text = _edit(text, lambda part: part.replace("，", ","))
    if text.isascii() and rng.random() < 0.3:
        text = text.capitalize() if rng.random() < 0.7 else text.upper()
    end = rng.random()
    if is_question:
        text += (
            "？"
            if end < 0.45
            else ""
            if end < 0.83
            else rng.choice(["?", "？？", "！", "。", "~", "...", "呢？", "?!"])
        )
    else:
        text += "" if end < 0.48 else "。" if end < 0.7 else "！" if end < 0.86 else rng.choice(
            ["!", "~", "？", "...", "！！", "。。。", "～", ".", "?", " "]
        )  # fmt: skip
    return text
