"""Adapters that were trained on another base."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import tiny_chat
from chatglm import adapters
from tiny_adapters import VERSIONS, error_of, every_version, logits, make_lora, make_prefix, tiny, trained


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fingerprint_is_of_the_weights(version: int, tmp_path: Path) -> None:
    base = tiny(version)
    for parameter in base.parameters():
        parameter.data += torch.rand_like(parameter)
    base.save_pretrained(tmp_path / "base")
    make_prefix(tmp_path / "prefix", base)
    for dtype, bits in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float16, 4), (torch.bfloat16, 8)):
        same = copy.deepcopy(base).to(dtype)
        same = same.quantize(bits, quantize_embeddings=True) if bits else same
        adapters.load_adapter(same, make_lora(tmp_path / f"{dtype}", base))
        adapters.load_adapter(same, tmp_path / "prefix")  # no warning
        adapters.save_prefix(same, tmp_path / f"again{bits}{dtype}")
        config = json.loads((tmp_path / f"again{bits}{dtype}" / "config.json").read_text())
        assert not {"quantization_bit", "quantization_config", "quantization_embeddings"} & set(config)
        adapters.load_adapter(copy.deepcopy(base), tmp_path / f"again{bits}{dtype}")
    for parameter in base.parameters():
        parameter.data *= 1.1
    with pytest.warns(UserWarning, match=r"trained on other weights than these \(base\)") as caught:
        adapters.load_adapter(base, tmp_path / "prefix")
    assert len(caught) == 1


@every_version
@pytest.mark.parametrize("kind", ["table", "projected", "lora", "everywhere"])
def test_another_size_or_generation(version: int, kind: str, tmp_path: Path) -> None:
    paths = trained(version)
    others = [tiny(other) for other in VERSIONS if other != version]
    for size in ({"num_layers": 3}, {"num_layers": 1}, {"hidden_size": 48}):
        if kind == "table" and version != 1 and "hidden_size" in size:
            continue  # such a prefix has no tensor of that size
        config = copy.deepcopy(tiny_chat.pair(version)[0].config)
        for key, value in size.items():
            setattr(config, key, value)
        others.append(AutoModel.from_config(config).eval())
    for other in others:
        ours = other.config
        before, names = logits(other), set(other.state_dict())
        if {ours.chatglm_version, version} == {2, 3} and "lora" in str(adapters.read_adapter(paths[kind])).lower():
            continue  # two generations of one network: nothing in the adapter of a nameless base tells them apart
        text = error_of(lambda model=other: adapters.load_adapter(model, paths[kind]))
        assert "is for another model" in text and str(paths[kind]) in text
        if ours.chatglm_version != version:
            named = "generation 2 or 3" if kind in ("lora", "everywhere") and version != 1 else f"generation {version}"
            assert named in text
        assert f"generation {ours.chatglm_version}, {ours.num_layers} layers of width {ours.hidden_size}" in text
        assert other.adapter_names == [] and set(other.state_dict()) == names
        assert torch.equal(logits(other), before)


@pytest.mark.parametrize("name", ["THUDM/chatglm2-6b", "/models/ChatGLM3-6B-base", "zai-org/chatglm-6b-int4"])
def test_lora_that_names_its_base(name: str, tmp_path: Path) -> None:
    folder = make_lora(tmp_path, tiny(3))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    if "3" in name:
        adapters.load_adapter(tiny(3), folder)
    else:
        assert f"({name}), this one is ChatGLM of generation 3" in error_of(
            lambda: adapters.load_adapter(tiny(3), folder)
        )
