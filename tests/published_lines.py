"""The lines that the model cards of the originals show, run against the hub that HF_ENDPOINT names.

One program, because huggingface_hub reads HF_ENDPOINT when it is imported. It prints a line of JSON for each card.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import AutoModel, AutoTokenizer

import chatglm  # the one line more than on the cards

SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


def chatglm_6b(name: str) -> Any:
    """ChatGLM-6B, its INT4 and INT8 versions; `.half().cuda()` where there is a GPU."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True).float()
    response, history = model.chat(tokenizer, "你好", history=[], **SETTINGS)
    response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history, **SETTINGS)
    return model, response, history


def chatglm2_6b(name: str) -> Any:
    """ChatGLM2-6B and ChatGLM3-6B, with their long and quantised versions; device='cuda' on the cards."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, device="cpu").float()
    model = model.eval()
    response, history = model.chat(tokenizer, "你好", history=[], **SETTINGS)
    response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history, **SETTINGS)
    return model, response, history


def quantised(name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True).quantize(8).float()
    response, history = model.chat(tokenizer, "你好", history=[], **SETTINGS)
    return model, response, history


def base(name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True).float()
    inputs = tokenizer(["今天天气真不错"], return_tensors="pt").to("cpu")
    outputs = model.generate(**inputs, max_new_tokens=3)
    return model, tokenizer.decode(outputs[0].tolist()), []


def model_first(name: str) -> Any:
    """The model before its tokenizer, as some programs load them."""
    model = AutoModel.from_pretrained(name, trust_remote_code=True).float()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    return model, *model.chat(tokenizer, "你好", history=[], **SETTINGS)


def revision(name: str) -> Any:
    """With a tag, as the cards advise, and by `chatglm.load`; then from the cache alone."""
    AutoModel.from_pretrained(name, trust_remote_code=True, revision="v1.0")
    AutoTokenizer.from_pretrained(name, trust_remote_code=True, revision="v1.0")
    chatglm.load(name, revision="v1.0")
    model, _ = chatglm.load(name, revision="v1.0", local_files_only=True)
    AutoTokenizer.from_pretrained(name, trust_remote_code=True, revision="v1.0", local_files_only=True)
    AutoModel.from_pretrained(name, trust_remote_code=True, revision="v1.0", local_files_only=True)
    return model, model.name_or_path, []


if __name__ == "__main__":
    for card, repository in json.loads(sys.argv[1]):
        loaded, answer, turns = globals()[card](repository)
        result = {
            "name": repository, "generation": loaded.config.chatglm_version, "layers": loaded.config.num_layers,
            "quantized": loaded.quantized, "answer": answer, "turns": len(turns),
        }  # fmt: skip
        print(json.dumps(result), flush=True)
