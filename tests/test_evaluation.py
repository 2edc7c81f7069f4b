"""evaluation/: C-Eval on made-up questions, and lm-evaluation-harness on tiny tasks, with the bundled models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import chatglm
from chatglm.conversation import encode_conversation, stop_token_ids
from chatglm.demo import FOLDERS as DEMOS
from evaluation import evaluate_ceval as ceval
from evaluation import run_lm_eval
from tiny_chat import pair

ROOT = Path(__file__).resolve().parents[1]
TASKS = Path(__file__).parent / "data" / "lm_eval"


def question(text: str, *choices: str) -> str:
    return text + "\n" + "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))


SUBJECTS = {
    "STEM/sums": [(question("2+3=", "4", "5", "6", "7"), 1), (question("十加一是多少？", "11", "12", "1", "10"), 0)],
    "STEM/units": [(question("一公里有多少米？", "10", "100", "1000", "1"), 2)],
    "Other/birds": [(question("哪一种动物会飞？", "狗", "猫", "鱼", "鸟"), 3)],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, rows in SUBJECTS.items():
        path = tmp_path / "CEval" / "val" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"inputs_pretokenized": text, "label": label}, ensure_ascii=False) for text, label in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "CEval"


def run(data: Path, *more: str, version: int = 3) -> int:
    output = str(data.parent / "result.json")
    fixed = ["--model", str(DEMOS[version]), "--data", str(data), "--output", output, "--device", "cpu"]
    return ceval.main([*fixed, "--max-new-tokens", "8", *more])


def result(data: Path) -> Any:
    return json.loads((data.parent / "result.json").read_text(encoding="utf-8"))


# ---- C-Eval: the two passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
def test_batches_answer_as_single_questions_do(version: int) -> None:
    model, tokenizer = pair(version)
    texts = [text for rows in SUBJECTS.values() for text, _ in rows]
    together = ceval.Runner(model, tokenizer, batch_size=3, max_new_tokens=6)
    alone = ceval.Runner(model, tokenizer, batch_size=1, max_new_tokens=6)
    assert together.reason(texts) == alone.reason(texts)
    assert together.choose(texts) == alone.choose(texts)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_choice_is_the_likeliest_letter_of_the_answer(version: int) -> None:
    model, tokenizer = pair(version)
    runner = ceval.Runner(model, tokenizer)
    text = SUBJECTS["STEM/sums"][0][0] + ceval.EXTRACTION
    ids = encode_conversation(tokenizer, text)
    answers = []
    for letter in ceval.CHOICES:  # as the model would write it: after a line end in generation 3
        start = tokenizer.encode_text("\n") if version == 3 else []
        answer = [*start, *tokenizer.encode_text(letter)]
        with torch.no_grad():
            scores = model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        answers.append(float(scores[range(len(answer)), answer].sum()))
    assert runner.choose([text]) == [answers.index(max(answers))]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_reasoning_is_what_the_model_writes_greedily(version: int) -> None:
    model, tokenizer = pair(version)
    text = SUBJECTS["STEM/units"][0][0]
    ids = torch.tensor([encode_conversation(tokenizer, text)])
    stops = stop_token_ids(tokenizer)
    for _ in range(5):
        with torch.no_grad():
            best = model(ids).logits[0, -1].argmax()
        if int(best) in stops:
            break
        ids = torch.cat((ids, best.view(1, 1)), dim=1)
    new = ids[0, len(encode_conversation(tokenizer, text)) :].tolist()
    expected = chatglm.conversation.parse_response(version, tokenizer.decode(new, skip_special_tokens=True)).content
    assert ceval.Runner(model, tokenizer, max_new_tokens=5).reason([text]) == [expected]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_long_prompt_keeps_its_end(version: int) -> None:
    model, tokenizer = pair(version)
    runner = ceval.Runner(model, tokenizer, max_length=60)
    ids = runner.prompt("开头" * 200 + "最后的问题是什么？")
    assert len(ids) <= 60
    assert "最后的问题是什么" in tokenizer.decode(ids)
    short = encode_conversation(tokenizer, "你好")
    assert runner.prompt("你好") == short
    with pytest.raises(ceval.CEvalError, match="--max-length 1"):
        ceval.Runner(model, tokenizer, max_length=1).prompt("你好")


# ---- C-Eval: files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 3])
def test_a_whole_run(data: Path, capsys: pytest.CaptureFixture[str], version: int) -> None:
    assert run(data, version=version) == 0
    found = result(data)
    assert list(found["subjects"]) == sorted(SUBJECTS)
    for name, rows in SUBJECTS.items():
        letters = found["subjects"][name]["answers"]
        correct = sum("ABCD"[label] == letter for (_, label), letter in zip(rows, letters, strict=True))
        assert found["subjects"][name]["correct"] == correct
    sums = found["summary"]
    assert set(sums) == {"STEM", "Other", "total"}
    assert sums["total"]["questions"] == sums["total"]["counted"] == 4
    assert sums["total"]["correct"] == sums["STEM"]["correct"] + sums["Other"]["correct"]
    assert sums["total"]["accuracy"] == sums["total"]["correct"] / 4
    printed = capsys.readouterr().out
    assert "STEM/sums: accuracy" in printed
    assert f"total: accuracy {sums['total']['accuracy']:.2%}" in printed


def test_an_interrupted_run_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, asked = ceval.Runner.measure, []

    def interrupted(self: Any, subject: ceval.Subject) -> Any:
        if asked:
            raise KeyboardInterrupt
        asked.append(subject.name)
        return measure(self, subject)

    monkeypatch.setattr(ceval.Runner, "measure", interrupted)
    assert run(data) == 130
    assert list(result(data)["subjects"]) == asked == ["Other/birds"]

    def noted(self: Any, subject: ceval.Subject) -> Any:
        asked.append(subject.name)
        return measure(self, subject)

    monkeypatch.setattr(ceval.Runner, "measure", noted)
    assert run(data) == 0
    assert asked == ["Other/birds", "STEM/sums", "STEM/units"]
    assert result(data)["summary"]["total"]["questions"] == 4
    assert [path.name for path in data.parent.iterdir() if path.is_file()] == ["result.json"]

    (data / "val" / "STEM" / "units.jsonl").write_text('{"inputs_pretokenized": "新的问题？", "label": 0}\n')
    assert run(data) == 0
    assert asked[3:] == ["STEM/units"]  # its questions have changed


def test_results_of_other_settings_are_not_mixed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data) == 0
    assert run(data, "--quantize", "8") == 1
    assert "quantize was None" in capsys.readouterr().err
    assert run(data, "--quantize", "8", "--overwrite") == 0
    assert result(data)["settings"]["quantize"] == 8
    (data.parent / "result.json").write_text("{}")
    assert run(data) == 1
    assert "no result of this program" in capsys.readouterr().err


def test_questions_without_a_label_are_answered_but_not_counted(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"inputs_pretokenized": SUBJECTS["STEM/sums"][0][0]}, {"inputs_pretokenized": "1+1=?\n", "label": -1}]
    (data / "test").mkdir()
    (data / "test" / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(data, "--split", "test") == 0
    assert len(result(data)["subjects"]["sums"]["answers"]) == 2
    assert result(data)["summary"]["total"]["accuracy"] is None
    assert "2 questions, none with a label" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"inputs_pretokenized": "?", "label": 4}', r"bad.jsonl:2: label is 4, not 0, 1, 2 or 3"),
        ('{"inputs_pretokenized": "?", "label": "A"}', r"bad.jsonl:2: label is 'A'"),
        ('{"question": "?", "label": 0}', r"bad.jsonl:2: there is no text inputs_pretokenized"),
        ("[1]", r"bad.jsonl:2: there is no text inputs_pretokenized"),
        ("{", r"bad.jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_named_before_the_model_loads(
    data: Path, capsys: pytest.CaptureFixture[str], line: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceval, "load_from_arguments", lambda args: pytest.fail("the model was loaded"))
    (data / "val" / "bad.jsonl").write_text(f'{{"inputs_pretokenized": "?", "label": 0}}\n{line}\n', encoding="utf-8")
    assert run(data) == 1
    assert words in capsys.readouterr().err


def test_missing_and_empty_files(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--split", "dev") == 1
    assert "it has val" in capsys.readouterr().err
    assert run(data.parent / "nothing") == 1
    assert "name its folder with --data" in capsys.readouterr().err
    (data / "empty").mkdir()
    assert run(data, "--split", "empty") == 1
    assert "no .jsonl file" in capsys.readouterr().err
    (data / "empty" / "one.jsonl").write_text("\n")
    assert run(data, "--split", "empty") == 1
    assert "holds no questions" in capsys.readouterr().err
    (data / "empty" / "one.jsonl").write_bytes("问题".encode("gbk"))
    assert run(data, "--split", "empty") == 1
    assert "not UTF-8" in capsys.readouterr().err


# ---- lm-evaluation-harness -------------------------------------------------------------------------------------------


def tasks(folder: Path) -> list[str]:
    """The tiny tasks, with the place of their data in them."""
    names = []
    for path in TASKS.glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        values["dataset_kwargs"]["data_files"] = {"test": str(TASKS / "choice.jsonl")}
        (folder / path.name).write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        names.append(values["task"])
    return sorted(names)


@cache
def demo(version: int) -> tuple[Any, Any]:
    return chatglm.load(DEMOS[version], "cpu", "float32")


def by_hand(version: int, context: str, answer: str) -> float:
    """The log-likelihood of an answer, from the logits."""
    model, tokenizer = demo(version)
    if version == 1:
        before, after = tokenizer.encode(context), tokenizer.encode(answer, add_special_tokens=False)
        assert before[-2:] == [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    else:
        before = [*tokenizer.get_prefix_tokens(), *tokenizer.encode_text(context)]
        after = [*tokenizer.get_prefix_tokens(), *tokenizer.encode_text(context + answer)][len(before) :]
    with torch.no_grad():
        scores = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return float(scores[range(len(after)), after].sum())


def answer_by_hand(version: int, context: str) -> str:
    """The greedy answer of 8 tokens, up to a line break."""
    model, tokenizer = demo(version)
    ids = tokenizer(context, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).split("\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 3])
def test_the_harness_runs_offline_and_scores_as_the_logits_say(tmp_path: Path, version: int) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    names = tasks(tmp_path)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [
        sys.executable, "evaluation/run_lm_eval.py", "run", "--model", "hf",
        "--model_args", f"pretrained={DEMOS[version]},dtype=float32", "--tasks", ",".join(names),
        "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2",
        "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name in names
        for path in tmp_path.glob(f"out/*/samples_{name}_*.jsonl")
    }
    choice, generate = names
    for sample in samples[choice]:
        for number, response in enumerate(sample["resps"]):
            texts = sample["arguments"][f"gen_args_{number}"]
            expected = by_hand(version, texts["arg_0"], texts["arg_1"])
            assert float(response[0][0]) == pytest.approx(expected, abs=2e-3)
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples[generate])
    assert len(samples[generate]) == 3
    for sample in samples[generate]:
        assert sample["resps"][0][0] == answer_by_hand(version, sample["arguments"]["gen_args_0"]["arg_0"])


def test_generation_1_without_context_and_its_refusal() -> None:
    """What teach() changes, on a stand-in for the harness's class."""
    tokenizer = chatglm.ChatGLMTokenizer.from_pretrained(DEMOS[1])
    seen: list[Any] = []

    class Harness:
        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def _encode_pair(self, context: str, continuation: str) -> Any:
            raise AssertionError("not for generation 1")

        def tok_encode(self, text: str, add_special_tokens: bool) -> Any:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

        def tok_batch_encode(self, texts: list[str]) -> Any:
            encoded = self.tokenizer(texts, padding="longest", return_tensors="pt", padding_side="left")
            return encoded["input_ids"][:, -4:], encoded["attention_mask"]

        def _loglikelihood_tokens(self, requests: list[Any]) -> None:
            seen.extend(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> None:
            raise AssertionError("not for generation 1")

    run_lm_eval.teach(Harness)
    harness = Harness()
    context, answer = harness._encode_pair("你好", "很好")
    marks = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    assert context == [*tokenizer.encode_text("你好"), *marks]
    assert answer == tokenizer.encode_text("很好")
    harness._loglikelihood_tokens([(("", ""), [marks[1]], answer), (("", ""), context, answer)])
    assert seen == [(("", ""), marks, answer), (("", ""), context, answer)]
    ids, mask = harness.tok_batch_encode(["你", "你好，今天天气怎么样？"])
    assert mask.shape == ids.shape
    assert mask.tolist() == (ids != tokenizer.pad_token_id).long().tolist()
    assert harness.tok_decode(tokenizer.eos_token_id, skip_special_tokens=False) == tokenizer.eos_token != ""
    assert harness.tok_decode(answer) == "很好"
    with pytest.raises(ValueError, match="not defined for ChatGLM-6B"):
        harness.loglikelihood_rolling([])
