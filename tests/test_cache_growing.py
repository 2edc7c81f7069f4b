"""The layer that grows in place: it holds what transformers' layer would hold, and rarely copies."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from chatglm.cache import GrowingLayer


def test_it_holds_what_a_dynamic_layer_holds_and_is_rarely_copied() -> None:
    torch.manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    places = set()
    for tokens in (5, *[1] * GrowingLayer.STEP):
        keys, values = torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 4)
        found, wanted = ours.update(keys, values), theirs.update(keys, values)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        places.add(found[0].data_ptr())
    assert len(places) == 2


def test_room_for_tokens_that_the_caller_writes() -> None:
    layer = GrowingLayer()
    keys = torch.randn(1, 2, 3, 4)
    layer.update(keys, keys)
    layer.extend(2)
    layer.keys[:, :, 3:] = layer.values[:, :, 3:] = 7.0
    assert layer.get_seq_length() == 5
    assert torch.equal(layer.keys[:, :, :3], keys) and bool((layer.keys[:, :, 3:] == 7).all())


def test_what_others_put_in_its_place_is_not_overwritten() -> None:
    """As beam search does, which replaces keys and values by a choice of their rows."""
    layer = GrowingLayer()
    keys = torch.randn(2, 2, 3, 4)
    layer.update(keys, keys)
    mine = keys[1:].clone()
    layer.keys, layer.values = mine, mine
    new = torch.randn(1, 2, 1, 4)
    found, _ = layer.update(new, new)
    assert torch.equal(found, torch.cat((mine, new), dim=2))
    assert torch.equal(mine, keys[1:])


def test_gradients_flow_through_it() -> None:
    layer = GrowingLayer()
    states = torch.randn(1, 2, 3, 4, requires_grad=True)
    keys, _ = layer.update(states, states)
    keys.sum().backward()
    assert states.grad is not None
