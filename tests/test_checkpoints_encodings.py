"""JSON files that an editor of Windows has saved: read by chatglm.load and by the Auto classes as plain UTF-8 is."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig

from chatglm import load
from chatglm.checkpoints.encodings import open_json
from chatglm.doctor.folder import look
from tiny_folders import error_of, make_folder

pytestmark = pytest.mark.usefixtures("no_network")

ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")
FILES = (
    "config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def encode(file: Path, encoding: str) -> None:
    file.write_bytes(file.read_text(encoding="utf-8").encode(encoding) if file.is_file() else "{}".encode(encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_json_file(version: int, encoding: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", version)
    plain = load(folder)[1]("你好 1+1", return_tensors=None)
    settings = GenerationConfig.from_pretrained(folder).to_dict()
    for name in FILES:
        encode(folder / name, encoding)
    model, tokenizer = load(folder)
    assert tokenizer("你好 1+1") == plain
    assert model.generation_config.to_dict() == settings
    assert AutoConfig.from_pretrained(folder).to_dict() == model.config.to_dict()
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("你好 1+1") == plain
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(model)
    assert {finding.status for finding in look(str(folder), "en", "cpu")} == {"ok"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_index_of_shards(encoding: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 2, shard="20KB")
    encode(folder / "model.safetensors.index.json", encoding)
    load(folder)
    AutoModel.from_pretrained(folder)


def test_other_files_are_opened_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": "好"}', encoding="utf-8")
    with open_json(file, encoding="utf-8") as stream:
        assert json.loads(stream.read()) == {"a": "好"}
    with open_json(tmp_path / "b.json", "w", encoding="utf-16") as stream:
        stream.write("[]")
    assert (tmp_path / "b.json").read_bytes() == "[]".encode("utf-16")
    (tmp_path / "a.txt").write_bytes("\ufeffa".encode("utf-8"))
    with open_json(tmp_path / "a.txt", encoding="utf-8") as stream:
        assert stream.read() == "\ufeffa"
    assert open is builtins.open


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "{'a': 1}".encode("utf-16"), '{"a": "好"}'.encode("gbk")])
def test_a_broken_file_is_still_named(content: bytes, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 3)
    (folder / "config.json").write_bytes(content)
    assert f"{folder / 'config.json'} is not valid JSON" in error_of(lambda: load(folder))
    with pytest.raises(OSError, match=r"config\.json"):
        AutoConfig.from_pretrained(folder)
