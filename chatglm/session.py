"""A conversation as a front door keeps it: its history, its system prompt, taking turns back, saving and loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .checkpoints.atomic import write_file
from .conversation.chat_messages import TOOLS_SYSTEM_PROMPT
from .conversation.history import validate_history


class Session:
    """The history of one conversation with a model of generation `version`, in the form its `chat` takes.

    `history` is what to pass to `chat` or `stream_chat`; put the history that they give back there.
    """

    def __init__(self, version: int, system: str | None = None, tools: list[Any] | None = None) -> None:
        self.version = version
        self.tools = tools
        self.system: list[Any] = []
        self.history: list[Any] = []
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Starts over with this system prompt, or with none; the tools stay.

        Raises ValueError for generations that know neither, and for tools that are no list of descriptions.
        """
        message: dict[str, Any] = {"role": "system", "content": text or TOOLS_SYSTEM_PROMPT}
        if self.tools:
            message["tools"] = self.tools
        if (text or self.tools) and self.version != 3:
            raise ValueError("ChatGLM-6B and ChatGLM2-6B know no system prompt and no tools, only ChatGLM3 does")
        try:
            self.system = validate_history(3, [message] if text or self.tools else [])
        except TypeError as error:
            raise ValueError(str(error)) from error
        self.clear()

    def clear(self) -> None:
        """Forgets everything but the system prompt."""
        self.history = list(self.system)

    @property
    def next_role(self) -> str:
        """ "observation" where the model has just called a tool and waits for its result, else "user"."""
        last = self.history[-1] if self.history else None
        called = isinstance(last, dict) and last["role"] == "assistant" and last.get("metadata")
        return "observation" if called else "user"

    def undo(self) -> tuple[str, str] | None:
        """Takes the last turn back and gives its (question, role), or None where there is no turn."""
        for index in reversed(range(len(self.history))):
            turn = self.history[index]
            question, role = (turn["content"], turn["role"]) if isinstance(turn, dict) else (turn[0], "user")
            if role in ("user", "observation"):
                self.history = self.history[:index]
                return question, role
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation as JSON; an old file is replaced only once the new one is whole. Raises OSError."""
        target = Path(path).expanduser()
        text = json.dumps({"chatglm_version": self.version, "history": self.history}, ensure_ascii=False, indent=1)
        write_file(target, text + "\n")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on with a saved conversation. Raises OSError or ValueError, and then nothing has changed."""
        target = Path(path).expanduser()
        try:
            saved = json.loads(target.read_text(encoding="utf-8"))
            version, history = saved["chatglm_version"], saved["history"]
            if (version == 3) == (self.version == 3):  # generations 1 and 2 keep the same pairs
                history = validate_history(self.version, history)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{target} is no conversation that was saved here ({error})") from error
        if (version == 3) != (self.version == 3):
            raise ValueError(f"{target} is a conversation with ChatGLM{version}, this model is a ChatGLM{self.version}")
        self.history = history
        self.system = [turn for turn in history[:1] if isinstance(turn, dict) and turn["role"] == "system"]
        self.tools = self.system[0].get("tools") if self.system else None
