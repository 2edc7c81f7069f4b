"""The tokenizer of GLM-4-9B: byte-pair tokens, fourteen control tokens, and the persona of the checkpoint."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .conversation.chatglm4 import DEFAULT_PERSONA, ChatGLM4Format, persona_of
from .tokenizers.byte_level import BYTES_BY_NAME, load_tokenizer, name_of
from .tokenizers.start_tokens import StartTokenTokenizer
from .tokenizers.texts import clean_text

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


class ChatGLM4Tokenizer(StartTokenTokenizer):
    """The tokens of `tokenizer.model`, whose lines hold bytes and ranks, then the control tokens.

    Text is kept byte for byte: nothing is normalised and nothing put in front. A token is named as in `tokenizers`'
    byte-level vocabularies, a character for each byte.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    chatglm_version = 4
    start_tokens = ("[gMASK]", "<sop>")
    answer_end = "<|endoftext|>"
    _typed_start = start_tokens

    def __init__(
        self,
        vocab_file: str,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        encode_special_tokens: bool = False,
        chatglm_version: int = 4,
        **kwargs: Any,
    ) -> None:
        self._fast, ranks = load_tokenizer(vocab_file)
        self._set_tokens([*map(name_of, ranks), *CONTROL_TOKENS])
        self._commands = {token: len(ranks) + index for index, token in enumerate(CONTROL_TOKENS)}
        self._format = ChatGLM4Format(persona_of(kwargs.get("chat_template")) or DEFAULT_PERSONA)
        kwargs = {"eos_token": self.answer_end, "pad_token": self.answer_end} | kwargs
        for name in ("do_lower_case", "remove_space"):  # of the published file; without effect there, too
            kwargs.pop(name, None)
        super().__init__(
            CONTROL_TOKENS,
            CONTROL_TOKENS,
            encode_special_tokens,
            vocab_file=vocab_file,
            chatglm_version=chatglm_version,
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    @property
    def chat_format(self) -> ChatGLM4Format:
        """The chat format with this checkpoint's persona."""
        return self._format

    @property
    def commands(self) -> dict[str, int]:
        return self._commands

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the control tokens by name."""
        return dict(self._commands)

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary as a tokenizer of the `tokenizers` library, without control tokens."""
        return self._fast

    def encode_text(self, text: str) -> list[int]:
        return self._fast.encode(clean_text(text), add_special_tokens=False).ids

    def _tokenize(self, text: str) -> list[str]:
        return self._fast.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token: str) -> int:
        """Raises KeyError for an unknown token: this vocabulary has none for those."""
        return self._token_to_id[token]

    def _join(self, pieces: list[str]) -> str:
        """The text of tokens; control tokens have their names as text."""
        return b"".join(map(self._bytes_of, pieces)).decode("utf-8", errors="replace")

    def _bytes_of(self, token: str) -> bytes:
        if token in self._commands or token in self._added_tokens_encoder:
            return token.encode()
        return bytes(map(BYTES_BY_NAME.__getitem__, token))

    def token_pieces(self) -> list[bytes]:
        size = self.vocab_size - len(CONTROL_TOKENS)
        return [self._bytes_of(token) for token in self._id_to_token[:size]] + [b""] * len(CONTROL_TOKENS)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes_of(self.convert_ids_to_tokens(token_id) or "")

    def vocabulary_bytes(self) -> bytes:
        lines = (
            base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(self.token_pieces()) if piece
        )
        return b"".join(lines)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the vocabulary into the folder, even if the file it was loaded from is gone."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        target.write_bytes(self.vocabulary_bytes())
        return (str(target),)
