"""What guessing ahead gains and costs: `python -m benchmarks.guessing`.

Answers of a model with random weights, on a CPU, with prompt lookup and without, in turns. The answers are scripted: a
logits processor chooses the given tokens, so the network does all of its work and the text is that of a real task. A
summary that quotes its document and a file with some lines edited can be guessed; a text about something else cannot.
Prints tokens per second after the first token, their ratio, and tokens per forward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import LogitsProcessor

import chatglm
from benchmarks.decode_6b import make
from benchmarks.serving import SIZES, make_model
from chatglm.demo import with_vocabulary_of
from chatglm.generation import ChatCache, GenerationOptions, generate_text, weights_stamp

DOCUMENT = """The harbour office closed the north basin on Monday after divers found cracks in the outer wall.
Engineers expect repairs to take six weeks and cost about two million euros. Ferries to the islands
will leave from the south quay until the end of the month, and trucks are asked to use the road
along the canal. Fishing boats may enter the basin only at high water. The mayor said that the wall,
built in 1931, had been inspected two years ago and declared safe. A second inspection in spring was
cancelled because the budget of the port authority had been cut by a third. Traders in the fish
market fear that customers will stay away, and ask the town to lower the rents until the repairs are
finished. The port authority will publish a report on the condition of all walls before the end of
the year."""
SUMMARY = """In short: the harbour office closed the north basin after divers found cracks in the outer wall.
Engineers expect repairs to take six weeks and cost about two million euros. Until then, ferries to
the islands will leave from the south quay, and trucks are asked to use the road along the canal. A
second inspection in spring was cancelled because the budget of the port authority had been cut by a
third. Traders in the fish market fear that customers will stay away, and the port authority will
publish a report on the condition of all walls before the end of the year."""
CODE = '''def load_table(path, separator=","):
    """Reads a table; the first line has the names of its columns."""
    with open(path, encoding="utf-8") as file:
        names = file.readline().rstrip("\\n").split(separator)
        rows = []
        for line in file:
            values = line.rstrip("\\n").split(separator)
            if len(values) != len(names):
                raise ValueError(f"{path}: {len(values)} values for {len(names)} columns")
            rows.append(dict(zip(names, values)))
    return rows


def average(rows, name):
    """The mean of one column."""
    total = 0.0
    for row in rows:
        total += float(row[name])
    return total / len(rows)
'''
EDITED = (
    CODE.replace("load_table", "read_table").replace("total / len(rows)", "total / len(rows) if rows else 0.0")
    .replace("dict(zip(names, values))", "dict(zip(names, values, strict=True))")
)  # fmt: skip
STORY = """Once a fox lived at the edge of a wide forest. Every evening she walked to the river, watched how
the water carried leaves away, and wondered where they went. One day she followed them past the
mill, under two bridges and through a valley full of mist, until the river grew broad and slow.
There sat an old heron who knew every leaf by name. He told her that nothing is lost; it only
travels. The fox thanked him, drank, and ran home before the moon was high."""
TASKS = {
    "a summary": (f"Summarise this document.\n\n{DOCUMENT}", SUMMARY),
    "edited code": (f"Call the function read_table, and make it strict.\n\n{CODE}", EDITED),
    "a text about something else": ("Tell me a story about an animal that is curious.", STORY),
}


class Script(LogitsProcessor):
    """Makes the model answer with these tokens."""

    def __init__(self, prompt_tokens: int, ids: list[int]) -> None:
        self._prompt_tokens, self._ids = prompt_tokens, ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -100.0)
        only[:, self._ids[input_ids.shape[1] - self._prompt_tokens]] = 0.0
        return only


def answer(model: Any, prompt: list[int], ids: list[int], cache: ChatCache, **options: Any) -> tuple[float, int]:
    """Answers with `ids`; returns the seconds after the first token, and the number of forwards for them."""
    chosen = GenerationOptions(
        do_sample=False, max_new_tokens=len(ids), logits_processor=[Script(len(prompt), ids)], **options
    )
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = model.register_forward_hook(count)
    try:
        steps = generate_text(model, prompt, chosen, lambda _: "", cache=cache)
        next(steps)
        began, before = time.perf_counter(), forwards
        for _ in steps:
            pass
        return time.perf_counter() - began, forwards - before
    finally:
        hook.remove()


def compare(model: Any, tokenizer: Any, name: str, turns: int, tokens: int) -> tuple[list[str], float]:
    """Prints the line of one task; returns its cells, and the ratio of the speeds."""
    question, text = TASKS[name]
    prompt, ids = model.prepare_turn(tokenizer, question)[0], tokenizer.encode_text(text)
    cache = ChatCache(weights_stamp(model))
    answer(model, prompt, ids[:2], cache)  # reads the prompt
    times: dict[int, list[float]] = {0: [], tokens: []}
    forwards = 0
    for turn in range(turns):
        for most in (0, tokens) if turn % 2 == 0 else (tokens, 0):
            seconds, count = answer(model, prompt, ids, cache, prompt_lookup_num_tokens=most)
            times[most].append(seconds)
            forwards = count if most else forwards
    without, ahead = (len(ids[1:]) / statistics.median(times[most]) for most in (0, tokens))
    ratios = sorted(one / other for one, other in zip(times[0], times[tokens], strict=True))
    cells = [
        name, f"{len(prompt)}", f"{len(ids)}", f"{without:.1f}", f"{ahead:.1f}",
        f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}", f"{len(ids[1:]) / forwards:.1f}",
    ]  # fmt: skip
    print("| " + " | ".join(cells) + " |", flush=True)
    return cells, statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("6b", *SIZES), default="6b", help="6b is quantised, others are float32")
    parser.add_argument("--generation", type=int, choices=(2, 3), default=3)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--precision", choices=("default", "int8", "exact"), default="default")
    parser.add_argument("--turns", type=int, default=2, help="answers of each kind to a task")
    parser.add_argument("--tokens", type=int, default=10, help="prompt_lookup_num_tokens")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="only this one")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.size == "6b":
        model = make(args.generation, args.bits, None, torch.bfloat16, args.precision)
        folder = with_vocabulary_of(args.generation)
        tokenizer = chatglm.ChatGLMTokenizer.from_pretrained(folder, chatglm_version=args.generation)
    else:
        model, tokenizer = make_model(args.generation, args.size, "float32")
    print("| answer | tokens of the prompt | of the answer | tokens/s | with lookup | ratio | tokens per forward |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.task or TASKS:
        compare(model, tokenizer, name, args.turns, args.tokens)


if __name__ == "__main__":
    main()
