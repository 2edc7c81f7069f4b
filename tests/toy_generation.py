"""A made-up generation, added as docs/adding_a_generation.md describes; as a program, cli_demo.py with it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import cli_demo
from chatglm import ChatGLM2Config, ChatGLM2Tokenizer, ChatGLM3ForConditionalGeneration, register_generation
from chatglm.conversation import ROLES, RoleFormat
from chatglm.conversation.segments import tokens
from chatglm.loading import DEMO

GENERATION = 9


class ToyConfig(ChatGLM2Config):
    """The network of ChatGLM2."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.chatglm_version = GENERATION
        super().__post_init__(**kwargs)


class ToyModel(ChatGLM3ForConditionalGeneration):
    config: ToyConfig
    config_class = ToyConfig


class ToyTokenizer(ChatGLM2Tokenizer):
    own_tokens = {GENERATION: ("<|toy|>", *(f"<|{role}|>" for role in ROLES), "<|end|>")}


class ToyFormat(RoleFormat):
    """Messages with roles after `<|toy|>`; tools are listed by name, a call is the name and JSON."""

    generation = GENERATION
    name = "Toy"
    model_name = "Toy-9M"
    start = tokens("<|toy|>")
    stop_tokens = ("<|end|>", "<|observation|>")
    knows_tools = True
    tools_system_prompt = "You have tools."
    template = (
        "<|toy|>{% for message in messages %}{{ '<|' ~ message.role ~ '|>\\n ' ~ message.content }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else '' }}"
    )

    def message_content(self, message: Mapping[str, Any]) -> str:
        return message["content"] + "".join(f"\n- {tool['name']}" for tool in message.get("tools") or [])

    def call_openings(self, name: str) -> tuple[str, ...]:
        return ("{",)

    def call_start(self, tokenizer: Any, name: str) -> list[int]:
        return tokenizer.encode_text(f"{name}\n") + tokenizer.encode_text("{")

    def read_call(self, name: str, content: str) -> dict[str, Any]:
        try:
            return {"name": name, "parameters": json.loads(content)}
        except ValueError as error:
            return {"name": name, "parameters": None, "content": content, "error": str(error)}


def register() -> None:
    register_generation(ToyFormat(), ToyConfig, ToyModel, ToyTokenizer)


def save(folder: Path) -> None:
    """Writes a checkpoint: the vocabulary of the bundled demo, random weights."""
    shutil.copy(DEMO / "tokenizer.model", folder)
    values = {"tokenizer_class": "ChatGLMTokenizer", "chatglm_version": GENERATION}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    size = len(ToyTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    ToyModel(
        ToyConfig(
            padded_vocab_size=size, hidden_size=32, num_layers=2, num_attention_heads=4, kv_channels=8,
            ffn_hidden_size=48, seq_length=1024, initializer_range=0.3,
        )
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    register()
    sys.exit(cli_demo.main())
