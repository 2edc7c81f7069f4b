"""Exports a base model and its adapter as one checkpoint; the command is `python -m chatglm.export`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.lora import merge_lora, requantization_error
from ..checkpoints import file_names
from ..checkpoints.adapters import Lora, read_adapter
from ..checkpoints.atomic import whole_folder
from ..checkpoints.files import find_weights
from ..quantization import ChatGLMQuantizationConfig, settings_of
from .one_device import load
from .plan import find_folder
from .reading import read_config


def export(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    chatglm_version: int | None = None,
    *,
    requantize: bool = False,
    told: Callable[[float], None] | None = None,
) -> Path:
    """Writes the checkpoint, in the dtype of the base's files, and returns its folder.

    It is written aside, and renamed once it is complete.

    Args:
        chatglm_version: the generation of the base, if its folder does not tell it; OUT states it.
        requantize: merge LoRA into a quantised base, whose weights are rounded again.
        told: called with `requantization_error` then.

    Raises:
        ValueError: the base is quantised and the adapter is LoRA, without `requantize`; see `merge_lora` for others.
        OSError: OUT exists, or cannot be written; see `chatglm.load` for others.
    """
    out = new_folder(out)
    folder = find_folder(base)
    is_lora = isinstance(read_adapter(adapter), Lora)
    quantised = quantisation_of(folder, chatglm_version)
    if is_lora and quantised and not requantize:
        raise ValueError(
            f"{folder} is quantised, and rounding its weights again loses a part of what LoRA adds: export with the "
            f"full-precision checkpoint as BASE, then load the result with quantize={quantised.bits}; or add "
            "--requantize, which says how much is lost"
        )
    dtype = find_weights(folder).dtype
    model, tokenizer = load(folder, "cpu", dtype, adapter=adapter, chatglm_version=chatglm_version)
    if is_lora:
        if quantised and told is not None:
            told(requantization_error(model))
        merge_lora(model, requantize=requantize)
    save(model, tokenizer, out)
    return out


def new_folder(out: str | os.PathLike[str]) -> Path:
    """Returns the path of a folder to be made. Raises FileExistsError."""
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists already: name a new folder, or remove it first")
    return out


def quantisation_of(folder: Path, chatglm_version: int | None = None) -> ChatGLMQuantizationConfig | None:
    """Returns how the weights in a folder are quantised, or None."""
    return settings_of(read_config(folder, chatglm_version)) if (folder / file_names.CONFIG).is_file() else None


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes a checkpoint of what is loaded; aside first, and renamed once it is complete. Raises OSError."""
    try:
        with whole_folder(out) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    except SafetensorError as error:
        raise OSError(f"cannot write {out}: {error}") from error
