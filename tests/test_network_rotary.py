"""Rotary tables: computed once, grown when needed, exact in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_networks import assert_same, every_dtype, every_model, text, tiny_config, tiny_model


def rotary_table(model: Any) -> Any:
    return model.transformer.rotary_emb if model.config.chatglm_version == 1 else model.transformer.rotary_pos_emb


@every_model
@torch.no_grad()
def test_tables_are_computed_once_and_grow(version: int) -> None:
    model = tiny_model(version)
    table, ids = rotary_table(model), text(version, 9, 5)
    model(ids)
    before = table.table
    model(ids)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert table.table is before
    assert len(before) == 64
    long = text(version, 100, 50)
    whole = model(long).logits
    grown = table.table
    assert len(grown) >= 100
    assert torch.equal(grown[:64], before)
    assert_same(model(long).logits, whole)
    assert table.table is grown


@every_model
@every_dtype
@torch.no_grad()
def test_tables_stay_exact_in_half_precision(version: int, dtype: torch.dtype) -> None:
    """A model in half precision reads cast float32 tables; only rope_precision="original" computes them coarsely."""
    positions = torch.arange(64)[None]
    exact = rotary_table(tiny_model(version))(positions, torch.float32)
    for ours, theirs in zip(rotary_table(tiny_model(version).to(dtype))(positions, dtype), exact, strict=True):
        assert torch.equal(ours, theirs.to(dtype))
    coarse = rotary_table(tiny_model(version, dtype, rope_precision="original"))(positions, dtype)
    same = all(torch.equal(ours, theirs.to(dtype)) for ours, theirs in zip(coarse, exact, strict=True))
    assert same == (dtype == torch.float32 or version == 3)


def test_an_unknown_rope_precision_is_an_error() -> None:
    with pytest.raises(ValueError, match="rope_precision"):
        tiny_config(2, rope_precision="fp16")
