"""utils.py: which maps are refused, and that a split model equals the whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
import utils
from tiny_folders import make_folder, names_of, to_bin

HERE = Path(__file__).parent
VERSIONS = (1, 2, 3)


# ---- loading without a GPU -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    return {version: make_folder(base / str(version), version, num_layers=3) for version in VERSIONS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("num_gpus", [0, 1, 2])
def test_no_gpu_at_all(folders: dict[int, Path], num_gpus: int) -> None:
    with pytest.raises(ValueError, match=r"torch sees 0 CUDA GPUs on this machine: use chatglm\.load"):
        utils.load_model_on_gpus(folders[3], num_gpus)
    with pytest.raises(ValueError, match="GPU 1, and this machine has 0 CUDA GPUs"):
        utils.load_model_on_gpus(folders[3], device_map={"": "cpu", "transformer.encoder.layers.1": 1})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("version", VERSIONS)
def test_blocks_on_disk(folders: dict[int, Path], version: int, kind: str, tmp_path: Path) -> None:
    folder = folders[version] if kind == "safetensors" else to_bin(make_folder(tmp_path / "bin", version, num_layers=3))
    whole, tokenizer = chatglm.load(folder, "cpu")
    options = {"offload_folder": tmp_path / "offload"} if kind == "bin" else {}
    model = utils.load_model_on_gpus(folder, device_map={"": "cpu", f"{names_of(version).blocks}.1": "disk"}, **options)
    assert model.dtype == torch.float32  # as chatglm.load on a CPU: half precision is for GPUs
    assert {one.device.type for one in model.get_submodule(f"{names_of(version).blocks}.1").parameters()} == {"meta"}
    ids = tokenizer(["你好"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=1e-5)  # products of its own
    turns: list[list[Any]] = [[], []]
    for one, steps in zip((model, whole), turns, strict=True):
        for question in ("你好", "为什么？", "好吗？"):
            history = steps[-1].history if steps else []
            *_, step = one.stream_steps(tokenizer, question, history, do_sample=False, max_new_tokens=4)
            steps.append(step)
    assert [step.text for step in turns[0]] == [step.text for step in turns[1]]
    assert [step.cached_tokens for step in turns[0]] == [step.cached_tokens for step in turns[1]]
    with pytest.raises(ValueError, match=r"split over devices \(cpu, disk\)"):
        model.half()


@pytest.mark.parametrize("version", [1, 3])
def test_a_quantised_checkpoint_on_disk(folders: dict[int, Path], version: int, tmp_path: Path) -> None:
    whole, tokenizer = chatglm.load(folders[version], "cpu", quantize=4)
    whole.save_pretrained(tmp_path)
    ids = tokenizer(["你好"], return_tensors="pt")["input_ids"]
    for device_map in ("disk", {"": "cpu", names_of(version).blocks: "disk"}):
        model = utils.load_model_on_gpus(tmp_path, device_map=device_map)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "cpu", "transformer.layer.0": "disk"}, "does not have .transformer.layer.0.$"),
        ({"": "cpu", "transformer.layers.0": "disk"}, "map for another generation"),
        ({"": "cpu", "transformer.encoder.layers.0.mlp": "disk"}, "splits a block .*name whole blocks"),
        ({"transformer.embedding": "cpu"}, "says nothing about .*final_layernorm.* more.*''"),
        ({"": "fast"}, "'fast': give a GPU's number, 'cpu' or 'disk'"),
        ({"": -1}, "GPU -1"),
        ({"": True}, "is True"),
        ({"": None}, "is None"),
    ],
)
def test_maps_that_do_not_fit(folders: dict[int, Path], device_map: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        utils.load_model_on_gpus(folders[3], device_map=device_map)


def test_maps_that_cannot_work(folders: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are one matrix in this model"):
        utils.load_model_on_gpus(folders[1], device_map={"": "cpu", "lm_head": "disk"})
    with pytest.raises(ValueError, match="quantise and save the model once"):
        utils.load_model_on_gpus(folders[3], device_map="disk", quantize=4)
    binary = to_bin(make_folder(tmp_path / "bin", 3))
    with pytest.raises(ValueError, match="give offload_folder"):
        utils.load_model_on_gpus(binary, device_map="disk")


def test_what_load_refuses_is_refused_here(folders: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use 4, 8, or None"):
        utils.load_model_on_gpus(folders[3], device_map="cpu", quantize=0)
    asks = make_folder(tmp_path / "asks", 3)
    config = json.loads((asks / "config.json").read_text())
    (asks / "config.json").write_text(json.dumps(config | {"pre_seq_len": 5}))
    with pytest.raises(chatglm.loading.ModelLoadError, match="asks for a P-tuning prefix"):
        utils.load_model_on_gpus(asks, device_map="cpu")
    for options in ({"pre_seq_len": 4}, {"config": chatglm.ChatGLMConfig.from_pretrained(folders[3], pre_seq_len=4)}):
        model = utils.load_model_on_gpus(folders[3], device_map="cpu", **options)  # to be filled, as the originals do
        assert model.transformer.prefix_encoder.pre_seq_len == 4


def test_one_device(folders: dict[int, Path]) -> None:
    model = utils.load_model_on_gpus(folders[3], device_map="cpu", dtype="float16", trust_remote_code=True)
    assert model.half() is model  # in one piece: nothing is refused
    assert model.dtype == torch.float16
    given = {"": "cpu"}
    assert not utils.load_model_on_gpus(folders[1], 2, given).is_split
    assert given == {"": "cpu"}


PEAK = """
import json, re, sys
from threading import Event, Thread
import utils
from transformers import AutoModel  # what loading imports by itself is no weight

def now():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    while not done.wait(0.002):
        peak.append(now())

for options in json.loads(sys.argv[2]):
    done, before, peak = Event(), now(), [0]
    watcher = Thread(target=watch)
    watcher.start()
    model = utils.load_model_on_gpus(sys.argv[1], **options)
    done.set()
    watcher.join()
    print("PEAK", max(peak) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_copy_of_all_weights_in_memory(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 3, num_layers=24, hidden_size=512, ffn_hidden_size=1536)
    size = (folder / "model.safetensors").stat().st_size
    ways = [{"device_map": "disk"}, {"device_map": "cpu", "quantize": 4}]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), json.dumps(ways)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    on_disk, quantised = (int(line.split()[1]) / size for line in done.stdout.splitlines() if line[:4] == "PEAK")
    assert on_disk < 0.5
    assert quantised < 0.7


# ---- several devices -------------------------------------------------------------------------------------------------


def test_on_logical_gpus() -> None:
    """All of split_on_logical_gpus.py, in a separate process, where torch permanently gets an accelerator."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb=short", "-p", "no:cacheprovider",
         "split_on_logical_gpus.py"], cwd=HERE, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("options", [{}, {"quantize": 4}])
@pytest.mark.parametrize("version", VERSIONS)
def test_on_two_gpus(folders: dict[int, Path], version: int, options: dict[str, Any]) -> None:
    whole, tokenizer = chatglm.load(folders[version], "cuda:0", dtype="float32", **options)
    model = utils.load_model_on_gpus(folders[version], 2, dtype=torch.float32, **options)
    assert {tensor.device.index for tensor in model.parameters()} == {0, 1}
    ids = tokenizer(["你好"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, whole(ids.cuda()).logits.cpu(), atol=1e-3)
    answers = [one.chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=8) for one in (model, whole)]
    assert answers[0] == answers[1]
