"""Runs in the environment of OpenVINO GenAI: `FOLDER TOKENS`, prompts as JSON come in, answers go out."""

from __future__ import annotations

import json
import sys

import openvino_genai


def main() -> None:
    folder, tokens = sys.argv[1:]
    # Its defaults on a CPU are bfloat16 where there is such arithmetic, and a cache of 8 bits.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", **exact)
    config = pipeline.get_generation_config()
    config.max_new_tokens, config.do_sample = int(tokens), False
    answers = []
    for question in json.load(sys.stdin)["text"]:
        history = openvino_genai.ChatHistory([{"role": "user", "content": question}])
        answers.append(pipeline.generate(history, config).texts[0])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
