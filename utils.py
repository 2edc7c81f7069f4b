"""ChatGLM over several GPUs, with the two functions of the originals' `utils.py`."""

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
    """Loads a ChatGLM of any generation over several GPUs, each weight straight to its own, ready to chat.

    The model answers as if it was on one device: give it inputs on any. It cannot be moved or cast afterwards.

    Args:
        checkpoint_path: a folder or a hub id.
        num_gpus: how many GPUs share it; fewer than 2 means one. Evenly where that fits into their free memory, as the
            originals do it, else in proportion to it.
        device_map: instead of that, where every part goes: names of modules (see `auto_configure_device_map`) to
            numbers of GPUs, "cpu" or "disk" (weights that are brought to a GPU for each use), or one device for all.
        kwargs: `max_memory={0: "20GiB", 1: "10GiB", "cpu": "30GiB"}`: the most weights there; blocks that fit no GPU go
            to main memory only where "cpu" is named, to disk with "disk" or `offload_folder`.
            `quantize` (4, 8), `adapter`, `dtype` and `revision` as in `chatglm.load`; the rest is for
            `from_pretrained`, with what it can set in the config, such as `pre_seq_len`.

    Returns:
        The model, in half precision where GPUs compute (`dtype` says otherwise).

    Raises:
        ValueError: fewer GPUs than asked for, or a device_map that does not fit the model.
        ModelLoadError: see `chatglm.load`; NotEnoughMemoryError: the GPUs have too little memory.
    """
    return over_gpus.load_split(checkpoint_path, num_gpus, device_map, **kwargs)


def auto_configure_device_map(
    num_gpus: int,
    model: Any = 3,
    max_memory: Mapping[Device, int | str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> DeviceMap:
    """The device map that `load_model_on_gpus` makes: whole blocks, evenly, and on GPU 0 where inputs and logits meet.

    Args:
        num_gpus: any number; more GPUs than blocks are left unused.
        model: 1, 2 or 3 for the published models of that generation; or the config of a checkpoint, or a model.
        max_memory: the most weights on each GPU (bytes, or "10GiB") where they are to differ; and "cpu", "disk", see
            `load_model_on_gpus`.
        dtype: of the weights, to know how large they are.

    Returns:
        Names of modules to numbers of GPUs.

    Raises:
        ValueError: num_gpus below 1, an unknown generation, or a limit that is no size.
        NotEnoughMemoryError: max_memory is too small.
    """
    return placement.auto_map(num_gpus, model, max_memory, dtype)
