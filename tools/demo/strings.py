"""Random names, cities and words: copying is learned from strings that no list holds."""

from __future__ import annotations

import random
import re
import string
from functools import cache, lru_cache

from .phrases import parse, read

_ONSETS = (
    "b c d f g h j k l m n p r s t v w y z br ch cl cr dr fl fr gl gr kl kr ph pl pr sh sk sl sm st str th tr wh qu x"
).split()
_VOWELS = "a e i o u a e i o a e i ai au ea ee ei ia ie io oa oo ou ua y".split()
_CODAS = ["", "", "", *"n r l s m t n r l d k x ck ll nd nt ng rt rn sh ss st th ld mp tt".split()]
_CITY_ENDS = "ton ville burg ford field port land stad dam grad pur bad wick ham shire mouth by polis view".split()
_CITY_HEADS = "New San Los Port Fort Saint El La North South Mount Lake Upper West Great".split()
_SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟汪田任姜范方石姚谭"
    "廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易常武乔贺赖龚文"
)
_GIVEN = (
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华玉兰红梅建国文志海波宇浩然子轩梓涵雨欣怡晨阳思佳俊豪雪琴天宝春花秋月冬冰晓小大安康乐"
    "诗语嘉琪雅萱一诺可心若溪云飞龙鹏博睿泽瑞霖航凯峰林森山川石青松柏竹菊莲荷露珠玲珑瑶琳璐倩婷婉柔慧颖灵仁义礼智信忠孝勤俭德福寿喜庆祥"
)
_PLACE_CHARS = (
    "东南西北中上下大小新老安宁山海江河湖州城州县镇港湾口岛阳阴平原川溪泉源林石沙桥关津京都德克尔斯特兰巴利亚马罗里维拉丁普加索达布诺尼"
    "曼伦哥比雅圣卡萨洛奇墨费佛蒙塔波格莱杜登堡丹麦瓦纳贝汉洪武昌庆重广杭温台青金银铁龙虎凤鹤泰华永嘉兴盛和顺清水云贵黔渝蜀吉黑辽"
)


@lru_cache(maxsize=1)
def common_han() -> str:
    """The 3755 frequent characters of the standard GB 2312, level 1."""
    codes = (bytes((row, cell)) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    return "".join(code.decode("gb2312", errors="ignore") for code in codes)


@lru_cache(maxsize=1)
def english_words() -> list[str]:
    """All words of the phrase files."""
    text = " ".join(" ".join(lines) for name in ("en", "foreign_en") for lines in read(name).values())
    return sorted(set(re.findall(r"\b[a-z]{3,12}\b", text)))


@lru_cache(maxsize=1)
def chinese_words() -> list[str]:
    """All short runs of Chinese characters of the phrase files."""
    text = " ".join(" ".join(lines) for name in ("zh", "foreign_zh") for lines in read(name).values())
    return sorted(set(re.findall(r"[一-鿿]{2,4}", text)))


def syllables(rng: random.Random, low: int = 1, high: int = 3) -> str:
    parts = (
        rng.choice(_ONSETS) * (rng.random() < 0.88) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.randint(low, high))
    )
    return "".join(parts)


def _case(word: str, rng: random.Random) -> str:
    kind = rng.random()
    return word if kind < 0.13 else word.upper() if kind < 0.17 else word.title()


def latin_name(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.62:
        name = syllables(rng, 1, 3)
    elif kind < 0.74:
        name = rng.choice(english_words())
    elif kind < 0.82:
        name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
    elif kind < 0.92:
        name = syllables(rng, 1, 2) + rng.choice(" - '") + syllables(rng, 1, 2)
    elif kind < 0.96:
        name = syllables(rng, 1, 2) + str(rng.randint(0, 99))
    else:
        name = rng.choice(("mr. ", "dr. ", "miss ", "little ", "old ", "captain ", "mc", "o'", "de ")) + syllables(
            rng, 1, 2
        )
    return _case(name, rng)


def _han(rng: random.Random, pool: str) -> str:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(pool)
    return rng.choice(rng.choice(chinese_words())) if kind < 0.75 else rng.choice(common_han())


def chinese_name(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        surname = rng.choice(_SURNAMES) if rng.random() < 0.85 else rng.choice(common_han())
        return surname + "".join(_han(rng, _GIVEN) for _ in range(rng.choice((1, 2, 2))))
    if kind < 0.68:
        return rng.choice("小阿老大") + _han(rng, _GIVEN + _SURNAMES)
    if kind < 0.76:
        return _han(rng, _GIVEN) + rng.choice(
            ("哥", "姐", "叔", "儿", "宝", "总", "老师", "先生", "女士", "同学", "妹", "公子")
        )
    if kind < 0.82:
        return _han(rng, _GIVEN) * 2
    if kind < 0.9:
        return rng.choice(chinese_words())
    return "".join(_han(rng, _GIVEN) for _ in range(rng.randint(2, 5)))


def name(rng: random.Random, lang: str) -> str:
    """A random name, sometimes one of the other language."""
    return chinese_name(rng) if (rng.random() < 0.8) == (lang == "zh") else latin_name(rng)


def city(rng: random.Random, lang: str) -> str:
    """A random city, one time in four a real place."""
    if rng.random() < 0.25:
        place = rng.choice(_words(lang, "place"))
        return _case(place, rng) if lang == "en" else place
    if (rng.random() < 0.9) == (lang == "zh"):
        town = "".join(_han(rng, _PLACE_CHARS) for _ in range(rng.choice((2, 2, 2, 3, 3, 4, 5))))
        return town + rng.choice(("", "", "", "", "市", "县", "镇", "岛"))
    kind = rng.random()
    town = syllables(rng, 1, 3)
    if kind < 0.3:
        town = syllables(rng, 1, 2) + rng.choice(_CITY_ENDS)
    elif kind < 0.42:
        town = rng.choice(_CITY_HEADS) + " " + town
    elif kind < 0.5:
        town = town + rng.choice((" City", "-" + syllables(rng, 1, 2), " " + syllables(rng, 1, 2), " Bay", " Beach"))
    elif kind < 0.58:
        town = rng.choice(english_words())
    return _case(town, rng)


@cache
def _words(lang: str, section: str) -> list[str]:
    """The flat words of an `@section` of the foreign file."""
    words: list[str] = []
    for line in read(f"foreign_{lang}")[f"@{section}"]:
        for node in parse(line):
            if isinstance(node, list):
                words = ["".join(part for part in alternative if isinstance(part, str)) for alternative in node]
    return words


def odd_word(rng: random.Random, lang: str) -> str:
    """A word without context: invented, or any word of the phrase files."""
    kind = rng.random()
    if lang == "en":
        return syllables(rng, 1, 3) if kind < 0.3 else rng.choice(english_words())
    if kind < 0.4:
        return rng.choice(chinese_words())
    return "".join(rng.choice(common_han()) for _ in range(rng.choice((1, 2, 2, 2, 3, 4, 4))))


def gibberish(rng: random.Random, lang: str) -> str:
    """Keys hit at random, signs, pieces of words."""
    kind = rng.random()
    if kind < 0.25:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 14)))
    if kind < 0.4:
        return "".join(rng.choices("asdfghjklqwertyuiop;", k=rng.randint(4, 16)))
    if kind < 0.5:
        return "".join(rng.choices("?!.,;:#@$%&*()_-=<>/|~^0123456789", k=rng.randint(1, 9)))
    if kind < 0.62:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(4, 14)))
    if kind < 0.75:
        return " ".join(odd_word(rng, lang) for _ in range(rng.randint(2, 6)))
    if kind < 0.82:
        return rng.choice("😀😂🤔👍🎉❤🐱🚀🌧🍕") * rng.randint(1, 3)
    if lang == "zh":
        return "".join(rng.choice(common_han()) for _ in range(rng.randint(2, 12)))
    return " ".join(syllables(rng, 1, 2) for _ in range(rng.randint(1, 5)))


#: Signs of names and places that every vocabulary holds.
NAME_CHARS = "".join(sorted(set(_SURNAMES + _GIVEN + _PLACE_CHARS)))
