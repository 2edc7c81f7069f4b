"""chatglm.load: what it gives, and one clear line for every folder that cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm
from chatglm import loading, memory
from chatglm.checkpoint_files import find_weights
from chatglm.loading import ModelLoadError, NotEnoughMemoryError, load
from tiny_folders import DEMOS, make_folder, to_bin

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 1980000000\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"something wants to reach the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("CHATGLM_MODEL", raising=False)


@pytest.fixture(scope="session", params=[1, 2, 3], ids=["v1", "v2", "v3"])
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder of each generation; for reading only."""
    return make_folder(tmp_path_factory.mktemp("any") / f"v{request.param}", request.param)


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "tiny", 3)


@pytest.fixture
def folder(whole_folder: Path, tmp_path: Path) -> Path:
    """A folder to break."""
    return Path(shutil.copytree(whole_folder, tmp_path / "broken"))


def error_of(call: Callable[[], Any], kind: type[Exception] = ModelLoadError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------ what it gives


def test_without_arguments_it_is_the_bundled_demo() -> None:
    model, tokenizer = load()
    assert Path(model.name_or_path) == DEMOS / "chatglm3-demo"
    assert tokenizer.chatglm_version == model.config.chatglm_version == 3
    assert not model.training


def test_the_environment_names_the_model(any_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATGLM_MODEL", str(any_folder))
    model, tokenizer = load()
    assert Path(model.name_or_path) == any_folder
    assert f"v{tokenizer.chatglm_version}" == any_folder.name


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("torch_files", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_kind_of_weight_file_gives_the_same_numbers(
    tmp_path: Path, version: int, torch_files: bool, shard: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "model", version, shard=shard)
    before = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert len(list(folder.glob("*.safetensors"))) == 1 or shard == "40KB"
    if torch_files:
        to_bin(folder)
    capfd.readouterr()
    model, _ = load(folder, device="cpu", dtype="float32")
    state = model.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("fp16", torch.float16), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_dtype(whole_folder: Path, dtype: Any, expected: torch.dtype) -> None:
    model, _ = load(whole_folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_a_tilde_is_the_home_folder(whole_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(whole_folder.parent))
    monkeypatch.setenv("USERPROFILE", str(whole_folder.parent))
    assert load(f"~/{whole_folder.name}")[1].chatglm_version == 3


def test_a_relative_folder_that_looks_like_a_hub_id_is_a_folder(
    whole_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole_folder.parent.parent)
    assert load(whole_folder.relative_to(Path.cwd()))[1].chatglm_version == 3


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    load(folder)


def test_load_is_public() -> None:
    assert chatglm.load is load


# ------------------------------------------------------------------------------------------------- wrong folders


def test_missing_folder(tmp_path: Path) -> None:
    text = error_of(lambda: load(tmp_path / "nowhere"))
    assert f"no folder {tmp_path / 'nowhere'}" in text


def test_a_file_is_no_folder(folder: Path) -> None:
    assert "give the folder" in error_of(lambda: load(folder / "model.safetensors"))


def test_empty_folder(tmp_path: Path) -> None:
    assert "no config.json" in error_of(lambda: load(tmp_path))


def test_the_folder_above_names_the_right_one(folder: Path) -> None:
    assert f"did you mean the folder {folder}?" in error_of(lambda: load(folder.parent))


def test_folder_of_another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in error_of(lambda: load(folder))


@pytest.mark.parametrize("content", ["{", "[]", ""], ids=["cut off", "a list", "empty"])
def test_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in error_of(lambda: load(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights (model.safetensors, pytorch_model.bin" in error_of(lambda: load(folder))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 3, shard="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    text = error_of(lambda: load(folder))
    assert f"1 of {len(shards)} weight files" in text
    assert shards[1].name in text


def test_index_without_a_map(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 3, shard="40KB")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "model.safetensors.index.json has no weight_map" in error_of(lambda: load(folder))


@pytest.mark.parametrize("left", [4, 100, 0.5, -1], ids=["4 bytes", "in the header", "half", "last byte"])
def test_cut_off_safetensors(folder: Path, left: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left) if 0 < left < 1 else int(left)])
    text = error_of(lambda: load(folder))
    assert str(path) in text
    assert "download it again" in text
    if left in (0.5, -1):
        assert f"of {len(whole)} bytes" in text


def test_safetensors_with_something_at_the_end(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "is broken" in error_of(lambda: load(folder))


@pytest.mark.parametrize("left", [100, 0.5, -1], ids=["100 bytes", "half", "last byte"])
def test_cut_off_bin(folder: Path, left: float) -> None:
    path = to_bin(folder) / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left) if 0 < left < 1 else int(left)])
    text = error_of(lambda: load(folder))
    assert f"{path} is cut off" in text


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><title>404</title>", b"\x80\x02garbage", b"\0" * 1000])
@pytest.mark.parametrize("torch_file", [False, True], ids=["safetensors", "bin"])
def test_weights_that_are_something_else(folder: Path, content: bytes, torch_file: bool) -> None:
    path = folder / "model.safetensors"
    if torch_file:
        path = to_bin(folder) / "pytorch_model.bin"
    path.write_bytes(content)
    assert str(path) in error_of(lambda: load(folder))


def test_code_in_a_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "it_ran"),))

    path = to_bin(folder) / "pytorch_model.bin"
    torch.save({"transformer.output_layer.weight": Evil()}, path)
    assert str(path) in error_of(lambda: load(folder))
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_git_lfs_pointers(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS_POINTER)
    text = error_of(lambda: load(folder))
    assert f"{folder / name} is only a git-lfs pointer" in text
    assert "git lfs pull" in text


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_empty_files(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    assert f"{folder / name} is empty" in error_of(lambda: load(folder))


def test_no_vocabulary(any_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(any_folder, tmp_path / any_folder.name))
    vocabulary = next(folder.glob("*.model"))
    vocabulary.unlink()
    assert f"has no {vocabulary.name}" in error_of(lambda: load(folder))


def test_broken_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"no vocabulary" * 100)
    assert "cannot read the tokenizer files" in error_of(lambda: load(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_hidden_size": 80}))
    text = error_of(lambda: load(folder))
    assert "do not fit together" in text
    assert "layers.0.mlp.dense_4h_to_h.weight: (32, 48) in the file, (32, 80) by config.json" in text


def test_a_lost_tensor_is_an_error_and_not_noise(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = error_of(lambda: load(folder))
    assert "lack tensors of the model (transformer.encoder.layers.1.mlp.dense_4h_to_h.weight)" in text
    assert capfd.readouterr() == ("", "")


def test_weights_of_a_deeper_model_are_not_cut_down_in_silence(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    text = error_of(lambda: load(folder))
    assert "hold tensors that config.json has no place for (transformer.encoder.layers.1.input_layernorm" in text
    assert "and 4 more" in text


# ---------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:x", ""])
def test_device_that_is_not_there(whole_folder: Path, device: str) -> None:
    assert "'auto'" in error_of(lambda: load(whole_folder, device=device), ValueError)


@pytest.mark.parametrize("dtype", ["int8", "double precision", torch.int8])
def test_dtype_that_holds_no_weights(whole_folder: Path, dtype: Any) -> None:
    assert "float32" in error_of(lambda: load(whole_folder, dtype=dtype), ValueError)


@pytest.mark.parametrize("bits", [0, 2, 16, "4"])
def test_quantize_takes_4_and_8(whole_folder: Path, bits: Any) -> None:
    assert "use 4, 8" in error_of(lambda: load(whole_folder, quantize=bits), ValueError)


def test_revision_of_a_folder(whole_folder: Path) -> None:
    assert "hub ids" in error_of(lambda: load(whole_folder, revision="main"), ValueError)


# ------------------------------------------------------------------------------------------------------- memory


def test_too_little_memory_is_said_before_loading(whole_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 20_000)
    monkeypatch.setattr(loading, "build_model", lambda *args, **kwargs: pytest.fail("it began to load"))
    weights = find_weights(whole_folder)
    text = error_of(lambda: load(whole_folder), NotEnoughMemoryError)
    assert f"needs about {memory.readable(int(weights.elements * 4 * loading.HEADROOM))}" in text
    assert f"{memory.readable(20_000)} are available" in text
    assert "dtype='bfloat16'" in text


def test_the_check_can_be_left_out(whole_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 20_000)
    assert load(whole_folder, check_memory=False)[0] is not None


def test_unknown_memory_is_no_reason_to_refuse(whole_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: None)
    assert load(whole_folder)[0] is not None


@pytest.mark.parametrize(
    ("capabilities", "room", "expected"),
    [
        ({"avx512_bf16": True}, 64, torch.bfloat16),
        ({"amx_bf16": True}, 64, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, 64, torch.float32),
        ({"avx2": True}, 16, torch.bfloat16),  # slow, but float32 would not fit
        ({"avx2": True}, None, torch.float32),
    ],
)
def test_auto_dtype_of_6b_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], room: int | None, expected: torch.dtype
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: room and room * 2**30)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    weights = loading.Weights((), frozenset(), 6_243_584_000, 0, torch.float16)
    assert loading.choose_dtype("auto", torch.device("cpu"), weights) is expected


@pytest.mark.parametrize(
    ("device", "stored", "bf16", "expected"),
    [
        ("cuda", torch.float16, True, torch.float16),
        ("cuda", torch.bfloat16, True, torch.bfloat16),
        ("cuda", torch.bfloat16, False, torch.float16),
        ("cuda", torch.float32, True, torch.float16),
        ("mps", torch.bfloat16, True, torch.float16),
    ],
)
def test_auto_dtype_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, stored: torch.dtype, bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    weights = loading.Weights((), frozenset(), 6_243_584_000, 0, stored)
    assert loading.choose_dtype("auto", torch.device(device), weights) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(any_folder: Path) -> None:
    model, tokenizer = load(any_folder)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("cuda", torch.float16)}
    assert model.chat(tokenizer, "你好", max_new_tokens=4)


# ------------------------------------------------------------------------------------------------- P-tuning prefix


@pytest.fixture(scope="session", params=[(1, False), (1, True), (2, False), (2, True), (3, False)], ids=str)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A base folder, the folder of a prefix for it as the originals' trainers write it, and the prefix length."""
    version, projection = request.param
    root = tmp_path_factory.mktemp("tuned")
    with_prefix = make_folder(root / "tuned", version, pre_seq_len=5, prefix_projection=projection)
    base = make_folder(root / "base", version)
    tensors = load_file(with_prefix / "model.safetensors")
    prefix = {name: tensor for name, tensor in tensors.items() if ".prefix_encoder." in name}
    assert len(prefix) == (5 if projection else 1)
    (with_prefix / "model.safetensors").unlink()
    torch.save(prefix, with_prefix / "pytorch_model.bin")
    return base, with_prefix, 5


@pytest.mark.parametrize("kind", ["folder", "bin", "safetensors"])
def test_prefix_is_found_out_from_the_file(tuned: tuple[Path, Path, int], kind: str, tmp_path: Path) -> None:
    base, adapter, length = tuned
    expected = torch.load(adapter / "pytorch_model.bin", weights_only=True)
    if kind == "bin":
        adapter = adapter / "pytorch_model.bin"
    elif kind == "safetensors":
        adapter = tmp_path / "model.safetensors"
        save_file(expected, adapter)
    model, _ = load(base, adapter=adapter, dtype="bfloat16")
    assert model.config.pre_seq_len == length
    loaded = model.transformer.prefix_encoder.state_dict()
    assert len(loaded) == len(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name.split("prefix_encoder.")[1]], tensor, rtol=0, atol=0)
    assert model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_prefix_changes_the_answer(tuned: tuple[Path, Path, int]) -> None:
    base, adapter, _ = tuned
    outputs = []
    for model, tokenizer in (load(base), load(base, adapter=adapter)):
        inputs = tokenizer("你好", return_tensors="pt")
        with torch.no_grad():
            outputs.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(*outputs)


def test_prefix_for_another_model(tuned: tuple[Path, Path, int], tmp_path: Path) -> None:
    base, adapter, _ = tuned
    version = int(json.loads((base / "config.json").read_text())["chatglm_version"])
    other = make_folder(tmp_path / "other", version, num_layers=3)
    assert "is for another model" in error_of(lambda: load(other, adapter=adapter))


def test_a_prefix_is_no_model(tuned: tuple[Path, Path, int]) -> None:
    assert "is a P-tuning prefix: load the model it was trained for" in error_of(lambda: load(tuned[1]))


def test_a_prefix_that_config_asks_for_and_nobody_has(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pre_seq_len": 5}))
    assert "adapter=" in error_of(lambda: load(folder))


def test_a_model_is_no_prefix(whole_folder: Path) -> None:
    assert "no P-tuning checkpoint" in error_of(lambda: load(whole_folder, adapter=whole_folder))


def test_missing_prefix(whole_folder: Path, tmp_path: Path) -> None:
    assert "no prefix checkpoint" in error_of(lambda: load(whole_folder, adapter=tmp_path / "nothing.bin"))
    assert "holds no prefix" in error_of(lambda: load(whole_folder, adapter=tmp_path))


def test_lora_is_not_a_prefix(whole_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA" in error_of(lambda: load(whole_folder, adapter=tmp_path))


# ------------------------------------------------------------------------------------------------------ speed


def test_the_demo_is_ready_within_seconds() -> None:
    code = "import time; start = time.monotonic(); import chatglm; chatglm.load(); print(time.monotonic() - start)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert float(run.stdout) < 30  # about 5 on an idle machine; the bound is for one that is busy
