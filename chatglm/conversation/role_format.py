"""`RoleFormat`: conversations of messages with roles, each after its role token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from .chat_messages import normalize_messages
from .formats import ChatFormat, Response, names_of
from .history import ROLES, Message, check_message, check_role, messages_before
from .segments import ChatTokenizer, Segment, encode_segments

_NAME = re.compile(r"[^\W\d][\w.\-]{0,63}")


class RoleFormat(ChatFormat):
    """Each message is `<|role|>`, `metadata\\n` and the content; the two texts are encoded separately.

    An answer may be several messages; the first line of each is the name of a tool, or empty.
    """

    has_roles = True
    knows_system_prompt = True
    roles: ClassVar[tuple[str, ...]] = ROLES
    #: Ends the prompt, and separates the messages of an answer.
    answer_token: ClassVar[str] = "<|assistant|>"
    #: Tools that take free text instead of arguments.
    raw_tools: ClassVar[tuple[str, ...]] = ()

    def check_item(self, item: Any, where: str) -> Message:
        try:
            return check_message(item, where, self.roles)
        except TypeError as error:
            if isinstance(item, (tuple, list)):
                pairs = names_of(lambda format: not format.has_roles)
                raise TypeError(f"{error}; (question, answer) pairs are for {pairs}") from None
            raise

    def before_question(self, history: Any, query: str) -> Any:
        return messages_before(history, query)

    def check_role(self, role: str) -> str:
        return check_role(role, self.roles)

    def history_after(
        self,
        before: Sequence[Any],
        query: str,
        role: str,
        response: str | dict[str, Any],
        messages: Sequence[Message],
    ) -> list[Any]:
        return [*before, {"role": role, "content": query}, *messages]

    def as_messages(self, history: Sequence[Any]) -> list[Message]:
        return list(history)

    def from_messages(self, messages: Sequence[Message]) -> list[Any]:
        return list(messages)

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompt_segments(self, query: str, history: Sequence[Any], role: str = "user") -> list[Segment]:
        messages = [*history, {"role": role, "content": query}]
        return [*self.start, *self.message_segments(messages), (self.answer_token, True)]

    def chat_segments(
        self, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
    ) -> list[Segment]:
        segments = [*self.start, *self.message_segments(normalize_messages(messages, tools, self))]
        return [*segments, (self.answer_token, True)] if open_answer else segments

    def open_question(self, messages: Sequence[Any], tools: Any = None) -> tuple[str, list[Any], str]:
        *history, last = normalize_messages(messages, tools, self)
        if last["role"] not in ("user", "observation"):
            raise ValueError("truncation needs the last message to be the user's, or an observation")
        return last["content"], history, last["role"]

    def split_turns(self, history: list[Any], role: str) -> tuple[list[Any], list[list[Any]], list[Any]]:
        head = history[:1] if history and history[0]["role"] == "system" else []
        turns: list[list[Any]] = []
        for message in history[len(head) :]:
            if message["role"] == "user" or not turns:
                turns.append([])
            turns[-1].append(message)
        tail = turns.pop() if turns and role in ("observation", "assistant") else []
        return head, turns, tail

    def turn_tokens(self, tokenizer: ChatTokenizer, turn: list[Any], number: int) -> int:
        return len(encode_segments(tokenizer, self.message_segments(turn)))

    def encode_answer(self, tokenizer: ChatTokenizer, message: Message) -> list[int]:
        return self.encode_message(tokenizer, message)[1:]

    def answer_start(self, tokenizer: ChatTokenizer) -> list[int]:
        return tokenizer.encode_text("\n")  # the empty metadata of an answer that calls no tool

    def end_token(self, tokenizer: ChatTokenizer, message: Message, next_role: str | None) -> int:
        """Returns the token that the model writes after a message: the next role, or the first stop token at the end.

        A call at the end is followed by `<|observation|>`: the program then supplies the result.
        """
        if next_role is None and not message.get("metadata"):
            return tokenizer.get_command(self.stop_tokens[0])
        return tokenizer.get_command(f"<|{next_role or 'observation'}|>")

    # ---- answers -----------------------------------------------------------------------------------------------------

    def split_answer(self, text: str) -> list[str]:
        return text.split(self.answer_token)

    def parse(self, text: str, with_tools: bool = False) -> Response:
        """Parses an answer; the content is that of its last message.

        A message with metadata is a call: `read_call` if the conversation has tools, else `{"name", "content"}` (the
        code interpreter).
        """
        messages: list[Message] = []
        content_of_last: str | dict[str, Any] = ""
        for part in self.split_answer(text):
            # A first line that cannot be a tool's name is part of the content.
            metadata, content = self.split_message(part, whole=True) or ("", part)
            name = metadata.strip()
            if not name:
                content = content.strip()
                content_of_last = self.clean(content)
            elif with_tools:
                content_of_last = self.read_call(name, content)
            else:
                content_of_last = {"name": name, "content": content}
            messages.append({"role": "assistant", "metadata": metadata, "content": content})
        return Response(content_of_last, messages)

    def call_openings(self, name: str) -> tuple[str, ...]:
        """Returns how the arguments of a call may begin; a name followed by anything else is text."""
        return ()

    def split_message(self, part: str, whole: bool) -> tuple[str, str] | None:
        metadata, newline, content = part.partition("\n")
        name, start = metadata.strip(), content.lstrip()
        if name and not _NAME.fullmatch(name):
            return "", part
        if not newline:
            return ("", part) if whole else None
        if name == "" or name in self.raw_tools:
            return metadata, content
        openings = self.call_openings(name)
        if openings and start.startswith(openings):
            return metadata, content
        return None if not whole and any(opening.startswith(start) for opening in openings) else ("", part)
