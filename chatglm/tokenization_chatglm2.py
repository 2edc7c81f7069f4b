"""The tokenizer of ChatGLM2-6B and ChatGLM3-6B: one vocabulary, two sets of control tokens and prompt formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers.utils import logging

from .tokenizers.sentencepiece_files import load_sentencepiece
from .tokenizers.start_tokens import StartTokenTokenizer
from .tokenizers.texts import clean_text
from .tokenizers.views import SPView

logger = logging.get_logger(__name__)

_CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]

# Of generation 1: the fields that only its tokenizer_config.json has, and tokens that no later vocabulary has.
_V1_FIELDS = ("gmask_token", "end_token", "eop_token", "num_image_tokens")
_V1_TOKENS = ("<sop>", "<eop>", "<pad>")


def _without_generation1(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the fields of a copied tokenizer_config.json of generation 1: its tokens would become new ids here."""
    foreign = {name: value for name, value in kwargs.items() if name in _V1_FIELDS or str(value) in _V1_TOKENS}
    if foreign:
        names = ", ".join(foreign)
        logger.warning(f"tokenizer_config.json has special tokens of ChatGLM-6B ({names}): they are left out")
    return {name: value for name, value in kwargs.items() if name not in foreign}


class ChatGLM2Tokenizer(StartTokenTokenizer):
    """The tokenizer of generations 2 and 3: the pieces of `tokenizer.model`, then the control tokens.

    A single text becomes `[gMASK] sop text`, a pair `[gMASK] sop text answer </s>`; with a mask of 0 and 1, and
    positions that count from the first token that is not padding.

    Control tokens decode to nothing in generation 2 and to their names in 3, where `skip_special_tokens=True` omits
    them. With `encode_special_tokens=True` (or `split_special_tokens=False`) generation 3 recognises role tokens
    in text.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    name = "GLMTokenizer"  # as in the originals
    #: Generation -> its control tokens beyond the common ones. If it has any, decoding shows all control tokens.
    own_tokens: ClassVar[Mapping[int, Sequence[str]]] = {2: (), 3: _ROLES}

    def __init__(
        self,
        vocab_file: str,
        padding_side: str = "left",
        clean_up_tokenization_spaces: bool = False,
        encode_special_tokens: bool = False,
        chatglm_version: int = 3,
        **kwargs: Any,
    ) -> None:
        if chatglm_version not in self.own_tokens:
            known = " or ".join(map(str, self.own_tokens))
            raise ValueError(f"chatglm_version must be {known} for a tokenizer.model, not {chatglm_version!r}")
        model = load_sentencepiece(vocab_file)
        size = model.get_piece_size()
        pieces = model.id_to_piece(list(range(size)))
        roles = self.own_tokens[chatglm_version]
        control = [*_CONTROL, *roles]
        if clash := sorted(set(control) & set(pieces)):
            raise ValueError(f"{vocab_file} has text pieces named like control tokens: {', '.join(clash)}")
        self._set_vocabulary(model, pieces + control)
        self._commands = {token: size + index for index, token in enumerate(control)}
        self._commands |= {"<bos>": model.bos_id(), "<eos>": model.eos_id(), "<pad>": model.unk_id()}
        # unk, bos and eos have no text, nor do the control tokens of generation 2.
        self._silent_ids = {*range(3), *(() if roles else range(size, size + len(control)))}
        kwargs = _without_generation1(kwargs)
        kwargs = {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"} | kwargs
        super().__init__(
            control,
            roles,
            encode_special_tokens,
            vocab_file=vocab_file,
            chatglm_version=chatglm_version,
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    @property
    def commands(self) -> dict[str, int]:
        return self._commands

    @property
    def tokenizer(self) -> SPView:
        """What programs for the originals read: the SentencePiece model with the control tokens."""
        return SPView(self)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the tokens without text, as in the originals; `commands` also has the control tokens."""
        names = {"<bos>": "<bos>", "<eos>": "<eos>", "<unk>": "<pad>", "<pad>": "<pad>"}
        return {name: self._commands[same] for name, same in names.items()}

    def _tokenize(self, text: str) -> list[str]:
        return self.sp_model.encode_as_pieces(text)

    def encode_text(self, text: str) -> list[int]:
        return self.sp_model.encode_as_ids(clean_text(text))

    def _pieces_to_decode(self, ids: list[int]) -> list[str]:
        silent = self._silent_ids
        pieces = super()._pieces_to_decode(ids)
        return ["" if index in silent else piece for index, piece in zip(ids, pieces, strict=True)]
