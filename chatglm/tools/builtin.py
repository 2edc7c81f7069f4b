"""Tools that are safe to offer to anyone: they compute, and touch neither files nor the network."""

from __future__ import annotations

import ast
import datetime
import math
import operator
import random
from collections.abc import Callable
from typing import Any

from .tool import Tool, ToolError, tool

_MOST_CHARACTERS, _MOST_BITS = 500, 10_000
_SIGNS = str.maketrans("×÷−－＋＊／（），．０１２３４５６７８９", "*/--+*/(),.0123456789")
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(math, name)
    for name in "sqrt cbrt exp log log2 log10 sin cos tan asin acos atan atan2 floor ceil gcd degrees radians".split()
    if hasattr(math, name)  # cbrt is of Python 3.11
} | {"abs": abs, "round": round, "min": min, "max": max}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_ALLOWED = "only numbers, + - * / // % **, parentheses and " + ", ".join([*_FUNCTIONS, *_CONSTANTS])


def _calculate(expression: str) -> str:
    """Calculate the value of an arithmetic expression

    Args:
        expression: The expression, such as (3 + 4) * 2
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ToolError(f"the expression is longer than {_MOST_CHARACTERS} characters")
    try:
        value = _value(ast.parse(expression.translate(_SIGNS).strip().rstrip("=").strip(), mode="eval").body)
        if isinstance(value, complex):
            raise ToolError("the result is not a real number")
        return str(value) if isinstance(value, int) else f"{value:.12g}"
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ToolError(f"{expression!r} is not an arithmetic expression") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ToolError(f"it cannot be calculated: {error}") from None


def _value(node: ast.expr) -> Any:
    """The value of an expression of numbers; nothing else is ever evaluated."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, (ast.Pow, ast.BitXor)):  # people, and models, write 2^10 as well
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in _FUNCTIONS:
            raise ToolError(_ALLOWED)
        return _FUNCTIONS[node.func.id](*map(_value, node.args))
    raise ToolError(_ALLOWED)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) * base.bit_length() > _MOST_BITS:
        raise ToolError("the result is too large")
    return base**exponent


#: Unit -> (what it measures, how many of the first unit of that kind it is).
_UNITS: dict[str, tuple[str, float]] = {
    name: (kind, size)
    for kind, units in {
        "length": {
            "m meter meters metre metres 米 公尺": 1, "km kilometer kilometers kilometre 千米 公里": 1000,
            "cm centimeter centimeters 厘米": 0.01, "mm millimeter millimeters 毫米": 0.001,
            "dm decimeter 分米": 0.1, "mi mile miles 英里": 1609.344, "yd yard yards 码": 0.9144,
            "ft foot feet 英尺": 0.3048, "in inch inches 英寸": 0.0254, "nmi 海里": 1852, "里": 500, "尺": 1 / 3,
        },
        "mass": {
            "kg kilogram kilograms 千克 公斤": 1, "g gram grams 克": 0.001, "mg milligram 毫克": 1e-6,
            "t ton tons tonne 吨": 1000, "lb lbs pound pounds 磅": 0.45359237, "oz ounce ounces 盎司": 0.028349523125,
            "斤": 0.5, "两": 0.05,
        },
        "time": {
            "s sec second seconds 秒": 1, "min minute minutes 分钟": 60, "h hr hour hours 小时": 3600,
            "d day days 天": 86400, "week weeks 周 星期": 604800, "ms millisecond 毫秒": 0.001,
        },
        "area": {
            "m2 m² sqm 平方米": 1, "km2 km² 平方公里 平方千米": 1e6, "ha hectare 公顷": 1e4, "亩": 10000 / 15,
            "acre acres 英亩": 4046.8564224, "ft2 sqft 平方英尺": 0.09290304, "cm2 cm² 平方厘米": 1e-4,
        },
        "volume": {
            "l liter liters litre 升": 1, "ml milliliter 毫升": 0.001, "m3 m³ 立方米": 1000,
            "gal gallon gallons 加仑": 3.785411784, "pt pint pints 品脱": 0.473176473, "cup cups 杯": 0.2365882365,
        },
        "speed": {
            "m/s 米每秒": 1, "km/h kmh kph 千米每小时 公里每小时": 1 / 3.6, "mph 英里每小时": 0.44704,
            "kn knot knots 节": 1852 / 3600,
        },
        "data": {"b byte bytes 字节": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20,
                 "gib": 2**30, "tib": 2**40},
    }.items()
    for names, size in units.items()
    for name in names.split()
}  # fmt: skip
_TEMPERATURES = {
    name: kind
    for kind, names in {
        "C": "c °c celsius 摄氏度", "F": "f °f fahrenheit 华氏度", "K": "k kelvin 开尔文 开",
    }.items()
    for name in names.split()
}  # fmt: skip
_KELVIN: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "C": (lambda value: value + 273.15, lambda kelvin: kelvin - 273.15),
    "F": (lambda value: (value + 459.67) * 5 / 9, lambda kelvin: kelvin * 9 / 5 - 459.67),
    "K": (float, float),
}


def _convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a value from one unit of measurement to another

    Args:
        value: The value to convert
        from_unit: The unit of the value, such as km
        to_unit: The unit to convert to, such as m
    """
    one, other = from_unit.strip().lower(), to_unit.strip().lower()
    if one in _TEMPERATURES and other in _TEMPERATURES:
        result = _KELVIN[_TEMPERATURES[other]][1](_KELVIN[_TEMPERATURES[one]][0](value))
        return f"{round(result, 9):.10g} {to_unit.strip()}"
    for given, unit in ((from_unit, one), (to_unit, other)):
        if unit not in _UNITS and unit not in _TEMPERATURES:
            raise ToolError(f"the unit {given!r} is not known")
    if one in _TEMPERATURES or other in _TEMPERATURES or _UNITS[one][0] != _UNITS[other][0]:
        raise ToolError(f"{from_unit} and {to_unit} do not measure the same")
    return f"{value * _UNITS[one][1] / _UNITS[other][1]:.10g} {to_unit.strip()}"


def _get_date(days: int = 0) -> str:
    """Get the date and the day of the week, of today or of another day

    Args:
        days: Days from today: 0 is today, 1 tomorrow, -1 yesterday
    """
    try:
        day = datetime.date.today() + datetime.timedelta(days=days)
    except OverflowError:
        raise ToolError("the date is out of range") from None
    return f"{day:%Y-%m-%d} {day:%A}"


def _random_number(minimum: int, maximum: int) -> str:
    """Get a random whole number within a range

    Args:
        minimum: The lowest number
        maximum: The highest number
    """
    if minimum > maximum:
        raise ToolError("the lowest number is above the highest")
    return str(random.randint(minimum, maximum))


calculate: Tool = tool(name="calculate")(_calculate)
convert_units: Tool = tool(name="convert_units")(_convert_units)
get_date: Tool = tool(name="get_date")(_get_date)
random_number: Tool = tool(name="random_number")(_random_number)
#: All of them.
BUILT_IN: tuple[Tool, ...] = (calculate, convert_units, get_date, random_number)
