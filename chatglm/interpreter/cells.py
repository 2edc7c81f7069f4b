"""What connects kernels with conversations: the code in an answer, the observation after it, announced files."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from ..tools.running import Call, Observation
from .isolation import WORK
from .kernel import Kernel, Result
from .outputs import as_observation

#: The system prompt with which ChatGLM3 learned to write code.
SYSTEM_PROMPT = (
    "你是一位智能AI助手，你叫ChatGLM，你连接着一台电脑，但请注意不能联网。在使用Python解决任务时，你可以运行代码并得到结果，"
    "如果运行结果有错误，你需要尽可能对代码进行改进。你可以处理用户上传到电脑上的文件，文件默认存储路径是/mnt/data/。"
)
#: The name by which the model calls the interpreter.
NAME = "interpreter"
MOST_CHARACTERS = 1024
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def code_of(content: str) -> str:
    """The code of an answer: its last block between fences; an open fence counts to the end. Without one, all of it."""
    blocks = _FENCE.findall(content)
    return (blocks[-1] if blocks else content).strip("\n")


def observation_of(result: Result, fenced: bool = True, most_characters: int = MOST_CHARACTERS) -> str:
    """What the model reads after its code.

    Args:
        fenced: between fences of `result`, as ChatGLM3's PROMPT.md has it; its demo sent the bare text.
    """
    text = as_observation(result.parts, most_characters)
    if not fenced:
        return text
    # Nothing that a cell prints ends the block before its end.
    text = re.sub(r"^([ \t]*)```", r"\1'''", text, flags=re.MULTILINE)
    return f"```result\n{text}\n```"


def announcement(name: str, size: int) -> str:
    """The lines that tell the model of an uploaded file, before the question."""
    return f"#File: {WORK}/{name}\n#Size: {size}\n#File uploaded\n"


class CodeRunner:
    """Runs the code that a model writes, as the loop of `chatglm.tools` wants it; each result goes to `seen`, too.

    Args:
        asks: whether the user is asked before each cell.
    """

    names = [NAME]

    def __init__(self, kernel: Kernel, asks: bool, seen: Callable[[Result], None] = lambda result: None) -> None:
        self.kernel, self._asks, self._seen = kernel, asks, seen

    def is_manual(self, call: Call) -> bool:
        return False

    def asks(self, call: Call) -> bool:
        return self._asks

    def run(self, call: Call, cancel: threading.Event | None) -> Observation:
        result = self.kernel.execute(code_of(call.content), cancel)
        self._seen(result)
        return Observation(call.name, observation_of(result), result.status == "ok")
