"""Layers that a LoRA adapter trains and saves as a whole, beside its matrices: PEFT's `modules_to_save`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from ..quantization.layers import QuantizedLayer


class SavedLayersError(ValueError):
    """Layers that cannot be trained as a whole; the message says why."""


def check_saved_layers(model: PreTrainedModel, config: Any, *, to_train: bool) -> None:
    """Checks the `modules_to_save` of a `peft.LoraConfig` before the model is changed.

    Args:
        to_train: the adapter is new. Then no layer may be tied to another: training would part the two.

    Raises:
        SavedLayersError: a name is unknown, or of a part with several layers, of quantised weights, or of a tied layer.
    """
    modules = dict(model.named_modules())
    for name in getattr(config, "modules_to_save", None) or ():
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        layers: list[Any] = [getattr(modules[path], "original_module", modules[path]) for path in paths]
        if not layers or not all(_is_layer(layer) for layer in layers):
            names = {path.rsplit(".", 1)[-1] for path, module in modules.items()
                     if _is_layer(module) and "original_module" not in path and "modules_to_save" not in path
                     and "lora_" not in path}  # fmt: skip
            what = f"{name} is a part with several layers" if layers else f"no layer is called {name}"
            raise SavedLayersError(f"{what}: this model has {', '.join(sorted(names))}")
        if any(isinstance(layer, QuantizedLayer) for layer in layers):
            raise SavedLayersError(
                f"the weights of {name} are quantised, and these cannot be trained: leave it out, or take the "
                "full-precision checkpoint"
            )
        if to_train and any(is_tied(model, layer) for layer in layers):
            raise SavedLayersError(
                f"{name} is tied to another layer (the embeddings and the output head are one matrix), and training it "
                "would part the two: leave it out"
            )


def _is_layer(module: nn.Module) -> bool:
    return bool(module._parameters) and not module._modules


def is_tied(model: PreTrainedModel, layer: nn.Module) -> bool:
    """Whether another module of the model has the weight of this layer, too."""
    weight = layer._parameters.get("weight")
    return weight is not None and sum(one._parameters.get("weight") is weight for one in model.modules()) > 1


def widen(wrapper: Any) -> None:
    """Lets a wrapper compute in the dtype of what is trained (float32) inside a model of another dtype."""
    if _cast_inputs not in wrapper._forward_pre_hooks.values():
        wrapper.register_forward_pre_hook(_cast_inputs)
        wrapper.register_forward_hook(_cast_output)


def _dtypes(wrapper: Any) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes of the layer in use and of the base's; None if they are the same."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or names[0] not in wrapper.modules_to_save:
        return None
    kinds = [next(one.parameters()).dtype for one in (wrapper.modules_to_save[names[0]], wrapper.original_module)]
    return None if kinds[0] == kinds[1] else (kinds[0], kinds[1])


def _cast_inputs(wrapper: Any, inputs: tuple[Any, ...]) -> Any:
    kinds = _dtypes(wrapper)
    return inputs if kinds is None else _cast(inputs, kinds[0])


def _cast_output(wrapper: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    kinds = _dtypes(wrapper)
    return output if kinds is None else _cast(output, kinds[1])


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda one: one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one, values
    )


def merge_saved(wrapper: Any, name: str) -> None:
    """Puts what an adapter has trained into the base's layer, in its dtype."""
    if name in wrapper.modules_to_save:
        own, trained = wrapper.original_module, wrapper.modules_to_save[name]
        for parameter, value in zip(own.parameters(), trained.parameters(), strict=True):
            parameter.data = value.detach().to(parameter, copy=True)
