"""One call from a folder or a hub id to (model, tokenizer) on a device."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizer
from transformers.utils import logging

from . import memory
from .adapter_files import PREFIX, Adapter, read_adapter
from .adapters.attaching import attach
from .adapters.switching import use_adapter
from .chat import ChatGLM1ForConditionalGeneration, ChatGLM2ForConditionalGeneration, ChatGLM3ForConditionalGeneration
from .checkpoint_files import (
    GET_AGAIN,
    ModelLoadError,
    Weights,
    check_folder,
    check_vocabulary,
    find_weights,
    read_json,
)
from .configuration_chatglm import ChatGLMConfig
from .hub import fetch
from .quantization import ChatGLMQuantizationConfig, settings_of
from .tokenization_chatglm import ChatGLMTokenizer

__all__ = ["DEMO", "ModelLoadError", "NotEnoughMemoryError", "load"]

DEMO = Path(__file__).parent / "demo" / "chatglm3-demo"
DTYPES = {
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
}  # fmt: skip
MODELS: dict[int, Any] = {
    1: ChatGLM1ForConditionalGeneration,
    2: ChatGLM2ForConditionalGeneration,
    3: ChatGLM3ForConditionalGeneration,
}
SMALL = 2**28  # numbers; below that (1 GiB in float32) the exact type costs nothing worth saving
HEADROOM = 1.1  # over the weights: buffers while loading, activations, the first turns of the KV cache


#: One file or folder, or several by the names to switch by.
AdapterPaths = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


class NotEnoughMemoryError(ModelLoadError):
    """The weights would not fit into the memory that is available."""


def load(
    path_or_id: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    quantize: int | None = None,
    adapter: AdapterPaths | None = None,
    revision: str | None = None,
    check_memory: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Loads a ChatGLM of any generation with its tokenizer, ready to chat.

    path_or_id: a folder (then nothing touches the network), or the id of a hub repository, of which only data files are
        fetched, never code. None: the environment variable CHATGLM_MODEL, else the bundled demo model.
    device: "auto" (CUDA, else MPS, else CPU), or what torch.device takes.
    dtype: "auto", a torch.dtype or its name. Auto: float32 for a small model on the CPU; else what the device computes
        fast: half precision on GPUs (bfloat16 where the weights are bfloat16 and the GPU can), on a CPU bfloat16 where
        it has instructions for it or where float32 would not fit, else float32.
    quantize: 4 or 8 bits per weight, one layer at a time while loading; a checkpoint that is quantised already needs
        and takes none but its own.
    adapter: a P-tuning prefix (a file, or a folder as our or the originals' training wrote it; its length and kind are
        found) or the folder of a LoRA adapter (needs PEFT). Several as {"name": path, ...}, of which the first is used
        until `with model.adapter("name"):`; one alone is named after its folder.
    revision: branch, tag or commit of a hub repository.
    check_memory: False tries to load even where the weights seem not to fit.

    Raises ModelLoadError (an OSError) for what is missing, cut off or does not fit together, NotEnoughMemoryError where
    memory is short, ValueError or TypeError for arguments that mean nothing here.
    """
    if quantize not in (None, 4, 8):
        raise ValueError(f"quantize is {quantize!r}: use 4, 8, or None for no quantisation")
    target = _device(device)
    folder = find_folder(path_or_id, revision)
    check_folder(folder)
    weights = find_weights(folder)
    config = ChatGLMConfig.from_pretrained(folder, local_files_only=True)
    version = config.chatglm_version
    model_class = MODELS[version]
    quantization = wanted_quantization(folder, config, quantize)
    kind = choose_dtype(dtype, target, weights)
    if check_memory:
        _check_memory(folder, weights, target, kind, config, quantization)
    given = read_adapters(adapter)
    check_prefix(folder, config, weights, bool(given))
    check_vocabulary(folder, version)

    tokenizer = _tokenizer(folder)
    # Quantised from the numbers in the file: rounding them to another type first would change the result.
    first = kind if quantization is None else weights.dtype
    model = build_model(
        model_class,
        folder,
        config,
        dtype=first,
        quantization=quantization,
        device_map=None if target.type == "cpu" else {"": target},
        small=weights.elements < SMALL,
    )
    if first != kind:
        cast(model, kind)
    names = [attach(model, one, name) for name, one in given]
    if names:
        use_adapter(model, names[0])
    return model.eval(), tokenizer


def read_adapters(adapter: AdapterPaths | None) -> list[tuple[str | None, Adapter]]:
    """With their names; before minutes of loading are spent on the model."""
    if adapter is None:
        return []
    if isinstance(adapter, Mapping):
        return [(name, read_adapter(path)) for name, path in adapter.items()]
    return [(None, read_adapter(adapter))]


def wanted_quantization(folder: Path, config: Any, quantize: int | None) -> ChatGLMQuantizationConfig | None:
    """What is left to do while loading."""
    present = settings_of(config)
    if quantize is None or present is None:
        return ChatGLMQuantizationConfig(bits=quantize) if quantize else None
    if present.bits != quantize:
        raise ValueError(
            f"quantize={quantize}, but {folder} is quantised to {present.bits} bits already: leave quantize out, or "
            "take the full-precision checkpoint"
        )
    return None


def find_folder(path_or_id: str | os.PathLike[str] | None = None, revision: str | None = None) -> Path:
    """The folder that `load` reads: a given one as it is, a hub id's after fetching what is not there yet."""
    source = os.fspath(path_or_id or os.environ.get("CHATGLM_MODEL") or DEMO)
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for hub ids, and {source} is a folder: leave it out")
        return path
    return fetch(source, revision)


def check_prefix(folder: Path, config: Any, weights: Weights, has_adapter: bool) -> None:
    """A checkpoint may hold a prefix of its own; one that asks for a prefix and has none gets it as adapter."""
    inside = [name for name in weights.names if PREFIX.match(name)]
    if inside and len(inside) == len(weights.names):
        base = read_json(folder / "config.json").get("base_model_name_or_path")
        raise ModelLoadError(
            f"{folder} is a P-tuning prefix: load the model it was trained for{f' ({base})' if base else ''}, with "
            "this as adapter"
        )
    if config.pre_seq_len and not inside:
        if not has_adapter:
            raise ModelLoadError(
                f"{folder / 'config.json'} asks for a P-tuning prefix (pre_seq_len = {config.pre_seq_len}) and the "
                "weights hold none: name its checkpoint with adapter=..., or take pre_seq_len out"
            )
        config.pre_seq_len, config.prefix_projection = None, False


def _tokenizer(folder: Path) -> PreTrainedTokenizer:
    with _clear_errors(folder, "the tokenizer files"):
        return ChatGLMTokenizer.from_pretrained(folder, local_files_only=True)


def build_model(
    model_class: Any,
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    quantization: ChatGLMQuantizationConfig | None,
    device_map: Mapping[str, Any] | None,
    small: bool,
    **options: Any,
) -> PreTrainedModel:
    with _clear_errors(folder, "the weights"), _quiet_transformers(progress_bar=not small):
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=quantization,
            device_map=device_map,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # not to ignore them: so that the error below can name them
            output_loading_info=True,
            **options,
        )
    wrong = sorted(
        f"{name}: {tuple(there)} in the file, {tuple(here)} by config.json"
        for name, there, here in info["mismatched_keys"]
    )
    if wrong:
        raise ModelLoadError(f"weights and config.json in {folder} do not fit together ({_some(wrong)}): {GET_AGAIN}")
    if info["missing_keys"]:
        names = _some(sorted(info["missing_keys"]))
        raise ModelLoadError(f"the weight files of {folder} lack tensors of the model ({names}): {GET_AGAIN}")
    if info["unexpected_keys"]:
        names = _some(sorted(info["unexpected_keys"]))
        raise ModelLoadError(f"the weight files of {folder} hold tensors that config.json has no place for ({names})")
    return model


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As loading in `dtype` would have done: the prefix stays in float32."""
    prefix, model.transformer.prefix_encoder = model.transformer.prefix_encoder, None
    for child in model.children():  # the model itself refuses where it is split over devices
        child.to(dtype)
    model.transformer.prefix_encoder = prefix


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _clear_errors(path: Path, what: str) -> Iterator[None]:
    """Turns what the libraries raise for broken files into one line about the file."""
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
    """Without the report on tensors that do not fit, for which there is an error here; the bar is for minutes only."""
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


def _device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown: use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices; try device='auto'")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available on this machine; try device='auto'")
    return found


def choose_dtype(dtype: str | torch.dtype, device: torch.device, weights: Weights) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ValueError(f"dtype {dtype} cannot hold weights: use float16, bfloat16 or float32")
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"dtype {dtype!r} is unknown: use 'auto' or one of {', '.join(DTYPES)}")
    if device.type == "cuda" and weights.dtype == torch.bfloat16 and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    if device.type != "cpu":
        return torch.float16
    if weights.elements < SMALL:
        return torch.float32
    room = memory.available(device)
    too_large = room is not None and weights.size(4) * HEADROOM > room
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is Arm's name
    return torch.bfloat16 if fast or too_large else torch.float32


def memory_needed(weights: Weights, config: Any, dtype: torch.dtype, bits: int | None = None) -> int:
    """Bytes that loading takes with the floating-point weights in `dtype`, or quantised to `bits` while loading."""
    if bits is None:
        return int(weights.size(dtype.itemsize) * HEADROOM)
    copies = 1 if config.tie_word_embeddings else 2
    outside = min(weights.elements, copies * config.vocab_size * config.hidden_size)  # embeddings and head
    return int(((weights.elements - outside) * bits // 8 + outside * dtype.itemsize) * HEADROOM)


def _check_memory(
    folder: Path,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    config: Any,
    quantization: ChatGLMQuantizationConfig | None,
) -> None:
    needed = memory_needed(weights, config, dtype, quantization.bits if quantization else None)
    room = memory.available(device)
    if room is None or needed <= room:
        return
    ways = ["close other programs"]
    if dtype.itemsize > 2:
        less = memory_needed(weights, config, torch.bfloat16)
        ways.append(f"load with dtype='bfloat16' ({memory.readable(less)})")
    if quantization is None and settings_of(config) is None:
        ways.append(f"load with quantize=4 ({memory.readable(memory_needed(weights, config, dtype, 4))})")
    if device.type != "cpu":
        ways.append("use device='cpu'")
    raise NotEnoughMemoryError(
        f"loading {folder} in {str(dtype).removeprefix('torch.')} on {device} needs about {memory.readable(needed)}, "
        f"and {memory.readable(room)} are available: {', or '.join(ways)}; check_memory=False tries all the same"
    )
