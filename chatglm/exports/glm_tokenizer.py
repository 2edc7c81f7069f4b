"""The vocabularies of ChatGLM2 and its successors as a `tokenizer.json` of the `tokenizers` library.

Both kinds of SentencePiece models are converted: BPE (the published ones) and unigram (the demo's). What is written is
compared with the original on many texts first: a difference is an error, not a wrong tokenizer. GLM-4's vocabulary is
one of that library already.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..tokenization_chatglm4 import ChatGLM4Tokenizer

#: `sop` and `eop` get other names: as special tokens of a tokenizer.json they would tear words like "philosophy".
RENAMED = {"sop": "<sop>", "eop": "<eop>"}
_NEVER = -1e6  # the score of a piece that text must not become


def fast_tokenizer(tokenizer: Any) -> Tokenizer:
    """The same vocabulary and control tokens as `tokenizer`; encodes `[gMASK]<sop> text`.

    Raises:
        ValueError: the vocabulary has rules that could not be converted exactly.
    """
    if isinstance(tokenizer, ChatGLM4Tokenizer):
        made = Tokenizer.from_str(tokenizer.tokenizer.to_str())
        _add_control_tokens(made, list(tokenizer.commands), tokenizer.answer_end)
        return made
    sp = tokenizer.sp_model
    control = [token for token, index in tokenizer.commands.items() if index >= sp.get_piece_size()]
    made = Tokenizer(_bpe(sp) if is_bpe(sp) else _unigram(sp))
    prefix = [normalizers.Prepend("▁")] if adds_blank(sp) else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    names = ["<unk>", "<s>", "</s>", *(RENAMED.get(token, token) for token in control)]
    _add_control_tokens(made, names, "</s>")
    for token in control:
        if made.token_to_id(RENAMED.get(token, token)) != tokenizer.get_command(token):
            raise ValueError(f"the control token {token} would get another id in tokenizer.json")
    _compare(tokenizer, made)
    return made


def _add_control_tokens(made: Tokenizer, names: list[str], end: str) -> None:
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair=f"[gMASK] <sop> $A $B:1 {end}:1",
        special_tokens=[(name, made.token_to_id(name)) for name in ("[gMASK]", "<sop>", end)],
    )


def is_bpe(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a model is BPE, whose scores are ranks: 0, -1, -2, …; a unigram model has log probabilities."""
    return all(float(sp.get_score(index)).is_integer() for index in _normal(sp))


def adds_blank(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a text gets a blank in front; in CodeGeeX2's vocabulary, for one, it does not."""
    return sp.encode_as_pieces("\n")[0].startswith("▁")


def _normal(sp: sentencepiece.SentencePieceProcessor) -> list[int]:
    """The ids of the pieces that text becomes: no control tokens, no bytes."""
    return [
        index
        for index in range(sp.get_piece_size())
        if not (sp.is_control(index) or sp.is_unknown(index) or sp.is_byte(index) or sp.is_unused(index))
    ]


def _bpe(sp: sentencepiece.SentencePieceProcessor) -> models.BPE:
    """Every way to make a piece of two others is a merge, in the order of the scores."""
    pieces = sp.id_to_piece(list(range(sp.get_piece_size())))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for index in sorted(_normal(sp), key=lambda one: (-sp.get_score(one), one)):
        piece = pieces[index]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        merges += sorted(known, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _unigram(sp: sentencepiece.SentencePieceProcessor) -> models.Unigram:
    normal = set(_normal(sp))
    vocabulary = [
        (sp.id_to_piece(index), sp.get_score(index) if index in normal else _NEVER)
        for index in range(sp.get_piece_size())
    ]
    return models.Unigram(vocabulary, unk_id=sp.unk_id(), byte_fallback=any(map(sp.is_byte, range(len(vocabulary)))))


def _compare(tokenizer: Any, made: Tokenizer) -> None:
    """Raises ValueError if a text becomes other ids, or ids another text, than in the original."""
    made.encode_special_tokens = True  # names of control tokens in a text are text, as in the original
    for text in _texts(tokenizer.sp_model):
        ids = tokenizer.encode_text(text)
        found = made.encode(text, add_special_tokens=False).ids
        if found != ids or made.decode(ids) != tokenizer.sp_model.decode(ids):
            raise ValueError(f"this vocabulary cannot become a tokenizer.json: {text!r} would have other tokens")
    made.encode_special_tokens = False


def _texts(sp: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """Texts that try the rules of a vocabulary: blanks, line breaks, rare characters, its own pieces side by side."""
    yield from ("", " ", "a", " a", "a  b ", "\n", "\n\n a\n", "\t", "ＡＢ１", "é", "😀", "philosophy eope", "<0x41>")
    random_ = random.Random(0)
    pieces = [sp.id_to_piece(index).replace("▁", " ") for index in _normal(sp)]
    others = ["\n", "  ", "\u3000", "\u200b", "𠮷", "é", "ﬁ", "\u00a0", "…", "<|user|>", "[gMASK]", "\r\n"]
    for _ in range(1000):
        yield "".join(random_.choices(pieces, k=6) + random_.choices(others, k=1) + random_.choices(pieces, k=2))
