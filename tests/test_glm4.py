"""GLM-4 through the front doors: terminal, API with tools, training rows, export."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm import load
from chatglm.exports.folders import export_chatglm, export_glm
from chatglm.exports.gguf_file import export_gguf
from live_server import Parrot, serve
from ptuning.encoding import encode_row
from ptuning.rows import rows_from_records
from tiny_glm4 import make_glm4

ROOT = Path(__file__).resolve().parents[1]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def glm4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = make_glm4(tmp_path_factory.mktemp("glm4") / "glm-4-tiny")
    return folder, *load(folder, device="cpu")


def test_the_terminal(glm4: Any) -> None:
    folder, model, tokenizer = glm4
    options = ("--temperature", "0", "--max-new-tokens", "8", "--system", "短。", "--lang", "en", "-p", "你好")
    done = subprocess.run(
        [sys.executable, "cli_demo.py", "--model", str(folder), *options],
        cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300, check=True,
    )  # fmt: skip
    answer, _ = model.chat(tokenizer, "你好", [{"role": "system", "content": "短。"}], **GREEDY)
    assert (done.stdout, done.stderr) == (f"{answer}\n", "")


def test_a_round_with_a_tool(glm4: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, tokenizer = glm4
    monkeypatch.setattr("live_server.pair", lambda version: (model, tokenizer))
    with serve(Parrot(4, max_batch=2)) as live:
        answer = live.chat("你好", temperature=0, max_tokens=8).choices[0]
        assert answer.message.content == model.chat(tokenizer, "你好", **GREEDY)[0]
        question = live.engine.say('get_weather\n{"city": "北京"}')
        for options in ({}, {"stream": True}):
            said = live.chat(question, tools=TOOLS, **options)
            parts = [chunk.choices[0].delta for chunk in said] if options else [said.choices[0].message]
            called = [call for part in parts for call in part.tool_calls or []]
            assert called[0].function.name == "get_weather"
            arguments = "".join(call.function.arguments or "" for call in called)
            assert json.loads(arguments) == {"city": "北京"}
        if importlib.util.find_spec("llguidance") is not None:
            schema = {"properties": {"days": {"enum": [3]}}, "required": ["days"]}
            function = {"name": "get_weather", "parameters": schema}
            forced: Any = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
            made = live.chat("x", max_tokens=200, temperature=1.5, seed=1, logprobs=True, **forced).choices[0]
            assert json.loads(made.message.tool_calls[0].function.arguments) == {"days": 3}
            written = "".join(one.token for one in made.logprobs.content)
            assert written.startswith("get_weather\n{"), written  # as it learned it: JSON
        question = live.engine.say("\n答案是\n{1}")
        assert live.chat(question, tools=TOOLS).choices[0].message.content == "答案是\n{1}"


def test_training_rows(glm4: Any) -> None:
    _, _, tokenizer = glm4
    turns = [
        {"role": "system", "content": "", "tools": TOOLS},
        {"role": "user", "content": "天气"},
        {"role": "assistant", "metadata": "get_weather", "content": "{}"},
        {"role": "observation", "content": "晴"},
        {"role": "assistant", "content": "晴天"},
    ]
    (row,) = rows_from_records([(1, {"messages": turns})], "rows", None, tokenizer.chat_format)
    encoded = encode_row(tokenizer, row)
    text = tokenizer.decode(encoded["input_ids"])
    called = "<|assistant|>get_weather\n{}<|observation|>\n晴"
    assert text.endswith(f"<|user|>\n天气{called}<|assistant|>\n晴天<|endoftext|>")
    learned = [index for index in encoded["labels"] if index != -100]
    assert tokenizer.decode(learned) == "get_weather\n{}<|observation|>\n晴天<|endoftext|>"


def test_a_cache_is_a_recomputation_at_long_distances(glm4: Any) -> None:
    _, model, _ = glm4
    ids = torch.randint(5, 250, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :690], use_cache=True).past_key_values
        rest = model(ids[:, 690:], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(whole[:, 690:], rest, atol=1e-4)


def test_the_export_for_other_engines(glm4: Any, tmp_path: Path) -> None:
    folder, model, tokenizer = glm4
    export_glm(folder, tmp_path / "glm")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", dtype=torch.float32).eval()
    ids = torch.arange(3, 120).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model.float()(ids).logits)
    fast = AutoTokenizer.from_pretrained(tmp_path / "glm")
    messages = [{"role": "user", "content": "你好 <world>\n "}]
    for tools in (None, TOOLS):
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        assert fast.apply_chat_template(messages, **options) == tokenizer.apply_chat_template(messages, **options)
    export_chatglm(tmp_path / "glm", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert load(tmp_path / "back")[1]("你好")["input_ids"] == tokenizer("你好")["input_ids"]


def test_the_gguf_file(glm4: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    folder, _, tokenizer = glm4
    export_gguf(folder, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "chatglm-bpe"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.get_command("<|endoftext|>")
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.get_command("<|user|>")
    assert fields["chatglm.rope.freq_base"].contents() == 5e6
