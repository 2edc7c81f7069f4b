"""The body of a request for a response, and how it becomes that of a chat completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ApiError, validation_message
from .bodies import Bias, Body, Count, Penalty, Probability, Seed
from .chat_body import ChatBody, Part

MOST_ITEMS, MOST_TOOLS = 2048, 128
#: What `include` may name. Only log probabilities exist here; the others belong to tools that this server does not run.
INCLUDED = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]
#: Fields that a chat completion has under the same name.
SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "do_sample", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "parallel_tool_calls", "top_logprobs",
)  # fmt: skip

Item = TypeVar("Item", bound=BaseModel)


class MessageItem(Part):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]
    phase: str | None = None


class TextItem(Part):
    """A part of a message, of the client's or of an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class CallItem(Part):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(Part):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class FunctionChoice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    name: str


class AllowedTools(BaseModel):
    """Only these of the tools may be called, and with the mode "required" one of them must be."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(fail_fast=True, max_length=MOST_TOOLS)]


class TextConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(BaseModel):
    """The models do not reason apart from their answers."""

    model_config = ConfigDict(extra="forbid")
    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_obfuscation: bool | None = None


class ResponsesBody(Body):
    input: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=MOST_ITEMS)]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[INCLUDED], Field(max_length=16)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    # As in chat completions; OpenAI's responses do not have them.
    do_sample: bool | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    # Accepted only where they have no effect.
    background: Literal[False] | None = None
    max_tool_calls: Count | None = None
    reasoning: Reasoning | None = None
    service_tier: Literal["auto", "default"] | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None

    def tells_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or [])

    def new_messages(self) -> list[dict[str, Any]]:
        """Returns the input as chat messages. Raises ApiError (400) for an item that the models cannot read."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input)

    def chat_body(self, messages: Sequence[Mapping[str, Any]]) -> ChatBody:
        """Returns the body of the chat completion that answers `messages`, the whole conversation.

        Raises ApiError (400).
        """
        tools, choice = self._tools(), self._tool_choice()
        if isinstance(self.tool_choice, AllowedTools):
            allowed = [tool.name for tool in self.tool_choice.tools]
            tools = [tool for tool in tools if tool["function"].get("name") in allowed]
        values = {name: getattr(self, name) for name in SAME} | {
            "messages": with_instructions(self.instructions, messages),
            "max_completion_tokens": self.max_output_tokens,
            "tools": tools or None,
            "tool_choice": choice,
            "logprobs": self.tells_logprobs() or None,
            "response_format": self._response_format(),
        }
        try:
            return ChatBody.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            message, param = validation_message(error.errors())
            raise ApiError(400, message, param="input" if param == "messages" else param) from error

    def _tools(self) -> list[dict[str, Any]]:
        for index, tool in enumerate(self.tools or []):
            if tool.get("type") != "function":
                reason = f"tools[{index}]: this server has no tools of its own, only functions that the client runs"
                raise ApiError(400, reason, param="tools", code="unsupported_parameter")
        return [
            {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
            for tool in self.tools or []
        ]

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            return {"type": "function", "function": {"name": choice.name}}
        return choice.mode if isinstance(choice, AllowedTools) else choice

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.get("type") != "json_schema":
            return wanted
        return {"type": "json_schema", "json_schema": {name: wanted[name] for name in wanted if name != "type"}}


def with_instructions(instructions: str | None, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Puts the instructions in front, in one system message with what the client's own says: models know one."""
    if not instructions:
        return list(messages)
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": instructions}, *messages]
    return [{"role": "system", "content": f"{instructions}\n{first['content']}"}, *messages[1:]]


def messages_of(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Converts items to chat messages: calls go into the assistant's message before them, reasoning is left out.

    Raises:
        ApiError: (400) an item is not text, a call or a result.
    """
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        where, kind = f"input[{index}]", item.get("type") or "message"
        if kind == "message":
            message = _checked(MessageItem, item, where)
            messages.append({"role": message.role, "content": _text(message.content, where)})
        elif kind == "function_call":
            call = _checked(CallItem, item, where)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": call.name, "arguments": call.arguments}
            messages[-1].setdefault("tool_calls", []).append(
                {"id": call.call_id, "type": "function", "function": function}
            )
        elif kind == "function_call_output":
            result = _checked(ResultItem, item, where)
            content = _text(result.output, where)
            messages.append({"role": "tool", "tool_call_id": result.call_id, "content": content})
        elif kind != "reasoning":
            reason = f"{where}: this server does not take items of the type {str(kind)[:60]!r}"
            raise ApiError(400, reason, param="input", code="unsupported_parameter")
    return messages


def _checked(kind: type[Item], item: Mapping[str, Any], where: str) -> Item:
    try:
        return kind.model_validate(item)
    except ValidationError as error:
        raise ApiError(400, f"{where}: {validation_message(error.errors())[0]}", param="input") from error


def _text(content: str | Sequence[Mapping[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        if isinstance(kind, str) and kind not in ("input_text", "output_text", "text"):
            reason = f"{where}: this model reads text only, not {kind[:60]}"
            raise ApiError(400, reason, param="input", code="unsupported_parameter")
        texts.append(_checked(TextItem, part, f"{where}.content[{number}]").text)
    return "".join(texts)
