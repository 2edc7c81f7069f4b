"""`ChatGLMTokenizer`: the base class of all generations' tokenizers, which loads the right one for a checkpoint."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from transformers import PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import cached_file, logging

from .. import registries
from ..checkpoints import file_names
from ..checkpoints.generation import settle
from ..network.compat import NoCodeToSave, refuse_unknown, take_old_hub_keywords
from .chat_methods import ChatMethods
from .old_names import OldNames
from .texts import clean_text

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Other keywords of `from_pretrained`, besides the constructors' parameters: those of transformers' Auto class and
# pipelines, then those of its base class.
_LOADING_ARGUMENTS = (
    "trust_remote_code", "use_fast", "config", "vocab_file", "tokenizer_type", "code_revision",
    "_from_auto", "_from_pipeline", "_commit_hash",
    "model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces",
    "split_special_tokens", "chat_template", "extra_special_tokens", "additional_special_tokens", "name_or_path",
    "verbose",
)  # fmt: skip
# Fields of the loading machinery, of no use in a saved tokenizer.
_NOT_SAVED = ("auto_map", "backend", "is_local", "local_files_only", "tokenizer_file", "files_loaded")


class ChatGLMTokenizer(NoCodeToSave, ChatMethods, OldNames, PreTrainedTokenizer):
    """The tokenizer of any ChatGLM: `ChatGLMTokenizer.from_pretrained` returns the class of the right generation.

    Text is plain text: what a user types never becomes a control token, unless the call (or the constructor) says
    `split_special_tokens=False`. Lone surrogates, which no file or terminal should contain, become U+FFFD (the halves
    of a pair are joined); NUL and other control characters are encoded as they are.

    Decoding joins pieces, and decodes runs of byte pieces as UTF-8; each invalid byte (say, of half a character at the
    end of an unfinished answer) becomes U+FFFD. The text depends on the ids alone. Further ids extend the text, but
    its end may still change; `stable_response` holds that end back.
    """

    _is_any_generation = True  # see ChatGLMConfig
    chatglm_version: int = 0
    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    # Control tokens recognised in text if the caller asks for it: anywhere; and only at the start, as "sop" is part of
    # many words.
    _typed_control_tokens: Sequence[str] = ()
    _typed_start: Sequence[str] = ("[gMASK]", "sop")
    #: The class of each generation; see `chatglm.register_generation`.
    classes: ClassVar[dict[int, type[ChatGLMTokenizer]]] = registries.TOKENIZERS

    def __new__(cls, vocab_file: str | None = None, *args: Any, **kwargs: Any) -> ChatGLMTokenizer:
        if "_is_any_generation" in vars(cls):
            name = os.path.basename(vocab_file or "")
            given = kwargs.get("chatglm_version") or (1 if name == "ice_text.model" else None)
            cls = cls.classes[settle(vocab_file, tokenizer=kwargs, given=given)]
        return super().__new__(cls)

    def __init__(self, vocab_file: str, chatglm_version: int, **kwargs: Any) -> None:
        for name in (*_NOT_SAVED, "model_specific_special_tokens", "tokenizer_class"):
            kwargs.pop(name, None)
        self.vocab_file = vocab_file
        self.chatglm_version = chatglm_version
        if kwargs.get("chat_template") is None or self.chat_format.is_published(kwargs["chat_template"]):
            kwargs["chat_template"] = self.chat_format.template
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(**kwargs)
        self.init_kwargs["chatglm_version"] = chatglm_version

    # ------------------------------------------------------------------------------------------ loading, saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *init_inputs: Any,
        chatglm_version: int | None = None,
        **kwargs: Any,
    ) -> ChatGLMTokenizer:
        """Loads from a folder, a vocabulary file or a hub id; a folder never touches the network.

        Args:
            chatglm_version: the generation, if the files tell too little or the wrong one: 2 and 3 have one vocabulary.

        Raises:
            OSError: the vocabulary file is missing.
            ValueError: a file is corrupt, or `chatglm_version` is no known generation.
            TypeError: a keyword is unknown.
        """
        path = os.fspath(pretrained_model_name_or_path)
        take_old_hub_keywords(kwargs)
        model_config, place = _read_json(path, file_names.CONFIG, kwargs)
        tokenizer_config, other = _read_json(path, file_names.TOKENIZER_CONFIG, kwargs)
        place = path if os.path.isfile(path) else place or other or path
        version = settle(place, model_config, tokenizer_config, chatglm_version)
        target = cls.classes[version] if "_is_any_generation" in vars(cls) else cls
        constructor = inspect.signature(target.__init__).parameters
        tokens = (name for name in kwargs if name.endswith("_token"))  # transformers takes tokens of any name
        refuse_unknown("from_pretrained", kwargs, *_HUB_ARGUMENTS, *_LOADING_ARGUMENTS, *constructor, *tokens)
        kwargs = target._adapt_to_model(kwargs, model_config)
        # Found here because transformers would take any tokenizer.model in the folder, even for generation 1.
        kwargs.setdefault("vocab_file", target._find_vocabulary(path, kwargs))
        return target._load(path, *init_inputs, chatglm_version=version, **kwargs)

    @classmethod
    def _load(cls, path: str, *init_inputs: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(path, *init_inputs, **kwargs)

    @classmethod
    def _find_vocabulary(cls, path: str, kwargs: dict[str, Any]) -> str:
        name = cls.vocab_files_names["vocab_file"]
        file = path if os.path.isfile(path) else _find(path, name, kwargs)
        if file is None:
            raise FileNotFoundError(
                f"no {name} in {path}: the folder of a ChatGLM model holds its vocabulary under this name; copy it"
                " there from the published model"
            )
        return file

    @classmethod
    def _adapt_to_model(cls, kwargs: dict[str, Any], model_config: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        added = {i: token for i, token in config.pop("added_tokens_decoder", {}).items() if int(i) >= self.vocab_size}
        if added:
            config["added_tokens_decoder"] = added
        for name in _NOT_SAVED:
            config.pop(name, None)
        # One name for all generations, as in the published files: AutoTokenizer finds the dispatcher by it.
        config |= {"tokenizer_class": "ChatGLMTokenizer", "chatglm_version": self.chatglm_version}
        config_file.write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)

    def vocabulary_bytes(self) -> bytes:
        """The vocabulary as its file holds it."""
        content: bytes = self.sp_model.serialized_model_proto()
        return content

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the SentencePiece model into the folder, even if the file it was loaded from is gone."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if not os.path.isfile(self.vocab_file):
            target.write_bytes(self.vocabulary_bytes())
        elif not (target.exists() and os.path.samefile(self.vocab_file, target)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    # ------------------------------------------------------------------------------------------------ vocabulary

    def _set_vocabulary(self, model: sentencepiece.SentencePieceProcessor, tokens: list[str]) -> None:
        """As `_set_tokens`, for the vocabulary of a SentencePiece model."""
        self.sp_model = model
        self._set_tokens(tokens)

    def _set_tokens(self, tokens: list[str]) -> None:
        """`tokens[i]` is the name of id i. Must run before the constructor of the base class."""
        self._id_to_token = tokens
        self._token_to_id = {token: index for index, token in enumerate(tokens)}

    @property
    def vocab_size(self) -> int:
        """Number of ids in use; the embedding of the model may have more rows."""
        return len(self._id_to_token)

    def get_vocab(self) -> dict[str, int]:
        return {**self._token_to_id, **self._added_tokens_encoder}

    def get_command(self, token: str) -> int:
        """The id of a control token by its name.

        Raises:
            ValueError: there is no such control token.
        """
        commands = self.commands
        if token not in commands:
            raise ValueError(f"{token!r} is no control token of this vocabulary: it has {', '.join(commands)}")
        return commands[token]

    @property
    def commands(self) -> dict[str, int]:
        """The control tokens by name."""
        raise NotImplementedError

    def _convert_token_to_id(self, token: str) -> int:
        return self._token_to_id.get(token, self._token_to_id["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        # The head of a model is padded: it can produce ids without a piece. They have no text.
        return self._id_to_token[index] if 0 <= index < len(self._id_to_token) else ""

    # ---------------------------------------------------------------------------------------------- text to ids

    def encode_text(self, text: str) -> list[int]:
        """The ids of plain text, and nothing else: no control tokens, no special tokens around it."""
        raise NotImplementedError

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The pieces of a text. With `split_special_tokens=False` control tokens spelt out in it are recognised.

        Raises:
            TypeError: a keyword is unknown (`tokenizer(text)` and `encode` pass theirs on to here).
            ValueError: `return_offsets_mapping=True`.
        """
        if kwargs.get("return_offsets_mapping"):  # transformers passes it on to here, then ignores it
            raise ValueError("return_offsets_mapping is not supported: ChatGLM tokenizers keep no offsets")
        refuse_unknown("tokenize", kwargs, "split_special_tokens", "return_offsets_mapping")
        plain = kwargs.get("split_special_tokens")
        plain = self.split_special_tokens if plain is None else plain
        pieces: list[str] = []
        for segment, is_token in self._segments(clean_text(text), not plain):
            pieces += [segment] if is_token else self._tokenize(segment)
        return pieces

    def _segments(self, text: str, control: bool) -> Iterator[tuple[str, bool]]:
        """Splits the text at the tokens recognised in it, as (text, is a token)."""
        names = [token for token, index in self._added_tokens_encoder.items() if index >= self.vocab_size]
        if control:
            names += self._typed_control_tokens
            start = "".join(self._typed_start)
            if start and text.startswith(start):
                yield from ((token, True) for token in self._typed_start)
                text = text.removeprefix(start)
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        for index, segment in enumerate(re.split(f"({pattern})", text) if names else [text]):
            if segment:
                yield segment, index % 2 == 1

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        second = None if token_ids_1 is None else [-1] * len(token_ids_1)
        marked = self.build_inputs_with_special_tokens([-1] * len(token_ids_0), second)
        return [int(index != -1) for index in marked]

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str | TruncationStrategy = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        strategy = TruncationStrategy(truncation_strategy)
        if strategy != TruncationStrategy.LONGEST_FIRST or pair_ids is None:
            shortened = pair_ids or [] if strategy == TruncationStrategy.ONLY_SECOND else ids
            if num_tokens_to_remove >= len(shortened):
                # Cutting a text down to nothing is never what was meant.
                logger.warning(f"nothing is truncated: max_length is {num_tokens_to_remove} tokens too small for that")
                return ids, pair_ids, []
        return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, strategy, stride)

    # ---------------------------------------------------------------------------------------------- ids to text

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        # vLLM and others always pass this one; whatever its value, no spaces are put between tokens.
        refuse_unknown("decode", kwargs, "spaces_between_special_tokens")
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens:
            skipped = set(self.all_special_ids)
            ids = [index for index in ids if index not in skipped]
        text = self._join(self._pieces_to_decode(ids))
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._join(tokens)

    def _join(self, pieces: list[str]) -> str:
        return self.sp_model.decode_pieces(pieces) if pieces else ""

    def _pieces_to_decode(self, ids: list[int]) -> list[str]:
        return self.convert_ids_to_tokens(ids)

    def token_pieces(self) -> list[bytes]:
        """The bytes that each token adds to a text, by id; empty for control tokens."""
        model, first = self.sp_model, self._first_piece
        pieces = [b""] * self.vocab_size
        for index in range(model.get_piece_size()):
            piece = model.id_to_piece(index)
            if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
                continue
            is_byte = model.is_byte(index)
            pieces[first + index] = bytes([int(piece[3:5], 16)]) if is_byte else self._piece_text(piece).encode()
        return pieces

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token as shown to a reader; tokens that share a character have their own bytes of it."""
        piece = self.convert_ids_to_tokens(token_id)
        byte = _BYTE_PIECE.fullmatch(piece or "")
        return bytes([int(byte[1], 16)]) if byte else self._shown_piece(token_id, piece).encode()

    @property
    def _first_piece(self) -> int:
        """The id of the vocabulary's first piece."""
        return 0

    def _piece_text(self, piece: str) -> str:
        return piece.replace("\u2581", " ")

    def _shown_piece(self, token_id: int, piece: str) -> str:
        return self._piece_text(piece)


_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")




def _find(path: str, name: str, kwargs: dict[str, Any]) -> str | None:
    """A file of a model folder or hub id, or None."""
    options = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)


def _read_json(path: str, name: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A JSON file of a model folder or hub id, and the folder it lies in; empty and None if it is missing."""
    file = _find((os.path.dirname(path) or ".") if os.path.isfile(path) else path, name, kwargs)
    if file is None:
        return {}, None
    try:
        content = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: copy it again from the model ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object: copy it again from the model")
    return content, os.path.dirname(file)
