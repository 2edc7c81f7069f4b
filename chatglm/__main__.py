"""The console command: `chatglm chat`, `chatglm serve` and the others; `python -m chatglm` is the same."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from . import __version__
from .front.arguments import LibraryError, importing_libraries, require
from .front.messages import TERMINAL
from .language import choose_language
from .program import complain, put, run, start


class Command(NamedTuple):
    """A command: its module, whose `main` takes the arguments and the name to show in --help, and what it does."""

    module: str
    zh: str
    en: str


COMMANDS = {  # in the order of --help
    "chat": Command("chatglm.commands.chat", "在终端中对话", "chat in the terminal"),
    "web": Command("chatglm.commands.web", "在浏览器中对话", "chat in the browser"),
    "serve": Command("chatglm.commands.serve", "提供 HTTP 接口", "serve the HTTP API"),
    "tune": Command("ptuning.main", "微调：P-tuning v2、LoRA、全参数", "fine-tune: P-tuning v2, LoRA, all weights"),
    "export": Command("chatglm.export", "把适配器并入基座模型", "make one checkpoint of a base model and its adapter"),
    "doctor": Command("chatglm.doctor.__main__", "检查安装或模型", "check the installation, or a checkpoint folder"),
    "kernels": Command("chatglm.kernels.__main__", "检查 INT4 和 INT8", "check INT4 and INT8 here, and their speed"),
}
_TEXTS = {
    "zh": {
        "help": "用法：chatglm 命令 [参数]\n\n{commands}\n\n各命令的参数：chatglm 命令 --help。版本：chatglm --version",
        "unknown": "错误：没有 {name} 这个命令{close}；chatglm --help 列出全部命令",
        "close": "，是否指 {name}？",
    },
    "en": {
        "help": "usage: chatglm COMMAND [ARGUMENTS]\n\n{commands}\n\n"
        "Arguments of a command: chatglm COMMAND --help. Version: chatglm --version",
        "unknown": "Error: there is no command {name}{close}; chatglm --help lists them",
        "close": ", did you mean {name}?",
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status of the command, or 2 if there is none of this name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name not in COMMANDS:
        return run(lambda: _about(name))
    language = choose_language()
    try:
        module = _load(name, language)
    except LibraryError as error:
        complain(TERMINAL["error"][language].format(reason=error))
        return 1
    if name == "tune":  # it prints for hours, also into a log file or a pipe
        return run(lambda: _in_lines(lambda: module.main(given[1:], f"chatglm {name}")))
    status: int = module.main(given[1:], f"chatglm {name}")
    return status


def _in_lines(work: Callable[[], int]) -> int:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return work()


def _load(name: str, language: str) -> Any:
    """The module of a command. Raises LibraryError."""
    if name == "tune":  # which needs it to read its arguments; the others check it later
        require("tune", language, "ptuning/requirements.txt")
    with importing_libraries(language):
        if name == "tune":
            importlib.import_module(".public", __package__)  # registers the generations
        return importlib.import_module(COMMANDS[name].module)


def _about(name: str) -> int:
    """Prints the help or the version, or that there is no such command."""
    language = choose_language()
    texts = _TEXTS[language]
    commands = "\n".join(f"  {key:<9}{getattr(one, language)}" for key, one in COMMANDS.items())
    if name in ("-h", "--help"):
        put(texts["help"].format(commands=commands))
        return 0
    if name == "--version":
        put(f"chatglm {__version__}")
        return 0
    if not name:
        complain(texts["help"].format(commands=commands))
        return 2
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.7)
    complain(texts["unknown"].format(name=name, close=texts["close"].format(name=close[0]) if close else ""))
    return 2


def program() -> NoReturn:
    """The console command `chatglm`."""
    start(main)


if __name__ == "__main__":
    program()
