"""A conversation <-> token ids: the prompt formats of ChatGLM-6B (1), ChatGLM2-6B (2) and ChatGLM3-6B (3).

Formats, with q and a for questions and answers:

* 1: `[Round 0]\\n问：q\\n答：a\\n[Round 1]\\n问：q\\n答：` then `[gMASK] <sop>`; without history the bare question.
* 2: `[gMASK] sop` then `[Round 1]\\n\\n问：q\\n\\n答：a\\n\\n[Round 2]\\n\\n问：q\\n\\n答：`, always.
* 3: `[gMASK] sop` then for every message `<|role|>`, the ids of `metadata\\n` and the ids of the content, each encoded
  on its own; at the end `<|assistant|>`.

Text of a conversation is always encoded as plain text: a typed `<|user|>` or `[gMASK]` never becomes a control token.
"""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ROLES = ("system", "user", "assistant", "observation")

#: What the answers of all generations say for the date their training data ends; the originals fill it in like this.
_TRAINING_DATE = ("[[训练时间]]", "2023年")
_HALF_TO_FULL = str.maketrans(",!:;?", "，！：；？")
_PUNCTUATION_BY_HAN = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
# What may still change at the end of an unfinished answer; generation 1's decoder makes "," of " ,", "n't" of " n't".
_PENDING_MARK = r"\[\[?(?:训(?:练(?:时(?:间\]?)?)?)?)?"
_PENDING = re.compile(rf"(?:[\s\ufffd]|{_PENDING_MARK})+$")
_PENDING_V1 = re.compile(rf"(?:\s'[vr]?|\sn'?|[\s\ufffd,!:;?]|{_PENDING_MARK})+$")
# Closed by a line of its own: there may be backticks in the arguments of a call.
_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:\n```|```\s*\Z|\Z)", re.DOTALL)
_RAW_STRING = re.compile(r"""\b[brf]*r[brf]*['"]""", re.IGNORECASE)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_NAME = re.compile(r"[^\W\d][\w.\-]{0,63}")

Pair = tuple[str, str]
Message = dict[str, Any]


class ChatTokenizer(Protocol):
    """What the prompt formats need of a tokenizer."""

    chatglm_version: int

    def encode_text(self, text: str) -> list[int]: ...

    def get_command(self, token: str) -> int: ...


@dataclass
class Response:
    """An answer as the user gets it: `content`, and the `messages` to append to a role history."""

    content: str | dict[str, Any]
    messages: list[Message] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------- checking


def validate_history(version: int, history: Sequence[Any] | None) -> list[Any]:
    """A fresh copy of a history, checked: `(question, answer)` tuples for 1 and 2, role dicts for 3.

    Raises:
        TypeError: the history or one of its items has the wrong type.
        ValueError: a pair has not two items, a role is unknown or a key is missing.
    """
    if history is None:
        return []
    if isinstance(history, (str, bytes)) or not isinstance(history, Sequence):
        raise TypeError(f"history must be a list, not {type(history).__name__}")
    check = _check_message if version == 3 else _check_pair
    return [check(item, f"history[{index}]") for index, item in enumerate(history)]


def _check_pair(item: Any, where: str) -> Pair:
    if isinstance(item, Mapping):
        raise TypeError(
            f"{where} is a dict; this model takes (question, answer) pairs. "
            "For role dicts use tokenizer.apply_chat_template"
        )
    if not isinstance(item, (tuple, list)):
        raise TypeError(f"{where} must be a (question, answer) pair, not {type(item).__name__}")
    if len(item) != 2:
        raise ValueError(f"{where} must be a (question, answer) pair, but has {len(item)} items")
    question, answer = item
    return _check_text(question, f"the question of {where}"), _check_text(answer, f"the answer of {where}")


def _check_message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        is_pair = isinstance(item, (tuple, list))
        hint = "; (question, answer) pairs are for ChatGLM-6B and ChatGLM2-6B" if is_pair else ""
        raise TypeError(
            f"{where} must be a dict like {{'role': 'user', 'content': '…'}}, not {type(item).__name__}{hint}"
        )
    if "role" not in item or "content" not in item:
        raise ValueError(f"{where} needs the keys 'role' and 'content', but has {sorted(map(str, item))}")
    check_role(item["role"])
    _check_text(item["content"], f"the content of {where}")
    _check_text(item.get("metadata") or "", f"the metadata of {where}")
    tools = item.get("tools")
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, (Sequence, Mapping))):
        raise TypeError(f"the tools of {where} must be a list of tool descriptions, not {type(tools).__name__}")
    return {key: value if isinstance(value, str) else copy.deepcopy(value) for key, value in item.items()}


def _check_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, not {type(text).__name__}")
    return text


def check_role(role: Any) -> str:
    """The role itself; ValueError for one that ChatGLM3 does not know."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}: use one of {', '.join(ROLES)}")
    return role


def _check_query(version: int, query: Any, role: str) -> str:
    if version == 3:
        check_role(role)
    elif role != "user":
        raise ValueError(f"role={role!r}: roles other than 'user' are for ChatGLM3-6B only")
    return _check_text(query, "the query")


def has_tools(history: Sequence[Any] | None) -> bool:
    """Whether a role history starts with a system message that carries tools."""
    first = history[0] if history else None
    return isinstance(first, Mapping) and first.get("role") == "system" and bool(first.get("tools"))


# -------------------------------------------------------------------------------------------- text of a prompt


def prompt_text(version: int, query: str, history: Sequence[Pair] = ()) -> str:
    """The text of a prompt of generation 1 or 2 (training-critical: not a character may differ)."""
    if version == 1 and not history:
        return query
    rounds = [_round_text(version, number, *pair) for number, pair in enumerate(history)]
    return "".join(rounds) + _round_text(version, len(history), query)


_GAPS = {1: "\n", 2: "\n\n"}


def _round_text(version: int, number: int, question: str, answer: str | None = None) -> str:
    gap = _GAPS[version]
    text = f"[Round {number + version - 1}]{gap}问：{question}{gap}答："
    return text if answer is None else f"{text}{answer}{gap}"


def message_content(message: Message) -> str:
    """What is encoded as the content of a role message: for a system message with tools also their JSON."""
    tools = message.get("tools")
    if not tools:
        return message["content"]
    try:
        return message["content"] + "\n" + json.dumps(_unwrap_tools(tools), indent=4, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the tools of the system message cannot be written as JSON: {error}") from error


def _unwrap_tools(tools: Any) -> Any:
    """OpenAI's `{"type": "function", "function": {…}}` become the bare descriptions ChatGLM3 was trained with."""

    def bare(tool: Any) -> Any:
        wrapped = isinstance(tool, Mapping) and tool.get("type") == "function" and "function" in tool
        return tool["function"] if wrapped else tool

    return tools if isinstance(tools, Mapping) else [bare(tool) for tool in tools]


# ----------------------------------------------------------------------------------------- segments of a prompt

#: A piece of a prompt: text that is encoded on its own, or the name of a control token (True).
Segment = tuple[str, bool]

_START: list[Segment] = [("[gMASK]", True), ("sop", True)]


def prompt_segments(version: int, query: str, history: Sequence[Any], role: str = "user") -> list[Segment]:
    """The whole prompt, up to where the model starts to answer. The history has to be valid."""
    if version == 1:
        return [(prompt_text(1, query, history), False), ("[gMASK]", True), ("<sop>", True)]
    if version == 2:
        return [*_START, (prompt_text(2, query, history), False)]
    return [*_START, *_message_segments([*history, {"role": role, "content": query}]), ("<|assistant|>", True)]


def _message_segments(messages: Iterable[Message]) -> list[Segment]:
    segments: list[Segment] = []
    for message in messages:
        metadata = message.get("metadata") or ""
        segments += [(f"<|{message['role']}|>", True), (f"{metadata}\n", False), (message_content(message), False)]
    return segments


def encode_segments(tokenizer: ChatTokenizer, segments: Iterable[Segment]) -> list[int]:
    """The ids of the segments: what has been typed is in texts and stays text."""
    ids: list[int] = []
    for text, is_token in segments:
        ids += [tokenizer.get_command(text)] if is_token else tokenizer.encode_text(text)
    return ids


def encode_message(tokenizer: ChatTokenizer, role: str, metadata: str, content: str) -> list[int]:
    """The ids of one message of generation 3: `<|role|>`, `metadata\\n`, content."""
    message = {"role": check_role(role), "metadata": metadata, "content": _check_text(content, "the message")}
    return encode_segments(tokenizer, _message_segments([message]))


def encode_conversation(
    tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None = None, role: str = "user"
) -> list[int]:
    """The ids of the whole prompt, up to where the model starts to answer.

    Args:
        query: what is asked now (generation 3: the content of a message with the given role).
        history: pairs for generations 1 and 2, role dicts for 3; not changed.

    Raises:
        TypeError, ValueError: as `validate_history`; an unknown role.
    """
    version = tokenizer.chatglm_version
    query = _check_query(version, query, role)
    return encode_segments(tokenizer, prompt_segments(version, query, validate_history(version, history), role))


def fit_conversation(
    tokenizer: ChatTokenizer, query: str, history: Sequence[Any] | None, budget: int, role: str = "user"
) -> tuple[list[int], list[Any]]:
    """The ids of the prompt within `budget` tokens, and the history that is left in it.

    The oldest whole turns are dropped, as few as possible. A leading system message and the current question always
    stay; for an observation, its question and its tool call belong to the current turn.
    The work grows with the budget, not with the length of the history.

    Raises:
        ValueError: what has to stay does not fit; the message has the numbers.
        TypeError, ValueError: as `encode_conversation`.
    """
    version = tokenizer.chatglm_version
    query = _check_query(version, query, role)
    history = validate_history(version, history)
    head, turns, tail = _split_turns(version, history, role)

    def ids_with(kept: int) -> list[int]:
        middle = [message for turn in turns[len(turns) - kept :] for message in turn]
        return encode_segments(tokenizer, prompt_segments(version, query, [*head, *middle, *tail], role))

    ids = ids_with(0)
    if len(ids) > budget:
        raise ValueError(
            f"the question alone needs {len(ids)} tokens, but only {budget} are left for the prompt: "
            "shorten it or raise max_length (or lower max_new_tokens)"
        )
    # Estimate from the newest turn backwards; round numbers and joints can change it by a token or two per turn.
    kept, used = 0, len(ids)
    while kept < len(turns):
        used += _turn_cost(tokenizer, turns[len(turns) - kept - 1], len(turns) - kept - 1)
        if used > budget:
            break
        kept += 1
    ids = ids_with(kept)
    while len(ids) > budget:
        kept -= 1
        ids = ids_with(kept)
    while kept < len(turns) and len(more := ids_with(kept + 1)) <= budget:
        kept, ids = kept + 1, more
    return ids, [*head, *(message for turn in turns[len(turns) - kept :] for message in turn), *tail]


def _split_turns(version: int, history: list[Any], role: str) -> tuple[list[Any], list[list[Any]], list[Any]]:
    """History as (what stays in front, turns that may go, what belongs to the current turn)."""
    if version != 3:
        return [], [[pair] for pair in history], []
    head = history[:1] if history and history[0]["role"] == "system" else []
    turns: list[list[Any]] = []
    for message in history[len(head) :]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    tail = turns.pop() if turns and role in ("observation", "assistant") else []
    return head, turns, tail


def _turn_cost(tokenizer: ChatTokenizer, turn: list[Any], number: int) -> int:
    if tokenizer.chatglm_version == 3:
        return len(encode_segments(tokenizer, _message_segments(turn)))
    return len(tokenizer.encode_text(_round_text(tokenizer.chatglm_version, number, *turn[0])))


def stop_token_ids(tokenizer: ChatTokenizer) -> list[int]:
    """The ids that end an answer: `<eop>`; `</s>`; `</s>`, `<|user|>`, `<|observation|>`."""
    names = {1: ("<eop>",), 2: ("<eos>",), 3: ("<eos>", "<|user|>", "<|observation|>")}
    return [tokenizer.get_command(name) for name in names[tokenizer.chatglm_version]]


# -------------------------------------------------------------------------------- messages of other programs


def normalize_messages(messages: Sequence[Any], tools: Any = None) -> list[Message]:
    """Chat messages as OpenAI clients and transformers pass them, as role messages of generation 3.

    Contents may be None or lists of text parts; the roles `tool` and `function` become `observation`, `developer`
    becomes `system`; an assistant's `tool_calls` become messages with the tool's name as metadata; `tools` go into the
    system message, which is made where there is none.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
    result: list[Message] = []
    for index, item in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(item, Mapping) or "role" not in item:
            raise TypeError(f"{where} must be a dict like {{'role': 'user', 'content': '…'}}")
        role = item["role"]
        role = "observation" if role in ("tool", "function") else "system" if role == "developer" else role
        content = _content_text(item.get("content"), where)
        calls = item.get("tool_calls") or ([{"function": item["function_call"]}] if item.get("function_call") else [])
        if content or not calls:
            kept = {key: item[key] for key in ("metadata", "tools") if item.get(key)}
            result.append(_check_message({"role": role, "content": content, **kept}, where))
        result += [_tool_call_message(call, where) for call in calls]
    if tools:
        if not result or result[0]["role"] != "system":
            result.insert(0, {"role": "system", "content": TOOLS_SYSTEM_PROMPT})
        result[0]["tools"] = copy.deepcopy(list(tools) if not isinstance(tools, Mapping) else dict(tools))
    return result


#: The system message ChatGLM3 was trained with for tools.
TOOLS_SYSTEM_PROMPT = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)


def _content_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(_check_text(part["text"], f"a text part of {where}") for part in content)
    raise TypeError(f"the content of {where} must be a string or a list of text parts: the models read text only")


def _tool_call_message(call: Any, where: str) -> Message:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            raise TypeError(f"the arguments are no JSON object but {type(arguments).__name__}")
        return tool_call_message(name, arguments)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"a tool call of {where} needs function.name and function.arguments (JSON): {error}"
        raise ValueError(reason) from error


def tool_call_message(name: str, parameters: Mapping[str, Any]) -> Message:
    """The assistant message with which generation 3 calls a tool; `parse_response` is the way back."""
    if all(key.isidentifier() for key in parameters):
        arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    else:
        arguments = f"**{dict(parameters)!r}"
    return {"role": "assistant", "metadata": name, "content": f"```python\ntool_call({arguments})\n```"}


def pairs_from_messages(messages: Sequence[Any]) -> tuple[list[Pair], str | None]:
    """Role messages for generations 1 and 2: (answered pairs, the open question or None).

    These generations know no system message: its text goes in front of the first question, with a newline between.

    Raises:
        ValueError: the messages are not system (at most one, first), then user and assistant in turn.
    """
    system, pairs, question = "", [], None
    for index, message in enumerate(normalize_messages(messages)):
        role, content = message["role"], message["content"]
        if role == "system" and index == 0 and not message.get("tools"):
            system = f"{content}\n" if content else ""
        elif role == "user" and question is None:
            question, system = system + content, ""
        elif role == "assistant" and question is not None and not message.get("metadata"):
            pairs.append((question, content))
            question = None
        else:
            raise ValueError(
                f"messages[{index}] has the role {role!r}: this model takes user and assistant messages in turn, "
                "after at most one system message without tools"
            )
    if question is None and not pairs:
        raise ValueError("a conversation needs a user message")
    return pairs, question


def chat_segments(
    version: int, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
) -> list[Segment]:
    """A list of messages in the model's format.

    Args:
        open_answer: end with what asks the model to answer, as `prompt_segments`.
        end: for a conversation of generations 1 and 2 that ends with an answer, the end token after it: what the
            model was trained on.

    Raises:
        TypeError, ValueError: messages of the wrong shape.
    """
    if version == 3:
        segments = [*_START, *_message_segments(normalize_messages(messages, tools))]
        return [*segments, ("<|assistant|>", True)] if open_answer else segments
    if tools:
        raise ValueError("tools are for ChatGLM3-6B only")
    pairs, question = pairs_from_messages(messages)
    if question is None:
        if open_answer:
            raise ValueError("add_generation_prompt needs the last message to be the user's")
        asked, answer = pairs[-1]
        stop: list[Segment] = [("<eop>" if version == 1 else "<eos>", True)]
        return [*prompt_segments(version, asked, pairs[:-1]), (answer, False), *(stop if end else [])]
    if open_answer:
        return prompt_segments(version, question, pairs)
    text = prompt_text(version, question, pairs)
    if version == 2 or pairs:
        text = text.removesuffix("答：").removesuffix(_GAPS[version])
    return [*(_START if version == 2 else []), (text, False)]


def encode_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Any],
    tools: Any = None,
    open_answer: bool = True,
    end: bool = True,
    budget: int | None = None,
) -> list[int]:
    """The ids of `chat_segments`; with a budget (and `open_answer`) the oldest turns go, as in `fit_conversation`."""
    version = tokenizer.chatglm_version
    segments = chat_segments(version, messages, tools, open_answer, end)
    if budget is None or not open_answer:
        return encode_segments(tokenizer, segments)
    if version == 3:
        *history, last = normalize_messages(messages, tools)
        if last["role"] not in ("user", "observation"):
            raise ValueError("truncation needs the last message to be the user's, or an observation")
        return fit_conversation(tokenizer, last["content"], history, budget, last["role"])[0]
    pairs, question = pairs_from_messages(messages)
    return fit_conversation(tokenizer, question or "", pairs, budget)[0]


def render_chat(
    version: int, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
) -> str:
    """`chat_segments` as text with the control tokens spelt out, for people and other programs.

    A prompt encoded again with `add_special_tokens=False, split_special_tokens=False` gives the ids of `encode_chat`,
    as long as nobody has typed a control token: ids are the safe form.
    """
    text, after_text = "", False
    for part, is_token in chat_segments(version, messages, tools, open_answer, end):
        # The blank stands for the one with which every text that is encoded on its own begins.
        text += ("</s>" if part == "<eos>" else part) if is_token else " " * (after_text and part != "") + part
        after_text = not is_token
    return text


_TEMPLATE_OF_PAIRS = (
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


def _template_of_pairs(**words: str) -> str:
    return re.sub("|".join(words), lambda word: words[word[0]], _TEMPLATE_OF_PAIRS)


#: The formats once more as Jinja templates, which are saved with a tokenizer for programs that read nothing else.
CHAT_TEMPLATES = {
    1: _template_of_pairs(FIRST="0", BARE="true", GAP="\\n", ASK="[gMASK]<sop>", JOIN="", END="<eop>"),
    2: "[gMASK]sop" + _template_of_pairs(FIRST="1", BARE="false", GAP="\\n\\n", ASK="", JOIN=" ", END="</s>"),
    3: (
        "[gMASK]sop{% macro spec(tools) %}{{ (tools | map(attribute='function') | list "
        "if tools[0].function is defined else tools) | tojson(indent=4) }}{% endmacro %}"
        "{% if tools and messages[0].role != 'system' %}"
        "{{ '<|system|>\\n PROMPT\\n' ~ spec(tools) }}{% endif %}"
        "{% for message in messages %}"
        "{% set own = message.tools or (tools if loop.first and message.role == 'system' else none) %}"
        "{{ '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n' }}"
        "{{ ' ' ~ message.content if message.content or own else '' }}{{ '\\n' ~ spec(own) if own else '' }}"
        "{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
    ).replace("PROMPT", TOOLS_SYSTEM_PROMPT),
}


def is_published_template(template: Any) -> bool:
    """Whether this is the template of some published tokenizers, whose blanks give other ids than the format itself."""
    start = "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>"
    return isinstance(template, str) and template.startswith(start)


# ---------------------------------------------------------------------------------------------------- answers


def clean_response(version: int, text: str) -> str:
    """An answer as the user sees it: outer blanks gone, the training date filled in, generation 1's punctuation.

    Generation 1's vocabulary knows half-width punctuation only: beside a Han character it becomes full-width again.
    """
    text = text.strip().replace(*_TRAINING_DATE)
    if version == 1:
        text = _PUNCTUATION_BY_HAN.sub(lambda found: found[0].translate(_HALF_TO_FULL), text)
    return text


def stable_response(version: int, text: str) -> str:
    """What may be shown of an unfinished answer: a part of the finished one, whatever follows.

    Held back are outer blanks, U+FFFD (which may be half of a character), the beginning of `[[训练时间]]`, and for
    generation 1 punctuation, which a Han character may follow, and blanks that its decoder may take away.
    """
    pending = _PENDING_V1 if version == 1 else _PENDING
    tail = pending.search(text, max(0, len(text) - 64))
    return clean_response(version, text[: tail.start()] if tail else text)


def parse_response(version: int, text: str, with_tools: bool = False) -> Response:
    """The text of an answer as content and history messages.

    Generation 3 may answer with several messages, each `metadata\\ncontent`; the last one is the content. One with
    metadata is a call: `{"name", "parameters"}` if the conversation has tools, else `{"name", "content"}` (the code
    interpreter). A call that cannot be read is `{"name", "parameters": None, "content": raw, "error": why}`; code for
    `interpreter` has no error. Nothing that the model writes is ever run.
    """
    if version != 3:
        content = clean_response(version, text)
        return Response(content, [{"role": "assistant", "content": content}])
    messages: list[Message] = []
    content_of_last: str | dict[str, Any] = ""
    for part in text.split("<|assistant|>"):
        metadata, content = _split_metadata(part)
        name = metadata.strip()
        if not name:
            content = content.strip()
            content_of_last = clean_response(version, content)
        elif with_tools:
            content_of_last = _parse_call(name, content)
        else:
            content_of_last = {"name": name, "content": content}
        messages.append({"role": "assistant", "metadata": metadata, "content": content})
    return Response(content_of_last, messages)


def _split_metadata(part: str) -> Pair:
    """A message as (metadata, content); a first line that cannot be a tool's name belongs to the content."""
    return split_message(part, whole=True) or ("", part)


def split_message(part: str, whole: bool) -> Pair | None:
    """A message of generation 3 as (metadata, content); None while more of it has to come before that can be said."""
    metadata, newline, content = part.partition("\n")
    name, start = metadata.strip(), content.lstrip()
    if name and not _NAME.fullmatch(name):
        return "", part
    if not newline:
        return ("", part) if whole else None
    if name in ("", "interpreter"):
        return metadata, content
    calls = ("```", "tool_call(", f"{name}(", "{")
    if start.startswith(calls):
        return metadata, content
    return None if not whole and any(call.startswith(start) for call in calls) else ("", part)


def _parse_call(name: str, content: str) -> dict[str, Any]:
    fence = _FENCE.search(content)
    code = (fence[1] if fence else content).strip()
    try:
        return {"name": name, "parameters": _parse_arguments(code, name)}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        call: dict[str, Any] = {"name": name, "parameters": None, "content": content}
        if name != "interpreter":
            call["error"] = f"the tool call cannot be read: {str(error) or type(error).__name__}"
        return call


def _parse_arguments(code: str, name: str) -> dict[str, Any]:
    """`tool_call(key=literal, …)` or a JSON object as a dict, without running anything."""
    if code[:1] == "{":
        value = json.loads(code)
        return value["arguments"] if set(value) == {"name", "arguments"} and value["name"] == name else value
    if not _RAW_STRING.search(code):  # a lone backslash, as in "C:\\dir", is no reason for a warning
        code = _ESCAPE.sub(lambda pair: pair[0] if pair[1] in "\n\\'\"abfnrtvxuUN01234567" else "\\" + pair[0], code)
    call = ast.parse(code, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in ("tool_call", name):
        raise ValueError("it is not of the form tool_call(key=value, …)")
    if call.args:
        raise ValueError("every argument needs a name")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        value = ast.literal_eval(_JsonNames().visit(keyword.value))
        given = {keyword.arg: value} if keyword.arg is not None else value  # `**{…}`
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given) or set(given) & set(arguments):
            raise ValueError("an argument is given twice, or without a name")
        arguments |= given
    return arguments


def arguments_so_far(name: str, content: str) -> dict[str, Any]:
    """The arguments of an unfinished `tool_call(…)` that nothing to come can change, in their order."""
    code = content.lstrip()
    if code.startswith("```"):
        code = code.partition("\n")[2].lstrip()
    head, bracket, _ = code.partition("(")
    if not bracket or head.strip() not in ("tool_call", name):
        return {}
    depth, quote, end, place = 0, "", 0, len(head)
    while place < len(code):
        here = code[place]
        if quote:
            if here == "\\":
                place += 1
            elif code.startswith(quote, place):
                place += len(quote) - 1
                quote = ""
        elif here in "'\"":
            quote = here * 3 if code.startswith(here * 3, place) else here
            place += len(quote) - 1
        elif here in "([{":
            depth += 1
        elif here in ")]}":
            depth -= 1
        if depth == 0 or (here == "," and depth == 1 and not quote):
            end = place
        if depth == 0:
            break
        place += 1
    try:
        return _parse_arguments(code[:end] + ")", name) if end else {}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return {}


class _JsonNames(ast.NodeTransformer):
    """Models mix the languages up: `true`, `false` and `null` count as `True`, `False` and `None`."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        names = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(names[node.id]), node) if node.id in names else node
