"""Tokenizers: what all generations share, the dispatcher `ChatGLMTokenizer`, and generation 1's ice_text vocabulary."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, cached_file, get_json_schema, logging

from .configuration_chatglm import detect_version
from .conversation.chatglm3 import is_published_template
from .conversation.formats import ChatFormat, chat_format

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# What `from_pretrained` takes beside those and beside the parameters of the constructors: of transformers' Auto class
# and pipelines, then of its base class.
_LOADING_ARGUMENTS = (
    "trust_remote_code", "use_fast", "config", "vocab_file", "tokenizer_type", "code_revision",
    "_from_auto", "_from_pipeline", "_commit_hash",
    "model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces",
    "split_special_tokens", "chat_template", "extra_special_tokens", "additional_special_tokens", "name_or_path",
    "verbose",
)  # fmt: skip
# Of the machinery that loaded a tokenizer, of no use in a saved one.
_NOT_SAVED = ("auto_map", "backend", "is_local", "local_files_only", "tokenizer_file", "files_loaded")


class ChatGLMTokenizer(PreTrainedTokenizer):
    """The tokenizer of any ChatGLM: `ChatGLMTokenizer.from_pretrained` returns the class of the right generation.

    Text is plain text: what a user types never becomes a control token, unless the call (or the constructor) says
    `split_special_tokens=False`. Lone surrogates, which no file or terminal should contain, count as U+FFFD (halves of
    a pair are joined); NUL and other control characters are encoded as they are.

    Decoding joins pieces, and runs of byte pieces as UTF-8; bytes that are no UTF-8 (say, half of a character at the
    end of an unfinished answer) show as U+FFFD, one per byte. The text depends on the ids only. A longer list of ids
    gives a longer text, but for its end: what may still change there, `stable_response` holds back.
    """

    chatglm_version: int = 0
    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    # Control tokens that are recognised in text where the caller asks for it; and at the start of a text only, as
    # "sop" is part of many words.
    _typed_control_tokens: Sequence[str] = ()
    _typed_start: Sequence[str] = ("[gMASK]", "sop")
    #: The class of each generation; see `chatglm.register_generation`.
    classes: ClassVar[dict[int, type[ChatGLMTokenizer]]] = {}

    def __new__(cls, vocab_file: str | None = None, *args: Any, **kwargs: Any) -> ChatGLMTokenizer:
        if cls is ChatGLMTokenizer:
            name = os.path.basename(vocab_file or "")
            version = 1 if name == "ice_text.model" else detect_version(kwargs, Path(vocab_file or "").parent)
            cls = cls.classes[kwargs.get("chatglm_version") or version]
        return super().__new__(cls)

    def __init__(self, vocab_file: str, chatglm_version: int, **kwargs: Any) -> None:
        for name in (*_NOT_SAVED, "model_specific_special_tokens", "tokenizer_class"):
            kwargs.pop(name, None)
        self.vocab_file = vocab_file
        self.chatglm_version = chatglm_version
        if kwargs.get("chat_template") is None or is_published_template(kwargs["chat_template"]):
            kwargs["chat_template"] = self.chat_format.template
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(**kwargs)
        self.init_kwargs["chatglm_version"] = chatglm_version

    @property
    def chat_format(self) -> ChatFormat:
        """What the conversations of this generation look like."""
        return chat_format(self.chatglm_version)

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
            chatglm_version: 2 or 3 where the name does not tell (their vocabularies are identical, their prompts not).

        Raises:
            OSError: the vocabulary file is missing.
            ValueError: a file is corrupt, or there is no generation `chatglm_version`.
            TypeError: a keyword is unknown.
        """
        path = os.fspath(pretrained_model_name_or_path)
        model_config = _read_json(path, "config.json", kwargs)
        names = {**model_config, **_read_json(path, "tokenizer_config.json", kwargs)}
        if chatglm_version is not None:
            names["chatglm_version"] = chatglm_version
        elif "chatglm_version" not in names and _has_ice_text(path):
            names["chatglm_version"] = 1
        version = detect_version(names, path)
        target = cls.classes[version] if cls is ChatGLMTokenizer else cls
        constructor = inspect.signature(target.__init__).parameters
        tokens = (name for name in kwargs if name.endswith("_token"))  # transformers takes tokens of any name
        refuse_unknown("from_pretrained", kwargs, *_HUB_ARGUMENTS, *_LOADING_ARGUMENTS, *constructor, *tokens)
        kwargs = target._adapt_to_model(kwargs, model_config)
        # Found here, as transformers takes a tokenizer.model where there is one, also for generation 1.
        kwargs.setdefault("vocab_file", target._find_vocabulary(path, kwargs))
        load = super(ChatGLMTokenizer, target).from_pretrained
        return load(path, *init_inputs, chatglm_version=version, **kwargs)

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

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the SentencePiece model into the folder, also where the file it came from is gone."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if not os.path.isfile(self.vocab_file):
            target.write_bytes(self.sp_model.serialized_model_proto())
        elif not (target.exists() and os.path.samefile(self.vocab_file, target)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    # ------------------------------------------------------------------------------------------------ vocabulary

    def _set_vocabulary(self, model: sentencepiece.SentencePieceProcessor, tokens: list[str]) -> None:
        """`tokens[i]` is the name of id i. Has to run before the constructor of the base class."""
        self.sp_model = model
        self._id_to_token = tokens
        self._token_to_id = {token: index for index, token in enumerate(tokens)}

    @property
    def vocab_size(self) -> int:
        """Number of ids with a meaning; the embedding of the model may have more rows."""
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

        Raises TypeError for an unknown keyword, which `tokenizer(text)` and `encode` hand on to here, and ValueError
        for `return_offsets_mapping=True`.
        """
        if kwargs.get("return_offsets_mapping"):  # transformers hands it on to here, and forgets it
            raise ValueError("return_offsets_mapping is not supported: ChatGLM tokenizers keep no offsets")
        refuse_unknown("tokenize", kwargs, "split_special_tokens", "return_offsets_mapping")
        plain = kwargs.get("split_special_tokens")
        plain = self.split_special_tokens if plain is None else plain
        pieces: list[str] = []
        for segment, is_token in self._segments(clean_text(text), not plain):
            pieces += [segment] if is_token else self._tokenize(segment)
        return pieces

    def _segments(self, text: str, control: bool) -> Iterator[tuple[str, bool]]:
        """The text cut at the tokens that are recognised in it, as (text, is a token)."""
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
        # vLLM and others always give this one; no blanks are put between tokens, whatever it says.
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
        """What each token adds to a text, by its id; nothing for control tokens."""
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
        """What one token looks like to a reader: of a character over several tokens each has its bytes."""
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

    # ------------------------------------------------------------------------------------------------------ chat

    def build_prompt(self, query: str, history: Sequence[Any] | None = None) -> str:
        """The text of the prompt of generations 1 and 2."""
        return self.chat_format.prompt_text(query, self.chat_format.validate(history))

    def build_chat_input(self, query: str, history: Sequence[Any] | None = None, role: str = "user") -> BatchEncoding:
        """The prompt of a chat turn as tensors with a batch of one, ready for the model (see `conversation`)."""
        ids = self.chat_format.encode(self, query, history, role)
        return self.prepare_for_model(ids, add_special_tokens=False, return_tensors="pt", prepend_batch_axis=True)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Role messages (or a batch of such lists) as a prompt, with the ids of `build_chat_input`.

        The format is the model's own. A template passed here, or set as `tokenizer.chat_template`, is rendered by
        transformers instead; control tokens in it are recognised, the same typed by users stay text.

        Generations 1 and 2 know no roles: messages are user and assistant in turn, a system message goes in front of
        the first question. Without `add_generation_prompt` a conversation that ends with an answer gets the end
        token after it (not with `continue_final_message`).

        Args:
            truncation: with `max_length` and `add_generation_prompt`, drops the oldest whole turns.
            return_dict: masks and positions, too, instead of the bare ids.

        Raises:
            TypeError, ValueError: messages of the wrong shape; the last message alone is longer than `max_length`; a
                keyword that the model's own format does not have.
        """
        if isinstance(conversation, (str, Mapping)) or not len(conversation):
            raise ValueError("an empty conversation, or no list of messages: pass [{'role': 'user', 'content': '…'}]")
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask is not supported: ChatGLM tokenizers keep no offsets")
        is_batch = not isinstance(conversation[0], Mapping)
        chats = list(conversation) if is_batch else [conversation]
        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []] or None
        template = self.chat_template if chat_template is None else chat_template
        is_own = template == self.chat_format.template
        if is_own:  # any other may read variables of any name
            refuse_unknown("apply_chat_template", kwargs, "return_assistant_tokens_mask")
        if not is_own or documents:
            texts = super().apply_chat_template(
                _marked(chats, self._marks) if tokenize else chats,
                tools=tools,
                documents=_marked(documents, self._marks) if tokenize else documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
            rows = [self._encode_marked(text) for text in texts] if tokenize else []
        elif tokenize:
            budget = max_length if truncation else None
            end = not continue_final_message
            encode = self.chat_format.encode_chat
            rows = [encode(self, chat, tools, add_generation_prompt, end, budget) for chat in chats]
        else:
            end = not continue_final_message
            texts = [self.chat_format.render_chat(chat, tools, add_generation_prompt, end) for chat in chats]
        if not tokenize:
            return texts if is_batch else texts[0]
        if truncation and max_length is not None:
            rows = [row[:max_length] for row in rows]
        batch: Any = {"input_ids": rows if is_batch or return_tensors else rows[0]}
        encoding = self.pad(batch, padding=padding or False, max_length=max_length, return_tensors=return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    @property
    def _marks(self) -> re.Pattern[str]:
        names = filter(None, ["".join(self._typed_start), *self._typed_control_tokens])
        return re.compile("|".join(map(re.escape, names)))

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        for segment, is_token in self._segments(clean_text(text), control=True):
            ids += [self.convert_tokens_to_ids(segment)] if is_token else self.encode_text(segment.replace(_MARK, ""))
        return ids


_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

#: A code point that is no character: put into control tokens that users have typed, so that they are none any more.
_MARK = "\ufdd0"


def _marked(value: Any, names: re.Pattern[str]) -> Any:
    """The value with a mark in every control token of its texts, but for roles."""
    if isinstance(value, str):
        return names.sub(lambda name: name[0][0] + _MARK + name[0][1:], value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _marked(item, names) for key, item in value.items()}
    return [_marked(item, names) for item in value] if isinstance(value, (list, tuple)) else value


class ChatGLM1Tokenizer(ChatGLMTokenizer):
    """ChatGLM-6B: `ice_text.model`, of v1.1 or (with 20,000 image tokens in front of the text) of v1.0.

    A text alone gives `text [gMASK] <sop>`, a pair `text [gMASK] <sop> answer <eop>`. Padded or truncated calls also
    give the bool mask `(1, tokens, tokens)`, True = hidden, and the 2-D positions `(2, tokens)`.
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
        kwargs.setdefault("clean_up_tokenization_spaces", num_image_tokens == 0)  # v1.0's decoder left blanks alone
        super().__init__(vocab_file=vocab_file, chatglm_version=1, **kwargs)
        self.init_kwargs |= named | {"do_lower_case": do_lower_case, "remove_space": remove_space}
        self.init_kwargs["num_image_tokens"] = num_image_tokens
        self._typed_control_tokens = self.all_special_tokens

    @classmethod
    def _adapt_to_model(cls, kwargs: dict[str, Any], model_config: dict[str, Any]) -> dict[str, Any]:
        # Old weights with new tokenizer files, and the reverse, are common: the size of the embedding decides.
        vocab_size = model_config.get("vocab_size")
        if "num_image_tokens" in kwargs or not isinstance(vocab_size, int):
            return kwargs
        return {**kwargs, "num_image_tokens": 20000 if vocab_size >= 150344 else 0}

    @property
    def commands(self) -> dict[str, int]:
        return {token: self._token_to_id[token] for token in _V1_COMMANDS}

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

    def _preprocess(self, text: str, linebreak: bool = True, whitespaces: bool = True) -> str:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
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
            linebreak: keep line breaks (else they count as blanks).
            whitespaces: keep tabs and runs of blanks.
            add_dummy_prefix: treat the text as the start of a text: a blank in front of it.
        """
        text = self._preprocess(clean_text(text), linebreak, whitespaces)
        ids = self.sp_model.encode_as_ids(text if add_dummy_prefix else "<n>" + text)
        return [index + self.num_image_tokens for index in (ids if add_dummy_prefix else ids[2:])]

    def _segments(self, text: str, control: bool) -> Iterator[tuple[str, bool]]:
        segments = list(super()._segments(text, control))
        for index, (segment, is_token) in enumerate(segments):
            if not is_token:  # blanks beside a control token go, except beside [gMASK]
                before = segments[index - 1][0] if index else self.gmask_token
                after = segments[index + 1][0] if index + 1 < len(segments) else self.gmask_token
                segment = segment if before == self.gmask_token else segment.lstrip()
                segment = segment if after == self.gmask_token else segment.rstrip()
            yield segment, is_token

    def _join(self, pieces: list[str]) -> str:
        text = super()._join(pieces).replace("<n>", "\n").replace("<|tab|>", "\t")
        return _BLANK_PIECE.sub(lambda found: " " * int(found[1]), text)

    def _pieces_to_decode(self, ids: list[int]) -> list[str]:
        # Left out altogether: bytes before and after padding belong together.
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
        # Masks and positions follow from the ids; those of an earlier call have another size.
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
        # The model builds mask and positions of an unpadded text itself.
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
    """v1.0's file lacks the control, blank and byte pieces, which its code added at run time: adds them.

    A SentencePiece model is a protobuf message, of which appended fields continue the list of pieces (field 1) and
    overwrite a setting (field 2, trainer_spec: byte_fallback, field 35).
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


def load_sentencepiece(
    vocab_file: str | None, complete: Callable[[bytes, Any], bytes] | None = None
) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model from a file, with one clear error for a file that is none.

    Args:
        complete: what to do with the bytes of a model that lacks the piece `<eop>`.

    Raises:
        FileNotFoundError: no file there.
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


def clean_text(text: str) -> str:
    """The text without surrogates: pairs joined, lone ones replaced by U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def refuse_unknown(function: str, given: Mapping[str, Any], *known: str) -> None:
    """Raises TypeError, as Python does, for a keyword of `given` that is not in `known`: transformers drops those."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def _has_ice_text(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "ice_text.model")) or os.path.basename(path) == "ice_text.model"


def _find(path: str, name: str, kwargs: dict[str, Any]) -> str | None:
    """A file of a model folder or hub id, or None."""
    options = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)


def _read_json(path: str, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A JSON file of a model folder or hub id; empty where it is missing."""
    file = _find((os.path.dirname(path) or ".") if os.path.isfile(path) else path, name, kwargs)
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: copy it again from the model ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object: copy it again from the model")
    return content
