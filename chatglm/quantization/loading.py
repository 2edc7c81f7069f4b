"""Quantised models through transformers' `from_pretrained`: quantised checkpoints, and quantising while loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .layers import QuantizedLayer
from .models import apply, empty_layer, layers_to_quantize
from .scheme import quantize_weight
from .settings import EMBEDDINGS, HEADS, QUANT_METHOD, ChatGLMQuantizationConfig

for _known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    _known.pop(QUANT_METHOD, None)  # registered already, when a notebook reloads this module
register_quantization_config(QUANT_METHOD)(ChatGLMQuantizationConfig)


class _QuantizeOne(ConversionOps):
    """Quantises a matrix of a checkpoint as soon as it is read."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        (weight,) = input_dict.values()
        layer = model.get_submodule(name.rpartition(".")[0])
        try:
            q, scale = quantize_weight(weight[0] if isinstance(weight, list) else weight, layer.bits)
        except ValueError as error:  # raised at the end: transformers would bury it in a report
            self.errors.append(f"{name}: {error}")
            return input_dict
        return {name: q, f"{name}_scale": scale}


@register_quantizer(QUANT_METHOD)
class ChatGLMQuantizer(HfQuantizer):
    """Loads quantised checkpoints, and quantises others while they are loaded."""

    quantization_config: ChatGLMQuantizationConfig
    requires_calibration = False
    is_trainable = True  # gradients of a P-tuning prefix or LoRA pass through the frozen weights
    is_qat_trainable = True  # else the Trainer refuses a prefix, because it is not a PEFT adapter
    is_compileable = True

    def __init__(self, quantization_config: ChatGLMQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.errors: list[str] = []

    def is_serializable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.bits / 8

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(module), QuantizedLayer)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOne(self.errors)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        settings = self.quantization_config
        if self.pre_quantized:
            apply(model, settings, empty=True)  # already done by the constructor if the config has quantization_bit
            return model
        tied = bool(model.all_tied_weights_keys)
        for parent, name, module, bits in layers_to_quantize(model, settings):
            if tied and (name in EMBEDDINGS or name in HEADS):
                continue  # one tensor in the file for two layers: quantised once it is loaded
            layer = empty_layer(module, bits, settings.precision)
            layer.weight = nn.Parameter(module.weight, requires_grad=False)  # float, as in the file
            setattr(parent, name, layer)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.errors:
            raise ValueError(self.errors[0])
        apply(model, self.quantization_config)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer):
                if module.weight.dtype != torch.int8:
                    raise ValueError(
                        f"the config says that this checkpoint is quantised, but {name}.weight is "
                        f"{module.weight.dtype}: remove quantization_bit and quantization_config from the config, and "
                        "give quantization_config to from_pretrained instead"
                    )
                module.weight.requires_grad_(False)
                module.weight_scale.requires_grad_(False)
        return model
