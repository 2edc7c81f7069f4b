"""A checkpoint to export, read one tensor at a time; a LoRA adapter is added on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoints.adapters import Lora
from ..checkpoints.files import find_weights
from ..checkpoints.state_dicts import load_torch_file
from ..checkpoints.weight_names import unwrapped

#: Fields of adapter_config.json that change what LoRA computes, with the values under which it is `scale * B @ A`.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


class Tensors:
    """The tensors of a checkpoint folder by name, mapped from its files and never all in memory.

    Args:
        folder: the checkpoint.
        rename: makes the model's own name of a tensor's name in the files.

    Raises:
        ModelLoadError: there are no weights, or a file is broken.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = unwrapped) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, str]] = {}
        self._opened: tuple[Path, Any] | None = None
        for path in find_weights(folder).files:
            for stored in self._open(path).keys():  # noqa: SIM118  # a file of safetensors is no dict
                self._places[rename(stored)] = (path, stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        path, stored = self._places[name]
        file = self._open(path)
        return file[stored] if isinstance(file, dict) else file.get_tensor(stored)

    def _open(self, path: Path) -> Any:
        """The file, as a mapping or as safetensors' reader; the last one stays open."""
        if self._opened is None or self._opened[0] != path:
            safe = path.suffix == ".safetensors"
            self._opened = path, safe_open(path, framework="pt") if safe else load_torch_file(path)
        return self._opened[1]


class LoraDeltas:
    """What a LoRA adapter adds to the weights.

    Raises:
        ValueError: it is not plain LoRA (DoRA, trained biases, several ranks): PEFT has to merge it.
    """

    def __init__(self, lora: Lora) -> None:
        for name, plain in _PLAIN_LORA.items():
            if lora.config.get(name) not in plain:
                raise ValueError(
                    f"the LoRA adapter {lora.path} has {name} = {lora.config[name]!r}, which can be merged into a "
                    "whole model only: run this with --to merged first, then export the result"
                )
        rank, alpha = int(lora.config["r"]), float(lora.config["lora_alpha"])
        self._scale = alpha / (math.sqrt(rank) if lora.config.get("use_rslora") else rank)
        self._path = lora.path
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in lora.tensors.items():
            module, found, part = key.removeprefix("base_model.model.").partition(".lora_")
            if not found or part not in ("A.weight", "B.weight"):
                raise ValueError(f"the LoRA adapter {lora.path} has a tensor {key}, which is not plain LoRA")
            self._parts.setdefault(f"{module}.weight", {})[part[0]] = tensor

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of this name with what the adapter adds, summed in float32 and rounded once.

        Raises:
            ValueError: the adapter was made for a model of another size.
        """
        parts = self._parts.get(name)
        if parts is None:
            return weight
        a, b = parts["A"].float(), parts["B"].float()
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"the LoRA adapter {self._path} is for another model: {name} has the shape {tuple(weight.shape)}, and "
                f"the adapter's part {(b.shape[0], a.shape[1])}"
            )
        return (weight.float() + (b @ a) * self._scale).to(weight.dtype)

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """Raises ValueError if the adapter is for layers that are not among these names."""
        unknown = sorted(set(self._parts) - set(names))
        if unknown:
            raise ValueError(f"the LoRA adapter {self._path} is for another model: this one has no {unknown[0]}")


def renamer(other_names: dict[str, str]) -> Callable[[str], str]:
    """A function that makes a model's own names; `other_names` are its patterns for what else is found in files."""

    def rename(name: str) -> str:
        name = unwrapped(name)
        for pattern, replacement in other_names.items():
            name = re.sub(pattern, replacement, name)
        return name

    return rename
