"""Checks the tables of contents of all weight files of a folder, whereas loading stops at the first fault."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import memory
from ..checkpoints.files import Contents, ModelLoadError, read_contents, read_json, weight_files
from .findings import Finding
from .messages import say

WHOLE = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".tmp")


@dataclass(frozen=True)
class Found:
    """The weights of a folder: the files that loading would read, and the contents of those that are intact."""

    index: Path | None
    weight_map: Mapping[str, str]  # of the index: tensor -> file
    total_size: int | None  # of the index: bytes
    files: tuple[Path, ...]
    contents: Mapping[Path, Contents]

    @property
    def tensors(self) -> Contents:
        return {name: one for contents in self.contents.values() for name, one in contents.items()}

    @property
    def complete(self) -> bool:
        return bool(self.files) and len(self.contents) == len(self.files)


def find(folder: Path, language: str) -> tuple[Found, list[Finding]]:
    """Finds the weight files, and what is wrong with each of them."""
    findings: list[Finding] = []

    def wrong(text: str) -> None:
        findings.append(Finding("files", "wrong", text))

    index, content = _index(folder), dict[str, Any]()
    if index is not None:
        try:
            content = read_json(index)
        except ModelLoadError as error:
            wrong(str(error))
    weight_map, size = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(one, str) for one in weight_map.values()):
        weight_map = {}
    size = size.get("total_size") if isinstance(size, dict) else None
    files: tuple[Path, ...] = tuple(folder / name for name in sorted(set(weight_map.values())))
    if not files and not findings:
        try:
            files = weight_files(folder)
        except ModelLoadError as error:
            wrong(str(error))
    absent = [path for path in files if not path.is_file()]
    if absent and index is not None:
        names = some([path.name for path in absent], language)
        wrong(say("absent_shards", language, index=index.name, total=len(files), count=len(absent), names=names))
    contents: dict[Path, Contents] = {}
    for path in files:
        if path not in absent:
            try:
                contents[path] = read_contents(path)
            except (ModelLoadError, OSError) as error:
                wrong(str(error))
    found = Found(index, weight_map, size if isinstance(size, int) else None, files, contents)
    others = [*_against_index(found, language), *_others(folder, found, language)]
    return found, [*_described(found, language), *findings, *others]


def _index(folder: Path) -> Path | None:
    """The index that loading would read: as in transformers, a single file takes precedence over an index."""
    for name in WHOLE:
        if (folder / name).is_file():
            return None
        if (folder / f"{name}.index.json").is_file():
            return folder / f"{name}.index.json"
    return None


def _described(found: Found, language: str) -> Iterator[Finding]:
    there = [(path.name, path.stat().st_size) for path in found.files if path.is_file()]
    if not there:
        return
    shown = [say("one_file", language, name=name, size=memory.readable(size)) for name, size in there]
    total = memory.readable(sum(size for _, size in there))
    many = say("many_files", language, count=len(there), size=total, first=shown[0])
    files = ", ".join(shown) if len(shown) <= 2 else many
    listed = [{"name": name, "bytes": size} for name, size in there]
    yield Finding("files", "ok", say("files", language, files=files), data={"files": listed})
    counts: Counter[torch.dtype] = Counter()
    integers = 0
    for dtype, count, size in found.tensors.values():
        if dtype is None:
            integers += size
        else:
            counts[dtype] += count
    named = {str(dtype).removeprefix("torch."): count for dtype, count in counts.most_common()}
    texts = [say("numbers", language, dtype=dtype, count=count) for dtype, count in named.items()]
    texts += [say("integers", language, size=memory.readable(integers))] if integers else []
    if texts:
        text = say("dtypes", language, dtypes=", ".join(texts))
        yield Finding("dtypes", "ok", text, data={"dtypes": named, "integer_bytes": integers})


def _against_index(found: Found, language: str) -> Iterator[Finding]:
    if found.index is None:
        return
    for path, contents in found.contents.items():
        listed = {name for name, file in found.weight_map.items() if file == path.name}
        for key, names in (("index_missing", listed - set(contents)), ("index_extra", set(contents) - listed)):
            if names:
                shown = some(sorted(names), language)
                status = "wrong" if key == "index_missing" else "note"
                yield Finding(key, status, say(key, language, file=path.name, index=found.index.name, names=shown))
    there, here = found.total_size, sum(size for _, _, size in found.tensors.values())
    if found.complete and there is not None and there != here:
        yield Finding("index_size", "note", say("index_size", language, index=found.index.name, there=there, here=here))


def _others(folder: Path, found: Found, language: str) -> Iterator[Finding]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    unfinished = [path.name for path in files if path.suffix in UNFINISHED]
    if unfinished:
        yield Finding("unfinished", "note", say("unfinished", language, names=some(unfinished, language)))
    others = [path.name for path in files if path.suffix in SUFFIXES and path not in found.files]
    if others and found.files:
        yield Finding("not_read", "note", say("not_read", language, names=some(others, language)))


def against_model(model: Any, found: Found, language: str) -> list[Finding]:
    """Reports missing, extra and wrongly sized tensors in the files; `model` may be on the meta device."""
    wanted = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    tensors, tied = found.tensors, dict(getattr(model, "all_tied_weights_keys", None) or {})
    partners = tied | {source: target for target, source in tied.items()}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    missing = [name for name in wanted if name not in tensors and partners.get(name) not in tensors]
    missing = [name for name in missing if "prefix_encoder." not in name]  # that has findings of its own
    extra = [name for name in tensors if name not in wanted and not any(re.search(one, name) for one in ignored)]
    sizes = [
        say("one_size", language, name=name, here=count, there=wanted[name])
        for name, (_, count, _) in tensors.items()
        if name in wanted and wanted[name] != count
    ]
    findings = [("tensors_extra", extra), ("tensors_size", sizes)]
    if found.complete:
        findings.insert(0, ("tensors_missing", missing))
    texts = {key: say(key, language, names=some(sorted(names), language)) for key, names in findings if names}
    return [Finding(key, "wrong", text) for key, text in texts.items()]


def some(names: Sequence[str], language: str, most: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return say("more", language, names=shown, count=len(names) - most) if len(names) > most else shown
