"""Names that the originals' classes have and programs written for them read; config and network have the values.

`tests/test_network_attribute_names.py` goes through them class by class.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from .prefix_encoder import PrefixEncoder


class FromConfig:
    """An attribute of a model: what the config has under the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        return self if model is None else getattr(model.config, self._name)


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
    dtype: Any

    num_layers = FromConfig()
    hidden_size = FromConfig()
    num_attention_heads = FromConfig()
    vocab_size = FromConfig()
    layernorm_epsilon = FromConfig()

    @property
    def max_sequence_length(self) -> int:
        """The context length in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def hidden_size_per_attention_head(self) -> int:
        return int(self.config.head_dim)

    @property
    def params_dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        found: torch.dtype = self.dtype
        return found

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

    def get_prompt(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.half
    ) -> tuple[torch.Tensor, ...]:
        """The P-tuning prefix in use: for each layer keys and values, (2, prefix, batch, heads, head_dim).

        Raises:
            ValueError: there is no prefix.
        """
        if self.prefix_encoder is None:
            raise ValueError(
                "this model has no P-tuning prefix: set config.pre_seq_len before it is made, or load one with "
                "chatglm.load(..., adapter=...)"
            )
        layers = self.prefix_encoder(batch_size, dtype)
        return tuple(torch.stack(layer).permute(0, 3, 1, 2, 4).to(device=device) for layer in layers)


class DecoderAttributes:
    """Mixin for all models of generations 2 and later."""

    def get_masks(
        self, input_ids: torch.Tensor, past_key_values: Cache | None = None, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the tokens do not see, (batch, 1, tokens, keys), bool: True = hidden. `forward` makes its own mask.

        Args:
            input_ids: (batch, tokens)
            padding_mask: (batch, keys), 0 for padding.
        """
        tokens = input_ids.shape[1]
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        queries = torch.arange(past, past + tokens, device=input_ids.device).unsqueeze(-1)
        hidden = torch.arange(past + tokens, device=input_ids.device) > queries
        hidden = hidden.expand(len(input_ids), 1, -1, -1)
        return hidden if padding_mask is None else hidden | (padding_mask[:, None, None] == 0)

    def get_position_ids(self, input_ids: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
        """0, 1, 2, ... for each row of `input_ids` (batch, tokens)."""
        return torch.arange(input_ids.shape[1], device=device or input_ids.device).expand_as(input_ids)
