"""Makes the SentencePiece vocabularies of the demo models, laid out as those of the real ones."""

from __future__ import annotations

import io
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from chatglm.conversation import ChatFormat

from . import dialogues, strings

BLANK = "▁"
SENTENCES = 60_000
TRAINED_PIECES = 3400
TEXT_PIECES = 2400
_V1_CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_FULL_WIDTH = "，。？！：；（）、“”‘’《》【】…—～·￥×÷°℃"


def build(
    path: Path, chat_format: ChatFormat, ice_text: bool, seed: int = 0, more: Sequence[str] = ()
) -> int:
    """Writes a vocabulary laid out as generation 1's `ice_text.model`, or as `tokenizer.model`; returns its size.

    A unigram model with byte fallback and single digits. Blanks are pieces of their own except in front of frequent
    words, so that a name has the same pieces with and without one, which makes copying learnable.

    Args:
        more: texts to count besides those of the corpus.
    """
    texts = [*_texts(seed, chat_format, ice_text), *more]
    serialized = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=serialized,
        model_type="unigram",
        vocab_size=TRAINED_PIECES,
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc" if ice_text else "identity",
        remove_extra_whitespaces=ice_text,
        allow_whitespace_only_pieces=True,
        required_chars=string.printable[:94] + ("" if ice_text else _FULL_WIDTH) + strings.NAME_CHARS,
        max_sentencepiece_length=12,
        num_threads=1,  # the pieces depend on the number of threads
        pad_id=3 if ice_text else -1,
        user_defined_symbols=["<n>"] if ice_text else [],
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized.getvalue())
    pieces = _select(list(model.pieces), texts)
    if ice_text:
        pieces = _like_ice_text(pieces)
        model.trainer_spec.pad_piece = "<pad>"
    del model.pieces[:]
    model.pieces.extend(pieces)
    model.trainer_spec.vocab_size = len(pieces)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return len(pieces)


def _texts(seed: int, chat_format: ChatFormat, ice_text: bool) -> list[str]:
    """Lines of the corpus; rare characters, which only random names have, fall back to bytes."""
    stream = dialogues.dialogues(seed + 1_000_003, chat_format.has_roles)
    texts: list[str] = []
    while len(texts) < SENTENCES:
        for message in next(stream):
            texts += chat_format.message_content(message.as_dict()).split("\n")
    if ice_text:
        texts = [unicodedata.normalize("NFKC", text) for text in texts]
    counts = Counter("".join(texts))
    kept = {sign for sign, number in counts.items() if number >= 24 or sign in string.printable}
    lines = ("".join(sign for sign in text if sign in kept) for text in texts)
    return [line for line in lines if line]


def _select(pieces: list, texts: list[str]) -> list:
    """The pieces to keep: all signs, the most useful longer ones; with a blank in front only frequent whole words."""
    words = Counter(word for text in texts for word in text.split(" ") if word.isalpha() and word.isascii())
    whole = {word for word, number in words.items() if number >= 40 and word.islower() and len(word) > 1}
    whole |= {word for word, number in words.items() if number >= 300 and len(word) > 3} | {"a", "I"}
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL

    def is_kept(piece: object) -> bool:
        text: str = piece.piece  # type: ignore[attr-defined]
        return not text.startswith(BLANK) or not text.strip(BLANK) or text[1:] in whole

    chosen = [piece for piece in pieces if piece.type != normal or is_kept(piece)]
    single = sum(1 for piece in chosen if piece.type != normal or len(piece.piece) == 1)
    room = TEXT_PIECES - single
    result = []
    for piece in chosen:  # longer pieces are in order of falling probability
        if piece.type == normal and len(piece.piece) > 1:
            room -= 1
            if room < 0:
                continue
        result.append(piece)
    return result


def _like_ice_text(pieces: list) -> list:
    """Control pieces, tabs and runs of blanks, then bytes, behind the text: the order of the published vocabulary."""
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece

    def made(text: str, of: int) -> object:
        return kind(piece=text, score=0.0, type=of)

    text = [piece for piece in pieces if piece.type != kind.BYTE]
    bytes_ = [piece for piece in pieces if piece.type == kind.BYTE]
    control = [made(name, kind.CONTROL) for name in _V1_CONTROL]
    blanks = [made("<|tab|>", kind.USER_DEFINED)]
    blanks += [made(f"<|blank_{count}|>", kind.USER_DEFINED) for count in range(2, 81)]
    return [*text, *control, *blanks, *bytes_]
