"""Generation 1's tokenizer against the goldens, and what the tokenizers of all generations have in common."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import socket
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase

import chatglm  # noqa: F401  registers the tokenizer with transformers
from chatglm.conversation import CHAT_TEMPLATES
from chatglm.tokenization_chatglm import ChatGLM1Tokenizer, ChatGLMTokenizer
from chatglm.tokenization_chatglm2 import ChatGLM2Tokenizer
from conftest import SHARED, needs_shared
from tokenizer_goldens import INTERNALS, described, deviation, folder, golden, make_vocabulary, tokenizer, value_of

GENERATION_1 = ["v1", "v1_0"]
PARTS = set(
    "strings id_sequences batch_decode id_to_token single_id_decode token_to_id decode_int calls vocab_size len "
    "special all_special_tokens all_special_ids padding_side truncation_side clean_up_tokenization_spaces "
    "model_input_names model_max_length num_special_tokens_to_add build_inputs_with_special_tokens "
    "byte_pieces_start_id_used".split()
)
MESSAGES = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hi 👋"},
    {"role": "user", "content": "再见 x"},
]


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    return {f"tiny{version}": make_vocabulary(root / f"tiny{version}", version) for version in (1, 2, 3)}


@pytest.fixture(
    params=["tiny1", "tiny2", "tiny3", *(pytest.param(name, marks=needs_shared) for name in ("v1", "v1_0", "v2", "v3"))]
)
def path(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders[request.param] if request.param in tiny_folders else folder(request.param)


@lru_cache
def loaded(path: Path) -> Any:
    return ChatGLMTokenizer.from_pretrained(path)


@pytest.fixture
def any_tokenizer(path: Path) -> Any:
    """Shared by tests, so not to be changed."""
    return loaded(path)


def shifted(ids: Any, by: int = 20000) -> Any:
    """Ids of v1.1 in the vocabulary of v1.0."""
    return [shifted(item, by) for item in ids] if isinstance(ids, list) else ids + by


# ------------------------------------------------------------------------------------------------ generation 1


@needs_shared
def test_no_part_is_forgotten() -> None:
    """The parts of the goldens of all four tokenizers, as the tests here and in test_tokenization_chatglm2.py read."""
    extra = {"v1": {"sp_encode"}, "v1_0": {"sp_encode"}, "v2": {"get_command"}}
    extra["v3"] = {"get_command", "encode_special_tokens=True"}
    for name, more in extra.items():
        assert set(golden(name)) == PARTS | INTERNALS | more


@needs_shared
@pytest.mark.parametrize("name", GENERATION_1)
def test_strings(name: str) -> None:
    ours, control = tokenizer(name), golden(name)["all_special_tokens"]
    for case in golden(name)["strings"]:
        text = case["text"]
        expected = {key: case[key] for key in ("ids", "ids_no_special", "tokens")}
        found = {
            "ids": ours.encode(text),
            "ids_no_special": ours.encode(text, add_special_tokens=False),
            "tokens": ours.tokenize(text),
        }
        assert found["ids"] == ours(text)["input_ids"] == [*ours.encode_text(text), *found["ids"][-2:]]
        if any(token in text for token in control):
            assert deviation("typed_control_tokens_stay_text") and found != expected
            assert not set(found["ids_no_special"]) & set(ours.commands.values())
            assert "".join(found["tokens"]).replace("▁", " ").strip() == text
        else:
            assert found == expected, text


@needs_shared
@pytest.mark.parametrize("name", GENERATION_1)
def test_strings_with_control_tokens_asked_for(name: str) -> None:
    ours = tokenizer(name)
    end = [ours.gmask_token_id, ours.bos_token_id]
    # Tokens that ours recognises in a text, and one of the same kind that the original does, too.
    others = {"[gMASK]": "[MASK]"} | ({"<eop>": "<pad>"} if name == "v1_0" else {})
    for case in golden(name)["strings"]:
        text, options = case["text"], {"split_special_tokens": False}
        ids = ours.encode(text, add_special_tokens=False, **options)
        assert ours.encode(text, **options) == [*ids, *end]
        if any(token in text for token in others):
            assert deviation("gmask_is_recognised_where_asked_for") and ids != case["ids_no_special"]
            known = text
            for token, other in others.items():
                assert other not in text
                known = known.replace(token, other)
            same = {ours.convert_tokens_to_ids(other): ours.convert_tokens_to_ids(one) for one, other in others.items()}
            expected = ours.encode(known, add_special_tokens=False, **options)
            assert ids == [same.get(index, index) for index in expected]
            continue
        assert (ids, ours.tokenize(text, **options)) == (case["ids_no_special"], case["tokens"])
        if name == "v1_0" and ours.mask_token_id in ids:
            assert deviation("the_old_vocabulary_works_like_the_new")  # there, [MASK] in a text changed the end
            assert case["ids"] != [*ids, *end]
        else:
            assert case["ids"] == [*ids, *end]


@needs_shared
@pytest.mark.parametrize("name", GENERATION_1)
def test_decoding(name: str) -> None:
    ours, data = tokenizer(name), golden(name)
    for case in data["strings"]:
        if case["decode_no_special"] != (no_special := ours.decode(case["ids_no_special"])):
            assert name == "v1_0" and deviation("the_old_vocabulary_works_like_the_new")
            assert value_of(case["decode_no_special"]) == ("error", "IndexError")
            assert no_special == "" == "".join(case["tokens"])
        assert ours.decode(case["ids"]) == case["decode"]
        skipped = ours.decode(case["ids"], skip_special_tokens=True)
        if name == "v1_0" and case["text"] == "<unk>":
            assert deviation("special_tokens_are_listed") and (skipped, case["decode_skip_special"]) == ("", " ⁇ ")
        else:
            assert skipped == case["decode_skip_special"]
    for case in data["id_sequences"]:
        for key, skip in (("decode", False), ("decode_skip_special", True)):
            expected = value_of(case[key])
            if expected == ("error", "IndexError"):
                assert deviation("the_old_vocabulary_works_like_the_new")
                expected = ""
            assert ours.decode(case["ids"], skip_special_tokens=skip) == expected
        assert ours.convert_ids_to_tokens(case["ids"]) == value_of(case["tokens"])
    sequences = [data["id_sequences"][index]["ids"] for index in (0, 2)]
    assert ours.batch_decode(sequences) == value_of(data["batch_decode"])
    assert ours.decode(torch.tensor(sequences[0])) == ours.decode(np.array(sequences[0])) == ours.decode(sequences[0])


@needs_shared
@pytest.mark.parametrize("name", GENERATION_1)
def test_id_tables(name: str) -> None:
    ours, data = tokenizer(name), golden(name)
    for index, entry in data["id_to_token"].items():
        expected = value_of(entry)
        if expected == ("error", "IndexError"):
            assert deviation("ids_without_a_piece_are_silent")
            expected = ""
        elif index == "-1":
            assert deviation("image_names_need_image_tokens")
            expected = ""
        assert ours.convert_ids_to_tokens(int(index)) == expected
    for index, entry in data["single_id_decode"].items():
        expected = value_of(entry)
        if expected == ("error", "IndexError"):
            assert deviation("ids_without_a_piece_are_silent")
            expected = ""
        elif index == "-1" and name == "v1":
            assert deviation("image_names_need_image_tokens") and expected == "<image_-1>"
            expected = ""
        assert ours.decode([int(index)]) == ours.decode(int(index)) == expected
    for token, entry in data["token_to_id"].items():
        expected = value_of(entry)
        if name == "v1" and token.startswith("<image"):
            assert deviation("image_names_need_image_tokens")
            expected = ours.unk_token_id
        assert ours.convert_tokens_to_ids(token) == expected
    for index, entry in data["decode_int"].items():
        assert ours.decode(int(index)) == ours.decode([int(index)])
        if name == "v1_0":
            assert deviation("the_old_vocabulary_works_like_the_new") and value_of(entry) == ("error", "TypeError")
        else:
            assert ours.decode(int(index)) == value_of(entry)
    assert ours.convert_tokens_to_ids("<0x00>") == data["byte_pieces_start_id_used"]


@needs_shared
@pytest.mark.parametrize("name", GENERATION_1)
def test_calls(name: str) -> None:
    ours = tokenizer(name)
    for case, case_1_1 in zip(golden(name)["calls"], golden("v1")["calls"], strict=True):
        found = described(ours(*case["args"], **case["kwargs"], split_special_tokens=False))
        expected = value_of(case["result"])
        if "[MASK]是首都" in str(case["args"]):  # and [gMASK] in the other row
            assert deviation("gmask_is_recognised_where_asked_for")
            assert ours.gmask_token_id == found["input_ids"][1][-3]
            (asked, plain), rows = case["args"][0], value_of(case["result"])["input_ids"]
            with_mask = [index for index in rows[0] if index != ours.pad_token_id]
            if name == "v1_0":
                assert deviation("the_old_vocabulary_works_like_the_new")  # [MASK] instead of [gMASK] at the end
                with_mask[-2] = ours.gmask_token_id
            assert ours(asked, split_special_tokens=False)["input_ids"] == with_mask
            assert ours(plain)["input_ids"] == rows[1]
            continue
        if name == "v1_0":
            assert deviation("the_old_vocabulary_works_like_the_new")
            if len(case["args"]) < 2 and not isinstance(case["args"][:1] and case["args"][0][0], list):
                assert found["input_ids"] == expected["input_ids"]  # texts alone: the same ids
            expected = dict(value_of(case_1_1["result"]))
            expected["input_ids"] = shifted(expected["input_ids"])
        assert found == expected, case["args"]


@needs_shared
def test_a_batch_with_a_typed_mask_in_it() -> None:
    case = next(case for case in golden("v1")["calls"] if "[MASK]是首都" in str(case["args"]))
    ours, expected = tokenizer("v1"), value_of(case["result"])
    rows = [[index for index in row if index != 3] for row in expected["input_ids"]]
    found = described(ours.pad({"input_ids": rows}, padding=True))
    assert found == expected


@needs_shared
@pytest.mark.parametrize("name", GENERATION_1)
def test_attributes(name: str) -> None:
    ours, data = tokenizer(name), golden(name)
    assert (ours.vocab_size, len(ours)) == (data["vocab_size"], data["len"])
    assert len(ours.get_vocab()) == len(ours)
    for attribute, entry in data["special"].items():
        expected = value_of(entry)
        if isinstance(expected, tuple):
            # Attributes of the other revision, which ours has in both; gMASK_token is the old name of gmask_token.
            assert expected == ("error", "AttributeError")
            assert hasattr(ours, attribute) != attribute.startswith("gMASK")
        elif attribute == "gMASK_token":
            assert deviation("the_old_vocabulary_works_like_the_new") and ours.gmask_token == expected[0]
        else:
            assert getattr(ours, attribute) == (expected[0] if isinstance(expected, list) else expected)
            if isinstance(expected, list) and expected[0] is not None:  # a token and its id
                assert ours.convert_tokens_to_ids(expected[0]) == expected[1]
    assert deviation("special_tokens_are_listed")
    extra = ["[gMASK]"] if name == "v1" else ["[gMASK]", "<eop>"]
    assert ours.all_special_tokens == [*data["all_special_tokens"], *extra]
    assert ours.all_special_ids == [*data["all_special_ids"], *ours.convert_tokens_to_ids(extra)]
    assert (ours.padding_side, ours.truncation_side) == (data["padding_side"], data["truncation_side"])
    assert data["model_max_length"] == "VERY_LARGE" and ours.model_max_length > 10**20
    # v1.0 names the clean-up of blanks but does not do it, makes no masks or positions, and puts answers in front.
    assert data["clean_up_tokenization_spaces"] and ours.clean_up_tokenization_spaces is (name == "v1")
    assert name == "v1" or deviation("the_old_vocabulary_works_like_the_new")
    assert ours.model_input_names == golden("v1")["model_input_names"]
    assert ours.build_inputs_with_special_tokens([11, 12, 13]) == data["build_inputs_with_special_tokens"]["single"]
    pair = golden("v1")["build_inputs_with_special_tokens"]["pair"]
    assert ours.build_inputs_with_special_tokens([11, 12], [21, 22]) == (
        pair if name == "v1" else [index + 20000 if index > 130000 else index for index in pair]
    )
    counts = golden("v1")["num_special_tokens_to_add"]
    assert {"single": ours.num_special_tokens_to_add(), "pair": ours.num_special_tokens_to_add(pair=True)} == counts
    assert data["num_special_tokens_to_add"]["single"] == counts["single"]
    for case in data["sp_encode"]:
        assert ours.encode_text(case["text"], linebreak=False) == case["no_linebreak"]
        assert ours.encode_text(case["text"], whitespaces=False) == case["no_whitespaces"]
        assert ours.encode_text(case["text"], add_dummy_prefix=False) == case["no_dummy_prefix"]


def preprocessed(tok: Any, prompts: list[str], answers: list[str], source: int, target: int) -> dict[str, Any]:
    """Training rows as in the originals' fine-tuning script of generation 1."""
    result: dict[str, Any] = {"input_ids": [], "labels": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tok.build_inputs_with_special_tokens(
            tok.encode_text(prompt)[: source - 1], tok.encode_text(answer)[: target - 2]
        )
        start = ids.index(tok.bos_token_id)
        padding = source + target - len(ids)
        result["input_ids"].append(ids + [tok.pad_token_id] * padding)
        result["labels"].append([-100] * start + ids[start:] + [-100] * padding)
    return result


@needs_shared
def test_fine_tuning_rows() -> None:
    data, ours = golden("ptuning_preprocess"), tokenizer("v1")
    examples, source, target = data["examples"], data["args"]["max_source_length"], data["args"]["max_target_length"]
    rows = [(q, a, h) for q, a, h in zip(*(examples[key] for key in ("q", "a", "history")), strict=True) if q and a]
    answers = [answer for _, answer, _ in rows]
    for column in (None, "history"):
        histories = [history if column else [] for _, _, history in rows]
        prompts = [ours.build_prompt(query, history) for (query, _, _), history in zip(rows, histories, strict=True)]
        expected = data["v1"][f"train,history_column={column}"]["ok"]
        trained = list(prompts)
        if column:
            assert deviation("training_prompts_are_those_of_chat")
            trained = [p if h else f"[Round 0]\n问：{p}\n答：" for p, h in zip(prompts, histories, strict=True)]
        assert preprocessed(ours, trained, answers, source, target) == expected
        found = described(ours(prompts, max_length=source, truncation=True, padding=True))
        expected = data["v1"][f"eval,history_column={column}"]["ok"]
        assert found["input_ids"] == expected["input_ids"]
        assert np.array_equal(found["position_ids"], expected["position_ids"])
        assert found["attention_mask_rows_1_is_masked"] == expected["attention_mask_rows_1_is_masked"]
        labels = ours(text_target=answers, max_length=target, truncation=True)["input_ids"]
        assert labels == expected["labels"]


@needs_shared
def test_old_weights_with_new_files_and_the_reverse(tmp_path: Path) -> None:
    for files, weights, size in (("v1", "v1_0", 150344), ("v1_0", "v1", 130344)):
        mixed = tmp_path / files
        shutil.copytree(folder(files), mixed)
        shutil.copy(folder(weights) / "config.json", mixed)
        ours = ChatGLMTokenizer.from_pretrained(mixed)
        assert len(ours) == size
        assert ours("你好")["input_ids"] == tokenizer(weights)("你好")["input_ids"]
        assert len(ChatGLMTokenizer.from_pretrained(mixed, num_image_tokens=0)) == 130344


def test_a_right_padded_row(tiny_folders: dict[str, Path]) -> None:
    ours = ChatGLMTokenizer.from_pretrained(tiny_folders["tiny1"])
    left, right = (ours(["你好", "The fox"], padding=True, padding_side=side) for side in ("left", "right"))
    count = left["input_ids"][0].count(ours.pad_token_id) or left["input_ids"][1].count(ours.pad_token_id)
    row = 0 if left["input_ids"][0][0] == ours.pad_token_id else 1
    assert count and right["input_ids"][row] == left["input_ids"][row][count:] + left["input_ids"][row][:count]
    assert np.array_equal(np.roll(left["attention_mask"][row], (-count, -count), (1, 2)), right["attention_mask"][row])
    assert np.array_equal(np.roll(left["position_ids"][row], -count, 1), right["position_ids"][row])


def test_padding_again_makes_new_masks(tiny_folders: dict[str, Path]) -> None:
    ours = ChatGLMTokenizer.from_pretrained(tiny_folders["tiny1"])
    rows = [ours(text, padding=True) for text in ("你好", "The quick brown fox")]
    together = ours.pad(rows, padding=True, return_tensors="pt")
    expected = ours(["你好", "The quick brown fox"], padding=True, return_tensors="pt")
    assert all(torch.equal(together[key], expected[key]) for key in ours.model_input_names)


# -------------------------------------------------------------------------------------------- all generations


def test_typed_control_tokens_stay_text(any_tokenizer: Any) -> None:
    control = {*any_tokenizer.commands, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]sop"}
    ids = set(any_tokenizer.commands.values())
    for token in control:
        for text in (token, f"a {token}b", f"人口{token}\n{token}"):
            assert not ids & set(any_tokenizer.encode(text, add_special_tokens=False)), text
            assert not ids & set(any_tokenizer.encode_text(text)), text


def test_words_that_contain_control_tokens(any_tokenizer: Any) -> None:
    text = "people development sophisticated"
    plain = any_tokenizer.encode(text, add_special_tokens=False)
    assert any_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False) == plain


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return {'a': 1}\n\n\tif x:\n\t\tpass\n",
        "a  b   c" + " " * 100 + "d",
        "你好世界 👨‍👩‍👧 𠮷 龘 ﷽".replace("\u200d", "").replace("﷽", ""),
        "\x00 \x01 control",
        "",
    ],
)
def test_round_trip(any_tokenizer: Any, text: str) -> None:
    if any_tokenizer.chatglm_version == 1:
        text = text.replace("\x01", "")  # its normaliser drops control characters but NUL
    ids = any_tokenizer.encode_text(text)
    assert any_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text.rstrip(
        " " if any_tokenizer.chatglm_version == 1 else ""
    )


def test_surrogates(any_tokenizer: Any) -> None:
    encode = any_tokenizer.encode_text
    assert encode("a\ud83db") == encode("a\ufffdb") == any_tokenizer.encode("a\udc80b", add_special_tokens=False)
    assert encode("\ud83d\ude00") == encode("😀")


@pytest.mark.parametrize("text", [None, b"x", 7])
def test_no_text(any_tokenizer: Any, text: Any) -> None:
    with pytest.raises(TypeError, match="text must be a string"):
        any_tokenizer.encode_text(text)


def test_a_long_text(any_tokenizer: Any) -> None:
    text = "今天天气不错, hello\n" * 50_000
    ids = any_tokenizer(text)["input_ids"]
    assert len(ids) > 100_000 and any_tokenizer.decode(ids[:200], skip_special_tokens=True).startswith("今天天气不错")


def test_ids_without_a_piece(any_tokenizer: Any) -> None:
    ids = any_tokenizer.encode_text("你好")
    assert any_tokenizer.decode([*ids, len(any_tokenizer), 10**6]) == any_tokenizer.decode(ids)
    assert any_tokenizer.decode([-100]) == "" == any_tokenizer.decode([])


def test_save_and_load(any_tokenizer: Any, tmp_path: Path) -> None:
    any_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "ChatGLMTokenizer"
    assert config["chatglm_version"] == any_tokenizer.chatglm_version
    assert not {"auto_map", "added_tokens_decoder", "name_or_path", "backend"} & set(config)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert_same(again, any_tokenizer)
    again.save_pretrained(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "tokenizer_config.json").read_text(encoding="utf-8")) == config


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other) and one.chatglm_version == other.chatglm_version
    assert one.get_vocab() == other.get_vocab() and one.all_special_tokens == other.all_special_tokens
    text = "你好 [gMASK]sop <|user|>\t  x 👋"
    for options in ({}, {"split_special_tokens": False}):
        assert one(text, **options) == other(text, **options)
    ids = one(text)["input_ids"]
    assert one.decode(ids) == other.decode(ids)
    assert one.chat_template == other.chat_template
    assert one.clean_up_tokenization_spaces == other.clean_up_tokenization_spaces


def test_pickle_and_deepcopy(any_tokenizer: Any, tmp_path: Path) -> None:
    for again in (pickle.loads(pickle.dumps(any_tokenizer)), copy.deepcopy(any_tokenizer)):
        assert_same(again, any_tokenizer)
        again.vocab_file = str(tmp_path / "gone.model")
        again.save_pretrained(tmp_path / "saved")
        assert_same(ChatGLMTokenizer.from_pretrained(tmp_path / "saved"), any_tokenizer)


def test_added_tokens(any_tokenizer: Any, tmp_path: Path) -> None:
    ours = copy.deepcopy(any_tokenizer)
    assert ours.add_tokens(["新词汇"]) == 1
    ids = ours.encode("一个新词汇！", add_special_tokens=False)
    assert len(any_tokenizer) in ids and "新词汇" in ours.decode(ids)
    ours.save_pretrained(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path).encode("一个新词汇！", add_special_tokens=False) == ids


def test_threads(any_tokenizer: Any) -> None:
    texts = [f"第{index}个问题 <|user|> {'好' * (index % 7)}" for index in range(200)]
    expected = [any_tokenizer(text, split_special_tokens=index % 2 == 0) for index, text in enumerate(texts)]
    found: list[list[Any]] = [[] for _ in range(6)]

    def work(slot: int) -> None:
        found[slot] = [any_tokenizer(text, split_special_tokens=i % 2 == 0) for i, text in enumerate(texts)]

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == expected for result in found)


def test_auto_tokenizer(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a folder needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sys, "stdin", None)  # nothing may ask the user
    model = tmp_path / "model"
    shutil.copytree(path, model)
    config = model / "config.json"
    version = ChatGLMTokenizer.from_pretrained(path).chatglm_version
    if not config.is_file():
        values = {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}
        config.write_text(json.dumps(values | ({"inner_hidden_size": 8, "vocab_size": 600} if version == 1 else {})))
        values = json.loads((model / "tokenizer_config.json").read_text())
        values["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
        (model / "tokenizer_config.json").write_text(json.dumps(values))
    expected = ChatGLM1Tokenizer if version == 1 else ChatGLM2Tokenizer
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        ours = AutoTokenizer.from_pretrained(model, **options)
        assert type(ours) is expected and ours.chatglm_version == version
        ours.save_pretrained(tmp_path / "saved")
        shutil.copy(config, tmp_path / "saved")
        assert_same(AutoTokenizer.from_pretrained(tmp_path / "saved", **options), ours)


def test_special_tokens_mask(any_tokenizer: Any) -> None:
    for pair in (None, "回答"):
        encoding = any_tokenizer("你好", pair, return_special_tokens_mask=True)
        control = set(any_tokenizer.commands.values())
        assert encoding["special_tokens_mask"] == [int(index in control) for index in encoding["input_ids"]]


def test_missing_vocabulary(tmp_path: Path) -> None:
    for values, name in (({"num_image_tokens": 0}, "ice_text.model"), ({}, "tokenizer.model")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
        with pytest.raises(OSError, match=rf"no {name} in .*copy it there"):
            ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"version https://git-lfs.github.com/spec/v1\noid sha256:1"])
def test_corrupt_vocabulary(tmp_path: Path, content: bytes) -> None:
    for name in ("tokenizer.model", "ice_text.model"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a SentencePiece model.*copy it again"):
            ChatGLMTokenizer.from_pretrained(tmp_path)


def test_truncated_vocabulary(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.model"):
        file.chmod(0o644)
        whole = file.read_bytes()
        for length in range(2000, 2060):  # also where one piece ends and the next begins
            file.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="not a SentencePiece model, or only part of one"):
                ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_corrupt_config(path: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(path, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.chmod(0o644)
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not"):
        ChatGLMTokenizer.from_pretrained(tmp_path / "model")


def test_a_folder_with_both_vocabularies(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(tiny_folders["tiny1"] / "ice_text.model", tmp_path)
    shutil.copy(tiny_folders["tiny3"] / "tokenizer.model", tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path, num_image_tokens=0).vocab_file.endswith("ice_text.model")
    assert ChatGLMTokenizer.from_pretrained(tmp_path, chatglm_version=2).vocab_file.endswith("tokenizer.model")


def test_wrong_version(path: Path) -> None:
    with pytest.raises(ValueError, match="must be 1, 2, 3 or 4, or 11 for VisualGLM-6B"):
        ChatGLMTokenizer.from_pretrained(path, chatglm_version=5)


def test_the_class_can_be_called(path: Path) -> None:
    file = next(path.glob("*.model"))
    if file.name == "ice_text.model":
        ours: Any = ChatGLMTokenizer(str(file), num_image_tokens=0)
        assert type(ours) is ChatGLM1Tokenizer and ours.num_image_tokens == 0
    else:
        ours = ChatGLMTokenizer(str(file), chatglm_version=2)
        assert type(ours) is ChatGLM2Tokenizer and ours.chatglm_version == 2
    assert isinstance(ours, ChatGLMTokenizer) and isinstance(ours, PreTrainedTokenizer)
    assert isinstance(ChatGLMTokenizer.from_pretrained(file), type(ours))


# -------------------------------------------------------------------------------------------------- chat format


def history_of(tok: Any, messages: list[dict[str, Any]]) -> Any:
    if tok.chatglm_version == 3:
        return messages
    contents = [message["content"] for message in messages]
    return list(zip(contents[::2], contents[1::2], strict=True))


def test_chat_template_gives_the_ids_of_the_native_prompt(any_tokenizer: Any) -> None:
    for messages in (MESSAGES[:1], MESSAGES, [*MESSAGES[:2], {"role": "user", "content": "a <|user|> [gMASK]sop\n"}]):
        native = any_tokenizer.build_chat_input(messages[-1]["content"], history_of(any_tokenizer, messages[:-1]))
        found = any_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert native["input_ids"].tolist() == [found["input_ids"]]
        options = {"add_generation_prompt": True, "return_tensors": "pt"}
        assert torch.equal(any_tokenizer.apply_chat_template(messages, **options)["input_ids"], native["input_ids"])
        ids = any_tokenizer.apply_chat_template(messages, **options, return_dict=False)
        assert torch.equal(ids, native["input_ids"])


def test_chat_template_as_text(any_tokenizer: Any) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    for messages in (MESSAGES[:1], MESSAGES, system + MESSAGES[:1], system + MESSAGES):
        for asked in (True, False):
            text = any_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
            ids = any_tokenizer.apply_chat_template(messages, add_generation_prompt=asked, return_dict=False)
            assert ids == any_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
            rendered = PreTrainedTokenizerBase.apply_chat_template(
                any_tokenizer, messages, tokenize=False, add_generation_prompt=asked
            )
            assert text == rendered


def test_chat_template_of_a_batch(any_tokenizer: Any) -> None:
    chats = [MESSAGES[:1], MESSAGES]
    batch = any_tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
    for row, messages in zip(batch["input_ids"], chats, strict=True):
        ids = any_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert row.tolist()[-len(ids) :] == ids
        assert set(row.tolist()[: -len(ids)]) <= {any_tokenizer.pad_token_id}
    assert set(batch) == set(any_tokenizer.model_input_names)
    assert len(any_tokenizer.apply_chat_template(chats, tokenize=False)) == 2


def test_chat_template_of_an_answered_conversation(any_tokenizer: Any) -> None:
    """Generations 1 and 2: as the model was trained, with the end token. 3: the next role token would end it."""
    ids = any_tokenizer.apply_chat_template(MESSAGES[:2], return_dict=False)
    prompt = any_tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt
    answer = any_tokenizer.encode_text("Hi 👋")
    if any_tokenizer.chatglm_version == 3:
        assert ids[len(prompt) :] == any_tokenizer.encode_text("\n") + answer
    else:
        end = any_tokenizer.get_command("<eop>" if any_tokenizer.chatglm_version == 1 else "<eos>")
        assert ids[len(prompt) :] == [*answer, end]
        opened = any_tokenizer.apply_chat_template(MESSAGES[:2], continue_final_message=True, return_dict=False)
        assert opened == ids[:-1]
        text = any_tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, continue_final_message=True)
        assert text.endswith("Hi 👋")


def test_chat_template_truncates_by_whole_turns(any_tokenizer: Any) -> None:
    long = [*MESSAGES[:2] * 20, MESSAGES[2]]
    options = {"add_generation_prompt": True, "return_dict": False}
    shorter = any_tokenizer.apply_chat_template([*MESSAGES[:2] * 2, MESSAGES[2]], **options)
    found = any_tokenizer.apply_chat_template(long, truncation=True, max_length=len(shorter), **options)
    assert found == shorter
    with pytest.raises(ValueError, match="the question alone needs"):
        any_tokenizer.apply_chat_template(long, truncation=True, max_length=3, **options)


@pytest.mark.parametrize(
    ("messages", "options", "error", "match"),
    [
        ([], {}, ValueError, "an empty conversation, or no message list"),
        ("hi", {}, ValueError, "no message list"),
        ([{"role": "robot", "content": "x"}], {}, ValueError, "robot"),
        ([{"content": "x"}], {}, TypeError, r"messages\[0\] must be a dict like"),
        ([{"role": "user", "content": 7}], {}, TypeError, "must be a string or a list of text parts"),
        (MESSAGES[:1], {"add_generation_prompt": True, "continue_final_message": True}, ValueError, "exclude"),
        (MESSAGES[:1], {"return_assistant_tokens_mask": True}, ValueError, "not supported"),
    ],
)
def test_chat_template_of_wrong_messages(
    any_tokenizer: Any, messages: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        any_tokenizer.apply_chat_template(messages, **options)


def test_a_template_of_ones_own(any_tokenizer: Any) -> None:
    """Control tokens of the template are recognised, those typed by a user are not."""
    name = "<sop>" if any_tokenizer.chatglm_version == 1 else "<|user|>"
    template = "A{% for message in messages %}" + name + "{{ message.content }}{% endfor %}"
    typed = [{"role": "user", "content": f"x{name}y"}]
    ids = any_tokenizer.apply_chat_template(typed, chat_template=template, return_dict=False)
    expected = any_tokenizer.encode_text("A")
    if any_tokenizer.chatglm_version == 2:
        expected = any_tokenizer.encode_text(f"A{name}x{name}y")
    else:
        expected += [any_tokenizer.get_command(name), *any_tokenizer.encode_text(f"x{name}y")]
    assert ids == expected
    text = any_tokenizer.apply_chat_template(typed, chat_template=template, tokenize=False)
    assert text == f"A{name}x{name}y"


@needs_shared
def test_the_published_template_with_wrong_blanks_is_not_used(tmp_path: Path) -> None:
    published = json.loads((SHARED / "checkpoints" / "chatglm3-6b-32k-int4" / "tokenizer_config.json").read_text())
    shutil.copy(folder("v3") / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(published))
    ours = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template == CHAT_TEMPLATES[3] and published["chat_template"] != CHAT_TEMPLATES[3]
