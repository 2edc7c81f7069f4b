"""Prefixes and LoRA adapters on a model: each as if alone, switched, saved, loaded, merged."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import tiny_chat
from chatglm import adapters, export, load
from chatglm.arguments import add_model_arguments, load_from_arguments
from chatglm.checkpoints.files import ModelLoadError
from chatglm.generation import weights_stamp
from chatglm.quantization import QuantizedLinear
from tiny_folders import make_folder, to_bin

VERSIONS = (1, 2, 3)
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def tiny(version: int, dtype: torch.dtype = torch.float32, bits: int = 0) -> Any:
    model = copy.deepcopy(tiny_chat.pair(version)[0]).to(dtype)
    return model.quantize(bits) if bits else model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8, model.config.bos_token_id or 9, 10, 11]])
    if model.config.chatglm_version == 1:
        ids[0, 3] = model.config.gmask_token_id
    return model(ids).logits


def randomise(model: Any, seed: int = 0) -> None:
    """Training, as far as these tests care: other numbers in what can be trained."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)


def lora_config(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["query_key_value"]} | changes)


def make_prefix(folder: Path, model: Any, length: int = 4, projection: bool = False, seed: int = 0) -> Path:
    model = copy.deepcopy(model)
    adapters.add_prefix(model, length, projection)
    randomise(model, seed)
    adapters.save_prefix(model, folder, "base")
    return folder


def make_lora(folder: Path, model: Any, seed: int = 0, **changes: Any) -> Path:
    model = copy.deepcopy(model)
    adapters.add_lora(model, lora_config(**changes))
    randomise(model, seed)
    adapters.save_adapter(model, folder, "base")
    return folder


@pytest.fixture(scope="module", params=VERSIONS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Path]]:
    """A generation, and two prefixes and two LoRA adapters for its tiny model."""
    version: int = request.param
    model, root = tiny(version), tmp_path_factory.mktemp("adapters")
    return version, {
        "table": make_prefix(root / "table", model),
        "projected": make_prefix(root / "projected", model, 3, True, seed=1),
        "lora": make_lora(root / "lora", model, seed=2),
        "everywhere": make_lora(root / "everywhere", model, seed=3, target_modules=LINEARS, use_rslora=True),
    }


def error_of(action: Any, kind: type[Exception] = ModelLoadError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# ---- together and alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_company_as_alone(trained: tuple[int, dict[str, Path]], dtype: torch.dtype, bits: int) -> None:
    version, paths = trained
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


def test_what_was_current_comes_back_after_an_error(trained: tuple[int, dict[str, Path]]) -> None:
    version, paths = trained
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


def test_removed(trained: tuple[int, dict[str, Path]]) -> None:
    version, paths = trained
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


# ---- chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4])
def test_chat_after_switching_is_a_fresh_chat(trained: tuple[int, dict[str, Path]], bits: int) -> None:
    version, paths = trained
    # Quantised, LoRA goes through other kernels than a prefix, with other roundings: not in half precision.
    dtype = torch.float32 if bits else torch.bfloat16
    tokenizer = tiny_chat.pair(version)[1]
    model = tiny(version, dtype, bits)
    for path in paths.values():
        adapters.load_adapter(model, path)
    history: list[Any] = []
    for name in ("table", "lora", None, "everywhere", "everywhere", "projected"):
        fresh = tiny(version, dtype, bits).requires_grad_(False)
        if name is not None:
            adapters.load_adapter(fresh, paths[name])
        asked: dict[str, Any] = {"history": history, "max_new_tokens": 5, "do_sample": False}
        expected = fresh.chat(tokenizer, "你好", **asked)
        with model.adapter(name):
            answer, history = model.chat(tokenizer, "你好", **asked)
        assert (answer, history) == expected


def test_the_cache_between_turns_knows_the_adapter(trained: tuple[int, dict[str, Path]]) -> None:
    version, paths = trained
    model, tokenizer = tiny(version), tiny_chat.pair(version)[1]
    for name in ("lora", "table"):
        adapters.load_adapter(model, paths[name])

    def reused() -> int:
        steps = model.stream_steps(tokenizer, "你好", max_new_tokens=2, do_sample=False)
        return list(steps)[-1].cached_tokens

    for name in ("table", "lora", None):
        with model.adapter(name):
            assert reused() == 0
            assert reused() > 0
    with model.adapter("lora"):
        reused()
        model.disable_adapters()  # behind our back, by transformers' own method
        assert model.current_adapter is None and reused() == 0


def test_a_reloaded_adapter_is_another_one(trained: tuple[int, dict[str, Path]]) -> None:
    version, paths = trained
    model = tiny(version)
    stamps = []
    for name in ("table", "lora"):
        for _ in range(2):
            adapters.load_adapter(model, paths[name])
            stamps.append(weights_stamp(model))
            assert weights_stamp(model) == stamps[-1]
            adapters.remove_adapter(model, name)
    assert all(one != other for i, one in enumerate(stamps) for other in stamps[:i])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["table", "projected"])
def test_a_saved_prefix_is_small_and_says_what_it_is(trained: tuple[int, dict[str, Path]], kind: str) -> None:
    version, paths = trained
    tensors = load_file(paths[kind] / "model.safetensors")
    wanted = {"embedding.weight"} | ({"trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"}
                                     if kind == "projected" else set())  # fmt: skip
    assert set(tensors) == {f"transformer.prefix_encoder.{name}" for name in wanted}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    config = json.loads((paths[kind] / "config.json").read_text())
    assert (config["chatglm_version"], config["pre_seq_len"]) == (version, 4 if kind == "table" else 3)
    assert config["prefix_projection"] == (kind == "projected") and config["model_type"] == "chatglm"
    assert config["base_model_name_or_path"] == "base" and config["base_fingerprint"]
    assert {path.name for path in paths[kind].iterdir()} == {"model.safetensors", "config.json"}
    assert len({path.stat().st_mode for path in paths[kind].iterdir()}) == 1  # safetensors' own are for nobody else


@pytest.mark.parametrize("kind", ["table", "projected"])
def test_every_form_of_a_prefix(trained: tuple[int, dict[str, Path]], kind: str, tmp_path: Path) -> None:
    version, paths = trained
    model = tiny(version)
    adapters.load_adapter(model, paths[kind])
    expected = logits(model)
    tensors = load_file(paths[kind] / "model.safetensors")
    forms = {name: tmp_path / name for name in ("bin", "half", "short", "whole", "shards", "whole_bin")}
    for name in ("bin", "half", "short"):
        forms[name].mkdir()
    torch.save(tensors, forms["bin"] / "pytorch_model.bin")
    torch.save({key.removeprefix("transformer."): value for key, value in tensors.items()},
               forms["short"] / "pytorch_model.bin")  # fmt: skip
    save_file({key: value.half() for key, value in tensors.items()}, forms["half"] / "model.safetensors")
    model.save_pretrained(forms["whole"])
    model.save_pretrained(forms["shards"], max_shard_size="20KB")
    model.save_pretrained(forms["whole_bin"])
    to_bin(forms["whole_bin"])
    for name, path in [*forms.items(), ("file", forms["bin"] / "pytorch_model.bin")]:
        fresh = tiny(version)
        adapters.load_adapter(fresh, path, "one")
        if name == "half":
            torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=0.05)
        else:
            assert torch.equal(logits(fresh), expected), name


def test_load_takes_them_all(trained: tuple[int, dict[str, Path]], tmp_path: Path) -> None:
    version, paths = trained
    model, tokenizer = tiny_chat.pair(version)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    several = load(tmp_path, adapter={"first": paths["lora"], "second": paths["table"]}, quantize=4)[0]
    assert (sorted(several.adapter_names), several.current_adapter) == (["first", "second"], "first")
    assert load(tmp_path, adapter=str(paths["table"]))[0].adapter_names == ["table"]
    with several.adapter("second"):
        with_quantised = logits(several)
    alone = load(tmp_path, adapter=paths["table"], quantize=4)[0]
    assert torch.equal(logits(alone), with_quantised)
    # A checkpoint with a prefix of its own, and one more.
    alone = load(tmp_path, adapter=paths["table"])[0]
    alone.save_pretrained(tmp_path)
    both = load(tmp_path, adapter=paths["projected"])[0]
    assert (both.adapter_names, both.current_adapter) == (["default", "projected"], "projected")
    with both.prefix("default"):
        assert torch.equal(logits(both), logits(alone))


def test_the_command_line_arguments(trained: tuple[int, dict[str, Path]], tmp_path: Path) -> None:
    version, paths = trained
    model, tokenizer = tiny_chat.pair(version)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)

    def names(*given: str) -> tuple[list[str], str | None]:
        arguments = [word for text in given for word in ("--adapter", text)]
        loaded = load_from_arguments(parser.parse_args(["--model", str(tmp_path), *arguments]))[0]
        return loaded.adapter_names, loaded.current_adapter

    assert names() == ([], None)
    assert names(str(paths["lora"])) == (["lora"], "lora")
    assert names(f"adverts={paths['table']}", str(paths["lora"])) == (["adverts", "lora"], "adverts")
    odd = tmp_path / "rank=3.final"
    odd.symlink_to(paths["lora"])
    assert names(str(odd))[0] == ["lora"]
    two = error_of(lambda: names(str(paths["lora"]), f"lora={paths['table']}"), ValueError)
    assert "two adapters are called 'lora'" in two and "--adapter NAME=" in two


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("version", VERSIONS)
def test_lora_saved_by_others_and_read_by_others(version: int, tmp_path: Path) -> None:
    """PEFT's own model class, transformers' save_pretrained, and our files read by both."""
    wrapped = peft.get_peft_model(tiny(version), lora_config(target_modules=LINEARS))
    randomise(wrapped)
    expected = logits(wrapped.get_base_model())
    wrapped.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    model = tiny(version)
    adapters.load_adapter(model, tmp_path / "peft", "one")
    assert torch.equal(logits(model), expected)
    adapters.save_adapter(model, tmp_path / "ours", "nowhere")
    again = peft.PeftModel.from_pretrained(tiny(version), str(tmp_path / "ours"))
    assert torch.equal(logits(again.get_base_model()), expected)
    inner = again.get_base_model()
    with inner.adapter(None):
        assert torch.equal(logits(inner), logits(tiny(version)))
    tiny(version).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*config file in nowhere")
        adapters.save_adapter(model, tmp_path / "named", str(tmp_path / "base"))
    loaded = AutoModel.from_pretrained(tmp_path / "named").eval()
    assert loaded.adapter_names == ["default"]
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_a_failed_save_leaves_the_old_files(
    trained: tuple[int, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, paths = trained
    for name in ("table", "lora"):
        model = tiny(version)
        adapters.load_adapter(model, paths[name])
        folder = tmp_path / name
        adapters.save_adapter(model, folder, "base")
        (folder / "optimizer.pt").write_text("of the trainer")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        randomise(model, 5)

        def full(tensors: Any, path: Path, **kwargs: Any) -> None:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(adapters.saving, "save_file", full)
            assert "No space left" in error_of(lambda m=model, f=folder: adapters.save_adapter(m, f), OSError)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        adapters.save_adapter(model, folder, "base")
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert set(after) == set(before) and after != before and after["optimizer.pt"] == before["optimizer.pt"]


def test_what_there_is_to_save() -> None:
    model = tiny(3)
    assert "no prefix None to save: this model has none" in error_of(
        lambda: adapters.save_prefix(model, "nowhere"), ValueError
    )
    adapters.add_prefix(model, 2, name="one")
    with model.prefix(None):
        assert "has one" in error_of(lambda: adapters.save_adapter(model, "nowhere"), ValueError)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickles_that_run_code_are_refused(file: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was run"),)

    torch.save({"transformer.prefix_encoder.embedding.weight": Evil()}, tmp_path / file)
    if file.startswith("adapter"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    assert "not a file of weights" in error_of(lambda: adapters.load_adapter(tiny(3), tmp_path))
    assert not (tmp_path / "was run").exists()


# ---- the wrong base --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["table", "projected", "lora", "everywhere"])
def test_another_size_or_generation(trained: tuple[int, dict[str, Path]], kind: str, tmp_path: Path) -> None:
    version, paths = trained
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


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    model = tiny(3)
    (tmp_path / "out" / "checkpoint-900").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1000").mkdir()
    assert "did you mean " in (text := error_of(lambda: adapters.load_adapter(model, tmp_path / "out")))
    assert "checkpoint-1000?" in text
    lora = make_lora(tmp_path / "lora", model)
    assert "is a LoRA adapter: load the model it was made for" in error_of(lambda: load(lora))
    prefix = make_prefix(tmp_path / "prefix", model)
    assert "load the model it was trained for (base), with this as adapter" in error_of(lambda: load(prefix))
    config = json.loads((lora / "adapter_config.json").read_text())
    for change, words in (
        ({"peft_type": "PREFIX_TUNING"}, "of type 'PREFIX_TUNING'"),
        ({"modules_to_save": ["output_layer"]}, "replaces whole layers (modules_to_save"),
        ({"r": "three"}, ""),
    ):
        (lora / "adapter_config.json").write_text(json.dumps(config | change))
        assert words in error_of(lambda: adapters.load_adapter(model, lora))
    (lora / "adapter_config.json").write_text("{")
    assert "not valid JSON" in error_of(lambda: adapters.load_adapter(model, lora))
    (lora / "adapter_config.json").write_text(json.dumps(config))
    os.truncate(lora / "adapter_model.safetensors", 999)
    assert "is cut off" in error_of(lambda: adapters.load_adapter(model, lora))
    (lora / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in error_of(lambda: adapters.load_adapter(model, lora))
    assert model.adapter_names == []


@pytest.mark.parametrize("kind", ["table", "lora"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none(
    trained: tuple[int, dict[str, Path]], kind: str, value: float, tmp_path: Path
) -> None:
    version, paths = trained
    folder = Path(shutil.copytree(paths[kind], tmp_path / kind))
    file = folder / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    model = tiny(version)
    message = error_of(lambda: adapters.load_adapter(model, folder))
    assert f"{folder} holds NaN or infinite numbers (in " in message and "take an earlier checkpoint" in message
    assert model.adapter_names == []
    assert error_of(lambda: load(tiny_chat.FOLDERS[version], "cpu", adapter=folder)) == message


def test_names(trained: tuple[int, dict[str, Path]], tmp_path: Path) -> None:
    version, paths = trained
    model = tiny(version)
    for name in ("", "a.b", "a b", "lora_A", "x/y"):
        text = error_of(lambda name=name: adapters.load_adapter(model, paths["lora"], name), ValueError)
        assert "cannot be called" in text
    odd = tmp_path / "rank 3, v1.0"
    odd.symlink_to(paths["lora"])
    assert adapters.load_adapter(model, paths["lora"]) == "lora"
    assert adapters.load_adapter(model, odd) == "lora-2"
    assert adapters.load_adapter(model, paths["table"], "广告") == "广告"
    for name in ("weight", "base_layer", "query_key_value", "lora-2-2", "layers", "0"):
        adapters.load_adapter(model, paths["lora"], name)
        with model.adapter("lora"):
            expected = logits(model)
        assert torch.equal(logits(model), expected)
    for action in (
        lambda: adapters.load_adapter(model, paths["table"], "lora"),
        lambda: adapters.add_prefix(model, 4, name="广告"),
        lambda: adapters.add_lora(model, lora_config(), "广告"),
    ):
        assert "already" in error_of(action, ValueError)


def test_without_peft(
    trained: tuple[int, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, paths = trained
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny(version)
    assert "pip install peft" in error_of(lambda: adapters.load_adapter(model, paths["lora"]))
    adapters.load_adapter(model, paths["table"])
    adapters.save_prefix(model, tmp_path)
    with model.prefix(None):
        logits(model)
    weights_stamp(model)


# ---- training --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fresh_prefix_starts_as_the_originals(version: int, tmp_path: Path) -> None:
    """Torch's own initialisation, also where `from_pretrained` makes the prefix: their learning rates are for it."""
    tiny(version).save_pretrained(tmp_path)
    for projection in (False, True):
        model = tiny(version)
        adapters.add_prefix(model, 64, projection)
        config = AutoConfig.from_pretrained(tmp_path, pre_seq_len=64, prefix_projection=projection)
        for one in (model, AutoModel.from_pretrained(tmp_path, config=config)):
            encoder = one.transformer.prefix_encoder
            assert 0.9 < encoder.embedding.weight.std() < 1.1
            for layer in encoder.trans or ():
                if isinstance(layer, torch.nn.Linear):
                    bound = layer.in_features**-0.5
                    assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound


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


# ---- copies, casts, whole checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4])
def test_copies_and_casts(trained: tuple[int, dict[str, Path]], bits: int) -> None:
    version, paths = trained
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


def test_save_pretrained(trained: tuple[int, dict[str, Path]], tmp_path: Path) -> None:
    """What is saved is what is in use: prefix and all, the base without it, or LoRA as transformers saves it."""
    version, paths = trained
    model = tiny(version)
    adapters.load_adapter(model, paths["projected"])
    adapters.load_adapter(model, paths["table"])
    for name in ("projected", None):
        with model.adapter(name):
            model.save_pretrained(tmp_path / f"{name}")
            again, info = AutoModel.from_pretrained(tmp_path / f"{name}", output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            torch.testing.assert_close(logits(again.eval()), logits(model), rtol=1e-4, atol=1e-4)
    adapters.load_adapter(model, paths["lora"])
    model.name_or_path = str(tmp_path / "None")
    model.peft_config["lora"].base_model_name_or_path = str(tmp_path / "None")
    model.save_pretrained(tmp_path / "lora")
    again = tiny(version)
    adapters.load_adapter(again, tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "everywhere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merged_is_unmerged(trained: tuple[int, dict[str, Path]], kind: str, dtype: torch.dtype) -> None:
    version, paths = trained
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


def test_what_cannot_be_merged(trained: tuple[int, dict[str, Path]], tmp_path: Path) -> None:
    version, paths = trained
    model = tiny(version, bits=4)
    assert "no LoRA adapter None to merge" in error_of(lambda: adapters.merge_lora(model), ValueError)
    adapters.load_adapter(model, paths["lora"])
    assert "full-precision checkpoint" in error_of(lambda: adapters.merge_lora(model), ValueError)
    adapters.load_adapter(model, paths["everywhere"])
    assert "other LoRA adapters (lora)" in error_of(lambda: adapters.merge_lora(model), ValueError)
    assert model.current_adapter == "everywhere"


@pytest.mark.parametrize("version", VERSIONS)
def test_export(version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    base = make_folder(tmp_path / "base", version)
    half = load(base, dtype="float16")[0]
    half.save_pretrained(base)
    model, tokenizer = load(base)
    for name, make in (("lora", make_lora), ("prefix", make_prefix)):
        adapter, out = make(tmp_path / name, model), tmp_path / "out" / name
        assert export.main([str(base), str(adapter), str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "peft", None)
            merged, own = load(out)
        assert own("你好")["input_ids"] == tokenizer("你好")["input_ids"]
        if name == "lora":
            assert merged.adapter_names == []
            assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
        kinds = {key: tensor.dtype for key, tensor in load_file(out / "model.safetensors").items()}
        assert all(kind == (torch.float32 if "prefix" in key else torch.float16) for key, kind in kinds.items())
        adapters.load_adapter(unmerged := load(base)[0], adapter)
        error, change = (logits(merged) - logits(unmerged)).norm(), (logits(unmerged) - logits(model)).norm()
        assert error < 0.02 * change
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
        assert export.main([str(base), str(adapter), str(out)]) == 1
        assert "exists already" in capsys.readouterr().err
    quantised = tmp_path / "int4"
    load(base, quantize=4)[0].save_pretrained(quantised)
    assert export.main([str(quantised), str(tmp_path / "lora"), str(tmp_path / "new")]) == 1
    assert "full-precision checkpoint as BASE" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_folder(tmp_path / "base", 3)
    lora = make_lora(tmp_path / "lora", load(base)[0])

    def full(self: Any, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny(3)), "save_pretrained", full)
    assert "No space left" in error_of(lambda: export.export(base, lora, tmp_path / "out" / "new"), OSError)
    assert list((tmp_path / "out").iterdir()) == []
