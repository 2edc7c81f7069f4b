"""LoRA adapters that replace whole layers: exchanged with PEFT, switched, merged and removed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from chatglm import adapters
from chatglm.adapters.switching import stamp
from tiny_adapters import error_of, exchange_with_peft, logits, lora_config, make_lora, tiny

HEAD = ["output_layer", "final_layernorm"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("version", [2, 3])
def test_exchanged_with_peft(version: int, tmp_path: Path) -> None:
    exchange_with_peft(tmp_path, version, modules_to_save=HEAD)


def test_each_adapter_has_its_own_layers(tmp_path: Path) -> None:
    base = tiny(3)
    plain = logits(base)
    first, second = (make_lora(tmp_path / name, base, seed=seed, modules_to_save=HEAD)
                     for seed, name in enumerate(("first", "second")))  # fmt: skip
    bare = make_lora(tmp_path / "bare", base, seed=2)
    alone = {}
    for path in (first, second, bare):
        model = tiny(3)
        adapters.load_adapter(model, path)
        alone[path.name] = logits(model)
    model = tiny(3)
    for path in (bare, first, second):
        adapters.load_adapter(model, path)
    seen = set()
    for name in ("first", "bare", "second", None, "first"):
        with model.adapter(name):
            assert torch.equal(logits(model), plain if name is None else alone[name])
            seen.add(stamp(model))
    assert len(seen) == 4
    assert torch.equal(logits(copy.deepcopy(model)), alone["second"])
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), alone["second"])
    adapters.remove_adapter(model, "second")
    assert torch.equal(logits(model), plain)
    adapters.use_adapter(model, "first")
    assert torch.equal(logits(model), alone["first"])
    adapters.remove_adapter(model, "bare")
    adapters.remove_adapter(model, "first")
    assert set(model.state_dict()) == set(base.state_dict()) and torch.equal(logits(model), plain)


def test_a_second_adapter_can_be_trained(tmp_path: Path) -> None:
    model = tiny(3)
    adapters.load_adapter(model, make_lora(tmp_path / "first", model, modules_to_save=HEAD))
    adapters.add_lora(model, lora_config(modules_to_save=HEAD), "second")
    trained = {name for name, one in model.named_parameters() if one.requires_grad and ".second." in name}
    assert {name for name in trained if "modules_to_save" in name} == {
        "transformer.output_layer.modules_to_save.second.weight",
        "transformer.encoder.final_layernorm.modules_to_save.second.weight",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [0, 4])
def test_merged_is_unmerged(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    path = make_lora(tmp_path / "lora", tiny(3), modules_to_save=HEAD)
    model = tiny(3, dtype, bits)
    names = set(model.state_dict())
    adapters.load_adapter(model, path, "one")
    expected = logits(model)
    assert expected.dtype == dtype
    head = model.get_output_embeddings().modules_to_save["one"].weight.to(dtype)
    fingerprint = adapters.fingerprint(model)
    assert fingerprint == adapters.fingerprint(tiny(3, dtype, bits))
    adapters.merge_lora(model, requantize=bool(bits))
    assert torch.equal(model.get_output_embeddings().weight, head) and set(model.state_dict()) == names
    if not bits:
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        assert (logits(model) - expected).float().norm() < bound * expected.float().norm()


def test_the_embeddings_of_a_half_precision_model(tmp_path: Path) -> None:
    path = make_lora(tmp_path / "lora", tiny(3), modules_to_save=["word_embeddings"])
    model, wide = tiny(3, torch.bfloat16), tiny(3)
    for one in (model, wide):
        adapters.load_adapter(one, path)
    assert logits(model).dtype == torch.bfloat16
    assert (logits(model).float() - logits(wide)).norm() < 0.05 * logits(wide).norm()


def test_tied_layers(tmp_path: Path) -> None:
    model = tiny(1)
    message = error_of(lambda: adapters.add_lora(model, lora_config(modules_to_save=["lm_head"])), ValueError)
    assert "lm_head is tied to another layer" in message and model.adapter_names == []
