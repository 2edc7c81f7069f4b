"""OpenVINO GenAI, for `benchmarks.engines`: `python benchmarks/openvino_turns.py FOLDER` in its own environment.

Answers all prompts of a turn at once, by its continuous batching, with OpenVINO's own choice of precision.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import openvino_genai


def main() -> None:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU")
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(pipeline, asked["prompts"], asked["tokens"])), flush=True)


def answer(pipeline: Any, questions: list[str], tokens: int) -> dict[str, float]:
    """Answers all questions at once: the tokens of the answers, the seconds, and the median of those to the first."""
    config = openvino_genai.GenerationConfig(max_new_tokens=tokens, do_sample=False)
    tokenizer, began = pipeline.get_tokenizer(), time.perf_counter()
    handles = []
    for number, question in enumerate(questions):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], True)
        ids = tokenizer.encode(chat, add_special_tokens=False).input_ids
        handles.append(pipeline.add_request(number, ids, config))
    count, firsts = 0, [0.0] * len(handles)
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for number, handle in enumerate(handles):
            if handle.can_read():
                count += sum(len(output.generated_ids) for output in handle.read().values())
                firsts[number] = firsts[number] or time.perf_counter() - began
    return {"tokens": count, "seconds": time.perf_counter() - began, "first": statistics.median(firsts)}


if __name__ == "__main__":
    main()
