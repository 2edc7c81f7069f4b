"""Preference tuning: the data, the four losses, and that the adapter answers as it was trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from chatglm.conversation import chat_format
from ptuning.data_files import DataError
from ptuning.preferences import hold_out, read_judged, read_pairs
from tiny_chat import FOLDERS, pair
from tiny_folders import make_folder

pytest.importorskip("datasets")
pytest.importorskip("peft")
LENGTHS = (64, 32)
SAME = [
    {"prompt": "1+1?", "chosen": "2.", "rejected": "3."},
    {"prompt": [{"role": "user", "content": "1+1?"}], "chosen": [{"role": "assistant", "content": "2."}],
     "rejected": {"role": "assistant", "content": "3."}},
    {"instruction": "1+1?", "input": "", "chosen": "2.", "rejected": "3."},
    {"conversations": [{"from": "human", "value": "1+1?"}], "chosen": {"from": "gpt", "value": "2."},
     "rejected": {"from": "gpt", "value": "3."}},
]  # fmt: skip


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_every_form_is_the_prompt_of_chat_and_two_answers(version: int, tmp_path: Path) -> None:
    tokenizer = pair(version)[1]
    pairs = read_pairs(write(tmp_path / "a.json", SAME), tokenizer, *LENGTHS)
    assert len(pairs) == 4 and all(one == pairs[0] for one in pairs)
    found = pairs[0]
    assert found["prompt_ids"] == chat_format(version).encode(tokenizer, "1+1?")
    end = chat_format(version).stop_token_ids(tokenizer)[0]
    for name, text in (("chosen_ids", "2."), ("rejected_ids", "3.")):
        assert found[name][-1] == end and text in tokenizer.decode(found[name], skip_special_tokens=True)


def test_a_history_and_a_system_message_come_first(tmp_path: Path) -> None:
    tokenizer = pair(3)[1]
    history = [["Hi", "Hello"]]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "1+1?"}]  # fmt: skip
    answers = {"chosen": "2.", "rejected": "3."}
    rows = [{"prompt": "1+1?", "history": history, "system": "Be brief.", **answers}, {"prompt": talk, **answers}]
    one, other = read_pairs(write(tmp_path / "a.json", rows), tokenizer, 128, 32)
    assert one == other and "Be brief." in tokenizer.decode(one["prompt_ids"])


def test_judged_answers(tmp_path: Path) -> None:
    tokenizer = pair(3)[1]
    judged = [{"prompt": "1+1?", "completion": "2.", "label": True},
              {"prompt": "1+1?", "response": "3.", "label": False}]  # fmt: skip
    found = read_judged(write(tmp_path / "a.json", judged), tokenizer, *LENGTHS)
    assert found == read_judged(write(tmp_path / "b.json", SAME[:1]), tokenizer, *LENGTHS)
    assert [one["label"] for one in found] == [True, False]
    rest, held = hold_out(list(range(20)), 0.25, seed=1)
    assert len(held) == 5 and sorted(rest + held) == list(range(20))


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "a", "chosen": "b"}, r"a\.json:1: there is no 'rejected'"),
    ({"chosen": "b", "rejected": "c"}, r"a\.json:1: there is no 'prompt'"),
    ({"prompt": "a", "chosen": 1, "rejected": "c"}, r"a\.json:1: 'chosen' must be a text"),
    ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}, "must end with a message of"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "there is no question"),
])  # fmt: skip
def test_errors_name_file_and_line(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path / "a.json", [row]), pair(3)[1], *LENGTHS)


# ---- training --------------------------------------------------------------------------------------------------------


def arguments(base: Path, data: str, out: Path, *extra: str) -> list[str]:
    return ["--train_file", data, "--model_name_or_path", str(base), "--output_dir", str(out), "--use_cpu",
            "--disable_tqdm", "True", "--report_to", "none", "--max_source_length", "64", "--max_target_length", "32",
            "--per_device_train_batch_size", "4", "--logging_steps", "1", *extra]  # fmt: skip


def preferences(rows: int) -> list[dict[str, str]]:
    """A made-up preference: friendly answers over unfriendly ones, which the base finds equally likely."""
    generator = random.Random(0)
    topics = ["天气", "音乐", "电影", "足球", "旅行", "读书", "美食", "电脑", "手机", "花", "猫", "狗", "海"]
    asks = ["你喜欢{}吗？", "说说{}。", "{}怎么样？", "请介绍一下{}。", "你对{}有什么看法？"]
    friendly = ["{}很有意思，我很乐意和你聊聊。", "关于{}，我很高兴为你介绍。", "{}让人开心，谢谢你的提问。"]
    unfriendly = ["{}没什么可说的，别再问我了。", "关于{}，我不想回答你。", "{}太无聊了，你自己去查。"]
    made = []
    for _ in range(rows):
        topic = generator.choice(topics)
        texts = [generator.choice(kinds).format(topic) for kinds in (asks, friendly, unfriendly)]
        made.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    return made


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("loss", "version", "extra"), [
    pytest.param("dpo", 2, [], marks=pytest.mark.slow),
    ("dpo", 3, ["--quantization_bit", "4"]), ("orpo", 3, []), ("kto", 3, []), ("reward", 2, []),
])  # fmt: skip
def test_every_loss_trains_an_adapter(loss: str, version: int, extra: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from ptuning import prefer

    base = make_folder(tmp_path / f"chatglm{version}", version)
    data, out = write(tmp_path / "a.json", preferences(12)), tmp_path / "out"
    argv = arguments(base, data, out, "--loss", loss, "--val_size", "4", "--max_steps", "2", "--learning_rate", "1e-2")
    assert prefer.main([*argv, *extra]) == 0
    folder = out / "checkpoint-2"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    found = json.loads((out / "all_results.json").read_text())
    assert found["train_loss"] > 0 and "eval_loss" in found
    if loss != "reward":
        model, _ = chatglm.load(base, "cpu", adapter=folder, quantize=4 if extra else None)
        ids = torch.arange(100, 110)[None]
        with torch.no_grad():
            tuned = model(input_ids=ids).logits
            with model.adapter(None):
                assert (model(input_ids=ids).logits - tuned).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_dpo_moves_held_out_preferences(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from ptuning import prefer

    data, out = write(tmp_path / "a.json", preferences(400)), tmp_path / "out"
    argv = arguments(FOLDERS[3], data, out, "--val_size", "60", "--max_steps", "60", "--learning_rate", "2e-3",
                     "--lora_target_modules", "all-linear", "--per_device_train_batch_size", "8")  # fmt: skip
    assert prefer.main(argv) == 0
    found = json.loads((out / "all_results.json").read_text())
    assert found["eval_preferred_before"] < 0.75 and found["eval_preferred"] >= 0.9
    assert found["eval_rewards/accuracies"] >= 0.9


WRONG = {
    "loss": (["--loss", "ppo"], "--loss ppo: use one of dpo, orpo, kto, reward"),
    "prefix": (["--pre_seq_len", "8"], "preference tuning trains LoRA"),
    "base": (["--init_lora_weights", "pissa"], "changes the base, and the base is the reference"),
    "mistyped": (["--lora_rang", "8"], "there is no argument --lora_rang: did you mean --lora_rank?"),
    "two": (["--val_size", "2", "--validation_file", "{data}"], "--val_size and --validation_file: leave one out"),
    "no file": (["--validation_file", "none.json"], "--validation_file none.json: there is no such file"),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    from ptuning import prefer

    data = write(tmp_path / "a.json", SAME)
    extra, message = WRONG[case]
    argv = arguments(tmp_path, data, tmp_path / "out", *(word.format(data=data) for word in extra))
    assert prefer.main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("error: ")


@pytest.mark.filterwarnings("default")
def test_generation_1_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    from ptuning import prefer

    base = make_folder(tmp_path / "chatglm1", 1)
    assert prefer.main(arguments(base, write(tmp_path / "a.json", SAME), tmp_path / "out")) == 2
    assert "preference tuning is for generations 2 and later" in capsys.readouterr().err
