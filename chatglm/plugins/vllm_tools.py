"""vLLM's tool parsers for the calls of ChatGLM3 and GLM-4: `--enable-auto-tool-choice --tool-call-parser chatglm3`."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.tool_parsers import ToolParser

from ..conversation import chat_format
from ..serving.answers import AssistantMessage, Change


class ChatGLM3ToolParser(ToolParser):
    """Splits answers as our own server does: calls, and texts without the blanks that the model writes around them.

    Only tools that the request offers can be called; anything else is text.
    """

    generation: ClassVar[int] = 3
    #: vLLM then calls `finish_streaming` at the end of an answer: the arguments of a call may be known only there.
    engine_based_streaming = True

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        super().__init__(tokenizer, tools)
        # A tokenizer.json, as in exported folders, has no chat format of its own.
        self._reader = SimpleNamespace(
            chat_format=chat_format(self.generation), clean_up_tokenization_spaces=False
        )
        self._stream: AssistantMessage | None = None

    def adjust_request(self, request: Any) -> Any:
        """Also asks for control tokens in the text: `<|assistant|>` separates the messages of an answer."""
        request = super().adjust_request(request)
        if request.tools:
            request.skip_special_tokens = False
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        answer = self._answer(request)
        answer.feed(model_output, whole=True)
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in answer.calls
        ]
        content = answer.content if answer.content or not calls else None
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=content)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        if self._stream is None:
            self._stream = self._answer(request)
        return self._message(self._stream.feed(delta_text, whole=False))

    def finish_streaming(self) -> DeltaMessage | None:
        """What was held back until the end of the answer."""
        return None if self._stream is None else self._message(self._stream.feed("", whole=True))

    def _answer(self, request: Any) -> AssistantMessage:
        names = [getattr(tool, "function", tool).name for tool in self.tools]
        one = getattr(request, "parallel_tool_calls", None) is False
        return AssistantMessage(self._reader, [] if request.tool_choice == "none" else names, one)

    def _message(self, change: Change) -> DeltaMessage | None:
        calls = []
        for index, call, arguments, is_new in change.calls:
            start = {"id": call.id, "type": "function"} if is_new else {}
            function = DeltaFunctionCall(name=call.name if is_new else None, arguments=arguments)
            calls.append(DeltaToolCall(index=index, function=function, **start))
            if is_new:
                self.prev_tool_call_arr.append({"name": call.name, "arguments": ""})
        if not calls and not change.content:
            return None
        return DeltaMessage(content=change.content or None, tool_calls=calls)


class GLM4ToolParser(ChatGLM3ToolParser):
    """Calls of GLM-4: a name and a line of JSON."""

    generation = 4
