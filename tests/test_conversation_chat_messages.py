"""Chat messages of other programs, and the Jinja templates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from chatglm.conversation import TOOLS_SYSTEM_PROMPT, normalize_messages, pairs_from_messages
from conversations import TOOLS, tiny


def test_messages_of_openai_clients() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "北京"}, {"type": "text", "text": "天气"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "晴"},
    ]
    before = copy.deepcopy(messages)
    result = normalize_messages(messages, TOOLS)
    assert messages == before
    assert result == [
        {"role": "system", "content": TOOLS_SYSTEM_PROMPT, "tools": TOOLS},
        {"role": "user", "content": "北京天气"},
        {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
        {"role": "observation", "content": "晴"},
    ]
    assert normalize_messages([{"role": "developer", "content": "s"}], TOOLS) == [
        {"role": "system", "content": "s", "tools": TOOLS}
    ]


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ("hi", TypeError, "messages must be a list of dicts, not str"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], TypeError, "the models read text only"),
        ([{"role": "assistant", "tool_calls": [{}]}], ValueError, "a tool call of messages"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], ValueError, "JSON"),
    ],
)
def test_wrong_messages(messages: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        normalize_messages(messages)


def test_messages_as_pairs() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "s"}
    assert pairs_from_messages([user]) == ([], "q")
    assert pairs_from_messages([system, user, assistant]) == ([("s\nq", "a")], None)
    assert pairs_from_messages([user, assistant, user]) == ([("q", "a")], "q")
    for wrong in ([assistant], [user, user], [user, system], [user, assistant, assistant], [system, system]):
        with pytest.raises(ValueError, match="takes user and assistant messages in turn"):
            pairs_from_messages(wrong)
    for empty in ([], [system]):
        with pytest.raises(ValueError, match="needs a user message"):
            pairs_from_messages(empty)
    with pytest.raises(ValueError, match="in turn"):
        pairs_from_messages([user, {"role": "assistant", "content": "", "metadata": "get_weather"}])


def test_templates_and_tools() -> None:
    for version in (1, 2):
        with pytest.raises(ValueError, match="tools are for ChatGLM3-6B and GLM-4-9B only"):
            tiny(version).apply_chat_template([{"role": "user", "content": "q"}], tools=TOOLS)
        with pytest.raises(ValueError, match="the last message to be the user's"):
            messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
            tiny(version).apply_chat_template(messages, add_generation_prompt=True)

    def get_weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: its name
        """
        return city

    ours: Any = tiny(3)
    messages = [{"role": "user", "content": "q"}]
    text = ours.apply_chat_template(messages, tools=[get_weather], tokenize=False)
    assert text.startswith("[gMASK]sop<|system|>\n Answer the following") and '"name": "get_weather"' in text
    assert '"type": "function"' not in text


@pytest.mark.parametrize("tools", [None, [], {}, TOOLS, [{"type": "function", "function": TOOLS[0]}], {"a": TOOLS[0]}])
@pytest.mark.parametrize("content", ["s", ""])
@pytest.mark.parametrize("given", [None, [{"name": "other"}]])
def test_the_template_writes_tools_as_the_format_does(tools: Any, content: str, given: Any) -> None:
    """The tools of a system message, and those of the call in their place."""
    ours: Any = tiny(3)
    messages = [{"role": "system", "content": content, "tools": tools}, {"role": "user", "content": "q"}]
    for chat in (messages, messages[1:]):
        text = ours.apply_chat_template(chat, tools=given, tokenize=False, add_generation_prompt=True)
        rendered = PreTrainedTokenizerBase.apply_chat_template(
            ours, chat, tools=given, tokenize=False, add_generation_prompt=True
        )
        assert rendered == text
        ids = ours.apply_chat_template(chat, tools=given, return_dict=False, add_generation_prompt=True)
        assert ids == ours.encode(text, add_special_tokens=False, split_special_tokens=False)
