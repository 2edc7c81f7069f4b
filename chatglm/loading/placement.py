"""Places the parts of a model on devices, when one device is not enough.

Blocks are placed whole; the model classes name their parts (`part_names`). Input ids and logits meet on the first GPU,
which holds the embeddings, the final norm, the output head and a P-tuning prefix; accelerate's hooks move the hidden
states from device to device.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import quantization
from ..chat import CHAT_MODELS, model_class
from ..checkpoints import memory
from ..checkpoints.weight_names import first_few
from ..network.pretrained import PartNames
from .dtypes import HEADROOM
from .memory_check import NotEnoughMemoryError

#: A GPU by its number, or "cpu" or "disk" for weights that are copied to a GPU whenever they are used.
Device = int | str
DeviceMap = dict[str, Device]
OFFLOADED = ("cpu", "disk")


# ---- how many blocks for each device ---------------------------------------------------------------------------------


def even_split(blocks: int, gpus: int) -> list[int]:
    """How many blocks each GPU gets; the embeddings and the head count as one block each and are on the first GPU.

    As in the originals, each GPU is filled to its share, rounded up. If that leaves nothing for the last ones (7 GPUs
    for 28 blocks), the remainder goes to the first ones instead. No GPU gets a whole block more than its share; the
    first one may get none, and so may GPUs beyond one per block.
    """
    if gpus == 1:
        return [blocks]
    share = math.ceil((blocks + 2) / gpus)
    counts = [max(0, share - 2)]
    for _ in range(gpus - 1):
        counts.append(min(share, blocks - sum(counts)))
    if counts[-1] > 0:
        return counts
    first = max(0, share - 2)
    base, extra = divmod(blocks - first, gpus - 1)
    return [first] + [base + (index < extra) for index in range(gpus - 1)]


@dataclass(frozen=True)
class Sizes:
    """Bytes in memory of the parts where inputs and logits meet, and of one block."""

    meeting: int
    block: int
    blocks: int

    @property
    def total(self) -> int:
        return self.meeting + self.blocks * self.block


@dataclass(frozen=True)
class Placement:
    """The GPU of the embeddings and head, and the blocks in order: (device, number of blocks)."""

    meeting: Device
    shares: list[tuple[Device, int]]


def place(sizes: Sizes, room: Mapping[Device, float]) -> Placement:
    """Splits evenly if that fits, else in proportion to the room, else with main memory and disk if allowed.

    Args:
        room: bytes for weights on each device that may be used; nothing goes to "cpu" or "disk" unless they are in it.

    Raises:
        NotEnoughMemoryError: the model does not fit; the message gives the sizes.
    """
    gpus = sorted(device for device in room if not isinstance(device, str))
    even = even_split(sizes.blocks, len(gpus))
    shares: list[tuple[Device, int]] = list(zip(gpus, even, strict=True))
    if all(
        count * sizes.block + (sizes.meeting if gpu == gpus[0] else 0) <= room[gpu] for gpu, count in shares
    ):
        return Placement(gpus[0], shares)
    meeting = next((gpu for gpu in gpus if room[gpu] >= sizes.meeting), None)
    if meeting is None:
        raise _too_large(sizes, room, f"no GPU has {memory.readable(sizes.meeting)} for the embeddings and the head")
    fixed = {gpu: sizes.meeting if gpu == meeting else 0 for gpu in gpus}
    held = {gpu: min(sizes.blocks, int((room[gpu] - fixed[gpu]) // sizes.block)) for gpu in gpus}
    if sum(held.values()) >= sizes.blocks:
        counts = dict.fromkeys(gpus, 0)
        for _ in range(sizes.blocks):  # each block goes to the GPU that it leaves the least full
            able = [gpu for gpu in gpus if counts[gpu] < held[gpu]]
            fullest = {gpu: (fixed[gpu] + (counts[gpu] + 1) * sizes.block) / room[gpu] for gpu in able}
            counts[min(able, key=fullest.__getitem__)] += 1
        return Placement(meeting, [(gpu, counts[gpu]) for gpu in gpus])
    held[gpus[0]] = max(0, held[gpus[0]] - 1)  # accelerate copies offloaded blocks, one at a time, to the first GPU
    left = sizes.blocks - sum(held.values())
    shares = [(gpu, held[gpu]) for gpu in gpus]
    for device in OFFLOADED:
        count = int(min(left, room.get(device, 0) // sizes.block))
        shares.append((device, count))
        left -= count
    if left:
        raise _too_large(sizes, room, f"{left} of {sizes.blocks} blocks do not fit")
    return Placement(meeting, shares)


def _too_large(sizes: Sizes, room: Mapping[Device, float], why: str) -> NotEnoughMemoryError:
    places = ", ".join(f"{_name(device)} {memory.readable(int(size))}" for device, size in sorted_items(room))
    ways = ["more GPUs", "quantize=4"]
    if "cpu" not in room:
        ways.append('max_memory={"cpu": "30GiB"} to keep blocks in main memory')
    if "disk" not in room:
        ways.append("offload_folder=... to keep blocks on disk")
    return NotEnoughMemoryError(
        f"the weights take {memory.readable(sizes.total)}, and the room for weights is {places}: {why}; use "
        f"{', or '.join(ways)}"
    )


def sorted_items(room: Mapping[Device, float]) -> list[tuple[Device, float]]:
    return sorted(((device, size) for device, size in room.items() if size != math.inf), key=lambda one: str(one[0]))


def _name(device: Device) -> str:
    return device if isinstance(device, str) else f"GPU {device}"


def to_bytes(limit: int | str) -> int:
    """The bytes of a limit in `max_memory`, as transformers takes it: a number, or text like "10GiB" or "500MB"."""
    if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
        return limit
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", str(limit), re.IGNORECASE)
    if not found or not isinstance(limit, str):
        raise ValueError(f"max_memory {limit!r} is not a size: give bytes, or text like '10GiB' or '500MB'")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def room_of(gpus: Iterable[int], max_memory: Mapping[Device, int | str] | None, measure: bool) -> dict[Device, float]:
    """Bytes for weights on each GPU and, if `max_memory` names them, on "cpu" and "disk".

    A GPU without a limit has room for its free memory less some headroom, or for any amount with `measure=False`.
    """
    limits = {device: to_bytes(limit) for device, limit in (max_memory or {}).items()}
    room: dict[Device, float] = {}
    for gpu in gpus:
        free = memory.available(torch.device("cuda", gpu)) if measure and gpu not in limits else None
        room[gpu] = limits.pop(gpu, math.inf) if free is None else free / HEADROOM
    unknown = [device for device in limits if device not in OFFLOADED]
    if unknown:
        raise ValueError(f"max_memory names {', '.join(map(repr, unknown))}: use {_these(room)}, 'cpu' and 'disk'")
    return room | {device: limits[device] for device in OFFLOADED if device in limits}


def _these(gpus: Iterable[Device]) -> str:
    return ", ".join(str(gpu) for gpu in gpus) or "no GPU"


# ---- the parts of a model --------------------------------------------------------------------------------------------


def skeleton(config: Any, settings: quantization.ChatGLMQuantizationConfig | None = None) -> PreTrainedModel:
    """The model of `config`, without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        model = model_class(config)(copy.deepcopy(config))
    if settings is not None:
        quantization.apply(model, settings, empty=True)
    return model


def sizes_of(model: PreTrainedModel, dtype: torch.dtype) -> Sizes:
    """The sizes of a skeleton or a loaded model with float weights in `dtype` (scales and prefix keep theirs)."""
    names: PartNames = model.part_names
    first = f"{names.blocks}.0."
    total = block = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in model.all_tied_weights_keys:
            continue
        size = tensor.nbytes
        if name.startswith(f"{names.prefix}."):
            size = tensor.numel() * 4
        elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not name.endswith("weight_scale"):
            size = tensor.numel() * dtype.itemsize
        total += size
        block += size if name.startswith(first) else 0
    count = model.config.num_layers
    return Sizes(total - count * block, block, count)


def auto_map(num_gpus: int, model: Any, max_memory: Mapping[Device, int | str] | None, dtype: torch.dtype) -> DeviceMap:
    """See `auto_configure_device_map` in utils.py."""
    if isinstance(num_gpus, bool) or not isinstance(num_gpus, int) or num_gpus < 1:
        raise ValueError(f"num_gpus is {num_gpus!r}: give 1 or more")
    if isinstance(model, int) and not isinstance(model, bool) and max_memory is None:
        if model not in CHAT_MODELS:
            raise ValueError(f"there is no generation {model}: use 1, 2, 3 or 4, or a config")
        published = CHAT_MODELS[model]
        gpus: list[Device] = list(range(num_gpus))
        shares = even_split(published.config_class().num_layers, num_gpus)
        return make_map(published.part_names, Placement(0, list(zip(gpus, shares, strict=True))))
    if isinstance(model, int):
        raise ValueError("max_memory needs the sizes of the weights: give the config of the checkpoint as model")
    if not isinstance(model, PreTrainedModel):
        model = skeleton(model)
    placed = place(sizes_of(model, dtype), room_of(range(num_gpus), max_memory, measure=False))
    return make_map(model.part_names, placed, [name for name, _ in model.named_modules()])


def make_map(names: PartNames, placed: Placement, present: Iterable[str] | None = None) -> DeviceMap:
    """The device map of a placement; with `present`, only for parts that are among these module names."""
    parts = names.meeting if present is None else [name for name in names.meeting if name in set(present)]
    result: DeviceMap = dict.fromkeys(parts, placed.meeting)
    devices = [device for device, count in placed.shares for _ in range(count)]
    return result | {f"{names.blocks}.{index}": device for index, device in enumerate(devices)}


def check_map(device_map: Mapping[str, Any], model: PreTrainedModel, gpus: int) -> DeviceMap:
    """Checks a user's map against the modules of `model` (a skeleton will do), and returns it with every part named.

    Names in the originals' maps that this model does not have are left out; the rotary table and the prefix, which
    those maps lack, go with the embeddings.

    Args:
        gpus: number of GPUs on this machine.

    Raises:
        ValueError: unknown or missing modules, a split block, tied weights on different devices, or missing devices.
    """
    names: PartNames = model.part_names
    known = {name for name, _ in model.named_modules()}
    given = {name: _device(name, device, gpus) for name, device in device_map.items()}
    unknown = sorted(name for name in given if name not in known and name not in names.meeting)
    if unknown:
        others = [one.part_names for one in CHAT_MODELS.values()]
        elsewhere = {name for other in others for name in (*other.meeting, f"{other.blocks}.0")}
        hint = ": this is a map for another generation" if elsewhere.intersection(unknown) else ""
        raise ValueError(f"device_map names modules that the model does not have ({first_few(unknown)}){hint}")
    inside = sorted(name for name in given if re.match(rf"{re.escape(names.blocks)}\.\d+\.", name))
    if inside:
        raise ValueError(
            f"device_map splits a block ({first_few(inside)}): name whole blocks, {names.blocks}.0 and so on"
        )

    meeting = [name for name in names.meeting if name in known]
    parts = [*meeting, *(f"{names.blocks}.{index}" for index in range(model.config.num_layers))]
    found = {name: _device_of(name, given) for name in parts}
    for name in (names.rotary, names.prefix):
        if name in found:
            found[name] = found[name] if found[name] is not None else found[names.embeddings]
    result = {name: device for name, device in found.items() if device is not None}
    missing = [name for name in parts if name not in result]
    if missing:
        raise ValueError(f"device_map says nothing about {first_few(missing)}: name every part, or '' for all the rest")
    # The rotary table grows, and a prefix is trained and replaced in place: they cannot be offloaded.
    for name in (names.rotary, names.prefix):
        if result.get(name) in OFFLOADED:
            result[name] = main_device(result)
    if model.all_tied_weights_keys and result[meeting[0]] != result[meeting[-1]]:
        raise ValueError(f"{meeting[0]} and {meeting[-1]} are one matrix in this model: give them the same device")
    return result


def main_device(device_map: Mapping[str, Device]) -> Device:
    """The device that computes with offloaded weights: the first GPU, or the CPU if the map has none."""
    return min((device for device in device_map.values() if isinstance(device, int)), default="cpu")


def _device_of(name: str, device_map: Mapping[str, Device]) -> Device | None:
    """The device of a module: that of the longest name in the map that covers it."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def _device(name: str, device: Any, gpus: int) -> Device:
    if device == "disk":
        return "disk"
    try:
        if isinstance(device, bool) or not isinstance(device, int | str | torch.device):
            raise RuntimeError
        if not isinstance(device, int):
            found = torch.device(device)
            if found.type != "cuda":
                return found.type
            device = found.index or 0
    except RuntimeError as error:
        raise ValueError(f"device_map[{name!r}] is {device!r}: give a GPU's number, 'cpu' or 'disk'") from error
    if not 0 <= device < gpus:
        raise ValueError(f"device_map[{name!r}] is GPU {device}, and this machine has {gpus} CUDA GPUs")
    return device
