"""The published INT4 and INT8 scheme: from a float matrix to packed integers and scales.

Symmetric, one float16 scale per output row: `scale = max|w| / 7` (127 for INT8), `q = round(w / scale)`.
"""

from __future__ import annotations

import torch
from torch import nn

from ..kernels import huge_pages
from ..kernels.reference import pack

#: Elements of a matrix to quantise at a time: all at once, the intermediates would be larger than the layer.
SLICE_NUMBERS = 1 << 20


def quantize_weight(
    weight: torch.Tensor, bits: int, scale_dtype: torch.dtype | None = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float matrix (out, in) -> int8 (out, in * bits / 8) and scales (out,).

    Computed in the weight's own dtype, as the originals do, and bfloat16 in float32. A row of zeros gets scale 0.

    Args:
        weight: any floating-point dtype, any device.
        bits: 4 or 8.
        scale_dtype: float16 as in generation 1 and in all published checkpoints; None for the weight's own dtype, as in
            the code of generations 2 and 3 (no difference for float16 weights).

    Raises:
        ValueError: other bits, an odd number of columns with 4 bits, or values too large for any scale.
    """
    check_bits(bits)
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"only float matrices can be quantised, not {weight.dtype} of shape {tuple(weight.shape)}")
    largest = 2 ** (bits - 1) - 1
    shape = (weight.shape[0], weight.shape[1] * bits // 8)
    plain = weight.device.type == "cpu" and type(weight) in (torch.Tensor, nn.Parameter)  # not torch's fake tensors
    q = huge_pages.empty(shape) if plain else weight.new_empty(shape, dtype=torch.int8)
    scale = weight.new_empty(weight.shape[0], dtype=scale_dtype or weight.dtype)
    step = max(1, SLICE_NUMBERS // max(1, weight.shape[1]))
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


def check_bits(bits: int) -> None:
    """Raises ValueError unless weights can be quantised to this many bits."""
    if isinstance(bits, bool) or bits not in (4, 8):
        raise ValueError(f"bits is {bits!r}: weights can be quantised to 4 or 8 bits")
