"""The tokenizer of ChatGLM-6B; also exports `ChatGLMTokenizer`, which loads the tokenizer of any generation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import sentencepiece
from transformers import BatchEncoding
from transformers.utils import PaddingStrategy

from .checkpoints.clues import VISUAL
from .tokenizers.base import ChatGLMTokenizer
from .tokenizers.sentencepiece_files import load_sentencepiece
from .tokenizers.texts import clean_text
from .tokenizers.views import SPView1

__all__ = ["ChatGLM1Tokenizer", "ChatGLMTokenizer"]


class ChatGLM1Tokenizer(ChatGLMTokenizer):
    """The tokenizer of ChatGLM-6B: `ice_text.model` of v1.1, or of v1.0 (with 20,000 image tokens before the text).
    VisualGLM-6B has the same, with its own conversations (`chatglm_version=11`).

    A single text becomes `text [gMASK] <sop>`, a pair `text [gMASK] <sop> answer <eop>`. Padded or truncated calls also
    return the bool mask `(1, tokens, tokens)`, True = hidden, and the 2-D positions `(2, tokens)`.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    chatglm_version = 1
    _typed_start = ()

    def __init__(
        self,
        vocab_file: str,
        do_lower_case: bool = False,
        remove_space: bool = False,
        num_image_tokens: int = 20000,
        gmask_token: str = "[gMASK]",
        end_token: str = "</s>",
        eop_token: str = "<eop>",
        chatglm_version: int = 1,
        **kwargs: Any,
    ) -> None:
        named = {"gmask_token": gmask_token, "end_token": end_token, "eop_token": eop_token}
        named |= {k: v for k, v in (kwargs.get("model_specific_special_tokens") or {}).items() if k in named}
        self.gmask_token, self.end_token, self.eop_token = (str(token) for token in named.values())
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.num_image_tokens = num_image_tokens
        model = load_sentencepiece(vocab_file, _complete_v1)
        images = [f"<image_{index}>" for index in range(num_image_tokens)]
        self._set_vocabulary(model, images + model.id_to_piece(list(range(model.get_piece_size()))))
        for name, default in _V1_SPECIAL_TOKENS.items():
            kwargs.setdefault(name, default)
        extra = [self.gmask_token, self.eop_token, *(kwargs.get("extra_special_tokens") or [])]
        kwargs["extra_special_tokens"] = [token for token in dict.fromkeys(extra) if token != kwargs["eos_token"]]
        kwargs.setdefault("clean_up_tokenization_spaces", num_image_tokens == 0)  # v1.0's decoder left spaces alone
        version = VISUAL if chatglm_version == VISUAL else 1
        super().__init__(vocab_file=vocab_file, chatglm_version=version, **kwargs)
        self.init_kwargs |= named | {"do_lower_case": do_lower_case, "remove_space": remove_space}
        self.init_kwargs["num_image_tokens"] = num_image_tokens
        self._typed_control_tokens = self.all_special_tokens

    @classmethod
    def _adapt_to_model(cls, kwargs: dict[str, Any], model_config: dict[str, Any]) -> dict[str, Any]:
        # Old weights with new tokenizer files, and the reverse, are common: the size of the embedding decides.
        vocab_size = str(model_config.get("vocab_size"))  # some programs write numbers as strings
        if "num_image_tokens" in kwargs or not vocab_size.isdecimal():
            return kwargs
        return {**kwargs, "num_image_tokens": 20000 if int(vocab_size) >= 150344 else 0}

    @property
    def commands(self) -> dict[str, int]:
        return {token: self._token_to_id[token] for token in _V1_COMMANDS}

    @property
    def sp_tokenizer(self) -> SPView1:
        """What programs for the original read: image tokens and the SentencePiece model."""
        return SPView1(self)

    @property
    def gmask_token_id(self) -> int:
        return self._convert_token_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        return self._convert_token_to_id(self.end_token)

    @property
    def eop_token_id(self) -> int:
        """The end of an answer. (`eos_token_id` is the same in v1.1, but `</s>` in the files of v1.0.)"""
        return self._convert_token_to_id(self.eop_token)

    def _convert_token_to_id(self, token: str) -> int:
        return self._token_to_id.get(token, self.num_image_tokens + self.sp_model.unk_id())

    def preprocess_text(self, inputs: str) -> str:
        """The text with `remove_space` and `do_lower_case` applied."""
        text = " ".join(inputs.split()) if self.remove_space else inputs
        return text.lower() if self.do_lower_case else text

    def _preprocess(self, text: str, linebreak: bool = True, whitespaces: bool = True) -> str:
        text = self.preprocess_text(text)
        if linebreak:
            text = text.replace("\n", "<n>")
        if whitespaces:
            text = _BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text.replace("\t", "<|tab|>"))
        return text

    def _tokenize(self, text: str) -> list[str]:
        return self.sp_model.encode_as_pieces(self._preprocess(text))

    def encode_text(
        self, text: str, linebreak: bool = True, whitespaces: bool = True, add_dummy_prefix: bool = True
    ) -> list[int]:
        """The ids of plain text.

        Args:
            linebreak: keep line breaks (else they count as spaces).
            whitespaces: keep tabs and runs of spaces.
            add_dummy_prefix: treat it as the start of a text, with a space in front.
        """
        text = self._preprocess(clean_text(text), linebreak, whitespaces)
        ids = self.sp_model.encode_as_ids(text if add_dummy_prefix else "<n>" + text)
        return [index + self.num_image_tokens for index in (ids if add_dummy_prefix else ids[2:])]

    def _segments(self, text: str, control: bool) -> Iterator[tuple[str, bool]]:
        segments = list(super()._segments(text, control))
        for index, (segment, is_token) in enumerate(segments):
            if not is_token:  # drops spaces next to a control token, except next to [gMASK]
                before = segments[index - 1][0] if index else self.gmask_token
                after = segments[index + 1][0] if index + 1 < len(segments) else self.gmask_token
                segment = segment if before == self.gmask_token else segment.lstrip()
                segment = segment if after == self.gmask_token else segment.rstrip()
            yield segment, is_token

    def _join(self, pieces: list[str]) -> str:
        text = super()._join(pieces).replace("<n>", "\n").replace("<|tab|>", "\t")
        return _BLANK_PIECE.sub(lambda found: " " * int(found[1]), text)

    def _pieces_to_decode(self, ids: list[int]) -> list[str]:
        # Padding is left out entirely, so that the bytes before and after it are joined.
        pad = self.pad_token_id
        return super()._pieces_to_decode([index for index in ids if index >= self.num_image_tokens and index != pad])

    @property
    def _first_piece(self) -> int:
        return self.num_image_tokens

    def _piece_text(self, piece: str) -> str:
        blanks = _BLANK_PIECE.fullmatch(piece)
        text = " " * int(blanks[1]) if blanks else {"<n>": "\n", "<|tab|>": "\t"}.get(piece, piece)
        return super()._piece_text(text)

    def _shown_piece(self, token_id: int, piece: str) -> str:
        return self.decode([token_id], clean_up_tokenization_spaces=False)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`text [gMASK] <sop>`, for a pair `text [gMASK] <sop> answer <eop>`."""
        ids = [*token_ids_0, self.gmask_token_id, self.get_command("<sop>")]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eop_token_id]

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        # Masks and positions follow from the ids; those from an earlier call have the wrong size.
        def ids_only(row: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in row.items() if name not in ("attention_mask", "position_ids")}

        if isinstance(encoded_inputs, Mapping):
            return super().pad(ids_only(encoded_inputs), *args, **kwargs)
        return super().pad([ids_only(row) for row in encoded_inputs], *args, **kwargs)

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        encoded = super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, padding_side, return_attention_mask=False
        )
        # The model itself computes the mask and positions of an unpadded text.
        is_sized = max_length is not None or padding_strategy == PaddingStrategy.LONGEST
        if is_sized and return_attention_mask is not False:
            encoded["attention_mask"], encoded["position_ids"] = self._mask_and_positions(encoded["input_ids"])
        return encoded

    def _mask_and_positions(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The bool mask (1, tokens, tokens) and the positions (2, tokens) of a row with padding on either side."""
        pad, size = self.pad_token_id, len(ids)
        start = next((index for index, token in enumerate(ids) if token != pad), size)
        stop = next((index for index in range(size, start, -1) if ids[index - 1] != pad), start)
        text = ids[start:stop]
        sop = self.get_command("<sop>")
        context = text.index(sop) if sop in text else len(text)
        mask = np.ones((size, size), dtype=bool)
        visible = np.tri(len(text), dtype=bool)
        visible[:, :context] = True
        mask[start:stop, start:stop] = ~visible
        positions = np.zeros((2, size), dtype=np.int64)
        positions[0, start:stop] = np.arange(len(text))
        marks = [self.mask_token_id, self.gmask_token_id]
        mark = next((text.index(token) for token in marks if token in text), None)
        if mark is not None:
            positions[0, start + context : stop] = mark
        positions[1, start + context : stop] = np.arange(1, len(text) - context + 1)
        return mask[None], positions


_V1_SPECIAL_TOKENS = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
_V1_CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
_V1_COMMANDS = ["<unk>", "<s>", "</s>", "<pad>", *_V1_CONTROL]
_BLANKS = re.compile(r" {2,80}")
_BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")


def _complete_v1(data: bytes, model: sentencepiece.SentencePieceProcessor) -> bytes:
    """Adds the control, blank and byte pieces that v1.0's file lacks, as its code added them at run time.

    A SentencePiece model is a protobuf message: appended fields extend the list of pieces (field 1) and override a
    setting (field 2, trainer_spec: byte_fallback, field 35).
    """
    names = dict.fromkeys(_V1_CONTROL, _SP_CONTROL)
    names |= dict.fromkeys(["<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))], _SP_USER_DEFINED)
    names |= dict.fromkeys([f"<0x{byte:02X}>" for byte in range(256)], _SP_BYTE)
    known = set(model.id_to_piece(list(range(model.get_piece_size()))))
    for name, kind in names.items():
        if name not in known:
            piece = name.encode()
            entry = b"\x0a" + bytes([len(piece)]) + piece + b"\x15\0\0\0\0" + b"\x18" + bytes([kind])
            data += b"\x0a" + bytes([len(entry)]) + entry
    return data + b"\x12\x03\x98\x02\x01"


_SP_CONTROL, _SP_USER_DEFINED, _SP_BYTE = 3, 4, 6
