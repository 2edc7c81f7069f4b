"""`chatglm.load`: a model and its tokenizer, on one device."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizer

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
    target = find_device(device)
    plan = make_plan(path_or_id, revision, quantize=quantize, adapter=adapter)
    kind = choose_dtype(dtype, target, plan.weights)
    if check_memory:
        memory_check.check_memory(plan, target, kind)
    check_vocabulary(plan.folder, plan.config.chatglm_version)
    tokenizer = read_tokenizer(plan.folder)
    return plan.build(kind, None if target.type == "cpu" else {"": target}), tokenizer


def find_device(device: str | torch.device) -> torch.device:
    """The device that is named, or the best one for "auto". Raises ValueError where this machine has none such."""
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
