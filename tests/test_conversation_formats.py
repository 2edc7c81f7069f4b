"""The registry of chat formats, and what all formats share."""

from __future__ import annotations

import inspect

import pytest

from chatglm import conversation
from chatglm.conversation import (
    CHAT_TEMPLATES,
    ChatFormat,
    chat_format,
    encode_chat,
    encode_conversation,
    fit_conversation,
    render_chat,
    stop_token_ids,
    validate_history,
)
from chatglm.conversation.chatglm3 import ChatGLM3Format
from chatglm.conversation.formats import names_of, register_chat_format
from conversations import tiny
from tiny_chat import pair

VERSIONS = (1, 2, 3)


def test_stop_tokens() -> None:
    names = {1: ["<eop>"], 2: ["</s>"], 3: ["</s>", "<|user|>", "<|observation|>"]}
    for version, expected in names.items():
        assert tiny(version).convert_ids_to_tokens(stop_token_ids(tiny(version))) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_model_and_tokenizer_have_the_format_of_their_generation(version: int) -> None:
    model, tokenizer = pair(version)
    assert model.chat_format is tokenizer.chat_format is chat_format(version)
    assert chat_format(version).generation == version


def test_names() -> None:
    formats = [chat_format(version) for version in VERSIONS]
    assert [one.name for one in formats] == ["ChatGLM", "ChatGLM2", "ChatGLM3"]
    assert [one.has_roles for one in formats] == [one.knows_tools for one in formats] == [False, False, True]
    assert names_of(lambda one: not one.has_roles, "knows", "know") == "ChatGLM-6B, ChatGLM2-6B and VisualGLM-6B know"
    assert names_of(lambda one: one.has_roles, "knows", "know", short=True) == "ChatGLM3 and GLM-4 know"


def test_the_registry() -> None:
    with pytest.raises(ValueError, match="no ChatGLM of generation 7: the generations are 1, 2, 3"):
        chat_format(7)
    assert register_chat_format(ChatGLM3Format()) is chat_format(3)  # again, as where a module is loaded twice

    class Other(ChatGLM3Format):
        pass

    with pytest.raises(ValueError, match="generation 3 has a chat format already: ChatGLM3Format"):
        register_chat_format(Other())
    assert type(chat_format(3)) is ChatGLM3Format


@pytest.mark.parametrize("version", VERSIONS)
def test_functions_by_generation_are_the_formats_methods(version: int) -> None:
    ours, format = tiny(version), chat_format(version)
    messages = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "q"},
    ]
    history = format.from_messages(messages[:2])
    assert format.as_messages(history) == messages[:2] and validate_history(version, history) == history
    ids = encode_conversation(ours, "q", history)
    assert ids == format.encode(ours, "q", history) == encode_chat(ours, messages)
    assert fit_conversation(ours, "q", history, len(ids)) == (ids, history)
    assert encode_chat(ours, messages, budget=len(ids) - 1) == encode_conversation(ours, "q")
    text = render_chat(version, messages)
    assert ours.encode(text, add_special_tokens=False, split_special_tokens=False) == ids
    assert CHAT_TEMPLATES[version] == format.template


def test_old_names_and_signatures() -> None:
    """Names that programs have imported since before formats existed."""
    signatures = {
        "clean_response": "version, text",
        "encode_chat": "tokenizer, messages, tools, open_answer, end, budget",
        "encode_conversation": "tokenizer, query, history, role",
        "encode_message": "tokenizer, role, metadata, content",
        "fit_conversation": "tokenizer, query, history, budget, role",
        "has_tools": "history",
        "normalize_messages": "messages, tools",
        "pairs_from_messages": "messages",
        "parse_response": "version, text, with_tools",
        "prompt_text": "version, query, history",
        "render_chat": "version, messages, tools, open_answer, end",
        "stable_response": "version, text",
        "stop_token_ids": "tokenizer",
        "tool_call_message": "name, parameters",
        "validate_history": "version, history",
    }
    for name, parameters in signatures.items():
        assert name in conversation.__all__
        assert ", ".join(inspect.signature(getattr(conversation, name)).parameters) == parameters
    assert {"CHAT_TEMPLATES", "ROLES", "TOOLS_SYSTEM_PROMPT", "Response"} <= set(conversation.__all__)


def test_formats_keep_nothing() -> None:
    for version in VERSIONS:
        assert not vars(chat_format(version)) and isinstance(chat_format(version), ChatFormat)
