"""What a checkpoint says about its generation: in config.json, in the tokenizer's files, in weights, code and names."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import file_names
from .files import ModelLoadError, choose_weights, read_contents
from .weight_names import unwrapped

#: GLM-4 calls its model type "chatglm" too, and has ChatGLM3's network.
GLM4 = 4
#: VisualGLM-6B: the network and the vocabulary of generation 1, with pictures.
VISUAL = 11
_LIKE_1 = frozenset((1, VISUAL))
#: Embeddings with more rows than this belong to generation 1 or to GLM-4.
_LARGE_VOCABULARY = 100_000
_LEVELS = 4  # folders above the checkpoint whose names count
_CODE = ("tokenization_chatglm.py", "modeling_chatglm.py", "configuration_chatglm.py")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")

_KEYS_OF_1 = ("inner_hidden_size", "position_encoding_2d", "gmask_token_id")
_KEYS_OF_LATER = ("ffn_hidden_size", "padded_vocab_size", "multi_query_group_num", "kv_channels")
_KEYS_OF_CODEGEEX2 = ("rotary_percent", "interleaved_qkv")
_TOKENS_OF_1 = ("gmask_token", "end_token", "eop_token", "num_image_tokens")
# In the text of templates and code: a pattern and the generations that it occurs in; the first match counts.
_IN_TEXT: tuple[tuple[re.Pattern[str], frozenset[int]], ...] = (
    (re.compile(r"<\|(?:user|assistant|observation)\|>|build_single_message"), frozenset((3, GLM4))),
    (re.compile(r"ice_text\.model|position_encoding_2d|inner_hidden_size"), _LIKE_1),
    (re.compile(r"\[Round \{\}\]\\n\\n"), frozenset((2,))),
    (re.compile("问："), frozenset((1, 2, VISUAL))),
    (re.compile("multi_query_group_num"), frozenset((2, 3))),
)
# Names of published models; the first match in a name counts. 0: the generation is in the name.
_IN_NAMES: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"codegeex[-_]?2", re.IGNORECASE), 2),
    (re.compile(r"codegeex[-_]?4|(?<!chat)glm[-_]?4(?!v|bit|[0-9])", re.IGNORECASE), GLM4),
    (re.compile(r"chatglm(?:[-_]?v)?([123])(?:6b|(?![0-9]))|chatglm[-_]([23])(?![0-9a-z])", re.IGNORECASE), 0),
    (re.compile(r"visualglm", re.IGNORECASE), VISUAL),
    (re.compile(r"chatglm[-_]?6b", re.IGNORECASE), 1),
)


class Rank(enum.IntEnum):
    """How much a clue counts: the highest rank decides, and lower ones decide what it leaves open."""

    HINT = 1  # values that the published config.json of one generation has, and that others may have
    NEARBY = 2  # names of folders above
    FORMAT = 3  # prompts and control tokens: templates, code beside the weights; such files are sometimes copied
    NAME = 4  # the name of the model, in a file or in its path
    STRUCTURE = 5  # what the networks differ in: keys, weights, vocabularies
    STATED = 6  # `chatglm_version` in a file
    GIVEN = 7  # `chatglm_version` as an argument


@dataclass(frozen=True)
class Clue:
    """One thing that a checkpoint says about its generation.

    Args:
        generations: those that it fits.
        source: the file that it was found in, or "path".
        name: of the key, or the name of a model or folder.
        value: of the key; None if there is nothing more to tell.
    """

    rank: Rank
    generations: frozenset[int]
    source: str
    name: str
    value: Any = None

    @property
    def text(self) -> str:
        if self.value is None or self.rank in (Rank.NAME, Rank.NEARBY):
            key = "" if self.value is None else f"{self.value} = "
            return f"{self.source}: {key}{self.name}"
        return f"{self.source}: {self.name} = {self.value}"


def known_generation(value: Any) -> int:
    """`chatglm_version` as a number. Raises ValueError if there is no such generation."""
    with contextlib.suppress(ValueError, TypeError):
        number = int(value)
        if number in file_names.VOCABULARIES and str(value).strip() in (str(number), f"{number}.0"):
            return number
    *others, last = sorted(set(file_names.VOCABULARIES) - {VISUAL})
    numbers = f"{', '.join(map(str, others))} or {last}, or {VISUAL} for VisualGLM-6B"
    raise ValueError(f"chatglm_version must be {numbers}, not {value!r}")


def gather(path: Path | None, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> list[Clue]:
    """All clues, the most important first.

    Args:
        path: a folder, its vocabulary file, or a hub id; None if there is only a config.
        config: the values of its config.json.
        tokenizer: the values of its tokenizer_config.json.
    """
    found = [*_of_config(config), *_of_tokenizer(tokenizer)]
    if path is not None:
        folder = path.parent if path.is_file() else path
        if folder.is_dir():
            found += [*_of_vocabulary(path), *_of_weights(folder), *_of_texts(folder)]
        found += _of_path(folder)
    return sorted(found, key=lambda clue: -clue.rank)


def _later() -> frozenset[int]:
    return (frozenset(file_names.VOCABULARIES) | {GLM4}) - _LIKE_1


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0


def _of_config(config: Mapping[str, Any]) -> Iterator[Clue]:
    source = file_names.CONFIG
    if config.get("chatglm_version") is not None:
        stated = config["chatglm_version"]
        yield Clue(Rank.STATED, frozenset((known_generation(stated),)), source, "chatglm_version", stated)
    of_1 = frozenset((VISUAL if config.get("eva_config") else 1,))
    for keys, generations in (
        (("eva_config",), frozenset((VISUAL,))), (_KEYS_OF_1, of_1), (_KEYS_OF_CODEGEEX2, frozenset((2,))),
        (_KEYS_OF_LATER, _later()),
    ):  # fmt: skip
        for key in [key for key in keys if config.get(key) is not None][:1]:
            yield Clue(Rank.STRUCTURE, generations, source, key, config[key])
    if _number(config.get("padded_vocab_size")) > _LARGE_VOCABULARY:
        value = config["padded_vocab_size"]
        yield Clue(Rank.STRUCTURE, frozenset((GLM4,)), source, "padded_vocab_size", value)
    for key in ("_name_or_path", "name_or_path", "architectures", "auto_map"):
        clues = (clue for name in _strings(config.get(key)) for clue in _of_name(name, source, key))
        yield from itertools.islice(clues, 1)
    length = _number(config.get("seq_length"))
    if length == 32768 and config.get("rope_ratio") in (None, 1, "1"):
        yield Clue(Rank.HINT, frozenset((2,)), source, "seq_length", config["seq_length"])
    elif length in (8192, 131072):
        yield Clue(Rank.HINT, frozenset((3,)), source, "seq_length", config["seq_length"])


def _of_tokenizer(config: Mapping[str, Any]) -> Iterator[Clue]:
    source = file_names.TOKENIZER_CONFIG
    if config.get("chatglm_version") is not None:
        stated = config["chatglm_version"]
        yield Clue(Rank.STATED, frozenset((known_generation(stated),)), source, "chatglm_version", stated)
    if config.get("tokenizer_class") == "ChatGLM4Tokenizer":
        yield Clue(Rank.STRUCTURE, frozenset((GLM4,)), source, "tokenizer_class", "ChatGLM4Tokenizer")
    if config.get("chat_template"):
        yield from _of_text(json.dumps(config["chat_template"], ensure_ascii=False), source, "chat_template")
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        if "<|user|>" in json.dumps(config.get(key), default=str):
            yield Clue(Rank.FORMAT, frozenset((3, GLM4)), source, key, "<|user|>")
    for name in _strings(config.get("name_or_path")):
        yield from _of_name(name, source, "name_or_path")
    # No more than a hint: this file is often copied from generation 1 to others, whose tokenizers then say so.
    for key in [key for key in _TOKENS_OF_1 if key in config][:1]:
        yield Clue(Rank.HINT, _LIKE_1, source, key)


def _of_vocabulary(path: Path) -> Iterator[Clue]:
    known = set(file_names.VOCABULARIES.values())
    there = known & {path.name} if path.is_file() else {name for name in known if (path / name).is_file()}
    if len(there) == 1:
        (name,) = there
        fitting = {generation for generation, other in file_names.VOCABULARIES.items() if other == name}
        yield Clue(Rank.STRUCTURE, frozenset(fitting | ({GLM4} if 3 in fitting else set())), "path", name)
    elif file_names.VOCABULARIES[1] in there:  # beside another: no more than a hint
        yield Clue(Rank.HINT, _LIKE_1, "path", file_names.VOCABULARIES[1])


def _of_weights(folder: Path) -> Iterator[Clue]:
    """From the names and sizes in the table of contents of the first weight file that tells."""
    try:
        for file in choose_weights(folder)[0]:
            # In torch's format before version 1.6, the table of contents costs as much as the tensors.
            if file.suffix != ".safetensors" and not zipfile.is_zipfile(file):
                continue
            contents = {unwrapped(name): one for name, one in read_contents(file).items()}
            image_side = next((name for name in contents if name.startswith("image_encoder.")), None)
            if image_side is not None:
                yield Clue(Rank.STRUCTURE, frozenset((VISUAL,)), file.name, image_side)
                return
            for name in contents:
                if re.search(r"(?:^|\.)(?:embedding\.word_embeddings|encoder\.layers\.\d+)\.", name):
                    yield Clue(Rank.STRUCTURE, _later(), file.name, name)
                elif re.search(r"(?:^|\.)(?:word_embeddings|layers\.\d+)\.", name):
                    yield Clue(Rank.STRUCTURE, _LIKE_1, file.name, name)
                else:
                    continue
                width = next((one[1] for norm, one in contents.items() if norm.endswith("layernorm.weight")), 0)
                rows = contents[name][1] // width if width and name.endswith("embedding.word_embeddings.weight") else 0
                if rows > _LARGE_VOCABULARY:
                    yield Clue(Rank.STRUCTURE, frozenset((GLM4,)), file.name, f"{name} has {rows} rows")
                return
    except (ModelLoadError, OSError):  # whoever loads the weights reports it
        return


def _of_texts(folder: Path) -> Iterator[Clue]:
    for name in (*_TEMPLATES, *_CODE):
        with contextlib.suppress(OSError):
            yield from _of_text((folder / name).read_text(encoding="utf-8", errors="replace"), name)


def _of_text(text: str, source: str, key: str | None = None) -> Iterator[Clue]:
    for pattern, generations in _IN_TEXT:
        if match := pattern.search(text):
            yield Clue(Rank.FORMAT, generations, source, key or match[0], match[0] if key else None)
            return


def _of_path(path: Path) -> Iterator[Clue]:
    for one in dict.fromkeys((path.absolute(), path.resolve())) if path.exists() else (path,):
        if clues := list(_of_parts(one.parts, "path", None)):
            yield from clues
            return


def _of_name(name: str, source: str, key: str) -> Iterator[Clue]:
    """From a name inside a file: that of a published model, or the path of a folder on the machine that wrote it."""
    for clue in _of_parts(re.split(r"[/\\]", name), source, key):
        yield dataclasses.replace(clue, name=name)


def _of_parts(parts: Sequence[str], source: str, key: str | None) -> Iterator[Clue]:
    """From the name nearest to the end of a path."""
    own, above = own_and_nearby(parts)
    for rank, name in ((Rank.NAME, own), *((Rank.NEARBY, name) for name in above)):
        found = generation_in(name)
        if found is not None:
            yield Clue(rank, frozenset((found,)), source, name, key)
            return


def generation_in(name: str) -> int | None:
    """The generation of the published model that a name contains; None if it contains none."""
    for pattern, generation in _IN_NAMES:
        if match := pattern.search(name):
            return generation or int(next(filter(None, match.groups())))
    return None


def own_and_nearby(parts: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the model in the parts of a path, and the names of the folders above.

    In the caches of hubs (`models--THUDM--chatglm2-6b/snapshots/0a1b...`) and among checkpoints of a training
    (`tuned-chatglm2/checkpoint-500`), that is not the name of the folder itself.
    """
    names = [part for part in parts if part]
    while len(names) > 1 and re.fullmatch(r"checkpoint-\d+|v?\d+(?:\.\d+)+", names[-1]):
        names.pop()
    if len(names) > 2 and names[-2] == "snapshots":
        names = names[:-2]
    return (names[-1] if names else ""), names[-2 : -2 - _LEVELS : -1]


def _strings(values: Any) -> list[str]:
    """The strings among the values of a list or dict, of which each may be a list again; a string is itself."""
    if isinstance(values, str):
        return [values] if values else []
    inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ()
    return [text for value in inner for text in _strings(value)]


def read_values(file: Path) -> dict[str, Any]:
    """A JSON file as evidence; whoever needs it reports what is wrong with it."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
