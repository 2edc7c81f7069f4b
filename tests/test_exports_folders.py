"""Folders for other engines: the network that transformers' own code makes of them, what is refused, the way back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from chatglm import ChatGLMTokenizer, export, load
from chatglm.checkpoints.adapters import read_adapter
from chatglm.checkpoints.clues import VISUAL
from chatglm.demo import FOLDERS
from chatglm.exports import shards
from chatglm.exports.folders import export_chatglm, export_glm
from tiny_adapters import make_lora, make_prefix
from tiny_folders import error_of, make_folder, to_bin
from tiny_visualglm import tiny_visualglm

VERSIONS = (2, 3)
IDS = torch.tensor([[3, 9, 27, 81, 243, 100, 50, 25]])


def both(folder: Path, out: Path) -> tuple[Any, Any]:
    """Our model and transformers' own."""
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(theirs) is GlmForCausalLM
    return load(folder, dtype="float32")[0], theirs


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize(
    ("version", "changes", "difference"),
    [
        (2, {}, 0.0),
        (3, {}, 0.0),
        (3, {"rope_ratio": 50}, 0.0),
        (3, {"tie_word_embeddings": True}, 0.0),
        (3, {"add_qkv_bias": False}, 0.0),
        (2, {"multi_query_attention": False}, 0.0),
        (2, {"rope_ratio": 8}, 1e-5),  # transformers divides the frequencies, ours the positions
    ],
)
def test_the_logits_are_ours(version: int, changes: dict[str, Any], difference: float, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", version, **changes)
    export_glm(folder, tmp_path / "glm")
    ours, theirs = both(folder, tmp_path / "glm")
    assert (logits(ours) - logits(theirs)).abs().max().item() <= difference
    stops = json.loads((tmp_path / "glm" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == theirs.generation_config.eos_token_id == theirs.config.eos_token_id
    assert len(stops) == {2: 1, 3: 3}[version]
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **greedy), theirs.generate(IDS, **greedy))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_chat_template_gives_the_ids_of_a_chat(version: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", version)
    export_glm(folder, tmp_path / "glm")
    ours, theirs = load(folder)[1], AutoTokenizer.from_pretrained(tmp_path / "glm")
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "你好 philosophy"},
        {"role": "assistant", "content": "  Hello!\n"},
        {"role": "user", "content": "eope?"},
    ]
    tools = [{"name": "weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}]
    for given in ({}, {"tools": tools} if version == 3 else {}):
        options = {"add_generation_prompt": True, "return_dict": False, **given}
        assert theirs.apply_chat_template(messages, **options) == ours.apply_chat_template(messages, **options)
    assert theirs("你好")["input_ids"] == ours("你好")["input_ids"]
    assert theirs.decode(theirs("你好 a")["input_ids"], skip_special_tokens=True) == "你好 a"


def test_a_model_without_chat_training_has_no_template(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3, is_base_model=True)
    export_glm(folder, tmp_path / "glm")
    assert AutoTokenizer.from_pretrained(tmp_path / "glm").chat_template is None
    assert json.loads((tmp_path / "glm" / "config.json").read_text())["eos_token_id"] == [2]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_way_back_is_exact(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "folder", version, rope_ratio=4)
    load(folder, dtype="bfloat16")[0].save_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shards.write_shards, "__defaults__", (20_000,))
        export_glm(folder, tmp_path / "glm")
    assert len(list((tmp_path / "glm").glob("model-*.safetensors"))) > 2
    export_chatglm(tmp_path / "glm", tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    ours, back = load(folder, dtype="float32"), load(tmp_path / "back", dtype="float32")
    assert type(ours[0]) is type(back[0])
    assert torch.equal(logits(ours[0]), logits(back[0]))
    assert ours[1]("你好 a")["input_ids"] == back[1]("你好 a")["input_ids"]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_lora_is_merged_on_the_way(dtype: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3)
    load(folder, dtype=dtype)[0].save_pretrained(folder)
    lora = make_lora(tmp_path / "lora", load(folder)[0])
    export.export(folder, lora, tmp_path / "merged")
    export_glm(tmp_path / "merged", tmp_path / "in two steps")
    assert export.main([str(folder), str(tmp_path / "at once"), "--to", "glm", "--adapter", str(lora)]) == 0
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("in two steps", "at once"))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


def test_files_of_torch_save_and_other_names(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3, shard="20KB")
    export_glm(folder, tmp_path / "first")
    to_bin(folder)
    export_glm(folder, tmp_path / "second")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize(
    ("version", "changes", "reason"),
    [
        (1, {}, "two-dimensional positions"),
        (3, {"pre_seq_len": 4}, "P-tuning prefix"),
        (3, {"quantization_bit": 4}, "export the full-precision checkpoint, or"),
        (2, {"add_bias_linear": True}, "add_bias_linear = True"),
        (2, {"rmsnorm": False}, "rmsnorm = False"),
        (2, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
        (2, {"fp32_residual_connection": True}, "fp32_residual_connection = True"),
        (2, {"post_layer_norm": False}, "post_layer_norm = False"),
        (3, {"rope_precision": "original"}, "rope_precision = 'original'"),
    ],
)
def test_what_has_no_place_there(version: int, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", version, **changes)
    assert reason in error_of(lambda: export_glm(folder, tmp_path / "glm"), ValueError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize("to", ("glm", "gguf"))
def test_visualglm_has_no_place_there(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1], chatglm_version=VISUAL)
    tiny_visualglm(tokenizer).save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    assert export.main([str(tmp_path / "folder"), str(tmp_path / "out"), "--to", to]) == 1
    assert "VisualGLM-6B runs in no other engine" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_adapters_that_have_no_place_there(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3)
    model = load(folder)[0]
    prefix, lora = read_adapter(make_prefix(tmp_path / "prefix", model)), make_lora(tmp_path / "lora", model)
    assert "P-tuning prefix" in error_of(lambda: export_glm(folder, tmp_path / "glm", prefix), ValueError)
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    assert "--to merged first" in error_of(lambda: export_glm(folder, tmp_path / "glm", read_adapter(lora)), ValueError)
    other = make_folder(tmp_path / "other", 3, num_layers=1)
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    assert "another model" in error_of(lambda: export_glm(other, tmp_path / "glm", read_adapter(lora)), ValueError)
    assert not (tmp_path / "glm").exists()


def test_a_missing_tensor_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = make_folder(tmp_path / "folder", 3)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "mlp.down_proj.weight" in error_of(lambda: export_glm(folder, tmp_path / "glm"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from chatglm.exports.folders import export_glm
export_glm(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda *told: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is posix's")
def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "folder", 3), tmp_path / "glm"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)], check=False)
    assert done.returncode == -9
    assert not out.exists()
    assert [path.parent.name for path in tmp_path.glob("*/config.json")] == ["folder"]
    export_glm(folder, out)  # leftovers are no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "glm"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "folder", 3)
    assert export.main([str(folder), str(tmp_path / "glm"), "--to", "glm"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "glm")
    assert export.main([str(folder), str(tmp_path / "glm"), "--to", "glm"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert export.main([str(tmp_path / "glm"), str(tmp_path / "back"), "--to", "chatglm"]) == 0
    assert export.main([str(folder), str(tmp_path / "other"), "--to", "chatglm"]) == 1
    assert "is not a GlmForCausalLM" in capsys.readouterr().err
    for wrong in (["a"], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c", "--adapter", "d"]):
        with pytest.raises(SystemExit):
            export.main(wrong)
