"""ChatGLM on several GPUs: the two functions of the originals' `utils.py`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module

from chatglm.loading import over_gpus, placement
from chatglm.loading.placement import Device, DeviceMap


def load_model_on_gpus(
    checkpoint_path: str | os.PathLike[str],
    num_gpus: int = 2,
    device_map: Mapping[str, Device | torch.device] | str | torch.device | None = None,
    **kwargs: Any,
) -> Module:
    """Loads a ChatGLM of any generation over several GPUs, each weight straight to its GPU, ready to chat.

    The model works as if it were on one device and takes inputs on any. It cannot be moved or cast afterwards.

    Args:
        checkpoint_path: a folder or a hub id.
        num_gpus: how many GPUs share it; fewer than 2 means one. The blocks are split evenly, as in the originals, if
            that fits into the free memory, else in proportion to it.
        device_map: overrides that. Maps names of modules (see `auto_configure_device_map`) to GPU numbers, "cpu" or
            "disk" (weights are brought to a GPU for each use); or one device for all.
        kwargs: `max_memory={0: "20GiB", 1: "10GiB", "cpu": "30GiB"}`: most memory for weights on each; blocks that fit
            no GPU go to main memory only if "cpu" is named, to disk with "disk" or `offload_folder`.
            `quantize` (4, 8), `adapter`, `dtype`, `revision`, `chatglm_version` and `local_files_only` are as in
            `chatglm.load`; all others go to `from_pretrained`, including config fields such as `pre_seq_len`.

    Returns:
        The model, in half precision on GPUs unless `dtype` is given.

    Raises:
        ValueError: there are fewer GPUs than `num_gpus`, or the device_map does not fit the model.
        ModelLoadError: as `chatglm.load`.
        NotEnoughMemoryError: the GPUs have too little memory.
    """
    return over_gpus.load_split(checkpoint_path, num_gpus, device_map, **kwargs)


def auto_configure_device_map(
    num_gpus: int,
    model: Any = 3,
    max_memory: Mapping[Device, int | str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> DeviceMap:
    """The device map of `load_model_on_gpus`: whole blocks, split evenly, with inputs and logits on GPU 0.

    Args:
        num_gpus: any number; GPUs beyond the number of blocks stay unused.
        model: 1, 2 or 3 for the published models of that generation; or the config of a checkpoint, or a model.
        max_memory: most memory for weights on each GPU (bytes, or "10GiB") if it differs; also for "cpu" and "disk",
            see `load_model_on_gpus`.
        dtype: of the weights, to compute their size.

    Returns:
        A map from names of modules to GPU numbers.

    Raises:
        ValueError: num_gpus is below 1, the generation is unknown, or a limit is not a size.
        NotEnoughMemoryError: max_memory is too small.
    """
    return placement.auto_map(num_gpus, model, max_memory, dtype)
