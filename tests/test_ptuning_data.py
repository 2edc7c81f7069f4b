"""Training data: files and their errors, ids and labels, truncation, batches."""

from __future__ import annotations

import copy
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.conversation import TOOLS_SYSTEM_PROMPT, chat_format, encode_conversation, encode_message
from conftest import SHARED, needs_shared
from ptuning.data import (
    Collator,
    Columns,
    DataError,
    Row,
    describe,
    encode_for_prediction,
    encode_row,
    make_dataset,
    read_rows,
    show_example,
)
from ptuning.encoding import ANSWER, OLD_TURNS, QUESTION, shorten
from tiny_chat import pair
from tokenizer_goldens import deviation, golden, tokenizer

VERSIONS = (1, 2, 3)
ADGEN = SHARED / "data" / "AdvertiseGen" / "dev.json"
TOOLS = [{"name": "get_weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}]
TOOL_ROW = {
    "tools": TOOLS,
    "conversations": [
        {"role": "user", "content": "How is the weather in Paris?"},
        {"role": "assistant", "content": "I ask."},
        {"role": "tool", "name": "get_weather", "parameters": {"city": "Paris"}, "observation": {"degrees": 18}},
        {"role": "assistant", "content": "18 degrees."},
        {"role": "user", "content": "谢谢"},
        {"role": "assistant", "content": "不客气"},
    ],
}


def ids_of(version: int) -> Any:
    return pair(version)[1]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def one_row(tmp_path: Path, record: Any, version: int = 3) -> Row:
    (row,) = read_rows(write(tmp_path / "one.json", record), chat_format=chat_format(version))
    return row


def learned(example: Any) -> list[int]:
    """The labels; for every position without one it is checked that the others are the ids."""
    assert len(example["input_ids"]) == len(example["labels"])
    assert all(label in (-100, index) for index, label in zip(example["input_ids"], example["labels"], strict=True))
    return [label for label in example["labels"] if label != -100]


# ---------------------------------------------------------------------------------------------------------- goldens


def golden_rows(tmp_path: Path, version: int, column: str | None) -> list[Row]:
    examples = golden("ptuning_preprocess")["examples"]
    records = [dict(zip(("q", "a", "h"), values, strict=True)) for values in zip(*examples.values(), strict=True)]
    columns = Columns("q", "a", "h" if column else None)
    rows = read_rows(write(tmp_path / "golden.json", *records), columns, chat_format(version))
    assert rows.skipped == [4]  # the one without a question
    return rows


@needs_shared
@pytest.mark.parametrize("column", [None, "history"])
@pytest.mark.parametrize("version", [1, 2])
def test_rows_of_the_originals(tmp_path: Path, version: int, column: str | None) -> None:
    data, tok = golden("ptuning_preprocess"), tokenizer(f"v{version}")
    assert set(data) == {"examples", "args", "source", "v1", "v2"}
    parts = {f"{what},history_column={name}" for what in ("train", "eval") for name in (None, "history")}
    assert set(data["v1"]) == set(data["v2"]) == parts
    source, target = data["args"]["max_source_length"], data["args"]["max_target_length"]
    assert data["args"]["ignore_pad_token_for_loss"]  # the labels of pads are -100
    expected = data[f"v{version}"][f"train,history_column={column}"]["ok"]
    predicted = data[f"v{version}"][f"eval,history_column={column}"]["ok"]
    lost = []
    rows = golden_rows(tmp_path, version, column)
    assert {len(values) for part in (expected, predicted) for values in part.values()} == {len(rows)}
    for index, row in enumerate(rows):
        example = encode_row(tok, row, source, target)
        (prediction,) = encode_for_prediction(tok, row, source, target, cut_references=True)
        (whole,) = encode_for_prediction(tok, row, source, target)
        if whole["target_ids"] != prediction["target_ids"]:
            assert deviation("references_are_whole") and example["truncated"] & ANSWER
            assert whole["target_ids"][: len(prediction["target_ids"])] == prediction["target_ids"]
        lost.append(example["truncated"])
        assert {key: prediction[key] for key in ("input_ids", "labels")} == {
            key: example[key] for key in ("input_ids", "labels")
        }
        length = source + target + (version == 2)
        assert len(example["input_ids"]) <= length and len(prediction["prompt_ids"]) <= source
        marks = [tok.get_command(name) for name in (("[gMASK]", "<sop>") if version == 1 else ("[gMASK]", "sop"))]
        # The originals' labels contain control tokens of the prompt, which decoding leaves out.
        around = [prediction["target_ids"], marks] if version == 1 else [marks, prediction["target_ids"]]
        assert predicted["labels"][index] == [*around[0], *around[1]]
        assert tok.decode(predicted["labels"][index], skip_special_tokens=True) == tok.decode(prediction["target_ids"])
        # The answers are the originals' always, the prompts where nothing of them was lost.
        answer = [label for label in expected["labels"][index] if label != -100]
        assert learned(example) == answer
        if version == 1 and column and index == 1:
            assert deviation("training_prompts_are_those_of_chat")
            asked = tok.build_chat_input(row.messages[0]["content"])["input_ids"][0].tolist()
            assert example["input_ids"] == [*asked[:-1], *answer] and prediction["prompt_ids"] == asked
            assert prediction["prompt_ids"] == [i for i in predicted["input_ids"][index] if i != tok.pad_token_id]
        elif (lost[-1] & OLD_TURNS) or (version == 2 and lost[-1] & QUESTION):
            assert deviation("truncation_keeps_the_question")
            asked = tok.decode(example["input_ids"])
            assert row.messages[-2]["content"][-4:] in asked and ("答：" in asked or version == 1)
        else:
            pads = [tok.pad_token_id] * (length - len(example["input_ids"]))
            assert example["input_ids"] + pads == expected["input_ids"][index]
            assert example["labels"] + [-100] * len(pads) == expected["labels"][index]
            pads = [tok.pad_token_id] * (source - len(prediction["prompt_ids"]))
            assert pads + prediction["prompt_ids"] == predicted["input_ids"][index]
    assert lost == ([OLD_TURNS | ANSWER, 0, 7] if column else [ANSWER, 0, QUESTION | ANSWER])


@needs_shared
def test_advertisegen_in_a_second() -> None:
    start, count = time.thread_time(), 0
    for version in VERSIONS:
        rows = read_rows(ADGEN, Columns("content", "summary"), chat_format(version))
        assert len(rows) == rows.found == 1070 and not rows.skipped
        count += sum(len(encode_row(tokenizer(f"v{version}"), row, 64, 128)["input_ids"]) for row in rows)
    assert count > 300_000
    assert time.thread_time() - start < 15  # about 0.3 s for all three on an idle core


# ------------------------------------------------------------------------------------------- as in a conversation


def fed(version: int, question: str, history: list[Any], role: str = "user") -> list[int]:
    """What model.chat feeds to the network, for real."""
    model, tok = pair(version)
    model = copy.deepcopy(model)  # one that remembers no other prompt: else only what is new would be fed
    seen: list[list[int]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["input_ids"])[0].tolist())

    model.register_forward_pre_hook(look, with_kwargs=True)
    options = {"role": role} if version == 3 else {}
    model.chat(tok, question, history=history, do_sample=False, max_new_tokens=1, **options)
    return seen[0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("history", [[], [["Hello", "Hi there"], ["1+1?", "2"]]])
def test_a_prompt_is_what_chat_feeds(tmp_path: Path, version: int, history: list[Any]) -> None:
    tok = ids_of(version)
    record = {"prompt": "你好 [gMASK] <|user|>", "response": "Hello, 世界", "history": history}
    row = one_row(tmp_path, record, version)
    example = encode_row(tok, row, 128, 64)
    (prediction,) = encode_for_prediction(tok, row, 128, 64)
    pairs: list[Any] = [tuple(item) for item in history]
    if version == 3:
        pairs = [
            {"role": r, "content": t} for item in history for r, t in zip(("user", "assistant"), item, strict=True)
        ]
    prompt = fed(version, record["prompt"], pairs)
    assert prediction["prompt_ids"] == prompt == example["input_ids"][: len(prompt)]
    answer = example["input_ids"][len(prompt) :]
    assert answer[:-1] == prediction["target_ids"]
    said = "Hello, 世界"
    assert answer[:-1] == (encode_message(tok, "assistant", "", said)[1:] if version == 3 else tok.encode_text(said))
    assert answer[-1] == tok.get_command("<eop>" if version == 1 else "<eos>")
    assert learned(example) == ([tok.get_command("<sop>")] if version == 1 else []) + answer


def test_a_conversation_with_tools(tmp_path: Path) -> None:
    tok, row = ids_of(3), one_row(tmp_path, TOOL_ROW)
    example = encode_row(tok, row, 400, 100)
    system = TOOLS_SYSTEM_PROMPT + "\n" + json.dumps(TOOLS, indent=4, ensure_ascii=False)
    call = "```python\ntool_call(city='Paris')\n```"
    said = [
        ("system", "", system), ("user", "", "How is the weather in Paris?"), ("assistant", "", "I ask."),
        ("assistant", "get_weather", call), ("observation", "", '{"degrees": 18}'), ("assistant", "", "18 degrees."),
        ("user", "", "谢谢"), ("assistant", "", "不客气"),
    ]  # fmt: skip
    # As the originals' preprocess_utils.py: a mask that says of which tokens the next one is learned, shifted by one.
    ids, mask = [tok.get_command("[gMASK]"), tok.get_command("sop")], [False, False]
    for role, metadata, content in said:
        part = encode_message(tok, role, metadata, content)
        ids, mask = ids + part, mask + [role == "assistant"] * len(part)
    ids.append(tok.eos_token_id)
    labels = [index if shown else -100 for index, shown in zip(ids, [False, *mask], strict=True)]
    assert (example["input_ids"], example["labels"], example["truncated"]) == (ids, labels, 0)

    # To be predicted: what the assistant says in one go, thought and call; the answer to the observation; the last.
    made = encode_for_prediction(tok, row, 400, 100)
    history = [
        {"role": "system", "content": TOOLS_SYSTEM_PROMPT, "tools": TOOLS},
        *({"role": r, "content": c, "metadata": m} for r, m, c in said[1:]),
    ]
    prompts = [fed(3, said[at][2], history[:at], said[at][0]) for at in (1, 4, 6)]
    assert [item["prompt_ids"] for item in made] == prompts
    assert made[0]["target_ids"] == [*encode_message(tok, *said[2])[1:], *encode_message(tok, *said[3])]
    ends = [item["labels"][-1] for item in made]
    assert ends == [tok.get_command("<|observation|>"), tok.get_command("<|user|>"), tok.eos_token_id]


def test_the_same_as_openai_messages(tmp_path: Path) -> None:
    ours = encode_row(ids_of(3), one_row(tmp_path, TOOL_ROW), 400, 100)
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages: list[Any] = [
        TOOL_ROW["conversations"][0],
        {"role": "assistant", "content": "I ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"degrees": 18}'},
        *TOOL_ROW["conversations"][3:],
    ]
    record = {"messages": messages, "tools": [{"type": "function", "function": TOOLS[0]}]}
    assert encode_row(ids_of(3), one_row(tmp_path, record), 400, 100) == ours


def test_a_row_with_an_empty_list_of_tools(tmp_path: Path) -> None:
    assert deviation("a_row_with_an_empty_list_of_tools_has_none")
    talk = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "a"}]
    plain = one_row(tmp_path, {"conversations": talk})
    assert one_row(tmp_path, {"conversations": talk, "tools": []}).messages == plain.messages
    system = {"role": "system", "content": "s", "tools": []}
    row = one_row(tmp_path, {"conversations": [system, *talk]})
    (made,) = encode_for_prediction(ids_of(3), row, 100, 20)
    assert made["prompt_ids"] == fed(3, "A", [system]) == fed(3, "A", [{"role": "system", "content": "s\n[]"}])


def test_a_system_message_and_tools_are_one(tmp_path: Path) -> None:
    assert deviation("one_system_message_with_tools")
    system = {"role": "system", "content": "Be brief."}
    row = one_row(tmp_path, {**TOOL_ROW, "conversations": [system, *TOOL_ROW["conversations"]]})
    made = encode_for_prediction(ids_of(3), row, 400, 100)
    assert made[0]["prompt_ids"] == fed(3, "How is the weather in Paris?", [{**system, "tools": TOOLS}])


def test_loss_is_where_it_is_wanted(tmp_path: Path) -> None:
    assert deviation("observations_are_never_learned") and deviation("conversations_end_with_what_is_learned")
    tok = ids_of(3)
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "A", "loss": True},
        {"role": "assistant", "content": "bad", "loss": False},
        {"role": "user", "content": "B"},
        {"role": "assistant", "content": "good"},
        {"role": "observation", "content": "seen", "loss": True},
        {"role": "assistant", "content": "never mind", "loss": False},
        {"role": "user", "content": "bye"},
    ]
    example = encode_row(tok, one_row(tmp_path, {"conversations": talk}), 100, 100)
    body = encode_message(tok, "assistant", "", "good")[1:]
    assert learned(example) == [*body, tok.get_command("<|observation|>")]
    assert example["input_ids"][-1] == tok.get_command("<|observation|>")
    nothing = [{**message, "loss": False} for message in talk]
    rows = read_rows(write(tmp_path / "two.json", {"conversations": talk}, {"conversations": nothing}))
    assert (len(rows), rows.skipped) == (1, [2])


def test_a_call_without_a_result_ends_as_a_call_does(tmp_path: Path) -> None:
    talk = [*TOOL_ROW["conversations"][:2], {"role": "tool", "name": "f", "parameters": {}}]
    example = encode_row(ids_of(3), one_row(tmp_path, {"conversations": talk}), 100, 100)
    assert example["labels"][-1] == ids_of(3).get_command("<|observation|>")


@pytest.mark.parametrize("version", [1, 2])
def test_conversations_of_questions_and_answers(tmp_path: Path, version: int) -> None:
    talk = [
        {"role": "system", "content": "Short!"},
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "B?"},
        {"role": "assistant", "content": "b", "loss": False},
        {"role": "user", "content": "C?"},
        {"role": "assistant", "content": "c"},
    ]
    tok = ids_of(version)
    rows = read_rows(write(tmp_path / "talk.json", {"conversations": talk}), chat_format=chat_format(version))
    assert rows.found == 1
    history = [("Short!\nA?", "a"), ("B?", "b")]
    expected = [encode_conversation(tok, "Short!\nA?"), encode_conversation(tok, "C?", history)]
    assert [encode_for_prediction(tok, row, 100, 20)[0]["prompt_ids"] for row in rows] == expected
    with pytest.raises(DataError, match=r"tool.json:1: .*ChatGLM3-6B"):
        read_rows(write(tmp_path / "tool.json", TOOL_ROW), chat_format=chat_format(version))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_source_prefix(tmp_path: Path, version: int) -> None:
    assert deviation("the_source_prefix_is_part_of_the_question")
    row = one_row(tmp_path, {"prompt": "cat", "response": "猫", "history": [["dog", "狗"]]}, version)
    same = one_row(tmp_path, {"prompt": "say: cat", "response": "猫", "history": [["say: dog", "狗"]]}, version)
    assert encode_row(ids_of(version), row, 64, 16, "say: ") == encode_row(ids_of(version), same, 64, 16)


# ------------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("version", VERSIONS)
def test_old_turns_go_first_then_the_middle_of_the_question(tmp_path: Path, version: int) -> None:
    tok = ids_of(version)
    history = [[f"question number {i}", f"answer number {i}"] for i in range(20)]
    record = {"prompt": "What is 37+48, please?", "response": "85", "history": history}
    row = one_row(tmp_path, record, version)
    before = copy.deepcopy(row)
    whole = encode_row(tok, row, 2000, 16)
    example = encode_row(tok, row, 120, 16)
    assert (whole["truncated"], example["truncated"]) == (0, OLD_TURNS)
    assert len(example["input_ids"]) <= 120 + 16 + (version > 1)
    text = tok.decode(example["input_ids"])
    assert "What is 37+48, please?" in text and "number 19" in text and "number 0" not in text
    assert learned(example) == learned(whole)

    record["prompt"] = "START " + "word " * 300 + "END?"
    example = encode_row(tok, one_row(tmp_path, record, version), 60, 16)
    text = tok.decode(example["input_ids"])
    assert example["truncated"] == OLD_TURNS | QUESTION
    assert "START" in text and "END?" in text and learned(example) == learned(whole)
    assert 50 <= len(example["input_ids"]) <= 60 + 16 + (version > 1)
    assert row == before


@pytest.mark.parametrize("version", VERSIONS)
def test_a_long_answer_loses_its_end(tmp_path: Path, version: int) -> None:
    tok = ids_of(version)
    row = one_row(tmp_path, {"prompt": "Hi", "response": "one two three four five six seven eight " * 30}, version)
    whole, example = (encode_row(tok, row, 32, target) for target in (2000, 16))
    kept = 14 if version == 1 else 16
    assert (whole["truncated"], example["truncated"]) == (0, ANSWER)
    spoken = learned(example)[1:] if version == 1 else learned(example)
    assert len(spoken) == kept + 1 and spoken[-1] == learned(whole)[-1]
    assert example["input_ids"][:-1] == whole["input_ids"][: len(example["input_ids"]) - 1]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", ["prompt", "response", "history"])
def test_a_row_of_a_million_characters(tmp_path: Path, version: int, place: str) -> None:
    long = "很长的文字 and words " * 60_000
    record: dict[str, Any] = {"prompt": "Hi?", "response": "Yes", "history": [["a", "b"]]}
    record[place] = [["a", long]] if place == "history" else long
    example = encode_row(ids_of(version), one_row(tmp_path, record, version), 64, 32)
    assert len(example["input_ids"]) <= 64 + 32 + 1 and example["truncated"]


def test_a_long_conversation_keeps_its_last_turn(tmp_path: Path) -> None:
    tok = ids_of(3)
    talk = [
        message
        for i in range(30)
        for message in ({"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"})
    ]
    system = {"role": "system", "content": "Count."}
    example = encode_row(tok, one_row(tmp_path, {"conversations": [system, *talk]}), 80, 40)
    text = tok.decode(example["input_ids"])
    assert example["truncated"] == OLD_TURNS and len(example["input_ids"]) <= 121
    assert "Count." in text and "question 29" in text and "answer 29" in text and "question 0" not in text
    assert example["labels"][-1] == tok.eos_token_id
    for at, content in ((0, "Q" * 3000 + " END"), (1, "A " * 3000), (2, "B " * 3000)):
        turn = copy.deepcopy(TOOL_ROW["conversations"][:4])
        turn[2 if at == 2 else at] |= {"observation" if at == 2 else "content": content}
        example = encode_row(tok, one_row(tmp_path, {"conversations": turn}), 80, 60)
        assert len(example["input_ids"]) <= 141 and learned(example)
        row = one_row(tmp_path, {"conversations": turn})
        predictions = encode_for_prediction(tok, row, 80, 60, cut_references=True)
        assert [len(item["prompt_ids"]) <= 80 and len(item["target_ids"]) <= 60 for item in predictions] == [True] * 2
        if at == 1:
            whole = encode_for_prediction(tok, row, 80, 60)[0]
            assert len(whole["target_ids"]) > 1000 and whole["labels"] == predictions[0]["labels"]
        if at != 1:  # what is given is cut, so that all that is learned stays
            assert "18 degrees." in tok.decode(learned(example)) and example["truncated"] == QUESTION


def test_what_cannot_fit_is_an_error(tmp_path: Path) -> None:
    tools = [{"name": f"tool{i}", "description": "long " * 50} for i in range(9)]
    row = one_row(tmp_path, {**TOOL_ROW, "tools": tools})
    for encode in (encode_row, encode_for_prediction):
        with pytest.raises(DataError, match=r"one.json:1: .*raise max_source_length"):
            encode(ids_of(3), row, 64, 32)
    for version in VERSIONS:
        short = one_row(tmp_path, {"prompt": "Hi", "response": "Yo"}, version)
        with pytest.raises(ValueError, match="max_source_length is 2"):
            encode_row(ids_of(version), short, 2, 16)
        with pytest.raises(ValueError, match="max_target_length is 0"):
            encode_row(ids_of(version), short, 64, 0)


def test_shorten_takes_as_little_as_needed() -> None:
    assert shorten("abcdefgh", len, 8) == "abcdefgh"
    assert shorten("abcdefgh", len, 5) == "abcgh"
    assert shorten("abcdefgh", len, 0) == ""
    assert shorten("abc", lambda text: len(text) + 9, 5) is None


# ------------------------------------------------------------------------------------------------------------ files

TWO = [{"content": "红\u2028裙", "summary": 'A "red" dress,\nindeed'}, {"content": "b", "summary": "c"}]
LIST = json.dumps(TWO, indent=1, ensure_ascii=False)
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in TWO)
CSV = 'content,summary,extra\r\n红\u2028裙,"A ""red"" dress,\nindeed",1\r\n\r\nb,c,2\r\n'


@pytest.mark.parametrize(
    ("name", "text", "encoding", "lines"),
    [
        ("a.json", LINES, "utf-8", [1, 2]),
        ("a.jsonl", "\n" + LINES.replace("\n", "\r\n\r\n"), "utf-8-sig", [2, 4]),
        ("a.json", LINES, "utf-16", [1, 2]),
        ("a.json", LIST, "utf-8", [2, 6]),
        ("a.JSON", "\n\n" + json.dumps(TWO), "utf-8-sig", [3, 3]),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in TWO), "utf-8", [1, 5]),
        ("a.csv", CSV, "utf-8", [2, 5]),
        ("a.csv", CSV, "utf-8-sig", [2, 5]),
    ],
)
def test_kinds_of_files(tmp_path: Path, name: str, text: str, encoding: str, lines: list[int]) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    for columns in (Columns("content", "summary"), None):
        rows = read_rows(path, columns)
        assert [row.where for row in rows] == [f"{path}:{line}" for line in lines]
        assert [tuple(m["content"] for m in row.messages) for row in rows] == [tuple(row.values()) for row in TWO]
    assert len(read_rows(path, max_rows=1)) == 1


def test_json_inside_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a,h\nB?,b,"[[""A?"", ""a""]]"\nC?,c,\n', encoding="utf-8")
    rows = read_rows(path, Columns("q", "a", "h"))
    assert [len(row.messages) for row in rows] == [4, 2]
    talk = json.dumps(TOOL_ROW["conversations"]).replace('"', '""')
    tools = json.dumps(TOOLS).replace('"', '""')
    path.write_text(f'conversations,tools\n"{talk}","{tools}"\n', encoding="utf-8")
    (row,) = read_rows(path)
    same = one_row(tmp_path, TOOL_ROW)
    assert encode_row(ids_of(3), row, 400, 99) == encode_row(ids_of(3), same, 400, 99)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_history_of_messages(tmp_path: Path, version: int) -> None:
    pairs = {"prompt": "B?", "response": "b", "history": [["A?", "a"]]}
    roles = {**pairs, "history": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "a"}]}
    assert one_row(tmp_path, roles, version) == one_row(tmp_path, pairs, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("history", [[[None, "Hi"], ["A?", "a"]], [[], ["", "Hi"], ["A?", "a"], ["B?", None]]])
def test_a_history_as_front_ends_make_it(tmp_path: Path, version: int, history: list[Any]) -> None:
    row = {"prompt": "B?", "response": "b", "history": [["", "Hi"], ["A?", "a"]]}
    assert one_row(tmp_path, {**row, "history": history}, version) == one_row(tmp_path, row, version)


GOOD = '{"content": "a", "summary": "b"}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"", r":1: the file is empty"),
        ("a.json", b" \n\n", r":1: the file is empty"),
        ("a.json", b"[]", r":1: there are no rows"),
        ("a.csv", b"content,summary\n", r":1: there are no rows"),
        ("a.txt", b"x", r": unknown kind of file '.txt': use .json, .jsonl or .csv"),
        (
            "a.json",
            GOOD * 2 + '{"content": "a" "summary": 1}',
            r":3: broken JSON at column 17: Expecting ',' delimiter",
        ),
        ("a.json", GOOD + "{'content': 1}", r":2: broken JSON at column 2"),
        ("a.json", GOOD.strip() + ",\n" + GOOD, r":1: broken JSON at column 33: Extra data"),
        ("a.json", "[" + GOOD.strip() + ",\n" + GOOD, r":3: broken JSON at column 1: a comma or the closing bracket"),
        ("a.json", "[\n" + GOOD + GOOD + "]", r":3: broken JSON at column 1: a comma"),
        ("a.json", "[\n" + GOOD + "]\n" + GOOD, r":4: broken JSON at column 1: there is more"),
        ("a.json", '{\n "content": "a",\n "summary": b\n}', r":3: broken JSON at column 13"),
        ("a.json", "nonsense", r":1: broken JSON at column 1"),
        ("a.json", GOOD + "[" * 100_000, r":2: the JSON is nested too deeply|:2: broken JSON"),
        ("a.json", GOOD + '["content"]', r":2: a row must be a JSON object .*, not a list"),
        ("a.json", GOOD + '{"content": "a", "summary": "b", "content": "c"}', r":2: the key 'content' is there twice"),
        ("a.json", GOOD + '{"content": "a", "summary": 5}', r":2: 'summary' must be text, not a number"),
        ("a.json", GOOD + '{"content": ["a"], "summary": "b"}', r":2: 'content' must be text, not a list"),
        ("a.json", GOOD.encode() + '{"content": "红"'.encode("gb18030"), r":2: byte 0xba at column 14 .*GB18030"),
        ("a.json", GOOD.encode() * 2 + b"\xff\xfe", r":3: byte 0xff at column 1 is not UTF-8"),
        ("a.json", GOOD.encode("utf-16-le"), r":1: not a text file, or UTF-16"),
        ("a.json", GOOD.encode("utf-32"), r":1: not a text file, or UTF-16 or UTF-32"),
        ("a.json", GOOD.encode("utf-16") + b"\0", r":1: broken UTF-16"),
        ("a.json", '{"q": "a", "a": "b"}', r":1: no known columns; there are 'q', 'a': .*--prompt_column"),
        ("a.json", '{"content": "", "summary": "b"}\n{"content": "a", "summary": null}', r":1: none of the 2 rows"),
        ("a.json", '{"content": "a"}', r":1: no column 'summary'; there are 'content'"),
        ("a.csv", "content,content\n1,2", r":1: the column 'content' is there twice"),
        ("a.csv", "content,summary\na,b\nc\n", r":3: 1 fields, but the header has 2"),
        ("a.csv", 'content,summary\n"a\nb",c\n"d,e\n', r":4: a quote is opened in this row and never closed"),
        ("a.csv", 'content,summary\n"a"b,c\n', r":2: broken CSV"),
        (
            "a.json",
            '{"prompt": "a", "response": "b", "history": [["a"]]}',
            r":1: 'history'\[0\] must be .* has 1 items",
        ),
        ("a.json", '{"prompt": "a", "response": "b", "history": "x"}', r":1: 'history' must be JSON"),
        ("a.json", '{"prompt": "a", "response": "b", "history": 5}', r":1: 'history' must be a list"),
        ("a.json", '{"conversations": {"role": "user"}}', r":1: 'conversations' must be a list of messages"),
        ("a.json", '{"conversations": [{"from": "Bob", "value": "x"}]}', r":1: conversations\[0\] is from 'Bob': use"),
        ("a.json", '{"conversations": [{"from": "human"}]}', r":1: conversations\[0\] .*a text under 'value'"),
        ("a.json", '{"conversations": [{"from": "function_call", "value": "x"}]}', r":1: conversations\[0\] .*as JSON"),
        ("a.json", '{"instruction": "a", "input": 1, "output": "b"}', ":1: 'input' must be text, not int"),
        ("a.json", '{"messages": [{"role": "boss", "content": "x"}]}', r":1: unknown role 'boss'"),
        ("a.json", '{"messages": [{"role": "user", "content": 1}]}', r":1: the content of messages\[0\] must be"),
        (
            "a.json",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": "no"}]}',
            r":1: 'loss' of messages\[1\] must be true or false, not 'no'",
        ),
        ("a.json", '{"messages": [{"role": "observation", "content": "x"}]}', r":1: an observation has to follow"),
        (
            "a.json",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            r":1: a system message has to be the first",
        ),
        (
            "a.json",
            '{"messages": [{"role": "tool", "parameters": {}}]}',
            r":1: messages\[0\] needs the name of the tool",
        ),
        (
            "a.json",
            '{"messages": [{"role": "tool", "name": "f", "parameters": 1}]}',
            r":1: messages\[0\] needs an object",
        ),
        (
            "a.json",
            '{"messages": [{"role": "tool", "name": "f", "parameters": {}}, {"role": "assistant", "content": "x"}]}',
            r":1: messages\[0\] needs what the tool returned under 'observation'",
        ),
        ("a.json", '{"messages": [{"role": "user", "content": "a"}], "tools": 1}', r":1: 'tools' must be a list"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}(?:{message})"):
        read_rows(path)


def test_more_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        read_rows(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"folder\.json: cannot be read"):
        read_rows(tmp_path / "folder.json")
    path = write(tmp_path / "many.json", *[{"content": index, "summary": "x"} for index in range(40)])
    with pytest.raises(DataError, match=r"many.json:1: [^:]*\n(.*\n){4}… and 35 more problems$"):
        read_rows(path)
    path = write(tmp_path / "named.json", {"a": "1", "b": "2"}, {"conversations": []})
    for columns, missing in ((Columns("a", "c"), "c"), (Columns("c", "b"), "c"), (Columns("a", "b", "h"), "h")):
        with pytest.raises(DataError, match=f"named.json:1: no column '{missing}'; there are 'a', 'b': name yours"):
            read_rows(path, columns)
    with pytest.raises(DataError, match="leave both out for conversations"):
        read_rows(write(tmp_path / "talk.json", TOOL_ROW), Columns("content", "summary"))
    with pytest.raises(ValueError, match="go together"):
        Columns("a")
    with pytest.raises(ValueError, match="history_column needs"):
        Columns(history="a")


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    records = [
        {"content": "a", "summary": "b"}, {"content": "a", "summary": ""}, {"content": "a"},
        {"content": "", "summary": "b"}, {"content": None, "summary": "b"}, {"content": "c", "summary": " \n"},
        {"content": "d", "summary": "e"},
    ]  # fmt: skip
    rows = read_rows(write(tmp_path / "a.json", *records))
    assert (len(rows), rows.found, rows.skipped) == (2, 7, [2, 3, 4, 5, 6])
    asked = read_rows(tmp_path / "a.json", require_answer=False)
    assert (len(asked), asked.skipped) == (5, [4, 5])
    for version in VERSIONS:
        (example,) = encode_for_prediction(ids_of(version), asked[1], 64, 16)
        assert example["prompt_ids"]


# --------------------------------------------------------------------------------------------- data sets and batches


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # datasets forks, from Python 3.12 on with a warning
def test_a_data_set_is_cached_and_the_same_for_any_number_of_processes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("ptuning.data.ROWS_PER_PROCESS", 150)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    tok = ids_of(3)
    records = [{"prompt": f"{i}+{i}?", "response": f"{2 * i} " * (1 + 20 * (i == 7))} for i in range(310)]
    rows = read_rows(write(tmp_path / "a.json", *records, {"prompt": "x", "response": ""}))
    with caplog.at_level(logging.WARNING, "ptuning.data"):
        made = make_dataset(tok, rows, 32, 16, cache_dir=tmp_path / "cache")
    assert sum("1 examples are too long" in record.message for record in caplog.records) == 1
    files = {file["filename"]: Path(file["filename"]).stat().st_mtime_ns for file in made.cache_files}
    assert files and all(name.startswith(str(tmp_path)) for name in files)
    expected = [encode_row(tok, row, 32, 16) for row in rows]
    assert [{key: row[key] for key in ("input_ids", "labels", "truncated")} for row in made] == expected
    assert made["length"] == [len(example["input_ids"]) for example in expected]
    again = make_dataset(tok, rows, 32, 16, cache_dir=tmp_path / "cache")
    assert {file["filename"]: Path(file["filename"]).stat().st_mtime_ns for file in again.cache_files} == files
    anew = make_dataset(tok, rows, 32, 16, cache_dir=tmp_path / "cache", overwrite_cache=True)
    assert {file["filename"]: Path(file["filename"]).stat().st_mtime_ns for file in anew.cache_files} != files
    assert make_dataset(tok, rows, 33, 16, cache_dir=tmp_path / "cache")._fingerprint != made._fingerprint
    assert make_dataset(tok, rows[1:], 32, 16, cache_dir=tmp_path / "cache")._fingerprint != made._fingerprint
    shared = make_dataset(tok, rows, 32, 16, cache_dir=tmp_path / "other", num_proc=2)
    assert len(shared.cache_files) == 2 and shared[:] == made[:]
    summary = describe(rows, made)
    assert (summary.rows, summary.examples, summary.skipped, summary.truncated) == (311, 310, 1, 1)
    assert summary.longest == max(made["length"]) and summary.learned == sum(made["learned"])
    assert "311 rows" in summary.text() and "(lines 311)" in summary.text() and "已跳过" in summary.text("zh")


def test_a_data_set_for_prediction(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = read_rows(write(tmp_path / "a.json", TOOL_ROW, {"prompt": "Hi", "response": "Yo"}))
    made = make_dataset(ids_of(3), rows, 400, 50, prediction=True, cache_dir=tmp_path)
    assert made["row"] == [0, 0, 0, 1]
    assert made[0]["prompt_ids"] == encode_for_prediction(ids_of(3), rows[0], 400, 50)[0]["prompt_ids"]
    batch = Collator(0)([made[index] for index in range(4)])
    assert set(batch) == {"input_ids", "labels", "prompt_ids", "prompt_mask", "target_ids"}


def test_batches_are_padded_to_their_longest() -> None:
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_ids": [5], "target_ids": [6], "length": 3},
        {"input_ids": [8], "labels": [8], "prompt_ids": [8, 9], "target_ids": [7, 7], "length": 1},
    ]
    batch = Collator(3)(examples)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "prompt_ids": [[3, 5], [8, 9]],
        "prompt_mask": [[0, 1], [1, 1]],
        "target_ids": [[6, -100], [7, 7]],
    }
    assert all(value.dtype == torch.long for value in batch.values())
    wide = Collator(3, label_pad=3, multiple_of=8)(examples)
    assert wide["input_ids"].shape == wide["labels"].shape == (2, 8)
    assert wide["labels"][1].tolist() == [8, *[3] * 7] and wide["prompt_ids"].shape == (2, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_padding_changes_no_loss(tmp_path: Path, version: int) -> None:
    model, tok = pair(version)
    short, long = (
        encode_row(tok, one_row(tmp_path, {"prompt": "Hi", "response": text}, version), 64, 64)
        for text in ("Yo", "A much longer answer than that")
    )
    with torch.no_grad():
        alone = model(**Collator(tok.pad_token_id)([short])).logits[0]
        padded = model(**Collator(tok.pad_token_id)([short, long])).logits[0, : len(alone)]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


def test_an_example_to_look_at(tmp_path: Path) -> None:
    tok = ids_of(3)
    example = encode_row(tok, one_row(tmp_path, {"prompt": "你好\nHi", "response": "Yes \x1b[0m"}), 64, 64)
    text = show_example(tok, example)
    lines = text.split("\n")
    assert len(lines) == len(example["input_ids"]) + 2 and "\x1b" not in text
    assert lines[0] == f"An example: {len(example['input_ids'])} tokens, {len(learned(example))} of them learned"
    assert lines[2].split() == ["0", str(example["input_ids"][0]), "[gMASK]"]
    assert lines[-1].split() == [str(len(example["input_ids"]) - 1), *[str(tok.eos_token_id)] * 2, "</s>"]
    assert show_example(tok, example, "zh").startswith("一个样本")


# ------------------------------------------------------------------------------------------- other programs' forms

SHAREGPT = {
    "id": "7",
    "system": "You are brief.",
    "tools": json.dumps(TOOLS),
    "conversations": [
        {"from": "human", "value": "How is the weather in Paris?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": '{"degrees": 18}'},
        {"from": "gpt", "value": "18 degrees."},
    ],
}
OPENAI_ROW = {
    "tools": TOOLS,
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "How is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": '{"degrees": 18}'},
        {"role": "assistant", "content": "18 degrees."},
    ],
}  # fmt: skip


def test_sharegpt_openai_and_chatglm3_say_the_same(tmp_path: Path) -> None:
    rows = [one_row(tmp_path, record).messages for record in (SHAREGPT, OPENAI_ROW)]
    talk: Any = TOOL_ROW["conversations"]
    ours = {"tools": TOOLS, "conversations": [OPENAI_ROW["messages"][0], talk[0], *talk[2:4]]}
    assert rows[0] == rows[1] == one_row(tmp_path, ours).messages
    assert [message["loss"] for message in rows[0]] == [False, False, True, False, True]


ALPACA = {"instruction": "Translate.", "input": "你好", "output": "Hello", "source": "x"}


@pytest.mark.parametrize("version", VERSIONS)
def test_alpaca(version: int, tmp_path: Path) -> None:
    row = one_row(tmp_path, ALPACA, version)
    asked = {"prompt": "Translate.\n你好", "response": "Hello"}
    assert row == one_row(tmp_path, asked, version)
    assert one_row(tmp_path, {**ALPACA, "input": ""}, version).messages[0]["content"] == "Translate."
    history = [["Hi", "Hi!"], ["Ready?", "Yes."]]
    assert one_row(tmp_path, {**ALPACA, "history": history}, version) == one_row(
        tmp_path, {**asked, "history": history}, version)  # fmt: skip
    found = one_row(tmp_path, {**ALPACA, "system": "Be brief.", "history": history}, version).messages
    assert "Be brief." in found[0]["content"] and [message["loss"] for message in found][-2:] == [False, True]
    assert sum(message["loss"] for message in found) == 1
    # The columns named by hand: the input is not lost.
    named = read_rows(write(tmp_path / "a.json", ALPACA), Columns("instruction", "output"), chat_format(version))
    assert (named[0].messages, named[0].whole) == (row.messages, row.whole)


def test_forms_and_unused_columns_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.json", SHAREGPT, OPENAI_ROW, ALPACA, {"prompt": "a", "response": "b"}, TOOL_ROW)
    rows = read_rows(path)
    assert dict(rows.forms) == dict.fromkeys(["ShareGPT", "OpenAI messages", "Alpaca", "pairs", "conversations"], 1)
    assert rows.unused == ["id", "source"]
    told = describe(rows, make_dataset(ids_of(3), rows, 64, 64, cache_dir=tmp_path)).text("en")
    assert "(ShareGPT, OpenAI messages, Alpaca, pairs, conversations): 5 rows" in told
    assert "columns that are not used: id, source" in told
