"""chatglm.load: what it returns, which arguments it refuses, and that it checks the memory first."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import chatglm
from chatglm.checkpoints import memory
from chatglm.checkpoints.files import Weights, find_weights
from chatglm.loading import NotEnoughMemoryError, choose_dtype, load
from chatglm.loading.dtypes import HEADROOM
from deviations import DEVIATIONS
from tiny_folders import error_of, make_folder, to_bin

pytestmark = pytest.mark.usefixtures("no_network")


# ------------------------------------------------------------------------------------------------ what it gives


def test_without_arguments_it_is_the_bundled_demo() -> None:
    model, tokenizer = load()
    assert Path(model.name_or_path) == Path(chatglm.__file__).parent / "demo" / "chatglm3-demo"
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
    begin = classmethod(lambda *args, **kwargs: pytest.fail("it began to load"))
    monkeypatch.setattr(chatglm.ChatGLM3ForConditionalGeneration, "from_pretrained", begin)
    weights = find_weights(whole_folder)
    text = error_of(lambda: load(whole_folder), NotEnoughMemoryError)
    assert f"needs about {memory.readable(int(weights.elements * 4 * HEADROOM))}" in text
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
    weights = Weights((), frozenset(), 6_243_584_000, 0, torch.float16)
    assert choose_dtype("auto", torch.device("cpu"), weights) is expected


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
    weights = Weights((), frozenset(), 6_243_584_000, 0, stored)
    assert choose_dtype("auto", torch.device(device), weights) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(any_folder: Path) -> None:
    model, tokenizer = load(any_folder)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("cuda", torch.float16)}
    assert model.chat(tokenizer, "你好", max_new_tokens=4)


# ------------------------------------------------------------------------------------------------------ speed


def test_the_demo_is_ready_within_seconds() -> None:
    code = "import time, chatglm; chatglm.load(); print(time.process_time())"  # of this process, whatever others take
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 30  # about 5 on an idle machine


@pytest.mark.parametrize("with_auto_class", [True, False], ids=["named", "default"])
def test_classes_registered_for_saving(any_folder: Path, with_auto_class: bool, tmp_path: Path, caplog: Any) -> None:
    """Programs for the originals do this before training; code that needs our package is not copied."""
    assert DEVIATIONS["saved_folders_hold_no_code"]
    model, tokenizer = load(any_folder)
    names = ("AutoConfig", "AutoTokenizer", "AutoModel")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for thing, name in zip((model.config, tokenizer, model), names, strict=True):
            type(thing).register_for_auto_class(*[name] * with_auto_class)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage().count("does nothing") for record in caplog.records] == [1, 1, 1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()
    again, _ = load(tmp_path)
    assert again.config.chatglm_version == model.config.chatglm_version


def test_another_format_of_weights_is_not_promised(any_folder: Path, tmp_path: Path, caplog: Any) -> None:
    model, _ = load(any_folder)
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert not caplog.records
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "torch.save(model.state_dict()" in caplog.records[-1].getMessage()
    assert (tmp_path / "model.safetensors").is_file()
