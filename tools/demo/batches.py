"""Dialogues -> token ids -> batches of similar length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from chatglm.conversation import TOOLS_SYSTEM_PROMPT
from chatglm.conversation.segments import encode_segments

from . import corpus, dialogues

#: Dialogues that are sorted by length at a time.
POOL = 1024


@dataclass
class Example:
    """Token ids, and for each whether it is learned."""

    ids: list[int]
    learned: list[bool]


class Encoder:
    """Dialogues -> the ids of the tokenizer's prompt format.

    One time in six the words of a user that need not be copied are cut into other pieces than usual, which teaches
    unusual spellings.
    """

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.chat_format = tokenizer.chat_format

    def examples(self, dialogue: corpus.Dialogue) -> Iterator[Example]:
        """With roles, all answers of a dialogue are learned at once; without, only one, as each has its own context."""
        if self.chat_format.has_roles:
            yield self._roles(dialogue)
        else:
            yield self._rounds(dialogue)

    def _roles(self, dialogue: corpus.Dialogue) -> Example:
        get = self.tokenizer.get_command
        ids = encode_segments(self.tokenizer, self.chat_format.start)
        learned = [False] * len(ids)
        for index, message in enumerate(dialogue):
            role, *body = self._message(message)
            spoken = message.role == "assistant"
            # The role token after an answer ends it.
            ended = index > 0 and dialogue[index - 1].role == "assistant"
            ids += [role, *body]
            learned += [ended, *[spoken] * len(body)]
        ids.append(get("<|observation|>" if dialogue[-1].metadata else "<|user|>"))
        learned.append(True)
        return Example(ids, learned)

    def _message(self, message: corpus.Message) -> list[int]:
        if message.tools and not self.chat_format.tools_system_prompt:  # tools have a message of their own
            given = message.as_dict() | ({"content": ""} if message.content == TOOLS_SYSTEM_PROMPT else {})
            segments = self.chat_format.chat_segments([given], open_answer=False)
            return encode_segments(self.tokenizer, segments[len(self.chat_format.start) :])
        if message.metadata and not self.chat_format.tools_system_prompt:
            call = self.chat_format.tool_call_message(message.metadata, message.arguments)
            return self.chat_format.encode_message(self.tokenizer, call)
        return self.chat_format.encode_message(self.tokenizer, message.as_dict())

    def _rounds(self, dialogue: corpus.Dialogue) -> Example:
        contents = [message.content for message in dialogue]
        pairs = list(zip(contents[::2], contents[1::2], strict=True))
        # The last turn matters most: it may ask for what was said before.
        last = len(pairs) - 1 if self.rng.random() < 0.7 else self.rng.randrange(len(pairs))
        ids = self.chat_format.encode(self.tokenizer, pairs[last][0], pairs[:last])
        answer = self.tokenizer.encode_text(pairs[last][1]) + self.chat_format.stop_token_ids(self.tokenizer)
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
    stream = dialogues.dialogues(seed, tokenizer.chat_format.has_roles)
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
