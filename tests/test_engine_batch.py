"""Conversations that begin with the same tokens hold them once, and get the answers that they would get alone."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModel

import chatglm
from chatglm import ChatGLM4Config, ChatGLM4ForConditionalGeneration, kernels
from chatglm.adapters import add_prefix, use_adapter
from chatglm.cache.int8 import SCALE_BYTES
from chatglm.engine import Request, Scheduler
from chatglm.engine.batch import LEAST_SHARED
from chatglm.generation import GenerationOptions, generate_text
from chatglm.kernels import cpu
from chatglm.quantization import quantize
from tiny_chat import pair

VERSIONS = (1, 2, 3, 4)
CONTEXT = 2048
SYSTEM = 1000
FIRST_ID, IDS = 100, 300  # ids of words


@cache
def model_of(version: int) -> Any:
    """A tiny model with a context of 2,048 tokens; do not change it."""
    torch.manual_seed(version)
    if version == 4:
        sizes: dict[str, Any] = {
            "padded_vocab_size": 512, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "seq_length": CONTEXT,
            "num_attention_heads": 4, "kv_channels": 8, "multi_query_group_num": 2, "rope_ratio": 500,
            "eos_token_id": [509, 510], "pad_token_id": 508, "initializer_range": 0.3,
        }  # fmt: skip
        return ChatGLM4ForConditionalGeneration(ChatGLM4Config(**sizes)).float().eval()
    values = pair(version)[0].config.to_dict()
    length = "max_sequence_length" if version == 1 else "seq_length"
    config = chatglm.ChatGLMConfig.from_dict(values | {length: CONTEXT})
    return AutoModel.from_config(config).float().eval()


def words(count: int, seed: object) -> list[int]:
    rng = random.Random(str(seed))
    return [rng.randrange(FIRST_ID, FIRST_ID + IDS) for _ in range(count)]


def prompt(version: int, *parts: list[int]) -> list[int]:
    ids = [one for part in parts for one in part]
    if version == 1:  # up to <sop>, tokens see those after them: only what comes behind it can be shared
        config = model_of(1).config
        ids[5:7] = [config.gmask_token_id, config.bos_token_id]
    return ids


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def options(tokens: int) -> GenerationOptions:
    return GenerationOptions(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)


def alone(model: Any, ids: list[int], tokens: int) -> list[Any]:
    return [one.token_id for one in generate_text(model, ids, options(tokens), decode, CONTEXT)]


class Server:
    """A scheduler that the tests step, and its requests."""

    def __init__(self, model: Any, **sizes: Any) -> None:
        self.model = model
        self.scheduler = Scheduler(model, decode, **{"clock": lambda: 0.0} | sizes)
        self.batch = self.scheduler._batch
        config = model.config
        width = config.head_dim * model.dtype.itemsize
        if model.kv_cache_dtype == "int8":
            width = config.head_dim + SCALE_BYTES
        self.bytes_per_token = 2 * config.num_layers * config.num_key_value_heads * width

    def ask(self, ids: list[int], tokens: int, **settings: Any) -> Request:
        request = self.scheduler.make_request(ids, options(tokens), **settings)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        self.scheduler.step()
        batch = self.batch
        held = batch.cache.rows * batch.cache.capacity + batch.cache.shared_by(range(batch.cache.rows))
        assert held <= self.scheduler.cache_tokens
        tokens, size = self.scheduler.cached
        assert size == held * self.bytes_per_token and tokens <= held

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()


def said(request: Request) -> list[Any]:
    return [step.token_id for step in request.stream]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_long_system_prompt_of_16_conversations_is_held_once(version: int) -> None:
    server = Server(model_of(version))
    system = words(SYSTEM, "system")
    prompts = [prompt(version, system, words(20 + number % 5, number)) for number in range(16)]
    requests = [server.ask(ids, 30) for ids in prompts]
    most = 0
    while server.scheduler.has_work:
        server.step()
        most = max(most, server.scheduler.cached[1])
    added = sum(len(one.ids) - SYSTEM for one in requests)
    assert most <= server.bytes_per_token * (1.3 * SYSTEM + added)
    assert [one.cached_tokens for one in requests] == [0] + [SYSTEM] * 15
    assert [said(one) for one in requests] == [
        alone(server.model, ids, 30) for ids in prompts
    ]
    # Every conversation goes on in its own row, and a new one begins with the same tokens.
    later = [server.ask([*one.ids, *words(9, "later")], 5) for one in requests[::5]]
    other = server.ask(prompt(version, system, words(30, "other")), 5)
    wanted = [alone(server.model, [*one.ids], 5) for one in (*later, other)]
    server.run()
    assert [said(one) for one in (*later, other)] == wanted
    assert [one.cached_tokens for one in later] == [len(one.ids) - 1 for one in requests[::5]]
    assert other.cached_tokens >= SYSTEM


@pytest.mark.parametrize("version", VERSIONS)
def test_several_answers_to_one_prompt_hold_it_once(version: int) -> None:
    server = Server(model_of(version), max_batch=4)
    ids = prompt(version, words(400, "prompt"))
    requests = [server.ask(ids, 10) for _ in range(4)]
    server.run()
    assert [said(one) for one in requests] == [alone(server.model, ids, 10)] * 4
    assert server.scheduler.cached[1] <= server.bytes_per_token * (1.3 * len(ids) + 4 * 10)


@pytest.mark.parametrize("version", (2, 3, 4))
def test_what_is_shared_becomes_shorter_and_longer(version: int) -> None:
    """The third conversation has a little less in common with the first two than they with each other; others share
    more of their text."""
    server = Server(model_of(version), max_batch=8)
    system, more, text = words(300, "system"), words(20, "more"), words(500, "text")
    prompts = [
        prompt(version, system, more, words(5, 1)),
        prompt(version, system, more, words(6, 2)),
        prompt(version, system, words(7, 3)),
        prompt(version, system, text, words(8, 4)),
        prompt(version, system, text, words(9, 5)),
        prompt(version, system, text, words(10, 6)),
        prompt(version, words(100, "nothing in common")),
    ]
    shared = []
    requests = []
    for ids in prompts:
        requests.append(server.ask(ids, 40))
        while not requests[-1].answer_tokens:
            server.step()
        shared.append([server.batch.cache.shared(index) for index in range(server.batch.busy)])
    assert shared[1] == [320] * 2 and shared[2] == [300] * 3
    assert sorted(shared[5]) == [300] * 3 + [800] * 3 and sorted(shared[6]) == [0] + [300] * 3 + [800] * 3
    server.run()
    assert [said(one) for one in requests] == [alone(server.model, ids, 40) for ids in prompts]


def test_a_little_in_common_is_copied() -> None:
    server = Server(model_of(3))
    ids = [words(LEAST_SHARED - 1, "short") + words(30, number) for number in range(3)]
    requests = [server.ask(one, 10) for one in ids]
    server.run()
    assert server.batch.cache.shared_by(range(3)) == 0 and requests[2].cached_tokens == LEAST_SHARED - 1
    assert [said(one) for one in requests] == [alone(server.model, one, 10) for one in ids]


def test_each_adapter_has_a_beginning_of_its_own() -> None:
    model = copy.deepcopy(model_of(3))
    add_prefix(model, 4, name="prefix")
    with torch.no_grad():
        model.transformer.prefix_encoder.embedding.weight.normal_(std=5.0)
    use_adapter(model, None)
    server = Server(model, max_batch=8)
    asked = [(words(200, "system") + words(12, number), [None, "prefix"][number % 2]) for number in range(8)]
    requests = [server.ask(ids, 12, adapter=adapter) for ids, adapter in asked]
    server.run()
    for request, (ids, adapter) in zip(requests, asked, strict=True):
        with model.adapter(adapter):
            assert said(request) == alone(model, ids, 12)
    assert server.batch.cache.shared_by(range(8)) == 400 and len(set(server.batch.cache.beginnings)) == 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("prefix", [None, 5])
def test_kernels_that_run_all_blocks_in_one_call_know_beginnings(
    bits: int, prefix: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels.backend_for(torch.device("cpu")) is None:
        pytest.skip("no CPU kernels here")
    seen: list[list[int]] = []
    run = cpu.CPUBackend.run_blocks

    def noting(self: cpu.CPUBackend, tokens: cpu.Tokens, blocks: Any) -> None:
        seen.append(sorted(tokens.prefix[: tokens.rows]))
        run(self, tokens, blocks)

    monkeypatch.setattr(cpu.CPUBackend, "run_blocks", noting)
    model = quantize(copy.deepcopy(model_of(3)), bits)
    if prefix is not None:
        add_prefix(model, prefix, name="prefix")
    server = Server(model, max_batch=6)
    # Three begin in one way, two in another, one like none of them: all take their steps together.
    common = [words(300, "system")] * 3 + [words(200, "other")] * 2 + [words(90, "alone")]
    prompts = [[*first, *words(12 + number, number)] for number, first in enumerate(common)]
    requests = [server.ask(ids, 15) for ids in prompts]
    server.run()
    assert [(prefix or 0) + tokens for tokens in (0, 200, 200, 300, 300, 300)] in seen
    assert [said(one) for one in requests] == [alone(model, ids, 15) for ids in prompts]
    assert server.batch.cache.shared_by(range(6)) == 500


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sizes", [{"cache_tokens": 900}, {"max_batch": 6, "cache_tokens": 2500}, {"max_batch": 12}])
def test_whatever_comes_and_goes_answers_are_those_given_alone(version: int, sizes: dict[str, int]) -> None:
    rng = random.Random(version)
    server = Server(model_of(version), prefill_tokens=100, **{"max_batch": 8} | sizes)
    begun: list[Request] = []
    wanted, shared = [], 0
    for number in range(24):
        kind = rng.randrange(5)
        parts = [words(150, rng.randrange(2)), words(120, rng.randrange(3)), words(rng.randrange(3, 60), number)]
        ids = prompt(version, *parts)
        if kind == 0 and begun:
            ids = [*rng.choice(begun).ids, *words(5, number)][:700]
        elif kind == 1 and begun:
            ids = rng.choice(begun).ids[: rng.randrange(20, 300)] + words(4, number)
        elif kind == 2 and begun:
            rng.choice(begun).stream.cancel()
        tokens = rng.randrange(1, 25)
        begun.append(server.ask(ids, tokens))
        wanted.append(alone(server.model, ids, tokens))
        for _ in range(rng.randrange(4)):
            server.step()
            shared = max(shared, server.batch.cache.shared_by(range(server.batch.busy)))
    server.run()
    assert shared or server.scheduler.cache_tokens < 1000
    for request, expected in zip(begun, wanted, strict=True):
        found = [one for one in said(request) if one is not None]
        assert found == expected or (request.is_cancelled and found == expected[: len(found)])
    assert sum(one.is_cancelled for one in begun) < 15
