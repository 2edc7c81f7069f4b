"""`ChatFormat`, the form of a generation's conversations, and the registry of formats by generation."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .. import registries
from .call_grammar import CallGrammar
from .fitting import fit
from .history import Message, check_items, check_text
from .segments import ChatTokenizer, Segment, encode_segments, render_segments

#: All generations write this placeholder for the end of their training data; the originals fill in this date.
_TRAINING_DATE = ("[[训练时间]]", "2023年")
#: The beginning of the placeholder, at the end of an unfinished answer.
PENDING_DATE = r"\[\[?(?:训(?:练(?:时(?:间\]?)?)?)?)?"


class Sliders(NamedTuple):
    """The page's sliders: upper limit and default of the maximum length, then the defaults of the original's page."""

    most: int
    max_length: int
    top_p: float
    temperature: float


class TrainingLimits(NamedTuple):
    """How the original's training script counts the tokens of a (question, answer) row."""

    prompt_extra: int = 0  # tokens that a prompt may have beyond max_source_length
    answer_less: int = 0  # tokens that an answer in training must stay below max_target_length
    target_less: int = 0  # the same for the reference text of a prediction
    learned_prompt: int = 0  # tokens at the end of the prompt that also count in the loss
    least_answer: int = 1  # the lowest valid max_target_length


@dataclass
class Response:
    """An answer: `content`, as the user gets it, and the `messages` to append to a role history."""

    content: str | dict[str, Any]
    messages: list[Message] = field(default_factory=list)


class ChatFormat(ABC):
    """Everything in which the conversations of two generations can differ; see docs/adding_a_generation.md.

    A format has no state. Two kinds exist: `PairFormat`, whose histories are (question, answer) pairs and whose prompts
    are numbered rounds, and `RoleFormat`, whose histories are messages with roles.

    Text of a conversation is always encoded as plain text: a typed `<|user|>` or `[gMASK]` never becomes a control
    token.
    """

    generation: ClassVar[int]
    #: The model's name on pages and in messages: "ChatGLM3".
    name: ClassVar[str]
    #: The published name: "ChatGLM3-6B".
    model_name: ClassVar[str]
    #: Names of the control tokens that end an answer, as `tokenizer.get_command` knows them; training uses the first.
    stop_tokens: ClassVar[tuple[str, ...]]
    #: The segments that begin a prompt.
    start: ClassVar[tuple[Segment, ...]] = ()
    #: Goes between two separately encoded texts when a prompt is rendered as text: the space with which SentencePiece
    #: begins every text.
    joint: ClassVar[str] = " "
    #: The format as a Jinja template, saved with the tokenizer for programs that read only templates.
    template: str
    #: Whether histories are messages with roles, not (question, answer) pairs.
    has_roles: ClassVar[bool] = False
    knows_system_prompt: ClassVar[bool] = False
    knows_tools: ClassVar[bool] = False
    #: The system message if tools are given without one.
    tools_system_prompt: ClassVar[str] = ""
    sliders: ClassVar[Sliders] = Sliders(32768, 8192, 0.8, 0.8)
    training: ClassVar[TrainingLimits] = TrainingLimits()
    #: What may still change at the end of an unfinished answer.
    pending: ClassVar[re.Pattern[str]] = re.compile(rf"(?:[\s\ufffd]|{PENDING_DATE})+$")

    def is_published(self, template: Any) -> bool:
        """Whether a tokenizer's template is one of the published ones, in whose place this format is used."""
        return False

    # ---- histories ---------------------------------------------------------------------------------------------------

    def validate(self, history: Sequence[Any] | None, query: str | None = None) -> list[Any]:
        """Returns a checked copy of a history.

        Args:
            query: the question that is to be asked; a last round that holds it without an answer is left out.

        Raises:
            TypeError: the history or one of its items has the wrong type.
            ValueError: a pair does not have two items, a role is unknown or a key is missing.
        """
        before = history if query is None else self.before_question(history, query)
        return check_items(before, self.check_item)

    def before_question(self, history: Any, query: str) -> Any:
        """Returns an unchecked history without the turn of `query`, which front ends may have noted in it already."""
        return history

    @abstractmethod
    def check_item(self, item: Any, where: str) -> Any:
        """Returns a checked copy of one item of a history, or None if it is empty; errors call it `where`."""

    @abstractmethod
    def check_role(self, role: str) -> str:
        """Returns the role of a question. Raises ValueError if this model does not have it."""

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
        """Returns the history after a turn; `response` and `messages` come from a `Response`."""

    @abstractmethod
    def as_messages(self, history: Sequence[Any]) -> list[Message]:
        """Converts a history of either kind to role messages."""

    @abstractmethod
    def from_messages(self, messages: Sequence[Message]) -> list[Any]:
        """Converts role messages of whole turns back to a history."""

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompt_text(self, query: str, history: Sequence[Any] = ()) -> str:
        """Returns the text of a prompt. Raises ValueError if a prompt is more than one text."""
        raise ValueError(f"{self.name}'s prompt is made of control tokens, not of text: use build_chat_input")

    def message_content(self, message: Message) -> str:
        """Returns the content of a message as it is encoded: a system message with tools includes their description."""
        return message["content"]

    @abstractmethod
    def prompt_segments(self, query: str, history: Sequence[Any], role: str = "user") -> list[Segment]:
        """Returns the whole prompt, up to where the model starts to answer. The history must be valid."""

    @abstractmethod
    def chat_segments(
        self, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
    ) -> list[Segment]:
        """Converts chat messages, as OpenAI's clients and transformers pass them, to this format.

        Args:
            open_answer: end with the segments that make the model answer, as `prompt_segments` does.
            end: after the last answer of a `PairFormat`, add the end token that the model was trained on.

        Raises:
            TypeError, ValueError: the messages are malformed.
        """

    @abstractmethod
    def open_question(self, messages: Sequence[Any], tools: Any = None) -> tuple[str, list[Any], str]:
        """Splits chat messages into (query, history, role). Raises ValueError if the last one cannot be answered."""

    @abstractmethod
    def split_turns(self, history: list[Any], role: str) -> tuple[list[Any], list[list[Any]], list[Any]]:
        """Splits a history into (items that stay, turns that may be dropped, items of the current question).

        Args:
            role: of the current question."""

    @abstractmethod
    def turn_tokens(self, tokenizer: ChatTokenizer, turn: list[Any], number: int) -> int:
        """Estimates how many tokens a turn takes; `number` is its index from 0."""

    def encode(
        self, tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None = None, role: str = "user"
    ) -> list[int]:
        """Returns the ids of the whole prompt, up to where the model starts to answer.

        Raises:
            TypeError, ValueError: as `validate`, or for an unknown role.
        """
        query = self.check_query(query, role)
        return encode_segments(tokenizer, self.prompt_segments(query, self.validate(history, query), role))

    def encode_next_round(
        self, tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of the prompt that follow the last answer of the history; all ids without a history.

        Raises ValueError if the conversation has no numbered rounds.
        """
        raise ValueError(f"conversations of {self.name} have no numbered rounds: use encode")

    def fit(
        self,
        tokenizer: ChatTokenizer,
        query: str,
        history: Sequence[Any] | None,
        budget: int,
        role: str = "user",
    ) -> tuple[list[int], list[Any]]:
        """Returns the ids of the prompt, at most `budget`, and the history that is left in it; see `fitting.fit`."""
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
        """Returns the ids of `chat_segments`; with `budget` and `open_answer`, drops the oldest turns as `fit` does."""
        segments = self.chat_segments(messages, tools, open_answer, end)
        if budget is None or not open_answer:
            return encode_segments(tokenizer, segments)
        query, history, role = self.open_question(messages, tools)
        return self.fit(tokenizer, query, history, budget, role)[0]

    def render_chat(
        self, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
    ) -> str:
        """Returns `chat_segments` as text with the control tokens spelt out, for people and other programs.

        Encoding a prompt with `add_special_tokens=False, split_special_tokens=False` gives the ids of `encode_chat`,
        unless a user typed a control token: ids are the safe form.
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
        """Returns the ids of one role message. Raises ValueError if the vocabulary has no role tokens."""
        return encode_segments(tokenizer, self.message_segments([message]))

    @abstractmethod
    def encode_answer(self, tokenizer: ChatTokenizer, message: Message) -> list[int]:
        """Returns the ids of an answer that follow the prompt, without the token that ends it."""

    def answer_start(self, tokenizer: ChatTokenizer) -> list[int]:
        """Returns the ids that the model writes first when it answers with text."""
        return []

    def stop_token_ids(self, tokenizer: ChatTokenizer) -> list[int]:
        """The ids that end an answer."""
        return [tokenizer.get_command(name) for name in self.stop_tokens]

    # ---- answers -----------------------------------------------------------------------------------------------------

    def clean(self, text: str) -> str:
        """Returns an answer as the user sees it: stripped, with the training date filled in."""
        return text.strip().replace(*_TRAINING_DATE)

    def stable(self, text: str) -> str:
        """Returns what may be shown of an unfinished answer: a prefix of the finished one, whatever follows.

        Holds back outer whitespace, U+FFFD (perhaps half of a character) and the beginning of `[[训练时间]]`.
        """
        tail = self.pending.search(text, max(0, len(text) - 64))
        return self.clean(text[: tail.start()] if tail else text)

    def split_answer(self, text: str) -> list[str]:
        """Splits the raw text of an answer into messages: one, unless the format lets the model write several."""
        return [text]

    def parse(self, text: str, with_tools: bool = False) -> Response:
        """Parses the raw text of an answer into content and history messages. Never runs what the model writes.

        Args:
            with_tools: the conversation has tools.
        """
        content = self.clean(text)
        return Response(content, [{"role": "assistant", "content": content}])

    # ---- tools -------------------------------------------------------------------------------------------------------

    def tool_call_message(self, name: str, parameters: Mapping[str, Any]) -> Message:
        """The assistant message that calls a tool; `parse` reads it back."""
        arguments = json.dumps(dict(parameters), ensure_ascii=False)
        return {"role": "assistant", "metadata": name, "content": arguments}

    def call_start(self, tokenizer: ChatTokenizer, name: str) -> list[int]:
        """Returns the ids that begin a call of this tool; what `call_grammar` allows may follow its name.

        Raises ValueError if the model does not call tools.
        """
        raise ValueError(f"{self.model_name} was not trained to call tools")

    def call_grammar(self, schema: Mapping[str, Any]) -> CallGrammar:
        """Returns the grammar of what follows the line with a tool's name: arguments that follow the JSON schema.

        `read_call` must read everything that it allows. Raises ValueError for a schema that it cannot follow.
        """
        return CallGrammar("value: @schema", {"schema": dict(schema)})

    def split_message(self, part: str, whole: bool) -> tuple[str, str] | None:
        """Splits a message of an answer into (metadata, content); None while the text to follow can change the split.

        Args:
            whole: no more text follows."""
        return "", part

    def read_call(self, name: str, content: str) -> dict[str, Any]:
        """Parses the content of a message that calls a tool into `{"name", "parameters"}`.

        A call that cannot be parsed gives `{"name", "parameters": None, "content": content, "error": why}`.
        """
        raise ValueError(f"{self.model_name} was not trained to call tools")

    def arguments_so_far(self, name: str, content: str) -> dict[str, Any]:
        """Returns the arguments of an unfinished call that are already final, in their order."""
        return {}


# ---- the registry ----------------------------------------------------------------------------------------------------

_FORMATS: dict[int, ChatFormat] = registries.FORMATS


def register_chat_format(chat_format: ChatFormat) -> ChatFormat:
    """Registers a format for its generation. Raises ValueError if the generation already has another one."""
    known = _FORMATS.setdefault(chat_format.generation, chat_format)
    if type(known) is not type(chat_format):
        raise ValueError(f"generation {chat_format.generation} has a chat format already: {type(known).__name__}")
    return known


def unregister_chat_format(generation: int) -> None:
    """Removes the format of a generation, for tests."""
    _FORMATS.pop(generation, None)


def chat_format(generation: int) -> ChatFormat:
    """Returns the format of a generation. Raises ValueError if there is none."""
    if generation not in _FORMATS:
        known = ", ".join(map(str, sorted(_FORMATS)))
        raise ValueError(f"there is no ChatGLM of generation {generation!r}: the generations are {known}")
    return _FORMATS[generation]


def names_of(condition: Callable[[ChatFormat], bool], one: str = "", several: str = "", short: bool = False) -> str:
    """Names the models that meet a condition, for messages, followed by the verb for `one` or for `several` of them."""
    known = [_FORMATS[generation] for generation in sorted(_FORMATS)]
    names = [format.name if short else format.model_name for format in known if condition(format)]
    verb = one if len(names) == 1 else several
    listed = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    return " ".join(filter(None, [listed, verb]))
