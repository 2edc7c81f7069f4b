"""python -m chatglm.doctor FOLDER: folders of every generation and kind, whole and damaged in every way we know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm import load
from chatglm.adapters import add_lora, add_prefix, save_adapter
from chatglm.doctor import __main__ as command
from chatglm.doctor import folder as folder_module
from chatglm.doctor.findings import Finding
from conftest import SHARED, needs_shared
from tiny_folders import make_folder, to_bin

GOLDENS = Path(__file__).parent / "data" / "goldens"
DEMOS = Path(folder_module.__file__).parents[1] / "demo"


def look(path: Path | str, language: str = "en") -> dict[str, Finding]:
    """The findings by name; of several with one name, the first that is not ok."""
    found: dict[str, Finding] = {}
    for finding in folder_module.look(str(path), language, "cpu"):
        if finding.name not in found or found[finding.name].status == "ok":
            found[finding.name] = finding
    return found


def wrong(path: Path | str) -> list[str]:
    return [finding.text for finding in folder_module.look(str(path), "en", "cpu") if finding.status == "wrong"]


def edit(path: Path, **changes: Any) -> None:
    """Fields of a JSON file; ... takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture(params=[1, 2, 3])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def whole(version: int, tmp_path: Path) -> Path:
    return make_folder(tmp_path / "folder", version)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Of generation 3, in several files with an index."""
    folder = make_folder(tmp_path / "folder", 3, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


# -------------------------------------------------------------------------------------------------------------- whole


def test_a_whole_folder(whole: Path, version: int) -> None:
    found = look(whole)
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["generation"].data == {
        "generation": version, "evidence": "chatglm_version", "model_name": whole.name
    }  # fmt: skip
    model, tokenizer = load(whole)
    assert found["parameters"].data["parameters"] == model.num_parameters()
    assert found["parameters"].data["layers"] == 2
    assert found["files"].data["files"] == [
        {"name": "model.safetensors", "bytes": (whole / "model.safetensors").stat().st_size}
    ]
    assert list(found["dtypes"].data["dtypes"]) == ["float32"]
    assert found["tokenizer"].data == {"vocabulary": len(tokenizer)}
    sizes = found["memory"].data["memory"]
    assert list(sizes) == ["float32", "float16", "INT8", "INT4"]
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    assert "whole" in found


def test_bin_files(whole: Path) -> None:
    found = look(to_bin(whole))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["files"].data["files"][0]["name"] == "pytorch_model.bin"


def test_shards(shards: Path) -> None:
    found = look(shards)
    assert {finding.status for finding in found.values()} == {"ok"}
    assert len(found["files"].data["files"]) == len(list(shards.glob("*.safetensors")))
    assert "files of" in found["files"].text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_folder(whole: Path, bits: int, tmp_path: Path) -> None:
    full = look(whole)
    model, tokenizer = load(whole, quantize=bits)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    found = look(tmp_path / "small")
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["quantisation"].data == {"bits": bits}
    assert found["parameters"].data["parameters"] == full["parameters"].data["parameters"]
    assert found["dtypes"].data["integer_bytes"] > 0
    assert list(found["memory"].data["memory"]) == ["float32", "float16"]


def test_the_memory_is_what_loading_compares(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = look(whole)["memory"].data["memory"]
    for dtype, quantize, size in (("float32", None, sizes["float32"]), ("float16", 4, sizes["INT4"])):
        monkeypatch.setattr("chatglm.checkpoints.memory.available", lambda device, size=size: size)
        load(whole, "cpu", dtype, quantize=quantize)
        monkeypatch.setattr("chatglm.checkpoints.memory.available", lambda device, size=size: size - 1)
        with pytest.raises(OSError, match="are available"):
            load(whole, "cpu", dtype, quantize=quantize)


def test_a_machine_that_is_too_small(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatglm.checkpoints.memory.available", lambda device: 10)
    memory = look(whole)["memory"]
    assert memory.status == "note"
    assert memory.text.count("does not fit") == 4
    monkeypatch.setattr("chatglm.checkpoints.memory.available", lambda device: None)
    assert look(whole)["memory"].status == "ok"


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_goldens(name: str) -> None:
    found = look(GOLDENS / name / "model")
    assert found["generation"].data["generation"] == int(name[1])
    assert "whole" in found
    assert {key for key, finding in found.items() if finding.status == "wrong"} == {"tokenizer"}  # it has none


@pytest.mark.parametrize("name", ["chatglm-demo", "chatglm3-demo"])
def test_demos(name: str) -> None:
    assert {finding.status for finding in look(DEMOS / name).values()} == {"ok"}


PUBLISHED = {
    "chatglm-6b": (1, "inner_hidden_size", 6_173_286_400), "chatglm-6b-v1.0": (1, "inner_hidden_size", 6_255_206_400),
    "chatglm-6b-int4": (1, "inner_hidden_size", 6_255_206_400), "chatglm2-6b": (2, "THUDM/chatglm2-6b", 6_243_584_000),
    "chatglm3-6b": (3, "THUDM/chatglm3-6b", 6_243_584_000),
    "chatglm3-6b-32k-int4": (3, "THUDM/chatglm3-6b-32k", 6_243_584_000),
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_without_their_weights(name: str) -> None:
    found = look(SHARED / "checkpoints" / name)
    generation, evidence, parameters = PUBLISHED[name]
    assert (found["generation"].data["generation"], found["generation"].data["evidence"]) == (generation, evidence)
    assert found["parameters"].data["parameters"] == parameters
    assert found["files"].status == "wrong"
    assert ("quantisation" in found) == ("int4" in name)
    if "int4" not in name:
        assert found["tokenizer"].status == "ok"
        assert "are missing: pytorch_model-00001-of-0000" in found["files"].text
        assert "INT4" in found["memory"].text  # its memory is estimated all the same
    assert "unknown_fields" not in found


@needs_shared
@pytest.mark.parametrize(("name", "field"), [("codegeex2-6b", "rotary_percent")])
def test_fields_that_nothing_here_reads(name: str, field: str) -> None:
    found = look(SHARED / "checkpoints" / name)["unknown_fields"]
    assert found.status == "note"
    assert field in found.data["fields"]


# ---------------------------------------------------------------------------------------------------- which generation


@pytest.mark.parametrize(
    ("changes", "generation", "status", "words"),
    [
        ({}, 3, "ok", "config.json: chatglm_version = 3"),
        ({"_name_or_path": "THUDM/chatglm2-6b"}, 3, "note", "(although config.json: _name_or_path = THUDM/"),
        ({"chatglm_version": ..., "_name_or_path": "THUDM/chatglm2-6b"}, 2, "ok", "_name_or_path = THUDM/chatglm2-6b"),
        ({"chatglm_version": ..., "_name_or_path": "mine"}, 3, "note", "a guess, it may be 2 or 3: write"),
    ],
)
def test_why_a_generation(
    changes: dict[str, Any], generation: int, status: str, words: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "folder", 3, seq_length=2048)
    edit(folder / "config.json", **changes)
    edit(folder / "tokenizer_config.json", chatglm_version=...)
    found = look(folder)["generation"]
    assert (found.data["generation"], found.status) == (generation, status)
    assert words in found.text


def test_the_name_of_the_folder_says_which_generation(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-chatglm2-tuned", 3)
    edit(folder / "config.json", chatglm_version=...)
    found = look(folder)["generation"]
    assert (found.data["generation"], found.data["evidence"], found.status) == (3, "chatglm_version", "note")
    assert "tokenizer_config.json: chatglm_version = 3 (although path: my-chatglm2-tuned)" in found.text
    edit(folder / "tokenizer_config.json", chatglm_version=...)
    found = look(folder)["generation"]
    assert (found.data["generation"], found.data["evidence"], found.status) == (2, "my-chatglm2-tuned", "ok")


def test_all_evidence_is_listed(version: int, whole: Path) -> None:
    (whole / "modeling_chatglm.py").write_text("[Round {}]\\n\\n" if version == 2 else "")
    found = look(whole)["evidence"]
    listed = {clue["clue"]: clue["generations"] for clue in found.data["clues"]}
    assert listed["config.json: chatglm_version = " + str(version)] == [version]
    vocabulary, fitting = ("ice_text.model", [1, 11]) if version == 1 else ("tokenizer.model", [2, 3, 4])
    assert listed[f"path: {vocabulary}"] == fitting
    assert any(clue.startswith("model.safetensors: ") for clue in listed)
    assert ("modeling_chatglm.py: [Round {}]\\n\\n" in listed) == (version == 2)
    assert all(clue in found.text for clue in listed)
    assert "依据" in look(whole, "zh")["evidence"].text


def test_the_checks_before_loading(version: int, whole: Path) -> None:
    """The doctor says what `chatglm.load` says of weights that do not fit config.json."""
    key = "vocab_size" if version == 1 else "padded_vocab_size"
    rows = json.loads((whole / "config.json").read_text())[key]
    edit(whole / "config.json", **{key: rows - 8})
    assert f"set {key} to {rows} in config.json" in look(whole)["fit"].text
    edit(whole / "config.json", **{key: rows})
    load(whole, quantize=4)[0].save_pretrained(whole)
    edit(whole / "config.json", quantization_bit=..., quantization_config=...)
    assert "are quantised to 4 bits" in look(whole)["fit"].text


def test_a_base_model_is_called_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3, is_base_model=True)
    assert "without chat training" in look(folder)["parameters"].text


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix(whole: Path, projection: bool, tmp_path: Path) -> None:
    model, _ = load(whole)
    add_prefix(model, 5, projection)
    save_adapter(model, tmp_path / "prefix", base="the base")
    for path in (tmp_path / "prefix", tmp_path / "prefix" / "model.safetensors"):
        (finding,) = folder_module.look(str(path), "en")
        assert finding.status == "ok"
        assert {"kind": "prefix", "positions": 5, "base": "the base"}.items() <= finding.data.items()
        assert finding.data["parameters"] == sum(one.numel() for one in model.base_model.prefix_encoder.parameters())
    model.save_pretrained(tmp_path / "both")
    found = look(tmp_path / "both")
    assert found["prefix"].text == "with a P-tuning prefix of 5 positions"
    assert "whole" in found


def test_a_prefix_as_the_original_training_leaves_it(whole: Path, tmp_path: Path) -> None:
    model, _ = load(whole)
    add_prefix(model, 5)
    tensors = model.base_model.prefix_encoder.state_dict()
    state = {f"transformer.prefix_encoder.{name}": tensor for name, tensor in tensors.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        (finding,) = folder_module.look(str(path), "en")
        assert finding.data["positions"] == 5
    shutil.copy(whole / "config.json", tmp_path)
    edit(tmp_path / "config.json", pre_seq_len=5)
    (finding,) = folder_module.look(str(tmp_path), "en")
    assert finding.data["positions"] == 5


def test_a_prefix_that_is_asked_for_and_not_there(whole: Path) -> None:
    edit(whole / "config.json", pre_seq_len=7)
    (text,) = wrong(whole)
    assert "asks for a P-tuning prefix of 7 positions but the weights contain none" in text


def test_a_lora_adapter(whole: Path, tmp_path: Path) -> None:
    model, _ = load(whole)
    add_lora(model, peft.LoraConfig(r=3, target_modules=["query_key_value"]))
    save_adapter(model, tmp_path / "lora", base="the base")
    (finding,) = folder_module.look(str(tmp_path / "lora"), "en")
    assert finding.status == "ok"
    assert {"kind": "lora", "r": 3, "base": "the base"}.items() <= finding.data.items()
    assert "query_key_value" in finding.text
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (text,) = wrong(tmp_path / "lora")
    assert f"{weights} is cut off" in text


# ------------------------------------------------------------------------------------------------------ damaged files


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert wrong(tmp_path / "nowhere") == [f"there is no folder {tmp_path / 'nowhere'}"]
    assert "no config.json" in wrong(tmp_path)[0]
    make_folder(tmp_path / "inside", 1)
    assert "did you mean" in wrong(tmp_path)[0]
    assert "give the folder that holds" in wrong(tmp_path / "inside" / "model.safetensors")[0]
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in wrong(tmp_path)[0]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "only 'chatglm'" in wrong(tmp_path)[0]


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (text,) = wrong("someone/chatglm3-6b")
    assert "as a hub id it is not on this machine either" in text
    repository, commit = tmp_path / "hub" / "models--someone--chatglm3-6b", "0" * 40
    make_folder(repository / "snapshots" / commit, 3)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = look("someone/chatglm3-6b")
    assert found["hub_cache"].status == "ok"
    assert "whole" in found


def test_missing_shards(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    for file in files[1:3]:
        file.unlink()
    (text,) = wrong(shards)
    assert f"2 of the {len(files)} files that model.safetensors.index.json lists are missing" in text
    assert all(file.name in text for file in files[1:3])
    assert len(look(shards)["files"].text) < 400


def test_several_damaged_shards_are_all_named(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"")
    files[2].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    files[3].write_bytes(b"\xff" * 200)
    texts = wrong(shards)
    said = ("is cut off: it has", "is empty", "git-lfs pointer", "not a safetensors")
    for file, words in zip(files[:4], said, strict=True):
        assert any(str(file) in text and words in text for text in texts), (words, texts)
    assert len(texts) == 4


def test_an_index_that_does_not_fit_its_files(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = list(content["weight_map"])
    content["weight_map"]["transformer.another"] = content["weight_map"].pop(names[0])
    content["metadata"]["total_size"] += 5
    index.write_text(json.dumps(content))
    found = look(shards)
    assert (found["index_missing"].status, found["index_extra"].status) == ("wrong", "note")
    assert "transformer.another" in found["index_missing"].text
    assert names[0] in found["index_extra"].text
    assert found["index_size"].status == "note"
    for broken in ("{", '{"weight_map": 3}', '{"weight_map": {"a": 5}}'):
        index.write_text(broken)
        assert any(str(index) in text for text in wrong(shards)), broken


@pytest.mark.parametrize("change", ["missing", "extra", "size"])
def test_weights_that_do_not_fit_config_json(whole: Path, change: str) -> None:
    file = whole / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "query_key_value.weight" in name)
    if change == "missing":
        del state[name]
    elif change == "extra":
        state["transformer.image_encoder.weight"] = torch.zeros(3)
    else:
        state[name] = state[name][:-1].contiguous()
    save_file(state, file, metadata={"format": "pt"})
    (text,) = wrong(whole)
    assert {"extra": "image_encoder"}.get(change, name) in text
    assert ("values, not" in text) == (change == "size")


def test_more_layers_in_config_json_than_in_the_weights(whole: Path) -> None:
    edit(whole / "config.json", num_layers=4)
    (text,) = wrong(whole)
    assert "the weights lack" in text
    assert " more" in text


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_not_quantised_as_config_json_says(whole: Path, bits: int) -> None:
    edit(whole / "config.json", quantization_bit=bits)
    assert any("weight_scale" in text for text in wrong(whole))


def test_another_quantisation(whole: Path) -> None:
    edit(whole / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    (text,) = wrong(whole)
    assert "quantised by gptq" in text


def test_a_config_that_describes_no_network(whole: Path) -> None:
    edit(whole / "config.json", hidden_size=-3)
    texts = wrong(whole)
    assert len(texts) == 1
    assert texts[0].startswith("config.json: ")
    assert "\n" not in texts[0]


def test_a_config_of_an_unknown_generation(whole: Path) -> None:
    edit(whole / "config.json", chatglm_version=7)
    assert any("chatglm_version must be 1, 2, 3 or 4, or 11" in text for text in wrong(whole))


@pytest.mark.parametrize("damage", ["gone", "pointer", "text", "cut"])
def test_vocabularies(whole: Path, damage: str) -> None:
    (file,) = whole.glob("*.model")
    if damage == "gone":
        file.unlink()
    else:
        content = {"pointer": b"version https://git-lfs.github.com/spec/v1\n", "text": b"IQ== 0\n" * 99}
        file.write_bytes(content.get(damage, file.read_bytes()[:5000]))
    (text,) = wrong(whole)
    assert file.name in text


def test_a_vocabulary_that_is_larger_than_the_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3, padded_vocab_size=1000)
    (text,) = wrong(folder)
    assert "the tokenizer has 2,409 tokens, the model only 1,000" in text


def test_what_lies_about(whole: Path) -> None:
    (whole / "pytorch_model.bin").write_bytes(b"old")
    (whole / "model-00002.safetensors.incomplete").write_bytes(b"half")
    (whole / "generation_config.json").write_text("{")
    found = look(whole)
    assert (found["not_read"].status, found["unfinished"].status) == ("note", "note")
    assert "pytorch_model.bin" in found["not_read"].text
    assert "generation_config.json is not valid JSON" in found["generation_config"].text


class Harmful:
    """What a pickle could bring along: code that runs when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


def test_code_in_a_pickle_is_not_run(whole: Path, tmp_path: Path) -> None:
    to_bin(whole)
    torch.save({"weight": Harmful(tmp_path / "run")}, whole / "pytorch_model.bin")
    (text,) = wrong(whole)
    assert "pytorch_model.bin is not a file of weights" in text
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command(whole: Path, version: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(whole), "--no-checks", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"][0]["generation"] == version
    (whole / "config.json").unlink()
    assert command.main([str(whole), "--no-checks", "--lang", "zh"]) == 1
    out = capsys.readouterr().out
    assert f"文件夹 {whole}" in out
    assert "1 处错误" in out


def test_in_chinese(shards: Path) -> None:
    (shards / "model-00001.safetensors.incomplete").touch()
    sorted(shards.glob("*.safetensors"))[0].unlink()
    texts = [finding.text for finding in folder_module.look(str(shards), "zh", "cpu")]
    assert all(any("一" <= letter <= "龥" for letter in text) for text in texts)
