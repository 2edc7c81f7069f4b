"""Tools from functions: names, schemas, checked arguments."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field

from chatglm.tools import Call, Tool, check_tools, run_call, tool


@tool
def weather(city: str, days: int = 1, *, json: bool = False) -> str:
    """Get the weather
    of a city

    Args:
        city: The name of the city,
            without its country
        days (int, optional): How many days

    Returns:
        It in words.
    """
    return f"{city!r} {days!r} {json!r}"


@tool
def random_number_generator(
    seed: Annotated[int, "The random seed", True],
    range: Annotated[tuple[int, int], "The range of the numbers", True],
    note: Annotated[str, "A note", False],
) -> Any:
    """Generates a random number x, s.t. range[0] <= x < range[1]"""
    return [seed, range, type(range).__name__, note]


def test_the_schema_is_read_from_signature_and_docstring() -> None:
    assert weather.describe() == {
        "name": "weather",
        "description": "Get the weather\nof a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The name of the city, without its country"},
                "days": {"type": "integer", "description": "How many days", "default": 1},
                "json": {"type": "boolean", "default": False},
            },
            "required": ["city"],
        },
    }
    assert weather("Bern", json=True) == "'Bern' 1 True"


def test_the_form_of_chatglm3_s_demos_is_read_and_written() -> None:
    described = random_number_generator.describe("params")
    assert described["params"] == [
        {"name": "seed", "description": "The random seed", "type": "int", "required": True},
        {"name": "range", "description": "The range of the numbers", "type": "tuple[int, int]", "required": True},
        {"name": "note", "description": "A note", "type": "str", "required": False},
    ]
    assert described["description"] == "Generates a random number x, s.t. range[0] <= x < range[1]"
    assert random_number_generator.describe()["parameters"]["required"] == ["seed", "range"]


def test_descriptions_in_the_form_of_sphinx() -> None:
    @tool
    def add(a: int, b: int) -> int:
        """Adds numbers.

        :param a: the first
        :param int b: the
            second
        :returns: the sum
        """
        return a + b

    assert add.description == "Adds numbers."
    assert [one["description"] for one in add.params] == ["the first", "the second"]


def run(one: Tool, **arguments: Any) -> str:
    return run_call({one.name: one}, Call(one.name, arguments)).content


def test_arguments_become_the_types_of_the_signature() -> None:
    assert run(weather, city="北京", days="3") == "'北京' 3 False"
    assert run(weather, city=7) == "'7' 1 False"
    assert run(random_number_generator, seed=1, range=[2, 3]) == '[1, [2, 3], "tuple", null]'  # JSON has no tuples


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "city: it is required"),
        ({"city": "x", "town": "y"}, "town: there is no such argument"),
        ({"city": "x", "days": "soon"}, "days: Input should be a valid integer"),
        ({"city": ["x"]}, "city: Input should be a valid string"),
    ],
)
def test_wrong_arguments_are_told_to_the_model_and_nothing_runs(arguments: dict[str, Any], reason: str) -> None:
    assert run(weather, **arguments).startswith(f"Error: wrong arguments: {reason}")


def test_limits_of_pydantic_are_kept() -> None:
    @tool
    def roll(sides: Annotated[int, Field(ge=2, description="Of the die")]) -> int:
        return sides

    assert roll.parameters["properties"]["sides"] == {"type": "integer", "description": "Of the die", "minimum": 2}
    assert "greater than or equal to 2" in run(roll, sides=1)


def test_errors_of_a_signature_name_the_parameter() -> None:
    def bare(city) -> None: ...  # type: ignore[no-untyped-def]
    def number(city: Annotated[str, 5, True]) -> None: ...
    def word(city: Annotated[str, "x", "yes"]) -> None: ...
    def many(*cities: str) -> None: ...
    async def later(city: str) -> None: ...

    for function, reason in (
        (bare, "'city' of bare needs an annotation"),
        (number, "'city': its description must be a string"),
        (word, "'city': whether it is required must be True or False"),
        (many, "'cities' of many must be one that is passed by name"),
        (later, "later is a coroutine function"),
    ):
        with pytest.raises(TypeError, match=reason):
            tool(function)


@pytest.mark.parametrize("name", ["", "a b", "a\n<|user|>", "x" * 65, "1a", "工具", "interpreter", "python"])
def test_names_that_would_break_a_prompt_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a tool cannot be called"):
        Tool(name, "", {"type": "object"})


def test_what_is_too_long_for_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="description of x"):
        Tool("x", "y" * 2000, {})
    with pytest.raises(ValueError, match="parameters of x must be"):
        Tool("x", "", {"type": "object", "properties": {"y": {"enum": ["z" * 9000]}}})
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        Tool("x", "", {"type": object})


def test_two_tools_of_one_name() -> None:
    assert list(check_tools([weather, print_it])) == ["weather", "print_it"]
    with pytest.raises(ValueError, match="two tools are called 'weather'"):
        check_tools([weather, weather])


def print_it(text: str) -> str:
    return text
