"""What all networks do around their blocks: check inputs, choose the KV cache, add the P-tuning prefix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from . import compat
from .attribute_names import BackboneAttributes
from .packed import Packed
from .prefix_encoder import PrefixEncoder, make_prefix_visible
from .pretrained import ChatGLMPreTrainedModel


class Backbone(BackboneAttributes, ChatGLMPreTrainedModel):
    """A network without a head: token ids to hidden states."""

    gradient_checkpointing = False
    prefix_encoder: PrefixEncoder | None

    @property
    def prefix_embedding_size(self) -> int:
        """Width of the table that a prefix with projection is made from."""
        raise NotImplementedError

    def make_prefix_encoder(self, pre_seq_len: int, projection: bool) -> PrefixEncoder:
        """A new prefix for this network, not yet attached to it."""
        config: Any = self.config
        return PrefixEncoder(
            pre_seq_len,
            config.num_layers,
            config.num_key_value_heads,
            config.head_dim,
            embedding_size=self.prefix_embedding_size,
            projection_size=config.hidden_size if projection else None,
        )

    def add_configured_prefix(self) -> None:
        """For constructors: adds the prefix that the config asks for, to be trained or loaded; freezes all else."""
        self.prefix_encoder = None
        if self.config.pre_seq_len is not None:
            self.requires_grad_(False)
            self.prefix_encoder = self.make_prefix_encoder(self.config.pre_seq_len, self.config.prefix_projection)

    def embed(
        self,
        embeddings: nn.Module,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        keywords: Iterable[str],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embeddings of a forward's tokens (batch, tokens, hidden), and the mask on their device.

        Raises:
            TypeError: a keyword is unknown (see `compat.FORWARD_KEYWORDS`).
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        compat.check_keywords(f"{type(self).__name__}.forward", keywords, self.config._attn_implementation)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = embeddings(input_ids)
        if isinstance(attention_mask, torch.Tensor):  # in a split model, the embeddings may be elsewhere
            attention_mask = attention_mask.to(inputs_embeds.device)
        return inputs_embeds, attention_mask

    def cache_to_fill(self, past_key_values: Cache | None, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The KV cache that a forward of the blocks fills: the caller's, else a fresh one with `use_cache`.

        Args:
            past_key_values, cache: the caller's, under either name.

        Raises:
            ValueError: the caller gave one under gradient checkpointing in training, which computes the blocks twice
                and so would fill it twice.
        """
        given = compat.given_cache(past_key_values, cache)
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if given is not None and checkpointing:
            raise ValueError(
                "a KV cache cannot be filled under gradient checkpointing: leave the cache out, call model.eval(), or "
                "compute without gradients (torch.no_grad())"
            )
        if given is None and use_cache and not checkpointing:
            return DynamicCache(config=self.config)
        return given

    def prefix_for(
        self, inputs_embeds: torch.Tensor, mask: Any, packed: Packed | None = None, cache: Cache | None = None
    ) -> tuple[list[Any], Any]:
        """The current prefix, as keys and values of every block (or None, None), and the mask with it visible: the
        tensor, None, or a list of them for the groups of `packed`. Behind it is what `cache` holds."""
        if self.prefix_encoder is None:
            return [(None, None)] * self.config.num_layers, mask
        length = self.prefix_encoder.pre_seq_len
        if packed is not None:
            masks = [make_prefix_visible(one, length) for one in mask]
            return self.prefix_encoder(packed.count, inputs_embeds.dtype), masks
        rounded = getattr(cache, "holds_bytes", False)
        return self.prefix_encoder(len(inputs_embeds), inputs_embeds.dtype, rounded), make_prefix_visible(mask, length)
