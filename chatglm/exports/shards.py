"""Writes tensors to safetensors files as they come, a few of them in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..checkpoints.atomic import write_file
from ..checkpoints.file_names import INDEX, SAFETENSORS

#: The size of a file, and about the memory that writing it takes.
SHARD_BYTES = 2 << 30


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], limit: int = SHARD_BYTES) -> None:
    """Writes the tensors to `model.safetensors`, or to numbered shards of at most `limit` bytes and their index.

    Raises:
        OSError: a file cannot be written.
    """
    shards: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(waiting, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > limit:
            flush()
            size = 0
        waiting[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SAFETENSORS)
        return
    stem, suffix = SAFETENSORS.rsplit(".", 1)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05}-of-{len(shards):05}.{suffix}"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / f"{SAFETENSORS}{INDEX}", json.dumps(index, indent=2) + "\n")
