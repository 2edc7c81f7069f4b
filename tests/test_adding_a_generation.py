"""A new generation chats everywhere as soon as it is registered; see docs/adding_a_generation.md."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer

import toy_generation
from chatglm import load
from chatglm.conversation import chat_format, register_chat_format
from chatglm.generations import unregister_generation
from live_server import Parrot, serve
from ptuning.encoding import encode_row
from ptuning.rows import rows_from_records

ROOT = Path(__file__).resolve().parents[1]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
SYSTEM = [{"role": "system", "content": "Be brief."}]
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
CALL = 'get_weather\n{"city": "北京"}'


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, timeout=300, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Any]]:
    """(folder, model, tokenizer) of the toy generation, which is unknown again afterwards."""
    toy_generation.register()
    folder = tmp_path_factory.mktemp("toy-9m")
    toy_generation.save(folder)
    yield folder, *load(folder, device="cpu")
    unregister_generation(toy_generation.GENERATION)


def test_it_takes_less_than_120_lines() -> None:
    assert len(inspect.getsource(toy_generation).splitlines()) < 120


def test_transformers_finds_it(toy: Any) -> None:
    folder, model, tokenizer = toy
    assert type(AutoModel.from_pretrained(folder)) is type(model) is toy_generation.ToyModel
    assert type(AutoTokenizer.from_pretrained(folder)) is type(tokenizer) is toy_generation.ToyTokenizer
    assert model.chat_format is tokenizer.chat_format is chat_format(toy_generation.GENERATION)


def test_the_prompt_is_its_own(toy: Any) -> None:
    _, _, tokenizer = toy
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|toy|><|user|>\n Hi<|assistant|>"
    ids = tokenizer.build_chat_input("Hi")["input_ids"][0].tolist()
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<|toy|>", "<|user|>"]


def test_the_terminal(toy: Any) -> None:
    folder, model, tokenizer = toy
    options = ("--temperature", "0", "--max-new-tokens", "8", "--system", "Be brief.", "--lang", "en")
    done = run(toy_generation.__file__, "--model", str(folder), *options, "-p", "Hi")
    answer, _ = model.chat(tokenizer, "Hi", SYSTEM, **GREEDY)
    assert (done.stdout, done.stderr, done.returncode) == (f"{answer}\n", "", 0)


def test_the_api_calls_its_tools(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, tokenizer = toy
    monkeypatch.setattr("live_server.pair", lambda version: (model, tokenizer))
    with serve(Parrot(toy_generation.GENERATION, max_batch=2)) as live:
        answer = live.chat("Hi", temperature=0, max_tokens=8).choices[0]
        assert answer.message.content == model.chat(tokenizer, "Hi", **GREEDY)[0]
        question = live.engine.say(CALL)
        for options in ({}, {"stream": True}):
            said = live.chat(question, tools=TOOLS, **options)
            parts = [chunk.choices[0].delta for chunk in said] if options else [said.choices[0].message]
            (call, *more) = [call.function for part in parts for call in part.tool_calls or []]
            assert call.name == "get_weather"
            assert json.loads("".join(part.arguments or "" for part in (call, *more))) == {"city": "北京"}


PAGE = """
import asyncio, json, sys
from types import SimpleNamespace
import toy_generation
from chatglm import load
from chatglm.serving.chat_engine import ChatEngine
from chatglm.front.page.page import Page

toy_generation.register()
model, tokenizer = load(sys.argv[1], device="cpu")
request = SimpleNamespace(session_hash="one", headers={})
with ChatEngine(model, tokenizer, max_batch=1) as engine:
    page = Page(
        lambda question, history, settings, cancel: engine.chat(question, history, cancel=cancel, **settings),
        tokenizer.chat_format, {"max_new_tokens": 8},
    )
    pending = asyncio.run(page.ask("Hi", None, request))[page.place]
    *_, last = page.reply(pending, "", "Be brief.", "", 0, 1, 0, "chat", False, request)
print(json.dumps([page.name, page.system.visible, last[page.place]["history"]]))
"""


@pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs gradio")
def test_the_page(toy: Any) -> None:
    """In a process of its own: gradio leaves event loops open."""
    folder, model, tokenizer = toy
    name, has_system, history = json.loads(run("-c", PAGE, str(folder)).stdout)
    assert (name, has_system) == ("Toy", True)
    assert history == model.chat(tokenizer, "Hi", SYSTEM, **GREEDY)[1][1:]


def test_training_rows(toy: Any) -> None:
    _, _, tokenizer = toy
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (row,) = rows_from_records([(1, {"messages": turns})], "rows", None, tokenizer.chat_format)
    assert tokenizer.decode(encode_row(tokenizer, row)["input_ids"]) == (
        "<|toy|><|user|> \n Hi<|assistant|> \n Hello<|end|>"
    )


def test_a_second_format_is_refused(toy: Any) -> None:
    class Other(toy_generation.ToyFormat):
        pass

    with pytest.raises(ValueError, match="generation 9 has a chat format already: ToyFormat"):
        register_chat_format(Other())
