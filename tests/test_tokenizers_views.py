"""`tokenizer.sp_tokenizer` and `tokenizer.tokenizer`: the names inside the originals' tokenizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from conftest import needs_shared
from tiny_chat import pair
from tokenizer_goldens import tokenizer

TEXTS = ["你好", "a  b\n\tc", "[gMASK] <|user|> 1️⃣", ""]


def tiny(version: int) -> Any:
    return pair(version)[1]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_inside_generations_2_and_3(version: int, text: str) -> None:
    ours = tiny(version)
    view, ids = ours.tokenizer, ours.sp_model.encode_as_ids(text)
    assert view.sp_model is ours.sp_model and view.n_words == len(ours)
    assert view.encode(text) == ids and view.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert view.tokenize(text) == ours.sp_model.encode_as_pieces(text) == ours.tokenize(text)
    assert view.decode(ids) == view.decode_tokens(view.tokenize(text)) == text


@pytest.mark.parametrize("version", [2, 3])
def test_tokens_inside_generations_2_and_3(version: int) -> None:
    ours = tiny(version)
    view, names = ours.tokenizer, ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    names += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"] if version == 3 else []
    assert [*view.special_tokens] == names
    for name, index in view.special_tokens.items():
        assert view.convert_token_to_id(name) == ours.get_command(name) == index
        assert view.index_special_tokens[index] == name
        assert view.convert_id_to_token(index) == (name if version == 3 else "")
    assert view.convert_token_to_id("no such piece") == 0
    assert [view.convert_id_to_token(index) for index in (view.pad_id, view.bos_id, view.eos_id, 10**6)] == [""] * 4
    assert view.convert_id_to_token(300) == ours.sp_model.id_to_piece(300)
    assert ours.special_tokens == {"<bos>": 1, "<eos>": 2, "<unk>": 0, "<pad>": 0}


def check_generation_1(ours: Any) -> None:
    view, first = ours.sp_tokenizer, ours.num_image_tokens
    for token in (ours.gmask_token, ours.eop_token, "<sop>", "▁the"):
        index = ours.convert_tokens_to_ids(token)
        assert view[token] == index and view[index] == token
        assert view.text_tokenizer.convert_token_to_id(token) == index - first
        assert view.text_tokenizer.convert_id_to_token(index - first) == token
    assert len(view) == view.num_tokens == view.vocab_size == first + view.num_text_tokens == ours.vocab_size
    for text in TEXTS:
        ids = view.encode(text)
        assert ids == ours.encode_text(text) and view.decode(ids) == text
        assert view.tokenize(text) == ours.tokenize(text) == ours.convert_ids_to_tokens(ids)
        assert view.encode(text, add_dummy_prefix=False) == ours.encode_text(text, add_dummy_prefix=False)
        inner = view.text_tokenizer
        assert inner.encode(text) == inner.convert_tokens_to_ids(inner.tokenize(text)) == inner.sp.encode_as_ids(text)
        assert inner.decode(inner.encode(text)) == inner.convert_tokens_to_string(inner.tokenize(text))
    assert view.get_blank_token(2) == "<|blank_2|>" and view[view.get_blank_token(80)] > first
    assert view[view.get_tab_token()] > first
    assert len(view.text_tokenizer.sp.serialized_model_proto()) > 10_000
    with pytest.raises(ValueError, match="2 to 80"):
        view.get_blank_token(81)
    with pytest.raises(ValueError, match="not list"):
        view[[1]]


def test_inside_generation_1() -> None:
    check_generation_1(tiny(1))


@needs_shared
@pytest.mark.parametrize("name", ["v1", "v1_0"])
def test_inside_the_published_vocabularies(name: str) -> None:
    ours = tokenizer(name)
    check_generation_1(ours)
    assert ours.sp_tokenizer["[gMASK]"] == {"v1": 130001, "v1_0": 150001}[name]


ROWS: dict[str, Any] = {
    "texts": ["a", "b c"],
    "pairs": [("a", "b"), ["c d", "e"]],
    "ids": [[5, 6], [7, 8, 9]],
    "pairs of ids": [([5, 6], None), ([7], [8, 9])],
}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("kind", ROWS)
def test_the_names_of_transformers_4(version: int, kind: str) -> None:
    ours, rows = tiny(version), ROWS[kind]
    batch = ours.batch_encode_plus(rows)["input_ids"]
    pairs = [row if isinstance(row[0], (str, list)) and len(row) == 2 and not isinstance(row, str) else (row, None)
             for row in rows]  # fmt: skip
    assert batch == [ours.encode_plus(*one)["input_ids"] for one in pairs]
    ids = [[ours.encode_text(part) if isinstance(part, str) else part for part in one] for one in pairs]
    assert batch == [ours.build_inputs_with_special_tokens(*one) for one in ids]
    padded = ours.batch_encode_plus(rows, padding=True, truncation=True, max_length=16, return_tensors="pt")
    assert padded["input_ids"].shape == (2, max(map(len, batch)))


@pytest.mark.parametrize("version", [2, 3])
def test_the_last_line_of_the_original_build_chat_input(version: int) -> None:
    ours = tiny(version)
    expected = ours.build_chat_input("你好", [])
    ids = expected["input_ids"][0].tolist()[2:]
    again = ours.batch_encode_plus([ids], return_tensors="pt", is_split_into_words=True)
    assert {name: rows.tolist() for name, rows in again.items()} == {k: rows.tolist() for k, rows in expected.items()}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_special_tokens_under_their_names_of_transformers_4(version: int) -> None:
    ours = copy.deepcopy(tiny(version))
    before, size = ours.additional_special_tokens, len(ours)
    assert before == list(ours.extra_special_tokens) and "[gMASK]" in before
    assert ours.additional_special_tokens_ids == [ours.convert_tokens_to_ids(token) for token in before]
    added = ours.add_special_tokens({"additional_special_tokens": ["<x>"]}, replace_additional_special_tokens=False)
    assert added == 1 and ours.additional_special_tokens == [*before, "<x>"] and len(ours) == size + 1
    assert ours.additional_special_tokens_ids[-1] == ours.convert_tokens_to_ids("<x>") >= size
    ours.additional_special_tokens = ["<x>", "<y>"]
    assert ours.additional_special_tokens == ["<x>", "<y>"] and len(ours) == size + 2
    with pytest.raises(TypeError, match="replace_all"):
        ours.add_special_tokens({"additional_special_tokens": ["<x>"]}, replace_all=True)
