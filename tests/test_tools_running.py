"""A call runs within its limits, and what goes wrong is an observation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from chatglm.tools import Call, Tool, ToolError, calculate, convert_units, load_tools, random_number, run_call, tool
from chatglm.tools.builtin import BUILT_IN
from scripted import SECONDS


def run(one: Tool, **arguments: Any) -> str:
    return run_call({one.name: one}, Call(one.name, arguments)).content


def test_errors_are_observations_without_a_traceback() -> None:
    @tool
    def broken(kind: str) -> None:
        raise {"ours": ToolError("no such city"), "bug": KeyError("city"), "exit": OSError("gone")}[kind]

    assert run(broken, kind="ours") == "Error: no such city"
    assert run(broken, kind="bug") == "Error: KeyError: 'city'"
    assert run(broken, kind="exit") == "Error: OSError: gone"
    assert run_call({"broken": broken}, Call("other", {})).content == (
        "There is no tool 'other'; the tools are: broken."
    )
    unread = run_call({"broken": broken}, Call("broken", None, "the tool call cannot be read: x"))
    assert (unread.content, unread.ok) == ("Error: the tool call cannot be read: x", False)


def test_results_are_text_of_limited_length() -> None:
    @tool
    def give(what: str) -> Any:
        return {"json": {"城市": "北京"}, "odd": object, "long": "x" * 5000}[what]

    assert run(give, what="json") == '{"城市": "北京"}'
    assert run(give, what="odd") == "<class 'object'>"
    assert run(give, what="long") == "x" * 1024 + " [TRUNCATED]"
    short = run_call({"give": give}, Call("give", {"what": "long"}), most_characters=10)
    assert short.content == "x" * 10 + " [TRUNCATED]"


def test_a_call_ends_at_its_time_limit_and_when_it_is_cancelled() -> None:
    go_on = threading.Event()

    @tool(seconds=0.05)
    def slow() -> None:
        go_on.wait(SECONDS)

    assert run(slow) == "Error: the tool took more than 0.05 seconds."

    begun, cancel = threading.Event(), threading.Event()

    @tool
    def endless() -> None:
        cancel.set()
        begun.set()
        go_on.wait(SECONDS)

    assert "interrupted" in run_call({"endless": endless}, Call("endless", {}), cancel=cancel).content
    assert begun.wait(SECONDS)
    go_on.set()


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("(3 + 4) * 2", "14"), ("2^10", "1024"), ("7 × 8 =", "56"), ("１+1", "2"), ("7/2", "3.5"), ("0.1+0.2", "0.3"),
        ("sqrt(2)", "1.41421356237"), ("-3 ** 2", "-9"), ("max(1, 2)", "2"), ("1/0", "Error: division by zero"),
        ("10**100000", "Error: the result is too large"), ("9**9**9**9", "Error: the result is too large"),
        ("(-8)**0.5", "Error: the result is not a real number"), ("1+", "Error: '1+' is not an arithmetic expression"),
        ("9" * 501, "Error: the expression is longer than 500 characters"), ("1e308*10", "inf"),
        ("exp(1000)", "Error: it cannot be calculated: math range error"),
    ],
)  # fmt: skip
def test_the_calculator(expression: str, result: str) -> None:
    assert run(calculate, expression=expression) == result


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').getcwd()", "().__class__", "[1]*9", "'a'*9", "abs.__doc__", "True + 1", "sum(range(9))",
     "1 if 1 else 2", "abs(x=1)", "open('/etc/passwd')", "lambda: 1", "f'{1}'"],
)  # fmt: skip
def test_the_calculator_evaluates_nothing_but_numbers(expression: str) -> None:
    assert run(calculate, expression=expression).startswith("Error: only numbers")


@pytest.mark.parametrize("expression", ["(" * 240 + "1" + ")" * 240, "-" * 499 + "1", "2**" * 160 + "2"])
def test_deeply_nested_expressions_do_no_harm(expression: str) -> None:
    result = run(calculate, expression=expression)
    assert result in ("1", "-1") or result.startswith("Error: ")


@pytest.mark.parametrize(
    ("value", "units", "result"),
    [
        (3, ("公里", "米"), "3000 米"), (1, ("mile", "km"), "1.609344 km"), (100, ("C", "F"), "212 F"),
        (0, ("k", "摄氏度"), "-273.15 摄氏度"), (2, ("斤", "kg"), "1 kg"), (36, ("km/h", "m/s"), "10 m/s"),
        (1, ("kg", "m"), "Error: kg and m do not measure the same"),
        (1, ("parsec", "m"), "Error: the unit 'parsec' is not known"),
        (1, ("C", "m"), "Error: C and m do not measure the same"),
    ],
)  # fmt: skip
def test_units(value: float, units: tuple[str, str], result: str) -> None:
    assert run(convert_units, value=value, from_unit=units[0], to_unit=units[1]) == result


def test_the_other_safe_tools() -> None:
    assert [one.name for one in BUILT_IN] == ["calculate", "convert_units", "get_date", "random_number"]
    assert {run(random_number, minimum=1, maximum=2) for _ in range(50)} == {"1", "2"}
    assert "above the highest" in run(random_number, minimum=3, maximum=2)
    today = run(BUILT_IN[2])
    assert today == run(BUILT_IN[2], days=0) != run(BUILT_IN[2], days=7)
    assert run(BUILT_IN[2], days=10**12) == "Error: the date is out of range"


def test_a_module_of_tools(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from chatglm.tools import calculate, tool\n"
        "def shout(text: str) -> str:\n    return text.upper()\n"
        "@tool(confirm=True)\ndef drop(path: str) -> str:\n    return path\n"
        "TOOLS = [shout, drop]\n"
    )
    found = load_tools(file)
    assert list(found) == ["calculate", "drop", "shout"]
    assert found["drop"].confirm and not found["shout"].confirm


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("x = 1", "holds no tool"), ("1 / 0", "failed: ZeroDivisionError"), ("def (", "failed: SyntaxError"),
        ("raise SystemExit(3)", "failed: SystemExit: 3"), ("TOOLS = [1]", "must be a list of tools"),
        ("def f(x): pass\nTOOLS = [f]", "'x' of f needs an annotation"),
    ],
)  # fmt: skip
def test_a_module_without_tools_says_why(tmp_path: Path, code: str, reason: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(ValueError, match=reason):
        load_tools(file)


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tools(tmp_path / "none.py")
