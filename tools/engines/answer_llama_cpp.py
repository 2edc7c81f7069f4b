"""Runs in the environment of xllamacpp: `FILE TOKENS KIND`, prompts as JSON come in, answers go out.

KIND is `text` (a chat, which llama.cpp renders and tokenises) or `ids` (the token ids of the same chat).
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main() -> None:
    file, tokens, kind = sys.argv[1:]
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel = 1024, 1
    settings.warmup = False
    server = xllamacpp.Server(settings)
    answers = []
    for prompt in json.load(sys.stdin)[kind]:
        greedy = {"temperature": 0, "max_tokens": int(tokens)}
        if kind == "ids":
            answers.append(server.handle_completions(greedy | {"prompt": prompt})["choices"][0]["text"])
        else:
            body = greedy | {"messages": [{"role": "user", "content": prompt}]}
            answers.append(server.handle_chat_completions(body)["choices"][0]["message"]["content"])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
