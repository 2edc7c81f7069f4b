"""`PairFormat`: conversations of (question, answer) pairs, written as one text of numbered rounds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from .chat_messages import pairs_from_messages
from .formats import ChatFormat, names_of
from .history import Message, Pair, check_pair, messages_of_pairs, pairs_before
from .segments import ChatTokenizer, Segment

_TEMPLATE = (
    "{% set ns = namespace(round=FIRST, system='') %}"
    "{% set bare = BARE and messages | selectattr('role', 'equalto', 'user') | list | length == 1 %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content + '\\n' %}"
    "{% elif message.role == 'user' %}"
    "{{ ('' if bare else '[Round ' ~ ns.round ~ ']GAP问：') ~ ns.system ~ message.content }}{% set ns.system = '' %}"
    "{{ 'GAP答：' if not bare and (add_generation_prompt or not loop.last) else '' }}"
    "{{ 'ASK' if loop.last and add_generation_prompt else '' }}"
    "{% elif loop.last %}{{ 'ASK' ~ ('JOIN' if message.content else '') ~ message.content ~ 'END' }}"
    "{% else %}{{ message.content ~ 'GAP' }}{% endif %}"
    "{% set ns.round = ns.round + (1 if message.role == 'assistant' else 0) %}{% endfor %}"
)


def template_of_rounds(**words: str) -> str:
    """Returns the Jinja template of a format of rounds, with these words filled in."""
    return re.sub("|".join(words), lambda word: words[word[0]], _TEMPLATE)


class PairFormat(ChatFormat):
    """Rounds of `[Round 1]`, question and answer; the whole text is encoded at once."""

    #: Control tokens after the text, before the answer.
    ask: ClassVar[tuple[Segment, ...]] = ()
    #: Text between the parts of a round, and after it.
    gap: ClassVar[str] = "\n\n"
    first_round: ClassVar[int] = 1
    #: Whether a question without history stands alone, without `[Round …]`.
    bare_first_question: ClassVar[bool] = False

    def check_item(self, item: Any, where: str) -> Pair | None:
        return check_pair(item, where)

    def before_question(self, history: Any, query: str) -> Any:
        return pairs_before(history, query)

    def check_role(self, role: str) -> str:
        if role != "user":
            models = names_of(lambda format: format.has_roles)
            raise ValueError(f"role={role!r}: roles other than 'user' are for {models} only")
        return role

    def history_after(
        self,
        before: Sequence[Any],
        query: str,
        role: str,
        response: str | dict[str, Any],
        messages: Sequence[Message],
    ) -> list[Any]:
        return [*before, (query, response)]

    def as_messages(self, history: Sequence[Any]) -> list[Message]:
        return messages_of_pairs(history)

    def from_messages(self, messages: Sequence[Message]) -> list[Any]:
        texts = [message["content"] for message in messages]
        return list(zip(texts[::2], texts[1::2], strict=True))

    # ---- prompts: not a character may differ from what the models were trained on ------------------------------------

    def question_text(self, number: int, question: str) -> str:
        """Returns the beginning of a round; `number` is its index from 0."""
        return f"[Round {number + self.first_round}]{self.gap}问：{question}"

    def round_text(self, number: int, question: str, answer: str | None = None) -> str:
        """Returns a round; without an answer, it ends where the model continues."""
        text = f"{self.question_text(number, question)}{self.gap}答："
        return text if answer is None else f"{text}{answer}{self.gap}"

    def prompt_text(self, query: str, history: Sequence[Pair] = (), open_answer: bool = True) -> str:
        """Returns the text of a prompt; without `open_answer`, up to the end of the question."""
        if self.bare_first_question and not history:
            return query
        rounds = [self.round_text(number, *pair) for number, pair in enumerate(history)]
        last = self.round_text if open_answer else self.question_text
        return "".join(rounds) + last(len(history), query)

    def prompt_segments(self, query: str, history: Sequence[Any], role: str = "user") -> list[Segment]:
        return [*self.start, (self.prompt_text(query, history), False), *self.ask]

    def encode_next_round(
        self, tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None = None
    ) -> list[int]:
        """Returns the ids of the prompt that follow the last answer of the history; all ids without a history."""
        if not history:
            return self.encode(tokenizer, query)
        text = self.gap + self.round_text(len(self.validate(history)), self.check_query(query, "user"))
        return tokenizer.encode_text(text)[1:]  # without the space with which SentencePiece begins every text

    def chat_segments(
        self, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
    ) -> list[Segment]:
        if tools:
            raise ValueError(f"tools are for {names_of(lambda format: format.knows_tools)} only")
        pairs, question = pairs_from_messages(messages, self)
        if question is None:
            if open_answer:
                raise ValueError("add_generation_prompt needs the last message to be the user's")
            asked, answer = pairs[-1]
            stop: list[Segment] = [(self.stop_tokens[0], True)] if end else []
            return [*self.prompt_segments(asked, pairs[:-1]), (answer, False), *stop]
        if open_answer:
            return self.prompt_segments(question, pairs)
        return [*self.start, (self.prompt_text(question, pairs, open_answer=False), False)]

    def open_question(self, messages: Sequence[Any], tools: Any = None) -> tuple[str, list[Any], str]:
        pairs, question = pairs_from_messages(messages, self)
        return question or "", pairs, "user"

    def split_turns(self, history: list[Any], role: str) -> tuple[list[Any], list[list[Any]], list[Any]]:
        return [], [[pair] for pair in history], []

    def turn_tokens(self, tokenizer: ChatTokenizer, turn: list[Any], number: int) -> int:
        return len(tokenizer.encode_text(self.round_text(number, *turn[0])))

    def encode_answer(self, tokenizer: ChatTokenizer, message: Message) -> list[int]:
        return tokenizer.encode_text(message["content"])
