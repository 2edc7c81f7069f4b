"""LoRA: exchanged with PEFT and transformers, refused, merged, and absent."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModel

from chatglm import adapters
from chatglm.generation import weights_stamp
from chatglm.quantization import QuantizedLinear
from tiny_adapters import (
    LINEARS,
    VERSIONS,
    error_of,
    every_version,
    exchange_with_peft,
    logits,
    lora_config,
    randomise,
    tiny,
    trained,
)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("version", VERSIONS)
def test_lora_saved_by_others_and_read_by_others(version: int, tmp_path: Path) -> None:
    """PEFT's own model class, transformers' save_pretrained, and our files read by both."""
    model, again = exchange_with_peft(tmp_path, version, target_modules=LINEARS)
    inner = again.get_base_model()
    with inner.adapter(None):
        assert torch.equal(logits(inner), logits(tiny(version)))
    tiny(version).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*config file in nowhere")
        adapters.save_adapter(model, tmp_path / "named", str(tmp_path / "base"))
    loaded = AutoModel.from_pretrained(tmp_path / "named").eval()
    assert loaded.adapter_names == ["default"]
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("front", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("name", ["default", "my-task"])
def test_lora_under_the_names_that_it_has_in_a_model(version: int, name: str, front: str, tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(tiny(version), lora_config(target_modules=LINEARS), adapter_name=name)
    randomise(wrapped)
    expected = logits(wrapped.get_base_model())
    trained_ones = {key: value.detach() for key, value in wrapped.named_parameters() if value.requires_grad}
    assert all(f".{name}." in key for key in trained_ones)
    wrapped.peft_config[name].save_pretrained(tmp_path)
    torch.save({front + key: value for key, value in trained_ones.items()}, tmp_path / "adapter_model.bin")
    model = tiny(version)
    adapters.load_adapter(model, tmp_path, "one")
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(tiny(2), lora_config(), adapter_name="first")
    wrapped.add_adapter("second", lora_config())
    wrapped.peft_config["first"].save_pretrained(tmp_path)
    both = {key: value for key, value in wrapped.state_dict().items() if "lora_" in key}
    torch.save(both, tmp_path / "adapter_model.bin")
    assert "holds several adapters" in error_of(lambda: adapters.load_adapter(tiny(2), tmp_path))


@every_version
def test_without_peft(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = trained(version)
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny(version)
    assert "pip install peft" in error_of(lambda: adapters.load_adapter(model, paths["lora"]))
    adapters.load_adapter(model, paths["table"])
    adapters.save_prefix(model, tmp_path)
    with model.prefix(None):
        logits(model)
    weights_stamp(model)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bad_first_lora_leaves_the_model_plain(version: int) -> None:
    model = tiny(version)
    assert "q_proj" in error_of(lambda: adapters.add_lora(model, lora_config(target_modules=["q_proj"])), ValueError)
    assert model.adapter_names == [] and model.current_adapter is None
    adapters.add_lora(model, lora_config())
    assert model.current_adapter == "default"


def test_quantise_first() -> None:
    model = tiny(3)
    adapters.add_lora(model, lora_config())
    assert "quantise it first" in error_of(lambda: model.quantize(4), ValueError)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


# ---- merging ---------------------------------------------------------------------------------------------------------


@every_version
@pytest.mark.parametrize("kind", ["lora", "everywhere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merged_is_unmerged(version: int, kind: str, dtype: torch.dtype) -> None:
    paths = trained(version)
    model = tiny(version, dtype)
    names = set(model.state_dict())
    adapters.load_adapter(model, paths[kind])
    expected, plain = logits(model), logits(tiny(version, dtype))
    layer = model.base_model.get_submodule("layers.0.attention" if version == 1 else "encoder.layers.0.self_attention")
    lora = layer.query_key_value
    merged = (lora.base_layer.weight.float() + lora.get_delta_weight(kind)).to(dtype)
    assert adapters.merge_lora(model) is model
    assert torch.equal(layer.query_key_value.weight, merged)
    assert set(model.state_dict()) == names and model.adapter_names == []
    assert {value.dtype for value in model.parameters()} == {dtype}
    error, change = (logits(model) - expected).float().norm(), (expected - plain).float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2) * change
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_version
def test_what_cannot_be_merged(version: int, tmp_path: Path) -> None:
    paths = trained(version)
    model = tiny(version, bits=4)
    assert "no LoRA adapter None to merge" in error_of(lambda: adapters.merge_lora(model), ValueError)
    adapters.load_adapter(model, paths["lora"])
    assert "full-precision checkpoint" in error_of(lambda: adapters.merge_lora(model), ValueError)
    adapters.load_adapter(model, paths["everywhere"])
    assert "other LoRA adapters (lora)" in error_of(lambda: adapters.merge_lora(model), ValueError)
    assert model.current_adapter == "everywhere"
