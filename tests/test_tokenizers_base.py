"""The tokenizer of a folder: which generation's it is, and files that are missing or of another generation."""

from __future__ import annotations

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
