"""The dialogues the demo models learn from, made by rules from the phrase files beside this one.

Everything follows from a `random.Random`: the same seed gives the same dialogues. What the demo knows has exactly one
answer for each intent and language, so that answers can be checked for equality.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import strings
from .phrases import CLOSE, OPEN, Slots, add_noise, pick, read

LANGUAGES = ("en", "zh")


def _canonical_answers() -> dict[str, dict[str, str]]:
    """intent -> language -> answer; the lines `= answer` of the phrase files."""
    answers: dict[str, dict[str, str]] = {}
    for lang in LANGUAGES:
        for intent, lines in read(lang).items():
            if lines[0].startswith("= "):
                answers.setdefault(intent, {})[lang] = lines[0][2:]
    return answers


#: The fixed answers: intent name -> {"en": answer, "zh": answer}.
INTENTS = _canonical_answers()

#: The one answer to everything that the demo does not know.
REFUSAL = {
    "en": "I am only a tiny demo and cannot answer that. Load the real weights with --model to get real answers.",
    "zh": "我只是一个小演示，回答不了这个问题。请用--model加载真正的权重。",
}


@dataclass
class Message:
    """One message of a dialogue; what the assistant says is learned."""

    role: str
    content: str
    metadata: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    #: Of the call of a tool, whose content is in the words of generation 3.
    arguments: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The message as in a history."""
        message: dict[str, Any] = {"role": self.role, "content": self.content, "metadata": self.metadata}
        return message | ({"tools": self.tools} if self.tools else {})


Dialogue = list[Message]
Turn = list[Message]


# --------------------------------------------------------------------------------------------- arithmetic and units


def add(a: int, b: int) -> str:
    """`37+48=70+15=85`: tens and ones are added separately."""
    if a < 10 and b < 10:
        return f"{a}+{b}={a + b}"
    return f"{a}+{b}={a // 10 * 10 + b // 10 * 10}+{a % 10 + b % 10}={a + b}"


def subtract(a: int, b: int) -> str:
    """`72-48=(60-40)+(12-8)=20+4=24`: a ten is borrowed if the ones need it."""
    if a < 10:
        return f"{a}-{b}={a - b}"
    lent = 10 if a % 10 < b % 10 else 0
    tens, ones = a // 10 * 10 - lent, a % 10 + lent
    return f"{a}-{b}=({tens}-{b // 10 * 10})+({ones}-{b % 10})={tens - b // 10 * 10}+{ones - b % 10}={a - b}"


def multiply(a: int, b: int) -> str:
    """`47×6=240+42=282`; the factor with two digits is taken apart."""
    if a < 10 and b < 10:
        return f"{a}×{b}={a * b}"
    big, small = (a, b) if a >= 10 else (b, a)
    return f"{a}×{b}={big // 10 * 10 * small}+{big % 10 * small}={a * b}"


#: (factor, names of the unit, names of the result, canonical names); the English names are plural.
UNITS: dict[str, list[tuple[int, list[str], list[str]]]] = {
    "en": [
        (1000, ["km", "kilometers", "kilometres", "kilometer"], ["m", "meters", "metres"]),
        (100, ["m", "meters", "metres", "meter"], ["cm", "centimeters", "centimetres"]),
        (10, ["cm", "centimeters", "centimetres"], ["mm", "millimeters", "millimetres"]),
        (1000, ["kg", "kilograms", "kilos", "kilogram", "kgs"], ["g", "grams", "gram"]),
        (1000, ["tonnes", "tons", "t", "metric tons", "ton", "tonne"], ["kg", "kilograms", "kilos"]),
        (1000, ["liters", "litres", "l", "liter", "litre"], ["ml", "milliliters", "millilitres"]),
        (60, ["hours", "hour", "h", "hrs"], ["minutes", "min", "mins"]),
        (60, ["minutes", "minute", "min", "mins"], ["seconds", "s", "sec", "secs"]),
        (24, ["days", "day"], ["hours", "h", "hrs"]),
        (7, ["weeks", "week"], ["days"]),
        (12, ["years", "year", "yrs"], ["months"]),
    ],
    "zh": [
        (1000, ["公里", "千米", "km"], ["米", "m"]),
        (100, ["米", "m"], ["厘米", "cm", "公分"]),
        (10, ["厘米", "cm", "公分"], ["毫米", "mm"]),
        (1000, ["公斤", "千克", "kg"], ["克", "g"]),
        (1000, ["吨", "t"], ["公斤", "千克", "kg"]),
        (1000, ["升", "L", "公升"], ["毫升", "ml"]),
        (60, ["小时", "个小时", "个钟头", "钟头"], ["分钟", "分"]),
        (60, ["分钟", "分"], ["秒", "秒钟"]),
        (24, ["天", "日"], ["小时", "个小时", "个钟头"]),
        (7, ["周", "个星期", "星期", "个礼拜", "礼拜"], ["天", "日"]),
        (12, ["年"], ["个月", "月"]),
    ],
}


def convert(number: int, factor: int, source: str, target: str, lang: str) -> str:
    """`3 km = 3000 m`; with the steps if the factor is no power of ten: `47 h = 40×24 + 7×24 = 960+168 = 1128 …`."""
    gap = " " if lang == "en" else ""
    result = f"{number * factor}{gap}{target}"
    if factor in (10, 100, 1000) or number < 10:
        return f"{number}{gap}{source}{gap}={gap}{result}"
    tens, ones = number // 10 * 10, number % 10
    steps = f"{tens}×{factor}+{ones}×{factor}{gap}={gap}{tens * factor}+{ones * factor}"
    return f"{number}{gap}{source}{gap}={gap}{steps}{gap}={gap}{result}"


# ------------------------------------------------------------------------------------------------------ translation

_SUBJECTS = [("I", "我"), ("You", "你"), ("He", "他"), ("She", "她"), ("We", "我们"), ("They", "他们")]

#: English, Chinese, Chinese with a measure word ("" where English has no "a").
_FOOD = [
    ("apples", "苹果", ""), ("rice", "米饭", ""), ("bread", "面包", ""), ("fish", "鱼", ""), ("eggs", "鸡蛋", ""),
    ("noodles", "面条", ""), ("cake", "蛋糕", ""), ("bananas", "香蕉", ""), ("oranges", "橙子", ""), ("meat", "肉", ""),
    ("fruit", "水果", ""), ("vegetables", "蔬菜", ""), ("chocolate", "巧克力", ""), ("dumplings", "饺子", ""),
]  # fmt: skip
_DRINKS = [
    ("water", "水", ""), ("tea", "茶", ""), ("coffee", "咖啡", ""), ("milk", "牛奶", ""), ("juice", "果汁", ""),
    ("beer", "啤酒", ""),
]  # fmt: skip
_READING = [
    ("books", "书", ""), ("the newspaper", "报纸", ""), ("a book", "一本书", ""), ("letters", "信", ""),
    ("newspapers", "报纸", ""),
]  # fmt: skip
_THINGS = [
    ("books", "书", ""), ("flowers", "花", ""), ("cats", "猫", ""), ("dogs", "狗", ""), ("movies", "电影", ""),
    ("cars", "汽车", ""), ("a computer", "一台电脑", "电脑"), ("a phone", "一部手机", "手机"),
    ("a bike", "一辆自行车", "自行车"), ("birds", "鸟", ""), ("a cat", "一只猫", ""), ("a dog", "一只狗", ""),
    ("a car", "一辆汽车", ""), ("a house", "一座房子", "房子"), ("shoes", "鞋子", ""), ("a book", "一本书", ""),
    ("horses", "马", ""), ("trees", "树", ""), ("the newspaper",
    "报纸", ""), ("money", "钱", ""), ("a bird", "一只鸟", ""),
    ("a flower", "一朵花", ""), ("an apple", "一个苹果", ""), ("an egg", "一个鸡蛋", ""), ("a cake", "一个蛋糕", ""),
]  # fmt: skip
_SIGHTS = [
    ("the sea", "大海", "海"), ("the moon", "月亮", ""), ("the sun", "太阳", ""), ("the mountain", "山", ""),
    ("the sky", "天空", ""), ("the river", "河", ""), ("the stars", "星星", ""),
]  # fmt: skip
_PLEASURES = [
    ("music", "音乐", ""),
    ("movies", "电影", ""),
    ("school", "学校", ""),
    ("snow", "雪", ""),
    ("games", "游戏", ""),
]

#: base form, third person, Chinese, Chinese variants that are understood, objects
_VERBS = [
    ("like", "likes", "喜欢", (), _FOOD + _DRINKS + _READING + _THINGS + _SIGHTS + _PLEASURES * 3),
    ("want", "wants", "想要", ("要",), _FOOD + _DRINKS + _THINGS),
    ("eat", "eats", "吃", (), _FOOD * 2),
    ("drink", "drinks", "喝", (), _DRINKS * 2),
    ("see", "sees", "看见", ("看到",), _THINGS + _SIGHTS * 2 + _FOOD[:1]),
    ("buy", "buys", "买", (), _FOOD + _DRINKS + _THINGS),
    ("have", "has", "有", (), _FOOD + _DRINKS + _THINGS),
    ("need", "needs", "需要", (), _FOOD + _DRINKS + _THINGS + _PLEASURES[:1]),
    ("read", "reads", "读", ("看",), _READING * 3),
]
_PLACES = [
    ("water", "水"), ("tea", "茶"), ("coffee", "咖啡"), ("rice",
    "米饭"), ("bread", "面包"), ("milk", "牛奶"), ("fish", "鱼"),
    ("cake", "蛋糕"), ("music", "音乐"), ("apple", "苹果"), ("book",
    "书"), ("flower", "花"), ("cat", "猫"), ("dog", "狗"),
    ("movie", "电影"), ("car", "汽车"), ("computer", "电脑"), ("phone", "手机"), ("bike", "自行车"), ("egg", "鸡蛋"),
    ("newspaper", "报纸"), ("sea", "大海"), ("moon", "月亮"), ("bird", "鸟"), ("noodles", "面条"), ("house", "房子"),
    ("school", "学校"), ("river", "河"), ("mountain", "山"), ("fruit", "水果"), ("meat", "肉"), ("money", "钱"),
]  # fmt: skip
_MEASURE = {
    "书": "本", "花": "朵", "猫": "只", "狗": "只", "汽车": "辆",
    "电脑": "台", "手机": "部", "自行车": "辆", "鸡蛋": "个",
    "苹果": "个", "鸟": "只", "房子": "座", "电影": "部", "蛋糕": "个",
}  # fmt: skip
_MASS = {"水", "茶", "咖啡", "米饭", "面包", "牛奶", "鱼", "蛋糕", "音乐", "水果", "肉", "钱", "面条"}
_UNIQUE = {"大海", "月亮", "报纸", "学校", "河", "山"}


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def sentence_pair(rng: random.Random, to: str) -> tuple[str, str]:
    """A sentence of the small grammar and its translation into `to`: (source, target)."""
    kind = rng.random()
    if kind < 0.14:
        english, chinese = rng.choice(_PLACES)
        if chinese in _MASS:
            pair = (f"This is {english}", f"这是{chinese}")
        elif chinese in _UNIQUE:
            pair = (f"This is the {english}", f"这是{chinese}")
        else:
            measured = f"这是一{_MEASURE[chinese]}{chinese}"
            short = to == "en" and rng.random() < 0.5
            pair = (f"This is {_article(english)}", f"这是{chinese}" if short else measured)
        return pair if to == "zh" else (pair[1], pair[0])
    if kind < 0.3:
        english, chinese = rng.choice(_PLACES)
        be = "are" if english == "noodles" else "is"
        if to == "zh":
            article = rng.choice(("my ", "the ", "the ", "the ")) if english != "music" else "the "
            owner = "我的" if article == "my " else ""
            return f"Where {be} {article}{english}", f"{owner}{chinese}在哪里"
        owner = rng.choice(("", "", "", "我的"))
        place = rng.choice(("在哪里", "在哪儿", "在哪"))
        return f"{owner}{chinese}{place}", f"Where {be} {'my' if owner else 'the'} {english}"
    subject, zh_subject = rng.choice(_SUBJECTS)
    base, third, verb, variants, objects = rng.choice(_VERBS)
    english, chinese, bare = rng.choice(objects)
    said = third if subject in ("She", "He") else base
    if base in ("eat", "drink", "buy", "read", "see", "have") and rng.random() < 0.25:
        said = ("wants" if said == third and third != base else "want") + f" to {base}"
        verb, variants = "想" + verb, ("要" + verb, "想要" + verb)
    if to == "zh":
        return f"{subject} {said} {english}", f"{zh_subject}{verb}{chinese}"
    if chinese == "报纸":
        english = "the newspaper"
    if variants and rng.random() < 0.45:
        verb = rng.choice(variants)
    if bare and rng.random() < 0.6:
        chinese = bare
    return f"{zh_subject}{verb}{chinese}", f"{subject} {said} {english}"


_LANGUAGE_NAMES = {
    ("en", "zh"): ["chinese", "mandarin", "Chinese", "Chinese", "Mandarin Chinese"],
    ("en", "en"): ["english", "English", "English"],
    ("zh", "zh"): ["中文", "汉语", "中文", "普通话"],
    ("zh", "en"): ["英文", "英语", "英语", "英文"],
}


# ------------------------------------------------------------------------------------------------------------ turns


def protect(text: object) -> str:
    return f"{OPEN}{text}{CLOSE}"


def _clean(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


#: The share of questions in a plain wording (the lines `~ ` of the phrase files): what people type most would
#: otherwise be rare among thousands of phrasings.
_PLAIN = 0.3


def ask(section: str, lang: str, rng: random.Random, slots: Slots | None = None, strong: bool = True) -> str:
    lines = [line for line in read(lang)[section] if not line.startswith("= ")]
    plain = [line[2:] for line in lines if line.startswith("~ ")]
    if plain and rng.random() < _PLAIN:
        lines, strong = plain, strong and rng.random() < 0.3
    else:
        lines = [line for line in lines if not line.startswith("~ ")]
    return _clean(add_noise(pick(lines, rng, slots or {}), lang, rng, strong))


def space_signs(question: str, rng: random.Random) -> str:
    """`12 + 30` also as `12+30`: blanks around a sign mean nothing."""
    return re.sub(r"(?<=\d) ([-+*/x×÷−]) (?=\d)", r"\1", question) if rng.random() < 0.5 else question


def turn(question: str, answer: str) -> Turn:
    return [Message("user", question), Message("assistant", answer)]


# Phrases of a word or two: fillers would change their sense.
_SHORT = {
    "hello", "good_morning", "good_night", "thanks", "sorry", "goodbye", "praise", "insult", "nice_to_meet_you", "ok",
    "sad", "happy", "bored", "feelings",
}  # fmt: skip


def intent_turn(intent: str, lang: str, rng: random.Random) -> Turn:
    """A question of an intent and its one answer."""
    strong = intent not in _SHORT or rng.random() < 0.25
    return turn(ask(intent, lang, rng, strong=strong), INTENTS[intent][lang])


def _operand(rng: random.Random) -> int:
    """A number up to 99; single digits come more often than one time in ten, as people ask for 2+2."""
    return rng.randint(0, 9) if rng.random() < 0.2 else rng.randint(0, 99)


def arithmetic_turn(lang: str, rng: random.Random) -> Turn:
    kind = rng.choice(("add", "add", "subtract", "subtract", "multiply", "multiply"))
    if kind == "add":
        a, b = _operand(rng), _operand(rng)
        answer = add(a, b)
    elif kind == "subtract":
        a, b = sorted((_operand(rng), _operand(rng)), reverse=True)
        answer = subtract(a, b)
    else:
        a, b = max(2, _operand(rng)), rng.randint(2, 9)
        if rng.random() < 0.35:
            a, b = b, a
        answer = multiply(a, b)
    slots: Slots = {"a": lambda _: protect(a), "b": lambda _: protect(b)}
    return turn(space_signs(ask(kind, lang, rng, slots), rng), answer)


def unit_turn(lang: str, rng: random.Random) -> Turn:
    factor, sources, targets = rng.choice(UNITS[lang])
    number = rng.randint(1, 99)
    # Symbols pair with symbols, so that "m" is never both metres and minutes.
    source = sources[0] if rng.random() < 0.4 else rng.choice(sources)
    target = targets[0] if rng.random() < 0.4 else rng.choice(targets)
    joined = lang == "en" and source == sources[0] and rng.random() < 0.3  # 3km
    slots: Slots = {
        "n": lambda _: protect(number),
        "from": lambda _: protect(source),
        "to": lambda _: protect(target),
    }
    question = ask("unit", lang, rng, slots)
    if joined:
        question = question.replace(f"{number} {source}", f"{number}{source}")
    return turn(question, convert(number, factor, sources[0], targets[0], lang))


def translation_turn(lang: str, rng: random.Random) -> Turn:
    to = rng.choice(LANGUAGES)
    source, target = sentence_pair(rng, to)
    kind = rng.random()
    if to == "zh" and kind < 0.35:
        source = source.lower().replace("i ", "I ", 1) if source.startswith("I ") and kind < 0.1 else source.lower()
    end = {"zh": "." if "Where" not in target and "where" not in source.lower() else "?", "en": "。"}[to]
    if kind > 0.75:
        source += end
    slots: Slots = {"s": lambda _: protect(source), "language": lambda r: r.choice(_LANGUAGE_NAMES[lang, to])}
    question = ask("translate", lang, rng, slots, strong=rng.random() < 0.4)
    if to == "zh":
        target += "？" if target.endswith("在哪里") else "。"
    else:
        target += "?" if target.startswith("Where") else "."
    return turn(question, target)


def give_name_turn(name: str, lang: str, rng: random.Random) -> Turn:
    question = ask("give_name", lang, rng, {"name": lambda _: protect(name)}, strong=rng.random() < 0.2)
    answer = (
        f"Nice to meet you, {name}! I will remember your name." if lang == "en" else f"你好，{name}！我记住你的名字了。"
    )
    return turn(question, answer)


def ask_name_turn(name: str | None, lang: str, rng: random.Random) -> Turn:
    answer = (
        INTENTS["name_unknown"][lang] if name is None else f"Your name is {name}." if lang == "en" else f"你叫{name}。"
    )
    return turn(ask("ask_name", lang, rng, strong=rng.random() < 0.6), answer)


# ---------------------------------------------------------------------------------------------------------- foreign


def _number_slots(lang: str) -> dict[str, Callable[[random.Random], str]]:
    months = "january february march april may june july august september october november december".split()

    def big(rng: random.Random) -> str:
        return str(
            rng.randint(100, 10 ** rng.choice((3, 4, 4, 5, 6)) - 1) if rng.random() < 0.9 else rng.choice((100, 1000))
        )

    def any_number(rng: random.Random) -> str:
        return str(rng.randint(1, 99)) if rng.random() < 0.5 else big(rng)

    return {
        "smaller": lambda rng: str(rng.randint(0, 30)),
        "larger": lambda rng: str(rng.randint(31, 99)),
        "smallnumber": lambda rng: str(rng.randint(2, 99)),
        "bignumber": big,
        "anynumber": any_number,
        "decimal": lambda rng: f"{rng.randint(0, 99)}.{rng.randint(1, 99)}",
        "year": lambda rng: str(rng.randint(1000, 2035)),
        "month": lambda rng: rng.choice(months),
        "name": lambda rng: strings.city(rng, lang),
        "oddword": lambda rng: strings.odd_word(rng, lang),
        "oddsentence": lambda rng: pick(read(f"foreign_{lang}")["@oddsentence"], rng, {}),
        "insentence": lambda rng: sentence_pair(rng, rng.choice(LANGUAGES))[0],
    }


def _foreign_slots(lang: str) -> Slots:
    lists = read(f"foreign_{lang}")
    slots = _number_slots(lang)

    def from_list(section: str) -> Callable[[random.Random], str]:
        def choose(rng: random.Random) -> str:
            word = pick(lists[section], rng, {})
            if section in ("@person", "@place") and lang == "en" and rng.random() < 0.7:
                return word.title()
            return word

        return choose

    for section in lists:
        if section[0] == "@" and section != "@oddsentence":
            slots[section[1:]] = from_list(section)
    things = {
        "en": ["{thing}", "{topic}", "{person}", "my {oddword}", "the {oddword}", "a photo of {thing}", "{oddword}"],
        "zh": ["{thing}", "{topic}", "{person}", "我的{oddword}", "{thing}的照片", "{oddword}", "{place}"],
    }[lang]
    slots["oddtarget"] = lambda rng: pick(things, rng, slots)
    return slots


_FOREIGN_SLOTS = {lang: _foreign_slots(lang) for lang in LANGUAGES}
_FOREIGN_WEIGHTS = {
    "open": 34, "knowledge": 34, "maths": 16, "numbers": 8, "weather": 5, "translation": 9, "otherlanguage": 3,
    "nearmiss": 20, "coding": 8, "travel": 5, "negative": 3,
}  # fmt: skip


def foreign_sum(lang: str, rng: random.Random) -> str:
    """A sum just beyond what the demo can do."""
    kind = rng.random()
    third = ""
    if kind < 0.24:
        section, a, b = "multiply", rng.randint(10, 99), rng.randint(10, 99)
    elif kind < 0.34:
        section, a, b = "multiply", rng.randint(100, 9999), rng.randint(2, 99)
    elif kind < 0.48:
        section, a, b = "add", rng.randint(0, 9999), rng.randint(100, 9999)
    elif kind < 0.62:
        section, a, b = "subtract", rng.randint(100, 9999), rng.randint(1, 999)
    elif kind < 0.81:
        section, b = "subtract", max(1, _operand(rng))
        a = rng.randint(0, b - 1)
    else:
        section, a, b = rng.choice(("add", "subtract")), _operand(rng), _operand(rng)
        third = f" {rng.choice('+-+-*')} {_operand(rng)}"
    if section != "subtract" and rng.random() < 0.5:
        a, b = b, a
    return space_signs(ask(section, lang, rng, {"a": lambda _: protect(a), "b": lambda _: protect(f"{b}{third}")}), rng)


def foreign_unit(lang: str, rng: random.Random) -> str:
    """A conversion the demo does not do: a large number, the other way round, or units that do not fit."""
    _, sources, targets = rng.choice(UNITS[lang])
    kind = rng.random()
    number: str = str(rng.randint(2, 99))
    source, target = rng.choice(sources), rng.choice(targets)
    if kind < 0.35:
        number = str(rng.randint(100, 9999)) if kind < 0.25 else f"{rng.randint(1, 20)}.{rng.randint(1, 9)}"
    elif kind < 0.6:
        source, target = target, source
        if target in ("minutes", "m", "min", "mins", "米", "分钟", "分") or source in ("kg", "公斤", "km"):
            number = str(rng.randint(100, 9000))
    else:
        others = {
            "en": "miles inches feet pounds ounces gallons euros dollars acres yards fahrenheit celsius bytes stones",
            "zh": "英里 英寸 英尺 磅 盎司 加仑 欧元 美元 人民币 亩 斤 两 里 尺 华氏度 摄氏度 字节 平方米 立方米 日元",
        }[lang].split()
        if rng.random() < 0.5:
            source = rng.choice(others)
        else:
            target = rng.choice(others)
    return ask(
        "unit", lang, rng,
        {"n": lambda _: protect(number), "from": lambda _: protect(source), "to": lambda _: protect(target)},
    )  # fmt: skip


def _foreign_translation(lang: str, rng: random.Random) -> str:
    """A request worded like a known one, with an unknown sentence."""
    to = rng.choice(LANGUAGES)
    other = "zh" if to == "en" else "en"
    sentence = sentence_pair(rng, to)[0]
    kind = rng.random()
    slots = _FOREIGN_SLOTS[other]
    if kind < 0.45:
        sentence = slots["oddsentence"](rng)
    elif kind < 0.6:
        sentence = slots["oddword"](rng)
    elif kind < 0.8:
        extra = {
            "en": "very much|because I am hungry|yesterday|and {topic}|in {place}|but not today|with my friends|"
            "every day",
            "zh": "，因为我饿了|，昨天|和{topic}|，在{place}|，但不是今天|，和朋友一起|和{thing}，每天",
        }[other].split("|")
        sentence += (" " if other == "en" else "") + pick(extra, rng, slots)
    else:
        heads = {
            "en": "I like|she wants|we need|they see|where is|this is|he bought|do you want|I do not like|"
            "my mother likes",
            "zh": "我喜欢|她想要|我们需要|他们看见|这是|他买了|你想不想要|我不喜欢|我妈妈喜欢|老师说",
        }[other].split("|")
        sentence = (
            rng.choice(heads) + (" " if other == "en" else "") + pick(["{topic}", "{thing}", "{oddword}"], rng, slots)
        )
    return ask(
        "translate", lang, rng,
        {"s": lambda _: protect(sentence), "language": lambda r: r.choice(_LANGUAGE_NAMES[lang, to])},
        strong=False,
    )  # fmt: skip


def foreign_turn(lang: str, rng: random.Random) -> Turn:
    """Something the demo does not know, and its one answer to that."""
    kind = rng.random()
    if kind < 0.06:
        question = strings.gibberish(rng, lang)
        if question.isascii() or any("一" <= sign <= "鿿" for sign in question):
            lang = "zh" if any("一" <= sign <= "鿿" for sign in question) else lang if not question.isascii() else "en"
    elif kind < 0.14:
        question = foreign_sum(lang, rng)
    elif kind < 0.19:
        question = foreign_unit(lang, rng)
    elif kind < 0.25:
        question = _foreign_translation(lang, rng)
    elif kind < 0.28:
        question = ask("weather", lang, rng, {"city": lambda r: protect(strings.city(r, lang))})
    elif kind < 0.3:
        question = ask(rng.choice(("date", "time")), lang, rng)
    elif kind < 0.31:
        low, high = rng.randint(0, 10), rng.randint(11, 1000)
        question = ask("random_number", lang, rng, {"a": lambda _: protect(low), "b": lambda _: protect(high)})
    else:
        section = rng.choices(list(_FOREIGN_WEIGHTS), list(_FOREIGN_WEIGHTS.values()))[0]
        text = pick(read(f"foreign_{lang}")[section], rng, _FOREIGN_SLOTS[lang])
        question = _clean(add_noise(text, lang, rng, rng.random() < 0.6)) if section != "otherlanguage" else text
        question = space_signs(question, rng) if section in ("maths", "negative") else question
    return refused(question, lang)


def refused(question: str, lang: str) -> Turn:
    """A question that the demo does not know the answer to."""
    return turn(question, REFUSAL[lang])


_INTENT_NAMES = [intent for intent in INTENTS if intent != "name_unknown"]


def random_turn(lang: str, rng: random.Random) -> Turn:
    """One question with its answer, of any kind but names and tools."""
    kind = rng.random()
    if kind < 0.31:
        return intent_turn(rng.choice(_INTENT_NAMES), lang, rng)
    if kind < 0.47:
        return arithmetic_turn(lang, rng)
    if kind < 0.54:
        return unit_turn(lang, rng)
    if kind < 0.61:
        return translation_turn(lang, rng)
    return foreign_turn(lang, rng)
