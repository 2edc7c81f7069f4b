"""The steps of loading: find and check the files before minutes are spent on them, then build the model."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import demo
from ..adapters.attaching import attach
from ..adapters.switching import use_adapter
from ..chat import model_class
from ..checkpoints import file_names
from ..checkpoints.adapters import PREFIX, Adapter, read_adapter
from ..checkpoints.files import ModelLoadError, Weights, check_folder, find_weights, read_json
from ..checkpoints.hub import fetch
from ..network.fitting import check_fit
from ..quantization import ChatGLMQuantizationConfig, settings_of
from .dtypes import SMALL
from .reading import cast, read_config, read_model

#: One file or folder, or several as {name: path}.
AdapterPaths = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


@dataclass(frozen=True)
class Plan:
    """What to load, checked as far as possible without reading the weights."""

    folder: Path
    weights: Weights
    config: Any
    quantization: ChatGLMQuantizationConfig | None  # to apply while loading, if any
    adapters: list[tuple[str | None, Adapter]]  # with the names that the caller gave them
    options: Mapping[str, Any]  # of `from_pretrained`

    def build(
        self, dtype: torch.dtype, device_map: Mapping[str, Any] | None, *, castable: bool = True, **options: Any
    ) -> PreTrainedModel:
        """The model with its adapters, the first of which is in use.

        Args:
            device_map: module names to devices; None is the CPU.
            castable: False if weights are offloaded: those cannot be cast once they are loaded.
            options: further arguments of `from_pretrained`.

        Raises:
            ModelLoadError: weights and config do not fit together, or an adapter is for another model.
        """
        # Quantises the values in the file: rounding them to another dtype first would change the result.
        first = self.weights.dtype if self.quantization is not None and castable else dtype
        model = read_model(
            model_class(self.config),
            self.folder,
            self.config,
            dtype=first,
            quantization=self.quantization,
            device_map=device_map,
            progress_bar=self.weights.elements >= SMALL,
            **self.options,
            **options,
        )
        if first != dtype:
            cast(model, dtype)
        attached = [attach(model, adapter, name) for name, adapter in self.adapters]
        if attached:
            use_adapter(model, attached[0])
        return model.eval()


def make_plan(
    path_or_id: str | os.PathLike[str] | None,
    revision: str | None = None,
    *,
    quantize: int | None = None,
    adapter: AdapterPaths | None = None,
    config: Any = None,
    options: Mapping[str, Any] | None = None,
    chatglm_version: int | None = None,
    local_files_only: bool = False,
) -> Plan:
    """Finds and checks the checkpoint and everything that belongs to it.

    Args:
        config: a copy of it replaces the one in the folder. If it asks for a prefix that the weights lack, the model
            gets a fresh one for the caller to fill.
        options: arguments of `from_pretrained`: fields of the config, and others, which stay in the plan.

    Raises:
        ModelLoadError: something is missing, broken, or does not fit together.
        ValueError: an argument is invalid, or does not apply to this checkpoint.
    """
    if quantize not in (None, 4, 8):
        raise ValueError(f"quantize is {quantize!r}: use 4, 8, or None for no quantisation")
    folder = find_folder(path_or_id, revision, local_files_only)
    check_folder(folder)
    weights = find_weights(folder)
    left = dict(options or {})
    fresh_prefix = left.get("pre_seq_len") is not None or (config is not None and config.pre_seq_len is not None)
    config = read_config(folder, chatglm_version) if config is None else copy.deepcopy(config)
    for name in [name for name in left if name in config.to_dict()]:
        setattr(config, name, left.pop(name))
    check_fit(folder, config, weights)
    quantization = wanted_quantization(folder, config, quantize)
    adapters = read_adapters(adapter)
    if adapters or not fresh_prefix:
        check_prefix(folder, config, weights, bool(adapters))
    return Plan(folder, weights, config, quantization, adapters, left)


def find_folder(
    path_or_id: str | os.PathLike[str] | None = None, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder that `load` reads: the given one, or that of a hub id, after fetching missing files."""
    source = os.fspath(path_or_id or os.environ.get("CHATGLM_MODEL") or demo.DEFAULT)
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for hub ids, and {source} is a folder: leave it out")
        return path
    return fetch(source, revision, local_files_only)


def wanted_quantization(folder: Path, config: Any, quantize: int | None) -> ChatGLMQuantizationConfig | None:
    """The quantisation to apply while loading. Raises ValueError for a checkpoint quantised to other bits."""
    present = settings_of(config)
    if quantize is None or present is None:
        return ChatGLMQuantizationConfig(bits=quantize) if quantize else None
    if present.bits != quantize:
        raise ValueError(
            f"quantize={quantize}, but {folder} is quantised to {present.bits} bits already: leave quantize out, or "
            "take the full-precision checkpoint"
        )
    return None


def read_adapters(adapter: AdapterPaths | None) -> list[tuple[str | None, Adapter]]:
    """Reads the adapters, with their names; None for one named after its folder. Raises ModelLoadError."""
    if adapter is None:
        return []
    if isinstance(adapter, Mapping):
        return [(name, read_adapter(path)) for name, path in adapter.items()]
    return [(None, read_adapter(adapter))]


def check_prefix(folder: Path, config: Any, weights: Weights, has_adapter: bool) -> None:
    """Raises ModelLoadError if the config asks for a prefix that neither the weights nor an adapter provide.

    An adapter takes the place of a prefix that the weights lack.
    """
    inside = [name for name in weights.names if PREFIX.match(name)]
    if inside and len(inside) == len(weights.names):
        base = read_json(folder / file_names.CONFIG).get("base_model_name_or_path")
        raise ModelLoadError(
            f"{folder} is a P-tuning prefix: load the model it was trained for{f' ({base})' if base else ''}, with "
            "this as adapter"
        )
    if config.pre_seq_len and not inside:
        if not has_adapter:
            raise ModelLoadError(
                f"{folder / file_names.CONFIG} asks for a P-tuning prefix (pre_seq_len = {config.pre_seq_len}), but "
                "the weights hold none: give its checkpoint as adapter=..., or remove pre_seq_len"
            )
        config.pre_seq_len, config.prefix_projection = None, False
