"""Switching adapters between chats, and the names that adapters may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_chat
from chatglm import adapters
from chatglm.generation import weights_stamp
from tiny_adapters import error_of, every_version, logits, lora_config, tiny, trained


@every_version
@pytest.mark.parametrize("bits", [0, 4])
def test_chat_after_switching_is_a_fresh_chat(version: int, bits: int) -> None:
    paths = trained(version)
    # Not in half precision: with quantised weights, LoRA uses other kernels than a prefix, which round differently.
    dtype = torch.float32 if bits else torch.bfloat16
    tokenizer = tiny_chat.pair(version)[1]
    model = tiny(version, dtype, bits)
    for path in paths.values():
        adapters.load_adapter(model, path)
    history: list[Any] = []
    for name in ("table", "lora", None, "everywhere", "everywhere", "projected"):
        fresh = tiny(version, dtype, bits).requires_grad_(False)
        if name is not None:
            adapters.load_adapter(fresh, paths[name])
        asked: dict[str, Any] = {"history": history, "max_new_tokens": 5, "do_sample": False}
        expected = fresh.chat(tokenizer, "你好", **asked)
        with model.adapter(name):
            answer, history = model.chat(tokenizer, "你好", **asked)
        assert (answer, history) == expected


@every_version
def test_the_cache_between_turns_knows_the_adapter(version: int) -> None:
    paths = trained(version)
    model, tokenizer = tiny(version), tiny_chat.pair(version)[1]
    for name in ("lora", "table"):
        adapters.load_adapter(model, paths[name])

    def reused() -> int:
        steps = model.stream_steps(tokenizer, "你好", max_new_tokens=2, do_sample=False)
        return list(steps)[-1].cached_tokens

    for name in ("table", "lora", None):
        with model.adapter(name):
            assert reused() == 0
            assert reused() > 0
    with model.adapter("lora"):
        reused()
        model.disable_adapters()  # behind our back, by transformers' own method
        assert model.current_adapter is None and reused() == 0


@every_version
def test_a_reloaded_adapter_is_another_one(version: int) -> None:
    paths = trained(version)
    model = tiny(version)
    stamps = []
    for name in ("table", "lora"):
        for _ in range(2):
            adapters.load_adapter(model, paths[name])
            stamps.append(weights_stamp(model))
            assert weights_stamp(model) == stamps[-1]
            adapters.remove_adapter(model, name)
    assert all(one != other for i, one in enumerate(stamps) for other in stamps[:i])


@every_version
def test_names(version: int, tmp_path: Path) -> None:
    paths = trained(version)
    model = tiny(version)
    for name in ("", "a.b", "a b", "lora_A", "x/y"):
        text = error_of(lambda name=name: adapters.load_adapter(model, paths["lora"], name), ValueError)
        assert "cannot be called" in text
    odd = tmp_path / "rank 3, v1.0"
    odd.symlink_to(paths["lora"])
    assert adapters.load_adapter(model, paths["lora"]) == "lora"
    assert adapters.load_adapter(model, odd) == "lora-2"
    assert adapters.load_adapter(model, paths["table"], "广告") == "广告"
    for name in ("weight", "base_layer", "query_key_value", "lora-2-2", "layers", "0"):
        adapters.load_adapter(model, paths["lora"], name)
        with model.adapter("lora"):
            expected = logits(model)
        assert torch.equal(logits(model), expected)
    for action in (
        lambda: adapters.load_adapter(model, paths["table"], "lora"),
        lambda: adapters.add_prefix(model, 4, name="广告"),
        lambda: adapters.add_lora(model, lora_config(), "广告"),
    ):
        assert "already" in error_of(action, ValueError)
