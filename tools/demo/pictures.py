"""Pictures that the vision demo learns from, and questions about them: coloured shapes, how many, and digits.

Everything follows from a `random.Random`. Each question has exactly one answer in each language.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import corpus

LANGUAGES = ("zh", "en")
#: name -> red, green, blue
COLOURS = {
    "red": (215, 30, 35), "green": (35, 150, 60), "blue": (35, 70, 215), "yellow": (245, 215, 40),
    "orange": (245, 130, 25), "purple": (130, 40, 165), "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
#: Colours that are too close to be one on top of the other.
_CLOSE = {frozenset(("red", "orange")), frozenset(("yellow", "orange")), frozenset(("yellow", "white")),
          frozenset(("blue", "purple")), frozenset(("black", "purple")), frozenset(("black", "blue"))}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
MOST = 5
_ZH = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "orange": "橙色", "purple": "紫色",
    "black": "黑色", "white": "白色", "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形",
    "cross": "十字",
}  # fmt: skip
_NUMBERS = {"zh": ("零", "一", "两", "三", "四", "五"), "en": ("no", "one", "two", "three", "four", "five")}


@dataclass(frozen=True)
class Thing:
    """Shapes of one kind, or a digit."""

    colour: str
    shape: str  # of SHAPES, or "0" to "9"
    count: int = 1

    @property
    def is_digit(self) -> bool:
        return self.shape.isdigit()


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one kind of thing, or two single shapes from left to right."""

    things: tuple[Thing, ...]
    background: str


def scene(rng: random.Random, held_out: bool | None = None) -> Scene:
    """A random scene.

    Args:
        held_out: only scenes that training never sees (True) or may see (False); None is both.
    """
    while True:
        background = "white" if rng.random() < 0.4 else rng.choice(list(COLOURS))
        able = [name for name in COLOURS if name != background and frozenset((name, background)) not in _CLOSE]
        kind = rng.random()
        if kind < 0.45:
            things = [Thing(rng.choice(able), rng.choice(SHAPES), rng.randint(1, MOST))]
        elif kind < 0.7:
            pairs = zip(rng.sample(able, 2), rng.sample(SHAPES, 2), strict=True)
            things = [Thing(colour, shape) for colour, shape in pairs]
        else:
            things = [Thing(rng.choice(able), str(rng.randint(0, 9)))]
        made = Scene(tuple(things), background)
        if held_out is None or is_held_out(made) == held_out:
            return made


def is_held_out(made: Scene) -> bool:
    """Whether the combination of background, colour, shape and number is kept from training: about one in ten."""
    text = "/".join([made.background, *(f"{one.colour}{one.shape}{one.count}" for one in made.things)])
    return random.Random(text).random() < 0.1


# ------------------------------------------------------------------------------------------------------------ drawing

#: Digits as strokes in a square of 4 x 6, for a hand that writes.
_STROKES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "0": (((2, 0), (0.5, 1), (0, 3), (0.5, 5), (2, 6), (3.5, 5), (4, 3), (3.5, 1), (2, 0)),),
    "1": (((0.8, 1.5), (2.2, 0), (2.2, 6)),),
    "2": (((0.2, 1.4), (1, 0.2), (2.8, 0), (3.8, 1.2), (3.4, 2.6), (0, 6), (4, 6)),),
    "3": (((0.3, 0.6), (2, 0), (3.7, 1), (3.2, 2.4), (1.8, 2.9), (3.4, 3.4), (4, 4.6), (2.6, 6), (0.2, 5.4)),),
    "4": (((2.8, 0), (0, 4.2), (4, 4.2)), ((3, 2.2), (3, 6))),
    "5": (((3.8, 0), (0.6, 0), (0.4, 2.7), (2.4, 2.3), (4, 3.6), (3.6, 5.3), (1.8, 6), (0, 5.3)),),
    "6": (((3.4, 0.2), (1.4, 1.4), (0.1, 4), (0.8, 5.7), (2.4, 6), (3.9, 5), (3.6, 3.4), (2, 2.8), (0.4, 3.8)),),
    "7": (((0, 0), (4, 0), (1.6, 6)),),
    "8": (((2, 2.8), (0.4, 1.6), (1, 0.2), (2.6, 0), (3.7, 1), (3, 2.4), (0.6, 3.8), (0.2, 5.2), (2, 6), (3.8, 5.2),
           (3.5, 3.9), (2, 2.8)),),
    "9": (((3.8, 1.6), (2.4, 0), (0.6, 0.6), (0.3, 2.2), (1.8, 3.2), (3.5, 2.4), (3.8, 1.2), (3.4, 6)),),
}  # fmt: skip


def draw(made: Scene, rng: random.Random, side: int | None = None) -> Image.Image:
    """A picture of the scene: places, sizes, shades and, for digits, handwriting or print are random."""
    width = side or rng.choice((48, 64, 80, 112))
    height = width if side or rng.random() < 0.6 else round(width * rng.uniform(0.75, 1.35))
    scale = 2
    image = Image.new("RGB", (width * scale, height * scale), _shade(made.background, rng))
    canvas = ImageDraw.Draw(image)
    short = min(image.size)
    if made.things[0].is_digit:
        _digit(canvas, image.size, made.things[0], rng)
    else:
        for centre, radius, thing in _places(made, image.size, short, rng):
            _shape(canvas, centre, radius, thing.shape, _shade(thing.colour, rng), rng)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    spread = 10 if colour in ("black", "white") else 18
    return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in COLOURS[colour])


def _places(
    made: Scene, size: tuple[int, int], short: int, rng: random.Random
) -> list[tuple[tuple[float, float], float, Thing]]:
    if len(made.things) == 2:
        found = []
        for index, thing in enumerate(made.things):
            radius = short * rng.uniform(0.11, 0.2)
            across = size[0] * (0.25 + 0.5 * index) + short * rng.uniform(-0.03, 0.03)
            found.append(((across, rng.uniform(radius * 1.1, size[1] - radius * 1.1)), radius, thing))
        return found
    thing = made.things[0]
    while True:
        found = []
        base = short * rng.uniform(0.1, (0.4, 0.24, 0.2, 0.17, 0.16)[thing.count - 1])
        for _ in range(60):
            radius = base * rng.uniform(0.9, 1.1)
            centre = tuple(rng.uniform(radius * 1.1, length - radius * 1.1) for length in size)
            if all(math.dist(centre, other) > 1.25 * (radius + far) for other, far, _ in found):
                found.append(((centre[0], centre[1]), radius, thing))
            if len(found) == thing.count:
                return found


def _shape(
    canvas: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, shape: str, fill: Any, rng: random.Random
) -> None:
    x, y = centre
    turn = rng.uniform(-0.2, 0.2)

    def at(angle: float, far: float) -> tuple[float, float]:
        return x + far * math.sin(angle + turn), y - far * math.cos(angle + turn)

    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        canvas.polygon([at(math.pi / 4 + k * math.pi / 2, radius * 1.15) for k in range(4)], fill=fill)
    elif shape == "triangle":
        canvas.polygon([at(k * 2 * math.pi / 3, radius * 1.15) for k in range(3)], fill=fill)
    elif shape == "star":
        canvas.polygon([at(k * math.pi / 5, radius * (1.2 if k % 2 == 0 else 0.48)) for k in range(10)], fill=fill)
    else:
        thick = radius * rng.uniform(0.5, 0.7)
        for first in (0, math.pi / 2):
            canvas.line([at(first, radius), at(first + math.pi, radius)], fill=fill, width=max(2, round(thick)))


def _digit(canvas: ImageDraw.ImageDraw, size: tuple[int, int], thing: Thing, rng: random.Random) -> None:
    fill, tall = _shade(thing.colour, rng), min(size) * rng.uniform(0.5, 0.85)
    if rng.random() < 0.5:
        font = ImageFont.load_default(tall)
        box = canvas.textbbox((0, 0), thing.shape, font=font)
        free = [length - (box[2 + axis] - box[axis]) for axis, length in enumerate(size)]
        place = [max(0, rng.uniform(0.15, 0.85) * room) - box[axis] for axis, room in enumerate(free)]
        for dx, dy in ((0, 0), (1, 0), (0, 1))[: rng.randint(1, 3)]:  # sometimes bold
            canvas.text((place[0] + dx, place[1] + dy), thing.shape, font=font, fill=fill)
        return
    unit, wide, lean = tall / 6, rng.uniform(0.75, 1.15), rng.uniform(-0.2, 0.25)
    left = rng.uniform(0.1, 0.9) * max(0.0, size[0] - 4 * unit * wide - 2 * unit) + unit
    top = rng.uniform(0.1, 0.9) * max(0.0, size[1] - tall - unit) + unit / 2
    thick = max(3, round(unit * rng.uniform(0.6, 1.3)))
    for stroke in _STROKES[thing.shape]:
        points = []
        for x, y in stroke:
            x, y = x + rng.uniform(-0.15, 0.15), y + rng.uniform(-0.15, 0.15)
            points.append((left + (x * wide + (3 - y) * lean) * unit, top + y * unit))
        canvas.line(points, fill=fill, width=thick, joint="curve")
        for x, y in (points[0], points[-1]):
            canvas.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=fill)


# ---------------------------------------------------------------------------------------------- questions and answers

#: kind -> language -> phrasings; the last one of each is kept from training.
PHRASES: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
REFUSAL = {
    "zh": "我只是一个小演示，只认得颜色、形状、数量和数字。",
    "en": "I am only a tiny demo: I know colours, shapes, how many there are, and digits.",
}


def _the(thing: Thing, lang: str, count: int = 1) -> str:
    """`三个红色的圆形`, `three red circles`, `a red circle`."""
    if lang == "zh":
        kind = f"数字{thing.shape}" if thing.is_digit else _ZH[thing.shape]
        return f"{_NUMBERS['zh'][count]}个{_ZH[thing.colour]}的{kind}"
    if thing.is_digit:
        return f"{_article(thing.colour)} {thing.colour} digit {thing.shape}"
    if count == 1:
        return f"{_article(thing.colour)} {thing.colour} {thing.shape}"
    return f"{_NUMBERS['en'][count]} {thing.colour} {thing.shape}{'es' if thing.shape == 'cross' else 's'}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def answer(made: Scene, kind: str, lang: str, asked: Thing | None = None) -> str:
    """The answer to a question of a kind; `asked` is what `is_there` asks for."""
    things, zh = made.things, lang == "zh"
    first = things[0]
    word: Callable[[str], str] = (lambda name: _ZH.get(name, name)) if zh else str
    if kind == "describe":
        behind = word(made.background)
        if len(things) == 2:
            left, right = _the(first, lang), _the(things[1], lang)
            if zh:
                return f"图里左边是{left}，右边是{right}，背景是{behind}的。"
            return f"On the left is {left}, on the right {right}; the background is {behind}."
        shown = _the(first, lang, first.count)
        if zh:
            return f"图里有{shown}，背景是{behind}的。"
        return f"The picture shows {shown} on {_article(behind)} {behind} background."
    if kind == "count":
        number = sum(thing.count for thing in things)
        return f"{_NUMBERS['zh'][number]}个。" if zh else f"{_NUMBERS['en'][number].capitalize()}."
    if kind == "digit":
        if not first.is_digit:
            return "图里没有数字。" if zh else "There is no digit."
        return f"数字{first.shape}。" if zh else f"The digit {first.shape}."
    if kind == "background":
        return f"{word(made.background)}。" if zh else f"{made.background.capitalize()}."
    if kind in ("left", "right"):
        thing = things[0 if kind == "left" else -1]
        return f"{_the(thing, lang)}。" if zh else f"{_the(thing, lang).capitalize()}."
    if kind == "is_there":
        there = any((asked.colour, asked.shape) == (thing.colour, thing.shape) for thing in things) if asked else False
        return ("有。" if there else "没有。") if zh else ("Yes." if there else "No.")
    if kind == "shape" and first.is_digit:
        return "是数字。" if zh else "It is a digit."
    names = [word(thing.colour if kind == "colour" else thing.shape) for thing in things]
    return f"{'和'.join(names)}。" if zh else f"{' and '.join(names).capitalize()}."


@dataclass(frozen=True)
class Question:
    kind: str
    lang: str
    text: str
    answer: str


def question(made: Scene, rng: random.Random, lang: str, held_out: bool = False, kind: str | None = None) -> Question:
    """A question about the scene with its answer; with `held_out`, in words that training never sees."""
    kinds = ["describe", "describe", "colour", "shape", "count", "count", "digit", "background", "is_there"]
    if len(made.things) == 2:
        kinds += ["left", "right", "left", "right"]
    if made.things[0].is_digit:
        kinds += ["digit", "digit"]
    kind = kind or rng.choice(kinds)
    phrases = PHRASES[kind][lang]
    text = phrases[-1] if held_out else rng.choice(phrases[:-1])
    asked = None
    if kind == "is_there":
        asked = rng.choice(made.things)
        if asked.is_digit or rng.random() < 0.5:
            colour = asked.colour if rng.random() < 0.4 else rng.choice(list(COLOURS))
            asked = Thing(colour, rng.choice(SHAPES))
        text = text.format((_ZH[asked.colour] + "的" + _ZH[asked.shape]) if lang == "zh" else _the(asked, "en"))
    if not held_out and rng.random() < 0.25:
        text = text.rstrip("。？.?") if rng.random() < 0.6 else text.lower()
    return Question(kind, lang, text, answer(made, kind, lang, asked))


def foreign(rng: random.Random, lang: str) -> Question:
    """A question that the demo does not answer."""
    turn = corpus.random_turn(lang, rng)
    return Question("foreign", lang, turn[0].content, REFUSAL[lang])


def conversation(made: Scene, rng: random.Random, several: bool | None = None) -> list[Question]:
    """One question, or (with `several`) two or three, of which the last is learned."""
    lang = rng.choice(LANGUAGES)
    several = rng.random() < 0.4 if several is None else several
    asked = [question(made, rng, lang) for _ in range(rng.choice((2, 2, 3)) if several else 1)]
    if rng.random() < 0.07:
        asked[-1] = foreign(rng, lang)
    return asked
