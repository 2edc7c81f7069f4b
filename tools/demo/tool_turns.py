"""Questions that a tool answers: the tools as a system message describes them, calls, their results, sentences on them.

Every dialogue has its own set of tools, in any order, often under other names and with other descriptions than the
usual ones, so that the model learns to read them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from chatglm.conversation import TOOLS_SYSTEM_PROMPT

from . import strings
from .corpus import (
    LANGUAGES,
    Message,
    Turn,
    arithmetic_turn,
    ask,
    foreign_sum,
    foreign_unit,
    protect,
    random_turn,
    refused,
    space_signs,
    unit_turn,
)

# ------------------------------------------------------------------------------------------------------- descriptions


def _tool(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": description, "parameters": schema}


#: The tools under their usual names: that of the demo's own file, and those built into `chatglm.tools`.
TOOLS: dict[str, dict[str, Any]] = {
    tool["name"]: tool
    for tool in (
        _tool("get_weather", "Get the current weather of a city", city=("string", "The name of the city")),
        _tool(
            "calculate", "Calculate the value of an arithmetic expression",
            expression=("string", "The expression, such as (3 + 4) * 2"),
        ),
        _tool(
            "convert_units", "Convert a value from one unit of measurement to another",
            value=("number", "The value to convert"), from_unit=("string", "The unit of the value, such as km"),
            to_unit=("string", "The unit to convert to, such as m"),
        ),
        _tool(
            "get_date", "Get the date and the day of the week, of today or of another day",
            days=("integer", "Days from today: 0 is today, 1 tomorrow, -1 yesterday"),
        ),
        _tool(
            "random_number", "Get a random whole number within a range", minimum=("integer", "The lowest number"),
            maximum=("integer", "The highest number"),
        ),
    )
}  # fmt: skip
del TOOLS["get_date"]["parameters"]["required"]
TOOLS["get_date"]["parameters"]["properties"]["days"]["default"] = 0
_WEIGHTS = {"get_weather": 10, "calculate": 10, "convert_units": 10, "get_date": 9, "random_number": 3}

_NAMES = {
    "get_weather": "get_current_weather weather query_weather weather_lookup city_weather".split(),
    "calculate": "calculator calc evaluate_expression compute math".split(),
    "convert_units": "unit_converter unit_conversion convert convert_unit units".split(),
    "get_date": "date current_date today date_tool get_today what_day calendar".split(),
    "random_number": "random_integer random_number_generator random randint pick_number".split(),
}
_ARGUMENTS: dict[str, list[list[str]]] = {
    "get_weather": [["city"], ["city"], ["city_name"], ["location"], ["place"]],
    "calculate": [["expression"], ["expression"], ["formula"], ["expr"], ["calculation"]],
    "convert_units": [
        ["value", "from_unit", "to_unit"], ["value", "from_unit", "to_unit"], ["number", "source", "target"],
        ["amount", "source_unit", "target_unit"], ["value", "unit", "to"],
    ],
    "get_date": [[], [], ["days"], ["days"], ["offset"]],
    "random_number": [["minimum", "maximum"], ["low", "high"], ["min", "max"], ["start", "end"], ["a", "b"]],
}  # fmt: skip
_DESCRIPTIONS = {
    "get_weather": (
        "Get the weather|Query the weather of a city|查询天气|获取城市的当前天气|Current weather for a city|"
        "查询指定城市的天气|Returns the weather|Get weather information|根据城市名称查询天气|weather lookup"
    ),
    "calculate": (
        "Calculate|Work out an arithmetic expression|计算器|计算算式的值|Evaluates an expression and returns it|"
        "Does sums|计算一个数学表达式|A calculator for + - * / and brackets|arithmetic|算术"
    ),
    "convert_units": (
        "Convert units|Converts lengths, weights, temperatures and more|单位换算|把一个单位的数值换算成另一个单位|"
        "Unit conversion|Change a quantity into another unit|换算单位|convert between units of measurement"
    ),
    "get_date": (
        "Current date|Returns today's date and the weekday|查询日期|获取当前的日期和星期|What day it is|Get the date|"
        "今天的日期|The date of today|返回日期和星期几|today's date"
    ),
    "random_number": (
        "Random number|Returns a random integer in a range|随机数|生成一个随机整数|Pick a number at random|"
        "生成指定范围内的随机数"
    ),
}
_ARGUMENT_TEXTS = {
    "get_weather": ["City name|城市名称|The city|city|城市|Name of the city|要查询的城市"],
    "calculate": ["The expression|算式|expression|For example 3*4|要计算的表达式|An arithmetic expression"],
    "convert_units": [
        "The number|数值|value|How many|要换算的数值|The value",
        "The unit to convert from|原单位|unit|Its unit|要换算的单位|source unit",
        "The unit to convert to|目标单位|wanted unit|换算成什么单位|target unit|The other unit",
    ],
    "get_date": ["Days from today|与今天相差的天数|0 is today|offset in days|几天之后"],
    "random_number": ["The smallest|最小值|lower bound|From|下限", "The largest|最大值|upper bound|To|上限"],
}


@dataclass
class Offer:
    """A tool as one dialogue has it: what it does, its name there, the names of its arguments."""

    kind: str
    name: str
    arguments: list[str]
    description: dict[str, Any]


def offer(kind: str, rng: random.Random) -> Offer:
    """A tool in one of the shapes that people write."""
    tool: dict[str, Any] = json.loads(json.dumps(TOOLS[kind]))
    properties = tool["parameters"]["properties"]
    if rng.random() < 0.6:
        return Offer(kind, kind, list(properties), tool)
    if rng.random() < 0.5:
        tool["name"] = rng.choice(_NAMES[kind])
    tool["description"] = rng.choice(_DESCRIPTIONS[kind].split("|"))
    names = rng.choice(_ARGUMENTS[kind])
    texts = [rng.choice(texts.split("|")) for texts in _ARGUMENT_TEXTS[kind]]
    types = [one["type"] for one in properties.values()]
    listed = list(zip(names, types, texts, strict=False))  # a tool for dates may have no arguments
    shape = rng.random()
    if shape < 0.1:  # the dialect of ChatGLM3's own demos
        del tool["parameters"]
        tool["params"] = [
            {"name": name, "description": text, "type": {"string": "str", "number": "float", "integer": "int"}[type_],
             "required": True} for name, type_, text in listed
        ]  # fmt: skip
        return Offer(kind, tool["name"], names, tool)
    described = rng.random() < 0.75
    full = {name: {"type": type_, **({"description": text} if described else {})} for name, type_, text in listed}
    if shape < 0.2:
        tool["parameters"] = full
    else:
        tool["parameters"] = {"type": "object", "properties": full, "required": names}
        if shape < 0.4 or kind == "get_date":
            del tool["parameters"]["required"]
        elif shape < 0.5:
            tool["parameters"]["additionalProperties"] = False
        if rng.random() < 0.2:
            tool["parameters"] = dict(reversed(tool["parameters"].items()))
    return Offer(kind, tool["name"], names, tool)


def offers(rng: random.Random) -> list[Offer]:
    """One to four tools, sometimes five, in any order."""
    number = rng.choices((1, 2, 3, 4, 5), (32, 28, 18, 20, 2))[0]
    kinds: list[str] = []
    while len(kinds) < number:
        kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        if kind not in kinds:
            kinds.append(kind)
    return [offer(kind, rng) for kind in kinds]


def system_message(offered: list[Offer], rng: random.Random) -> Message:
    """The system message that describes the tools."""
    prompts = (
        TOOLS_SYSTEM_PROMPT, TOOLS_SYSTEM_PROMPT, "You can use these tools:", "你可以使用以下工具：",
        "Use the tools if needed.",
    )  # fmt: skip
    return Message("system", rng.choice(prompts), tools=[one.description for one in offered])


# ------------------------------------------------------------------------------------------ questions, results, answers


@dataclass
class Use:
    """A question, the values of the arguments, the tool's result and the sentence on it."""

    question: str
    values: list[Any]
    observation: str
    answer: str


def _json(items: dict[str, Any], rng: random.Random) -> str:
    return json.dumps(items, ensure_ascii=False, indent=4 if rng.random() < 0.08 else None)


_SKIES = {
    "en": "sunny cloudy rainy clear snow fog windy overcast storm drizzle haze hail thunder mist showers warm "
    "cold".split(),
    "zh": "晴 多云 小雨 阴 大雪 雾 大风 阵雨 雷阵雨 晴朗 中雨 霾 暴雨 小雪 冰雹 晴转多云 沙尘 阴天".split(),
}


def _weather_report(rng: random.Random, lang: str, city: str) -> tuple[str, str, str]:
    """The result of the weather tool, with its temperature and sky."""
    temperature = str(rng.randint(-30, 45)) if rng.random() < 0.85 else f"{rng.randint(-9, 40)}.{rng.randint(1, 9)}"
    word_lang = lang if rng.random() < 0.6 else rng.choice(LANGUAGES)
    sky = rng.choice(_SKIES[word_lang]) if rng.random() < 0.75 else strings.odd_word(rng, word_lang)
    if word_lang == "en" and rng.random() < 0.2:
        sky = rng.choice(("partly ", "light ", "heavy ", "mostly ", "very ")) + sky
    keys = ("temperature", "weather") if rng.random() < 0.7 else rng.choice(
        (("temp", "condition"), ("temperature", "description"), ("温度",
         "天气"), ("temperature_c", "sky"), ("气温", "天气"))
    )  # fmt: skip
    value: Any = json.loads(temperature)
    items: list[tuple[str, Any]] = [(keys[0], value if rng.random() < 0.8 else f"{temperature}"), (keys[1], sky)]
    if rng.random() < 0.25:
        items.reverse()
    if rng.random() < 0.2:
        items.insert(0, ("city", city))
    if rng.random() < 0.15:
        items.append(rng.choice((("humidity", rng.randint(10, 99)), ("wind", rng.randint(0, 12)), ("unit", "C"))))
    return _json(dict(items), rng), temperature, sky


def _weather(lang: str, rng: random.Random) -> Use:
    city = strings.city(rng, lang)
    question = ask("weather", lang, rng, {"city": lambda _: protect(city)}, strong=rng.random() < 0.5)
    observation, temperature, sky = _weather_report(rng, lang, city)
    if lang == "en":
        answer = f"The weather in {city}: {sky}, {temperature} degrees."
    else:
        answer = f"{city}的天气：{sky}，{temperature}度。"
    return Use(question, [city], observation, answer)


def _number(rng: random.Random, fractions: float = 0.15) -> str:
    kind = rng.random()
    if kind < fractions:
        decimals = rng.choice(("5", "25", str(rng.randint(1, 99)).rstrip("0")))
        return f"{rng.randint(0, 10 ** rng.randint(1, 3))}.{decimals}"
    return str(rng.randint(2, 10 ** rng.choice((1, 2, 2, 2, 3, 3, 4, 5))))


def _expression(rng: random.Random) -> tuple[str, str]:
    """An expression as people write it, and as the calculator reads it."""
    signs = {"+": "+", "-": "-", "*": "*", "/": "/", "×": "*", "÷": "/"}
    parts = [_number(rng)]
    for _ in range(rng.choices((1, 2, 3), (30, 55, 15))[0]):
        parts += [rng.choice("++--**//××÷"), _number(rng)]
    if len(parts) > 3 and rng.random() < 0.55:
        at = 2 * rng.randrange(len(parts) // 2)
        until = min(at + 2, len(parts) - 1)
        parts[at] = "(" + parts[at]
        parts[until] += ")"
    blank = "" if rng.random() < 0.45 else " "
    return blank.join(parts), "".join(signs.get(part, part) for part in parts)


def _result(rng: random.Random) -> str:
    """What a calculation gives; the model copies it, so that it need not be right."""
    sign = "-" if rng.random() < 0.1 else ""
    if rng.random() < 0.65:
        return sign + str(rng.randint(0, 10 ** rng.randint(1, 8)))
    return sign + f"{rng.randint(0, 10 ** rng.randint(1, 4))}.{rng.randint(1, 10 ** rng.choice((1, 2, 4, 6, 12)))}"


def _calculator(lang: str, rng: random.Random) -> Use:
    kind = rng.random()
    if kind < 0.5:
        section = rng.choice(("add", "subtract", "multiply", "divide"))
        a, b = _number(rng), _number(rng)
        if rng.random() < 0.4:
            a, b = str(rng.randint(0, 99)), str(rng.randint(1, 99))
        question = ask(section, lang, rng, {"a": lambda _: protect(a), "b": lambda _: protect(b)})
        question = space_signs(question, rng)
        expression = a + {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}[section] + b
    elif kind < 0.9:
        written, expression = _expression(rng)
        question = ask("calculate", lang, rng, {"e": lambda _: protect(written)})
    else:
        percent, number = rng.choice(("5", "10", "15", "20", "25", "50", str(rng.randint(1, 99)))), _number(rng)
        question = ask("percent", lang, rng, {"p": lambda _: protect(percent), "n": lambda _: protect(number)})
        expression = f"{number}*{percent}/100"
    result = _result(rng)
    observation = result
    if rng.random() < 0.4:
        value = json.loads(result) if rng.random() < 0.7 else result
        observation = _json({rng.choice(("result", "result", "value", "answer", "结果")): value}, rng)
        result = re.findall(r"-?[\d.]+(?:e-?\d+)?", observation)[-1]
    elif rng.random() < 0.3:
        observation = f"{expression} = {result}"
    return Use(question, [expression], observation, f"The result is {result}." if lang == "en" else f"结果是{result}。")


#: Units by quantity; a conversion is between two of a group, written as the user writes them.
_UNITS = {
    "en": (
        "km|m|cm|mm|kilometers|kilometres|meters|metres|centimeters|centimetres|millimeters|miles|mile|mi|yards|feet|"
        "foot|ft|inches|inch|nautical miles",
        "kg|g|mg|kilograms|kilos|grams|milligrams|tonnes|tons|pounds|pound|lb|lbs|ounces|oz|stones",
        "l|ml|liters|litres|milliliters|gallons|gallon|pints|cups|quarts|cubic meters|fluid ounces|tablespoons",
        "fahrenheit|celsius|kelvin|degrees fahrenheit|degrees celsius|F|C|K",
        "hours|minutes|seconds|days|weeks|months|years|h|min|s|milliseconds",
        "km/h|mph|m/s|knots|kilometers per hour|miles per hour|meters per second",
        "acres|hectares|square meters|square feet|square kilometers|m2|km2",
        "bytes|kb|mb|gb|tb|megabytes|gigabytes|terabytes|bits|KB|MB|GB|TB",
        "joules|calories|kcal|kwh|watts|kilowatts|horsepower|bar|pascals|psi",
    ),
    "zh": (
        "公里|千米|米|厘米|毫米|分米|公分|英里|英尺|英寸|码|海里|里|尺|寸|km|m|cm|mm",
        "公斤|千克|克|毫克|吨|磅|盎司|斤|两|kg|g",
        "升|毫升|公升|加仑|品脱|立方米|立方厘米|夸脱|杯|L|ml",
        "华氏度|摄氏度|开尔文|华氏|摄氏|℃|℉",
        "小时|分钟|秒|天|周|星期|个月|年|毫秒|个小时|秒钟",
        "公里每小时|米每秒|英里每小时|节|千米每小时",
        "亩|公顷|平方米|平方公里|平方英尺|英亩|平方厘米",
        "字节|KB|MB|GB|TB|兆|比特",
        "焦耳|卡|千卡|千瓦时|瓦|千瓦|马力|帕|巴|大气压",
    ),
}


def _converter(lang: str, rng: random.Random) -> Use:
    group = rng.choices(_UNITS[lang], (5, 4, 3, 2, 3, 1, 1, 1, 1))[0].split("|")
    source, target = rng.sample(group, 2)
    if rng.random() < 0.08:
        source, target = strings.odd_word(rng, lang), rng.choice(group)
    number = _number(rng, 0.25)
    slots = {"n": lambda _: protect(number), "from": lambda _: protect(source), "to": lambda _: protect(target)}
    question = ask("unit", lang, rng, slots)
    if lang == "en" and len(source) < 4 and rng.random() < 0.3:
        question = question.replace(f"{number} {source}", f"{number}{source}")
    result = _result(rng)
    kind = rng.random()
    observation = result
    if kind < 0.25:
        value = json.loads(result)
        items: dict[str, Any] = {rng.choice(("value", "value", "result")): value}
        if rng.random() < 0.7:
            items["unit"] = target
        observation = _json(items, rng)
        result = json.dumps(value)
    elif kind < 0.5:
        observation = f"{result} {target}"
    elif kind < 0.65:
        observation = f"{number} {source} = {result} {target}"
    if lang == "en":
        answer = f"{number} {source} = {result} {target}."
    else:
        answer = f"{number}{source}={result}{target}。"
    return Use(question, [json.loads(number), source, target], observation, answer)


_WEEKDAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "zh": "星期一 星期二 星期三 星期四 星期五 星期六 星期日".split(),
}


#: Days from today -> how people ask for that day, and how the answer begins.
_OTHER_DAYS = {
    "en": {1: "tomorrow", -1: "yesterday", 2: "the day after tomorrow", -2: "the day before yesterday"},
    "zh": {1: "明天", -1: "昨天", 2: "后天", -2: "前天"},
}


def _date(lang: str, rng: random.Random, other_days: bool = False) -> Use:
    days = 0
    if other_days and rng.random() < 0.35:
        days = rng.choice((1, 1, -1, 2, -2, rng.randint(2, 40)))
        word = _OTHER_DAYS[lang].get(days) or (f"in {days} days" if lang == "en" else f"{days}天后")
        question = ask("other_day", lang, rng, {"day": lambda _: protect(word)}, strong=rng.random() < 0.4)
    else:
        question = ask("date", lang, rng, strong=rng.random() < 0.4)
    day = date(1980, 1, 1) + timedelta(days=rng.randrange(36525))
    weekday = _WEEKDAYS[lang if rng.random() < 0.5 else "en"][day.weekday()]
    today = day.isoformat()
    has_weekday = rng.random() < 0.85
    if rng.random() < 0.35:
        items = {"date": today} | ({rng.choice(("weekday", "weekday", "day", "星期")): weekday} if has_weekday else {})
        if rng.random() < 0.25:
            items["time"] = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        observation = _json(items, rng)
    else:
        order = [today, weekday] if rng.random() < 0.8 else [weekday, today]
        observation = rng.choice((" ", " ", " ", ", ")).join(order) if has_weekday else today
    if lang == "en":
        answer = f"{'That' if days else 'Today'} is {f'{weekday}, ' if has_weekday else ''}{today}."
    else:
        answer = f"{'那天' if days else '今天'}是{today}{f'，{weekday}' if has_weekday else ''}。"
    return Use(question, [days] if days else [], observation, answer)


def _random_number(lang: str, rng: random.Random) -> Use:
    low = rng.choice((0, 1, 1, 1, rng.randint(2, 50)))
    high = rng.choice((low + rng.randint(1, 20), 6 + low, 10 + low, 100, 1000, rng.randint(51, 9999)))
    slots = {"a": lambda _: protect(low), "b": lambda _: protect(high)}
    question = ask("random_number", lang, rng, slots, strong=rng.random() < 0.5)
    result = rng.randint(low, max(low, high))
    observation = str(result) if rng.random() < 0.6 else _json({rng.choice(("number", "result", "value")): result}, rng)
    answer = f"The random number is {result}." if lang == "en" else f"随机数是{result}。"
    return Use(question, [low, high], observation, answer)


_USES: dict[str, Callable[[str, random.Random], Use]] = {
    "get_weather": _weather, "calculate": _calculator, "convert_units": _converter, "get_date": _date,
    "random_number": _random_number,
}  # fmt: skip

#: The one answer to a result that says that the tool failed.
NO_RESULT = {"en": "The tool could not answer that.", "zh": "工具没有给出结果。"}


def _failure(lang: str, rng: random.Random) -> str:
    """The result of a tool that failed."""
    words = " ".join(strings.odd_word(rng, rng.choice(("en", lang))) for _ in range(rng.randint(1, 3)))
    text = rng.choice(
        ("the unit {} is not known", "division by zero", "{} is not an arithmetic expression", "no such city: {}",
         "the tool took more than 10 seconds.", "invalid syntax", "connection refused",
         "wrong arguments: {}: it is required", "{} must be a number", "not found: {}", "未知单位：{}", "没有找到：{}",
         "网络错误", "{}", "{} is not allowed",
         "{} and {} do not measure the same")
    ).format(words, words)  # fmt: skip
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(("The user did not allow this call.", f"There is no tool {words!r}; the tools are: none."))
    if kind < 0.2:
        return json.dumps({"error": text}, ensure_ascii=False)
    return rng.choice(("Error: ", "Error: ", "Error: ", "error: ", "ValueError: ", "错误：")) + text


def tool_call(arguments: dict[str, Any]) -> str:
    """What the model writes to call a tool."""
    written = ", ".join(f"{key}={_quoted(value)}" for key, value in arguments.items())
    return f"```python\ntool_call({written})\n```"


def _quoted(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value)
    return f'"{value}"' if "'" in value else f"'{value}'"


def used_turn(one: Offer, lang: str, rng: random.Random) -> Turn:
    """A question, the tool call and, nearly always, its result and a sentence about it."""
    use = _date(lang, rng, bool(one.arguments)) if one.kind == "get_date" else _USES[one.kind](lang, rng)
    arguments = dict(zip(one.arguments, use.values, strict=one.kind != "get_date"))
    call = Message("assistant", tool_call(arguments), one.name, arguments=arguments)
    turn = [Message("user", use.question), call]
    if rng.random() < 0.06:
        turn += [Message("observation", _failure(lang, rng)), Message("assistant", NO_RESULT[lang])]
    elif rng.random() < 0.95:
        turn += [Message("observation", use.observation), Message("assistant", use.answer)]
    return turn


# -------------------------------------------------------------------------------------------------- where no tool fits

#: Questions that might be for a tool: where it is offered, such a question is not an example of something foreign.
_FOR_TOOL = {
    "get_weather": r"weather|forecast|temperature|rain|snow|umbrella|天气|气温|温度|雨|雪|冷|热",
    "calculate": r"\d.*[-+*/x×÷^%].*\d|divide|percent|square|average|\bsum\b|calcul|plus|minus|times|add|comput|sqrt"
    r"|\d.*(more|lose|left|eggs|apples|rows|groups|of)|加|减|乘|除|平方|的和|百分之|计算|\d.*(多少|几|倍|共|还剩)|算",
    "convert_units": r"convert|\d.*(how many|how much| to | in |=|->)|how (many|much).*\d|\d.*(多少|几)|换|转|多少.*\d",
    "get_date": r"\b(time|day|date|month|year|today|o'clock|clock|now)\b|几点|几号|几月|星期|周几|礼拜|日期|时间|"
    r"什么日子|多少号|节日|农历|哪年|哪一年|今天|现在|今年|本月",
    "random_number": r"random|\bpick\b|number|dice|lucky|随机|选一个|抽|数字",
}


def plain_turn(offered: list[Offer], lang: str, rng: random.Random) -> Turn:
    """A question for none of the tools that are offered, answered as without tools."""
    kinds = {one.kind for one in offered}
    missing = [kind for kind in _USES if kind not in kinds]
    while True:
        if "get_date" in kinds and rng.random() < 0.1:
            return refused(ask("time", lang, rng), lang)  # the date is no answer to it
        if missing and rng.random() < 0.5:
            turn = _for_missing(rng.choice(missing), lang, rng)
        else:
            turn = random_turn(lang, rng)
        if not any(re.search(_FOR_TOOL[kind], turn[0].content.lower()) for kind in kinds):
            return turn


def _for_missing(kind: str, lang: str, rng: random.Random) -> Turn:
    """A question for a tool that is not offered."""
    if kind == "calculate":
        return arithmetic_turn(lang, rng) if rng.random() < 0.5 else refused(foreign_sum(lang, rng), lang)
    if kind == "convert_units":
        return unit_turn(lang, rng) if rng.random() < 0.5 else refused(foreign_unit(lang, rng), lang)
    return refused(_USES[kind](lang, rng).question, lang)
