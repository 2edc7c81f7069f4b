"""Calls transformers' `from_pretrained` for loading: quietly, and with one clear line for every broken file."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizer
from transformers.utils import logging

from ..checkpoints.files import GET_AGAIN, ModelLoadError
from ..checkpoints.weight_names import VALUE_HEAD, first_few
from ..configuration_chatglm import ChatGLMConfig
from ..quantization import ChatGLMQuantizationConfig
from ..tokenization_chatglm import ChatGLMTokenizer


def read_config(folder: Path, chatglm_version: int | None = None) -> Any:
    """Reads the config of a folder.

    Args:
        chatglm_version: the generation, if the caller knows better than the folder.

    Raises:
        ValueError: the generation is unknown, or a value is not of its field's type.
    """
    given = {} if chatglm_version is None else {"chatglm_version": chatglm_version}
    return ChatGLMConfig.from_pretrained(folder, local_files_only=True, **given)


def read_tokenizer(folder: Path, chatglm_version: int | None = None) -> PreTrainedTokenizer:
    """Reads the tokenizer of a folder, as one of this generation. Raises ModelLoadError."""
    with _clear_errors(folder, "the tokenizer files"):
        return ChatGLMTokenizer.from_pretrained(folder, local_files_only=True, chatglm_version=chatglm_version)


def read_model(
    model_class: Any,
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    quantization: ChatGLMQuantizationConfig | None,
    device_map: Mapping[str, Any] | None,
    progress_bar: bool,
    **options: Any,
) -> PreTrainedModel:
    """Reads the model of a folder with all its weights. Raises ModelLoadError if they do not match config.json."""
    with _clear_errors(folder, "the weights"), _quiet_transformers(progress_bar):
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=quantization,
            device_map=device_map,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # not to ignore them, but for the error below to name them
            output_loading_info=True,
            **options,
        )
    wrong = sorted(
        f"{name}: {tuple(there)} in the file, {tuple(here)} by config.json"
        for name, there, here in info["mismatched_keys"]
    )
    if wrong:
        raise ModelLoadError(
            f"weights and config.json in {folder} do not fit together ({first_few(wrong)}): {GET_AGAIN}"
        )
    extra = sorted(info["unexpected_keys"])
    value_head = [name for name in extra if VALUE_HEAD.match(name)]
    if value_head:
        warnings.warn(
            f"{folder} holds the value head of a training with RLHF ({first_few(value_head)}): it is left out",
            stacklevel=4,  # the line that calls `chatglm.load`
        )
    extra = [name for name in extra if name not in value_head]
    if any("lora_" in name for name in extra):
        raise ModelLoadError(
            f"{folder} holds a LoRA adapter among the weights ({first_few(extra)}): merge it with PEFT "
            "(merge_and_unload) and save the result, or save the adapter alone and give it as adapter=..."
        )
    if extra:
        raise ModelLoadError(
            f"the weight files of {folder} hold tensors that config.json has no place for ({first_few(extra)})"
        )
    return model


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts as if the model had been loaded in `dtype`: the prefix stays in float32."""
    base = model.base_model
    prefix, base.prefix_encoder = base.prefix_encoder, None
    for child in model.children():  # the model itself refuses if it is split over devices
        child.to(dtype)
    base.prefix_encoder = prefix


@contextlib.contextmanager
def _clear_errors(path: Path, what: str) -> Iterator[None]:
    """Turns the libraries' errors about broken files into one line about the file."""
    try:
        yield
    except ModelLoadError:
        raise
    except (
        OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError, SafetensorError
    ) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"{path}: cannot read {what} ({reason}): {GET_AGAIN}") from error


@contextlib.contextmanager
def _quiet_transformers(progress_bar: bool) -> Iterator[None]:
    """Silences the report on mismatched tensors, which are an error here, and the progress bar unless wanted."""
    level, hide_bar = logging.get_verbosity(), logging.is_progress_bar_enabled() and not progress_bar
    logging.set_verbosity_error()
    if hide_bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide_bar:
            logging.enable_progress_bar()
