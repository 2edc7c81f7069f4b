"""What the heads take and return: embeddings, kept logits, tuples, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Cache

from chatglm.network import compat
from deviations import DEVIATIONS
from tiny_networks import assert_same, every_model, text, tiny_model


@every_model
@torch.no_grad()
def test_embeddings_are_ids(version: int) -> None:
    model, ids = tiny_model(version), text(version, 9, 4)
    options: dict[str, Any] = {}
    if version == 1:
        hidden = torch.ones(13, 13, dtype=torch.bool).triu(1)
        hidden[:, :8] = False
        options = {
            "attention_mask": hidden[None, None],
            "position_ids": torch.tensor([[[*range(8), *[7] * 5], [*[0] * 8, *range(1, 6)]]]),
        }
    assert_same(model(inputs_embeds=model.get_input_embeddings()(ids), **options).logits, model(ids).logits)


@every_model
def test_exactly_one_of_ids_and_embeddings(version: int) -> None:
    model, ids = tiny_model(version), text(version, 9, 0)
    with pytest.raises(ValueError, match="input_ids"):
        model()
    with pytest.raises(ValueError, match="input_ids"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@every_model
@torch.no_grad()
def test_logits_to_keep(version: int) -> None:
    model, ids = tiny_model(version), text(version, 9, 4)
    whole = model(ids).logits
    assert_same(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    assert_same(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])


@every_model
@torch.no_grad()
def test_tuples_and_flags(version: int) -> None:
    model, ids = tiny_model(version), text(version, 9, 4)
    whole = model(ids)
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_same(as_tuple[0], whole.logits)
    assert whole.hidden_states is None
    assert whole.attentions is None
    assert len(model(ids, output_hidden_states=True).hidden_states) == 4


@every_model
@pytest.mark.parametrize("rows", [1, 2, 5])
@torch.no_grad()
def test_everything_is_batch_first(version: int, rows: int) -> None:
    assert DEVIATIONS["hidden_states_are_batch_first"] and DEVIATIONS["caches_are_no_tuples"]
    model, ids = tiny_model(version), text(version, 9, 4).repeat(rows, 1)
    output = model(ids, output_hidden_states=True, use_cache=True)
    width, tokens = model.config.hidden_size, ids.shape[1]
    assert {tuple(state.shape) for state in output.hidden_states} == {(rows, tokens, width)}
    assert model.transformer(ids).last_hidden_state.shape == (rows, tokens, width)
    cache = compat.cache_of(output)
    assert isinstance(cache, Cache)
    for layer in cache.layers:
        heads = model.config.num_key_value_heads
        assert layer.keys.shape == layer.values.shape == (rows, heads, tokens, model.config.head_dim)


@every_model
def test_a_loss_over_a_batch_of_accumulated_steps(version: int) -> None:
    """`num_items_in_batch`, which Trainer passes, divides the sum of the losses instead of their mean."""
    model, ids = tiny_model(version), text(version, 9, 5)
    mean = model(ids, labels=ids).loss
    count = ids.shape[1] - 1
    assert_same(model(ids, labels=ids, num_items_in_batch=torch.tensor(2 * count)).loss, mean / 2)
