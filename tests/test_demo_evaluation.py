"""The held-out evaluation sets of the bundled demo models are well formed and their expected answers are right."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tools.demo import tool_turns

FOLDER = Path(__file__).resolve().parents[1] / "tools" / "demo" / "evaluation"
LANGUAGES = ("zh", "en")
KEYS = ("id", "kind", "intent", "lang", "turns", "tools")
CHECKS = ("intent", "number", "contains", "translation", "tool", "refusal")

SMALL_TALK = {
    "hello", "good_morning", "good_night", "how_are_you", "who_are_you", "who_made_you", "are_you_human",
    "what_can_you_do", "thanks", "sorry", "goodbye", "praise", "insult", "joke", "how_old", "feelings", "bored",
    "sad", "happy", "languages", "nice_to_meet_you", "ok",
}  # fmt: skip
SOFTWARE = {
    "load_weights", "supported_models", "quit", "clear", "undo", "regenerate", "save_load", "system_prompt",
    "set_parameters", "stop_answer", "multi_line", "web_page", "api", "quantise", "device", "python_usage",
    "streaming", "fine_tune", "licence", "why_so_small", "how_big", "memory_needed", "internet", "what_is_chatglm",
    "commands",
}  # fmt: skip
ARITHMETIC = {"add": 5, "subtract": 5, "multiply": 4}  # intent -> items per language
OTHERS = {"unit": 9, "translate": 9, "name_memory": 6, "name_unknown": 1, "weather": 5}

# Source unit -> factor; each source unit has one target only, and the first name that fits decides.
UNITS = {
    "kilomet": 1000, "km": 1000, "kg": 1000, "tonne": 1000, "litre": 1000, "liter": 1000, "cm": 10, "m ": 100,
    "hour": 60, "minute": 60, "day": 24, "week": 7, "year": 12,
    "公里": 1000, "千米": 1000, "公斤": 1000, "千克": 1000, "吨": 1000, "升": 1000, "厘米": 10, "米": 100,
    "小时": 60, "分钟": 60, "天": 24, "星期": 7, "周": 7, "年": 12,
}  # fmt: skip


def read(kind: str) -> list[dict[str, Any]]:
    """The items of one evaluation file, one JSON object per line."""
    lines = (FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


SCOPE, FOREIGN = read("scope"), read("foreign")
ITEMS = SCOPE + FOREIGN
TOOLS = read("tools")


def has_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def normal(text: str) -> str:
    """Case, spaces and punctuation do not make a question a new one; signs of arithmetic do."""
    return re.sub(r"[^\w+\-*/×=^]", "", text.casefold())


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def of_intent(*intents: str) -> list[Any]:
    return [pytest.param(item, id=item["id"]) for item in SCOPE if item["intent"] in intents]


def test_counts_and_languages() -> None:
    for items in (SCOPE, FOREIGN):
        assert Counter(item["lang"] for item in items) == {"zh": 100, "en": 100}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_distribution_covers_every_intent(lang: str) -> None:
    counts = Counter(item["intent"] for item in SCOPE if item["lang"] == lang)
    assert sum(counts[name] for name in SMALL_TALK) == 26
    assert sum(counts[name] for name in SOFTWARE) == 30
    assert set(counts) == SMALL_TALK | SOFTWARE | set(ARITHMETIC) | set(OTHERS)
    for name, expected in {**ARITHMETIC, **OTHERS}.items():
        assert counts[name] == expected, name
    observed = [item for item in SCOPE if item["lang"] == lang and "observation" in item]
    assert 1 <= len(observed) <= 2


def test_ids_and_questions_are_unique() -> None:
    assert len({item["id"] for item in ITEMS}) == len(ITEMS)
    conversations = Counter(tuple(normal(turn) for turn in item["turns"]) for item in ITEMS)
    assert [turns for turns, count in conversations.items() if count > 1] == []


@pytest.mark.parametrize("item", [pytest.param(item, id=item["id"]) for item in ITEMS])
def test_item_is_well_formed(item: dict[str, Any]) -> None:
    assert set(KEYS) | {"check"} <= set(item) <= set(KEYS) | {"check", "observation"}
    assert re.fullmatch(rf"{item['lang']}-\d{{3}}", item["id"])
    assert item["lang"] in LANGUAGES
    assert type(item["tools"]) is bool
    assert item["turns"]
    assert all(isinstance(turn, str) and turn and turn == turn.strip() for turn in item["turns"])
    if item["lang"] == "zh":
        assert has_chinese(item["turns"][-1])
    elif item["intent"] not in ("translate", "foreign"):  # only these quote the other language
        assert not any(has_chinese(turn) for turn in item["turns"])

    [(name, value)] = item["check"].items()
    assert name in CHECKS
    if name == "intent":
        assert value == item["intent"]
        assert value in SMALL_TALK | SOFTWARE | {"name_unknown"}
    elif name == "number":
        assert type(value) is int
    elif name == "contains":
        assert isinstance(value, str)
        assert value
    elif name == "translation":
        wanted = value if isinstance(value, list) else [value]
        assert wanted
        assert len(set(wanted)) == len(wanted)
        assert all(isinstance(text, str) and text for text in wanted)
    elif name == "tool":
        assert set(value) == {"name", "city"}
        assert value["name"] == "get_weather"
    else:
        assert value is True


@pytest.mark.parametrize("item", [pytest.param(item, id=item["id"]) for item in FOREIGN])
def test_foreign_items_expect_a_refusal(item: dict[str, Any]) -> None:
    assert (item["kind"], item["intent"], item["check"]) == ("foreign", "foreign", {"refusal": True})
    assert len(item["turns"]) == 1


@pytest.mark.parametrize("item", [pytest.param(item, id=item["id"]) for item in SCOPE])
def test_scope_items_are_answered(item: dict[str, Any]) -> None:
    assert item["kind"] == "scope"
    assert "refusal" not in item["check"]
    assert item["tools"] is (item["intent"] == "weather")


@pytest.mark.parametrize("item", of_intent(*ARITHMETIC))
def test_arithmetic_is_right_and_in_range(item: dict[str, Any]) -> None:
    a, b = integers(item["turns"][-1])
    if item["intent"] == "add":
        expected = a + b
        assert max(a, b) <= 99
    elif item["intent"] == "subtract":
        expected = a - b
        assert b <= a <= 99
    else:
        expected = a * b
        assert 2 <= min(a, b) <= 9
        assert max(a, b) <= 99
    assert item["check"] == {"number": expected}


@pytest.mark.parametrize("item", of_intent("unit"))
def test_unit_conversion_is_right(item: dict[str, Any]) -> None:
    text = item["turns"][-1]
    [number] = integers(text)
    assert 1 <= number <= 99
    # The unit converted from stands right behind its number.
    source = text.split(str(number), 1)[1].strip().removeprefix("个").lower()
    factor = next(value for name, value in UNITS.items() if source.startswith(name))
    assert item["check"] == {"number": number * factor}


@pytest.mark.parametrize("item", of_intent("translate"))
def test_translation_goes_to_the_other_language(item: dict[str, Any]) -> None:
    value = item["check"]["translation"]
    targets = {has_chinese(text) for text in (value if isinstance(value, list) else [value])}
    assert len(targets) == 1
    if item["lang"] == "en" and targets == {False}:  # the sentence to translate has to be there
        assert has_chinese(item["turns"][-1])
    if item["lang"] == "zh" and targets == {True}:
        assert re.search(r"[A-Za-z]{2}", item["turns"][-1])


@pytest.mark.parametrize("item", of_intent("name_memory"))
def test_name_is_told_before_it_is_asked_for(item: dict[str, Any]) -> None:
    name = item["check"]["contains"]
    assert name in item["turns"][0]
    assert not any(name in turn for turn in item["turns"][1:])


def test_tool_items_cover_every_tool_and_what_none_is_for() -> None:
    for lang in LANGUAGES:
        counts = Counter(item["intent"] for item in TOOLS if item["lang"] == lang)
        assert counts == {
            "calculate": 10, "convert_units": 10, "get_date": 8, "get_weather": 8, "no_tool": 15, "tool_result": 9,
        }  # fmt: skip
    assert {len(item["tools"]) for item in TOOLS} == {1, 2, 3, 4}
    assert len({item["id"] for item in TOOLS}) == len({item["turns"][0] for item in TOOLS}) == len(TOOLS)


@pytest.mark.parametrize("item", [pytest.param(item, id=item["id"]) for item in TOOLS])
def test_tool_item_is_well_formed(item: dict[str, Any]) -> None:
    assert set(KEYS) | {"check"} <= set(item) <= set(KEYS) | {"check", "observation"}
    assert len(item["turns"]) == 1 and (item["lang"] == "zh") == has_chinese(item["turns"][0])
    assert set(item["tools"]) <= set(tool_turns.TOOLS)
    if item["intent"] in tool_turns.TOOLS:
        wanted = item["check"]["tool"]
        assert wanted["name"] == item["intent"] and wanted["name"] in item["tools"]
        properties = tool_turns.TOOLS[wanted["name"]]["parameters"]["properties"]
        assert set(wanted) - {"name"} <= set(properties)
        numbers = re.findall(r"[\d.]*\d", item["turns"][0])
        if "expression" in wanted and "%" not in item["turns"][0]:
            assert re.findall(r"[\d.]*\d", wanted["expression"]) == (
                numbers[::-1] if item["turns"][0].startswith("Subtract") else numbers
            )
        if "value" in wanted:
            assert [float(number) for number in numbers] == [wanted["value"]]
            assert wanted["from_unit"] in item["turns"][0] and wanted["to_unit"] in item["turns"][0]
    else:
        assert "tool" not in item["check"]
        assert (item["intent"] == "tool_result") == ("observation" in item)


@pytest.mark.parametrize("item", of_intent("weather"))
def test_weather_item_names_its_city_or_its_temperature(item: dict[str, Any]) -> None:
    if "observation" in item:
        assert set(item["observation"]) == {"temperature", "weather"}
        assert item["check"] == {"contains": str(item["observation"]["temperature"])}
    else:
        assert item["check"]["tool"]["city"] in item["turns"][-1]
