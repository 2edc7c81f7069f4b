"""INT4 and INT8 weights in plain torch: the reference that every kernel must match, and the fallback without kernels.

The published format: one scale per output row; INT8 one column per byte, INT4 two, the EVEN column in the HIGH nibble,
both two's complement. A weight is `q * scale`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

#: Weights that are expanded at a time, so that a product needs no second copy of a large matrix.
SLICE = 1 << 24


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 values (..., columns) -> packed bytes (..., columns * bits / 8); INT8 is left as it is.

    Raises:
        ValueError: an odd number of columns with 4 bits.
    """
    if bits == 8:
        return q
    if q.shape[-1] % 2:
        raise ValueError(f"INT4 packs two columns into a byte, and {q.shape[-1]} columns are an odd number: use 8 bits")
    return (q[..., 0::2] << 4) | (q[..., 1::2] & 15)


def unpack(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed bytes (..., bytes) -> int8 values (..., bytes * 8 / bits)."""
    if bits == 8:
        return weight
    low = ((weight & 15) ^ 8) - 8  # extends the sign without a shift to the left, which may overflow
    return torch.stack((weight >> 4, low), dim=-1).flatten(-2)


def dequantize(weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in `dtype`, rounded once.

    Args:
        weight: int8 (rows, columns * bits / 8)
        weight_scale: (rows,)

    Returns:
        (rows, columns)
    """
    out = weight.new_empty((weight.shape[0], weight.shape[1] * 8 // bits), dtype=dtype)
    step = max(1, SLICE // max(1, out.shape[1]))
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        out[rows] = dequantize_rows(weight[rows], weight_scale[rows], bits, dtype)
    return out


def dequantize_rows(weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize` in one piece and for any leading dims: (..., bytes) and (...) -> (..., columns)."""
    # Eight bits times the eleven of a float16 are exact in float32, so there is one rounding even with another dtype.
    wide = dtype if dtype in (weight_scale.dtype, torch.float64) else torch.float32
    return (unpack(weight, bits).to(wide) * weight_scale.to(wide).unsqueeze(-1)).to(dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, in) -> (rows, out) in x's own dtype, on any device."""
    step = max(1, SLICE // max(1, x.shape[1]))
    parts = [
        F.linear(x, dequantize_rows(weight[start : start + step], weight_scale[start : start + step], bits, x.dtype))
        for start in range(0, weight.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
