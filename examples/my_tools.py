"""Tools for `python cli_demo.py --tools-module examples/my_tools.py`, and for web_demo.py."""

from typing import Annotated

from chatglm.tools import calculate, convert_units, tool  # noqa: F401  # whatever tools this file holds are offered


@tool
def get_weather(city: str) -> dict:
    """Get the current weather of a city

    Args:
        city: The name of the city
    """
    return {"city": city, "temperature": 12, "weather": "sunny"}  # ask a real service here


@tool(confirm=True)  # the user is asked before each call
def write_note(text: Annotated[str, "What to write down", True]) -> str:
    """Write a note into notes.txt"""
    with open("notes.txt", "a", encoding="utf-8") as file:
        file.write(text + "\n")
    return "written"
