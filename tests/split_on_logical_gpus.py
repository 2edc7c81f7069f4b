"""Run by test_utils.py in a separate process: models split over logical GPUs give the results of whole ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
import utils
from chatglm import adapters
from chatglm.loading import NotEnoughMemoryError
from chatglm.loading.placement import sizes_of
from logical_devices import LogicalTensor, logical_gpus
from tiny_folders import make_folder, names_of

BLOCKS = 5
GB = 10**9
VERSIONS = (1, 2, 3)
QUESTION = "你好，今天天气怎么样？"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    return {version: make_folder(base / str(version), version, num_layers=BLOCKS) for version in VERSIONS}


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with logical_gpus(monkeypatch, [80 * GB] * 3), torch.no_grad():
        yield


def whole(folder: Path, **options: Any) -> tuple[Any, Any]:
    return chatglm.load(folder, "cpu", dtype="float32", **options)


def split(folder: Path, *args: Any, **options: Any) -> Any:
    return utils.load_model_on_gpus(folder, *args, **{"dtype": torch.float32} | options)


def blocks_of(model: Any) -> Any:
    return model.get_submodule(model.part_names.blocks)


def device_of(tensor: torch.Tensor) -> str:
    return str(tensor.device)


def same(model: Any, expected: Any, tokenizer: Any) -> bool:
    """Logits for ids on any device, two turns of chat (the second on the kept cache), and a padded batch."""
    ids = tokenizer([QUESTION], return_tensors="pt")["input_ids"]
    logits = expected(ids).logits
    for place in ("cpu", "logical:0", "logical:2"):
        ours = model(ids.to(place)).logits
        assert device_of(ours) == place
        assert torch.allclose(ours.cpu(), logits, atol=1e-4)
    answers = []
    for one in (model, expected):
        history: list[Any] = []
        for question in (QUESTION, "为什么？"):
            _, history = one.chat(tokenizer, question, history=history, do_sample=False, max_new_tokens=3)
        *_, (answer, _) = one.stream_chat(tokenizer, "你好", history=history, do_sample=False, max_new_tokens=3)
        answers.append((answer, history))
    assert answers[0] == answers[1]
    batch = tokenizer([QUESTION, "你好"], return_tensors="pt", padding=True)
    elsewhere = {name: tensor.to("logical:1") for name, tensor in batch.items()}
    ours = model.generate(**elsewhere, do_sample=False, max_new_tokens=2)
    assert ours.tolist() == expected.generate(**batch, do_sample=False, max_new_tokens=2).tolist()
    return True


def test_the_logical_gpus_are_strict() -> None:
    a, b = torch.ones(2, device="logical:0"), torch.ones(2, device="logical:1")
    assert isinstance(a, LogicalTensor)
    with pytest.raises(RuntimeError, match="same device"):
        a + b
    with pytest.raises(RuntimeError, match="same device"):
        a + torch.ones(2)
    assert device_of(a + b.to("logical:0")) == "logical:0"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_split_model_is_the_whole_one(folders: dict[int, Path], version: int) -> None:
    expected, tokenizer = whole(folders[version])
    model = split(folders[version], 3)
    assert device_of(model) == "logical:0"
    placed = [model.hf_device_map[f"{names_of(version).blocks}.{index}"] for index in range(BLOCKS)]
    assert placed == [0, 1, 1, 1, 2]
    ran: list[str] = []
    for block, gpu in zip(blocks_of(model), placed, strict=True):
        assert {device_of(tensor) for tensor in block.parameters()} == {f"logical:{gpu}"}
        block.register_forward_hook(lambda module, args, output: ran.append(device_of(output)))
    assert same(model, expected, tokenizer)
    assert ran[:BLOCKS] == [f"logical:{gpu}" for gpu in placed]


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_unless_told_otherwise(folders: dict[int, Path], version: int) -> None:
    model = utils.load_model_on_gpus(folders[version])
    assert model.dtype == torch.float16
    assert set(model.hf_device_map.values()) == {0, 1}
    one = utils.load_model_on_gpus(folders[version], num_gpus=1)
    assert {device_of(tensor) for tensor in one.parameters()} == {"logical:0"}
    assert one.dtype == torch.float16


@pytest.mark.parametrize("version", VERSIONS)
def test_any_map_of_the_users(folders: dict[int, Path], version: int) -> None:
    expected, tokenizer = whole(folders[version])
    names = names_of(version)
    scattered: dict[str, Any] = {f"{names.blocks}.{index}": (2, 0, 1, "cpu", 0)[index] for index in range(BLOCKS)}
    norm = next(name for name in names.meeting if name.endswith("final_layernorm"))
    scattered |= {names.meeting[0]: 1, norm: 2, "lm_head": 1}
    if version > 1:
        scattered |= {"transformer.output_layer": 0}
    assert same(split(folders[version], device_map=scattered), expected, tokenizer)


@pytest.mark.parametrize("version", [1, 3])
def test_quantised(folders: dict[int, Path], version: int, tmp_path: Path) -> None:
    expected, tokenizer = whole(folders[version], quantize=4)
    assert same(split(folders[version], 3, quantize=4), expected, tokenizer)
    expected.save_pretrained(tmp_path)
    assert same(split(tmp_path, 2), expected, tokenizer)


def make_prefix(folder: Path, path: Path, projection: bool = False) -> Path:
    model, _ = whole(folder)
    encoder = adapters.add_prefix(model, 4, projection)
    torch.save({f"transformer.prefix_encoder.{name}": one for name, one in encoder.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(("version", "projection"), [(1, False), (2, True), (3, False)])
def test_with_a_prefix(folders: dict[int, Path], version: int, projection: bool, tmp_path: Path) -> None:
    path = make_prefix(folders[version], tmp_path / "pytorch_model.bin", projection)
    expected, tokenizer = whole(folders[version], adapter=path)
    model = split(folders[version], 3, adapter=path)
    assert model.base_model.prefix_encoder.embedding.weight.dtype == torch.float32
    assert same(model, expected, tokenizer)
    ids = tokenizer([QUESTION], return_tensors="pt")["input_ids"]
    with model.adapter(None), expected.adapter(None):
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-4)
    # The originals' way: pre_seq_len in the config, and the weights afterwards.
    config = chatglm.ChatGLMConfig.from_pretrained(folders[version], pre_seq_len=4, prefix_projection=projection)
    older = split(folders[version], 3, config=config)
    tensors = {name.removeprefix("transformer.prefix_encoder."): one for name, one in torch.load(path).items()}
    older.transformer.prefix_encoder.load_state_dict(tensors)
    assert older.hf_device_map["transformer.prefix_encoder"] == 0
    assert torch.allclose(older(ids).logits, expected(ids).logits, atol=1e-4)


@pytest.mark.parametrize("version", [1, 3])
def test_with_lora(folders: dict[int, Path], version: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = whole(folders[version])
    config = peft.LoraConfig(target_modules=["query_key_value", "dense"], r=2, init_lora_weights=False)
    adapters.add_lora(model, config)
    adapters.save_adapter(model, tmp_path)
    expected, _ = whole(folders[version], adapter=tmp_path)
    for options in ({}, {"quantize": 4}):
        reference = whole(folders[version], adapter=tmp_path, **options)[0] if options else expected
        model = split(folders[version], 3, adapter=tmp_path, **options)
        for name, tensor in model.named_parameters():
            if ".lora_" in name:
                base = model.get_submodule(name.partition(".lora_")[0]).base_layer
                assert tensor.device == base.weight.device
        assert same(model, reference, tokenizer)


@pytest.mark.parametrize("version", [1, 3])
def test_blocks_in_main_memory_and_on_disk(folders: dict[int, Path], version: int, tmp_path: Path) -> None:
    expected, tokenizer = whole(folders[version])
    sizes = sizes_of(expected, torch.float32)
    room = {0: sizes.meeting + 2 * sizes.block, 1: sizes.block, "cpu": sizes.block}
    model = split(folders[version], 2, max_memory=room, offload_folder=tmp_path)
    placed = [model.hf_device_map[f"{names_of(version).blocks}.{index}"] for index in range(BLOCKS)]
    assert placed == [0, 1, "cpu", "disk", "disk"]
    assert same(model, expected, tokenizer)
    path = make_prefix(folders[version], tmp_path / "pytorch_model.bin")
    expected, _ = whole(folders[version], adapter=path)
    model = split(folders[version], device_map={"": "disk", names_of(version).blocks: 1}, adapter=path)
    assert device_of(model) == device_of(model.base_model.prefix_encoder.embedding.weight) == "logical:1"
    assert same(model, expected, tokenizer)


def test_free_memory_decides_where_it_has_to(folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = whole(folders[3])
    sizes = sizes_of(expected, torch.float32)
    free = [int(1.2 * (sizes.meeting + sizes.block)), int(1.2 * 3.5 * sizes.block)]
    with logical_gpus(monkeypatch, [*free, 80 * GB]):
        model = split(folders[3], 2)
        placed = [model.hf_device_map[f"{names_of(3).blocks}.{index}"] for index in range(BLOCKS)]
        assert placed == [0, 0, 1, 1, 1]
        with pytest.raises(NotEnoughMemoryError, match=r"GPU 0 .* GPU 1 .* quantize=4"):
            split(folders[3], 2, max_memory={0: sizes.meeting, 1: sizes.block})


@pytest.mark.parametrize("offload", [False, True])
def test_it_is_not_moved_or_cast(folders: dict[int, Path], offload: bool) -> None:
    model = split(folders[3], device_map={"": 0, "transformer.encoder.layers.4": "cpu" if offload else 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for move in (model.half, model.cuda, model.float, model.cpu, model.bfloat16, lambda: model.to("logical:1")):
            with pytest.raises(ValueError, match=r"split over devices .*when you load it"):
                move()
    with pytest.raises(ValueError, match="split over devices: give quantize=4"):
        model.quantize(4)
    assert model.eval() is model


def test_more_gpus_than_there_are(folders: dict[int, Path]) -> None:
    with pytest.raises(ValueError, match="num_gpus=4, and this machine has 3 CUDA GPUs"):
        split(folders[3], 4)
    with pytest.raises(ValueError, match=r"GPU 3, and this machine has 3 CUDA GPUs"):
        split(folders[3], device_map={"": 3})


def test_one_device_by_any_name(folders: dict[int, Path]) -> None:
    assert set(split(folders[3], device_map="auto").hf_device_map.values()) == {0, 1, 2}
    for name in (2, "cuda:2", {"": torch.device("cuda", 2)}):
        assert device_of(split(folders[3], device_map=name)) == "logical:2"


def test_the_block_of_the_page_about_python(
    folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "load_model_on_gpus" in block)
    (tmp_path / "THUDM").mkdir()
    (tmp_path / "THUDM" / "chatglm3-6b").symlink_to(folders[3])
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(block, "docs/python.md", "exec"), namespace)
    assert set(namespace["model"].hf_device_map.values()) == {0, 1}
