"""Makes the byte-level vocabulary of generation 4's demo, in the form of the published `tokenizer.model`."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from chatglm.conversation import ChatFormat
from chatglm.tokenizers.byte_level import BYTE_NAMES, BYTES_BY_NAME, PATTERN

from . import corpus, tool_turns
from .dialogues import dialogues
from .vocabulary import SENTENCES

TOKENS = 3000
_TRAINED = 5000
#: Longer tokens would be whole phrases: four Chinese characters, or a long word.
MOST_BYTES = 12


def build(path: Path, chat_format: ChatFormat, seed: int = 0) -> int:
    """Writes a vocabulary of byte pairs, and returns its size.

    Digits are tokens of their own, and so are blanks except in front of frequent words: a number or a name then has the
    same tokens everywhere, which makes copying learnable.
    """
    stream = dialogues(seed + 1_000_003, chat_format.has_roles)
    texts: list[str] = []
    while len(texts) < SENTENCES:
        for message in next(stream):
            texts.append(message.content)
            if message.tools:
                texts.append(json.dumps(message.tools[0], ensure_ascii=False, indent=4))
            if message.arguments:
                texts.append(json.dumps(message.arguments, ensure_ascii=False))
    # The words around tools, which every prompt with tools has.
    described = corpus.Message("system", "", tools=[tool_turns.TOOLS["get_weather"]]).as_dict()
    texts += [text for text, is_token in chat_format.chat_segments([described]) if not is_token] * 200
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=_TRAINED, initial_alphabet=list(BYTE_NAMES.values()), show_progress=False)
    )
    words = Counter(word for text in texts for word in text.split(" ") if word.isalpha() and word.isascii())
    frequent = {f" {word}" for word, number in words.items() if number >= 40 and word.islower() and len(word) > 1}
    tokens = [bytes([byte]) for byte in sorted(BYTE_NAMES)]
    for name, _ in sorted(trained.get_vocab().items(), key=lambda one: one[1]):
        token = bytes(map(BYTES_BY_NAME.__getitem__, name))
        text = token.decode("utf-8", errors="replace")
        digits = any(sign.isdigit() for sign in text)
        blank = text.startswith(" ") and text.strip() and text not in frequent
        if 1 < len(token) <= MOST_BYTES and not digits and not blank and len(tokens) < TOKENS:
            tokens.append(token)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    return len(tokens)
