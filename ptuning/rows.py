"""Training data: files -> rows, checked before any model is loaded.

A file is JSON lines, one JSON list or CSV, in UTF-8 (or UTF-16 with a byte order mark). A row is one of

* a question and an answer: `content`/`summary`, `prompt`/`response`, or any named columns; optionally with a `history`
  of earlier `[question, answer]` pairs. The answer is learned, the history is not;
* Alpaca's `instruction`, `input`, `output`, `history`, `system`, or ShareGPT's turns of `from` and `value`: `forms.py`;
* `conversations` (or `messages`) with `role` and `content`, and optionally `tools`: all assistant messages are learned,
  except those with `"loss": false`. A message of the role `tool` with `name`, `parameters` and `observation` is a call
  and its result; OpenAI's `tool_calls` and `tool` messages work, too.

* VisualGLM's `img`, `prompt` and `label`: a picture's path (from the folder of the data file), a question, an answer.

In CSV, a history, conversations and tools are JSON in one field.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm.conversation import ChatFormat, chat_format
from chatglm.conversation.chat_messages import normalize_messages, pairs_from_messages
from chatglm.conversation.formats import names_of
from chatglm.conversation.history import (
    Message,
    Pair,
    check_items,
    check_pair,
    messages_before,
    messages_of_pairs,
    pairs_before,
)
from ptuning import forms
from ptuning.data_files import DECODER, DataError, Problems, read_records

_CONVERSATIONS = ("conversations", "messages")
#: Question and answer columns that are detected by name.
_KNOWN_COLUMNS = (("prompt", "response"), ("content", "summary"))
#: The columns of VisualGLM's data: a picture, a question about it, and the answer.
_PICTURE_COLUMNS = ("img", "prompt", "label")

Record = Mapping[str, Any]

CHATGLM3 = chat_format(3)


@dataclass(frozen=True)
class Columns:
    """The names of the columns; None: those of the known formats. A history is read only if it is named, or if the
    columns were detected."""

    prompt: str | None = None
    response: str | None = None
    history: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt_column and response_column go together: give both or neither")
        if self.history is not None and self.prompt is None:
            raise ValueError("history_column needs prompt_column and response_column beside it")


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        where: `FILE:LINE`.
        messages: role messages, each with a bool under `loss`: whether the model learns to say it. Without `whole`,
            questions and answers in turn, of which only the last answer is learned.
        whole: a conversation with roles, which has one length limit instead of one each for question and answer.
        image: the path of the picture that it is about.
    """

    where: str
    messages: tuple[Message, ...]
    whole: bool = False
    image: str | None = None


class Rows(list[Row]):
    """The rows of a file.

    Attributes:
        path: the file.
        found: how many rows the file has; a conversation may become several examples.
        skipped: the line numbers of rows without a question or an answer.
        forms: how many rows have each form, see `forms.form_of`.
        unused: the columns that no form reads.
    """

    def __init__(self, rows: Iterable[Row] = (), path: str = "", found: int = 0, skipped: Iterable[int] = ()) -> None:
        super().__init__(rows)
        self.path, self.found, self.skipped = path, found, list(skipped)
        self.forms: Counter[str] = Counter()
        self.unused: list[str] = []


def read_rows(
    path: str | Path,
    columns: Columns | None = None,
    chat_format: ChatFormat = CHATGLM3,
    max_rows: int | None = None,
    require_answer: bool = True,
) -> Rows:
    """Reads and checks all rows of a data file.

    Args:
        columns: the names of the columns; detected if None.
        chat_format: the model's.
        max_rows: read at most this many rows of the file.
        require_answer: False keeps rows without an answer, for prediction only.

    Raises:
        DataError: the file is missing, empty, wrongly encoded or broken JSON or CSV, has wrong columns or types, or no
            usable row.
    """
    return rows_from_records(read_records(Path(path), max_rows), str(path), columns, chat_format, require_answer)


def rows_from_records(
    records: Iterable[tuple[int, Any]],
    name: str,
    columns: Columns | None = None,
    chat_format: ChatFormat = CHATGLM3,
    require_answer: bool = True,
) -> Rows:
    """As `read_rows`, from (line or number, dict) pairs; errors call their source `name`."""
    reader = RowReader(columns or Columns(), chat_format, require_answer)
    problems, rows = Problems(name), Rows(path=name)
    first: tuple[int, list[str]] | None = None
    for line, record in records:
        rows.found += 1
        if not isinstance(record, Mapping):
            problems.add(line, f'a row must be a JSON object like {{"prompt": …}}, not {_kind(record)}')
            continue
        first = first or (line, [str(key) for key in record])
        try:
            image = reader.image(record, name)
            examples = [Row(f"{name}:{line}", *made, image=image) for made in reader.examples(record)]
        except (TypeError, ValueError) as error:
            problems.add(line, str(error))
            continue
        rows += examples
        if not examples:
            rows.skipped.append(line)
    problems.check()
    if first is None:
        raise DataError(f"{name}:1: there are no rows in this file")
    reader.check_columns(f"{name}:{first[0]}", first[1])
    if not rows:
        raise DataError(f"{name}:{first[0]}: none of the {rows.found} rows has both a question and an answer")
    rows.forms, rows.unused = reader.forms, sorted(reader.there - reader.used)
    return rows


# --------------------------------------------------------------------------------------------------- record -> rows


class RowReader:
    """Records -> the fields of a Row, for one chat format and one choice of columns."""

    def __init__(self, columns: Columns, chat_format: ChatFormat, require_answer: bool) -> None:
        self.columns, self.chat_format, self.require_answer = columns, chat_format, require_answer
        self.seen: set[str] = set()
        self.needed: set[str] = set()
        self.forms: Counter[str] = Counter()
        self.there: set[str] = set()
        self.used: set[str] = set()

    def examples(self, record: Record) -> list[tuple[tuple[Message, ...], bool]]:
        """(messages, whole) of each example; none for a record without a question or an answer."""
        self.there |= {str(key) for key in record}
        if self.columns.prompt is not None:
            assert self.columns.response is not None  # checked by Columns
            if (self.columns.prompt, self.columns.response) == ("instruction", "output"):
                return self._alpaca(record, self.columns.history)
            self.forms[forms.PAIRS] += 1
            return self._pair(record, self.columns.prompt, self.columns.response, self.columns.history)
        form = forms.form_of(record)
        if form == forms.ALPACA:
            return self._alpaca(record, "history")
        self.forms[form] += 1
        if form == forms.SHAREGPT:
            self.used |= {"conversations", "messages", "system", "tools"} & set(record)
            made = forms.from_sharegpt(record)
            return self._conversation(made["conversations"], "conversations", made.get("tools"))
        for name in _CONVERSATIONS:
            if name in record:
                self.used |= {name, "tools"}
                return self._conversation(record[name], name, record.get("tools"))
        if set(_PICTURE_COLUMNS) <= set(record):
            return self._pair(record, "prompt", "label", "history" if "history" in record else None)
        for prompt, response in _KNOWN_COLUMNS:
            if prompt in record:
                return self._pair(record, prompt, response, "history" if "history" in record else None)
        raise ValueError(_wrong_columns([str(key) for key in record], "no known columns"))

    def image(self, record: Record, name: str) -> str | None:
        """The path of a record's picture, which counts from the folder of the data file. Raises ValueError or
        TypeError if there is none, or the model does not see."""
        if "img" not in record:
            return None
        if not hasattr(self.chat_format, "image_length"):
            raise ValueError(f"'img' is a picture, and {self.chat_format.model_name} reads text only")
        self.used.add("img")
        path = Path(name).parent / Path(_text(record, "img")).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no picture {path}")
        return str(path)

    def _alpaca(self, record: Record, history: str | None) -> list[tuple[tuple[Message, ...], bool]]:
        self.forms[forms.ALPACA] += 1
        self.seen |= set(record)
        self.needed |= {"instruction", *(["output"] if self.require_answer else [])}
        self.used |= set(forms.ALPACA_COLUMNS)
        made = forms.from_alpaca({**record, "history": record.get(history) if history else None})
        return self._pair(made, "prompt", "response", "history", inner=True)

    def check_columns(self, where: str, there: list[str]) -> None:
        """Raises DataError for a column that no record has."""
        if missing := sorted(self.needed - self.seen):
            raise DataError(f"{where}: {_wrong_columns(there, f'no column {missing[0]!r}')}")

    def _pair(
        self, record: Record, prompt: str, response: str, history: str | None, inner: bool = False
    ) -> list[tuple[tuple[Message, ...], bool]]:
        """`inner`: the record is not as it is in the file."""
        if not inner:
            self.seen |= set(record)
            self.needed |= {prompt, *([response] if self.require_answer else []), *([history] if history else [])}
            self.used |= {prompt, response, *([history] if history else [])}
        question, answer = _text(record, prompt), _text(record, response)
        earlier = self._history(record.get(history), history, question) if history else []
        if not question.strip() or (self.require_answer and not answer.strip()):
            return []
        last = {"role": "assistant", "content": answer, "loss": True}
        return [((*earlier, {"role": "user", "content": question, "loss": False}, last), False)]

    def _history(self, value: Any, name: str, query: str) -> list[Message]:
        value = _decoded(value, name)
        value = pairs_before(messages_before(value, query), query)
        if not value:
            return []
        if isinstance(value, Sequence) and isinstance(value[0], Mapping):
            messages = [
                message for index, item in enumerate(value) for message in self._messages(item, f"{name}[{index}]")
            ]
            if self.chat_format.has_roles:
                return [{**message, "loss": False} for message in _ordered(messages)]
            pairs, question = pairs_from_messages(messages, self.chat_format)
            if question is not None:
                raise ValueError(f"{name!r} ends with a question: it has to end with an answer")
            return _not_learned(pairs)
        try:
            return _not_learned(check_items(value, check_pair))
        except (TypeError, ValueError) as error:
            raise ValueError(str(error).replace("history", repr(name), 1)) from error

    def _conversation(self, value: Any, name: str, tools: Any) -> list[tuple[tuple[Message, ...], bool]]:
        self.seen.add(name)
        value, tools = _decoded(value, name), _decoded(tools, "tools")
        if not value:
            return []
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise TypeError(f"{name!r} must be a list of messages, not {_kind(value)}")
        messages: list[Message] = []
        for index, item in enumerate(value):
            messages += self._messages(item, f"{name}[{index}]", is_last=index == len(value) - 1)
        if tools:
            if isinstance(tools, str) or not isinstance(tools, (Sequence, Mapping)):
                raise TypeError(f"'tools' must be a list of tool descriptions, not {_kind(tools)}")
            if not messages or messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.chat_format.tools_system_prompt, "loss": False})
            messages[0] = {**messages[0], "tools": tools}
        if self.chat_format.has_roles:
            messages = _ordered(messages)
            return [(tuple(messages), True)] if any(message["loss"] for message in messages) else []
        return self._answers(messages)

    def _answers(self, messages: list[Message]) -> list[tuple[tuple[Message, ...], bool]]:
        """Without roles: one example for each answer, as the model sees the whole prompt at once."""
        try:
            pairs, _ = pairs_from_messages(messages, self.chat_format)
        except ValueError as error:
            others = names_of(lambda format: format.knows_tools, "has", "have")
            with_tools = any(message.get("metadata") or message.get("tools") for message in messages)
            hint = f". {others} tools and roles" if with_tools else ""
            raise ValueError(f"{error}{hint}") from error
        learned = [message["loss"] for message in messages if message["role"] == "assistant"]
        examples = []
        for index, (question, answer) in enumerate(pairs):
            if learned[index] and question.strip():
                *earlier, asked, said = _not_learned([*pairs[:index], (question, answer)])
                examples.append(((*earlier, asked, {**said, "loss": True}), False))
        return examples

    def _messages(self, item: Any, where: str, is_last: bool = False) -> list[Message]:
        """One message of a file as role messages, each with `loss`."""
        if not isinstance(item, Mapping) or "role" not in item:
            keys = f" with {', '.join(map(repr, item))}" if isinstance(item, Mapping) else ""
            raise TypeError(f"{where} must be an object with 'role' and 'content', not {_kind(item)}{keys}")
        loss = item.get("loss", item.get("weight"))
        if loss is not None and loss not in (True, False):
            raise TypeError(f"'loss' of {where} must be true or false, not {loss!r}")
        if item["role"] == "tool" and ("parameters" in item or "observation" in item):
            made = self._tool_messages(item, where, is_last)
        else:
            made = _renamed(where, lambda: normalize_messages([item], None, self.chat_format))
        return [
            {**message, "loss": message["role"] == "assistant" and loss is not False and loss != 0 and _says(message)}
            for message in made
        ]

    def _tool_messages(self, item: Record, where: str, is_last: bool) -> list[Message]:
        """ChatGLM3's role `tool`: the assistant's call, and the observation (which only the last message may lack)."""
        name, parameters = item.get("name"), _decoded(item.get("parameters"), f"parameters of {where}")
        if not isinstance(name, str) or not name.strip() or "\n" in name:
            raise ValueError(f"{where} needs the name of the tool under 'name'")
        if not isinstance(parameters, Mapping):
            raise TypeError(f"{where} needs an object of arguments under 'parameters', not {_kind(parameters)}")
        call = self.chat_format.tool_call_message(name, parameters)
        if "observation" not in item:
            if not is_last:
                raise ValueError(f"{where} needs what the tool returned under 'observation'")
            return [call]
        result = item["observation"]
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        return [call, {"role": "observation", "content": text}]


def _wrong_columns(there: list[str], what: str) -> str:
    hint = "name yours with --prompt_column and --response_column"
    if any(name in there for name in _CONVERSATIONS):
        hint = f"{hint}, or leave both out for conversations"
    return f"{what}; there are {', '.join(map(repr, there)) or 'none'}: {hint}"


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{name!r} must be text, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number",
        type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _decoded(value: Any, name: str) -> Any:
    """Decodes JSON in a text field, as in CSV; other values stay as they are."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return DECODER.decode(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name!r} must be JSON: {error}") from error


def _not_learned(pairs: Iterable[Pair]) -> list[Message]:
    return [{**message, "loss": False} for message in messages_of_pairs(pairs)]


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("metadata"))


def _renamed(where: str, make: Callable[[], list[Message]]) -> list[Message]:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace("messages[0]", where)) from error


def _ordered(messages: list[Message]) -> list[Message]:
    """Returns the messages; ValueError if their order is invalid."""
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and index:
            raise ValueError("a system message has to be the first, and there is one at most")
        if role == "observation" and (not index or messages[index - 1]["role"] not in ("assistant", "observation")):
            raise ValueError("an observation has to follow the assistant's call of a tool")
    return messages
