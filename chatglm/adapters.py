"""What fine-tuning leaves behind, on top of a model: P-tuning prefixes and LoRA adapters, several at once, one in use.

A prefix is found at `model.transformer.prefix_encoder` while it is in use, and is out of the model's way (no parameter
of it, not in its state dict) while it is not. LoRA is PEFT's, which is needed for it and for nothing else here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .adapter_files import (
    LORA_CONFIG,
    LORA_WEIGHTS,
    NAME,
    PREFIX,
    Adapter,
    Lora,
    Prefix,
    default_name,
    describe,
    generation_of,
    import_peft,
    read_adapter,
    written_aside,
)
from .checkpoint_files import ModelLoadError
from .prefix_encoder import PrefixEncoder

__all__ = [
    "Lora",
    "Prefix",
    "add_lora",
    "add_prefix",
    "fingerprint",
    "load_adapter",
    "merge_lora",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "save_prefix",
    "use_adapter",
]

SAMPLES = 64  # numbers in a fingerprint


# ---- into a model ----------------------------------------------------------------------------------------------------


def load_adapter(model: PreTrainedModel, path: str | os.PathLike[str], name: str | None = None) -> str:
    """Puts a prefix or LoRA adapter from its files on `model`, beside those it has, and makes it the current one.

    Everything but adapters is frozen, as for training them. Their weights stay in float32 beside a half-precision or
    quantised model.

    Args:
        path: see `read_adapter`.
        name: to switch by; letters, digits, `-` and `_`. By default `default_name`, with a number if that is taken.

    Returns:
        The name.

    Raises:
        ModelLoadError: the files are missing or broken, or made for another model; or PEFT is not installed.
        ValueError: the name is taken, or no name.
    """
    return attach(model, read_adapter(path), name)


def attach(model: PreTrainedModel, adapter: Adapter, name: str | None = None) -> str:
    """`load_adapter` for what `read_adapter` has read."""
    name = _free_name(model, default_name(adapter.path)) if name is None else _check_name(model, name)
    _check_generation(model, adapter)
    if isinstance(adapter, Prefix):
        _attach_prefix(model, adapter, name)
    else:
        _attach_lora(model, adapter, name)
    return name


def add_prefix(
    model: PreTrainedModel, pre_seq_len: int, prefix_projection: bool = False, name: str = "default"
) -> PrefixEncoder:
    """A fresh prefix to train, current from now on: float32, on the device of the embeddings, all else frozen.

    Args:
        pre_seq_len: prefix positions.
        prefix_projection: make it by a small MLP from a narrower table.
        name: to switch by.

    Raises:
        ValueError: the name is taken, or the length is not 1 or more.
    """
    if isinstance(pre_seq_len, bool) or int(pre_seq_len) != pre_seq_len or pre_seq_len < 1:
        raise ValueError(f"pre_seq_len must be 1 or more prefix positions, not {pre_seq_len!r}")
    _check_name(model, name)
    encoder: PrefixEncoder = model.base_model.make_prefix_encoder(int(pre_seq_len), bool(prefix_projection))
    encoder.float()
    encoder.base_fingerprint = fingerprint(model)
    return _set_prefix(model, encoder, name)


def add_lora(model: PreTrainedModel, config: Any, name: str = "default") -> None:
    """Fresh LoRA weights to train, current from now on: float32, all else frozen.

    Args:
        config: a `peft.LoraConfig`. Its `target_modules` are `query_key_value`, `dense`, `dense_h_to_4h` and
            `dense_4h_to_h`, or some of them; the first is PEFT's default.
        name: to switch by.

    Raises:
        ModelLoadError: PEFT is not installed.
        ValueError: the name is taken, or the config names no layer of this model.
    """
    import_peft()
    _inject(model, config, _check_name(model, name))


def _attach_prefix(model: PreTrainedModel, prefix: Prefix, name: str) -> None:
    with torch.device("meta"):
        encoder: PrefixEncoder = model.base_model.make_prefix_encoder(prefix.length, prefix.projection)
    wanted = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in prefix.tensors.items()}
    if wanted != given:
        theirs = f", {describe(prefix.config)}" if prefix.config else ""
        raise ModelLoadError(
            f"the prefix {prefix.path} is for another model{theirs}: it has {given}, "
            f"this one ({describe(model.config.to_dict())}) needs {wanted}"
        )
    # As it was trained: float32 beside half-precision weights. A copy, as the file may be written again.
    copies = {key: tensor.to(torch.float32, copy=True) for key, tensor in prefix.tensors.items()}
    encoder.load_state_dict(copies, assign=True)
    ours, recorded = fingerprint(model), prefix.config.get("base_fingerprint")
    if not same_base(ours, recorded):
        base = prefix.config.get("base_model_name_or_path")
        warnings.warn(
            f"the prefix {prefix.path} was trained on other weights than these"
            + (f" ({base})" if base else "")
            + ": its answers may be much worse here",
            stacklevel=4,
        )
    encoder.base_fingerprint = recorded or ours
    _set_prefix(model, encoder, name)


def _set_prefix(model: PreTrainedModel, encoder: PrefixEncoder, name: str) -> PrefixEncoder:
    base = model.base_model
    encoder.to(_device_of(base)).train(model.training)
    _prefixes(base)[name] = encoder
    _note_change(base)
    use_adapter(model, name)
    model._freeze_all_but_the_prefix()
    return encoder


def _attach_lora(model: PreTrainedModel, lora: Lora, name: str) -> None:
    peft = import_peft()
    _check_lora(model, lora)
    try:
        config = peft.PeftConfig.from_pretrained(str(lora.path))
        config.inference_mode = False
    except (ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(f"{lora.path / LORA_CONFIG} is no LoRA configuration ({error})") from error
    before = current_adapter(model)
    try:
        made = _inject(model, config, name)
        result = peft.set_peft_model_state_dict(model, lora.tensors, adapter_name=name)
        missing = [key for key in result.missing_keys if key in made]
        if missing or result.unexpected_keys:
            raise ModelLoadError(_other_model(model, lora, missing + list(result.unexpected_keys)))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ModelLoadError) as error:
        if name in _loras(model):
            remove_adapter(model, name)
            use_adapter(model, before)
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"the LoRA adapter {lora.path} does not fit this model: {error}") from error


def _inject(model: PreTrainedModel, config: Any, name: str) -> set[str]:
    """Makes the layers, and returns the names of their new parameters."""
    before = current_adapter(model)
    use_adapter(model, None)  # PEFT freezes all that is not its own: a parked prefix is out of its reach
    known = set(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several: that is meant
        try:
            model.add_adapter(config, name)
        except BaseException:
            getattr(model, "peft_config", {}).pop(name, None)
            if not _loras(model):
                _unwrap(model)
            use_adapter(model, before)
            raise
    _note_change(model.base_model)
    made = {key: value for key, value in model.named_parameters() if key not in known and ".lora_" in key}
    for parameter in made.values():
        parameter.data = parameter.data.float()
    for layer in _lora_layers(model):
        layer.train(model.training)
    use_adapter(model, name)
    return set(made)


def _check_lora(model: PreTrainedModel, lora: Lora) -> None:
    """Raises ModelLoadError unless every tensor has its layer: before anything of the model is changed."""
    modules = dict(model.named_modules())
    for key, tensor in lora.tensors.items():
        path, found, kind = key.removeprefix("base_model.model.").partition(".lora_")
        layer = modules.get(path)
        layer = getattr(layer, "base_layer", layer)
        if not found or layer is None:
            raise ModelLoadError(_other_model(model, lora, [key]))
        if isinstance(layer, nn.Linear):
            size = {"A.weight": tensor.shape[-1:], "B.weight": tensor.shape[:1]}.get(kind)
            wanted = layer.in_features if kind == "A.weight" else layer.out_features
            if size is not None and size[0] != wanted:
                raise ModelLoadError(_other_model(model, lora, [key]))


def _other_model(model: PreTrainedModel, lora: Lora, keys: list[str]) -> str:
    places = [re.search(r"\.(encoder\.)?layers\.(\d+)\.", key) for key in lora.tensors]
    layers = [int(place[2]) + 1 for place in places if place]
    older = any(place and not place[1] for place in places)
    kind = ("ChatGLM of generation " + ("1" if older else "2 or 3")) if layers else "another architecture"
    widths = [tensor.shape[-1] for key, tensor in lora.tensors.items() if "query_key_value.lora_A" in key]
    size = f", {max(layers)} layers" + (f" of width {widths[0]}" if widths else "") if layers else ""
    base = lora.config.get("base_model_name_or_path")
    return (
        f"the LoRA adapter {lora.path} is for another model: it was made for {kind}{size}{f' ({base})' if base else ''}"
        f", this one is {describe(model.config.to_dict())} and has no place for {keys[0]}"
    )


def remove_adapter(model: PreTrainedModel, name: str) -> None:
    """Forgets an adapter; where it was current, the base model is. Raises ValueError where there is no such adapter."""
    _check_known(model, name)
    if current_adapter(model) == name:
        use_adapter(model, None)
    _note_change(model.base_model)
    if _prefixes(model.base_model).pop(name, None) is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            model.delete_adapter(name)
        if not _loras(model):
            _unwrap(model)


# ---- which one -------------------------------------------------------------------------------------------------------


def adapter_names(model: PreTrainedModel) -> list[str]:
    """Prefixes, then LoRA adapters, each in the order they came."""
    return [*_prefixes(model.base_model), *_loras(model)]


def current_adapter(model: PreTrainedModel) -> str | None:
    """The name of the adapter in use; None for the base model."""
    encoder = model.base_model.prefix_encoder
    for name, one in _prefixes(model.base_model).items():
        if one is encoder:
            return name
    for layer in _lora_layers(model):
        return None if layer.disable_adapters or not layer.active_adapters else layer.active_adapters[0]
    return None


def use_adapter(model: PreTrainedModel, name: str | None) -> None:
    """Makes an adapter the current one until further notice; None: the base model alone. See `model.adapter`.

    What is trainable stays so. Raises ValueError where there is none of this name.
    """
    base = model.base_model
    if name is not None:
        _check_known(model, name)
    encoder = _prefixes(base).get(name) if name is not None else None
    if base.prefix_encoder is not encoder:
        base.prefix_encoder = encoder
        for config in (model.config, base.config):  # so that a checkpoint is saved as what it is
            config.pre_seq_len = encoder.pre_seq_len if encoder is not None else None
            config.prefix_projection = encoder is not None and encoder.trans is not None
    lora = name if encoder is None else None
    for layer in _lora_layers(model):
        if lora is None and layer.disable_adapters:
            continue
        flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
        if lora is None:
            layer.enable_adapters(False)
        else:
            layer.set_adapter([lora])
            layer.enable_adapters(True)
        for parameter, flag in flags:  # PEFT freezes and unfreezes with it
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def using_adapter(model: PreTrainedModel, name: str | None) -> Iterator[PreTrainedModel]:
    """`use_adapter` for a `with` block; what was current before is so again after it."""
    before = current_adapter(model)
    use_adapter(model, name)
    try:
        yield model
    finally:
        use_adapter(model, before if before in adapter_names(model) else None)


def stamp(model: Any) -> object:
    """Changes with the state that no parameter shows: which LoRA is in use, adapters that came or went."""
    base = getattr(model, "base_model", model)
    state = tuple(
        (layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters) for layer in _lora_layers(model)
    )
    return state, getattr(base, "_adapter_token", None)


def parked(base: nn.Module) -> list[PrefixEncoder]:
    """The prefixes of a base model that are not in use: they follow its casts and moves all the same."""
    prefixes: dict[str, PrefixEncoder] = base.__dict__.get("_adapter_prefixes", {})
    return [encoder for encoder in prefixes.values() if encoder is not base.prefix_encoder]


def _prefixes(base: Any) -> dict[str, PrefixEncoder]:
    prefixes: dict[str, PrefixEncoder] = base.__dict__.setdefault("_adapter_prefixes", {})
    encoder = base.prefix_encoder
    if encoder is not None and all(one is not encoder for one in prefixes.values()):
        prefixes["default"] = encoder  # made by the constructor, for a config with pre_seq_len
    return prefixes


def _note_change(base: Any) -> None:
    base.__dict__["_adapter_token"] = object()  # a new prefix may have the address of one that is gone


def _loras(model: Any) -> dict[str, Any]:
    return getattr(model, "peft_config", {})


def _lora_layers(model: Any) -> list[Any]:
    if not _loras(model):
        return []
    layer_class = import_peft().tuners.tuners_utils.BaseTunerLayer
    return [module for module in model.modules() if isinstance(module, layer_class)]


def _check_known(model: PreTrainedModel, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        raise ValueError(f"there is no adapter {name!r} in this model, only {', '.join(names) or 'the base model'}")


def _check_name(model: PreTrainedModel, name: str) -> str:
    if not NAME.fullmatch(name) or "lora_" in name:
        raise ValueError(f"an adapter cannot be called {name!r}: use letters, digits, - and _ (and not 'lora_')")
    if name in adapter_names(model):
        raise ValueError(f"this model has an adapter {name!r} already: give this one another name")
    return name


def _free_name(model: PreTrainedModel, name: str) -> str:
    names, name = adapter_names(model), name.replace("lora_", "lora-")
    return next(one for one in (name, *(f"{name}-{i}" for i in range(2, len(names) + 3))) if one not in names)


def _device_of(base: Any) -> torch.device:
    embeddings = base.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)  # accelerate's: weights may be elsewhere until they are needed
    place = getattr(hook, "execution_device", None)
    return embeddings.weight.device if place is None else torch.device(place)


# ---- which base ------------------------------------------------------------------------------------------------------


def _check_generation(model: PreTrainedModel, adapter: Adapter) -> None:
    ours, config = model.config.chatglm_version, adapter.config
    base = config.get("base_model_name_or_path") or config.get("_name_or_path")
    theirs = generation_of(config, base)
    if theirs is not None and theirs != ours:
        kind = "prefix" if isinstance(adapter, Prefix) else "LoRA adapter"
        raise ModelLoadError(
            f"the {kind} {adapter.path} is for another model: it was trained for ChatGLM of generation {theirs}"
            f"{f' ({base})' if base else ''}, this one is {describe(model.config.to_dict())}"
        )


def fingerprint(model: PreTrainedModel) -> str | None:
    """Tells base models from each other: some numbers of their norms and biases, as float16 in hexadecimal.

    Those stay as they are in a quantised model. None where the weights are not in memory as a whole.
    """
    vectors = {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in model.base_model.named_parameters()
        if parameter.dim() == 1 and not name.endswith("weight_scale") and "prefix_encoder." not in name
        and "lora_" not in name
    }  # fmt: skip
    if not vectors or any(vector.is_meta or not vector.numel() for vector in vectors.values()):
        return None
    numbers = torch.cat([vectors[name].reshape(-1).float().cpu() for name in sorted(vectors)])
    places = torch.linspace(0, len(numbers) - 1, SAMPLES).long()
    return numbers[places].clamp(-65504, 65504).half().numpy().astype("<f2").tobytes().hex()


def same_base(one: str | None, other: Any) -> bool:
    """Whether two fingerprints are of the same weights, one of which may have been rounded to bfloat16."""
    if one is None or not isinstance(other, str) or len(one) != len(other):
        return True  # nothing to compare: no reason to warn
    try:
        ours, theirs = (torch.frombuffer(bytearray.fromhex(text), dtype=torch.float16) for text in (one, other))
    except ValueError:
        return True
    return torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-4)


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_prefix(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    base: str | None = None,
    *,
    name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a prefix, and nothing else, as `model.safetensors` and `config.json`; files of these names are replaced.

    The tensors have the originals' names, `transformer.prefix_encoder.*`, in float32. The config is the base model's
    with `pre_seq_len` and `prefix_projection`, and says what the prefix was trained on: `chatglm_version`,
    `base_model_name_or_path` and `base_fingerprint`. Both are written aside first, then renamed.

    Args:
        base: what to call the base model; by default where it was loaded from.
        name: the prefix to save; by default the current one.
        state_dict: the tensors, gathered, where a distributed run has the model in pieces; by default its own.

    Raises:
        ValueError: no prefix is current, or there is none of this name.
        OSError: the files cannot be written; those that were there before are as they were.
    """
    name = current_adapter(model) if name is None else name
    encoder = _prefixes(model.base_model).get(name) if name is not None else None
    if encoder is None:
        names = ", ".join(_prefixes(model.base_model)) or "none"
        raise ValueError(f"there is no prefix {name!r} to save: this model has {names}")
    given = {PREFIX.sub("", key): value for key, value in (state_dict or {}).items() if PREFIX.match(key)}
    tensors = {
        f"transformer.prefix_encoder.{key}": value.detach().float().cpu().contiguous()
        for key, value in (given or encoder.state_dict()).items()
    }
    config = json.loads(model.config.to_json_string())
    for key in ("quantization_config", "quantization_bit", "quantization_embeddings"):
        config.pop(key, None)  # of this base, and no matter to the prefix
    config |= {
        "chatglm_version": model.config.chatglm_version,
        "pre_seq_len": encoder.pre_seq_len,
        "prefix_projection": encoder.trans is not None,
        "base_model_name_or_path": base or model.name_or_path or None,
        "base_fingerprint": encoder.base_fingerprint or fingerprint(model),
    }
    with written_aside(Path(folder)) as aside:
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    base: str | None = None,
    *,
    name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`save_prefix`, or for LoRA what PEFT saves: `adapter_model.safetensors` and `adapter_config.json`.

    Raises as `save_prefix`.
    """
    name = current_adapter(model) if name is None else name
    if name not in _loras(model):
        return save_prefix(model, folder, base, name=name, state_dict=state_dict)
    peft = import_peft()
    given = None if state_dict is None else dict(state_dict)
    tensors = peft.get_peft_model_state_dict(
        model, state_dict=given, adapter_name=name, save_embedding_layers=False
    )
    tensors = {
        f"base_model.model.{key.removeprefix('base_model.model.')}": value.detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    config = peft.PeftConfig.from_peft_type(**model.peft_config[name].to_dict())
    config.base_model_name_or_path, config.inference_mode = base or model.name_or_path or None, True
    with written_aside(Path(folder)) as aside:
        save_file(tensors, aside / LORA_WEIGHTS[0], metadata={"format": "pt"})
        config.save_pretrained(str(aside))
    return None


# ---- LoRA into the weights -------------------------------------------------------------------------------------------


def merge_lora(model: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
    """Adds a LoRA adapter (by default the current one) to the weights; the model needs no PEFT from then on.

    Half-precision weights are added to in float32 and rounded once.

    Returns:
        The model itself, as if loaded from a checkpoint of the merged weights.

    Raises:
        ValueError: there is no such LoRA adapter, or others are loaded as well (trained beside weights that are gone
            then), or a layer is quantised or tied to another.
    """
    name = current_adapter(model) if name is None else name
    loras = _loras(model)
    if name not in loras:
        raise ValueError(f"there is no LoRA adapter {name!r} to merge: this model has {', '.join(loras) or 'none'}")
    others = [other for other in loras if other != name]
    if others:
        raise ValueError(f"this model has other LoRA adapters ({', '.join(others)}): load it with {name!r} alone")
    layers = [layer for layer in _lora_layers(model) if not layer.merged]
    counts: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        counts[id(weight)] = counts.get(id(weight), 0) + 1
    for layer in layers:
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point():
            raise ValueError(
                "LoRA cannot be merged into quantised weights: rounding them again would lose most of it. Merge into "
                "the full-precision checkpoint, and quantise the result"
            )
        if counts[id(weight)] > 1:
            raise ValueError("LoRA on embeddings that are tied to the output head cannot be merged: use it as it is")
    use_adapter(model, name)
    for layer in layers:
        parameters = list(layer.get_base_layer().parameters(recurse=False))
        kinds = [parameter.dtype for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        layer.merge(adapter_names=[name])
        for parameter, kind in zip(parameters, kinds, strict=True):
            parameter.data = parameter.data.to(kind)
    _unwrap(model)
    _note_change(model.base_model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _unwrap(model: PreTrainedModel) -> None:
    """The layers that PEFT has wrapped, in their places again."""
    layer_class = import_peft().tuners.tuners_utils.BaseTunerLayer
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, layer_class):
                setattr(parent, child_name, child.get_base_layer())
    model.__dict__.pop("peft_config", None)
    model._hf_peft_config_loaded = False
