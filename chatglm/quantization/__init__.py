"""INT4 and INT8 weights: the published scheme, the layers that hold them, and three ways to a quantised model.

* `model.quantize(4)` after loading, as in the originals;
* `from_pretrained(..., quantization_config=ChatGLMQuantizationConfig(bits=4))`, one layer at a time while loading;
* published INT4 and INT8 checkpoints, and saved quantised models, with a plain `from_pretrained`.

`chatglm.kernels` computes the products with quantised weights.
"""

from __future__ import annotations

from .layers import DenseHead, QuantizedEmbedding, QuantizedLinear
from .loading import ChatGLMQuantizer
from .models import IGNORED_ARGUMENTS, apply, packed_weights, quantize
from .scheme import quantize_weight
from .settings import ChatGLMQuantizationConfig, settings_of, stored_settings

__all__ = [
    "IGNORED_ARGUMENTS",
    "ChatGLMQuantizationConfig",
    "ChatGLMQuantizer",
    "DenseHead",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "apply",
    "packed_weights",
    "quantize",
    "quantize_weight",
    "settings_of",
    "stored_settings",
]
