"""Tiny GLM-4 folders: a byte-level vocabulary with some merges, and random weights."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from chatglm import ChatGLM4Config, ChatGLM4ForConditionalGeneration
from chatglm.tokenizers.byte_level import BYTE_NAMES

#: Texts whose words and characters become tokens.
WORDS = "你好 世界 天气 北京 hello world the get weather city 是 的 了 {\" \": \"}"


def make_vocabulary(folder: Path, **config: Any) -> None:
    """Writes tokenizer.model and tokenizer_config.json. Every prefix of a word is a token, so that merges reach it."""
    tokens = [bytes([byte]) for byte in sorted(BYTE_NAMES)]
    for word in WORDS.split(" "):
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1)]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(dict.fromkeys(tokens)))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    values = {"tokenizer_class": "ChatGLM4Tokenizer", "padding_side": "left", "do_lower_case": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")


def make_glm4(folder: Path, **changes: Any) -> Path:
    """A folder of the published layout, shrunk: its config.json has no `chatglm_version`."""
    folder.mkdir(parents=True)
    make_vocabulary(folder)
    size = len((folder / "tokenizer.model").read_bytes().splitlines())
    stops = [size, size + 7, size + 9]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "padded_vocab_size": size + 20, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96,
        "num_attention_heads": 4, "kv_channels": 16, "multi_query_group_num": 2, "seq_length": 2048,
        "eos_token_id": stops, "pad_token_id": size, "rope_ratio": 500,
    }  # fmt: skip
    ChatGLM4ForConditionalGeneration(ChatGLM4Config(**sizes | changes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["chatglm_version"]
    config["_name_or_path"] = "THUDM/glm-4-9b-chat"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
