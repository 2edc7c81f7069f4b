"""Folders as five years of tools have left them, each with one thing odd: every one loads right, or says what is wrong.

Three generations x what is odd, written by four tools in turn. To add a row, write a function with `@odd`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from chatglm import load
from chatglm.checkpoints.files import ModelLoadError
from tiny_folders import make_folder

pytestmark = pytest.mark.usefixtures("no_network")

Tensors = dict[str, torch.Tensor]
NAME = {1: "THUDM/chatglm-6b", 2: "THUDM/chatglm2-6b", 3: "THUDM/chatglm3-6b"}
TEXT = "你好，今天 1+1=2"


def edit(file: Path, **changes: Any) -> None:
    """Fields of a JSON file; ... takes one out."""
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")


def write_shards(folder: Path, tensors: Tensors, suffix: str) -> None:
    """Two weight files and their index."""
    stem, save = ("pytorch_model", torch.save) if suffix == "bin" else ("model", save_file)
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    files = [f"{stem}-0000{part}-of-00002.{suffix}" for part in (1, 2)]
    for half, file in zip(halves, files, strict=True):
        save(half, folder / file)
    weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
    content = {"metadata": {"total_size": sum(one.nbytes for one in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))


def read_weights(folder: Path) -> Tensors:
    """All tensors; takes the files away."""
    tensors: Tensors = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        file.unlink()
    for index in folder.glob("*.index.json"):
        index.unlink()
    return tensors


# --------------------------------------------------------------------------------------------------------- the tools


def by_the_originals(folder: Path, version: int) -> None:
    """A published repository: shards of torch.save, code beside them, names and no stated generation."""
    edit(folder / "config.json", chatglm_version=..., _name_or_path=NAME[version], torch_dtype="float16", dtype=...)
    edit(folder / "tokenizer_config.json", chatglm_version=..., name_or_path=NAME[version])
    write_shards(folder, read_weights(folder), "bin")
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('code of the checkpoint was run')")


def by_transformers_4(folder: Path, version: int) -> None:
    """`save_pretrained` after a training: one file, the path of the base on another machine."""
    name = NAME[version].partition("/")[2]
    edit(
        folder / "config.json", chatglm_version=..., dtype=..., torch_dtype="float32", transformers_version="4.30.2",
        _name_or_path=f"/data/models/{name}", auto_map={"AutoModel": f"{NAME[version]}--modeling_chatglm.ChatGLMModel"},
    )  # fmt: skip
    edit(folder / "tokenizer_config.json", chatglm_version=..., model_max_length=1000000000000000019884624838656)
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"_from_model_config": true, "transformers_version": "4.30.2"}')
    torch.save(read_weights(folder), folder / "pytorch_model.bin")


def by_this_project(folder: Path, version: int) -> None:
    """As `save_pretrained` leaves it."""


def by_llama_factory(folder: Path, version: int) -> None:
    """A merged fine-tune: shards in safetensors, the template it was trained with, files of the training."""
    edit(folder / "config.json", chatglm_version=..., _name_or_path=NAME[version])
    template = "{{ '<|user|>' }}" if version == 3 else "{{ '[Round 1]' }}问："
    edit(folder / "tokenizer_config.json", chatglm_version=..., chat_template=template, padding_side="left")
    write_shards(folder, read_weights(folder), "safetensors")
    torch.save({"learning_rate": 1}, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text("{}")


TOOLS = (by_the_originals, by_transformers_4, by_this_project, by_llama_factory)

# --------------------------------------------------------------------------------------------------------- what is odd

#: What a function makes odd, and the words of the line it is refused with; None: it loads.
ODD: list[tuple[Callable[[Path, int], None], str | None]] = []


def odd(words: str | None = None) -> Callable[[Callable[[Path, int], None]], Callable[[Path, int], None]]:
    def add(function: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
        ODD.append((function, words))
        return function

    return add


@odd()
def nothing(folder: Path, version: int) -> None:
    pass


@odd()
def byte_order_marks(folder: Path, version: int) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


@odd()
def utf_16(folder: Path, version: int) -> None:
    for file in folder.glob("*.json"):
        file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))


@odd()
def no_tokenizer_config(folder: Path, version: int) -> None:
    (folder / "tokenizer_config.json").unlink()


@odd()
def tokens_of_another_generation(folder: Path, version: int) -> None:
    of_1 = {"eos_token": "<eop>", "bos_token": "<sop>", "pad_token": "<pad>", "gmask_token": "[gMASK]"}
    tokens = {"additional_special_tokens": ["<|user|>"]} if version == 1 else {**of_1, "num_image_tokens": 0}
    edit(folder / "tokenizer_config.json", **tokens)


@odd()
def numbers_as_strings(folder: Path, version: int) -> None:
    values = json.loads((folder / "config.json").read_text())
    texts = {name: str(value) for name, value in values.items() if isinstance(value, (bool, int, float))}
    edit(folder / "config.json", **texts)


@odd()
def shards_without_an_index(folder: Path, version: int) -> None:
    write_shards(folder, read_weights(folder), "bin")
    (folder / "pytorch_model.bin.index.json").unlink()


@odd()
def a_stale_index(folder: Path, version: int) -> None:
    tensors = read_weights(folder)
    write_shards(folder, tensors, "safetensors")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


@odd()
def an_index_without_metadata(folder: Path, version: int) -> None:
    write_shards(folder, read_weights(folder), "safetensors")
    edit(folder / "model.safetensors.index.json", metadata=...)


@odd()
def names_of_ddp(folder: Path, version: int) -> None:
    torch.save({f"module.{name}": one for name, one in read_weights(folder).items()}, folder / "pytorch_model.bin")


@odd()
def a_checkpoint_of_deepspeed(folder: Path, version: int) -> None:
    torch.save({"module": read_weights(folder), "global_steps": 100}, folder / "pytorch_model.bin")


@odd()
def a_value_head(folder: Path, version: int) -> None:
    tensors = read_weights(folder) | {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")


@odd()
def files_of_windows_and_editors(folder: Path, version: int) -> None:
    (folder / "desktop.ini").write_bytes(b"\xff\xfe[")
    (folder / "config.json~").write_text("{")
    (folder / "新建 文本文档.txt").write_text("说明", encoding="gbk")


@odd("to {rows} in config.json")
def larger_embeddings(folder: Path, version: int) -> None:
    tensors = read_weights(folder)
    for name, one in tensors.items():
        if "word_embeddings" in name or "lm_head" in name or "output_layer" in name:
            tensors[name] = torch.cat((one, one[:8]))
    save_file(tensors, folder / "model.safetensors")


@odd("lack tensors of the model (transformer.")
def a_lost_tensor(folder: Path, version: int) -> None:
    tensors = read_weights(folder)
    del tensors[next(name for name in tensors if "final_layernorm.weight" in name)]
    torch.save(tensors, folder / "pytorch_model.bin")


@odd("are quantised to 4 bits")
def quantised_without_a_word(folder: Path, version: int) -> None:
    config = (folder / "config.json").read_bytes()
    model, _ = load(folder, quantize=4)
    read_weights(folder)
    model.save_pretrained(folder)
    (folder / "config.json").write_bytes(config)


@odd("they are not: remove quantization_bit")
def said_to_be_quantised(folder: Path, version: int) -> None:
    edit(folder / "config.json", quantization_bit=8)


@odd("is cut off")
def half_a_download(folder: Path, version: int) -> None:
    save_file(read_weights(folder), folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@odd("1 of 2 weight files of pytorch_model.bin.index.json are not in")
def a_missing_shard(folder: Path, version: int) -> None:
    write_shards(folder, read_weights(folder), "bin")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


@odd("is only a git-lfs pointer")
def a_pointer_of_git(folder: Path, version: int) -> None:
    read_weights(folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 198\n")


@odd("has no {vocabulary}")
def no_vocabulary(folder: Path, version: int) -> None:
    for file in folder.glob("*.model"):
        file.unlink()


# ---------------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[int], torch.Tensor]]:
    """For each generation a folder, the ids of a text, and the logits they give."""
    root, found = tmp_path_factory.mktemp("whole"), {}
    for version in (1, 2, 3):
        folder = make_folder(root / f"g{version}", version)
        model, tokenizer = load(folder)
        ids = tokenizer(TEXT)["input_ids"]
        found[version] = (folder, ids, logits(model, ids))
    return found


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([ids])).logits
    return result


ROWS = [
    pytest.param(version, TOOLS[(number + version) % len(TOOLS)], make, words, id=f"v{version}-{make.__name__}")
    for version in (1, 2, 3)
    for number, (make, words) in enumerate(ODD)
]


def test_there_are_sixty() -> None:
    assert len(ROWS) >= 60
    pairs = {(row.values[0], row.values[1]) for row in ROWS}
    assert pairs == {(version, tool) for version in (1, 2, 3) for tool in TOOLS}


@pytest.mark.parametrize(("version", "tool", "make_odd", "words"), ROWS)
def test_an_odd_folder(
    version: int,
    tool: Callable[[Path, int], None],
    make_odd: Callable[[Path, int], None],
    words: str | None,
    whole: dict[int, tuple[Path, list[int], torch.Tensor]],
    tmp_path: Path,
) -> None:
    source, ids, expected = whole[version]
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    tool(folder, version)
    make_odd(folder, version)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*value head of a training with RLHF", UserWarning)
        if words is None:
            for model, tokenizer in (
                load(folder),
                (AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)),
            ):  # fmt: skip
                assert model.config.chatglm_version == tokenizer.chatglm_version == version
                assert tokenizer(TEXT)["input_ids"] == ids
                torch.testing.assert_close(logits(model.float(), ids), expected)
                response, _ = model.chat(tokenizer, "你好", history=[], max_new_tokens=2)
                assert isinstance(response, str)
            return
        values = json.loads((folder / "config.json").read_text())
        rows = values["vocab_size" if version == 1 else "padded_vocab_size"] + 8
        vocabulary = "ice_text.model" if version == 1 else "tokenizer.model"
        with pytest.raises(ModelLoadError) as caught:
            load(folder)
        assert words.format(rows=rows, vocabulary=vocabulary) in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises((OSError, RuntimeError, ValueError)):  # nothing made of random numbers
            AutoTokenizer.from_pretrained(folder)
            AutoModel.from_pretrained(folder)
            raise AssertionError("loaded all the same")
