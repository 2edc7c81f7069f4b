"""The tokenizers of generations 2 and 3 against the goldens; what all generations share is in the other file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chatglm.tokenization_chatglm import ChatGLMTokenizer
from chatglm.tokenization_chatglm2 import ChatGLM2Tokenizer
from conftest import needs_shared
from tokenizer_goldens import described, deviation, folder, golden, make_vocabulary, tokenizer, value_of

NAMES = ["v2", "v3"]


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_strings(name: str) -> None:
    ours = tokenizer(name)
    for case in golden(name)["strings"]:
        text = case["text"]
        assert ours.encode(text) == ours(text)["input_ids"] == case["ids"]
        assert ours.encode(text, add_special_tokens=False) == ours.encode_text(text) == case["ids_no_special"]
        assert ours.tokenize(text) == case["tokens"]
        assert ours.decode(case["ids"]) == case["decode"]
        assert ours.decode(case["ids_no_special"]) == case["decode_no_special"]
        skipped = ours.decode(case["ids"], skip_special_tokens=True)
        if name == "v3":
            assert deviation("special_tokens_are_listed") and skipped == case["decode_no_special"]
            assert case["decode_skip_special"] == case["decode"]
        else:
            assert skipped == case["decode_skip_special"]


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_id_sequences(name: str) -> None:
    ours, data = tokenizer(name), golden(name)
    for case in data["id_sequences"]:
        ids, tokens = case["ids"], list(value_of(case["tokens"]))
        assert ours.decode(ids) == value_of(case["decode"])
        skipped = ours.decode(ids, skip_special_tokens=True)
        if name == "v3" and set(ids) & set(ours.all_special_ids):
            assert deviation("special_tokens_are_listed")
            assert value_of(case["decode_skip_special"]) == value_of(case["decode"])
            assert skipped == ours.decode([index for index in ids if index not in ours.all_special_ids])
        else:
            assert skipped == value_of(case["decode_skip_special"])
        if "" in tokens:
            assert deviation("control_ids_have_names")
            tokens = [token or ours.convert_ids_to_tokens(index) for token, index in zip(tokens, ids, strict=True)]
            assert "" not in tokens
        assert ours.convert_ids_to_tokens(ids) == tokens
    sequences = [data["id_sequences"][index]["ids"] for index in (0, 2)]
    assert ours.batch_decode(sequences) == value_of(data["batch_decode"])


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_id_tables(name: str) -> None:
    ours, data = tokenizer(name), golden(name)
    named = {*ours.commands.values()}
    for index, entry in data["id_to_token"].items():
        expected, found = value_of(entry), ours.convert_ids_to_tokens(int(index))
        if expected == ("error", "IndexError"):
            assert deviation("ids_without_a_piece_are_silent") and found == ""
        elif expected == "" and int(index) in named:
            assert deviation("control_ids_have_names") and ours.convert_tokens_to_ids(found) == int(index)
        else:
            assert found == expected
    for index, entry in data["single_id_decode"].items():
        expected = value_of(entry)
        assert ours.decode([int(index)]) == ("" if expected == ("error", "IndexError") else expected)
        assert ours.decode(int(index)) == ours.decode([int(index)])
    for token, entry in data["token_to_id"].items():
        assert ours.convert_tokens_to_ids(token) == value_of(entry)
    for index, entry in data["decode_int"].items():
        assert ours.decode(int(index)) == ours.decode([int(index)])
        if ours.decode(int(index)) != value_of(entry):
            assert deviation("single_ids_decode_like_lists") and value_of(entry) == "<0x61>"
    for token, entry in data["get_command"].items():
        if "error" in entry:
            assert deviation("wrong_names_are_value_errors")
            with pytest.raises(ValueError, match=r"is no control token of this vocabulary: it has \[MASK\], "):
                ours.get_command(token)
        else:
            assert ours.get_command(token) == value_of(entry)


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_calls(name: str) -> None:
    ours = tokenizer(name)
    for case in golden(name)["calls"]:
        assert described(ours(*case["args"], **case["kwargs"])) == value_of(case["result"]), case["args"]


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_attributes(name: str) -> None:
    ours, data = tokenizer(name), golden(name)
    assert (ours.vocab_size, len(ours)) == (data["vocab_size"], data["len"])
    assert len(ours.get_vocab()) == len(ours)
    for attribute, entry in data["special"].items():
        expected = value_of(entry)
        if isinstance(expected, tuple):
            assert expected == ("error", "AttributeError") and not hasattr(ours, attribute)
        elif attribute == "unk_token_id":
            assert deviation("control_ids_have_names") and (expected, ours.unk_token_id) == (None, 0)
        else:
            assert getattr(ours, attribute) == (expected[0] if isinstance(expected, list) else expected)
    for attribute in ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names"):
        assert getattr(ours, attribute) == data[attribute]
    assert data["model_max_length"] == "VERY_LARGE" and ours.model_max_length > 10**20
    assert deviation("special_tokens_are_listed") and data["all_special_tokens"] == data["all_special_ids"] == []
    assert ours.all_special_ids == [2, 0, *range(64789, data["len"])]
    assert ours.all_special_ids == ours.convert_tokens_to_ids(ours.all_special_tokens)
    for pair, arguments in (("single", [[11, 12, 13]]), ("pair", [[11, 12], [21, 22]])):
        assert ours.build_inputs_with_special_tokens(*arguments) == data["build_inputs_with_special_tokens"][pair]
    assert ours.num_special_tokens_to_add() == data["num_special_tokens_to_add"]["single"]
    assert ours.num_special_tokens_to_add(pair=True) == data["num_special_tokens_to_add"]["pair"]
    assert ours.convert_tokens_to_ids("<0x00>") == data["byte_pieces_start_id_used"]
    assert ours.get_prefix_tokens() == [64790, 64792]
    assert ours.tokenizer.sp_model is ours.sp_model and ours.tokenizer.n_words == len(ours)
    assert (ours.tokenizer.bos_id, ours.tokenizer.eos_id, ours.tokenizer.pad_id) == (1, 2, 0)
    assert ours.tokenizer.special_tokens["sop"] == 64792


@needs_shared
def test_role_tokens_in_text_where_asked_for() -> None:
    ours = ChatGLMTokenizer.from_pretrained(folder("v3"), encode_special_tokens=True)
    later: Any = ChatGLMTokenizer.from_pretrained(folder("v3"))
    later.encode_special_tokens = True
    for case in golden("v3")["encode_special_tokens=True"]:
        for tok in (ours, later):
            assert tok.encode(case["text"]) == case["ids"]
            assert tok.tokenize(case["text"]) == case["tokens"]
        assert ours.decode(case["ids"]) == case["decode"]
        assert tokenizer("v3").encode(case["text"], split_special_tokens=False) == case["ids"]
    # The messages of a chat are plain text all the same.
    assert ours.build_chat_input("<|user|>")["input_ids"].tolist() == (
        tokenizer("v3").build_chat_input("<|user|>")["input_ids"].tolist()
    )


def preprocessed(tok: Any, rows: list[tuple[str, str, Any]], source: int, target: int) -> dict[str, Any]:
    """Training rows as in the originals' fine-tuning script of generation 2."""
    result: dict[str, Any] = {"input_ids": [], "labels": []}
    for query, answer, history in rows:
        prompt = tok.encode(tok.build_prompt(query, history), truncation=True, max_length=source)
        labels = tok.encode(answer, add_special_tokens=False, truncation=True, max_length=target)
        labels = [*labels, tok.eos_token_id]
        padding = source + target + 1 - len(prompt) - len(labels)
        result["input_ids"].append(prompt + labels + [tok.pad_token_id] * padding)
        result["labels"].append([-100] * len(prompt) + labels + [-100] * padding)
    return result


@needs_shared
def test_fine_tuning_rows() -> None:
    data, ours = golden("ptuning_preprocess"), tokenizer("v2")
    examples, source, target = data["examples"], data["args"]["max_source_length"], data["args"]["max_target_length"]
    rows = [(q, a, h) for q, a, h in zip(*(examples[key] for key in ("q", "a", "history")), strict=True) if q and a]
    for column in (None, "history"):
        chosen = [(query, answer, history if column else []) for query, answer, history in rows]
        expected = data["v2"][f"train,history_column={column}"]["ok"]
        assert preprocessed(ours, chosen, source, target) == expected
        expected = data["v2"][f"eval,history_column={column}"]["ok"]
        prompts = [ours.build_prompt(query, history) for query, _, history in chosen]
        found = ours(prompts, max_length=source, truncation=True, padding=True)
        assert all(found[key] == expected[key] for key in ("input_ids", "attention_mask", "position_ids"))
        answers = [answer for _, answer, _ in chosen]
        assert ours(text_target=answers, max_length=target, truncation=True)["input_ids"] == expected["labels"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_vocabulary(tmp_path / "tiny", 3)


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "name", "version"),
    [
        ({}, {"name_or_path": "THUDM/chatglm2-6b"}, "model", 2),
        ({}, {"name_or_path": "zai-org/chatglm3-6b-32k"}, "model", 3),
        ({"_name_or_path": "someone/my-chatglm2-6b-int4"}, {}, "model", 2),
        ({}, {"name_or_path": "THUDM/chatglm3-6b", "chatglm_version": 2}, "model", 2),
        ({"chatglm_version": 2}, {}, "model", 2),
        ({}, {}, "chatglm2-6b", 2),
        ({}, {}, "model", 3),
    ],
)
def test_generations_2_and_3_are_told_apart(
    tiny: Path, config: dict[str, Any], tokenizer_config: dict[str, Any], name: str, version: int
) -> None:
    target = tiny.rename(tiny.parent / name)
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for cls in (ChatGLMTokenizer, ChatGLM2Tokenizer):
        assert cls.from_pretrained(target).chatglm_version == version
        for asked in (2, 3):
            assert cls.from_pretrained(target, chatglm_version=asked).chatglm_version == asked
    ChatGLMTokenizer.from_pretrained(target).save_pretrained(tiny.parent / "saved")
    assert ChatGLMTokenizer.from_pretrained(tiny.parent / "saved").chatglm_version == version


@needs_shared
def test_control_tokens_listed_in_a_published_config(tmp_path: Path) -> None:
    """Newer copies of ChatGLM3 list their control tokens as ordinary added tokens; text must not become them."""
    names = {64790: "[gMASK]", 64792: "sop", 64795: "<|user|>", 64797: "<|observation|>"}
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    config = {
        "name_or_path": "THUDM/chatglm3-6b",
        "added_tokens_decoder": {str(index): token | {"content": name} for index, name in names.items()},
        "additional_special_tokens": ["<|user|>", "<|observation|>"],
    }
    shutil.copy(folder("v3") / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, expected = ChatGLMTokenizer.from_pretrained(tmp_path), tokenizer("v3")
    text = "sophisticated <|user|> [gMASK]"
    assert ours(text) == expected(text) and ours.get_vocab() == expected.get_vocab()
    assert ours.decode([64790, 64792, 39701]) == expected.decode([64790, 64792, 39701])


def test_idioms_with_special_ids(tiny: Path) -> None:
    ours: Any = ChatGLMTokenizer.from_pretrained(tiny)
    ours.pad_token_id = ours.eos_token_id
    assert (ours.pad_token, ours.pad_token_id) == ("</s>", 2)
    ours.pad_token = "<unk>"
    assert ours.pad_token_id == 0
    right = ours(["你好", "你"], padding=True, padding_side="right")
    assert right["input_ids"][1][-1] == 0 and right["attention_mask"][1][-1] == 0
    assert right["position_ids"][1][:3] == [0, 1, 2] and right["position_ids"][1][-1] == 0


def test_roles(tiny: Path) -> None:
    ours: Any = ChatGLMTokenizer.from_pretrained(tiny)
    assert ours.build_single_message("user", "", "你好")[0] == ours.get_command("<|user|>")
    assert deviation("wrong_names_are_value_errors")
    for call in (lambda: ours.build_single_message("tool", "", "x"), lambda: ours.build_chat_input("x", role="tool")):
        with pytest.raises(ValueError, match="unknown role 'tool': use one of system, user, assistant, observation"):
            call()
    with pytest.raises(ValueError, match="use build_chat_input"):
        ours.build_prompt("x")
    two: Any = ChatGLMTokenizer.from_pretrained(tiny, chatglm_version=2)
    with pytest.raises(ValueError, match="is no control token"):
        two.build_single_message("user", "", "x")


def test_a_vocabulary_with_pieces_named_like_control_tokens(tmp_path: Path) -> None:
    make_vocabulary(tmp_path / "v", 3)
    data = (tmp_path / "v" / "tokenizer.model").read_bytes()
    piece = b"\x0a\x03sop\x15\x00\x00\x00\xc0\x18\x01"
    (tmp_path / "v" / "tokenizer.model").write_bytes(data + b"\x0a" + bytes([len(piece)]) + piece)
    with pytest.raises(ValueError, match="text pieces named like control tokens: sop"):
        ChatGLMTokenizer.from_pretrained(tmp_path / "v")
