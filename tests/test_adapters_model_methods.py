"""transformers' names for adapters, `model.load_adapter` and the others: on every release, with any PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_adapters import error_of, every_version, logits, lora_config, tiny, trained


@every_version
def test_loaded_switched_and_deleted(version: int) -> None:
    paths, model = trained(version), tiny(version)
    plain = logits(model)
    assert model.load_adapter(paths["lora"]) == "lora"
    assert model.load_adapter(str(paths["everywhere"]), "other", adapter_kwargs={"token": None}) == "other"
    assert model.load_adapter(paths["table"], adapter_name="prefix") == "prefix"
    assert (model.adapter_names, model.current_adapter) == (["prefix", "lora", "other"], "prefix")
    expected = {}
    for name in ("lora", "other", "prefix"):
        model.set_adapter(name)
        assert model.current_adapter == name
        expected[name] = logits(model)
    model.set_adapter(["lora"])
    assert model.active_adapters() == ["lora"] and torch.equal(logits(model), expected["lora"])
    model.disable_adapters()
    assert model.current_adapter is None and torch.equal(logits(model), plain)
    assert model.active_adapters() == ["lora"]
    model.enable_adapters()
    assert model.current_adapter == "lora" and torch.equal(logits(model), expected["lora"])
    model.delete_adapter("other")
    assert model.adapter_names == ["prefix", "lora"] and torch.equal(logits(model), expected["lora"])
    model.delete_adapter(["lora", "prefix"])
    assert model.adapter_names == [] and torch.equal(logits(model), plain)


@pytest.mark.filterwarnings("ignore:Could not find a config file in base")
def test_added_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT would look for the base's config on the hub
    paths, model = trained(3), tiny(3)
    model.add_adapter(lora_config())
    assert (model.adapter_names, model.current_adapter) == (["default"], "default")
    model.load_adapter(paths["lora"])
    saved = load_file(paths["lora"] / "adapter_model.safetensors")
    for name in (None, "lora"):
        found = model.get_adapter_state_dict(name)
        assert found.keys() == {key.removeprefix("base_model.model.") for key in saved}
        for key, tensor in found.items():
            assert torch.equal(tensor, saved[f"base_model.model.{key}"])
    assert model.get_adapter_state_dict("default").keys() == found.keys()


@pytest.mark.parametrize("options", [{"adapter_kwargs": {"revision": "main"}}, {"revision": "main"}, {"hotswap": True}])
def test_options_that_do_nothing_are_refused(options: dict[str, Any]) -> None:
    model = tiny(3)
    message = error_of(lambda: model.load_adapter(trained(3)["lora"], **options), TypeError)
    assert message.startswith("load_adapter() takes a local folder and a name") and "download the adapter" in message
    assert model.adapter_names == []


def test_without_an_adapter_and_with_several() -> None:
    model = tiny(3)
    for call in (model.disable_adapters, model.enable_adapters, model.active_adapters, model.get_adapter_state_dict):
        assert "no LoRA adapter" in error_of(call, ValueError)
    for call in (model.set_adapter, model.delete_adapter):
        assert "no adapter 'lora' in this model" in error_of(lambda call=call: call("lora"), ValueError)
    model.load_adapter(trained(3)["lora"])
    for names in ([], ["lora", "other"]):
        assert "one adapter is in use at a time" in error_of(lambda names=names: model.set_adapter(names), ValueError)
    assert model.current_adapter == "lora"
