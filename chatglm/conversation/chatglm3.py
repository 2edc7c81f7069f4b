"""The chat format of ChatGLM3-6B: `[gMASK] sop`, messages with roles, `<|assistant|>`; tool calls as Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import tool_calls
from .call_grammar import CallGrammar, call_grammar
from .formats import Sliders, TrainingLimits
from .history import Message
from .role_format import RoleFormat
from .segments import ChatTokenizer, tokens

#: The system message with which ChatGLM3 was trained to use tools.
TOOLS_SYSTEM_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"


class ChatGLM3Format(RoleFormat):
    """Tools are JSON in the system message; a call is `name\\n` and a block of Python, `tool_call(key=value)`."""

    generation = 3
    name = "ChatGLM3"
    model_name = "ChatGLM3-6B"
    stop_tokens = ("<eos>", "<|user|>", "<|observation|>")
    start = tokens("[gMASK]", "sop")
    knows_tools = True
    tools_system_prompt = TOOLS_SYSTEM_PROMPT
    raw_tools = ("interpreter",)
    # As in its Streamlit page, where the length also counts prompt and answer together.
    sliders = Sliders(32768, 8192, 0.8, 0.6)
    training = TrainingLimits(least_answer=3)
    template = (
        "[gMASK]sop{% macro spec(tools) %}{{ (tools | map(attribute='function') | list "
        "if tools is not mapping and tools and tools[0].function is defined else tools) | tojson(indent=4) }}"
        "{% endmacro %}"
        "{% if tools and messages[0].role != 'system' %}"
        "{{ '<|system|>\\n PROMPT\\n' ~ spec(tools) }}{% endif %}"
        "{% for message in messages %}"
        "{% set own = none if message.role != 'system' else tools if tools and loop.first else message.tools %}"
        "{% set shown = own is defined and own is not none %}"
        "{{ '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n' }}"
        "{{ ' ' ~ message.content if message.content or shown else '' }}{{ '\\n' ~ spec(own) if shown else '' }}"
        "{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
    ).replace("PROMPT", TOOLS_SYSTEM_PROMPT)

    def is_published(self, template: Any) -> bool:
        """Whether it is the template of some published tokenizers, whose spaces give other ids than this format."""
        start = "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>"
        return isinstance(template, str) and template.startswith(start)

    def message_content(self, message: Message) -> str:
        """An empty list of tools is written as well, as in the original: `[]`. None is no tools."""
        tools = message.get("tools")
        if tools is None or message["role"] != "system":
            return message["content"]
        try:
            return message["content"] + "\n" + json.dumps(_unwrap_tools(tools), indent=4, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the tools of the system message cannot be written as JSON: {error}") from error

    def tool_call_message(self, name: str, parameters: Mapping[str, Any]) -> Message:
        return tool_calls.tool_call_message(name, parameters)

    def call_start(self, tokenizer: ChatTokenizer, name: str) -> list[int]:
        return tokenizer.encode_text(f"{name}\n")

    def call_grammar(self, schema: Mapping[str, Any]) -> CallGrammar:
        return call_grammar(schema)

    def call_openings(self, name: str) -> tuple[str, ...]:
        return "```", "tool_call(", f"{name}(", "{"

    def read_call(self, name: str, content: str) -> dict[str, Any]:
        """Code for `interpreter` that is not a call gives no error."""
        return tool_calls.parse_call(name, content)

    def arguments_so_far(self, name: str, content: str) -> dict[str, Any]:
        return tool_calls.arguments_so_far(name, content)


def _unwrap_tools(tools: Any) -> Any:
    """Reduces OpenAI's `{"type": "function", "function": {…}}` to the bare descriptions ChatGLM3 was trained with."""

    def bare(tool: Any) -> Any:
        wrapped = isinstance(tool, Mapping) and tool.get("type") == "function" and "function" in tool
        return tool["function"] if wrapped else tool

    return tools if isinstance(tools, Mapping) else [bare(tool) for tool in tools]
