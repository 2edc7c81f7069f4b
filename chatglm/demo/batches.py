"""Dialogues -> token ids -> batches of like length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..conversation.formats import message_content, prompt_segments
from . import corpus

#: Dialogues that are sorted by length together.
POOL = 4096


@dataclass
class Example:
    """Token ids, and for each whether it is learned."""

    ids: list[int]
    learned: list[bool]


class Encoder:
    """Dialogues as the ids that the tokenizer's prompt format gives.

    One time in six the words of a user that need not be copied are cut into other pieces than usual, which teaches
    unusual spellings.
    """

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.version: int = tokenizer.chatglm_version

    def examples(self, dialogue: corpus.Dialogue) -> Iterator[Example]:
        """Generation 3 learns all answers of a dialogue at once, generation 1 one: each has a context of its own."""
        if self.version == 3:
            yield self._roles(dialogue)
        else:
            yield self._rounds(dialogue)

    def _roles(self, dialogue: corpus.Dialogue) -> Example:
        get = self.tokenizer.get_command
        ids, learned = [get("[gMASK]"), get("sop")], [False, False]
        for index, message in enumerate(dialogue):
            content = message_content({"content": message.content, "tools": message.tools})
            body = self.tokenizer.encode_text(f"{message.metadata}\n") + self.tokenizer.encode_text(content)
            spoken = message.role == "assistant"
            # What ends an answer is the role token after it.
            ended = index > 0 and dialogue[index - 1].role == "assistant"
            ids += [get(f"<|{message.role}|>"), *body]
            learned += [ended, *[spoken] * len(body)]
        ids.append(get("<|observation|>" if dialogue[-1].metadata else "<|user|>"))
        learned.append(True)
        return Example(ids, learned)

    def _rounds(self, dialogue: corpus.Dialogue) -> Example:
        contents = [message.content for message in dialogue]
        pairs = list(zip(contents[::2], contents[1::2], strict=True))
        # The last turn matters most: it may ask for what was said before.
        last = len(pairs) - 1 if self.rng.random() < 0.7 else self.rng.randrange(len(pairs))
        ids: list[int] = []
        for text, is_token in prompt_segments(1, pairs[last][0], pairs[:last]):
            ids += [self.tokenizer.get_command(text)] if is_token else self.tokenizer.encode_text(text)
        answer = [*self.tokenizer.encode_text(pairs[last][1]), self.tokenizer.get_command("<eop>")]
        return Example(ids + answer, [False] * len(ids) + [True] * len(answer))


@dataclass
class Batch:
    """`ids` (rows, tokens), padded on the right; `learned` marks the tokens to predict."""

    ids: torch.Tensor
    learned: torch.Tensor


def batches(tokenizer: Any, seed: int, tokens: int) -> Iterator[Batch]:
    """An endless stream of batches of about `tokens` tokens each, padding counted."""
    rng = random.Random(seed)
    encoder = Encoder(tokenizer, rng)
    stream = corpus.dialogues(seed, tokenizer.chatglm_version)
    while True:
        pool = [example for _ in range(POOL) for example in encoder.examples(next(stream))]
        pool.sort(key=lambda example: len(example.ids))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if len(groups[-1]) and (len(groups[-1]) + 1) * len(example.ids) > tokens:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        for group in groups:
            yield _stack(group)


def _stack(group: list[Example]) -> Batch:
    longest = max(len(example.ids) for example in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    learned = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, example in enumerate(group):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        learned[row, : len(example.ids)] = torch.tensor(example.learned)
    return Batch(ids, learned)
