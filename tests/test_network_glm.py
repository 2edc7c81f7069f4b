"""Generation 1's own masks and positions."""

from __future__ import annotations

import pytest
import torch

from tiny_networks import BOS, GMASK, assert_same, text, tiny_model


@pytest.mark.parametrize(
    ("tokens", "what"), [([10, 11, GMASK, 12], "sop"), ([10, 11, BOS, 12], "gMASK")], ids=["no sop", "no gMASK"]
)
def test_incomplete_prompts_say_what_to_add(tokens: list[int], what: str) -> None:
    model, ids = tiny_model(1), torch.tensor([tokens])
    for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=what) as error:
            call()
        assert "add" in str(error.value).lower() or "append" in str(error.value).lower()


@torch.no_grad()
def test_every_form_of_mask_and_positions() -> None:
    """Ids only, a 2-D mask, the bool 4-D mask with or without positions: all the same."""
    model, ids = tiny_model(1), text(1, 9, 4)
    hidden = torch.ones(13, 13, dtype=torch.bool).triu(1)
    hidden[:, :8] = False
    positions = torch.tensor([[[*range(8), *[7] * 5], [*[0] * 8, *range(1, 6)]]])
    reference = model(ids).logits
    for options in (
        {"attention_mask": torch.ones_like(ids)},
        {"attention_mask": torch.ones_like(ids).bool()},
        {"attention_mask": hidden[None, None]},
        {"attention_mask": hidden[None, None], "position_ids": positions},
        {"position_ids": positions},
    ):
        assert_same(model(ids, **options).logits, reference)
