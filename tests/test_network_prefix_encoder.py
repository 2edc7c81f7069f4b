"""P-tuning prefixes: computed once, updated at once, trained beside half precision."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from goldens import causal_lm
from tiny_networks import assert_same, every_model, text, tiny_model


@every_model
@pytest.mark.parametrize("projection", [False, True], ids=["table", "projected"])
@torch.no_grad()
def test_a_changed_prefix_is_used_at_once(version: int, projection: bool) -> None:
    """However it changes: in place, by loading, by replacing, or by moving to another precision and back."""
    model, ids = tiny_model(version, pre_seq_len=5, prefix_projection=projection), text(version, 9, 3)
    encoder = model.transformer.prefix_encoder
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    reference = model(ids).logits
    encoder.embedding.weight.mul_(-2)
    changed = model(ids).logits
    assert (changed - reference).abs().max() > 1e-2
    encoder.load_state_dict(state)
    assert_same(model(ids).logits, reference)
    encoder.embedding.weight = torch.nn.Parameter(-2 * state["embedding.weight"])
    assert_same(model(ids).logits, changed)
    encoder.embedding.weight.data = state["embedding.weight"].clone()
    assert_same(model(ids).logits, reference)
    model.half()
    model.float()
    assert_same(model(ids).logits, reference, 1e-2)


@every_model
@pytest.mark.parametrize("projection", [False, True], ids=["table", "projected"])
@torch.no_grad()
def test_a_prefix_is_made_once(version: int, projection: bool) -> None:
    """For each dtype that is asked for, as long as nothing changes; the rows of a batch share it."""
    encoder = tiny_model(version, pre_seq_len=5, prefix_projection=projection).transformer.prefix_encoder
    unused = len(pickle.dumps(encoder))
    first = encoder(1, torch.bfloat16)
    for again in (encoder(1, torch.bfloat16), encoder(3, torch.bfloat16)):
        for (key, value), (old_key, old_value) in zip(again, first, strict=True):
            assert key.data_ptr() == old_key.data_ptr() and value.data_ptr() == old_value.data_ptr()
    assert again[0][0].shape == (3, *first[0][0].shape[1:])
    assert encoder(1, torch.float32)[0][0].dtype == torch.float32
    encoder.embedding.weight.data.mul_(-2)  # as some optimizers do it: no version tells, but the end of training does
    encoder.train().eval()
    assert not torch.equal(encoder(1, torch.bfloat16)[0][0], first[0][0])
    with torch.enable_grad():
        assert encoder(1, torch.float32)[0][0].requires_grad
    assert not encoder(1, torch.float32)[0][0].requires_grad
    assert len(pickle.dumps(encoder)) == unused, "copies do not carry what was made"


@every_model
@pytest.mark.parametrize("projection", [False, True], ids=["table", "projected"])
def test_a_prefix_trains_beside_half_precision(version: int, projection: bool, tmp_path: Path) -> None:
    """Loaded in bfloat16 the prefix stays in float32; one step changes it, and nothing else."""
    tiny_model(version, pre_seq_len=5, prefix_projection=projection).save_pretrained(tmp_path)
    model = causal_lm(version).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in kinds if "prefix_encoder" in name}
    assert all((dtype == torch.float32) == (name in trained) for name, dtype in kinds.items())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = text(version, 9, 5)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@every_model
def test_a_prefix_drops_out_only_while_training(version: int) -> None:
    model, ids = tiny_model(version, pre_seq_len=5), text(version, 9, 3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@every_model
@pytest.mark.parametrize("projection", [False, True], ids=["table", "projected"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [3, 0], [2]])
@torch.no_grad()
def test_the_rows_of_a_prefix_by_their_ids(version: int, projection: bool, ids: list[int]) -> None:
    """As converters call it; the rows hold keys and values of every layer."""
    network = tiny_model(version, pre_seq_len=5, prefix_projection=projection).transformer
    encoder = network.prefix_encoder
    assert (network.pre_seq_len, network.prefix_projection) == (5, projection)
    assert network.prefix_tokens.tolist() == [*range(5)]
    rows = encoder(torch.tensor([ids, ids]))
    assert torch.equal(rows[0], rows[1])
    parts = rows[0].unflatten(-1, (encoder.num_layers * 2, encoder.num_heads, encoder.head_dim))
    for layer, (key, value) in enumerate(encoder(1, torch.float32)):
        assert_same(parts[:, 2 * layer].transpose(0, 1), key[0][:, ids])
        assert_same(parts[:, 2 * layer + 1].transpose(0, 1), value[0][:, ids])


@every_model
def test_without_a_prefix(version: int) -> None:
    network = tiny_model(version).transformer
    assert (network.pre_seq_len, network.prefix_projection, network.prefix_tokens) == (None, False, None)
