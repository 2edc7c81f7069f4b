"""`chatglm.load`: a model and its tokenizer, on one device."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizer

from ..cache import check_kv_cache_dtype
from ..checkpoints.files import check_vocabulary
from . import memory_check
from .dtypes import choose_dtype
from .plan import AdapterPaths, make_plan
from .reading import read_tokenizer


def load(
    path_or_id: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    quantize: int | None = None,
    adapter: AdapterPaths | None = None,
    revision: str | None = None,
    chatglm_version: int | None = None,
    local_files_only: bool = False,
    check_memory: bool = True,
    kv_cache_dtype: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Loads a ChatGLM of any generation with its tokenizer, ready to chat.

    Args:
        path_or_id: a folder (which never touches the network), or the id of a hub repository, from which only data
            files are fetched, never code. None: the environment variable CHATGLM_MODEL, else the bundled demo model.
        device: "auto" (CUDA, else MPS, else CPU), or anything that torch.device takes.
        dtype: "auto", a torch.dtype or its name. Auto is float32 for a small model on the CPU, and otherwise what the
            device computes fast: half precision on GPUs (bfloat16 if the weights are bfloat16 and the GPU supports it);
            on a CPU, bfloat16 if it has instructions for it or float32 would not fit, else float32.
        quantize: 4 or 8 bits per weight, one layer at a time while loading. A checkpoint that is already quantised
            needs no value, and accepts only its own bits.
        adapter: a P-tuning prefix (a file, or a folder written by our or the originals' training; its length and kind
            are detected) or the folder of a LoRA adapter (needs PEFT). Several as {"name": path, ...}: the first is
            used until `with model.adapter("name"):`. A single one is named after its folder.
        revision: branch, tag or commit of a hub repository.
        chatglm_version: the generation (1 to 4; 11 is VisualGLM-6B) of a checkpoint that tells too little of it, or
            the wrong one. A warning says where that is in doubt.
        local_files_only: take a hub repository from this machine's cache, without asking the hub.
        check_memory: False tries to load even if the weights do not seem to fit.
        kv_cache_dtype: "int8" makes KV caches of bytes with scales, half the size of bfloat16, on the CPU only; "auto"
            is the dtype of the model. The same as setting `model.kv_cache_dtype`.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        ModelLoadError: (an OSError) files are missing, cut off or do not match each other.
        NotEnoughMemoryError: the weights do not fit into memory.
        ValueError, TypeError: an argument is invalid, or does not apply to this checkpoint.
    """
    target = find_device(device)
    check_kv_cache_dtype(kv_cache_dtype)
    if kv_cache_dtype == "int8" and target.type != "cpu":
        raise ValueError(f'kv_cache_dtype="int8" is for models on the CPU, not on {target}')
    plan = make_plan(
        path_or_id, revision, quantize=quantize, adapter=adapter, chatglm_version=chatglm_version,
        local_files_only=local_files_only,
    )  # fmt: skip
    kind = choose_dtype(dtype, target, plan.weights)
    if check_memory:
        memory_check.check_memory(plan, target, kind)
    check_vocabulary(plan.folder, plan.config.chatglm_version)
    tokenizer = read_tokenizer(plan.folder, plan.config.chatglm_version)
    model = plan.build(kind, None if target.type == "cpu" else {"": target})
    model.kv_cache_dtype = kv_cache_dtype
    return model, tokenizer


def find_device(device: str | torch.device) -> torch.device:
    """The named device, or the best one for "auto". Raises ValueError if this machine does not have it."""
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
