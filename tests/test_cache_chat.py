"""The KV cache that a chat keeps: what a later turn may reuse, and what is dropped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from chatglm.cache import ChatCache, ChatGLMCache
from chatglm.generation import weights_stamp
from tiny_chat import pair


def filled(model: Any, ids: list[int]) -> ChatCache:
    """A cache that holds `ids`."""
    cache = ChatCache(weights_stamp(model))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    cache.token_ids += ids
    return cache


def keep(cache: ChatCache, ids: list[int], model: Any) -> int:
    common = cache.keep_prefix_of(ids, model, weights_stamp(model))
    assert common == len(cache.token_ids) == cache.get_seq_length()
    return common


def test_generation_1_keeps_no_part_of_a_longer_context() -> None:
    model, _ = pair(1)
    mask, sop = model.config.mask_token_id, model.config.bos_token_id
    cache = filled(model, [200, 201, mask, 300, sop, 400])
    assert keep(cache, [200, 201, mask, 300, sop, 400, 401], model) == 6
    assert keep(cache, [200, 201, mask, 300, sop], model) == 4  # its last token is read again
    cache = filled(model, [200, 201, mask, 300, sop, 400])
    assert keep(cache, [200, 201, mask, sop], model) == 0


def test_it_is_a_cache_of_transformers_and_of_ours() -> None:
    cache = ChatCache()
    assert isinstance(cache, DynamicCache) and isinstance(cache, ChatGLMCache)
    assert (cache.get_seq_length(), cache.mask) == (0, None)


@pytest.mark.parametrize(
    ("ids", "common"),
    [
        ([11, 12, 13, 14, 15], 4),
        ([11, 12, 13, 14], 3),  # the last one's logits are wanted
        ([11, 12], 1),
        ([11, 12, 23, 24, 25], 2),
        ([21, 12, 13, 14], 0),
    ],
)
def test_the_common_beginning_is_kept(ids: list[int], common: int) -> None:
    model, _ = pair(2)
    cache = filled(model, [11, 12, 13, 14])
    before = cache.layers[0].keys.clone()
    assert keep(cache, ids, model) == common
    assert common == 0 or torch.equal(cache.layers[0].keys, before[:, :, :common])


@pytest.mark.parametrize("version", (2, 3))
def test_going_on_from_what_is_kept_is_going_on_from_the_start(version: int) -> None:
    model, _ = pair(version)
    ids = [11, 12, 23, 24, 25]
    cache = filled(model, [11, 12, 13, 14])
    start = keep(cache, ids, model)
    with torch.no_grad():
        rest = model(input_ids=torch.tensor([ids[start:]]), past_key_values=cache, use_cache=True).logits
        whole = model(input_ids=torch.tensor([ids])).logits
    assert torch.allclose(rest, whole[:, start:], atol=1e-4)


def test_other_weights_leave_nothing_of_it() -> None:
    model, _ = copy.deepcopy(pair(2))
    ids = [11, 12, 13, 14]
    cache = filled(model, ids)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    assert keep(cache, [*ids, 15], model) == 0
    model.double()
    assert keep(filled(model, ids), [*ids, 15], model) == 4  # and its layers have the new dtype


@pytest.mark.parametrize("known", [[], [11, 12, 13, 14]], ids=["first forward", "later forward"])
def test_an_interrupted_forward_leaves_nothing_of_it(known: list[int]) -> None:
    """Then the first layers hold more tokens than the last ones."""
    model, _ = pair(2)
    cache = filled(model, known) if known else ChatCache(weights_stamp(model))
    states = torch.zeros(1, 2, 3, 8)
    cache.update(states, states, 0)
    assert keep(cache, [11, 12, 13, 14, 15], model) == 0


def test_a_cache_that_a_caller_made_is_reused_from_then_on() -> None:
    model, tokenizer = pair(3)
    cache = ChatCache()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "past_key_values": cache}
    *_, first = model.stream_steps(tokenizer, "你好", **options)
    *_, second = model.stream_steps(tokenizer, "what?", first.history, **options)
    assert second.cached_tokens >= first.prompt_tokens


def test_reserved_room_changes_nothing_before_it_is_committed() -> None:
    model, _ = pair(2)
    cache = filled(model, [11, 12, 13])
    before = cache.layers[0].keys.clone()
    room = cache.room_for_tokens()
    assert room is not None and list(room.lengths) == [3] and len(room.layers) == len(cache.layers)
    for keys, values in room.layers:
        keys[:, :, 3:] = values[:, :, 3:] = 7.0
    assert cache.get_seq_length() == 3 and torch.equal(cache.layers[0].keys, before)
    room.commit()
    assert cache.get_seq_length() == 4 and bool((cache.layers[-1].values[:, :, 3:] == 7).all())


def test_no_room_while_it_is_empty_or_layers_differ() -> None:
    model, _ = pair(2)
    assert ChatCache().room_for_tokens() is None
    cache = filled(model, [11, 12, 13])
    cache.layers[0].extend(1)
    assert cache.room_for_tokens() is None
