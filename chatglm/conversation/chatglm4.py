"""The chat format of GLM-4-9B: messages with roles, tools in a system message of their own, calls in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .formats import Sliders, TrainingLimits
from .history import Message
from .role_format import RoleFormat
from .segments import ChatTokenizer, Segment, encode_segments, tokens

#: How the model introduces itself in front of its tools; other releases have other words, see `persona_of`.
DEFAULT_PERSONA = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题"
    "和要求提供适当的答复和支持。"
)
_TOOLS_HEADING = "\n\n# 可用工具"
_FUNCTION_END = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
#: The tools that the model knows by name, in the words that it was trained on.
BUILT_IN_TOOLS = {
    "python": (
        "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n"
        "`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\n"
        "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。不要使用 `python` 进行任何网络"
        "请求或者在线 API 调用，"
        "这些在线内容的访问将不会成功。"
    ),
    "simple_browser": (
        "你可以使用 `simple_browser` 工具。该工具支持以下函数：\n"
        "`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，可以使用 `recency_days` 参数控"
        "制搜索内容的时效性。\n"
        "`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。选择多个角度的页面"
        "，同时尽可能选择可信任的"
        "信息来源。考虑到部分页面是无法加载的，你也可以多打开一些可能有用的页面而不用担心内容过多。\n"
        "`open_url(url: str)`：打开指定的 URL。\n\n"
        "使用 `【{引用 id}†{引用文本}】` 来引用内容。\n\n"
        "操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; 3. 根据获得的内容"
        "进行回复。"
        "在回复中应当引用信息来源。\n"
        " 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\n"
        "如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。"
    ),
    "cogview": (
        "如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。你需要向 `cogview` 发送"
        "图像描述，规则：\n"
        "- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。\n"
        "- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。\n"
        "- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\n"
        "- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。"
    ),
}
_PERSONA = re.compile(rf"<\|system\|>\n([^<{{]+?){_TOOLS_HEADING}")
_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,63}")


def persona_of(template: Any) -> str | None:
    """How the model introduces itself in a chat template of GLM-4; None in any other template."""
    found = _PERSONA.search(template) if isinstance(template, str) else None
    return found[1] if found else None


class ChatGLM4Format(RoleFormat):
    """A call is the tool's name and a line of JSON.

    Args:
        persona: the words that introduce the model in front of its tools.
    """

    generation = 4
    name = "GLM-4"
    model_name = "GLM-4-9B"
    stop_tokens = ("<|endoftext|>", "<|user|>", "<|observation|>")
    start = tokens("[gMASK]", "<sop>")
    joint = ""
    knows_tools = True
    sliders = Sliders(131072, 8192, 0.8, 0.8)
    training = TrainingLimits(least_answer=3)

    def __init__(self, persona: str = DEFAULT_PERSONA) -> None:
        self.persona = persona
        self.template = _template(persona)

    def is_published(self, template: Any) -> bool:
        return persona_of(template) is not None

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def message_segments(self, messages: Iterable[Message]) -> list[Segment]:
        """Tools go into a system message of their own, in front; messages without content are left out."""
        segments: list[Segment] = []
        for message in messages:
            if message.get("tools") is not None:
                segments += [("<|system|>", True), (f"\n{self.persona}{_describe(message['tools'])}", False)]
            if message["content"]:
                segments += super().message_segments([message])
        return segments

    def encode_message(self, tokenizer: ChatTokenizer, message: Message) -> list[int]:
        """The ids of one message; unlike in a prompt, its content is encoded apart from the line break before it."""
        return encode_segments(tokenizer, super().message_segments([message]))

    def prompt_segments(self, query: str, history: Sequence[Any], role: str = "user") -> list[Segment]:
        return _joined(super().prompt_segments(query, history, role))

    def chat_segments(
        self, messages: Sequence[Any], tools: Any = None, open_answer: bool = True, end: bool = True
    ) -> list[Segment]:
        return _joined(super().chat_segments(messages, tools, open_answer, end))

    # ---- answers -----------------------------------------------------------------------------------------------------

    def call_start(self, tokenizer: ChatTokenizer, name: str) -> list[int]:
        return tokenizer.encode_text(f"{name}\n") + tokenizer.encode_text("{")

    def split_message(self, part: str, whole: bool) -> tuple[str, str] | None:
        """A call needs `{` right at the start of the second line, as in the original's server."""
        metadata, newline, content = part.partition("\n")
        name = metadata.strip()
        if not name:
            return (metadata, content) if newline else (("", part) if whole else None)
        if not _TOOL_NAME.fullmatch(name):
            return "", part
        if not newline or not content:
            return ("", part) if whole else None
        return (metadata, content) if content.startswith("{") else ("", part)

    def read_call(self, name: str, content: str) -> dict[str, Any]:
        """`cogview` takes its text as it is, under the key `prompt`."""
        if name == "cogview":
            return {"name": name, "parameters": {"prompt": content.strip()}}
        try:
            parameters = json.loads(content)
        except (ValueError, RecursionError) as error:
            call: dict[str, Any] = {"name": name, "parameters": None, "content": content}
            if name != "simple_browser":
                call["error"] = f"the tool call cannot be read: {error}"
            return call
        return {"name": name, "parameters": parameters}


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """The segments with adjacent texts as one, as the published template renders them before they are encoded."""
    joined: list[Segment] = []
    for text, is_token in segments:
        if joined and not is_token and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, False)
        else:
            joined.append((text, is_token))
    return joined


def _describe(tools: Any) -> str:
    """The tools as the model reads them. Raises ValueError for a kind of tool that it does not know."""
    text = _TOOLS_HEADING
    for tool in [tools] if isinstance(tools, Mapping) else tools:
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        if kind in BUILT_IN_TOOLS:
            text += f"\n## {kind}\n\n{BUILT_IN_TOOLS[kind]}"
            continue
        function = tool.get("function", tool) if kind == "function" and isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            known = ", ".join(BUILT_IN_TOOLS)
            raise ValueError(f"GLM-4 takes tools of type 'function' with a name, and {known}; not {tool!r}")
        try:
            text += f"\n## {function['name']}\n\n{json.dumps(function, ensure_ascii=False, indent=4)}{_FUNCTION_END}"
        except (TypeError, ValueError) as error:
            raise ValueError(f"the tool {function['name']} cannot be written as JSON: {error}") from error
    return text


def _template(persona: str) -> str:
    """The format as a Jinja template."""
    built_in = "".join(
        f"{{% elif tool.type == '{kind}' %}}{{{{ '\\n## {kind}\\n\\n' }}}}{text}"
        for kind, text in BUILT_IN_TOOLS.items()
    )
    return (
        "[gMASK]<sop>{% macro describe(list) %}<|system|>\n" + persona + _TOOLS_HEADING + "{% for tool in list %}"
        "{% if tool.type is not defined or tool.type == 'function' %}"
        "{% set function = tool.function if tool.function is defined else tool %}"
        "{{ '\\n## ' ~ function.name ~ '\\n\\n' ~ (function | tojson(indent=4)) }}"
        + _FUNCTION_END + built_in + "{% endif %}"
        "{% endfor %}{% endmacro %}"
        "{% if tools and messages[0].role != 'system' %}{{ describe(tools) }}{% endif %}"
        "{% for message in messages %}"
        "{% set own = tools if tools and loop.first and message.role == 'system' else message.tools %}"
        "{% if own is defined and own is not none %}{{ describe(own) }}{% endif %}"
        "{% if message.content %}{{ '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n' ~ message.content }}"
        "{% endif %}{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
    )
