"""Tiny models with random weights and the tokenizers of the bundled demo, one pair for each generation."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModel

import chatglm
from chatglm.demo import with_vocabulary_of

TOOLS_SYSTEM = {
    "role": "system",
    "content": "Answer with tools:",
    "tools": [{"name": "get_weather", "description": "weather", "parameters": {"type": "object", "properties": {}}}],
}
FOLDERS = {version: with_vocabulary_of(version) for version in (1, 2, 3)}
CONTEXT = 256


@cache
def pair(version: int) -> tuple[Any, Any]:
    """(model, tokenizer); do not change the model, copy it."""
    tokenizer = chatglm.ChatGLMTokenizer.from_pretrained(FOLDERS[version], chatglm_version=version)
    values = chatglm.ChatGLMConfig.from_pretrained(FOLDERS[version]).to_dict()
    small: dict[str, Any] = {"chatglm_version": version, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    if version == 1:
        small |= {"inner_hidden_size": 64, "max_sequence_length": CONTEXT}
    else:
        small |= {"kv_channels": 8, "ffn_hidden_size": 48, "multi_query_group_num": 2, "seq_length": CONTEXT}
    config = chatglm.ChatGLMConfig.from_dict(values | small)
    config.initializer_range = 0.3  # spread logits: greedy choices that rounding cannot turn
    torch.manual_seed(version)
    return AutoModel.from_config(config).float().eval(), tokenizer
