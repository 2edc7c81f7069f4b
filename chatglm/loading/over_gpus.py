"""Loads a model over several GPUs, main memory and disk; users call `utils.load_model_on_gpus`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .dtypes import choose_dtype
from .placement import Device, Sizes, check_map, make_map, place, room_of, sizes_of, skeleton
from .plan import AdapterPaths, Plan, make_plan


def load_split(
    checkpoint_path: str | os.PathLike[str],
    num_gpus: int = 2,
    device_map: Mapping[str, Any] | str | int | torch.device | None = None,
    *,
    quantize: int | None = None,
    adapter: AdapterPaths | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    config: Any = None,
    revision: str | None = None,
    chatglm_version: int | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """See `load_model_on_gpus` in utils.py."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):  # transformers' names of automatic maps
        num_gpus, device_map = max(1, gpus), None if gpus else "cpu"
    if device_map is None:
        _check_count(num_gpus, gpus)
    dtype = options.pop("torch_dtype", dtype)
    for name in ("trust_remote_code", "empty_init"):
        options.pop(name, None)  # in the originals' calls; they have no effect here
    plan = make_plan(
        checkpoint_path, revision, quantize=quantize, adapter=adapter, config=config, options=options,
        chatglm_version=chatglm_version, local_files_only=local_files_only,
    )  # fmt: skip

    model = skeleton(plan.config, plan.quantization)
    if device_map is None:
        kind = choose_dtype(dtype, torch.device("cuda"), plan.weights)
        sizes, room = sizes_of(model, kind), room_of(range(max(1, num_gpus)), max_memory, measure=True)
        if offload_folder is not None and plan.quantization is None:
            room.setdefault("disk", math.inf)
        prefixes = sum(4 * tensor.numel() for _, one in plan.adapters for tensor in one.tensors.values())
        placed = place(Sizes(sizes.meeting + prefixes, sizes.block, sizes.blocks), room)
        device_map = make_map(model.part_names, placed, [name for name, _ in model.named_modules()])
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    final = check_map(device_map, model, gpus)
    devices = set(final.values())
    _check_disk(plan, devices, offload_folder)
    target = torch.device("cuda" if any(isinstance(device, int) for device in devices) else "cpu")
    return plan.build(
        choose_dtype(dtype, target, plan.weights),
        final if len(devices) > 1 or "disk" in devices else {"": devices.pop()},
        castable=not ("disk" in devices or ("cpu" in devices and target.type == "cuda")),
        offload_folder=offload_folder,
    )


def _check_disk(plan: Plan, devices: set[Device], offload_folder: str | os.PathLike[str] | None) -> None:
    if "disk" in devices and plan.quantization is not None:
        raise ValueError(
            "weights that go to disk cannot be quantised while loading: quantise and save the model once, with "
            "chatglm.load(path, quantize=4)[0].save_pretrained(folder), and load that folder"
        )
    file = plan.weights.files[0]
    if "disk" in devices and offload_folder is None and file.suffix != ".safetensors":
        raise ValueError(f"{file.name} is not a safetensors file, so disk needs a folder: give offload_folder")


def _check_count(num_gpus: int, gpus: int) -> None:
    if isinstance(num_gpus, bool) or not isinstance(num_gpus, int):
        raise TypeError(f"num_gpus is {num_gpus!r}: give a number")
    if gpus == 0:
        raise ValueError(
            f"num_gpus={num_gpus}, but torch sees 0 CUDA GPUs on this machine: use chatglm.load(path, device='cpu'), "
            "or a device_map over 'cpu' and 'disk'"
        )
    if num_gpus > gpus:
        raise ValueError(f"num_gpus={num_gpus}, and this machine has {gpus} CUDA GPUs: give num_gpus={gpus} or less")
