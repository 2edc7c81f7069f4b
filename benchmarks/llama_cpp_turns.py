"""llama.cpp, for `benchmarks.engines`: `python benchmarks/llama_cpp_turns.py FILE.gguf` in its own environment.

Needs `pip install llama-cpp-python jinja2`, which compiles llama.cpp for the CPU that it finds. Its own server answers
one request after the other, so this calls the library: all prompts of a turn in one batch, then one token of each at
once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time

import jinja2
import llama_cpp
import numpy as np

CONTEXT = 512  # tokens of one client


class Library:
    """A model and a context for `clients` sequences."""

    def __init__(self, file: str, clients: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch, settings.n_ubatch = CONTEXT * clients, clients, 2048, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._template = jinja2.Template(llama_cpp.llama_model_chat_template(self._model, None).decode())
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def tokens(self, question: str) -> list[int]:
        """The ids of a chat that begins with this question."""
        messages = [{"role": "user", "content": question}]
        text = self._template.render(messages=messages, add_generation_prompt=True).encode()
        ids = (llama_cpp.llama_token * CONTEXT)()
        return list(ids[: llama_cpp.llama_tokenize(self._vocabulary, text, len(text), ids, CONTEXT, False, True)])

    def ends(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def run(self, fed: dict[int, tuple[int, list[int]]]) -> dict[int, int]:
        """The likeliest next token of each sequence, by its number; `fed` has its length so far and its new tokens."""
        batch, place, last = self._batch, 0, {}
        for sequence, (start, ids) in fed.items():
            for offset, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, start + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = offset == len(ids) - 1
                place += 1
            last[sequence] = place - 1
        batch.n_tokens = place
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        size, chosen = llama_cpp.llama_vocab_n_tokens(self._vocabulary), {}
        for sequence, at in last.items():
            logits = llama_cpp.llama_get_logits_ith(self._context, at)
            values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (size,))
            chosen[sequence] = int(values.argmax())
        return chosen


def answer(library: Library, questions: list[str], tokens: int) -> dict[str, float]:
    """Answers all questions at once: the tokens of the answers, the seconds, and the seconds to the first token."""
    library.forget()
    began, count = time.perf_counter(), 0
    fed = {number: (0, library.tokens(question)) for number, question in enumerate(questions)}
    first = 0.0
    for _ in range(tokens):
        chosen = library.run(fed)
        first = first or time.perf_counter() - began
        count += len(chosen)
        fed = {
            number: (fed[number][0] + len(fed[number][1]), [token])
            for number, token in chosen.items() if not library.ends(token)
        }  # fmt: skip
        if not fed:
            break
    return {"tokens": count, "seconds": time.perf_counter() - began, "first": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--clients", type=int, default=16, help="at most")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    library = Library(args.file, args.clients, args.threads)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(library, asked["prompts"], asked["tokens"])), flush=True)


if __name__ == "__main__":
    main()
