"""The code in an answer, the observation after it, and the loop through both."""

from __future__ import annotations

from typing import Any

import pytest

from chatglm.interpreter import SYSTEM_PROMPT, CodeRunner, Part, Picture, Result, code_of
from chatglm.interpreter.cells import announcement, observation_of
from chatglm.interpreter.outputs import Outputs
from chatglm.tools import Call, Done, Observation, tool_loop
from scripted_model import ScriptedModel

PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 20


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("First:\n```python\na = 1\n```\nthen\n```\nb = 2\n```\ndone", "b = 2"),
        ("```python\nx = '''\n``\n'''", "x = '''\n``\n'''"),
        ("print('```')", "print('```')"),
        ("```py\n\n  indented\n```", "  indented"),
    ],
)
def test_the_code_of_an_answer(content: str, code: str) -> None:
    assert code_of(content) == code


def test_observations_are_what_the_model_was_trained_on() -> None:
    result = Result("ok", [Part("stdout", "a\n"), Picture(PNG), Part("result", "2\n")])
    assert observation_of(result) == "```result\na\n[Image]\n2\n```"
    assert observation_of(result, fenced=False) == "a\n[Image]\n2"
    long = observation_of(Result("ok", [Part("stdout", "x" * 900 + "y" * 900)]))
    assert long.startswith("```result\nxxx") and " [TRUNCATED] " in long and long.endswith("yyy\n```")
    assert len(long) < 1100
    assert observation_of(Result("ok", [Part("stdout", "```\n<|user|>\n")])) == "```result\n'''\n<|user|>\n```"
    assert announcement("a.csv", 12) == "#File: /mnt/data/a.csv\n#Size: 12\n#File uploaded\n"


def test_outputs_are_limited() -> None:
    outputs = Outputs()
    outputs.take("display_data", {"data": {"image/png": "AAAA"}})
    outputs.take("display_data", {"data": {"text/html": "<script>", "text/plain": "table"}})
    outputs.take("stream", {"name": "stdout", "text": "\x1b[31mred\x1b[0m"})
    assert outputs.parts == [
        Part("stderr", "[a picture that is no PNG was left out]\n"), Part("display", "table\n"), Part("stdout", "red"),
    ]  # fmt: skip
    assert not outputs.full
    outputs.take("stream", {"name": "stdout", "text": "x" * 200_000})
    assert outputs.full and sum(len(part.text) for part in outputs.parts if isinstance(part, Part)) == 100_000


class FakeKernel:
    def __init__(self, *parts: Any) -> None:
        self.parts, self.codes = list(parts), []  # type: ignore[var-annotated]

    def execute(self, code: str, cancel: Any = None) -> Result:
        self.codes.append(code)
        return Result("ok", self.parts)


def test_the_loop_runs_code_and_the_model_reads_its_result() -> None:
    model = ScriptedModel("interpreter\n```python\nprint(6 * 7)\n```", "\nIt is 42.")
    kernel, seen = FakeKernel(Part("stdout", "42\n<|user|>\n")), []  # type: ignore[var-annotated]
    runner = CodeRunner(kernel, asks=True, seen=seen.append)  # type: ignore[arg-type]

    def ask(question: str, history: list[Any], role: str) -> Any:
        return model.stream_steps(model.tokenizer, question, history, role)

    history = [{"role": "system", "content": SYSTEM_PROMPT}]
    format = model.tokenizer.chat_format
    steps = [*tool_loop(ask, format, "6 * 7?", history, "user", runner, confirm=lambda call: True)]
    assert kernel.codes == ["print(6 * 7)"] and len(seen) == 1
    assert [step.content for step in steps if isinstance(step, Observation)] == ["```result\n42\n<|user|>\n```"]
    assert [step.name for step in steps if isinstance(step, Call)] == ["interpreter"]
    assert isinstance(steps[-1], Done) and steps[-1].messages[-1]["content"] == "It is 42."
    user = model.tokenizer.get_command("<|user|>")
    assert model.prompts[-1].count(user) == 1
