"""What programs for the originals read inside a tokenizer: `tokenizer.sp_tokenizer` and `tokenizer.tokenizer`.

Each view asks the tokenizer; none has a vocabulary of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sentencepiece

#: Generation 1 has a token for every run of up to this many spaces.
MAX_BLANKS = 80


class SPView:
    """`tokenizer.tokenizer` of generations 2 and 3: the SentencePiece model with the control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        commands: dict[str, int] = tokenizer.commands
        self.sp_model: sentencepiece.SentencePieceProcessor = tokenizer.sp_model
        size = self.sp_model.get_piece_size()
        self.special_tokens = {name: index for name, index in commands.items() if index >= size}
        self.index_special_tokens = {index: name for name, index in self.special_tokens.items()}
        self.n_words: int = tokenizer.vocab_size
        self.bos_id, self.eos_id, self.pad_id = (commands[name] for name in ("<bos>", "<eos>", "<pad>"))

    def tokenize(self, s: str) -> list[str]:
        """The pieces of plain text."""
        return self._tokenizer.convert_ids_to_tokens(self._tokenizer.encode_text(s))

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of plain text, between `<s>` and `</s>` if the caller asks for them."""
        return [self.bos_id] * bos + self._tokenizer.encode_text(s) + [self.eos_id] * eos

    def decode(self, t: int | list[int]) -> str:
        return self._tokenizer.decode(t, clean_up_tokenization_spaces=False)

    def decode_tokens(self, tokens: list[str]) -> str:
        return self._tokenizer.convert_tokens_to_string(tokens)

    def convert_token_to_id(self, token: str) -> int:
        """The id of a piece or control token; that of `<unk>` for any other."""
        return self._tokenizer.convert_tokens_to_ids(token)

    def convert_id_to_token(self, index: int) -> str:
        """The piece, or the name of the control token if it has text in this generation; else nothing."""
        return self._tokenizer._pieces_to_decode([index])[0]


class TextView:
    """`sp_tokenizer.text_tokenizer` of generation 1: the SentencePiece model alone, whose ids count from 0."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor) -> None:
        self.sp = sp
        self.num_tokens: int = sp.vocab_size()

    def __len__(self) -> int:
        return self.num_tokens

    def encode(self, text: str) -> list[int]:
        return self.sp.encode_as_ids(text)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode_ids(ids)

    def tokenize(self, text: str) -> list[str]:
        return self.sp.encode_as_pieces(text)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp.decode_pieces(tokens)

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        return [self.sp.piece_to_id(token) for token in tokens]

    def convert_token_to_id(self, token: str) -> int:
        return self.sp.piece_to_id(token)

    def convert_id_to_token(self, idx: int) -> str:
        return self.sp.id_to_piece(idx)


class SPView1:
    """`tokenizer.sp_tokenizer` of generation 1: image tokens, then the text tokens."""

    max_blank_length = MAX_BLANKS
    byte_fallback = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text_tokenizer = TextView(tokenizer.sp_model)
        self.num_image_tokens: int = tokenizer.num_image_tokens
        self.num_text_tokens = self.text_tokenizer.num_tokens
        self.num_tokens = self.vocab_size = self.num_image_tokens + self.num_text_tokens

    def __getitem__(self, x: int | str) -> int | str:
        """The id of a token, or the token of an id."""
        if isinstance(x, str):
            return self._tokenizer.convert_tokens_to_ids(x)
        if isinstance(x, int):
            return self._tokenizer.convert_ids_to_tokens(x)
        raise ValueError(f"the key must be a token or an id, not {type(x).__name__}")

    def __len__(self) -> int:
        return self.num_tokens

    @staticmethod
    def get_blank_token(length: int) -> str:
        """The token of a run of spaces."""
        if not 2 <= length <= MAX_BLANKS:
            raise ValueError(f"there are tokens for runs of 2 to {MAX_BLANKS} spaces, not of {length}")
        return f"<|blank_{length}|>"

    @staticmethod
    def get_tab_token() -> str:
        return "<|tab|>"

    def encode(
        self, text: str, linebreak: bool = True, whitespaces: bool = True, add_dummy_prefix: bool = True
    ) -> list[int]:
        """The ids of plain text, see `ChatGLM1Tokenizer.encode_text`."""
        return self._tokenizer.encode_text(text, linebreak, whitespaces, add_dummy_prefix)

    def tokenize(
        self, text: str, linebreak: bool = True, whitespaces: bool = True, add_dummy_prefix: bool = True
    ) -> list[str]:
        """The pieces of plain text."""
        return self._tokenizer.convert_ids_to_tokens(self.encode(text, linebreak, whitespaces, add_dummy_prefix))

    def decode(self, text_ids: list[int]) -> str:
        return self._tokenizer.decode(text_ids, clean_up_tokenization_spaces=False)

    def decode_tokens(self, tokens: list[str]) -> str:
        return self._tokenizer.convert_tokens_to_string(tokens)
