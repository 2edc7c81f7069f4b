"""The body of a request for a chat completion: messages, tools, response format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from ..errors import ApiError
from ..tool_grammar import schema_of
from .bodies import MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, Count, Sampling
from .logprobs import MOST_LOGPROBS
from .neutral import without_records


def reads_text_only(kind: str) -> ApiError:
    """The error for a part of a message that the model cannot read."""
    reason = f"this model reads text only: a message holds a part of the type {kind[:40]!r}"
    return ApiError(400, reason, param="messages", code="unsupported_parameter")


class Part(BaseModel):
    """A message, a part of one, or a tool. Unknown keys are errors, except a chat program's own records."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_records(cls, values: Any) -> Any:
        return without_records(values, cls.model_fields)


class TextPart(Part):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """`detail` changes nothing: the model sees every picture in the same size."""

    model_config = ConfigDict(extra="forbid")
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    """Clients send answers back, so the keys of answers are accepted where they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "observation"]
    content: str | Annotated[list[TextPart | ImagePart], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _reads_text_and_pictures(cls, values: Any) -> Any:
        parts = values.get("content") if isinstance(values, Mapping) else None
        for part in parts[:MOST_PARTS] if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind not in ("text", "image_url"):
                raise reads_text_only(kind)
        return values

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role in ("system", "developer", "user"):
            raise ApiError(400, f"a message of the role {self.role} has no content", param="messages")
        return self

    @property
    def text(self) -> str:
        parts = self.content if isinstance(self.content, list) else []
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        return self.content if isinstance(self.content, str) else text

    @property
    def image_urls(self) -> list[str]:
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class Function(Part):
    """`params` are ChatGLM3's own list of parameters, in place of OpenAI's `parameters`.

    With `strict`, the arguments of every call follow the schema; those of calls that the client forces always do.
    """

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")
    description: str | None = None
    params: list[dict[str, Any]] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


def listed_functions(given: Any) -> Any:
    """Returns an object of name -> description, as ChatGLM3's clients send it, as a list; all else as it is."""
    if not isinstance(given, Mapping):
        return given
    if len(given) > MOST_TOOLS:
        raise ValueError(f"more than {MOST_TOOLS} functions")
    functions = []
    for name, function in given.items():
        if not isinstance(function, Mapping) or function.get("name", name) != name:
            raise ValueError(f"an object of functions must be like {{name: description}}, which {name!r} is not")
        functions.append({"name": name, **function})
    return functions


def wrapped_tools(given: Any) -> Any:
    """Returns tools in OpenAI's form; ChatGLM3's clients send bare descriptions, as a list or by name."""
    given = listed_functions(given)
    if not isinstance(given, list) or len(given) > MOST_TOOLS:
        return given
    return [
        {"type": tool.get("type", "function"), "function": {key: tool[key] for key in tool if key != "type"}}
        if isinstance(tool, Mapping) and "function" not in tool and "name" in tool
        else tool
        for tool in given
    ]


class Named(BaseModel):
    name: str


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: Named


class JsonSchema(BaseModel):
    """`strict` changes nothing: an answer always follows its schema."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    #: vLLM's: the log probabilities of the prompt's tokens, by id.
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    #: vLLM's: continue the last message, which is the assistant's.
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True), BeforeValidator(wrapped_tools)] | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: (
        Annotated[list[Function], Field(max_length=MOST_TOOLS, fail_fast=True), BeforeValidator(listed_functions)]
        | None
    ) = None
    function_call: Literal["none", "auto"] | Named | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    #: Whether the tools came as an object, name -> description.
    _by_name: bool = PrivateAttr(False)

    @model_validator(mode="wrap")
    @classmethod
    def _see_form(cls, values: Any, make: ModelWrapValidatorHandler[ChatBody]) -> ChatBody:
        body = make(values)
        body._by_name = isinstance(values, Mapping) and any(
            isinstance(values.get(name), Mapping) for name in ("tools", "functions")
        )
        return body

    def check(self) -> None:
        super().check()
        if self.schema_wanted() is not None and self.offered():
            reason = "response_format and tools exclude each other: leave one out, or set tool_choice to none"
            raise ApiError(400, reason, param="response_format", code="unsupported_parameter")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs need logprobs = true", param="top_logprobs")
        if self.functions and self.tools:
            raise ApiError(400, "give tools or functions (the older name), not both", param="functions")
        if self.stream and self.prompt_logprobs is not None:
            reason = "prompt_logprobs are not available in a stream: leave out stream"
            raise ApiError(400, reason, param="prompt_logprobs", code="unsupported_parameter")
        forced = self.forced_names()
        offered = {function.name for function in self.offered()}
        if forced is not None and not (offered and offered.issuperset(forced)):
            names = ", ".join(forced) or "a tool"
            raise ApiError(400, f"tool_choice asks for {names}, which is not among the tools", param="tool_choice")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.max_completion_tokens is not None:
            settings["max_new_tokens"] = self.max_completion_tokens
        return settings

    def schema_wanted(self) -> dict[str, Any] | None:
        """Returns the schema that the answer must follow, or None. Raises ApiError (400) if it is missing."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "object"}
        if wanted.json_schema is None:
            raise ApiError(400, "response_format json_schema needs a json_schema", param="response_format")
        return wanted.json_schema.content

    def offered(self) -> list[Function]:
        """Returns the functions that the model may call."""
        if self.tool_choice == "none" or self.function_call == "none":
            return []
        return list(self.functions or []) or [tool.function for tool in self.tools or []]

    def described(self) -> dict[str, Any] | list[dict[str, Any]] | None:
        """Returns the offered functions as the prompt has them: a list, or an object if the client gave one."""
        functions = [function.model_dump(exclude_none=True, exclude={"strict"}) for function in self.offered()]
        if self._by_name:
            return {function["name"]: function for function in functions} or None
        return functions or None

    def forced_names(self) -> list[str] | None:
        """Returns the names of functions of which the answer must call one, or None."""
        if self.tool_choice == "required":
            return [function.name for function in self.offered()]
        if isinstance(self.tool_choice, ToolChoice):
            return [self.tool_choice.function.name]
        return [self.function_call.name] if isinstance(self.function_call, Named) else None

    def schemas_of_calls(self) -> dict[str, dict[str, Any]]:
        """Returns the schemas that arguments must follow: of functions that are forced, else of strict ones."""
        forced = self.forced_names()
        return {
            function.name: schema_of(function.model_dump(exclude_none=True))
            for function in self.offered()
            if (function.strict if forced is None else function.name in forced)
        }
