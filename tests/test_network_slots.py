"""Adapters in the slots of a network: independent, switched, trained, copied, cast, removed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import AutoModel

import tiny_chat
from chatglm import adapters
from tiny_adapters import VERSIONS, error_of, every_version, logits, lora_config, tiny, trained


@every_version
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_company_as_alone(version: int, dtype: torch.dtype, bits: int) -> None:
    paths = trained(version)
    base = tiny(version, dtype, bits)
    expected: dict[str | None, torch.Tensor] = {None: logits(base.requires_grad_(False))}
    for name, path in paths.items():
        alone = copy.deepcopy(base)
        assert adapters.load_adapter(alone, path) == name
        expected[name] = logits(alone)
    together = copy.deepcopy(base)
    for name, path in reversed(paths.items()):
        adapters.load_adapter(together, path)
        assert together.current_adapter == name
    assert sorted(together.adapter_names) == sorted(paths)
    for name in (*paths, None, *reversed(paths), None):
        with together.adapter(name) as same:
            assert same is together and together.current_adapter == name
            assert torch.equal(logits(together), expected[name]), name
            with together.prefix("lora"):
                assert torch.equal(logits(together), expected["lora"])
            assert together.current_adapter == name
    assert together.current_adapter == "table"
    assert len({tuple(one.flatten().tolist()) for one in expected.values()}) == len(expected)
    assert {value.dtype for key, value in together.named_parameters() if "lora_" in key} == {torch.float32}
    assert together.transformer.prefix_encoder.embedding.weight.dtype == torch.float32


@every_version
def test_what_was_current_comes_back_after_an_error(version: int) -> None:
    paths = trained(version)
    model = tiny(version)
    adapters.load_adapter(model, paths["lora"])
    with pytest.raises(RuntimeError, match="halfway"), model.prefix(None):
        raise RuntimeError("halfway")
    assert model.current_adapter == "lora"
    assert "no adapter 'other'" in error_of(lambda: model.adapter("other").__enter__(), ValueError)
    assert model.current_adapter == "lora"


def test_a_prefix_that_the_config_made() -> None:
    config = copy.deepcopy(tiny_chat.pair(3)[0].config)
    config.pre_seq_len = 4
    model = AutoModel.from_config(config).float().eval()
    with_prefix = logits(model)
    assert (model.adapter_names, model.current_adapter) == (["default"], "default")
    with model.prefix(None):
        assert model.config.pre_seq_len is None
        assert not torch.equal(logits(model), with_prefix)
    assert model.config.pre_seq_len == 4
    assert torch.equal(logits(model), with_prefix)


@every_version
def test_removed(version: int) -> None:
    paths = trained(version)
    model = tiny(version)
    plain, names = logits(model), set(model.state_dict())
    for path in paths.values():
        adapters.load_adapter(model, path)
    for name in ("table", "everywhere", "lora", "projected"):
        with model.adapter("projected"):
            before = logits(model)
            if name != "projected":
                adapters.remove_adapter(model, name)
                assert torch.equal(logits(model), before) and model.current_adapter == "projected"
    adapters.remove_adapter(model, "projected")
    assert model.adapter_names == [] and model.current_adapter is None
    assert torch.equal(logits(model), plain)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_only_the_current_adapter_trains(version: int, bits: int) -> None:
    model = tiny(version, torch.bfloat16, bits)
    trainable: dict[str, set[str]] = {}

    def gradients() -> set[str]:
        model.zero_grad()
        tokens = tiny_chat.pair(version)[1]("你好", return_tensors="pt")["input_ids"]
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return {name for name, value in model.named_parameters() if value.grad is not None}

    def flags() -> set[str]:
        return {name for name, value in model.named_parameters() if value.requires_grad}

    adapters.add_prefix(model, 3, True, name="prefix")
    assert model.config.pre_seq_len == 3 and model.config.prefix_projection
    assert all(".prefix_encoder." in name for name in flags()) and gradients() == flags()
    trainable["prefix"] = flags()
    adapters.add_lora(model, lora_config(), "lora")
    assert model.config.pre_seq_len is None
    assert all(".lora_" in name for name in flags()) and gradients() == flags()
    trainable["lora"] = flags()
    with model.adapter(None):
        assert model(tiny_chat.pair(version)[1]("你好", return_tensors="pt")["input_ids"]).logits.requires_grad is False
    with model.adapter("prefix"):
        assert flags() == trainable["prefix"] | trainable["lora"]
        assert gradients() == trainable["prefix"]
    assert flags() == trainable["lora"]
    for length in (0, -1, 1.5, True):
        assert "1 or more" in error_of(lambda length=length: adapters.add_prefix(model, length, name="x"), ValueError)
    bad = lora_config(target_modules=["q_proj"])
    assert "q_proj" in error_of(lambda: adapters.add_lora(model, bad, "bad"), ValueError)
    assert model.adapter_names == ["prefix", "lora"] and model.current_adapter == "lora"


@every_version
@pytest.mark.parametrize("bits", [0, 4])
def test_copies_and_casts(version: int, bits: int) -> None:
    paths = trained(version)
    model = tiny(version, bits=bits)
    for path in paths.values():
        adapters.load_adapter(model, path)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for name in (*paths, None):
        with model.adapter(name):
            expected = logits(model)
        for other in copies:
            with other.adapter(name):
                assert torch.equal(logits(other), expected)
    copied = copies[0].half()  # a cast is for everything, adapters in use or not, as it was for the originals' prefix
    for name in ("table", "projected"):
        with copied.adapter(name):
            assert copied.transformer.prefix_encoder.embedding.weight.dtype == torch.float16
    moved = copies[1].to("meta")
    for name in paths:
        with moved.adapter(name):
            assert all(parameter.is_meta for parameter in moved.parameters())
    model.train()
    with model.adapter("projected"):
        assert model.transformer.prefix_encoder.training
        model.eval()
    with model.adapter("table"):
        assert not model.transformer.prefix_encoder.training


@every_version
def test_slots_know_no_files(version: int) -> None:
    """A prefix that was made by hand goes into a slot and out of it by the network's own methods."""
    model = tiny(version)
    slots, plain = model.adapter_slots, logits(model)
    assert slots.names == [] and slots.current is None and not slots.remove_prefix("one")
    stamps = [slots.stamp]
    for name in ("one", "two"):
        slots.add_prefix(name, model.base_model.make_prefix_encoder(3, False))
        stamps.append(slots.stamp)
        assert slots.current == name and model.config.pre_seq_len == 3
    assert slots.names == ["one", "two"] and slots.parked == [slots.prefixes["one"]]
    with slots.using(None) as same:
        assert same is model and slots.current is None and len(slots.parked) == 2
        assert torch.equal(logits(model), plain)
    assert slots.current == "two" and not torch.equal(logits(model), plain)
    assert "no adapter 'three' in this model, only one, two" in error_of(lambda: slots.use("three"), ValueError)
    slots.use(None)
    assert slots.remove_prefix("one") and slots.names == ["two"]
    stamps.append(slots.stamp)
    assert slots.stamp == stamps[-1]
    assert all(one != other for i, one in enumerate(stamps) for other in stamps[:i])


def test_copies_have_slots_of_their_own() -> None:
    model = tiny(3)
    adapters.add_prefix(model, 2, name="one")
    other = copy.deepcopy(model)
    adapters.add_prefix(other, 2, name="two")
    adapters.remove_adapter(model, "one")
    assert (model.adapter_names, other.adapter_names, other.current_adapter) == ([], ["one", "two"], "two")


def test_a_model_with_slots_is_freed_at_once() -> None:
    """Slots hold no reference to their model: gigabytes would wait for the garbage collector."""
    model = tiny(3)
    adapters.add_prefix(model, 2)
    dead = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert dead() is None
    finally:
        gc.enable()
