"""The bundled demo of GLM-4's kind: its size, what it says, and a round with a tool in JSON."""

from __future__ import annotations

import json

import chatglm
from chatglm.demo import FOLDERS, is_demo
from tools.demo import corpus

GLM4 = FOLDERS[4]
TOOLS = json.loads((GLM4.parent / "tools.json").read_text(encoding="utf-8"))


def test_the_demo() -> None:
    assert is_demo(GLM4) and sum(file.stat().st_size for file in GLM4.iterdir()) < 12e6
    model, tokenizer = chatglm.load(GLM4, device="cpu", dtype="float32")
    assert isinstance(model, chatglm.ChatGLM4ForConditionalGeneration)
    assert model.chat(tokenizer, "Hello", temperature=0)[0] == corpus.INTENTS["hello"]["en"]
    assert model.chat(tokenizer, "12 + 7 = ?", temperature=0)[0].endswith("=19")
    history = [{"role": "system", "content": "", "tools": TOOLS}]
    call, history = model.chat(tokenizer, "北京的天气怎么样？", history=history, temperature=0)
    assert call == {"name": "get_weather", "parameters": {"city": "北京"}}
    result = '{"temperature": 25, "weather": "晴"}'
    said, _ = model.chat(tokenizer, result, history=history, role="observation", temperature=0)
    assert said == "北京的天气：晴，25度。"
