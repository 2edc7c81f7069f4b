"""The page's modes, and what runs in them: chat, tools and code, each with chats of its own."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...conversation.formats import ChatFormat
from ..abilities import Abilities, names_of_tools
from ..session import Session
from .stored_chat import StoredChat
from .visitor import read_tools

if TYPE_CHECKING:
    from ...interpreter import Kernel, KernelPool, Result
    from ...tools import Call, Runner

#: Names of the modes, for those who have no language yet.
MODES = {"chat": "Chat 对话", "tools": "Tools 工具", "code": "Code 代码"}
CODE = "interpreter"


class Calls:
    """What a visitor's model may call.

    Args:
        kernels: of the visitors' conversations, if their code is run.
    """

    def __init__(self, chat_format: ChatFormat, abilities: Abilities, kernels: KernelPool | None) -> None:
        self._format, self.tools, self.kernels = chat_format, abilities.tools, kernels
        self.modes = ["chat", *(["tools"] if chat_format.knows_tools else []), *(["code"] if kernels else [])]
        self.first = "code" if kernels else "tools" if abilities.described() else "chat"

    def session(self, mode: str, system: str, written: str, language: str) -> Session:
        """A conversation's beginning in this mode. Raises ValueError for tools that are none."""
        if mode == "code" and self.kernels is not None:
            from ...interpreter import SYSTEM_PROMPT

            return Session(self._format, SYSTEM_PROMPT)
        if mode != "tools":
            return Session(self._format, system.strip() or None)
        given = read_tools(written, language)
        if given is not None and not isinstance(given, list):
            given = list(given.values()) if isinstance(given, Mapping) else given  # the session says what is wrong
        own = [one.describe() for name, one in self.tools.items() if name not in names_of_tools(given)]
        return Session(self._format, system.strip() or None, [*(given or []), *own] if own else given)

    def runner(self, mode: str, session: Session, chat: StoredChat, seen: Callable[[Result], None]) -> Runner | None:
        """What runs the calls in this mode; None if nothing does. `seen` gets the results of cells."""
        if mode == "code" and self.kernels is not None:
            from ...interpreter import CodeRunner

            return CodeRunner(self.kernels.kernel(chat.id), asks=True, seen=seen)
        if mode == "tools" and self.tools:
            from ...tools import ToolRunner

            return ToolRunner(self.tools, [name for name in names_of_tools(session.tools) if name not in self.tools])
        return None

    def open_call(self, chat: StoredChat) -> tuple[str, str] | None:
        """(name, code or arguments to be edited) of the call at the end of a chat, if it can be run here."""
        last = chat.messages[-1] if chat.messages and not chat.turn else {}
        name = (last.get("metadata") or "").strip() if last.get("role") == "assistant" else ""
        if name == CODE and self.kernels is not None:
            from ...interpreter import code_of

            return name, code_of(last["content"])
        if name not in self.tools:
            return None
        given = self._format.read_call(name, last["content"])
        arguments = given.get("parameters")
        return name, last["content"] if arguments is None else json.dumps(arguments, ensure_ascii=False)

    def edited(self, name: str, written: str) -> tuple[Call, str]:
        """The call that a visitor has edited, and the content of its message. Raises ValueError."""
        from ...tools import Call

        if name == CODE:
            content = f"```python\n{written}\n```"
            return Call(name, None, "", content), content
        arguments = json.loads(written)
        if not isinstance(arguments, dict):
            raise ValueError("the arguments must be a JSON object")
        return Call(name, arguments), self._format.tool_call_message(name, arguments)["content"]

    # ---- files of a conversation's kernel ----------------------------------------------------------------------------

    def kernel(self, chat: StoredChat) -> Kernel | None:
        return self.kernels.find(chat.id) if self.kernels is not None and chat.id else None

    def put_files(self, chat: StoredChat, files: Iterable[Any]) -> list[str]:
        """Writes files that a browser sent, {"name", "data": Base64}; returns their names. Raises ValueError."""
        if self.kernels is None:
            raise ValueError("no code is run here")
        kernel, names = self.kernels.kernel(chat.id), []
        for one in files:
            try:
                content = base64.b64decode(one["data"], validate=True)
                name = kernel.put_file(str(one["name"]), content)
            except (TypeError, KeyError) as error:
                raise ValueError(f"this is no file ({error})") from error
            kernel.uploaded.append((name, len(content)))
            names.append(name)
        return names

    def announced(self, chat: StoredChat, question: str) -> str:
        """The question, after the lines that tell the model of files since the last one."""
        kernel = self.kernel(chat)
        if kernel is None or not kernel.uploaded:
            return question
        from ...interpreter.cells import announcement

        lines = "".join(announcement(name, size) for name, size in kernel.uploaded)
        kernel.uploaded.clear()
        return lines + question


def pictures_of(results: Iterable[Any]) -> list[str]:
    """The pictures of cells, in Base64."""
    parts = [part for result in results for part in result.parts if hasattr(part, "png")]
    return [base64.b64encode(part.png).decode("ascii") for part in parts]
