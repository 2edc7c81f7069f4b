"""What a release of transformers can break without an error: `generate` must equal recomputation on every release.

Part of the quick set that .ci/run runs on the oldest and the newest allowed transformers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import chatglm
from chatglm.conversation import fit_conversation
from chatglm.network import compat
from conftest import enable_checkpointing
from tiny_chat import FOLDERS

VERSIONS = (1, 2, 3)
NEW_TOKENS = 24
UNENDING = {"eos_token_id": None, "pad_token_id": 0}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 8, "temperature": 1.3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.fixture(autouse=True)
def no_library_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No line of ours makes transformers warn: deprecated names are what the next release takes away."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    logging.getLogger("transformers").propagate = False
    yield
    logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in told if "deprecated" in text or "past_key_values" in text], told


@cache
def pair(version: int) -> tuple[Any, Any]:
    """(model, tokenizer) of the bundled demo, float32: trained weights, so that a lost cache shows in the text."""
    config = chatglm.ChatGLMConfig.from_pretrained(FOLDERS[version], chatglm_version=version)
    model = AutoModel.from_pretrained(FOLDERS[version], config=config, dtype=torch.float32).eval()
    assert model.config.chatglm_version == version
    return model, chatglm.ChatGLMTokenizer.from_pretrained(FOLDERS[version], chatglm_version=version)


def prompts(version: int) -> list[torch.Tensor]:
    tokenizer = pair(version)[1]
    questions = ("你能做什么？", "Who are you?")
    return [torch.tensor([fit_conversation(tokenizer, question, [], 200)[0]]) for question in questions]


@torch.no_grad()
def recomputed(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy, each token from a forward over all that came before."""
    for _ in range(tokens):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=-1)
    return ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", VERSIONS)
def test_generate_equals_recomputation(version: int, mode: str) -> None:
    model = pair(version)[0]
    for ids in prompts(version):
        found = []
        for use_cache in (True, False):
            if mode == "prompt lookup" and not use_cache:  # transformers refuses it without a cache
                found.append(recomputed(model, ids, NEW_TOKENS))
                continue
            torch.manual_seed(7)
            found.append(model.generate(ids, max_new_tokens=NEW_TOKENS, use_cache=use_cache, **UNENDING, **MODES[mode]))
        assert found[0].tolist() == found[1].tolist()
        assert found[0].shape[1] == ids.shape[1] + NEW_TOKENS
        if mode == "greedy":
            assert found[0].tolist() == recomputed(model, ids, NEW_TOKENS).tolist()
        assert len(set(found[0][0, ids.shape[1] :].tolist())) > 8, "a text that repeats one token shows nothing"


@pytest.mark.parametrize("version", VERSIONS)
def test_generate_in_training_mode_with_checkpointing(version: int) -> None:
    """Layers that transformers checkpoints lose a cache that is among their keywords, and the text with it."""
    model = AutoModel.from_config(pair(version)[0].config).float()
    model.load_state_dict(pair(version)[0].state_dict())
    enable_checkpointing(model, {"use_reentrant": False})
    model.train()
    ids = prompts(version)[0]
    options = {"max_new_tokens": 8, "do_sample": False, **UNENDING}
    assert model.generate(ids, **options).tolist() == recomputed(model, ids, 8).tolist()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(input_ids=ids, past_key_values=DynamicCache())


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_the_cache_is_taken_and_filled_under_both_names(version: int, name: str) -> None:
    model = pair(version)[0]
    ids = prompts(version)[0]
    half = ids.shape[1] - 1
    whole = model(input_ids=ids).logits[:, -1]
    for network in (model, model.transformer):
        cache = DynamicCache()
        network(input_ids=ids[:, :half] if version != 1 else ids, **{name: cache})
        assert cache.get_seq_length() == (half if version != 1 else ids.shape[1])
    if version != 1:  # its context sees all of itself, so it cannot be cut
        cache = DynamicCache()
        model(input_ids=ids[:, :half], **{name: cache})
        step = model(input_ids=ids[:, half:], position_ids=model.positions_from(ids, half), **{name: cache})
        torch.testing.assert_close(step.logits[:, -1], whole)
        assert step[compat.CACHE_NAME] is cache


@pytest.mark.parametrize("version", VERSIONS)
def test_ordinary_use_says_nothing(version: int, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """No warning, no line of a log: what a library deprecates today is gone tomorrow. (Warnings are errors here.)"""
    model, tokenizer = pair(version)
    inputs = tokenizer(["hello"], return_tensors="pt")
    batch = tokenizer(["hello", "你好，世界"], padding=True, return_tensors="pt")
    chat = [{"role": "user", "content": "hello"}]
    actions: dict[str, Callable[[], Any]] = {
        "load": lambda: chatglm.load(FOLDERS[version]),
        "AutoModel": lambda: AutoModel.from_pretrained(FOLDERS[version], dtype=torch.float32),
        "chat": lambda: model.chat(tokenizer, "hello", [], max_new_tokens=4),
        "stream_chat": lambda: list(model.stream_chat(tokenizer, "hello", [], max_new_tokens=4)),
        "stream_generate": lambda: list(model.stream_generate(**inputs, max_new_tokens=4)),
        "forward": lambda: model(**inputs),
        "loss": lambda: model(**batch, labels=batch["input_ids"]).loss.backward(),
        "generate": lambda: model.generate(**inputs, max_new_tokens=4),
        "generate for a batch": lambda: model.generate(**batch, max_new_tokens=4, do_sample=True, top_p=0.9),
        "apply_chat_template": lambda: tokenizer.apply_chat_template(chat, add_generation_prompt=True),
        "decode": lambda: tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
        "save": lambda: (model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)),
        "load again": lambda: chatglm.load(tmp_path),
    }
    said = {}
    for name, action in actions.items():
        caplog.clear()
        action()
        said[name] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    model.zero_grad()
    assert not any(said.values()), said


@pytest.mark.parametrize("version", VERSIONS)
def test_two_caches_are_an_error(version: int) -> None:
    model = pair(version)[0]
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=prompts(version)[0], cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_keyword_is_a_type_error(version: int) -> None:
    model = pair(version)[0]
    ids = prompts(version)[0]
    classes = [model, model.transformer]
    if version != 1:
        classes.append(AutoModelForSequenceClassification.from_config(model.config).eval())
    for network in classes:
        for keyword, value in {"cache_positionz": 1, "kv_cache": DynamicCache(), "attention_masks": None}.items():
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
                network(input_ids=ids, **{keyword: value})
        network(input_ids=ids, output_attentions=False, output_hidden_states=False, return_dict=True)


def test_every_forward_names_both_caches() -> None:
    for version in VERSIONS:
        model = pair(version)[0]
        for network in (model, model.transformer):
            assert set(compat.CACHE_NAMES) <= set(inspect.signature(network.forward).parameters)
        assert set(compat.CACHE_NAMES) <= set(model._skip_keys_device_placement)
        assert set(compat.CACHE_NAMES) <= set(model.config.keys_to_ignore_at_inference)
    assert compat.CACHE_NAME in BaseModelOutputWithPast.__dataclass_fields__


@pytest.mark.parametrize("version", VERSIONS)
def test_chat_equals_generate(version: int) -> None:
    """`chat` has a loop of its own, `num_beams` sends it through transformers' `generate`: greedy, both agree."""
    model, tokenizer = pair(version)
    options = {"max_new_tokens": 16, "do_sample": False}
    own = model.chat(tokenizer, "你好", [], **options)
    through = model.chat(tokenizer, "你好", [], no_repeat_ngram_size=0, diversity_penalty=0.0, **options)
    assert own == through


@pytest.mark.parametrize("version", VERSIONS)
def test_no_call_drops_a_keyword(version: int) -> None:
    model, tokenizer = pair(version)
    ids = prompts(version)[0]
    calls: dict[str, Any] = {
        "chat": lambda **given: model.chat(tokenizer, "你好", **given),
        "stream_chat": lambda **given: list(model.stream_chat(tokenizer, "你好", **given)),
        "stream_steps": lambda **given: list(model.stream_steps(tokenizer, "你好", **given)),
        "stream_generate": lambda **given: list(model.stream_generate(ids, **given)),
        "generate": lambda **given: model.generate(ids, max_new_tokens=1, **given),
        "load": lambda **given: chatglm.load(FOLDERS[version], **given),
        "AutoModel": lambda **given: AutoModel.from_pretrained(FOLDERS[version], **given),
        "AutoTokenizer": lambda **given: AutoTokenizer.from_pretrained(FOLDERS[version], **given),
        "tokenizer": lambda **given: tokenizer("你好", **given),
        "encode": lambda **given: tokenizer.encode("你好", **given),
        "tokenize": lambda **given: tokenizer.tokenize("你好", **given),
        "decode": lambda **given: tokenizer.decode([40], **given),
        "batch_decode": lambda **given: tokenizer.batch_decode([[40]], **given),
        "pad": lambda **given: tokenizer.pad({"input_ids": [[40]]}, **given),
        "apply_chat_template": lambda **given: tokenizer.apply_chat_template(
            [{"role": "user", "content": "你好"}], **given
        ),
        "build_chat_input": lambda **given: tokenizer.build_chat_input("你好", **given),
        "quantize": lambda **given: model.quantize(4, **given),
    }
    swallowed = []
    for name, call in calls.items():
        try:
            call(cache_positionz=1)
        except (TypeError, ValueError) as error:
            assert "cache_positionz" in str(error), f"{name}: {error}"
        else:
            swallowed.append(name)
    assert not swallowed


@pytest.mark.parametrize("version", VERSIONS)
def test_positions_of_stream_generate_are_its_own(version: int) -> None:
    model, tokenizer = pair(version)
    batch = tokenizer(["你好", "Who are you?"], padding=True, return_tensors="pt")
    own = [rows.tolist() for rows in model.stream_generate(**batch, max_new_tokens=3, do_sample=False)]
    assert len(own) == 3
    with pytest.raises(ValueError, match="position_ids are computed from"):
        next(model.stream_generate(**batch | {"position_ids": batch["position_ids"] + 1}, max_new_tokens=3))


def test_a_cache_and_beams_are_an_error() -> None:
    model, tokenizer = pair(3)
    _, _, cache = list(model.stream_chat(tokenizer, "你好", max_new_tokens=2, return_past_key_values=True))[-1]
    with pytest.raises(ValueError, match="not with num_beams"):
        model.chat(tokenizer, "你好", num_beams=2, past_key_values=cache)
