"""Pictures as VisualGLM reads them: squares of normalised pixels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

#: Mean and standard deviation of red, green and blue that CLIP's training had.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pixels_of(image: Image.Image, size: int) -> torch.Tensor:
    """(1, 3, size, size), float32. The picture is stretched to a square, as in the original; bicubic."""
    square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels - mean) / std)[None]
