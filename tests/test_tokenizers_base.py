"""The tokenizer of a folder: which generation's it is, and files that are missing or of another generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chatglm import load
from tiny_folders import make_folder

VERSIONS = (1, 2, 3)
TEXT = "你好, world"


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_without_tokenizer_config(tmp_path: Path, version: int, trust: bool) -> None:
    folder = make_folder(tmp_path / "model", version)
    wanted = load(folder)[1].encode(TEXT)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    assert tokenizer.chatglm_version == version
    assert tokenizer.encode(TEXT) == load(folder)[1].encode(TEXT) == wanted


@pytest.mark.parametrize("version", VERSIONS)
def test_the_choice_of_the_tokenizer_is_not_written_into_configs(tmp_path: Path, version: int) -> None:
    model, _ = load(make_folder(tmp_path / "model", version))
    assert "tokenizer_class" not in model.config.to_diff_dict()


V1_TOKENS = {
    "bos_token": "<sop>", "eop_token": "<eop>", "eos_token": "</s>", "gmask_token": "[gMASK]", "mask_token": "[MASK]",
    "pad_token": "<pad>", "unk_token": "<unk>", "num_image_tokens": 0,
}  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "tokens", [V1_TOKENS, V1_TOKENS | {"eos_token": "<eop>", "end_token": "</s>"}, {"gmask_token": "[gMASK]"}]
)
def test_special_tokens_of_generation_1_in_a_later_folder(
    tmp_path: Path, version: int, tokens: dict[str, object]
) -> None:
    folder = make_folder(tmp_path / "model", version)
    wanted = load(folder)[1]
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["chatglm_version"]
    path.write_text(json.dumps(values | tokens))
    for tokenizer in (load(folder)[1], AutoTokenizer.from_pretrained(folder)):
        assert tokenizer.chatglm_version == version
        assert tokenizer.encode(TEXT) == wanted.encode(TEXT)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (wanted.eos_token_id, wanted.pad_token_id)
        assert tokenizer.get_vocab() == wanted.get_vocab()  # no new ids


def test_the_vocabulary_alone_beside_such_a_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "chatglm2-6b", 2)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(V1_TOKENS))
    assert load(folder)[1].encode(TEXT) == AutoTokenizer.from_pretrained(tmp_path).encode(TEXT)
