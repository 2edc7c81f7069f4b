"""ModelScope's package with its cards' lines: folders in the layouts of its cache, offline, and never their code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tiny_folders import make_folder

pytestmark = pytest.mark.skipif(
    find_spec("modelscope") is None, reason="modelscope is not installed: pip install 'chatglm-rebuilt[modelscope]'"
)
ROOT = Path(__file__).resolve().parents[1]
#: configuration.json as in the repositories of ZhipuAI.
CONFIGURATION = {
    "framework": "pytorch", "task": "chat", "allow_remote": True, "pipeline": {"type": "chatglm26b-text-generation"},
    "model": {"type": "chatglm2-6b"},
}  # fmt: skip
LAYOUTS = {
    "newest": "models/ZhipuAI--{name}/snapshots/master", "of 2024": "models/ZhipuAI/{name}",
    "of 2023": "ZhipuAI/{name}",
}  # fmt: skip
CARDS = r"""
import json, sys
order, name, folder = sys.argv[1:]
if order == "ours first":
    import chatglm
from modelscope import AutoModel, AutoTokenizer, Model, snapshot_download
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
if order == "theirs first":
    import chatglm

found = snapshot_download(f"ZhipuAI/{name}", local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=True)
model = AutoModel.from_pretrained(found, trust_remote_code=True).float().eval()
first, history = model.chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=3)
second, history = model.chat(tokenizer, "介绍下清华大学", history=history, do_sample=False, max_new_tokens=3)

settings = {"do_sample": False, "max_new_tokens": 3}
answers = []
for source in (folder, found):
    loaded = Model.from_pretrained(source, device_map="auto")
    pipe = pipeline(task=Tasks.chat, model=loaded)
    result = pipe({"text": "你好", "history": [], **settings})
    answers.append(result["response"])
    result = pipe({"text": "介绍下清华大学", "history": result["history"]}, **settings)
    answers.append(result["response"])
    assert result["history"] == json.loads(json.dumps(history)) or result["history"] == history
if order == "ours first":  # else modelscope's own `pipeline` has been imported
    pipe = pipeline(task=Tasks.chat, model=folder, device="cpu", model_revision="v1.0.2")
    answers.append(pipe({"text": "你好", "history": None, **settings})["response"])
assert pipeline(task=Tasks.chat, model=loaded)([{"text": "你好", **settings}])[0]["response"] == answers[0]
try:
    pipe("你好")
except TypeError as error:
    print(error, file=sys.stderr)
print("RESULT" + json.dumps({
    "found": found, "expected": [first, second], "answers": answers, "generation": loaded.config.chatglm_version,
    "class": type(loaded).__module__ + "." + type(loaded).__name__, "device": str(loaded.device),
}))
"""


@pytest.mark.parametrize(
    ("version", "layout", "order"),
    [(1, "of 2023", "ours first"), (2, "of 2024", "theirs first"), (3, "newest", "ours first")],
)
def test_the_lines_of_the_cards(version: int, layout: str, order: str, tmp_path: Path) -> None:
    name = "chatglm-6b" if version == 1 else f"chatglm{version}-6b"
    folder = make_folder(tmp_path / LAYOUTS[layout].format(name=name), version)
    for file in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / file).read_text())
        values.pop("chatglm_version", None)  # as published: only the path has a name
        (folder / file).write_text(json.dumps(values))
    (folder / "configuration.json").write_text(json.dumps(CONFIGURATION))
    for code in ("ms_wrapper.py", "modeling_chatglm.py", "configuration_chatglm.py", "tokenization_chatglm.py"):
        (folder / code).write_text("raise SystemExit('code of the repository was run')\n")
    result = run(CARDS, order, name, str(folder), cache=tmp_path)
    assert result["found"] == str(folder)
    first, second = result["expected"]
    assert result["answers"] == [first, second, first, second, first][: None if order == "ours first" else 4]
    assert result["class"] == f"chatglm.chat.ChatGLM{version}ForConditionalGeneration"
    assert result["generation"] == version


def run(program: str, *arguments: str, cache: Path) -> Any:
    variables = os.environ | {
        "MODELSCOPE_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }  # fmt: skip
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "give a dict with the question" in done.stderr
    return json.loads(done.stdout.partition("RESULT")[2])


def test_models_of_others_are_left_to_modelscope(tmp_path: Path) -> None:
    program = """
import json, sys
import chatglm
from modelscope import Model
try:
    Model.from_pretrained(sys.argv[1])
except FileNotFoundError as error:
    print("RESULT" + json.dumps(str(error)))
print("give a dict with the question", file=sys.stderr)
"""
    (tmp_path / "config.json").write_text('{"model_type": "something-else"}')
    assert "configuration.json" in run(program, str(tmp_path), cache=tmp_path)
