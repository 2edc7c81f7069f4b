"""GLM-4's tokenizer against the original's, and its folders."""

from __future__ import annotations

import base64
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chatglm import ChatGLM4Tokenizer, ChatGLMTokenizer
from chatglm.tokenizers import byte_level
from conftest import SHARED, needs_shared
from deviations import DEVIATIONS
from tiny_glm4 import make_vocabulary

PUBLISHED = SHARED / "checkpoints" / "glm-4-9b-chat"


@cache
def golden() -> Any:
    return json.loads((SHARED / "goldens" / "tokenizer" / "glm4.json").read_text(encoding="utf-8"))


@cache
def published() -> Any:
    return ChatGLM4Tokenizer.from_pretrained(PUBLISHED)


def bytes_of(token: Any) -> bytes:
    """Tokens of the goldens are bytes in base64, control tokens strings."""
    return base64.b64decode(token["b64"]) if isinstance(token, dict) else token.encode()


def own_bytes(token: str) -> bytes:
    return token.encode() if token in published().commands else bytes(map(byte_level.BYTES_BY_NAME.get, token))


@needs_shared
def test_texts() -> None:
    tokenizer = published()
    for entry in golden()["strings"]:
        ids = entry["ids_text_only"]
        assert DEVIATIONS["typed_control_tokens_stay_text"]
        assert tokenizer.encode_text(entry["text"]) == ids, entry["text"]
        assert tokenizer(entry["text"])["input_ids"] == [151331, 151333, *ids]
        assert tokenizer(entry["text"], add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == entry["decode_text_only"] == entry["text"]
        assert tokenizer.decode([151331, 151333, *ids], skip_special_tokens=True) == entry["text"]
        if "[" not in entry["text"] and "<" not in entry["text"]:
            assert tokenizer.encode(entry["text"]) == entry["ids"]
        typed = tokenizer(entry["text"], add_special_tokens=False, split_special_tokens=False)["input_ids"]
        assert typed == entry["ids_no_special"], entry["text"]


@needs_shared
def test_tokens_and_special_tokens() -> None:
    tokenizer, wanted = published(), golden()
    assert (tokenizer.vocab_size + 0, len(tokenizer)) == (wanted["len"], wanted["len"])
    for index, token in wanted["id_to_token"].items():
        if "ok" in token:
            found = tokenizer.convert_ids_to_tokens(int(index))
            assert (own_bytes(found) if found else b"") == (bytes_of(token["ok"]) if token["ok"] else b""), index
    for index, text in wanted["single_id_decode"].items():
        if "ok" in text:
            assert tokenizer.decode([int(index)]) == text["ok"], index
    for token, index in wanted["token_to_id"].items():
        if "ok" in index:
            assert tokenizer.convert_tokens_to_ids(token) == index["ok"]
        else:
            with pytest.raises(KeyError):
                tokenizer.convert_tokens_to_ids(token)
    for name, value in wanted["special"].items():
        assert getattr(tokenizer, name) == value["ok"], name
    assert wanted["added_tokens_encoder"] == tokenizer.commands
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", wanted["model_max_length"])
    assert tokenizer.get_prefix_tokens() == wanted["get_prefix_tokens"]
    single = wanted["build_inputs_with_special_tokens"]["single"]
    assert tokenizer.build_inputs_with_special_tokens(single[2:]) == single


@needs_shared
def test_sequences_of_ids() -> None:
    tokenizer = published()
    for entry in golden()["id_sequences"]:
        if not any(index > 151328 for index in entry["ids"]):  # 4.42 puts blanks around control tokens
            assert tokenizer.decode(entry["ids"]) == entry["decode"]["ok"]
        found = tokenizer.convert_ids_to_tokens(entry["ids"])
        assert [own_bytes(token) if token else b"" for token in found] == [
            bytes_of(token) if token else b"" for token in entry["tokens"]["ok"]
        ]
    assert DEVIATIONS["no_blanks_around_control_tokens"]
    assert tokenizer.decode([151331, 151333, 109377]) == "[gMASK]<sop>你好"


@needs_shared
def test_calls() -> None:
    tokenizer = published()
    for call in golden()["calls"]:
        wanted = call["result"].get("ok")
        if wanted is None or any("pair" in name for name in call["kwargs"]):
            continue
        given = call["args"][0]
        if any(isinstance(text, (list, tuple)) for text in (given if isinstance(given, list) else [given])):
            continue
        found = tokenizer(*call["args"], **call["kwargs"])
        for name in ("input_ids", "attention_mask", "position_ids"):
            if name in wanted and call["kwargs"].get(f"return_{name}", True):
                value = found[name].tolist() if hasattr(found[name], "tolist") else found[name]
                assert value == wanted[name], (call["args"], call["kwargs"], name)


@needs_shared
def test_random_texts_against_tiktoken() -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    from test_exports_glm_tokenizer import random_texts

    ranks = byte_level.read_ranks(PUBLISHED / "tokenizer.model")
    theirs = tiktoken.Encoding(name="glm4", pat_str=byte_level.PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in random_texts(20_000):
        ids = theirs.encode(text, disallowed_special=())
        assert published().encode_text(text) == ids, text
        assert published().decode(ids) == text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "glm-4-tiny"
    made.mkdir()
    make_vocabulary(made)
    return made


def test_a_folder_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    assert type(tokenizer) is ChatGLM4Tokenizer
    (folder / "tokenizer.model").rename(tmp_path / "moved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (tmp_path / "moved").read_bytes()
    for again in (kind.from_pretrained(tmp_path / "saved") for kind in (ChatGLMTokenizer, AutoTokenizer)):
        assert type(again) is ChatGLM4Tokenizer
        for text in ("你好 hello", "\x00\u200b😀", "", "<|user|>"):
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert again.decode(again.encode_text(text)) == text


def test_the_persona_of_the_checkpoint_stays(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = "[gMASK]<sop>{% for item in messages %}<|system|>\n我是小智。\n\n# 可用工具{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}), encoding="utf-8")
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, ChatGLMTokenizer.from_pretrained(tmp_path / "saved")):
        text = one.apply_chat_template([{"role": "user", "content": "?"}], tools=[{"type": "python"}], tokenize=False)
        assert text.startswith("[gMASK]<sop><|system|>\n我是小智。\n\n# 可用工具\n## python\n\n")


def test_bytes_of_tokens(folder: Path) -> None:
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    pieces = tokenizer.token_pieces()
    for text in ("你好 hello", "😀"):
        ids = tokenizer.encode_text(text)
        assert b"".join(pieces[index] for index in ids) == text.encode()
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert pieces[tokenizer.get_command("<|user|>")] == b""
    assert tokenizer.decode(tokenizer.encode_text("😀")[:2]).endswith("\ufffd")


@pytest.mark.parametrize("damage", ["cut", "foreign", "pointer", "empty"])
def test_a_damaged_vocabulary(damage: str, folder: Path) -> None:
    path = folder / "tokenizer.model"
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "foreign": b"\x0a\x0b\x0c" * 20,
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ValueError, match="is not a vocabulary of GLM-4, or only part of one") as caught:
        ChatGLMTokenizer.from_pretrained(folder)
    assert ("git-lfs" in str(caught.value)) == (damage == "pointer")


def test_the_conversion_is_kept_and_a_damaged_one_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    ids = ChatGLMTokenizer.from_pretrained(folder).encode_text("你好 hello")
    (kept,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(byte_level, "make_tokenizer", None)
        assert ChatGLMTokenizer.from_pretrained(folder).encode_text("你好 hello") == ids
    kept.write_text("{")
    assert ChatGLMTokenizer.from_pretrained(folder).encode_text("你好 hello") == ids
    assert kept.stat().st_size > 1000
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert ChatGLMTokenizer.from_pretrained(folder).encode_text("你好 hello") == ids
