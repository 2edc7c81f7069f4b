"""The conversation of a front door: history, system prompt, taking turns back, saving and loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import write_file
from ..conversation.formats import ChatFormat, chat_format, names_of


class Session:
    """The history of one conversation, in the form that the model's `chat` takes.

    Pass `history` to `chat` or `stream_chat`, then set it to the history that they return.
    """

    def __init__(self, chat_format: ChatFormat, system: str | None = None, tools: list[Any] | None = None) -> None:
        self.chat_format = chat_format
        self.tools = tools
        self.system: list[Any] = []
        self.history: list[Any] = []
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Starts over with this system prompt, or with none; the tools stay.

        Raises ValueError if the model does not know them, or if the tools are not a list of descriptions.
        """
        known = self.chat_format
        if (text and not known.knows_system_prompt) or (self.tools and not known.knows_tools):
            without = names_of(lambda format: not format.knows_tools, "knows", "know")
            others = names_of(lambda format: format.knows_tools, "does", "do", short=True)
            raise ValueError(f"{without} no system prompt and no tools, only {others}")
        message: dict[str, Any] = {"role": "system", "content": text or known.tools_system_prompt}
        if self.tools:
            message["tools"] = self.tools
        try:
            self.system = known.validate([message] if text or self.tools else [])
        except TypeError as error:
            raise ValueError(str(error)) from error
        self.clear()

    def clear(self) -> None:
        """Forgets everything but the system prompt."""
        self.history = list(self.system)

    @property
    def next_role(self) -> str:
        """ "observation" if the model has just called a tool and waits for its result, else "user"."""
        messages = self.chat_format.as_messages(self.history[-1:])
        called = messages and messages[-1]["role"] == "assistant" and messages[-1].get("metadata")
        return "observation" if called else "user"

    def undo(self, whole: bool = False) -> tuple[str, str] | None:
        """Takes the last turn back and returns its (question, role), or None if there is no turn.

        Args:
            whole: the turn begins with what the user asked, not with the result of a tool.
        """
        messages = self.chat_format.as_messages(self.history)
        for index in reversed(range(len(messages))):
            question, role = messages[index]["content"], messages[index]["role"]
            if role == "user" or (role == "observation" and not whole):
                self.history = self.chat_format.from_messages(messages[:index])
                return question, role
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation as JSON; replaces an old file only once the new one is complete. Raises OSError."""
        target = Path(path).expanduser()
        saved = {"chatglm_version": self.chat_format.generation, "history": self.history}
        write_file(target, json.dumps(saved, ensure_ascii=False, indent=1) + "\n")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Loads a saved conversation. Raises OSError or ValueError, and then nothing has changed."""
        target = Path(path).expanduser()
        try:
            saved = json.loads(target.read_text(encoding="utf-8"))
            theirs, ours, history = chat_format(saved["chatglm_version"]), self.chat_format, saved["history"]
            if theirs.has_roles == ours.has_roles:  # pairs are the same in all generations that have them
                history = ours.validate(history)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{target} is not a conversation that was saved here ({error})") from error
        if theirs.has_roles != ours.has_roles:
            generations = f"with ChatGLM{theirs.generation}, this model is a ChatGLM{ours.generation}"
            raise ValueError(f"{target} is a conversation {generations}")
        self.history = history
        self.system = [message for message in ours.as_messages(history)[:1] if message["role"] == "system"]
        self.tools = self.system[0].get("tools") if self.system else None
