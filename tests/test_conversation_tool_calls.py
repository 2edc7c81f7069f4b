"""ChatGLM3's tool calls: read, written, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatglm.conversation import parse_response, tool_call_message
from tokenizer_goldens import deviation


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("```python\ntool_call(city='北京', days=-3, deep={'a': [1, (2, None)]})\n```",
         {"city": "北京", "days": -3, "deep": {"a": [1, (2, None)]}}),
        ("```python\ntool_call(x=true, y=null, z=[false])\n```", {"x": True, "y": None, "z": [False]}),
        ("```python\nget_weather(city='x')\n```", {"city": "x"}),
        ("```python\ntool_call()\n```", {}),
        ("```python\ntool_call(city='没有关上的围栏')", {"city": "没有关上的围栏"}),
        ("tool_call(city='no fence')", {"city": "no fence"}),
        ("get_weather(city='no fence')", {"city": "no fence"}),
        ("```python\ntool_call(path='C:\\dir\\new', tab='\\t')\n```", {"path": "C:\\dir\new", "tab": "\t"}),
        ("```python\ntool_call(path=r'C:\\dir')```", {"path": "C:\\dir"}),
        ('```json\n{"city": "北京"}\n```', {"city": "北京"}),
        ('{"name": "get_weather", "arguments": {"city": "x"}}', {"city": "x"}),
    ],
)  # fmt: skip
def test_tool_calls(text: str, parameters: Any) -> None:
    response = parse_response(3, f"get_weather\n{text}", with_tools=True)
    assert response.content == {"name": "get_weather", "parameters": parameters}
    assert response.messages == [{"role": "assistant", "metadata": "get_weather", "content": text}]


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(city=open('/etc/passwd').read())",
        "tool_call(city=__import__('os').system('true'))",
        "tool_call('北京')",
        "tool_call(**{1: 1})",
        "tool_call(**[1])",
        "tool_call(a=1, **{'a': 1})",
        "tool_call(a=1, a=2)",
        "tool_call(a=b)",
        "tool_call(a=1); print(1)",
        "other(a=1)",
        "tool_call.x(a=1)",
        "tool_call(a=",
        "tool_call(a=1\x00)",
        "tool_call(a=" + "(" * 5000 + ")" * 5000 + ")",
        "tool_call(a=" + "-" * 100_000 + "1)",
        "{'a': 1}",
        "{" * 100_000,
        "[1]",
        "",
    ],
)
def test_calls_that_cannot_be_read_are_a_result(code: str) -> None:
    assert deviation("calls_are_read_not_run")
    content = f"```python\n{code}\n```"
    response = parse_response(3, f"get_weather\n{content}", with_tools=True)
    assert isinstance(response.content, dict)
    error = response.content.pop("error")
    assert error.startswith("the tool call cannot be read: ") and len(error) > 31
    assert response.content == {"name": "get_weather", "parameters": None, "content": content}


def test_nothing_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    code = f"tool_call(x=open({str(target)!r}, 'w'))"
    for name in ("get_weather", "interpreter"):
        parse_response(3, f"{name}\n```python\n{code}\n```", with_tools=True)
    assert not target.exists()


def test_a_call_survives_the_way_there_and_back() -> None:
    parameters = {"city": 'O\'Hare "x"\n', "n": [1, 2.5, None, True], "d": {"k": "```"}, "path": "C:\\dir"}
    for given in (parameters, {**parameters, "not an identifier": 1}, {}):
        message = tool_call_message("get_weather", given)
        response = parse_response(3, f"{message['metadata']}\n{message['content']}", with_tools=True)
        assert response.content == {"name": "get_weather", "parameters": given}
        assert response.messages == [message]
