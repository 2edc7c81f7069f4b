"""`ChatFormat`, what a generation's conversations look like, and the registry of formats by generation."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .fitting import fit
from .history import Message, check_items, check_text
from .segments import ChatTokenizer, Segment, encode_segments, render_segments

#: What the answers of all generations say for the date their training data ends; the originals fill it in like this.
_TRAINING_DATE = ("[[训练时间]]", "2023年")
#: The beginning of that at the end of an unfinished answer.
PENDING_DATE = r"\[\[?(?:训(?:练(?:时(?:间\]?)?)?)?)?"


class Sliders(NamedTuple):
    """Where the page's sliders begin: the highest and the default maximum length, then as in the original's page."""

    most: int
    max_length: int
    top_p: float
    temperature: float


class TrainingLimits(NamedTuple):
    """How the original's training script counts the tokens of a (question, answer) row."""

    prompt_extra: int = 0  # tokens of a prompt beyond max_source_length
    answer_less: int = 0  # of an answer, in training, below max_target_length
    target_less: int = 0  # the same for the text that a prediction is compared with
    learned_prompt: int = 0  # last tokens of the prompt that are learned, too
    least_answer: int = 1  # the lowest max_target_length


@dataclass
class Response:
    """An answer as the user gets it: `content`, and the `messages` to append to a role history."""

    content: str | dict[str, Any]
    messages: list[Message] = field(default_factory=list)


class ChatFormat(ABC):
    """All that differs between the conversations of two generations; see docs/adding_a_generation.md.

    A format has no state. Two kinds exist: `PairFormat`, whose histories are (question, answer) pairs and whose prompts
    are numbered rounds, and `RoleFormat`, whose histories are messages with roles.

    Text of a conversation is always encoded as plain text: a typed `<|user|>` or `[gMASK]` never becomes a control
    token.
    """

    generation: ClassVar[int]
    #: As pages and messages call the model: "ChatGLM3".
    name: ClassVar[str]
    #: As it was published: "ChatGLM3-6B".
    model_name: ClassVar[str]
    #: Names of the control tokens that end an answer, as `tokenizer.get_command` knows them; training uses the first.
    stop_tokens: ClassVar[tuple[str, ...]]
    #: What a prompt begins with.
    start: ClassVar[tuple[Segment, ...]] = ()
    #: Stands between two texts that are encoded on their own, where a prompt is rendered as text: the blank with which
    #: SentencePiece begins every text.
    joint: ClassVar[str] = " "
    #: The format as a Jinja template, saved with the tokenizer for programs that read nothing else.
    template: ClassVar[str]
    #: Whether histories are messages with roles, not (question, answer) pairs.
    has_roles: ClassVar[bool] = False
    knows_system_prompt: ClassVar[bool] = False
    knows_tools: ClassVar[bool] = False
    #: The system message where tools are given without one.
    tools_system_prompt: ClassVar[str] = ""
    sliders: ClassVar[Sliders] = Sliders(32768, 8192, 0.8, 0.8)
    training: ClassVar[TrainingLimits] = TrainingLimits()
    #: What may still change at the end of an unfinished answer.
    pending: ClassVar[re.Pattern[str]] = re.compile(rf"(?:[\s\ufffd]|{PENDING_DATE})+$")

    # ---- histories ---------------------------------------------------------------------------------------------------

    def validate(self, history: Sequence[Any] | None) -> list[Any]:
        """A fresh copy of a history, checked.

        Raises:
            TypeError: the history or one of its items has the wrong type.
            ValueError: a pair has not two items, a role is unknown or a key is missing.
        """
        return check_items(history, self.check_item)

    @abstractmethod
    def check_item(self, item: Any, where: str) -> Any:
        """A copy of one item of a history, checked; `where` is what errors call it."""

    @abstractmethod
    def check_role(self, role: str) -> str:
        """The role of a question. Raises ValueError where this model does not know it."""

    def check_query(self, query: Any, role: str) -> str:
        self.check_role(role)
        return check_text(query, "the query")

    @abstractmethod
    def history_after(
        self,
        before: Sequence[Any],
        query: str,
        role: str,
        response: str | dict[str, Any],
        messages: Sequence[Message],
    ) -> list[Any]:
        """The history after a turn: `response` and `messages` are those of a `Response`."""

    @abstractmethod
    def as_messages(self, history: Sequence[Any]) -> list[Message]:
        """A history as role messages, whatever its kind."""

    @abstractmethod
    def from_messages(self, messages: Sequence[Message]) -> list[Any]:
        """The way back: role messages of whole turns as a history."""

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompt_text(self, query: str, history: Sequence[Any] = ()) -> str:
        """The text of a prompt. Raises ValueError where a prompt is more than one text."""
        raise ValueError(f"{self.name}'s prompt is made of control tokens, not of text: use build_chat_input")

    def message_content(self, message: Message) -> str:
        """What is encoded as the content of a message: for a system message with tools also their description."""
        return message["content"]

    @abstractmethod
    def prompt_segments(self, query: str, history: Sequence[Any], role: str = "user") -> list[Segment]:
        """The whole prompt, up to where the model starts to answer. The history has to be valid."""

    @abstractmethod
    def chat_segments(
        self, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
    ) -> list[Segment]:
        """Chat messages, as OpenAI's clients and transformers pass them, in this format.

        Args:
            open_answer: end with what asks the model to answer, as `prompt_segments` does.
            end: after a last answer of a `PairFormat`, add the end token that the model was trained on.

        Raises:
            TypeError, ValueError: messages of the wrong shape.
        """

    @abstractmethod
    def open_question(self, messages: Sequence[Any], tools: Any = None) -> tuple[str, list[Any], str]:
        """(query, history, role) of chat messages. Raises ValueError where the last one is not to be answered."""

    @abstractmethod
    def split_turns(self, history: list[Any], role: str) -> tuple[list[Any], list[list[Any]], list[Any]]:
        """(what stays in front, turns that may be dropped, what belongs to the current question, of that role)."""

    @abstractmethod
    def turn_tokens(self, tokenizer: ChatTokenizer, turn: list[Any], number: int) -> int:
        """About how many tokens a turn takes, the `number`th from 0."""

    def encode(
        self, tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None = None, role: str = "user"
    ) -> list[int]:
        """The ids of the whole prompt, up to where the model starts to answer.

        Raises:
            TypeError, ValueError: as `validate`; an unknown role.
        """
        query = self.check_query(query, role)
        return encode_segments(tokenizer, self.prompt_segments(query, self.validate(history), role))

    def fit(
        self,
        tokenizer: ChatTokenizer,
        query: str,
        history: Sequence[Any] | None,
        budget: int,
        role: str = "user",
    ) -> tuple[list[int], list[Any]]:
        """The ids of the prompt within `budget` tokens and the history that is left in it; see `fitting.fit`."""
        return fit(self, tokenizer, query, history, budget, role)

    def encode_chat(
        self,
        tokenizer: ChatTokenizer,
        messages: Sequence[Any],
        tools: Any = None,
        open_answer: bool = True,
        end: bool = True,
        budget: int | None = None,
    ) -> list[int]:
        """The ids of `chat_segments`; with a budget (and `open_answer`) without the oldest turns, as `fit` gives."""
        segments = self.chat_segments(messages, tools, open_answer, end)
        if budget is None or not open_answer:
            return encode_segments(tokenizer, segments)
        query, history, role = self.open_question(messages, tools)
        return self.fit(tokenizer, query, history, budget, role)[0]

    def render_chat(
        self, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
    ) -> str:
        """`chat_segments` as text with the control tokens spelt out, for people and other programs.

        A prompt encoded again with `add_special_tokens=False, split_special_tokens=False` gives the ids of
        `encode_chat`, as long as nobody has typed a control token: ids are the safe form.
        """
        return render_segments(self.chat_segments(messages, tools, open_answer, end), self.joint)

    def message_segments(self, messages: Iterable[Message]) -> list[Segment]:
        """For every role message `<|role|>`, `metadata\\n` and the content, each encoded on its own."""
        segments: list[Segment] = []
        for message in messages:
            metadata = message.get("metadata") or ""
            segments += [
                (f"<|{message['role']}|>", True), (f"{metadata}\n", False), (self.message_content(message), False),
            ]  # fmt: skip
        return segments

    def encode_message(self, tokenizer: ChatTokenizer, message: Message) -> list[int]:
        """The ids of one role message. Raises ValueError where the vocabulary has no role tokens."""
        return encode_segments(tokenizer, self.message_segments([message]))

    @abstractmethod
    def encode_answer(self, tokenizer: ChatTokenizer, message: Message) -> list[int]:
        """The ids of an answer, after what a prompt ends with and without the token that ends it."""

    def answer_start(self, tokenizer: ChatTokenizer) -> list[int]:
        """What the model writes first where it answers with text."""
        return []

    def stop_token_ids(self, tokenizer: ChatTokenizer) -> list[int]:
        """The ids that end an answer."""
        return [tokenizer.get_command(name) for name in self.stop_tokens]

    # ---- answers -----------------------------------------------------------------------------------------------------

    def clean(self, text: str) -> str:
        """An answer as the user sees it: outer blanks gone, the training date filled in."""
        return text.strip().replace(*_TRAINING_DATE)

    def stable(self, text: str) -> str:
        """What may be shown of an unfinished answer: a part of the finished one, whatever follows.

        Held back are outer blanks, U+FFFD (which may be half of a character) and the beginning of `[[训练时间]]`.
        """
        tail = self.pending.search(text, max(0, len(text) - 64))
        return self.clean(text[: tail.start()] if tail else text)

    def split_answer(self, text: str) -> list[str]:
        """The raw text of an answer as its messages: one, unless a format lets the model write several."""
        return [text]

    def parse(self, text: str, with_tools: bool = False) -> Response:
        """The raw text of an answer as content and history messages. Nothing that the model writes is ever run.

        Args:
            with_tools: the conversation has tools.
        """
        content = self.clean(text)
        return Response(content, [{"role": "assistant", "content": content}])

    # ---- tools -------------------------------------------------------------------------------------------------------

    def tool_call_message(self, name: str, parameters: Mapping[str, Any]) -> Message:
        """The assistant message that calls a tool; `parse` is the way back."""
        arguments = json.dumps(dict(parameters), ensure_ascii=False)
        return {"role": "assistant", "metadata": name, "content": arguments}

    def call_start(self, tokenizer: ChatTokenizer, name: str) -> list[int]:
        """What an answer begins with that has to call this tool. Raises ValueError where the model knows no tools."""
        raise ValueError(f"{self.model_name} was not trained to call tools")

    def split_message(self, part: str, whole: bool) -> tuple[str, str] | None:
        """A message of an answer as (metadata, content); None while what follows decides (`whole`: nothing does)."""
        return "", part

    def read_call(self, name: str, content: str) -> dict[str, Any]:
        """The content of a message that calls a tool as `{"name", "parameters"}`.

        One that cannot be read is `{"name", "parameters": None, "content": content, "error": why}`.
        """
        raise ValueError(f"{self.model_name} was not trained to call tools")

    def arguments_so_far(self, name: str, content: str) -> dict[str, Any]:
        """The arguments of an unfinished call that nothing to come can change, in their order."""
        return {}


# ---- the registry ----------------------------------------------------------------------------------------------------

_FORMATS: dict[int, ChatFormat] = {}


def register_chat_format(chat_format: ChatFormat) -> ChatFormat:
    """Makes a format that of its generation. Raises ValueError where the generation has another one already."""
    known = _FORMATS.setdefault(chat_format.generation, chat_format)
    if type(known) is not type(chat_format):
        raise ValueError(f"generation {chat_format.generation} has a chat format already: {type(known).__name__}")
    return known


def unregister_chat_format(generation: int) -> None:
    """Makes a generation unknown again, as tests want it."""
    _FORMATS.pop(generation, None)


def chat_format(generation: int) -> ChatFormat:
    """The format of a generation. Raises ValueError where there is none."""
    if generation not in _FORMATS:
        known = ", ".join(map(str, sorted(_FORMATS)))
        raise ValueError(f"there is no ChatGLM of generation {generation!r}: the generations are {known}")
    return _FORMATS[generation]


def names_of(condition: Callable[[ChatFormat], bool], one: str = "", several: str = "", short: bool = False) -> str:
    """For messages: the models that meet a condition, with the verb for one or for several of them."""
    known = [_FORMATS[generation] for generation in sorted(_FORMATS)]
    names = [format.name if short else format.model_name for format in known if condition(format)]
    verb = one if len(names) == 1 else several
    return " ".join(filter(None, [" and ".join(names), verb]))
