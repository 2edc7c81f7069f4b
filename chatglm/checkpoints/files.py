"""The contents of a checkpoint folder, read without loading it: which files, how large, intact or broken.

Every error names the file and says what to do; a broken download is found here, before minutes of loading.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import file_names
from .weight_names import first_few, unwrapped

# Floating-point types as safetensors headers name them; tensors of other types (quantised weights) keep theirs.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Tensor name -> (its type if a floating-point one, elements, bytes).
Contents = dict[str, tuple[torch.dtype | None, int, int]]
GET_AGAIN = "download it again (or copy it from where you got the folder)"


class ModelLoadError(OSError):
    """A checkpoint that cannot be loaded: the message names the file and says what to do."""


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder, and a summary of their tables of contents."""

    files: tuple[Path, ...]
    names: frozenset[str]  # of the tensors, without what wrappers put into them
    elements: int  # floating-point parameters in all
    other_bytes: int  # bytes of the tensors of other types
    dtype: torch.dtype  # of most floating-point parameters
    counts: Mapping[str, int] = field(default_factory=dict)  # elements of each tensor

    def size(self, itemsize: int) -> int:
        """Bytes of the weights if each floating-point parameter has `itemsize` bytes."""
        return self.elements * itemsize + self.other_bytes


def check_folder(folder: Path) -> None:
    """Raises ModelLoadError unless this is a folder with the config.json of a ChatGLM."""
    if folder.is_file():
        raise ModelLoadError(f"{folder} is a file: give the folder that holds config.json and the weights")
    if not folder.is_dir():
        raise ModelLoadError(f"there is no folder {folder}: give a folder with config.json, weights and tokenizer")
    if not (folder / file_names.CONFIG).is_file():
        if (folder / file_names.LORA_CONFIG).is_file():
            raise ModelLoadError(f"{folder} is a LoRA adapter: load the model it was made for, with this as adapter")
        below = sorted(path.parent.name for path in folder.glob(f"*/{file_names.CONFIG}"))
        hint = f"did you mean the folder {folder / below[0]}?" if below else "give the folder of a ChatGLM checkpoint"
        raise ModelLoadError(f"{folder} has no config.json, so it is not a checkpoint: {hint}")
    config = folder / file_names.CONFIG
    kind = read_json(config).get("model_type")
    if kind != "chatglm":
        raise ModelLoadError(f"{config} describes a model of type {kind!r}: only 'chatglm' can be loaded")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file that must exist. Raises ModelLoadError."""
    _check_file(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}): {GET_AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds no JSON object: {GET_AGAIN}")
    return content


def check_vocabulary(folder: Path, generation: int) -> None:
    """Raises ModelLoadError unless the SentencePiece model of this generation is there."""
    path = folder / file_names.VOCABULARIES[generation]
    if not path.is_file():
        raise ModelLoadError(f"{folder} has no {path.name}: copy the tokenizer files of ChatGLM{generation} into it")
    _check_file(path)


def find_weights(folder: Path) -> Weights:
    """Finds and checks the weights that would be loaded from `folder`. Raises ModelLoadError."""
    files = weight_files(folder)
    counts: dict[str, int] = {}
    elements: Counter[torch.dtype] = Counter()
    other_bytes = 0
    for path in files:
        for name, (kind, count, size) in read_contents(path).items():
            counts[unwrapped(name)] = count
            if kind is None:
                other_bytes += size
            else:
                elements[kind] += count
    most = elements.most_common(1)
    dtype = most[0][0] if most else torch.float32
    return Weights(files, frozenset(counts), elements.total(), other_bytes, dtype, counts)


def read_contents(path: Path) -> Contents:
    """The table of contents of one weight file. Raises ModelLoadError unless the file is whole."""
    _check_file(path)
    return _safetensors_contents(path) if path.suffix == ".safetensors" else _torch_contents(path)


def _safetensors_contents(path: Path) -> Contents:
    size = path.stat().st_size
    contents: Contents = {}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        expected = 8 + length
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                contents[name] = (FLOATS.get(entry["dtype"]), math.prod(entry["shape"]), end - start)
                expected = max(expected, 8 + length + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} is not a safetensors file, or its start is broken: {GET_AGAIN}") from error
    if size != expected:
        how = "is cut off" if size < expected else "is broken"
        raise ModelLoadError(f"{path} {how}: it has {size} of {expected} bytes; {GET_AGAIN}")
    return contents


def _torch_contents(path: Path) -> Contents:
    with path.open("rb") as file:
        start = file.read(2)
    is_zip = zipfile.is_zipfile(path)
    if start == b"PK" and not is_zip:  # a zip file has its table of contents at the end
        raise ModelLoadError(f"{path} is cut off (its end is missing): {GET_AGAIN}")
    try:
        tensors = tensors_of(torch.load(path, map_location="meta", weights_only=True, mmap=is_zip))
        return {
            name: (tensor.dtype if tensor.is_floating_point() else None, tensor.numel(), tensor.nbytes)
            for name, tensor in tensors.items()
        }
    except Exception as error:  # torch raises many kinds for files that it did not write
        raise ModelLoadError(f"{path} is not a file of weights, or broken: {GET_AGAIN}") from error


def tensors_of(content: Any) -> Any:
    """The tensors in what torch.load returned: itself, or those under `module` (DeepSpeed) or a similar key."""
    if isinstance(content, Mapping) and not any(isinstance(value, torch.Tensor) for value in content.values()):
        for name in ("module", "state_dict", "model_state_dict", "model"):
            if isinstance(content.get(name), Mapping):
                return content[name]
    return content


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files with the weights of `folder`. Raises ModelLoadError."""
    return choose_weights(folder)[0]


def choose_weights(folder: Path) -> tuple[tuple[Path, ...], bool]:
    """The files with the weights of `folder`, and whether transformers finds the same ones. Raises ModelLoadError."""
    # The order in which transformers looks: one file before an index, safetensors before torch's own format.
    stale: ModelLoadError | None = None
    for name in (file_names.SAFETENSORS, file_names.TORCH_WEIGHTS):
        if (folder / name).is_file():
            return ((folder / name,), stale is None)
        index = folder / f"{name}{file_names.INDEX}"
        if index.is_file():
            content = read_json(index)
            shards = content.get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ModelLoadError(f"{index} has no weight_map: {GET_AGAIN}")
            files = tuple(folder / shard for shard in sorted(set(shards.values())))
            missing = [path.name for path in files if not path.is_file()]
            if not missing:
                return (files, stale is None and isinstance(content.get("metadata"), dict))
            total = f"{len(missing)} of {len(files)} weight files of {index.name} are not in {folder}"
            stale = stale or ModelLoadError(f"{total}: {', '.join(missing)}; download them into it")
            if len(missing) < len(files):
                raise stale
    if stale is not None:
        raise stale
    for name in (file_names.SAFETENSORS, file_names.TORCH_WEIGHTS):
        if files := _shards_without_index(folder, name):
            return (files, False)
    raise ModelLoadError(
        f"{folder} has a {file_names.CONFIG} but no weights ({file_names.SAFETENSORS}, {file_names.TORCH_WEIGHTS} or "
        f"their {file_names.INDEX}): download the weights into it"
    )


def _shards_without_index(folder: Path, name: str) -> tuple[Path, ...]:
    """The shards of a file that their own names number (`pytorch_model-00001-of-00007.bin`), if there are any.

    Raises:
        ModelLoadError: some of them are missing.
    """
    stem, _, suffix = name.rpartition(".")
    pattern = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.{suffix}")
    found = [match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    if not found:
        return ()
    count = int(found[0][2])
    files = tuple(folder / f"{stem}-{number:05}-of-{count:05}.{suffix}" for number in range(1, count + 1))
    missing = [path.name for path in files if not path.is_file()]
    if missing or len(found) != count:
        raise ModelLoadError(
            f"{folder} has no {name}{file_names.INDEX}, and its shards of the weights are not one whole set "
            f"({', '.join(missing) or 'there are two sets'}{' missing' if missing else ''}): download the index and "
            "all shards into it"
        )
    return files


def refuse_missing(source: object, names: Iterable[str], others: Iterable[str]) -> None:
    """Raises ModelLoadError if there are tensors of the model that its weight files lack.

    Args:
        names: of the missing tensors.
        others: names in the files that the model does not have.
    """
    missing, unknown = sorted(names), sorted(others)
    if missing:
        found = f"; instead they hold {first_few(unknown)}: rename those if they are the model's" if unknown else ""
        raise ModelLoadError(
            f"the weight files of {source} lack tensors of the model ({first_few(missing)}){found or ': ' + GET_AGAIN}"
        )


def _check_file(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ModelLoadError(
            f"{path} is only a git-lfs pointer ({path.stat().st_size} bytes), not the file itself: "
            f"run `git lfs pull` in {path.parent}, or download the file"
        )
    if not start:
        raise ModelLoadError(f"{path} is empty: {GET_AGAIN}")
