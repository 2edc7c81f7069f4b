"""Which parts of a model are quantised, and how: settings from the caller, or from a model's config."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import kernels
from .scheme import check_bits

#: `quant_method` in config.json, by which transformers finds our classes.
QUANT_METHOD = "chatglm"

# Layers by the last part of their name.
BLOCK_MATRICES = frozenset(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"))
EMBEDDINGS = frozenset(("word_embeddings",))
HEADS = frozenset(("lm_head", "output_layer"))


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """What to quantise, and how to compute: for `from_pretrained(..., quantization_config=...)` and in config.json.

    Args:
        bits: 4 or 8.
        quantize_embeddings: quantise word embeddings and output head too, as in chatglm-6b-int4-qe.
        quantize_head: bits (4 or 8) of the output head, if the embeddings stay float or have other bits. A model with
            tied embeddings then keeps two matrices.
        precision: "default", "exact" or "int8", see `chatglm.kernels`.
    """

    def __init__(
        self,
        bits: int = 4,
        quantize_embeddings: bool = False,
        quantize_head: int | None = None,
        precision: str = "default",
        quant_method: str = QUANT_METHOD,
    ) -> None:
        check_bits(bits)
        if quantize_head is not None:
            check_bits(quantize_head)
        if precision not in kernels.PRECISIONS:
            raise ValueError(f"precision is {precision!r}: use one of {', '.join(kernels.PRECISIONS)}")
        self.bits = bits
        self.quantize_embeddings = bool(quantize_embeddings)
        self.quantize_head = quantize_head
        self.precision = precision
        self.quant_method = quant_method

    @property
    def head_bits(self) -> int | None:
        """Bits of the output head; None if it stays float."""
        return self.quantize_head or (self.bits if self.quantize_embeddings else None)

    @property
    def shares_embeddings(self) -> bool:
        """Whether embeddings and head of a model that ties them can stay one matrix."""
        return self.head_bits == (self.bits if self.quantize_embeddings else None)

    def bits_of(self, name: str, module: nn.Module) -> int | None:
        """Bits for a float layer by the last part of its name; None to leave it as it is."""
        if isinstance(module, nn.Linear):
            if name in BLOCK_MATRICES:
                return self.bits
            return self.head_bits if name in HEADS else None
        if isinstance(module, nn.Embedding) and name in EMBEDDINGS and self.quantize_embeddings:
            return self.bits
        return None


def settings_of(config: Any) -> ChatGLMQuantizationConfig | None:
    """The quantisation settings in a model config; None if it has none, or those of another method."""
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD:
        return ChatGLMQuantizationConfig.from_dict(stored)
    return stored if isinstance(stored, ChatGLMQuantizationConfig) else None


def stored_settings(config: Any) -> ChatGLMQuantizationConfig:
    """`settings_of` for a config with `quantization_bit`.

    Raises:
        ValueError: the bits were set on a finished config, where transformers does not see them.
    """
    settings = settings_of(config)
    if settings is None or settings.bits != config.quantization_bit:
        raise ValueError(
            f"quantization_bit={config.quantization_bit} in the config is for checkpoints that are quantised already: "
            "to quantise one, load it with quantization_config=ChatGLMQuantizationConfig(bits=...), or call "
            "model.quantize(...) afterwards"
        )
    return settings
