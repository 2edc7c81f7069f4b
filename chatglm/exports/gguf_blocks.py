"""The blocks of GGUF's Q4_0 and Q8_0: 32 weights of a row with a float16 scale. Our INT4 and INT8 fit them exactly."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.reference import unpack

BLOCK = 32


def blocks_of_quantized(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> np.ndarray:
    """The bytes of a quantised matrix as Q4_0 (INT4) or Q8_0 (INT8); every value stays what it is.

    A row has one scale here and one per block there, so the scale is repeated.

    Args:
        weight: int8 (out, in * bits / 8)
        scale: (out,)

    Returns:
        uint8 (out, in / 32 * 18) for 4 bits, (out, in / 32 * 34) for 8

    Raises:
        ValueError: the columns are no multiple of 32, or a scale is not a float16 number.
    """
    q = unpack(weight, bits).numpy()
    rows, columns = q.shape
    if columns % BLOCK:
        raise ValueError(f"a matrix with {columns} columns has no place in GGUF, whose blocks have {BLOCK}")
    half = scale.to(torch.float16)
    if not torch.equal(half.to(torch.float64), scale.to(torch.float64)):
        raise ValueError(
            f"the scales are {scale.dtype} and GGUF's are float16, so values would change: quantise the full-precision "
            "checkpoint again, or export that with --type q4_0 or q8_0"
        )
    blocks = q.reshape(rows, columns // BLOCK, BLOCK)
    if bits == 4:  # the first 16 columns of a block in the low halves of its bytes, the others in the high ones
        shifted = (blocks + 8).astype(np.uint8)
        packed = shifted[..., :16] | (shifted[..., 16:] << 4)
    else:
        packed = blocks.view(np.uint8)
    scales = np.repeat(half.numpy()[:, None], columns // BLOCK, axis=1).view(np.uint8)
    return np.concatenate([scales.reshape(rows, columns // BLOCK, 2), packed], axis=-1).reshape(rows, -1)
