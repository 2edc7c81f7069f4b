"""Reads weight files that transformers does not read by itself, although it is certain what they hold."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .files import ModelLoadError, choose_weights, read_contents, tensors_of


def unusual_state_dict(folder: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a folder, mapped into memory; None if transformers reads them itself, or reports why it cannot.

    Unusual are shards without an index, an index without `metadata`, a whole file beside an index whose shards are
    gone, and tensors that lie one level deeper, as in DeepSpeed's checkpoints.
    """
    try:
        files, usual = choose_weights(folder)
        if usual and not any(_is_wrapped(path) for path in files):
            return None
        for path in files:
            read_contents(path)  # for its errors
    except ModelLoadError:
        return None
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= load_file(path) if path.suffix == ".safetensors" else load_torch_file(path)
    return tensors


def load_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, mapped into memory where its format allows it."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return dict(tensors_of(content))


def _is_wrapped(path: Path) -> bool:
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):  # training programs write zip files
        return False
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds for files that it did not write; transformers reports them
        return False
    return tensors_of(content) is not content
