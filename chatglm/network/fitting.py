"""Compares the tables of contents of weight files with config.json, before the weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import file_names
from ..checkpoints.files import ModelLoadError, Weights
from ..quantization import settings_of


def check_fit(folder: Path, config: Any, weights: Weights) -> None:
    """Raises ModelLoadError if the weights in a folder are not those that its config.json describes."""
    check_vocabulary_size(folder, config, weights)
    check_quantization(folder, config, weights)


def check_quantization(folder: Path, config: Any, weights: Weights) -> None:
    """Raises ModelLoadError if the weights are quantised and config.json does not say so, or the other way round."""
    settings, stored = settings_of(config), stored_bits(config, weights)
    path = folder / file_names.CONFIG
    if settings is None and stored is not None:
        raise ModelLoadError(
            f"the weights in {folder} are quantised to {stored} bits, and {path} does not say so: add "
            f'"quantization_bit": {stored} to it, or take the full-precision weights'
        )
    if settings is not None and stored is None and not any(name.endswith(".weight_scale") for name in weights.names):
        raise ModelLoadError(
            f"{path} says that the weights are quantised (quantization_bit = {settings.bits}), and they are not: "
            f"remove quantization_bit and quantization_config from it, and load with quantize={settings.bits}"
        )
    if settings is not None and stored is not None and settings.bits != stored:
        raise ModelLoadError(
            f"the weights in {folder} are quantised to {stored} bits, and {path} says {settings.bits}: set "
            f"quantization_bit (and bits in quantization_config) to {stored}"
        )


def stored_bits(config: Any, weights: Weights) -> int | None:
    """Bits of the quantised matrices in the files; None if there are none, or their size says nothing."""
    for name, count in weights.counts.items():
        if name.endswith(".dense_4h_to_h.weight") and f"{name}_scale" in weights.names:
            elements = config.hidden_size * config.intermediate_size
            return {elements: 8, elements // 2: 4}.get(count)  # two 4-bit values in a byte
    return None


def check_vocabulary_size(folder: Path, config: Any, weights: Weights) -> None:
    """Raises ModelLoadError if the embeddings have other rows than config.json says."""
    later = "vocab_size" in config.attribute_map  # generations 2 and 3 have other names for the size and the tensor
    for name, count in weights.counts.items():
        is_embedding = name.endswith("word_embeddings.weight") and "image_encoder." not in name
        if not is_embedding or f"{name}_scale" in weights.names:
            continue
        if name.endswith("embedding.word_embeddings.weight") != later:
            return  # the weights of another network: names tell more than sizes
        rows, rest = divmod(count, config.hidden_size)
        if rest == 0 and rows != config.vocab_size:
            width, key = config.hidden_size, config.attribute_map.get("vocab_size", "vocab_size")
            raise ModelLoadError(
                f"weights and config.json in {folder} do not fit together ({name}: {(rows, width)} in the file, "
                f"{(config.vocab_size, width)} by config.json): if the embeddings were resized on purpose, set {key} "
                f"to {rows} in {file_names.CONFIG}; else take the weights and config.json of one model"
            )
