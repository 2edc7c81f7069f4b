"""The base class of all networks: loading, devices, casts, quantisation and initialisation, on top of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import zeros_
from transformers.utils import logging

from .. import quantization
from ..cache import check_kv_cache_dtype
from ..checkpoints.files import ModelLoadError, find_weights, refuse_missing
from ..checkpoints.state_dicts import unusual_state_dict
from ..checkpoints.weight_names import WRAPPERS
from ..configuration_chatglm import ChatGLMConfig
from . import compat
from .fitting import check_fit
from .prefix_encoder import PrefixEmbedding, PrefixLinear
from .rotary import RotaryTable
from .slots import AdapterSlots

logger = logging.get_logger(__name__)


def refuse_old_quantisation(kwargs: dict[str, Any]) -> None:
    """Takes transformers 4's switches for bitsandbytes out of `kwargs`. Raises TypeError if one is set."""
    for name, bits in (("load_in_8bit", 8), ("load_in_4bit", 4)):
        if kwargs.pop(name, None):
            raise TypeError(
                f"{name} is gone from transformers 5: write quantization_config=ChatGLMQuantizationConfig(bits={bits}) "
                f"(from chatglm; the same as chatglm.load(..., quantize={bits})), or, for bitsandbytes, "
                f"quantization_config=BitsAndBytesConfig({name}=True)"
            )


@dataclass(frozen=True)
class PartNames:
    """The names of the modules that a device map places."""

    embeddings: str
    rotary: str
    prefix: str
    final_norm: str
    heads: tuple[str, ...]  # the output head, under every name that it has in the originals' maps
    blocks: str
    others: tuple[str, ...] = ()  # further parts, which stay whole

    @property
    def meeting(self) -> tuple[str, ...]:
        """The modules on the device where input ids and logits meet, in the order of the originals' maps."""
        return (self.embeddings, self.rotary, self.prefix, self.final_norm, *self.heads, *self.others)

# Arguments of `from_pretrained` that name other weights than those a folder has under their usual names.
_OTHER_SOURCES = ("state_dict", "gguf_file", "variant")


def _give_config(config_class: Any, folder: Path, kwargs: dict[str, Any]) -> None:
    """Puts the config of a folder into the arguments of `from_pretrained`, with the fields of it that they name."""
    if isinstance(kwargs.get("config"), ChatGLMConfig):
        return
    given = {"chatglm_version": kwargs.pop("chatglm_version")} if "chatglm_version" in kwargs else {}
    config = kwargs["config"] = config_class.from_pretrained(kwargs.get("config") or folder, **given)
    for name in set(kwargs) & set(config.to_dict()) - {"dtype", "quantization_config"}:
        setattr(config, name, kwargs.pop(name))


def _explain(folder: Path, config: Any) -> None:
    """Raises ModelLoadError if the weights of a folder, which transformers could not load, are broken or do not fit
    its config.json. What is wrong with a config that the caller changed is not the folder's fault."""
    weights = find_weights(folder)
    if isinstance(config, ChatGLMConfig):
        check_fit(folder, type(config).from_pretrained(folder), weights)


def _check_tensors(source: Any, info: Any) -> None:
    """Raises ModelLoadError unless all tensors of a network were loaded, and as what they are."""
    missing = (name for name in info.missing_keys if not name.startswith("classifier_head."))  # that one is new
    refuse_missing(source, missing, info.unexpected_keys)
    if any(name.endswith(".weight_scale") for name in info.unexpected_keys):
        raise ModelLoadError(
            f"the weights of {source} are quantised, and its config does not say so: add quantization_bit (4 or 8) to "
            "config.json, or take the full-precision weights"
        )


class ChatGLMPreTrainedModel(compat.NoCodeToSave, PreTrainedModel):
    """A network, with or without a head."""

    config: ChatGLMConfig
    part_names: ClassVar[PartNames]
    #: Other names that tensors have in checkpoints, as patterns, and what to replace them with.
    other_names: ClassVar[dict[str, str]] = {}
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(compat.CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Rotary buffers that the published checkpoints carry and that follow from the config.
    _keys_to_ignore_on_load_unexpected = [r"rotary_(pos_)?emb\.inv_freq"]
    # A new prefix is about to be trained, so base checkpoints need not contain it.
    _keys_to_ignore_on_load_missing = [r"prefix_encoder\."]
    # P-tuning trains a float32 prefix beside half-precision weights.
    _keep_in_fp32_modules_strict = ["prefix_encoder"]

    @staticmethod
    def conversions() -> list[Any]:
        """How tensors of the published weights become those of the network, in transformers' form; [] if they are."""
        return []

    @property
    def adapter_slots(self) -> AdapterSlots:
        """The P-tuning prefixes and LoRA adapters of this model by name, and which one is in use."""
        return AdapterSlots(self)

    # ---- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; also takes `device=` for `device_map=`, as in ChatGLM2's README.

        Tensors are found under the names that training programs give them, see `checkpoints/weight_names.py`.

        Raises:
            TypeError: `load_in_8bit` or `load_in_4bit` of transformers 4 is set; the error says what to write.
            ModelLoadError: tensors of the network are missing (transformers would fill them with random numbers), or
                are not those that config.json describes.
        """
        refuse_old_quantisation(kwargs)
        compat.take_old_hub_keywords(kwargs)
        device = kwargs.pop("device", None)
        if device is not None:
            kwargs.setdefault("device_map", device)
        kwargs.pop("empty_init", None)  # the originals' switch; here, weights that are loaded are never initialised
        own_names = kwargs.get("key_mapping") is None
        if own_names:
            kwargs["key_mapping"] = WRAPPERS | cls.other_names
        path: str | os.PathLike[str] | None = pretrained_model_name_or_path
        folder = None if path is None else Path(path, kwargs.get("subfolder") or "")
        tensors = None
        if folder is not None and folder.is_dir() and not any(kwargs.get(name) for name in _OTHER_SOURCES):
            tensors = unusual_state_dict(folder)
        if folder is not None and tensors is not None:
            _give_config(cls.config_class or ChatGLMConfig, folder, kwargs)
            path, kwargs["state_dict"] = None, tensors
        try:
            loaded = super().from_pretrained(path, *model_args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            info = model.__dict__.pop("_base_loading_info", None)  # None for transformers' distributed checkpoints
            if info is not None:
                _check_tensors(pretrained_model_name_or_path, info)
        except (ModelLoadError, RuntimeError, ValueError, EOFError, SafetensorError, UnpicklingError):
            if folder is not None and folder.is_dir():
                _explain(folder, kwargs.get("config"))
            raise
        if folder is not None and tensors is not None:
            model.config.name_or_path = os.fspath(pretrained_model_name_or_path or "")
            if model.can_generate() and (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
        if own_names:  # else `save_pretrained` would put the wrappers' names back
            used = getattr(model, "_weight_conversions", None) or []
            kept = [one for one in used if not isinstance(one, WeightRenaming)]
            model._weight_conversions = model.conversions() or kept
        if model.is_split:
            for name in ("to", "cuda", "npu", "xpu", "mlu", "musa", "sdaa", "neuron"):
                model.__dict__.pop(name, None)  # drops accelerate's warnings: our error says what to do
        if model.config.pre_seq_len is not None:
            model.adapter_slots.freeze_base()  # loading creates new parameters, which are trainable again
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which writes model.safetensors; `safe_serialization=False` of transformers 4 is answered
        with a warning that says how to write the other format."""
        if kwargs.pop("safe_serialization", None) is False:
            logger.warning(
                "safe_serialization=False is gone from transformers 5, which writes model.safetensors: for a "
                "pytorch_model.bin as well, torch.save(model.state_dict(), 'pytorch_model.bin')"
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Keeps what is known of the base's tensors: for the folder of an adapter, `from_pretrained` drops it."""
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        model._base_loading_info = info
        return info

    def post_init(self) -> None:
        """Ends every constructor: if the config describes quantised weights, creates the layers for them."""
        if self.config.quantization_bit:
            quantization.apply(self, quantization.stored_settings(self.config), empty=True)
        super().post_init()

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        """The dtypes that loading casts to, by name patterns. Quantised weights and their scales stay as saved: rounded
        scales would change the weights, and casting float weights to int8 would turn them into zeros."""
        plan: dict[str, torch.dtype | None] = super()._get_dtype_plan(dtype)
        return plan | dict.fromkeys(quantization.packed_weights(self))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (RotaryTable, PrefixEmbedding, PrefixLinear)):
            module.reset()
        elif isinstance(module, (quantization.QuantizedLinear, quantization.QuantizedEmbedding)):
            for parameter in module.parameters(recurse=False):
                zeros_(parameter)
        else:
            super()._init_weights(module)

    @property
    def kv_cache_dtype(self) -> str:
        """What new KV caches hold: "auto" (numbers of the model's dtype) or "int8" (bytes with a scale for each key and
        value of a head, which take half the memory of bfloat16; on the CPU only)."""
        return str(self.__dict__.get("_kv_cache_dtype", "auto"))

    @kv_cache_dtype.setter
    def kv_cache_dtype(self, name: str) -> None:
        check_kv_cache_dtype(name)
        if name == "int8" and (self.is_split or self.device.type != "cpu"):
            raise ValueError('kv_cache_dtype="int8" is for models on the CPU')
        self.__dict__["_kv_cache_dtype"] = name

    # ---- devices and dtypes ------------------------------------------------------------------------------------------

    def quantize(self, bits: int, **options: Any) -> Any:
        """Quantises the weights to 4 or 8 bits in place and returns the model; 0 changes nothing.

        Can be combined with `.half()`, `.float()`, `.cuda()` and `.to()` in any order. `chatglm.quantization.quantize`
        describes the options, including those of the originals.
        """
        if bits and self.adapter_slots.loras:
            raise ValueError("this model has LoRA adapters: quantise it first, then load them (or merge them first)")
        if bits and self.is_split:
            raise ValueError(f"this model is split over devices: give quantize={bits} to load_model_on_gpus instead")
        return quantization.quantize(self, bits, **options)

    def train(self, mode: bool = True) -> Any:
        if self.base_model is self:
            for encoder in self.adapter_slots.parked:
                encoder.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if self.is_split:
            places = ", ".join(sorted({str(device) for device in self.hf_device_map.values()}))
            raise ValueError(
                f"this model is split over devices ({places}), so it cannot be moved or cast as a whole: leave out "
                ".cuda(), .to(), .half() and .float(), and give num_gpus, device_map or dtype when you load it"
            )
        if self.base_model is self:
            for encoder in self.adapter_slots.parked:
                encoder._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def is_split(self) -> bool:
        """Whether its parts are on several devices, or offloaded; hooks then move the hidden states between them."""
        places = set(getattr(self, "hf_device_map", {}).values())
        return hasattr(self, "_hf_hook") and (len(places) > 1 or "disk" in places)

    @property
    def device(self) -> torch.device:
        """The device for inputs: that of the embeddings, even if they are offloaded."""
        found: torch.device = super().device
        if found.type == "meta" and self.is_split:
            hook: Any = getattr(self.get_input_embeddings(), "_hf_hook", self._hf_hook)
            found = torch.zeros(0, device=hook.execution_device).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation; ignores the scales of quantised weights, which have their own dtype."""
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point() and not name.endswith("weight_scale"):
                return parameter.dtype
        return super().dtype

    # transformers refuses these two for quantised models; ours cast what is not quantised, as the originals do.
    def half(self, *args: Any) -> Any:
        return nn.Module.half(self, *args)

    def float(self, *args: Any) -> Any:
        return nn.Module.float(self, *args)
