"""Which part of a model goes to which device, when one device is not enough; and loading it that way.

Whole blocks are placed. Input ids and logits meet on one GPU, the first, which holds the embeddings, the final norm and
the output head (and a P-tuning prefix); accelerate's hooks carry the hidden states from device to device.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import loading, memory, quantization
from .adapters.attaching import attach
from .adapters.switching import use_adapter
from .checkpoint_files import check_folder, find_weights
from .configuration_chatglm import ChatGLMConfig

#: A GPU by its number, or "cpu" or "disk" for weights that are brought to a GPU whenever they are used.
Device = int | str
DeviceMap = dict[str, Device]
OFFLOADED = ("cpu", "disk")
BLOCKS = 28  # of every published checkpoint


@dataclass(frozen=True)
class Names:
    """What the parts of a generation are called."""

    meeting: tuple[str, ...]  # where input ids and logits meet
    blocks: str


# As in the originals' maps, the output head of generations 2 and 3 under both names; and what those maps lack.
NAMES = {
    1: Names(
        (
            "transformer.word_embeddings", "transformer.rotary_emb", "transformer.prefix_encoder",
            "transformer.final_layernorm", "lm_head",
        ),
        "transformer.layers",
    ),
    2: Names(
        (
            "transformer.embedding.word_embeddings", "transformer.rotary_pos_emb", "transformer.prefix_encoder",
            "transformer.encoder.final_layernorm", "transformer.output_layer", "lm_head",
        ),
        "transformer.encoder.layers",
    ),
}  # fmt: skip
NAMES[3] = NAMES[2]


# ---- how many blocks for each device ---------------------------------------------------------------------------------


def even_split(blocks: int, gpus: int) -> list[int]:
    """How many blocks each GPU gets; the embeddings and the head count as one block each and are on the first GPU.

    As in the originals, GPUs are filled to their share, rounded up. Where that leaves nothing for the last ones (7 GPUs
    for 28 blocks), what does not divide evenly goes to the first ones instead. No GPU gets a whole block more than
    its share; the first may have none, and GPUs beyond one for each block have none.
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
    """Bytes in memory: what sits where inputs and logits meet, and one block."""

    meeting: int
    block: int
    blocks: int

    @property
    def total(self) -> int:
        return self.meeting + self.blocks * self.block


@dataclass(frozen=True)
class Plan:
    """The GPU of the embeddings and head, and the blocks in their order: (device, how many)."""

    meeting: Device
    shares: list[tuple[Device, int]]


def plan(sizes: Sizes, room: Mapping[Device, float]) -> Plan:
    """Splits evenly where that fits, else in proportion to the room, else to main memory and disk as far as allowed.

    Args:
        room: bytes for weights on every device that may be used; without "cpu" and "disk", nothing goes there.

    Raises:
        NotEnoughMemoryError: it does not fit; with the numbers.
    """
    gpus = sorted(device for device in room if not isinstance(device, str))
    even = even_split(sizes.blocks, len(gpus))
    shares: list[tuple[Device, int]] = list(zip(gpus, even, strict=True))
    if all(
        count * sizes.block + (sizes.meeting if gpu == gpus[0] else 0) <= room[gpu] for gpu, count in shares
    ):
        return Plan(gpus[0], shares)
    meeting = next((gpu for gpu in gpus if room[gpu] >= sizes.meeting), None)
    if meeting is None:
        raise _too_large(sizes, room, f"no GPU has {memory.readable(sizes.meeting)} for the embeddings and the head")
    fixed = {gpu: sizes.meeting if gpu == meeting else 0 for gpu in gpus}
    held = {gpu: min(sizes.blocks, int((room[gpu] - fixed[gpu]) // sizes.block)) for gpu in gpus}
    if sum(held.values()) >= sizes.blocks:
        counts = dict.fromkeys(gpus, 0)
        for _ in range(sizes.blocks):  # each block to where it fills the smallest part of the memory
            able = [gpu for gpu in gpus if counts[gpu] < held[gpu]]
            fullest = {gpu: (fixed[gpu] + (counts[gpu] + 1) * sizes.block) / room[gpu] for gpu in able}
            counts[min(able, key=fullest.__getitem__)] += 1
        return Plan(meeting, [(gpu, counts[gpu]) for gpu in gpus])
    held[gpus[0]] = max(0, held[gpus[0]] - 1)  # accelerate brings offloaded blocks, one at a time, to the first GPU
    left = sizes.blocks - sum(held.values())
    shares = [(gpu, held[gpu]) for gpu in gpus]
    for device in OFFLOADED:
        count = int(min(left, room.get(device, 0) // sizes.block))
        shares.append((device, count))
        left -= count
    if left:
        raise _too_large(sizes, room, f"{left} of {sizes.blocks} blocks find no place")
    return Plan(meeting, shares)


def _too_large(sizes: Sizes, room: Mapping[Device, float], why: str) -> loading.NotEnoughMemoryError:
    places = ", ".join(f"{_name(device)} {memory.readable(int(size))}" for device, size in sorted_items(room))
    ways = ["more GPUs", "quantize=4"]
    if "cpu" not in room:
        ways.append('max_memory={"cpu": "30GiB"} to keep blocks in main memory')
    if "disk" not in room:
        ways.append("offload_folder=... to keep blocks on disk")
    return loading.NotEnoughMemoryError(
        f"the weights take {memory.readable(sizes.total)} and there is room for weights on {places}: {why}; use "
        f"{', or '.join(ways)}"
    )


def sorted_items(room: Mapping[Device, float]) -> list[tuple[Device, float]]:
    return sorted(((device, size) for device, size in room.items() if size != math.inf), key=lambda one: str(one[0]))


def _name(device: Device) -> str:
    return device if isinstance(device, str) else f"GPU {device}"


def to_bytes(limit: int | str) -> int:
    """`max_memory` as transformers takes it: bytes, or "10GiB", "500MB"."""
    if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
        return limit
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", str(limit), re.IGNORECASE)
    if not found or not isinstance(limit, str):
        raise ValueError(f"max_memory {limit!r} is no size: give bytes, or text like '10GiB' or '500MB'")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def room_of(gpus: Iterable[int], max_memory: Mapping[Device, int | str] | None, measure: bool) -> dict[Device, float]:
    """Bytes for weights on each GPU, and where `max_memory` names them, on "cpu" and "disk".

    A GPU without a limit has what is free on it, less room to work, or with `measure=False` any amount.
    """
    limits = {device: to_bytes(limit) for device, limit in (max_memory or {}).items()}
    room: dict[Device, float] = {}
    for gpu in gpus:
        free = memory.available(torch.device("cuda", gpu)) if measure and gpu not in limits else None
        room[gpu] = limits.pop(gpu, math.inf) if free is None else free / loading.HEADROOM
    unknown = [device for device in limits if device not in OFFLOADED]
    if unknown:
        raise ValueError(f"max_memory names {', '.join(map(repr, unknown))}: use {_these(room)}, 'cpu' and 'disk'")
    return room | {device: limits[device] for device in OFFLOADED if device in limits}


def _these(gpus: Iterable[Device]) -> str:
    return ", ".join(str(gpu) for gpu in gpus) or "no GPU"


# ---- the parts of a model --------------------------------------------------------------------------------------------


def skeleton(config: Any, settings: quantization.ChatGLMQuantizationConfig | None = None) -> PreTrainedModel:
    """The model of `config` without memory for its weights."""
    with torch.device("meta"):
        model = loading.MODELS[config.chatglm_version](copy.deepcopy(config))
    if settings is not None:
        quantization.apply(model, settings, empty=True)
    return model


def sizes_of(model: PreTrainedModel, dtype: torch.dtype) -> Sizes:
    """Of a skeleton or a loaded model, with its float weights in `dtype` (scales and prefix keep theirs)."""
    blocks = NAMES[model.config.chatglm_version].blocks
    first = f"{blocks}.0."
    total = block = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in model.all_tied_weights_keys:
            continue
        size = tensor.nbytes
        if "prefix_encoder." in name:
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
        if model not in NAMES:
            raise ValueError(f"there is no generation {model}: use 1, 2 or 3, or a config")
        gpus: list[Device] = list(range(num_gpus))
        return make_map(model, Plan(0, list(zip(gpus, even_split(BLOCKS, num_gpus), strict=True))))
    if isinstance(model, int):
        raise ValueError("max_memory needs the sizes of the weights: give the config of the checkpoint as model")
    if not isinstance(model, PreTrainedModel):
        model = skeleton(model)
    placed = plan(sizes_of(model, dtype), room_of(range(num_gpus), max_memory, measure=False))
    return make_map(model.config.chatglm_version, placed, [name for name, _ in model.named_modules()])


def make_map(generation: int, placed: Plan, present: Iterable[str] | None = None) -> DeviceMap:
    """The device map of a plan; with `present`, only for parts that are among these module names."""
    names = NAMES[generation]
    parts = names.meeting if present is None else [name for name in names.meeting if name in set(present)]
    result: DeviceMap = dict.fromkeys(parts, placed.meeting)
    devices = [device for device, count in placed.shares for _ in range(count)]
    return result | {f"{names.blocks}.{index}": device for index, device in enumerate(devices)}


def check_map(device_map: Mapping[str, Any], model: PreTrainedModel, gpus: int) -> DeviceMap:
    """A user's map, checked against the modules of `model` (a skeleton will do), with every part named one by one.

    What the originals' maps name and this model does not have is left out; the rotary table and the prefix, which they
    lack, go to the embeddings.

    Args:
        gpus: how many there are.

    Raises:
        ValueError: unknown or missing modules, a block in parts, tied weights apart, or devices that are not there.
    """
    names = NAMES[model.config.chatglm_version]
    known = {name for name, _ in model.named_modules()}
    given = {name: _device(name, device, gpus) for name, device in device_map.items()}
    unknown = sorted(name for name in given if name not in known and name not in names.meeting)
    if unknown:
        other = NAMES[2 if names is NAMES[1] else 1]
        hint = ": this is a map for another generation" if {*unknown} & {*other.meeting, f"{other.blocks}.0"} else ""
        raise ValueError(f"device_map names modules that the model does not have ({_some(unknown)}){hint}")
    inside = sorted(name for name in given if re.match(rf"{re.escape(names.blocks)}\.\d+\.", name))
    if inside:
        raise ValueError(f"device_map splits a block ({_some(inside)}): name whole blocks, {names.blocks}.0 and so on")

    meeting, rotary, prefix = [name for name in names.meeting if name in known], names.meeting[1], names.meeting[2]
    parts = [*meeting, *(f"{names.blocks}.{index}" for index in range(model.config.num_layers))]
    found = {name: _place(name, given) for name in parts}
    for name in (rotary, prefix):
        if name in found:
            found[name] = found[name] if found[name] is not None else found[names.meeting[0]]
    result = {name: device for name, device in found.items() if device is not None}
    missing = [name for name in parts if name not in result]
    if missing:
        raise ValueError(f"device_map says nothing about {_some(missing)}: name every part, or '' for all the rest")
    for name in (rotary, prefix):  # the table grows, the prefix is trained and exchanged in place: not offloaded
        if result.get(name) in OFFLOADED:
            result[name] = main_device(result)
    if model.all_tied_weights_keys and result[meeting[0]] != result[meeting[-1]]:
        raise ValueError(f"{meeting[0]} and {meeting[-1]} are one matrix in this model: give them the same device")
    return result


def main_device(device_map: Mapping[str, Device]) -> Device:
    """The device that computes with what is offloaded: the first GPU, or the CPU where the map has none."""
    return min((device for device in device_map.values() if isinstance(device, int)), default="cpu")


def _place(name: str, device_map: Mapping[str, Device]) -> Device | None:
    """The device of a module: that of the longest name in the map that it belongs to."""
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_split(
    checkpoint_path: str | os.PathLike[str],
    num_gpus: int = 2,
    device_map: Mapping[str, Any] | str | int | torch.device | None = None,
    *,
    quantize: int | None = None,
    adapter: loading.AdapterPaths | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    config: Any = None,
    revision: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """See `load_model_on_gpus` in utils.py."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):  # transformers' words for: you decide
        num_gpus, device_map = max(1, gpus), None if gpus else "cpu"
    if device_map is None:
        _check_count(num_gpus, gpus)
    folder = loading.find_folder(checkpoint_path, revision)
    check_folder(folder)
    weights = find_weights(folder)
    config = ChatGLMConfig.from_pretrained(folder, local_files_only=True) if config is None else copy.deepcopy(config)
    fresh_prefix = config.pre_seq_len is not None or options.get("pre_seq_len") is not None
    for name in [name for name in options if name in config.to_dict()]:
        setattr(config, name, options.pop(name))  # pre_seq_len=128 and the like, as from_pretrained takes them
    for name in ("trust_remote_code", "empty_init"):
        options.pop(name, None)  # of the originals' calls, without meaning here
    settings = loading.wanted_quantization(folder, config, quantize)
    given = loading.read_adapters(adapter)
    if given or not fresh_prefix:
        loading.check_prefix(folder, config, weights, bool(given))

    model = skeleton(config, settings)
    present = [name for name, _ in model.named_modules()]
    if device_map is None:
        kind = loading.choose_dtype(options.pop("torch_dtype", dtype), torch.device("cuda"), weights)
        sizes, room = sizes_of(model, kind), room_of(range(max(1, num_gpus)), max_memory, measure=True)
        if offload_folder is not None and settings is None:
            room.setdefault("disk", math.inf)
        prefixes = sum(4 * tensor.numel() for _, one in given for tensor in one.tensors.values())
        placed = plan(Sizes(sizes.meeting + prefixes, sizes.block, sizes.blocks), room)
        device_map = make_map(config.chatglm_version, placed, present)
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    final = check_map(device_map, model, gpus)
    devices = set(final.values())
    target = torch.device("cuda" if any(isinstance(device, int) for device in devices) else "cpu")
    kind = loading.choose_dtype(options.pop("torch_dtype", dtype), target, weights)
    if "disk" in devices and settings is not None:
        raise ValueError(
            "what goes to disk cannot be quantised on the way: quantise and save the model once, with "
            "chatglm.load(path, quantize=4)[0].save_pretrained(folder), and load that folder"
        )
    if "disk" in devices and offload_folder is None and weights.files[0].suffix != ".safetensors":
        raise ValueError(f"{weights.files[0].name} is not in safetensors, so disk needs a folder: give offload_folder")

    offloaded = "disk" in devices or ("cpu" in devices and target.type == "cuda")
    # As in chatglm.load; what is offloaded cannot be cast afterwards.
    first = kind if settings is None or offloaded else weights.dtype
    loaded = loading.build_model(
        loading.MODELS[config.chatglm_version],
        folder,
        config,
        dtype=first,
        quantization=settings,
        device_map=final if len(devices) > 1 or "disk" in devices else {"": devices.pop()},
        small=weights.elements < loading.SMALL,
        offload_folder=offload_folder,
        **options,
    )
    if first != kind:
        loading.cast(loaded, kind)
    names = [attach(loaded, one, name) for name, one in given]
    if names:
        use_adapter(loaded, names[0])
    return loaded.eval()


def _check_count(num_gpus: int, gpus: int) -> None:
    if isinstance(num_gpus, bool) or not isinstance(num_gpus, int):
        raise TypeError(f"num_gpus is {num_gpus!r}: give a number")
    if gpus == 0:
        raise ValueError(
            f"num_gpus={num_gpus}, and torch sees 0 CUDA GPUs on this machine: use chatglm.load(path, device='cpu'), "
            "or a device_map over 'cpu' and 'disk'"
        )
    if num_gpus > gpus:
        raise ValueError(f"num_gpus={num_gpus}, and this machine has {gpus} CUDA GPUs: give num_gpus={gpus} or less")
