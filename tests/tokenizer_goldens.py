"""Tokenizers for tests, and how their results are compared with `goldens/tokenizer/*.json`."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from chatglm.tokenization_chatglm import ChatGLMTokenizer
from conftest import SHARED
from deviations import DEVIATIONS

FOLDERS = {"v1": "chatglm-6b", "v1_0": "chatglm-6b-v1.0", "v2": "chatglm2-6b", "v3": "chatglm3-6b"}


def folder(name: str) -> Path:
    return SHARED / "checkpoints" / FOLDERS[name]


@lru_cache
def tokenizer(name: str) -> Any:
    """One of the real tokenizers; shared by tests, so not to be changed."""
    return ChatGLMTokenizer.from_pretrained(folder(name))


@lru_cache
def golden(name: str) -> Any:
    return json.loads((SHARED / "goldens" / "tokenizer" / f"{name}.json").read_text(encoding="utf-8"))


def deviation(name: str) -> bool:
    """Returns True for a name in the list of deliberate differences."""
    assert name in DEVIATIONS, f"{name} is not in tests/deviations.py"
    return True


def described(encoding: Any) -> dict[str, Any]:
    """The result of calling a tokenizer, in the form of the goldens."""
    result: dict[str, Any] = {}
    for key, value in encoding.items():
        result[f"{key}_dtype"] = str(getattr(value, "dtype", "list"))
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            value = np.stack(value)
        if key == "attention_mask" and isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 2:
            result["attention_mask_shape"] = list(value.shape)
            rows = np.asarray(value).astype(int).reshape(-1, *value.shape[-2:]).tolist()
            result["attention_mask_rows_1_is_masked"] = [["".join(map(str, row)) for row in mask] for mask in rows]
        else:
            result[key] = value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value
    return result


#: Parts of `goldens/tokenizer/v*.json` that no test compares: how transformers 4.30 worked inside.
INTERNALS = {"class", "unique_no_split_tokens", "added_tokens_encoder"}


def value_of(entry: Any) -> Any:
    """The value of a golden entry; for one that raised, its error as a tuple."""
    if not isinstance(entry, dict):
        return entry
    return entry["ok"] if "ok" in entry else ("error", entry["error"])


LINES = [
    "你好，世界！今天天气不错，我们去公园散步吧。",
    "The quick brown fox jumps over the lazy dog.",
    "问：1+1=? 答：等于2。[Round 1] <|user|> [gMASK] sop eop",
    "def add(a, b): return a + b  # 加法",
]


def make_vocabulary(target: Path, version: int) -> Path:
    """A folder with a tiny vocabulary of its own, laid out as in the real one, and a tokenizer_config.json."""
    target.mkdir(parents=True)
    (target / "lines.txt").write_text("\n".join(LINES * 20), encoding="utf-8")
    layout = {"pad_id": 3, "pad_piece": "<pad>", "user_defined_symbols": ["<n>"]} if version == 1 else {"pad_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(target / "lines.txt"),
        model_prefix=str(target / "model"),
        model_type="unigram" if version == 1 else "bpe",
        vocab_size=140 if version == 1 else 400,
        byte_fallback=version != 1,
        normalization_rule_name="nmt_nfkc" if version == 1 else "identity",
        remove_extra_whitespaces=version == 1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        hard_vocab_limit=False,
        **layout,
    )
    (target / "model.model").rename(target / ("ice_text.model" if version == 1 else "tokenizer.model"))
    config: dict[str, Any] = {"tokenizer_class": "ChatGLMTokenizer", "chatglm_version": version}
    config |= {"num_image_tokens": 0} if version == 1 else {}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target
