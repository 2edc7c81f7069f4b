"""utils.py: where blocks go, which maps are refused, and that a model in parts is the whole one."""

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
from chatglm.placement import NAMES, Plan, Sizes, even_split, plan, to_bytes
from deviations import DEVIATIONS
from tiny_folders import make_folder, to_bin

HERE = Path(__file__).parent
VERSIONS = (1, 2, 3)
#: Numbers of GPUs of which the originals leave none idle: blocks for each, of 28.
ORIGINALS = {
    1: [28], 2: [13, 15], 3: [8, 10, 10], 4: [6, 8, 8, 6], 5: [4, 6, 6, 6, 6], 6: [3, 5, 5, 5, 5, 5],
    8: [2, 4, 4, 4, 4, 4, 4, 2], 10: [1] + [3] * 9, 15: [0] + [2] * 14,
}  # fmt: skip


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", range(1, 33))
def test_blocks_as_the_originals_split_them(gpus: int) -> None:
    """Theirs: the embeddings and the head count as two blocks on GPU 0, and the next one begins at 30 / gpus."""
    theirs, used = [0], 2
    for _ in range(28):
        if used >= 30 / gpus:
            theirs, used = [*theirs, 0], 0
        theirs[-1] += 1
        used += 1
    assert (len(theirs) == gpus) == (gpus in ORIGINALS)
    if gpus in ORIGINALS:
        assert even_split(28, gpus) == theirs == ORIGINALS[gpus]
    else:
        assert DEVIATIONS["no_gpu_is_left_idle"] and len(even_split(28, gpus)) == gpus


@pytest.mark.parametrize("blocks", [1, 4, 28, 40])
@pytest.mark.parametrize("gpus", range(1, 33))
def test_any_number_of_gpus(gpus: int, blocks: int) -> None:
    counts = even_split(blocks, gpus)
    assert len(counts) == gpus
    assert sum(counts) == blocks
    assert min(counts) >= 0
    share = (blocks + 2) / gpus  # embeddings and head count as a block each
    used = [counts[0] + 2, *counts[1:]]
    assert all(units < share + 1 for units in used[1:])
    assert used[0] < max(share + 1, 2.001)
    if gpus <= blocks:
        assert all(used)


@pytest.mark.parametrize("gpus", range(1, 33))
@pytest.mark.parametrize("version", VERSIONS)
def test_every_block_once_and_in_order(gpus: int, version: int) -> None:
    made = utils.auto_configure_device_map(gpus, version)
    names = NAMES[version]
    assert list(made) == [*names.meeting, *(f"{names.blocks}.{index}" for index in range(28))]
    assert {made[name] for name in names.meeting} == {0}
    devices = [made[f"{names.blocks}.{index}"] for index in range(28)]
    assert devices == sorted(devices)
    assert set(devices) | {0} == set(range(min(gpus, 29)))


def test_the_keys_of_the_originals() -> None:
    assert {"transformer.word_embeddings", "transformer.final_layernorm", "lm_head", "transformer.layers.27"} <= set(
        utils.auto_configure_device_map(2, 1)
    )
    for version in (2, 3):
        assert {
            "transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer",
            "transformer.rotary_pos_emb", "lm_head", "transformer.prefix_encoder", "transformer.encoder.layers.27",
        } <= set(utils.auto_configure_device_map(2, version))  # fmt: skip
    assert utils.auto_configure_device_map(2) == utils.auto_configure_device_map(num_gpus=2, model=3)


SIZES = Sizes(meeting=30, block=10, blocks=28)


@pytest.mark.parametrize(
    ("room", "meeting", "shares"),
    [
        ({0: 160, 1: 150}, 0, {0: 13, 1: 15}),  # even fits: as the originals
        ({0: 100, 1: 400}, 0, {0: 3, 1: 25}),  # in proportion: 60 of 100 and 250 of 400
        ({0: 400, 1: 100}, 0, {0: 22, 1: 6}),
        ({0: 20, 1: 300, 2: 300}, 1, {0: 1, 1: 12, 2: 15}),  # the first GPU holds no embeddings
        ({0: 0, 1: 400, 2: 400}, 1, {0: 0, 1: 13, 2: 15}),
        ({0: 100, 1: 100, "cpu": 1000}, 0, {0: 6, 1: 10, "cpu": 12}),  # a block less on GPU 0: room for guests
        ({0: 100, 1: 100, "cpu": 50, "disk": float("inf")}, 0, {0: 6, 1: 10, "cpu": 5, "disk": 7}),
    ],
)
def test_memory_decides_where_even_does_not_fit(
    room: dict[int | str, float], meeting: int, shares: dict[int | str, int]
) -> None:
    placed = plan(SIZES, room)
    counts = {device: count for device, count in placed.shares if count or device in shares}
    assert (placed.meeting, counts) == (meeting, shares)
    for device, limit in room.items():
        assert counts.get(device, 0) * 10 + (30 if device == meeting else 0) <= limit


@pytest.mark.parametrize("room", [{0: 100, 1: 100}, {0: 20, 1: 20}, {0: 100, "cpu": 100}, {0: 0}])
def test_what_does_not_fit_is_said_with_numbers(room: dict[int | str, float]) -> None:
    with pytest.raises(chatglm.loading.NotEnoughMemoryError, match=r"the weights take .* GPU 0 .* quantize=4"):
        plan(Sizes(30 << 20, 10 << 20, 28), {device: size * 2**20 for device, size in room.items()})


def test_sizes_of_the_published_models() -> None:
    first = chatglm.ChatGLM1Config(
        vocab_size=130528, hidden_size=4096, num_layers=28, num_attention_heads=32, inner_hidden_size=16384
    )
    third = chatglm.ChatGLM3Config()
    for config, parameters in ((first, 6173286400), (third, 6243584000)):
        model = chatglm.placement.skeleton(config)
        sizes = chatglm.placement.sizes_of(model, torch.float16)
        tables = sum(tensor.nbytes for tensor in model.buffers())
        assert sizes.total == 2 * parameters + tables
    quarter = chatglm.placement.skeleton(third, chatglm.ChatGLMQuantizationConfig(4))
    assert chatglm.placement.sizes_of(quarter, torch.float16).block < 0.26 * sizes.block
    made = utils.auto_configure_device_map(2, third, {0: "4GiB", 1: "10GiB"})
    devices = [made[f"transformer.encoder.layers.{index}"] for index in range(28)]
    assert 4 < devices.count(0) < devices.count(1)
    assert "lm_head" not in made
    assert "transformer.prefix_encoder" not in made
    assert third.quantization_bit == 0
    tuned = chatglm.ChatGLM3Config(pre_seq_len=128)
    assert utils.auto_configure_device_map(2, tuned)["transformer.prefix_encoder"] == 0


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("5B", 5), ("10GiB", 10 << 30), ("1.5 GB", 1500000000), ("20mb", 20000000), ("0MB", 0)]
)
def test_limits_as_transformers_takes_them(text: int | str, size: int) -> None:
    assert to_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_gpus is 0"),
        ((2.5,), "num_gpus is 2.5"),
        ((2, 4), "no generation 4"),
        ((2, 3, {0: "1GiB"}), "give the config"),
        ((2, chatglm.ChatGLM3Config(num_layers=2), {5: "1GiB"}), "max_memory names 5: use 0, 1, 'cpu' and 'disk'"),
        ((2, chatglm.ChatGLM3Config(num_layers=2), {0: "much"}), "'much' is no size"),
        ((2, chatglm.ChatGLM3Config(num_layers=2), {0: -1}), "-1 is no size"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        utils.auto_configure_device_map(*arguments)


def test_a_plan_names_its_devices() -> None:
    assert plan(SIZES, {0: 310}) == Plan(0, [(0, 28)])


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
    model = utils.load_model_on_gpus(folder, device_map={"": "cpu", f"{NAMES[version].blocks}.1": "disk"}, **options)
    assert model.dtype == torch.float32  # as chatglm.load on a CPU: half precision is for GPUs
    assert {one.device.type for one in model.get_submodule(f"{NAMES[version].blocks}.1").parameters()} == {"meta"}
    ids = tokenizer(["你好"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
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
    for device_map in ("disk", {"": "cpu", NAMES[version].blocks: "disk"}):
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
        [sys.executable, "-c", PEAK, str(folder), json.dumps(ways)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    on_disk, quantised = (int(line.split()[1]) / size for line in done.stdout.splitlines() if line[:4] == "PEAK")
    assert on_disk < 0.5
    assert quantised < 0.7


# ---- several devices -------------------------------------------------------------------------------------------------


def test_on_logical_gpus() -> None:
    """All of split_on_logical_gpus.py, in a process of its own: torch gets an accelerator there, for good."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "split_on_logical_gpus.py"],
        cwd=HERE, capture_output=True, text=True, timeout=600, check=False,
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
