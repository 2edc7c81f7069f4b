"""The layers that hold quantised weights, and the output head of a quantised model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..kernels.reference import dequantize_rows
from .scheme import check_bits, quantize_weight


class QuantizedLayer(nn.Module):
    """What both layers share: packed weights and scales that survive casts; loading refuses other kinds of weights.

    `weight` is int8 (rows, columns * bits / 8), `weight_scale` float16 (rows,); neither is trainable.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def _hold(self, rows: int, columns: int, bits: int, device: torch.device | str | None) -> None:
        check_bits(bits)
        if columns * bits % 8:
            raise ValueError(f"{columns} columns of INT4 do not fill whole bytes: use 8 bits")
        self.bits = bits
        self.weight = nn.Parameter(
            torch.zeros(rows, columns * bits // 8, dtype=torch.int8, device=device), requires_grad=False
        )
        self.weight_scale = nn.Parameter(torch.zeros(rows, dtype=torch.float16, device=device), requires_grad=False)

    def set_weight(self, weight: torch.Tensor, device: torch.device | str | None = None) -> None:
        """Quantises a float matrix into this layer, on the device of the matrix or on `device`."""
        q, scale = quantize_weight(weight.detach(), self.bits)
        self.weight = nn.Parameter(q.to(device), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.to(device), requires_grad=False)

    def share_weight(self, other: QuantizedLayer) -> None:
        """Uses the same parameters as `other`, for tied embeddings and output head."""
        self.weight, self.weight_scale = other.weight, other.weight_scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The float matrix (rows, columns)."""
        return kernels.dequantize(self.weight, self.weight_scale, self.bits, dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        packed = (self.weight, self.weight_scale)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # .half(), .bfloat16() and .to(dtype) are for activations: packed weights and scales would be damaged.
            kept = moved.dtype != tensor.dtype and any(tensor is one for one in packed)
            return tensor.to(moved.device) if kept else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}weight_scale")
        if weight is not None and weight.dtype != torch.int8:
            error_messages: list[str] = args[-1]
            error_messages.append(
                f"{prefix}weight is {weight.dtype} and this layer holds INT{self.bits}: load these weights into a "
                "model that is not quantised, then call model.quantize(bits)"
            )
            return
        if scale is not None and scale.dtype != self.weight_scale.dtype:  # copying would round them
            self.weight_scale = nn.Parameter(self.weight_scale.to(scale.dtype), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(QuantizedLayer, nn.Linear):
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
        """The layer for the weights of `linear`, still zero, with its bias; on its device or on `device`."""
        there = linear.weight.device if device is None else torch.device(device)
        layer = cls(linear.in_features, linear.out_features, False, bits=bits, precision=precision, device=there)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().to(there), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # In training even without autograd, so that a checkpointed block computes the same values both times.
        precision = "exact" if self.training else self.precision
        return kernels.linear(input, self.weight, self.weight_scale, self.bias, self.bits, precision)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
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
    """The unquantised output head of a quantised model: a quarter of the bytes read per token, so it has a kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return kernels.dense_linear(input, self.weight)
