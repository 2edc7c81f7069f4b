"""The KV cache of scaled bytes: what it holds, that every way to it sees the same, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

import chatglm
from chatglm.cache import ChatCache, Int8Layer, RowCache
from chatglm.cache.int8 import SCALE_BYTES, decode, encode
from chatglm.engine.batch import affordable_tokens
from chatglm.serving.chat_engine import ChatEngine as Engine
from test_cpu_path_decode_blocks import (
    END,
    NETWORKS,
    START,
    calls,
    decode_rows,
    difference,
    modules_alone,
    network,
    through_modules,
)
from test_cpu_path_decode_blocks import decode as decode_tokens
from tiny_chat import pair

__all__ = ["calls"]  # the fixture: every test runs with each variant of the kernels

#: Sizes of heads at which the kernels take another way: whole registers, one and a bit, and the published size.
HEADS: list[tuple[int, dict[str, Any]]] = [
    (2, {"kv_channels": 64, "num_attention_heads": 8, "multi_query_group_num": 1}),
    (3, {"kv_channels": 80, "num_attention_heads": 6, "multi_query_group_num": 2}),
    (3, {"kv_channels": 128, "num_attention_heads": 32, "multi_query_group_num": 2}),
]


def attentive(model: Any) -> Any:
    """With larger attention: of a random network, the residual stream would be nearly all."""
    for name, parameter in model.named_parameters():
        if name.endswith(("query_key_value.weight_scale", "attention.dense.weight_scale")):
            parameter *= 4
    return model


def bytes_cache() -> ChatCache:
    return ChatCache(kv_cache_dtype="int8")


def test_rows_keep_numbers_to_half_a_step() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 3, 7, 32) * torch.logspace(-20, 20, 7).unsqueeze(-1)
    states[0, 0, 0] = 0
    rows = encode(states)
    assert (rows.shape, rows.dtype) == ((2, 3, 7, 32 + SCALE_BYTES), torch.int8)
    found = decode(rows, torch.float32)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert bool(((found - states).abs() <= step * 0.501).all())
    assert not found[0, 0, 0].any()
    assert torch.equal(decode(encode(found), torch.float32), found)
    for dtype in (torch.float16, torch.bfloat16):
        small = torch.randn(1, 2, 3, 8).to(dtype)
        assert torch.equal(decode(encode(small), dtype), decode(encode(small.float()), torch.float32).to(dtype))
    for bad in (float("nan"), float("inf")):
        states[1, 1, 3, 5] = bad
        found = decode(encode(states), torch.float32)
        assert bool(found[1, 1, 3].isnan().all()) and int(found.isnan().sum()) == 32


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="'fp8': use 'auto' or 'int8'"):
        ChatCache(kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="multiple of 4"):
        encode(torch.randn(1, 1, 1, 6))
    with pytest.raises(ValueError, match="on the CPU"):
        encode(torch.empty(1, 1, 1, 8, device="meta"))
    with pytest.raises(ValueError, match="no gradients"):
        Int8Layer().update(torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(1, 1, 2, 8))
    with pytest.raises(ValueError, match="kv_cache_dtype 'int4'"):
        chatglm.load(kv_cache_dtype="int4")
    model, _ = pair(3)
    with pytest.raises(ValueError, match="kv_cache_dtype True"):
        copy.copy(model).kv_cache_dtype = True


@pytest.mark.parametrize(("generation", "options"), [*NETWORKS[::2], *HEADS], ids=str)
def test_decoding_equals_the_modules(calls: list[int], generation: int, options: dict[str, Any]) -> None:
    model = attentive(network(generation, pre_seq_len=37 if (generation, options) in NETWORKS else None, **options))
    slow, fast = bytes_cache(), bytes_cache()
    wanted = through_modules(model, slow)
    assert not calls
    found = decode_tokens(model, fast)
    assert calls == [3] * (END - START)
    assert distance(found, wanted) < 1e-2  # the modules do not round queries, weights and prefix
    assert fast.get_seq_length() == END and fast.layers[0].keys.dtype == torch.int8
    ours, theirs = (decode(cache.layers[0].keys, torch.float32) for cache in (fast, slow))
    assert difference(ours, theirs) < 1.1 / 127, "a number may lie on the edge of a level"
    assert 1e-6 < distance(found, decode_tokens(model, ChatCache())) < 3e-2, "the error of the cache itself"


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 0.0), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(
    ("generation", "options", "error"),
    [
        (1, {"num_attention_heads": 3}, 2e-4),  # a query head to a key head
        (2, {"num_attention_heads": 4, "multi_query_group_num": 2}, 2e-4),
        (2, {"kv_channels": 64, "num_attention_heads": 32, "multi_query_group_num": 2}, None),  # all lanes in use
        (3, {"kv_channels": 20, "num_attention_heads": 40, "multi_query_group_num": 2}, None),  # more than lanes
    ],
    ids=str,
)
def test_long_contexts(
    calls: list[int], generation: int, options: dict[str, Any], error: float | None, dtype: torch.dtype, rounding: float
) -> None:
    """One token behind 700 others, in several spans: the same as what the rows stand for. Only the products for many
    heads with AVX-512 round more, about as much as the rows do."""
    model = attentive(network(generation, dtype=dtype, **options))
    config = model.config
    shape = (1, config.num_key_value_heads, 700, config.head_dim)
    fast, plain = bytes_cache(), ChatCache()
    for layer in range(3):
        keys = torch.randn(shape) * torch.linspace(0.3, 3, 700).unsqueeze(-1)
        values = torch.randn(shape)
        for cache in (fast, plain):
            cache.update(keys.to(dtype), values.to(dtype), layer)
    slow = copy.deepcopy(fast)
    ids = torch.arange(1000, 1701).unsqueeze(0)
    if generation == 1:
        ids[0, 20], ids[0, 21] = config.gmask_token_id, config.bos_token_id

    def last(cache: ChatCache) -> torch.Tensor:
        places = model.positions_from(ids, 700)
        with torch.no_grad():
            logits = model(input_ids=ids[:, 700:], position_ids=places, past_key_values=cache, use_cache=True).logits
        return logits[0, -1].float()

    with modules_alone(model):
        wanted, unrounded = last(slow), last(plain)
    assert not calls
    found = last(fast)
    assert calls == [3]
    assert distance(found, wanted) < max(error or 1.5 * distance(wanted, unrounded), 2 * rounding)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_rows_of_the_engine_equal_one_at_a_time(calls: list[int], generation: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("test_cpu_path_decode_blocks.RowCache", lambda: RowCache("int8"))
    model, lengths = network(generation), [40, 9, 12, 33, 21]
    found, cache = decode_rows(model, lengths, together=True)
    alone, _ = decode_rows(model, lengths, together=False)
    assert calls == [3] * 5 * (1 + len(lengths))
    assert distance(found, alone) < 2e-3
    with modules_alone(model):
        wanted, _ = decode_rows(model, lengths, together=True)
    assert distance(found, wanted) < 1e-2
    plain = RowCache()
    plain.resize(cache.rows, cache.capacity)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    for layer in range(3):
        plain.select_row(0, 0)
        plain.update(*(torch.zeros(1, heads, 1, size) for _ in range(2)), layer)
    assert cache.size * 4 * size == plain.size * (size + SCALE_BYTES)


@pytest.mark.parametrize("rows", [(0, 1), (1,)])
@pytest.mark.parametrize("length", [None, 5])
def test_rows_that_share_their_first_tokens(calls: list[int], length: int | None, rows: tuple[int, ...]) -> None:
    model = network(3, pre_seq_len=length)
    ids = (1000 + torch.arange(31) * 7 % 900).repeat(2, 1)
    ids[1, 20:] += 3

    def step(share: bool) -> torch.Tensor:
        cache = RowCache("int8")
        cache.resize(2, 40)
        with torch.no_grad():
            for row in range(2):
                cache.select_row(row, 0)
                model(input_ids=ids[row : row + 1, :30], past_key_values=cache, use_cache=True)
            if share:
                cache.share(dict.fromkeys(rows, 30), 20)
            cache.select_places([0, 1], [30, 30], torch.device("cpu"))
            places = model.positions_from(ids, 30)
            logits = model(input_ids=ids[:, 30:], position_ids=places, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].float()

    found = step(share=True)
    assert calls == [3]
    assert distance(found, step(share=False)) < 5e-3
    with modules_alone(model):
        assert distance(found, step(share=True)) < 5e-3


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_pieces_of_a_prompt_equal_the_whole(generation: int) -> None:
    """Every token sees the rounded keys and values, its own too: it does not matter how a prompt is cut."""
    model = network(generation, bits=16)
    ids = 1000 + torch.arange(90).unsqueeze(0) * 7 % 900
    if generation == 1:
        ids[0, 10], ids[0, 11] = model.config.gmask_token_id, model.config.bos_token_id

    def logits(*bounds: int) -> torch.Tensor:
        cache, found = bytes_cache(), []
        with torch.no_grad(), modules_alone(model):
            for first, end in itertools.pairwise(bounds):
                places = model.positions_from(ids[:, :end], first)
                piece = ids[:, first:end]
                out = model(input_ids=piece, position_ids=places, past_key_values=cache, use_cache=True)
                found.append(out.logits[0])
        return torch.cat(found)

    assert distance(logits(0, 30, 61, 90), logits(0, 90)) < 2e-3


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_chat_engine_and_generate_use_it(calls: list[int], generation: int) -> None:
    loaded, tokenizer = pair(generation)
    model = copy.deepcopy(loaded).quantize(8, precision="exact")
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    plain = model.chat(tokenizer, "hello", **settings)[0]
    whole = affordable_tokens(model)
    model.kv_cache_dtype = "int8"
    answer, history = model.chat(tokenizer, "hello", **settings)
    kept = model.__dict__["_last_turn"]
    assert kept.kv_cache_dtype == "int8" and isinstance(kept.layers[0], Int8Layer)
    assert kept.layers[0].keys.dtype == torch.int8
    *_, last = model.stream_steps(tokenizer, "你好", history, **settings)
    assert last.cached_tokens > 0 or generation == 1
    kept = model.__dict__["_last_turn"]
    assert kept.get_seq_length() == len(kept.token_ids)
    with Engine(model, tokenizer, max_batch=4) as engine:
        *_, step = engine.chat("hello", **settings)
        assert step.text.strip() == answer
    assert affordable_tokens(model) > 1.5 * whole
    ids = torch.tensor([model.prepare_turn(tokenizer, "hello", **settings)[0]])
    beams = model.generate(ids, num_beams=2, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert beams.shape == (1, ids.shape[1] + 6)
    model.kv_cache_dtype = "auto"
    assert model.chat(tokenizer, "hello", **settings)[0] == plain
    assert model.__dict__["_last_turn"].kv_cache_dtype == "auto"


def test_bad_numbers_are_not_hidden(calls: list[int]) -> None:
    for generation, options in ((1, {}), (2, {"kv_channels": 64, "num_attention_heads": 16})):
        model = network(generation, **options)
        for part in ("keys", "values"):
            cache = bytes_cache()
            decode_tokens(model, cache)
            rows = getattr(cache.layers[1], part)
            rows[0, 0, 3, -SCALE_BYTES:] = torch.tensor([float("nan")]).view(torch.int8)
            ids = torch.tensor([[1000]])
            places = {"position_ids": torch.tensor([[[9], [20]]])} if generation == 1 else {}
            calls.clear()
            with torch.no_grad():
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **places).logits
            assert calls and bool(logits.isnan().all())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
