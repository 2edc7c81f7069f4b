"""What other engines import: configs, tokenizers that render as text, tool calls. Stand-ins play the engines."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from chatglm import ChatGLMConfig, ChatGLMTokenizer
from chatglm.demo import FOLDERS
from chatglm.plugins.configs import ServedConfig
from chatglm.plugins.rendering import RendersAsText, render_as_text
from tiny_folders import error_of, make_folder
from tiny_glm4 import make_glm4

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "<|user|>\n philosophy [gMASK]sop<sop> a  b\n"},
    {"role": "assistant", "content": "<|assistant|> 你好\n"},
    {"role": "user", "content": " eope [gMASK]<sop>你好<|observation|>"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<|user|>", "parameters": {}}}]


@pytest.fixture
def rendering() -> Iterator[None]:
    before = dict(ChatGLMTokenizer.classes)
    render_as_text()
    yield
    ChatGLMTokenizer.classes.update(before)


def folder_of(version: int, path: Path) -> Path:
    return make_glm4(path) if version == 4 else make_folder(path, version)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.usefixtures("rendering")
def test_a_chat_rendered_as_text_has_the_ids_of_a_chat(version: int, tmp_path: Path) -> None:
    folder = folder_of(version, tmp_path / "folder")
    if version == 4:  # as published: with code of its own
        values = json.loads((folder / "tokenizer_config.json").read_text())
        values["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, RendersAsText)
    for tools in (None, TOOLS if version > 2 else None):
        options: dict[str, Any] = {"add_generation_prompt": True, "tools": tools}
        wanted = tokenizer.apply_chat_template(MESSAGES, return_dict=False, **options)
        text = tokenizer.apply_chat_template(
            conversation=MESSAGES, tokenize=False, chat_template=tokenizer.get_chat_template(), **options
        )
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted


def read(folder: Path) -> Any:
    values = ChatGLMConfig.get_config_dict(folder)[0]
    return ServedConfig.from_dict(values, name_or_path=str(folder))


def test_configs_say_what_ends_an_answer(tmp_path: Path) -> None:
    config = read(make_folder(tmp_path / "three", 3))
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path / "three")
    assert config.eos_token_id == tokenizer.chat_format.stop_token_ids(tokenizer)
    assert config.chatglm_version == 3 and config.original_rope is True
    assert read(make_folder(tmp_path / "two", 2)).eos_token_id == [2]
    assert read(make_folder(tmp_path / "base", 3, is_base_model=True)).eos_token_id == [2]


@pytest.mark.parametrize(
    ("version", "changes", "reason"),
    [
        (1, {}, "ChatGLM-6B runs in no other engine"),
        (3, {"pre_seq_len": 4}, "P-tuning prefix"),
        (3, {"quantization_bit": 4}, "full-precision checkpoint"),
        (2, {"multi_query_attention": False}, "--to glm"),
        (2, {"kv_channels": 8}, "--to glm"),
    ],
)
def test_models_that_other_engines_cannot_run(
    version: int, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "folder", version, **changes)
    assert reason in error_of(lambda: read(folder), ValueError)


# ---- vLLM ------------------------------------------------------------------------------------------------------------


class Record:
    """Stands for one of vLLM's messages: it keeps what it is made of."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class BaseParser:
    """vLLM's ToolParser, as far as ours needs it."""

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        self.prev_tool_call_arr: list[Any] = []
        self.tools = tools or []

    def adjust_request(self, request: Any) -> Any:
        return request


class Lazy(dict[str, Any]):
    def register_lazy_module(self, name: str, module_path: str, class_name: str) -> None:
        self[name] = (module_path, class_name)

    def register_model(self, name: str, path: str) -> None:
        self[name] = path


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A vLLM with the few names that the plugin uses; what vLLM 0.32 does with them was tried in real servers."""
    messages = dict.fromkeys(("DeltaFunctionCall", "DeltaMessage", "DeltaToolCall"), Record)
    messages |= dict.fromkeys(("ExtractedToolCallInformation", "FunctionCall", "ToolCall"), Record)
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": Lazy()},
        "vllm.tool_parsers": {"ToolParserManager": Lazy(), "ToolParser": BaseParser},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.config": {"_CONFIG_REGISTRY": {}},
        **{name: {} for name in ("vllm.entrypoints", "vllm.entrypoints.generate", "vllm.entrypoints.generate.base")},
        "vllm.entrypoints.generate.base.protocol": messages,
    }
    modules = {}
    for name, values in contents.items():
        module = modules[name] = types.ModuleType(name)
        vars(module).update(values)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "chatglm.plugins.vllm_tools", raising=False)
    yield modules["vllm"]
    sys.modules.pop("chatglm.plugins.vllm_tools", None)


@pytest.mark.usefixtures("rendering")
def test_the_entry_point_registers_everything_and_may_be_called_twice(vllm: Any) -> None:
    from chatglm.plugins.vllm import register

    register()
    register()
    assert vllm.transformers_utils.config._CONFIG_REGISTRY["chatglm"] is ServedConfig
    assert set(vllm.ModelRegistry.values()) == {"chatglm.plugins.vllm_network:ChatGLMForCausalLM"}
    published = json.loads((FOLDERS[3] / "config.json").read_text())["architectures"]
    assert {"ChatGLMModel", *published} <= set(vllm.ModelRegistry)
    for path, name in vllm.tool_parsers.ToolParserManager.values():
        assert issubclass(getattr(importlib.import_module(path), name), BaseParser)


def test_the_doors_are_in_the_metadata() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for group, module in (("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")):
        assert f'[project.entry-points."{group}"]\nchatglm = "chatglm.plugins.{module}:register"\n' in text


@pytest.mark.usefixtures("rendering")
def test_sglang_gets_the_same_but_for_stretched_positions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    contents: dict[str, dict[str, Any]] = {
        **{f"sglang{part}": {} for part in ("", ".srt", ".srt.models", ".srt.utils")},
        "sglang.srt.models.chatglm": {"ChatGLMModel": Record},
        "sglang.srt.models.registry": {"ModelRegistry": Record(models={})},
        "sglang.srt.utils.hf_transformers": {"common": Record(_CONFIG_REGISTRY={})},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ServedConfig, "knows_stretched_positions", True)
    monkeypatch.setattr(AutoConfig, "register", lambda *args, **kwargs: None)  # for this process only ours

    importlib.import_module("chatglm.plugins.sglang").register()
    registry: Any = contents["sglang.srt.models.registry"]["ModelRegistry"]
    assert set(registry.models.values()) == {Record} and "ChatGLMForConditionalGeneration" in registry.models
    assert {"chatglm": ServedConfig} == contents["sglang.srt.utils.hf_transformers"]["common"]._CONFIG_REGISTRY
    folder = make_folder(tmp_path / "long", 2, rope_ratio=8)
    assert "stretch positions" in error_of(lambda: read(folder), ValueError)


def parser_of(generation: int, vllm: Any) -> Any:
    module = importlib.import_module("chatglm.plugins.vllm_tools")
    kind = {3: module.ChatGLM3ToolParser, 4: module.GLM4ToolParser}[generation]
    return kind(None, [Record(function=Record(name="weather")), Record(name="get_time")])


CALLS = {
    3: "weather\n ```python\ntool_call(city='北京', days=2)\n```",
    4: 'weather\n{"city": "北京", "days": 2}',
}


@pytest.mark.parametrize("generation", [3, 4])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_calls_whole_and_in_a_stream(generation: int, step: int, vllm: Any) -> None:
    text = f"\n 好的<|assistant|>{CALLS[generation]}"
    request = Record(tools=[1], tool_choice="auto", skip_special_tokens=True)
    assert parser_of(generation, vllm).adjust_request(request).skip_special_tokens is False
    whole = parser_of(generation, vllm).extract_tool_calls(text, request)
    (call,) = whole.tool_calls
    assert whole.tools_called and whole.content == "好的"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "北京", "days": 2})

    parser = parser_of(generation, vllm)
    messages = []
    tokens = [text[:4], "<|assistant|>", *CALLS[generation]]  # a control token comes in one piece
    for start in range(0, len(tokens), step):
        delta = "".join(tokens[start : start + step])
        messages.append(parser.extract_tool_calls_streaming("", "", delta, [], [], [], request))
    messages.append(parser.finish_streaming())
    seen = [message for message in messages if message is not None]
    assert "".join(message.content or "" for message in seen) == "好的"
    calls = [one for message in seen for one in message.tool_calls]
    assert [one.function.name for one in calls if one.function.name] == ["weather"]
    assert calls[0].id and {one.index for one in calls} == {0}
    assert "".join(one.function.arguments for one in calls) == call.function.arguments


@pytest.mark.parametrize(("choice", "name"), [("none", "weather"), ("auto", "other")])
def test_what_is_no_call_is_text(choice: str, name: str, vllm: Any) -> None:
    text = CALLS[3].replace("weather", name)
    found = parser_of(3, vllm).extract_tool_calls(text, Record(tools=[1], tool_choice=choice))
    assert not found.tools_called and found.tool_calls == []
    assert "tool_call(city='北京', days=2)" in found.content
