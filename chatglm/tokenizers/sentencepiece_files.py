"""Loads SentencePiece models from files, and refuses incomplete ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece


def load_sentencepiece(
    vocab_file: str | None, complete: Callable[[bytes, Any], bytes] | None = None
) -> sentencepiece.SentencePieceProcessor:
    """Loads a SentencePiece model from a file, with one clear error if the file is not one.

    Args:
        complete: completes the bytes of a model that lacks the piece `<eop>`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a SentencePiece model, or only part of one.
    """
    if not vocab_file or not os.path.isfile(vocab_file):
        raise FileNotFoundError(f"no vocabulary file {vocab_file}")
    data = Path(vocab_file).read_bytes()
    try:
        if not data:
            raise ValueError("the file is empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        if not _has_all_pieces(data):
            raise ValueError("the file ends among the pieces")
        if complete is not None and model.piece_to_id("<eop>") == model.unk_id():
            model = sentencepiece.SentencePieceProcessor(model_proto=complete(data, model))
    except (RuntimeError, TypeError, ValueError) as error:
        hint = " (a git-lfs pointer: fetch the file itself)" if data[:20].startswith(b"version https://git") else ""
        raise ValueError(
            f"{vocab_file} is not a SentencePiece model, or only part of one{hint}: copy it again from the model"
        ) from error
    return model


def _has_all_pieces(data: bytes) -> bool:
    """Whether something follows the list of pieces: a file cut between two pieces would load as a smaller model."""
    position = 0
    while position < len(data) and data[position] == 0x0A:  # one piece: its tag, its length in one byte or two
        length = data[position + 1]
        position += 2 + length if length < 128 else 3 + (length & 127) + (data[position + 2] << 7)
    return position < len(data)
