"""GLM-4's vocabulary file: byte-pair tokens with their ranks, as a tokenizer of the `tokenizers` library.

The file has a line per token: its bytes in base64, and its rank, which is its id. A text is first split by a pattern;
within a part, the two neighbours whose union has the lowest rank are joined until none is a token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ..checkpoints.atomic import write_file
from ..kernels.cache_files import cache_folder
from ..kernels.errors import KernelUnavailable

#: How GLM-4's tokenizer splits a text before it joins bytes.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_names() -> dict[int, str]:
    """The characters by which `tokenizers` names bytes: printable ones by themselves, others by ones from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


BYTE_NAMES = _byte_names()
BYTES_BY_NAME = {name: byte for byte, name in BYTE_NAMES.items()}


def name_of(token: bytes) -> str:
    """The name of a token in a `tokenizers` vocabulary."""
    return "".join(map(BYTE_NAMES.__getitem__, token))


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """The tokens of a vocabulary file with their ranks, which count from 0. Raises as `load_tokenizer`."""
    return _ranks_in(_read(path), path)


def _read(path: str | Path) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no vocabulary file {path}")
    return Path(path).read_bytes()


def _ranks_in(data: bytes, path: str | Path) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        if not ranks or list(ranks.values()) != list(range(len(pairs))) or not data.endswith(b"\n"):
            raise ValueError("its ranks do not count from 0, or its end is missing")
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("it lacks single bytes")
    except (ValueError, binascii.Error) as error:
        hint = " (a git-lfs pointer: fetch the file itself)" if data.startswith(b"version https://git") else ""
        raise ValueError(
            f"{path} is not a vocabulary of GLM-4, or only part of one{hint}: copy it again from the model"
        ) from error
    return ranks


def make_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """The vocabulary, without control tokens.

    Every way to make a token of two others is a merge: by the ranks alone, some tokens could not be reached.
    """
    names = {token: name_of(token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [split for split in splits if split[0] in ranks and split[1] in ranks]
        known.sort(key=lambda split: (ranks[split[0]], ranks[split[1]]))
        merges += [(names[first], names[second]) for first, second in known]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def load_tokenizer(path: str | Path) -> tuple[Tokenizer, dict[bytes, int]]:
    """The tokenizer of a vocabulary file, and its ranks. The first call for a file takes seconds; its result is kept
    in the cache folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or only part of one.
    """
    data = _read(path)
    ranks = _ranks_in(data, path)
    key = hashlib.sha256(data + PATTERN.encode()).hexdigest()[:24]
    try:
        kept = cache_folder() / f"vocabulary-{key}.json"
    except KernelUnavailable:  # no home folder
        return make_tokenizer(ranks), ranks
    try:
        return Tokenizer.from_file(str(kept)), ranks
    except Exception:  # not there yet, or damaged: the library raises plain Exception
        made = make_tokenizer(ranks)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, made.to_str())
    except OSError:  # a full or read-only disk costs time, nothing else
        pass
    return made, ranks
