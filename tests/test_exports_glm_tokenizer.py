"""The vocabulary as a tokenizer.json: the same ids for every text, and the same text for the ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from chatglm.demo import with_vocabulary_of
from chatglm.exports.glm_tokenizer import fast_tokenizer
from chatglm.tokenization_chatglm2 import ChatGLM2Tokenizer
from conftest import SHARED, needs_shared

ALPHABET = "abcXYZ 019,.!?\n\t  你好世界的是éñ😀𠮷\u3000\u00a0'\"<|>[]{}()_-—…▁\u200b\ufeff\r"


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def random_texts(count: int) -> Iterator[str]:
    chance = random.Random(0)
    for _ in range(count):
        yield "".join(chance.choices(ALPHABET, k=chance.randint(0, 40)))
    blocks = ((32, 0x2FFF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
    for _ in range(count // 6):
        yield "".join(chr(chance.randint(*chance.choice(blocks))) for _ in range(chance.randint(1, 20)))


def check(tokenizer: Any, texts: list[str]) -> None:
    made = fast_tokenizer(tokenizer)
    made.encode_special_tokens = True  # as in a chat's messages: names of control tokens are text
    for text in texts:
        ids = tokenizer.encode_text(text)
        assert made.encode(text, add_special_tokens=False).ids == ids, text
        assert made.decode(ids) == tokenizer.sp_model.decode(ids), text


@pytest.mark.parametrize("version", (2, 3))
def test_the_vocabulary_of_the_demo(version: int) -> None:
    tokenizer = ChatGLM2Tokenizer(str(with_vocabulary_of(version) / "tokenizer.model"), chatglm_version=version)
    check(tokenizer, list(random_texts(600)))
    made = fast_tokenizer(tokenizer)
    assert made.encode("你好").ids == tokenizer("你好")["input_ids"]
    for token, new in (("[gMASK]", "[gMASK]"), ("sop", "<sop>"), ("eop", "<eop>")):
        assert made.token_to_id(new) == tokenizer.get_command(token)
    assert made.get_vocab_size() == len(tokenizer)


@needs_shared
@pytest.mark.parametrize("name", ("chatglm2-6b", "chatglm3-6b", "codegeex2-6b"))
def test_the_published_vocabularies(name: str) -> None:
    version = 3 if "3" in name else 2
    tokenizer = ChatGLM2Tokenizer(str(SHARED / "checkpoints" / name / "tokenizer.model"), chatglm_version=version)
    texts = ["philosophy", "eope", "sop", "<|user|>", "<0x41>"]
    for path in sorted((SHARED / "goldens" / "tokenizer").glob("*.json")):
        texts += strings(json.loads(path.read_text(encoding="utf-8")))
    for line in (SHARED / "data" / "AdvertiseGen" / "dev.json").read_text(encoding="utf-8").splitlines():
        texts += strings(json.loads(line))
    check(tokenizer, [*dict.fromkeys(texts), *random_texts(20_000 if name == "chatglm3-6b" else 2_000)])
