"""Attributes that the originals' classes have and programs written for them read; the config holds the values."""

from __future__ import annotations

from typing import Any

import torch

from .prefix_encoder import PrefixEncoder


class HeadAttributes:
    """Mixin for models with a head."""

    config: Any

    @property
    def max_sequence_length(self) -> int:
        """The context length in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised to 4 or 8 bits."""
        return bool(self.config.quantization_bit)


class BackboneAttributes:
    """Mixin for networks without a head."""

    config: Any
    prefix_encoder: PrefixEncoder | None

    @property
    def pre_seq_len(self) -> int | None:
        """The number of positions of the P-tuning prefix in use; None without one."""
        return None if self.prefix_encoder is None else self.prefix_encoder.pre_seq_len

    @property
    def prefix_projection(self) -> bool:
        """Whether the prefix in use is made by an MLP."""
        return self.prefix_encoder is not None and self.prefix_encoder.trans is not None

    @property
    def prefix_tokens(self) -> torch.Tensor | None:
        """The ids that `prefix_encoder` takes, (pre_seq_len,); None without a prefix."""
        return None if self.pre_seq_len is None else torch.arange(self.pre_seq_len)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_attention_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def max_sequence_length(self) -> int:
        """The context length in tokens."""
        return int(self.config.max_position_embeddings)
