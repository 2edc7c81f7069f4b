"""OpenVINO GenAI, for `benchmarks.engines`: `python benchmarks/openvino_turns.py FOLDER` in its own environment.

Answers all prompts of a turn at once, by its continuous batching, with OpenVINO's own choice of precision.
"""

from __future__ import annotations

import json
import sys
import time

import openvino_genai


def main() -> None:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU")
    tokenizer = pipeline.get_tokenizer()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        config = openvino_genai.GenerationConfig(max_new_tokens=asked["tokens"], do_sample=False)
        began = time.perf_counter()
        messages = ([{"role": "user", "content": prompt}] for prompt in asked["prompts"])
        chats = [tokenizer.apply_chat_template(one, True) for one in messages]
        answers = pipeline.generate(chats, [config] * len(chats))
        seconds = time.perf_counter() - began
        tokens = sum(tokenizer.encode(one.m_generation_ids[0], False).input_ids.shape[1] for one in answers)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
