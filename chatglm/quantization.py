"""INT4 and INT8 weights: the published scheme, the layers that hold them, and the ways to get a model that has them.

* `model.quantize(4)` after loading, as the originals have it;
* `from_pretrained(..., quantization_config=ChatGLMQuantizationConfig(bits=4))`, one layer at a time while loading;
* published INT4 and INT8 checkpoints, and saved quantised models, with nothing but `from_pretrained`.

The scheme: symmetric, one float16 scale per output row, `scale = max|w| / 7` (or 127), `q = round(w / scale)`. The
four matrices of every block are quantised; embeddings and output head on request. How a product is computed is a
matter of `chatglm.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import kernels
from .kernels import huge_pages
from .kernels.reference import BLOCK, dequantize_rows, pack

__all__ = [
    "ChatGLMQuantizationConfig",
    "ChatGLMQuantizer",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "quantize",
    "quantize_weight",
    "settings_of",
]

METHOD = "chatglm"
BLOCK_MATRICES = frozenset(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"))
EMBEDDINGS = frozenset(("word_embeddings",))
HEADS = frozenset(("lm_head", "output_layer"))

#: Arguments of the originals' `quantize` without meaning here: name -> why.
IGNORED_ARGUMENTS = {
    "use_quantization_cache": "weights are never expanded in memory, so there is no buffer to share",
    "kernel_file": "kernels are built from our source for the machine at hand, see `python -m chatglm.kernels`",
    "source_code": "as kernel_file",
    "compile_parallel_kernel": "the CPU kernel is parallel where the compiler can",
    "parallel_num": "the CPU kernel obeys torch.set_num_threads",
}


# ---- the scheme ------------------------------------------------------------------------------------------------------


def quantize_weight(
    weight: torch.Tensor, bits: int, scale_dtype: torch.dtype | None = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float matrix (out, in) -> int8 (out, in * bits / 8) and scales (out,).

    Computed in the weight's own dtype, as the originals do, and bfloat16 in float32. A row of zeros gets scale 0.

    Args:
        weight: any floating-point dtype, any device.
        bits: 4 or 8.
        scale_dtype: float16 as in generation 1 and in all published checkpoints; None for the weight's own, which is
            what the code of generations 2 and 3 does (the same for float16 weights).

    Raises:
        ValueError: other bits, an odd number of columns with 4 bits, or numbers that no scale can hold.
    """
    _check_bits(bits)
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"only float matrices can be quantised, not {weight.dtype} of shape {tuple(weight.shape)}")
    largest = 2 ** (bits - 1) - 1
    shape = (weight.shape[0], weight.shape[1] * bits // 8)
    plain = weight.device.type == "cpu" and type(weight) in (torch.Tensor, nn.Parameter)  # not one of torch's fake ones
    q = huge_pages.empty(shape) if plain else weight.new_empty(shape, dtype=torch.int8)
    scale = weight.new_empty(weight.shape[0], dtype=scale_dtype or weight.dtype)
    step = max(1, BLOCK // 16 // max(1, weight.shape[1]))  # in slices: the intermediates would be larger than the layer
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        wide = weight[rows].float() if weight.dtype == torch.bfloat16 else weight[rows]
        scale[rows] = wide.abs().amax(1) / largest
        divisor = torch.where(scale[rows] == 0, 1, scale[rows]).unsqueeze(1)
        q[rows] = pack((wide / divisor).round().clamp(-largest, largest).to(torch.int8), bits)
    if not torch.isfinite(scale).all():
        raise ValueError(
            f"weights that are not finite, or too large for scales in {scale.dtype}, cannot be quantised: check them"
        )
    return q, scale


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or bits not in (4, 8):
        raise ValueError(f"bits is {bits!r}: weights can be quantised to 4 or 8 bits")


# ---- layers ----------------------------------------------------------------------------------------------------------


class _Quantized(nn.Module):
    """What both layers share: packed weights and scales that survive casts, and refuse weights of another kind."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def _hold(self, rows: int, columns: int, bits: int, device: torch.device | str | None) -> None:
        _check_bits(bits)
        if columns * bits % 8:
            raise ValueError(f"{columns} columns of INT4 do not fill whole bytes: use 8 bits")
        self.bits = bits
        self.weight = nn.Parameter(
            torch.zeros(rows, columns * bits // 8, dtype=torch.int8, device=device), requires_grad=False
        )
        self.weight_scale = nn.Parameter(torch.zeros(rows, dtype=torch.float16, device=device), requires_grad=False)

    def set_weight(self, weight: torch.Tensor, device: torch.device | str | None = None) -> None:
        """Quantises a float matrix into this layer, there or on `device`."""
        q, scale = quantize_weight(weight.detach(), self.bits)
        self.weight = nn.Parameter(q.to(device), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.to(device), requires_grad=False)

    def share_weight(self, other: _Quantized) -> None:
        self.weight, self.weight_scale = other.weight, other.weight_scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The float matrix (rows, columns)."""
        return kernels.dequantize(self.weight, self.weight_scale, self.bits, dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        packed = (self.weight, self.weight_scale)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # .half(), .bfloat16(), .to(dtype) are for what is computed; scales would lose bits, and q its meaning.
            kept = moved.dtype != tensor.dtype and any(tensor is one for one in packed)
            return tensor.to(moved.device) if kept else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}weight_scale")
        if weight is not None and weight.dtype != torch.int8:
            error_messages: list[str] = args[-1]
            error_messages.append(
                f"{prefix}weight is {weight.dtype} and this layer holds INT{self.bits}: load these weights into a "
                "model that is not quantised, and call model.quantize(bits) then"
            )
            return
        if scale is not None and scale.dtype != self.weight_scale.dtype:  # copying would round them
            self.weight_scale = nn.Parameter(self.weight_scale.to(scale.dtype), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(_Quantized, nn.Linear):
    """`nn.Linear` with INT4 or INT8 weights, frozen; gradients flow through to the input.

    Its state: `weight` int8 (out, in * bits / 8), `weight_scale` float16 (out,), `bias` (out,) or None. Casts of the
    model (`.half()`, `.float()`, `.to(dtype)`) reach the bias only; the result has the dtype of the input.

    Args:
        precision: "default", "exact" or "int8", see `chatglm.kernels`; in training mode it is "exact".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int,
        precision: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self._hold(out_features, in_features, bits, device)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.precision = precision

    @classmethod
    def like(
        cls, linear: nn.Linear, bits: int, precision: str = "default", device: torch.device | str | None = None
    ) -> QuantizedLinear:
        """The layer to hold the weights of `linear`, still zero; with its bias, on its device or `device`."""
        there = linear.weight.device if device is None else torch.device(device)
        layer = cls(linear.in_features, linear.out_features, False, bits=bits, precision=precision, device=there)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().to(there), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # While training also where autograd does not ask for it, so that a checkpointed block is computed twice alike.
        precision = "exact" if self.training else self.precision
        return kernels.linear(input, self.weight, self.weight_scale, self.bias, self.bits, precision)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """`nn.Embedding` with INT4 or INT8 weights, frozen; casts of the model change the dtype of its result."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device="meta")
        self._hold(num_embeddings, embedding_dim, bits, device)
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def like(
        cls, embedding: nn.Embedding, bits: int, device: torch.device | str | None = None
    ) -> QuantizedEmbedding:
        weight = embedding.weight
        layer = cls(*weight.shape, bits=bits, device=weight.device if device is None else device, dtype=weight.dtype)
        return layer.train(embedding.training)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dequantize_rows(self.weight[input], self.weight_scale[input], self.bits, self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class DenseHead(nn.Linear):
    """The unquantised output head of a quantised model: a quarter of the bytes of a token, so it has its kernel too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return kernels.dense_linear(input, self.weight)


# ---- what a model is quantised to ------------------------------------------------------------------------------------


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """What to quantise, and how to compute; for `from_pretrained(..., quantization_config=...)` and in config.json.

    Args:
        bits: 4 or 8.
        quantize_embeddings: word embeddings and output head too, as in chatglm-6b-int4-qe.
        quantize_head: bits (4 or 8) of the output head alone, or of the head with quantised embeddings where they
            differ. A model with tied embeddings keeps both then.
        precision: "default", "exact" or "int8", see `chatglm.kernels`.
    """

    def __init__(
        self,
        bits: int = 4,
        quantize_embeddings: bool = False,
        quantize_head: int | None = None,
        precision: str = "default",
        quant_method: str = METHOD,
    ) -> None:
        _check_bits(bits)
        if quantize_head is not None:
            _check_bits(quantize_head)
        if precision not in kernels.PRECISIONS:
            raise ValueError(f"precision is {precision!r}: use one of {', '.join(kernels.PRECISIONS)}")
        self.bits = bits
        self.quantize_embeddings = bool(quantize_embeddings)
        self.quantize_head = quantize_head
        self.precision = precision
        self.quant_method = quant_method

    @property
    def head_bits(self) -> int | None:
        return self.quantize_head or (self.bits if self.quantize_embeddings else None)

    @property
    def shares_embeddings(self) -> bool:
        """Whether embeddings and head of a model that ties them can stay one matrix."""
        return self.head_bits == (self.bits if self.quantize_embeddings else None)

    def bits_of(self, name: str, module: nn.Module) -> int | None:
        """Bits for a float layer by the last part of its name; None to leave it."""
        if isinstance(module, nn.Linear):
            if name in BLOCK_MATRICES:
                return self.bits
            return self.head_bits if name in HEADS else None
        if isinstance(module, nn.Embedding) and name in EMBEDDINGS and self.quantize_embeddings:
            return self.bits
        return None


def settings_of(config: Any) -> ChatGLMQuantizationConfig | None:
    """How the checkpoint of a model config is quantised; None if it is not, or by a method that is not ours."""
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == METHOD:
        return ChatGLMQuantizationConfig.from_dict(stored)
    return stored if isinstance(stored, ChatGLMQuantizationConfig) else None


def stored_settings(config: Any) -> ChatGLMQuantizationConfig:
    """`settings_of` a config with `quantization_bit`.

    Raises:
        ValueError: the bits were written into a finished config, where transformers does not see them.
    """
    settings = settings_of(config)
    if settings is None or settings.bits != config.quantization_bit:
        raise ValueError(
            f"quantization_bit={config.quantization_bit} in the config is for checkpoints that are quantised already: "
            "to quantise one, load it with quantization_config=ChatGLMQuantizationConfig(bits=...), or call "
            "model.quantize(...) afterwards"
        )
    return settings


# ---- quantising a model ----------------------------------------------------------------------------------------------


def quantize(
    model: PreTrainedModel,
    bits: int,
    *,
    quantize_embeddings: bool = False,
    quantize_head: int | None = None,
    precision: str = "default",
    empty_init: bool = False,
    device: torch.device | str | None = None,
    **ignored: Any,
) -> PreTrainedModel:
    """Replaces the matrices of `model` by quantised ones, one after the other; see `ChatGLMQuantizationConfig`.

    Args:
        bits: 4 or 8; 0 leaves the model as it is.
        quantize_embeddings, quantize_head, precision: see `ChatGLMQuantizationConfig`.
        empty_init: leave the quantised weights zero: they are going to be loaded.
        device: where the quantised weights go; by default they stay where the weights were.
        ignored: the originals' IGNORED_ARGUMENTS, which have no meaning here.

    Returns:
        The model itself. One that is quantised to the same bits already only takes over `precision`.

    Raises:
        ValueError: other bits, or a model that is quantised to other bits already.
        TypeError: an argument that the originals do not have either.
    """
    unknown = sorted(set(ignored) - set(IGNORED_ARGUMENTS))
    if unknown:
        raise TypeError(f"quantize() has no argument {', '.join(unknown)}")
    if isinstance(bits, bool) or bits not in (0, 4, 8):
        raise ValueError(f"bits is {bits!r}: use 4 or 8, or 0 for a model that stays as it is")
    if bits == 0:
        return model
    settings = ChatGLMQuantizationConfig(bits, quantize_embeddings, quantize_head, precision)
    present = settings_of(model.config)
    if present is not None:
        return _requantize(model, present, settings)
    apply(model, settings, empty=empty_init, device=device)
    return model


def _requantize(
    model: PreTrainedModel, present: ChatGLMQuantizationConfig, wanted: ChatGLMQuantizationConfig
) -> PreTrainedModel:
    if wanted.bits != present.bits:
        raise ValueError(
            f"this model is quantised to {present.bits} bits already, and what was rounded away is lost: load the "
            f"full-precision checkpoint for {wanted.bits} bits"
        )
    for name in ("quantize_embeddings", "quantize_head"):
        if getattr(wanted, name) and getattr(wanted, name) != getattr(present, name):
            raise ValueError(f"this model is quantised already, without {name}: load the full-precision checkpoint")
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.precision = wanted.precision
    present.precision = wanted.precision
    _note(model, present)
    return model


def apply(
    model: PreTrainedModel,
    settings: ChatGLMQuantizationConfig,
    *,
    empty: bool = False,
    device: torch.device | str | None = None,
) -> None:
    """Quantises what `settings` name and is still float, and writes them into the model's config."""
    shared: dict[nn.Parameter, _Quantized] = {}
    for parent, name, module, bits in _targets(model, settings):
        if module.weight.is_meta and not empty:
            raise ValueError(
                f"the weights of {name} are not in memory (offloaded): quantise while loading, with quantization_config"
            )
        layer = _layer_like(module, bits, settings.precision, device)
        if not empty:
            tied = shared.get(module.weight) if settings.shares_embeddings else None
            if tied is not None:
                layer.share_weight(tied)
            else:
                try:
                    layer.set_weight(module.weight, device)
                except ValueError as error:
                    path = next(path for path, one in model.named_modules() if one is module)
                    raise ValueError(f"{path}.weight: {error}") from error
                if name in EMBEDDINGS or name in HEADS:
                    shared[module.weight] = layer
        setattr(parent, name, layer)
    for parent, name, head in list(_children(model)):
        if name in HEADS and type(head) is nn.Linear and head.bias is None:
            dense = DenseHead(head.in_features, head.out_features, bias=False, device="meta")
            dense.weight = head.weight
            setattr(parent, name, dense.train(head.training))
    _tie(model, settings)
    _note(model, settings)


def packed_weights(model: nn.Module) -> list[str]:
    """Names of the quantised weights; followed by `_scale`, those of their scales."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _Quantized)]
    return [f"{name}.weight" for name, module in layers if module.weight.dtype == torch.int8]


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _targets(
    model: nn.Module, settings: ChatGLMQuantizationConfig
) -> list[tuple[nn.Module, str, Any, int]]:
    """(parent, name in it, float layer, bits) for everything that `settings` want quantised and that is not yet."""
    return [
        (parent, name, child, bits)
        for parent, name, child in _children(model)
        if not isinstance(child, _Quantized) and (bits := settings.bits_of(name, child)) is not None
    ]


def _layer_like(module: nn.Module, bits: int, precision: str, device: torch.device | str | None = None) -> Any:
    if isinstance(module, nn.Linear):
        return QuantizedLinear.like(module, bits, precision, device)
    assert isinstance(module, nn.Embedding)
    return QuantizedEmbedding.like(module, bits, device)


def _tie(model: PreTrainedModel, settings: ChatGLMQuantizationConfig) -> None:
    """Embeddings and head that hold the same numbers stay tied, scales included; others have to be saved both."""
    if settings.head_bits is None and not settings.quantize_embeddings:
        return
    tied = dict(type(model)._tied_weights_keys or {})
    if not settings.shares_embeddings:
        tied = {}
    model._tied_weights_keys = tied | {f"{target}_scale": f"{source}_scale" for target, source in tied.items()}
    if hasattr(model, "all_tied_weights_keys"):  # not yet inside __init__
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _note(model: PreTrainedModel, settings: ChatGLMQuantizationConfig) -> None:
    """Into config.json: our settings, and the keys that the original code reads."""
    model.config.quantization_config = settings
    model.config.quantization_bit = settings.bits
    if settings.quantize_embeddings:
        model.config.quantization_embeddings = True


# ---- transformers' from_pretrained -----------------------------------------------------------------------------------


register_quantization_config(METHOD)(ChatGLMQuantizationConfig)


class _QuantizeOne(ConversionOps):
    """One matrix of a checkpoint, as soon as it is read."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        (weight,) = input_dict.values()
        layer = model.get_submodule(name.rpartition(".")[0])
        try:
            q, scale = quantize_weight(weight[0] if isinstance(weight, list) else weight, layer.bits)
        except ValueError as error:  # kept for the end: transformers would bury it in a report
            self.errors.append(f"{name}: {error}")
            return input_dict
        return {name: q, f"{name}_scale": scale}


@register_quantizer(METHOD)
class ChatGLMQuantizer(HfQuantizer):
    """Loads quantised checkpoints, and quantises others while they are loaded."""

    quantization_config: ChatGLMQuantizationConfig
    requires_calibration = False
    is_trainable = True  # a P-tuning prefix or LoRA: gradients pass through the frozen weights
    is_qat_trainable = True  # or the Trainer refuses a prefix, which is no PEFT adapter to it
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
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(module), _Quantized)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOne(self.errors)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        settings = self.quantization_config
        if self.pre_quantized:
            apply(model, settings, empty=True)  # done by the constructor already where the config has quantization_bit
            return model
        tied = bool(model.all_tied_weights_keys)
        for parent, name, module, bits in _targets(model, settings):
            if tied and (name in EMBEDDINGS or name in HEADS):
                continue  # one tensor in the file for two layers: quantised once it is loaded
            layer = _layer_like(module, bits, settings.precision)
            layer.weight = nn.Parameter(module.weight, requires_grad=False)  # float: what the file's tensor has to be
            setattr(parent, name, layer)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.errors:
            raise ValueError(self.errors[0])
        apply(model, self.quantization_config)
        for name, module in model.named_modules():
            if isinstance(module, _Quantized):
                if module.weight.dtype != torch.int8:
                    raise ValueError(
                        f"the config says that this checkpoint is quantised, but {name}.weight is "
                        f"{module.weight.dtype}: take quantization_bit and quantization_config out of the config, and "
                        "give quantization_config to from_pretrained instead"
                    )
                module.weight.requires_grad_(False)
                module.weight_scale.requires_grad_(False)
        return model
